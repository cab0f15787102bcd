"""ZeRO-3 with the sharded manifold Adam equals the plain float64 reference, on 1 to 4 ranks."""

import dataclasses
import functools
import math
import sys
from unittest import mock

import numpy as np
import pytest
import torch

import model.networks.lipnext.layers
from benchmarks.processes import in_ranks
from model.networks.registry import build_network
from optim.param_groups import parameter_groups
from optim.reference_adam import ReferenceManifoldAdam
from pipeline.config import ClusterConfig, TrainConfig, ZeroConfig
from pipeline.losses.emma import emma_loss
from pipeline.run.distributed import join_process_group
from pipeline.training.schedules import StepContext
from pipeline.training.worker import build_engine
from tests.harness import run_ranks
from tests.pipeline.small_runs import batches, rank_world, small_run

NOW = StepContext(0, 0.0, 1.0, 36 / 255)
STEPS = 10  # a Lookahead synchronisation at 7, polar projections at 5 and 10
BATCH = 24
# Largest difference of fp32 from float64, of a smooth network at eps 1e-5: after 20 steps the
# fp32 and float64 references themselves differ by 6e-7.
TOLERANCE = 2e-6


def smooth_abs(x: torch.Tensor, channels: int) -> torch.Tensor:
    """At the kink of |x| fp32 and float64 part ways whatever the optimizer does."""
    return torch.cat([(x[..., :channels] ** 2 + 0.01).sqrt(), x[..., channels:]], dim=-1)


def smooth_fold_(x: torch.Tensor, channels: int, *, keep: bool) -> torch.Tensor:
    """The same in place, with slopes for the signs that the fast pass keeps."""
    folded = x[:, :channels]
    smooth = (folded**2 + 0.01).sqrt()
    slopes = folded / smooth
    folded.copy_(smooth)
    return slopes


def train_config(**changes) -> TrainConfig:
    return TrainConfig(**{"global_batch": BATCH, "epochs": 1, "warmup_epochs": 0, **changes})


def cluster_config(**changes) -> ClusterConfig:
    return dataclasses.replace(small_run().cluster, **changes)


CASES = {
    "plain": small_run(),
    "clipped": small_run(train=train_config(grad_clip=0.05)),
    "accumulated": small_run(train=train_config(accumulation=2, activation_checkpointing="all")),
    "five sub-groups": small_run(zero=ZeroConfig(sub_group_size=300)),
    "X^T G, accumulated, clipped": small_run(
        optim=dataclasses.replace(small_run().optim, gradient="trivialized"),
        train=train_config(global_batch=36, accumulation=3, grad_clip=0.05),
    ),
    "gathered one by one": small_run(zero=ZeroConfig(max_live_parameters=1)),
    "whole during a step": small_run(cluster=cluster_config(persist_below=-1)),
    "whole, accumulated": small_run(
        train=train_config(accumulation=2, activation_checkpointing=True),
        cluster=cluster_config(persist_below=-1),
    ),
    "vectors whole during a step": small_run(cluster=cluster_config(persist_below=399)),
}
WHOLE = ("whole during a step", "vectors whole during a step")
FORM = "X^T G, accumulated, clipped"


def disturb(engine, config, batch):
    """A step that is skipped, and masters that change behind DeepSpeed: nothing of it may stay."""
    mean = type(config.loss).mean
    with mock.patch.object(type(config.loss), "mean", lambda *a, **k: mean(*a, **k) * math.nan):
        assert engine.step([batch], NOW) is None
    engine.step([batch], NOW)
    engine.initialise(seed=4)
    engine.step([batch], NOW)
    engine.initialise(seed=3)


def train_partitioned(rank, world_size, names):
    """Train every case; returns per case this rank's slices of the masters."""
    model.networks.lipnext.layers.fold_ = smooth_fold_
    results = {}
    with rank_world(rank, world_size) as world:
        for name in names:
            config = CASES[name]
            share = config.train.global_batch // world_size
            micro = share // config.train.accumulation
            engine = build_engine(config, world=world, micro_batch=micro)
            engine.initialise(seed=3)
            if name in WHOLE:
                disturb(engine, config, batches(1, micro)[0])
            for images, labels in batches(STEPS, config.train.global_batch):
                mine = slice(rank * share, (rank + 1) * share)
                parts = zip(images[mine].split(micro), labels[mine].split(micro), strict=True)
                with mock.patch("subprocess.Popen", side_effect=AssertionError("of each step")):
                    engine.step(parts, NOW)
            assert torch.nn.functional.linear is torch._C._nn.linear, "replaced by DeepSpeed"
            slices = {}
            for partition in engine.partitions:
                for slot in partition.slots:
                    start = min(rank * slot.length, slot.numel)
                    stop = min(start + slot.length, slot.numel)
                    values = partition.flat[slot.offset : slot.offset + stop - start]
                    slices[slot.name] = values.detach().clone().numpy()
            results[name] = {
                "slices": slices,
                "matrices": (engine.optimizer.partitioned_matrices, engine.matrix_count),
                "partitions": len(engine.partitions),
                "export": {
                    key: None if whole is None else whole.numpy()
                    for key, whole in engine.optimizer.export()
                },
            }
    return results


