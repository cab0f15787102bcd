"""Settings of a comparison."""

from __future__ import annotations

import dataclasses
import shlex
from typing import Annotated, Literal

import pydantic
import tyro

from pipeline.tracking.client import SQLITE, TrackingConfig


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid")
)
class CompareConfig:
    """Train presets under an equal budget and put their certified accuracies side by side."""

    presets: Annotated[tuple[str, ...], pydantic.Field(min_length=1)]
    """Presets to compare; those of one norm share a table and a figure. Each may come with more
    words of its command line, all in one pair of quotes: "digits --loss.scale 10"."""
    budget: Literal["time", "steps", "parameters"] = "time"
    """What is equal. `time`: processor seconds of the training loop, all threads counted, held to
    3 %; `steps`: optimizer steps; `parameters`: no network may be larger, each trains as its
    preset."""
    amount: Annotated[float, pydantic.Field(gt=0)] = 60.0
    """The budget of a final run: processor seconds, steps or the largest number of parameters."""
    trial_amount: Annotated[float, pydantic.Field(ge=0)] = 0.0
    """Processor seconds or steps of a trial; 0: as many as a final run has."""
    seeds: Annotated[tuple[int, ...], pydantic.Field(min_length=1)] = (0,)
    """Seeds of the final runs; the table has their mean and standard deviation."""
    trials: Annotated[int, pydantic.Field(ge=0)] = 0
    """Trials per preset on `fit` and `validation`, the same number for each; 0 tunes nothing. The
    first is the preset itself; the others, drawn by Optuna, change learning rate, temperature, two
    sizes and, where the family has one, the pool."""
    judge_by: tuple[str, ...] = ()
    """Radii of the presets' tables (`36/255`) whose mean certified accuracy judges a trial; empty:
    all of them. The temperature trades one radius for another, so this decides what it is tuned
    for."""
    parallel: Annotated[int, pydantic.Field(ge=1)] = 1
    """Runs at the same time, at most one per core."""
    workers: Annotated[int, pydantic.Field(ge=1), tyro.conf.arg(name="cluster.workers")] = 1
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

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> CompareConfig:
        if self.budget == "time" and self.workers > 1:
            raise ValueError(
                f"workers={self.workers}: the budget `time` is that of one process, whose share of "
                "its seconds the schedules follow; give --budget steps"
            )
        if self.budget == "parameters" and self.trial_amount:
            raise ValueError(f"trial_amount={self.trial_amount:g} has no effect with parameters")
        for name, values in (("presets", self.presets), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} {values} names one twice")
        for preset in self.presets:
            if not preset.strip() or shlex.split(preset)[0].startswith("-"):
                raise ValueError(f"{preset!r} does not begin with the name of a preset")
        return self

    def store(self) -> TrackingConfig:
        """The MLflow store of all runs and of the comparison."""
        return dataclasses.replace(
            self.tracking,
            uri=self.tracking.uri or f"{SQLITE}{self.out}/mlflow.db",
            experiment=self.tracking.experiment or "compare",
        )
