"""Small runs that the tests of pipeline share, and the process groups in which their ranks run."""

import contextlib
import dataclasses
import gc
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from data_shards.sources.digits import digits
from data_shards.write import write_shard_set
from model.networks.lipnext.config import LipNeXtConfig
from optim.config import OptimConfig
from optim.errors import OptimizerError
from pipeline.config import ClusterConfig, RunConfig, TrainConfig
from pipeline.errors import PipelineError
from pipeline.losses.emma import EmmaLoss
from pipeline.resilience.signals import Interruption
from pipeline.run.distributed import join_process_group
from pipeline.run.events import CheckpointSaved, Event, Metrics
from pipeline.run.worker_spec import WorkerSpec
from pipeline.training import worker
from pipeline.training.hooks import Hook
from pipeline.training.zero3 import Zero3


def small_model(**changes) -> LipNeXtConfig:
    """1x8x8 images, width 20: 400 elements are not divisible by 3, nor 20 rows by 8."""
    settings = {
        "input_shape": (1, 8, 8),
        "num_classes": 10,
        "patch": 2,
        "width": 20,
        "depth": 2,
        "alpha": 1 / 8,
        **changes,
    }
    return LipNeXtConfig(**settings)


def small_run(**parts) -> RunConfig:
    """A run on 1x8x8 images, gathered module by module as a large network is.

    `parts` replace whole sections of the configuration.
    """
    base = RunConfig(
        preset="test",
        model=small_model(),
        optim=OptimConfig(lr=1e-2, eps=1e-5, lookahead_steps=7, polar_every=5),
        loss=EmmaLoss(eps=36 / 255, eps_start=1.0, eps_end=1.0, scale=4.0),
        train=TrainConfig(global_batch=24, epochs=1, warmup_epochs=0),
        cluster=ClusterConfig(launcher="local", device="cpu", persist_below=0),
    )
    return dataclasses.replace(base, **parts)


@contextlib.contextmanager
def rank_world(rank: int, world_size: int):
    """The world of a rank that tests.harness started."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
    )
    warnings.filterwarnings("ignore", category=FutureWarning)
    with join_process_group(ClusterConfig(launcher="local", device="cpu")) as world:
        yield world


def batches(steps: int, batch: int, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Random uint8 images (B, 1, 8, 8) and labels whose class shows in the brightness of a row."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(steps):
        labels = torch.randint(10, (batch,), generator=generator)
        images = torch.randint(0, 100, (batch, 1, 8, 8), generator=generator)
        images[torch.arange(batch), 0, labels % 8] += 100 + 5 * (labels[:, None] // 8)
        out.append((images.to(torch.uint8), labels))
    return out


def small_shards(folder) -> str:
    """A shard set of the first 170 digits: 136 for training, five and two thirds batches of 24."""
    source = digits()
    parts = {name: getattr(source, name)[:170] for name in ("labels", "test", "validation")}
    return str(write_shard_set(dataclasses.replace(source, **parts), folder).store)


def local_state(engine: Zero3) -> dict[str, np.ndarray]:
    """All that one rank holds, without padding: `kind/name` slices, working weights, scalars."""
    optimizer = engine.optimizer
    rank = optimizer.exchange.rank
    state = {}
    held = {}
    for kind, partition, tensor in optimizer.partitioned_state():
        for slot in partition.slots:
            held[slot.name] = max(0, min(slot.length, slot.numel - rank * slot.length))
            values = tensor[slot.offset : slot.offset + held[slot.name]]
            state[f"{kind}/{slot.name}"] = values.detach().clone().numpy()
    for name, p in engine._engine.module.network.named_parameters():
        # NumPy has no bf16; the step to fp32 is exact.
        state[f"working/{name}"] = p.ds_tensor.detach()[: held[name]].float().clone().numpy()
    for name, value in optimizer.scalar_state().items():
        state[f"scalar/{name}"] = np.array([value])
    return state


def whole_state(states: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The slices of all ranks joined; scalars are those of rank 0."""
    return {
        key: first if key.startswith("scalar/") else np.concatenate([s[key] for s in states])
        for key, first in states[0].items()
    }


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    """Equal keys, types, shapes and bytes (so that NaN equals NaN and 0 differs from -0)."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].tobytes() == b[k].tobytes()
        for k in a
    )


@dataclasses.dataclass
class Outcome:
    """What one rank saw of one run.

    Attributes:
        events: what the worker emitted on this rank.
        error: message of the PipelineError that ended the run, or empty.
        start: state when training began; empty if it did not.
        before: state before the last step that was begun.
        end: state at the end; empty if that was within an iteration.
        gradients: of the first step, as the optimizer got them: slices by name.
        residuals: of the masters at the end; empty after an error.
    """

    events: list[Event] = dataclasses.field(default_factory=list)
    error: str = ""
    start: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    before: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    end: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    gradients: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    residuals: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def losses(self) -> dict[int, float]:
        """Loss by step."""
        metrics = {e.step: e.values for e in self.events if isinstance(e, Metrics)}
        return {s: v["train/loss"] for s, v in metrics.items() if "train/loss" in v}

    @property
    def kept(self) -> dict[int, CheckpointSaved]:
        """Kept checkpoints by step."""
        return {e.step: e for e in self.events if isinstance(e, CheckpointSaved)}


class Undisturbed:
    """Nobody wants this rank to stop."""

    def stop_requested(self) -> bool:
        return False

    def preempted(self) -> bool:
        return False


def observed_run(
    job: WorkerSpec, interruption: Interruption | None = None, hooks: Sequence[Hook] = ()
) -> Outcome:
    """Run the worker of this rank as it is, looking at its engine from outside."""
    outcome = Outcome()
    gc.freeze()  # DeepSpeed collects garbage at every start, over half a second of modules

    class Observed(Zero3):
        def __init__(self, **parts):
            super().__init__(**parts)
            self._optimizer_step = self.optimizer.step
            optimizer: Any = self.optimizer
            optimizer.step = self.observed_optimizer_step

        def step(self, *arguments, **options):
            outcome.before = local_state(self)
            outcome.start = outcome.start or outcome.before
            return super().step(*arguments, **options)

        def observed_optimizer_step(self):
            for partition in self.partitions:
                for slot in partition.slots:
                    if partition.flat.grad is not None and slot.name not in outcome.gradients:
                        values = partition.flat.grad[slot.offset : slot.stop]
                        outcome.gradients[slot.name] = values.clone().numpy()
            return self._optimizer_step()

        def close(self):
            with contextlib.suppress(OptimizerError):  # it ended within an iteration
                outcome.end = local_state(self)
            if sys.exc_info()[0] is None:  # else other ranks may be gone
                outcome.residuals = self.optimizer.residuals()
            super().close()

    with mock.patch.object(worker, "Zero3", Observed):
        try:
            worker.run_rank(job, outcome.events.append, interruption or Undisturbed(), hooks)
        except PipelineError as error:
            outcome.error = str(error)
    return outcome