@functools.cache
def train_reference(name):
    """The same training on one process in float64, with the operators that autograd knows."""
    layers = model.networks.lipnext.layers
    with (
        mock.patch.object(layers, "beta_abs", smooth_abs),
        mock.patch.object(layers.Block, "plain", True),
    ):
        return train_whole(CASES[name])


def train_whole(config):
    """By the gradients G, whatever the ranks have."""
    network = build_network(config.model).double()
    network.initialise(seed=3)
    optim = dataclasses.replace(config.optim, gradient="ambient")
    optimizer = ReferenceManifoldAdam(parameter_groups(network.named_parameters(), optim), optim)
    for images, labels in batches(STEPS, config.train.global_batch):
        logits, rates = network.logits_and_rates(images.double() / 255, labels, 36 / 255)
        loss = emma_loss(logits, rates, labels, 36 / 255, config.loss.scale)
        optimizer.zero_grad()
        loss.backward()
        if config.train.grad_clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.train.grad_clip)
        optimizer.step()
    masters = {name: p.detach().clone() for name, p in network.named_parameters()}
    exported = {name: optimizer.averaged(p) for name, p in network.named_parameters()}
    return masters, exported


@pytest.mark.distributed
@pytest.mark.parametrize(
    "world_size", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))]
)
def test_equals_the_float64_reference(world_size):
    # Four ranks on two cores are slow to start; one case of each kind runs at every size.
    names = list(CASES) if world_size in (2, 3) else ["plain", "accumulated", FORM, *WHOLE]
    results = run_ranks(train_partitioned, world_size, names, timeout=240)
    for name in names:
        masters, exported = train_reference(name)
        for key, expected in masters.items():
            whole = torch.cat([torch.from_numpy(r[name]["slices"][key]) for r in results])
            difference = (whole.view(expected.shape).double() - expected).abs().max()
            assert difference < TOLERANCE, f"{name}: {key} differs by {difference:.1e}"
        for key, expected in exported.items():
            whole = torch.from_numpy(results[0][name]["export"][key])
            assert (whole.double() - expected).abs().max() < TOLERANCE, f"{name}: export of {key}"
        if name in WHOLE:
            for found in results:
                for key, values in found["plain"]["slices"].items():
                    assert np.array_equal(values, found[name]["slices"][key]), f"{name}: {key}"
        claimed, declared = results[0][name]["matrices"]
        assert declared == 5
        assert claimed == (5 if world_size > 1 else 0)


def test_cases_differ_where_they_should():
    """The clipped cases really clip, so that their equality says something."""
    plain, _ = train_reference("plain")
    clipped, _ = train_reference("clipped")
    assert (plain["head.weight"] - clipped["head.weight"]).abs().max() > 1e-3
    clips = dataclasses.replace(CASES[FORM].train, grad_clip=0.0)
    unclipped, _ = train_whole(dataclasses.replace(CASES[FORM], train=clips))
    assert (train_reference(FORM)[0]["head.weight"] - unclipped["head.weight"]).abs().max() > 1e-3
    assert (
        dataclasses.replace(CASES["plain"], zero=ZeroConfig(sub_group_size=300))
        == CASES["five sub-groups"]
    )


def loaded_by_a_rank(config):
    """Modules of torch's compiler in a fresh process after a step, and its decorators by then."""
    compiled, disabled = torch.compile, torch.compiler.disable
    with join_process_group(config.cluster) as world:
        engine = build_engine(config, world=world, micro_batch=24)
        engine.initialise(seed=3)
        engine.step(batches(1, 24), NOW)
        engine.close()
    found = [name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules]
    return found, (torch.compile, torch.compiler.disable) == (compiled, disabled)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_rank_does_not_load_the_compiler():
    assert in_ranks(1, loaded_by_a_rank, CASES[WHOLE[0]]) == [([], True)]
