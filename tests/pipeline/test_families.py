"""Every family through the partitioned engine, and what it takes to add one."""

import dataclasses
from unittest import mock

import pytest
import torch
from pydantic import TypeAdapter

from data_shards.storage.store import Store
from jobs.evaluate_cra import evaluate
from model.artifact.artifact import read_artifact
from model.empirical_lipschitz import observed_lipschitz, refute
from model.networks.init import KINDS
from model.networks.registry import FAMILIES, Family, build_network
from optim.config import OptimConfig
from optim.param_groups import parameter_groups
from optim.reference_adam import ReferenceManifoldAdam
from pipeline.config import RunConfig
from pipeline.presets.registry import PRESETS, run_preset
from pipeline.run.worker_spec import WorkerSpec
from pipeline.training.schedules import StepContext
from pipeline.training.worker import build_engine, run_rank
from tests.harness import run_ranks
from tests.model.toy_network import Toy, ToyConfig
from tests.pipeline.small_runs import Undisturbed, batches, rank_world, small_run, small_shards

BATCH = 24
STEPS = 2
SEED = 3
DIGITS = [name for name in PRESETS if name.startswith("digits")]


def moment(step: int, config: RunConfig) -> StepContext:
    return StepContext(step, step / STEPS, 1.0, config.loss.eps)


def short(name: str) -> RunConfig:
    """A preset whose division by tiny second moments does not magnify rounding errors."""
    config = run_preset(name)
    train = dataclasses.replace(config.train, global_batch=BATCH, accumulation=1, seed=SEED)
    optim = dataclasses.replace(config.optim, eps=1e-4)
    cluster = dataclasses.replace(config.cluster, launcher="local", device="cpu")
    return dataclasses.replace(config, train=train, optim=optim, cluster=cluster)


def generic_values():
    """No orthogonal columns at the start: AOL's |V^T V| has its kinks where products vanish."""
    generic = KINDS["xavier_normal"]
    return mock.patch.dict(KINDS, {"orthonormal": generic, "dirac": generic})


def train_partitioned(rank, world_size, names):
    """This rank's slices of the masters after two steps, by preset."""
    results = {}
    with rank_world(rank, world_size) as world, generic_values():
        for name in names:
            config = short(name)
            share = BATCH // world_size
            engine = build_engine(config, world=world, micro_batch=share)
            engine.initialise(seed=SEED)
            mine = slice(rank * share, (rank + 1) * share)
            for step, (images, labels) in enumerate(batches(STEPS, BATCH)):
                engine.step([(images[mine], labels[mine])], moment(step, config))
            results[name] = {
                slot.name: partition.flat[
                    slot.offset : slot.offset
                    + max(0, min(slot.length, slot.numel - rank * slot.length))
                ]
                .detach()
                .clone()
                .numpy()
                for partition in engine.partitions
                for slot in partition.slots
            }
    return results


def train_plain(name: str, world_size: int) -> dict[str, torch.Tensor]:
    """The same with whole parameters in one process: gradients of the ranks' parts, averaged."""
    config = short(name)
    network = build_network(config.model)
    with generic_values():
        network.initialise(SEED)
    network.train()
    groups = parameter_groups(network.named_parameters(), config.optim)
    optimizer = ReferenceManifoldAdam(groups, config.optim)
    for step, (images, labels) in enumerate(batches(STEPS, BATCH)):
        optimizer.zero_grad()
        now = moment(step, config)
        network.begin_step(step=step, progress=now.progress, seed=SEED)
        share = BATCH // world_size
        for part, t in zip(images.split(share), labels.split(share), strict=True):
            logits, rates = network.logits_and_rates(part / 255, t, now.eps)
            loss = config.loss.mean(logits, rates, t, eps=now.eps, progress=now.progress)
            (loss / world_size).backward()
        if config.train.grad_clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.train.grad_clip)
        optimizer.step()
    return {key: p.detach() for key, p in network.named_parameters()}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_partitioned_training_equals_plain_training(world_size):
    results = run_ranks(train_partitioned, world_size, DIGITS, timeout=280)
    for name in DIGITS:
        for key, expected in train_plain(name, world_size).items():
            whole = torch.cat([torch.from_numpy(rank[name][key]) for rank in results])
            difference = float((whole.view(expected.shape) - expected).abs().max())
            assert difference < 1e-5, f"{name}: {key} differs by {difference:.1e}"


def train_here(rank, world_size, job):
    FAMILIES["toy"] = Family(ToyConfig, Toy)
    with rank_world(rank, world_size):
        pass
    kept = []
    run_rank(job, kept.append, Undisturbed())
    return kept[-1].artifact_url


@pytest.mark.integration
def test_a_new_family_is_one_file_and_one_line(tmp_path, monkeypatch):
    """It trains under ZeRO-3, is exported with its statistics, and is certified."""
    monkeypatch.setitem(FAMILIES, "toy", Family(ToyConfig, Toy))
    model = ToyConfig(input_shape=(1, 8, 8), num_classes=10)
    config = small_run(model=model, optim=OptimConfig(lr=1e-2, eps=1e-5))
    assert RunConfig.from_json(config.to_json()) == config
    assert TypeAdapter(RunConfig).dump_python(config)["model"]["gain"] == 0.5
    shards = small_shards(tmp_path / "shards")
    job = WorkerSpec(config=config, run_url=str(tmp_path / "run"), shards_url=shards, context={})
    [artifact_url] = run_ranks(train_here, 1, job)
    artifact = read_artifact(Store(artifact_url).open)
    images = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    assert artifact.network.centre.mean.abs().sum() > 0
    refute(
        artifact.network.lipschitz_upper_bound(),
        observed_lipschitz(artifact.network.double(), images),
    )
    summary = evaluate(
        {"artifact": artifact_url, "shards": shards, "launcher": "local", "record": False}
    )
    assert summary.network_bound == 0.5
    assert summary.columns["sound"].clean > 0.2
