"""From passes to an artifact on fake CUDA: every family's step, snapshot and export as one rank."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch

import optim.manifolds
from data_shards.streaming.sampler import Cursor
from optim.collective_errors import Guard
from optim.collectives import ProcessGroupExchange
from optim.config import OptimConfig
from optim.manifolds import manifold_of
from optim.zero3_adam import ShardedManifoldAdam
from optim.zero_layout import FlatPartition
from pipeline.checkpoint.export import take_export
from pipeline.checkpoint.writer import HostMemory, take_snapshot
from pipeline.presets.registry import run_preset
from pipeline.run.worker_spec import TrainState
from tests.fake_gpu.fake_cuda import CUDA, fake_cuda, fake_ranks
from tests.fake_gpu.test_passes import FAMILIES, on_gpu
from tests.fake_gpu.test_step import slots


def engine_of(network, config, world_size):
    """The partitions of one rank of a network, as ZeRO-3 cuts them, and their optimizer."""
    split = {}
    for name, p in network.named_parameters():
        split.setdefault(manifold_of(p), []).append((name, p))
    partitions = []
    for manifold, named in split.items():
        found, elements = slots(
            [tuple(p.shape) for _, p in named], world_size, names=[name for name, _ in named]
        )
        flat = torch.zeros(elements, device=CUDA)
        flat.grad = torch.zeros_like(flat)
        partitions.append(FlatPartition(flat, found, manifold, lambda: None))
    groups = [{"params": [part.flat], "lr": config.lr} for part in partitions]
    optimizer = ShardedManifoldAdam(groups, config)
    matrices = [name for name, p in network.named_parameters() if manifold_of(p) is not None]
    optimizer.bind(partitions, ProcessGroupExchange(), expected_matrices=matrices)
    return SimpleNamespace(optimizer=optimizer)


@pytest.fixture(autouse=True)
def settled_projections(monkeypatch):
    """The iteration runs, on values that nobody can read: it is taken to have come to its end. So
    is the vote of the ranks, whether a projection has failed on any."""
    genuine = optim.manifolds._newton_schulz

    def iterate(X, limit):
        assert X.device == CUDA
        assert X.dtype == torch.float64
        return genuine(X, limit)[0], 0.0, 0.0

    def raise_together(guard):
        assert guard._failure is None
        guard._exchange.all_gather(torch.zeros(1, device=guard._device))

    monkeypatch.setattr(optim.manifolds, "_newton_schulz", iterate)
    monkeypatch.setattr(Guard, "raise_together", raise_together)


def route(name, world_size, rank):
    """Step, snapshot and export of a preset's network."""
    model = run_preset(name).model
    world = SimpleNamespace(rank=rank, size=world_size, device=CUDA, agree=lambda error: None)
    with fake_ranks(rank, world_size), fake_cuda() as seen:
        network = on_gpu(model, torch.bfloat16)
        shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
        engine = engine_of(network, OptimConfig(), world_size)
        engine.optimizer.step()
        seen.waits.clear()
        with mock.patch.object(torch.cuda, "synchronize") as synchronize:
            snapshot = take_snapshot(
                engine, HostMemory(), world=world, progress=TrainState(1, Cursor(seed=0)), config={}
            )
        copied = dict(+seen.waits)
        seen.waits.clear()
        export = take_export(engine, world=world, network=model)
    return shapes, snapshot, synchronize, copied, export, dict(seen.waits)


ALLOWED = {"export.py", "manifolds.py", "matrix_exp.py"}
OTHERS = sorted(set(FAMILIES) - {"digits", "digits-sortnet-mlp"})


@pytest.mark.parametrize(
    ("name", "world_size", "rank"),
    [("digits", 8, 0), ("digits", 8, 7), ("digits", 512, 0), ("digits", 512, 511),
     ("digits-sortnet-mlp", 512, 511),
     *(pytest.param(name, 8, 0, marks=pytest.mark.slow) for name in OTHERS)],
)  # fmt: skip
def test_the_state_of_a_step_is_copied_and_exported(name, world_size, rank):
    shapes, snapshot, synchronize, copied, export, waits = route(name, world_size, rank)
    # Copies are asynchronous; one synchronisation ends them.
    assert copied == {}
    synchronize.assert_called_once_with(CUDA)
    assert {tensor.device.type for tensor in snapshot.tensors.values()} == {"cpu"}
    # A weight is copied when it is whole; series and iteration choose their length by norms.
    assert {place.partition(":")[0] for place in waits} <= ALLOWED, waits
    if rank:
        assert export is None
        return
    assert {name: tuple(w.shape) for name, w in export.weights.items()} == shapes
    assert {w.device.type for w in export.weights.values()} == {"cpu"}
    assert {w.dtype for w in export.weights.values()} == {torch.float32}
