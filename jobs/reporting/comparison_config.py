"""Settings of a comparison, and how a trial changes a preset."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, Literal

import pydantic
import tyro

from pipeline.tracking.client import SQLITE, TrackingConfig

_CHANGE = re.compile(r"([a-z][\w.-]*)\*(\d+(?:\.\d+)?)")


def parse_change(text: str) -> tuple[str, float]:
    """Setting and factor of a change such as `optim.lr*0.5`.

    Raises:
        ValueError: another form, or the factor 0.
    """
    match = _CHANGE.fullmatch(text)
    if match is None or float(match[2]) == 0:
        raise ValueError(f"change {text!r} is not of the form setting*factor, such as optim.lr*0.5")
    return match[1], float(match[2])


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid")
)
class CompareConfig:
    """Train presets under an equal budget and put their certified accuracies side by side."""

    presets: Annotated[tuple[str, ...], pydantic.Field(min_length=1)]
    """Presets to compare; those of one norm share a table and a figure."""
    budget: Literal["time", "steps", "parameters"] = "time"
    """What is equal. `time`: seconds of the training loop, from the speed of a short first run;
    `steps`: optimizer steps; `parameters`: no network may be larger, each trains as its preset."""
    amount: Annotated[float, pydantic.Field(gt=0)] = 90.0
    """The budget: seconds, steps or the largest number of parameters."""
    seeds: Annotated[tuple[int, ...], pydantic.Field(min_length=1)] = (0,)
    """Seeds of the final runs; the table has their mean and standard deviation."""
    trials: Annotated[int, pydantic.Field(ge=0)] = 0
    """Trials per preset on `fit` and `validation`, the same number for each; 0 tunes nothing. The
    first is the preset itself, each other one applies the next change to the best so far."""
    changes: tuple[str, ...] = (
        "optim.lr*2",
        "optim.lr*0.5",
        "loss.eps*1.25",
        "loss.eps*0.8",
        "loss.scale*1.5",
        "loss.scale*0.67",
        "optim.lr*1.4",
        "optim.lr*0.7",
    )
    """What the trials change, in this order, as setting*factor."""
    parallel: Annotated[int, pydantic.Field(ge=1)] = 1
    """Runs at the same time; with the budget `time` all runs then share the machine alike."""
    probe_steps: Annotated[int, pydantic.Field(ge=4)] = 40
    """Steps of the short run that measures the speed of a preset."""
    workers: Annotated[
        Annotated[int, pydantic.Field(ge=1)], tyro.conf.arg(name="cluster.workers")
    ] = 1
    """Ranks of a run; more than one trains on Ray."""
    threads: Annotated[int, pydantic.Field(ge=1), tyro.conf.arg(name="cluster.cpus-per-worker")] = 1
    """Compute threads of a rank."""
    shards: Annotated[str, tyro.conf.arg(name="data.shards")] = ""
    """URL of the shard set; empty: what the preset makes itself."""
    extra: tuple[str, ...] = ()
    """More words for every run's command line, each as one word: `--extra=--train.log-every=5`."""
    out: str = "runs/compare"
    """Local folder of the runs, the table and the figures. A run that is finished there is not
    repeated, so a comparison that was stopped goes on when it is given again."""
    tracking: TrackingConfig = TrackingConfig(uri="")
    """MLflow store; default: mlflow.db in `out`, experiment compare."""

    @pydantic.field_validator("changes")
    @classmethod
    def _changes(cls, changes: tuple[str, ...]) -> tuple[str, ...]:
        for change in changes:
            parse_change(change)
        return changes

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> CompareConfig:
        if self.trials > len(self.changes) + 1:
            raise ValueError(
                f"trials={self.trials}, but there are {len(self.changes)} changes: at most "
                f"{len(self.changes) + 1} trials (the preset itself is the first)"
            )
        for name, values in (("presets", self.presets), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {values} names one twice")
        return self

    def store(self) -> TrackingConfig:
        """The MLflow store of all runs and of the comparison."""
        return dataclasses.replace(
            self.tracking,
            uri=self.tracking.uri or f"{SQLITE}{self.out}/mlflow.db",
            experiment=self.tracking.experiment or "compare",
        )
