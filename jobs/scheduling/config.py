"""Configuration of the evaluation scheduler."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import pydantic
import tyro

from data_shards.command_line.settings import settings
from data_shards.untrusted.json_input import parse_object
from data_shards.untrusted.limits import UntrustedError
from jobs.evaluation.config import EvaluationConfig, suite_config
from jobs.evaluation.suites import EVALUATION_SUITES
from pipeline.tracking.checkpoint_query import Checkpoint
from pipeline.tracking.client import SQLITE, TrackingConfig

_STRICT = pydantic.ConfigDict(extra="forbid")
_Seconds = Annotated[float, pydantic.Field(gt=0)]


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_STRICT)
class TaskConfig:
    """How a scheduled evaluation runs; nothing here changes a result."""

    launcher: Annotated[Literal["ray", "local"], tyro.conf.arg(name="cluster.launcher")] = "ray"
    """ray: tasks; local: in the process of the evaluation."""
    max_in_flight: Annotated[int, pydantic.Field(gt=0)] = 2
    """Ray tasks of one evaluation under way at the same time."""
    num_gpus: Annotated[float, pydantic.Field(ge=0)] = 0.0
    """GPUs (or a fraction of one) of each task; 0: none."""
    placement: Annotated[dict[str, str], tyro.conf.arg(name="cluster.placement")] = (
        dataclasses.field(default_factory=dict)
    )
    """Labels of the nodes that may run the tasks, e.g. `role !training`; see jobs.evaluate_cra."""


@pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=_STRICT)
class ScheduleConfig:
    """Evaluate the checkpoints of an MLflow store: when, which, and where."""

    rules: tuple[str, ...] = ("certify+fast-attack@checkpoint",)
    """SUITE@WHEN. Suites: certify, certify+fast-attack, certify+strong-attack,
    certify+strong-attack+bfloat16. When: `checkpoint` (as soon as there is one), an interval such
    as `30m`, `6h`, `1d`, or a cron expression such as `0 3 * * *`."""
    newest: bool = False
    """Evaluate only the newest checkpoint of every training run."""
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    """MLflow store; its experiment is the one that is watched, all without one."""
    models: tuple[str, ...] = ()
    """Registered models whose versions are watched as well."""
    claims: str = ""
    """URL of a folder that all schedulers of the store share. Default: `claims` beside an sqlite
    store; an MLflow server needs one."""
    address: Annotated[str, tyro.conf.arg(name="cluster.address")] = ""
    """Ray cluster (http://HOST:8265) that gets the evaluations as Ray jobs. Default: processes of
    this machine."""
    runtime_env: str = "{}"
    """Runtime environment of the Ray jobs, as JSON."""
    shards: Annotated[str | None, tyro.conf.arg(name="data.shards")] = None
    """URL of the shard set; default: what each artifact was trained on."""
    tasks: Annotated[TaskConfig, tyro.conf.arg(name="")] = TaskConfig()
    """How an evaluation runs."""
    parallel: Annotated[int, pydantic.Field(gt=0)] = 1
    """Evaluations of this scheduler under way at the same time."""
    attempts: Annotated[int, pydantic.Field(gt=0)] = 5
    """How often an evaluation that fails or is killed is attempted; bad input is refused once."""
    lease_s: _Seconds = 120.0
    """Seconds without a sign of life after which an attempt is lost and made again."""
    poll_s: _Seconds = 30.0
    """Seconds between two looks for new checkpoints."""
    patience_s: _Seconds = 3600.0
    """Seconds for which `certify` is left to a training in progress, which does the same."""
    timezone: str = "UTC"
    """Time zone of cron expressions."""
    once: bool = False
    """Apply all rules now, wait for the evaluations and end: for cron of any kind."""
    status: bool = False
    """Print one page about what is evaluated, under way, waiting and failed."""
    entry: str = "jobs.evaluate_cra:main"
    """Function of an evaluation; as `jobs.evaluate_cra:main`."""

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> ScheduleConfig:
        for suite in self.suites:
            if suite not in EVALUATION_SUITES:
                known = ", ".join(EVALUATION_SUITES)
                raise ValueError(f"no evaluation suite {suite!r}; known: {known}")
        if "@" in urlsplit(self.tracking.uri).netloc:
            raise ValueError(
                "tracking.uri holds credentials, which would stand in the command of every "
                "evaluation: give them in the environment (MLFLOW_TRACKING_USERNAME ...)"
            )
        if not self.claims and not self.tracking.uri.startswith("sqlite:"):
            raise ValueError(
                "an MLflow server needs --claims URL, a folder that all schedulers share, "
                "e.g. s3://bucket/claims"
            )
        try:
            parse_object(self.runtime_env, "runtime_env")
        except UntrustedError as error:
            raise ValueError(f"runtime_env must be a JSON object: {error}") from error
        return self

    @property
    def suites(self) -> tuple[str, ...]:
        """Suites of the rules, in their order."""
        return tuple(dict.fromkeys(rule.partition("@")[0] for rule in self.rules))

    @property
    def claims_url(self) -> str:
        """Folder of the claims."""
        if self.claims:
            return self.claims
        return str(Path(self.tracking.uri.removeprefix(SQLITE)).parent / "claims")

    def evaluation(self, suite: str, checkpoint: Checkpoint) -> EvaluationConfig:
        """Return the evaluation of a checkpoint by a suite, as its training would make it."""
        return suite_config(
            suite,
            checkpoint.artifact_url,
            split=checkpoint.split,
            eps=checkpoint.eps,
            shards=self.shards,
            tracking=dataclasses.replace(self.tracking, experiment=checkpoint.experiment),
            **dataclasses.asdict(self.tasks),
        )


def arguments(config: EvaluationConfig) -> list[str]:
    """Return the command line of `jobs.evaluate_cra` that says the same as a config."""
    words = []
    known = {one.option: one for one in settings(EvaluationConfig)}
    for name, value in _changed(config).items():
        flag = known[name].flag
        if isinstance(value, bool):
            words.append(flag if value else known[name].negated)
        elif isinstance(value, dict):
            words += [flag, *(word for pair in value.items() for word in pair)]
        elif isinstance(value, tuple):
            words += [flag, *value]
        else:
            words += [flag, str(value)]
    return words


def _changed(config: EvaluationConfig) -> dict[str, Any]:
    """Fields that differ from their defaults, nested ones with a dot."""
    default = EvaluationConfig(artifact="")
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value, usual = getattr(config, field.name), getattr(default, field.name)
        if field.name == "tracking":
            named = {"tracking.uri": value.uri, "tracking.experiment": value.experiment}
            found |= {name: given for name, given in named.items() if given}
            if value.addresses:
                found["tracking.addresses"] = value.addresses
        elif value != usual:
            found[field.name] = value
    return found


def log_folder() -> Path:
    """Where evaluations that run on this machine write their output."""
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(cache, "certified-pretrain", "schedule")
