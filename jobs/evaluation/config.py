"""Configuration of the evaluation job."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import pydantic
import tyro

from data_shards.storage.store import Store
from jobs.errors import EvaluationError
from jobs.evaluation.suites import ATTACK_SUITES, EVALUATION_SUITES, NO_ATTACK
from model.certification.eps import check_table
from pipeline.run import layout
from pipeline.tracking.client import TrackingConfig

USUAL_EPS = {
    "l2": ("36/255", "72/255", "108/255", "255/255"),
    "linf": ("2/255", "8/255", "16/255", "25/255"),
}
"""Radii of a table by norm."""


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid")
)
class EvaluationConfig:
    """Certified robust accuracy of one artifact on one split of a shard set."""

    artifact: str
    """URL of the model artifact (a directory on any fsspec store)."""
    shards: Annotated[str | None, tyro.conf.arg(name="data.shards")] = None
    """URL of the shard set; default: the one that the artifact was trained on."""
    out: str | None = None
    """URL for the certificate, the summary and the figures; default: evaluation/<split> beside the
    artifact's files."""
    split: str = "test"
    """Split of the index to evaluate."""
    eps: tuple[str, ...] = ()
    """Radii of the table in the network's norm, as ratios of pixels in [0, 1]; empty: 36/255,
    72/255, 108/255 and 255/255 in l2, 2/255, 8/255, 16/255 and 25/255 in l-infinity."""
    deployed: Literal["float32", "bfloat16"] = "float32"
    """Program that serves the model: the arithmetic of the column cra_deployed."""
    attack: str = NO_ATTACK
    """Attack suite that bounds the true robust accuracy from above, and tests the certificate:
    `fast` (20 steps), `strong` (100 steps, targeted attacks too) or `none`."""
    attack_seed: Annotated[int, pydantic.Field(ge=0)] = 0
    """Seed of the attacks' random starts."""
    batch_size: Annotated[int, pydantic.Field(gt=0)] = 256
    """Images per forward pass."""
    launcher: Annotated[Literal["ray", "local"], tyro.conf.arg(name="cluster.launcher")] = "ray"
    """ray: one task per shard; local: the same function in this process."""
    max_in_flight: Annotated[int, pydantic.Field(gt=0)] = 2
    """Ray tasks under way at the same time."""
    max_retries: Annotated[int, pydantic.Field(ge=0)] = 2
    """How often a task whose worker died is started again."""
    num_gpus: Annotated[float, pydantic.Field(ge=0)] = 0.0
    """GPUs (or a fraction of one) that each Ray task asks for; a task also asks for one CPU.
    0: none."""
    placement: Annotated[dict[str, str], tyro.conf.arg(name="cluster.placement")] = (
        dataclasses.field(default_factory=dict)
    )
    """Labels of the nodes that may run the tasks, as pairs of Ray's label selectors:
    `role evaluation` or `role !training`. Default: any node, also beside a training."""
    device: Annotated[Literal["auto", "cpu", "cuda"], tyro.conf.arg(name="cluster.device")] = "auto"
    """Device of the forward pass; auto: cuda where the task sees one."""
    record: bool = True
    """Record the result in MLflow."""
    tracking: TrackingConfig = TrackingConfig(uri="")
    """MLflow store of the record; default: the store of the run that made the artifact."""

    @pydantic.field_validator("eps")
    @classmethod
    def _ratios(cls, eps: tuple[str, ...]) -> tuple[str, ...]:
        check_table(eps)
        return eps

    @pydantic.field_validator("attack")
    @classmethod
    def _known(cls, attack: str) -> str:
        if attack not in (NO_ATTACK, *ATTACK_SUITES):
            known = ", ".join((NO_ATTACK, *ATTACK_SUITES))
            raise ValueError(f"no attack suite {attack!r}; known: {known}")
        return attack

    def for_norm(self, norm: str) -> EvaluationConfig:
        """Return the config with the usual radii of a norm, where none are named."""
        return self if self.eps else dataclasses.replace(self, eps=USUAL_EPS[norm])


def suite_config(
    suite: str, artifact: str, *, split: str = EvaluationConfig.split, **settings: Any
) -> EvaluationConfig:
    """Return the evaluation of an artifact by a suite, with its own output beside the artifact.

    Args:
        suite: name of the evaluation suite.
        artifact: URL of the artifact.
        split: split of the shard set.
        settings: further fields of EvaluationConfig: where it runs and what it records.

    Raises:
        EvaluationError: no such suite.
    """
    if suite not in EVALUATION_SUITES:
        raise EvaluationError(
            f"no evaluation suite {suite!r}; known: {', '.join(EVALUATION_SUITES)}"
        )
    changes = EVALUATION_SUITES[suite]
    out = None
    if changes:  # else the place where training itself puts the same evaluation
        folder = f"{split}-{suite.replace('+', '-')}"
        out = Store(artifact).child(layout.evaluation(folder)).url
    return EvaluationConfig(artifact=artifact, split=split, **{"out": out, **settings, **changes})
