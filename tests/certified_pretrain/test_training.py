"""A plain PyTorch loop: the optimizer is the reference, and it trains."""

import io

import pytest
import torch
from sklearn.datasets import load_digits

import certified_pretrain as cp
from optim.config import OptimConfig
from optim.errors import OptimizerError
from optim.manifolds import manifold_of
from optim.param_groups import parameter_groups
from optim.reference_adam import ReferenceManifoldAdam

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.99), "lookahead_steps": 3, "polar_every": 4}


def network():
    return cp.networks.lipnext((1, 8, 8), 10, patch=4, width=32, depth=2, alpha=1 / 8, pool="flat")


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(16, 1, 8, 8, generator=generator)
    return images, torch.randint(0, 10, (16,), generator=generator)


def step(model, optimizer, seed):
    optimizer.zero_grad()
    loss = cp.emma_loss(model, *batch(seed))
    loss.backward()
    optimizer.step()


def test_it_equals_the_reference_bit_for_bit():
    """Over a synchronisation of Lookahead, polar projections and a learning rate that changes."""
    ours, theirs = network(), network()
    config = OptimConfig(**SETTINGS)
    optimizer = cp.ManifoldAdam(ours.parameters(), **SETTINGS)
    reference = ReferenceManifoldAdam(parameter_groups(theirs.named_parameters(), config), config)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
    for seed in range(12):
        step(ours, optimizer, seed)
        step(theirs, reference, seed)
        schedule.step()
        for group in reference.param_groups:
            group["lr"] = config.lr * 0.5 ** ((seed + 1) // 5)
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other), name
        assert torch.equal(optimizer.averaged(mine), reference.averaged(other))
        if (manifold := manifold_of(mine)) is not None:
            assert manifold.residual(mine) < 1e-5


def test_x_t_g_of_the_backward_pass_trains_as_g_does():
    """Three micro-batches a step, clipped, over a synchronisation and a polar projection."""
    models = []
    for form in ("ambient", "trivialized"):
        model = network().double()
        settings = {**SETTINGS, "eps": 1e-5, "retraction": "fast", "gradient": form}
        optimizer = cp.ManifoldAdam(model.parameters(), **settings)
        for seed in range(5):
            optimizer.zero_grad()
            for part in range(3):
                images, labels = batch(3 * seed + part)
                (cp.emma_loss(model, images.double(), labels) / 3).backward()
            assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.1
            optimizer.step()
        models.append(dict(model.named_parameters()))
    ambient, found = models
    for name, p in found.items():
        torch.testing.assert_close(p, ambient[name], rtol=0, atol=1e-9)


def test_an_optimizer_that_does_not_ask_gets_g_again():
    model, gradients = network(), []
    for form in ({}, {"gradient": "trivialized"}, {}):
        cp.ManifoldAdam(model.parameters(), **form)
        loss = cp.emma_loss(model, *batch(0))
        gradients.append(torch.autograd.grad(loss, model.blocks[0].R)[0])
    assert torch.equal(gradients[0], gradients[2])
    assert (gradients[1] - gradients[2]).norm() > 0.5 * gradients[2].norm()


def test_a_saved_state_goes_on_bit_for_bit():
    model = network()
    optimizer = cp.ManifoldAdam(model.parameters(), **SETTINGS)
    for seed in range(4):
        step(model, optimizer, seed)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)  # plain values alone
    again = network()
    again.load_state_dict(state["model"])
    resumed = cp.ManifoldAdam(again.parameters(), **SETTINGS)
    resumed.load_state_dict(state["optimizer"])
    for seed in range(4, 9):
        step(model, optimizer, seed)
        step(again, resumed, seed)
    for mine, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_half_precision_is_refused():
    with pytest.raises(OptimizerError, match="bfloat16"):
        cp.ManifoldAdam(network().bfloat16().parameters())


def test_a_loop_of_fifteen_lines_trains_a_certified_classifier():
    digits = load_digits()
    images = torch.from_numpy(digits.images)[:, None].float() / 16
    labels = torch.from_numpy(digits.target)
    model = network()
    optimizer = cp.ManifoldAdam(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
    before = cp.evaluate(cp.certified(model), pixels(images, labels, slice(1500, None)))
    for epoch in range(4):
        order = torch.randperm(1500, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(64):
            loss = cp.emma_loss(model, images[rows], labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    after = cp.evaluate(cp.certified(model), pixels(images, labels, slice(1500, None)))
    assert before.clean < 0.3
    assert after.clean > 0.8
    assert after.cra["36/255"] > 0.5


def pixels(images, labels, part):
    return (255 * images[part]).round().to(torch.uint8), labels[part]
