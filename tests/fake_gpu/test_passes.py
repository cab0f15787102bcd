"""Every family's forward and backward pass on tensors that claim to be on a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from model.networks.linf.sortnet import SortNet
from model.networks.registry import build_network
from pipeline.presets.registry import run_preset
from pipeline.training.device_flops import DTYPES
from pipeline.training.objective import Objective
from pipeline.training.schedules import StepContext
from tests.fake_gpu.fake_cuda import CUDA, backward, fake_cuda
from tests.repetitions import mostly_slow

FAMILIES = (
    "digits", "digits-dense", "digits-soc", "digits-soc-mlp", "digits-sll", "digits-cpl",
    "digits-aol", "digits-sortnet", "digits-sortnet-mlp", "digits-linfdist", "digits-groupsort",
    "digits-liresnet", "digits-bronet",
)  # fmt: skip
BATCH = 4


@pytest.fixture(autouse=True)
def drawn_outside(monkeypatch):
    """SortNet draws with a generator of the host, whose values the fake mode would not let it read:
    its shapes are drawn outside of the mode."""
    genuine = SortNet._kept

    def kept(self, layer, points, device):
        with _disable_current_modes():
            found = genuine(self, layer, points, torch.device("cpu"))
        if found is None:
            return None
        return (
            torch.zeros(found.shape, dtype=found.dtype).pin_memory().to(device, non_blocking=True)
        )

    monkeypatch.setattr(SortNet, "_kept", kept)


def on_gpu(model, dtype):
    """The network in a type: a fake parameter could not be converted afterwards."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with CUDA:
            return build_network(model)
    finally:
        torch.set_default_dtype(usual)


def training_pass(name, precision, *, recomputed):
    """Waits of one pass, gradients that are missing or elsewhere."""
    config = run_preset(name)
    with fake_cuda() as seen:
        network = on_gpu(config.model, DTYPES[precision])
        network.recomputed_blocks = network.block_count * recomputed
        objective = Objective(network, config.loss)
        images = torch.zeros((BATCH, *config.model.input_shape), dtype=torch.uint8)
        labels = torch.zeros(BATCH, dtype=torch.int64)
        network.begin_step(step=3, progress=0.3, seed=0)
        images, labels = (t.pin_memory().to(CUDA, non_blocking=True) for t in (images, labels))
        loss, sums = objective(images, labels, StepContext(3, 0.3, 1.0, config.loss.eps))
        assert loss.device == sums.device == CUDA
        backward(loss)
        lost = [n for n, p in network.named_parameters() if p.grad is None or p.grad.device != CUDA]
    return dict(seen.waits), lost


WAITS = {"cholesky.py:_factor", "cholesky.py:_check_residuals"}
"""Allowed, of networks whose rows a Cholesky factor makes orthonormal: without one the run ends and
says why, and a certificate asks whether the residuals are as small as it charges."""


@pytest.mark.parametrize(
    "name", mostly_slow(FAMILIES, set(FAMILIES) - {"digits-aol", "digits-bronet", "digits-soc-mlp"})
)
def test_a_pass_stays_on_the_device_and_the_host_waits_for_nothing(name):
    for precision, recomputed in (("fp32", False), ("bf16", True)):
        waits, lost = training_pass(name, precision, recomputed=recomputed)
        assert set(waits) <= WAITS, (name, precision, recomputed, waits)
        assert lost == [], (name, precision, recomputed)


# Bounds of SOC and CPL are many small operators. AOL is like SLL, BRONet like LiResNet.
SLOW = ("digits-aol", "digits-bronet", "digits-cpl", "digits-soc", "digits-soc-mlp")


@pytest.mark.parametrize("name", mostly_slow(FAMILIES, set(FAMILIES) - set(SLOW)))
def test_an_evaluation_of_float64_stays_on_the_device(name):
    config = run_preset(name)
    with fake_cuda() as seen, torch.no_grad():
        network = on_gpu(config.model, torch.float64).eval()
        images = torch.zeros((BATCH, *config.model.input_shape), dtype=torch.float64, device=CUDA)
        logits, slopes = network.logits_and_slopes(images)
    assert logits.device == slopes.device == CUDA
    assert logits.dtype == torch.float64
    assert set(seen.waits) <= WAITS, seen.waits


def test_gradients_of_the_fake_pass_are_those_of_autograd():
    """The walk that stands in the place of autograd's engine, on the host."""
    network = build_network(run_preset("digits").model)
    network.recomputed_blocks = network.block_count
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    images = torch.rand(BATCH, *run_preset("digits").model.input_shape)
    found = []
    for walk in (backward, torch.Tensor.backward):
        network.zero_grad()
        walk(network.logits_and_slopes(images)[0].square().sum())
        found.append([p.grad for p in network.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_what_the_host_reads_is_noticed():
    with fake_cuda() as seen:
        pageable = torch.zeros(3).to(CUDA, non_blocking=True)
        torch.zeros(3).pin_memory().to(CUDA)
        pageable.cpu()
    assert sum(seen.waits.values()) == 3
