"""Evaluation suites by name: the settings in which they differ, in one place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_shards.storage.store import Store
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.results import EvaluationError
from pipeline.run import layout

SUITES: Mapping[str, Mapping[str, Any]] = {
    # The certificate alone: the evaluation that training itself makes of every kept checkpoint.
    "quick": {},
    # With a first upper bound of the true robust accuracy.
    "standard": {"attack": "quick"},
    # With the strongest upper bound that this project has.
    "sound+attack": {"attack": "standard"},
    # And the column cra_deployed of the program that most accelerators serve.
    "full": {"attack": "standard", "deployed": "bfloat16"},
}


def suite_config(
    suite: str, artifact: str, *, split: str = EvaluationConfig.split, **settings: Any
) -> EvaluationConfig:
    """Return the evaluation of an artefact by a suite, with its own output beside the artefact.

    Args:
        suite: name of the suite.
        artifact: URL of the artefact.
        split: split of the shard set.
        settings: further fields of EvaluationConfig: where it runs and what it records.

    Raises:
        EvaluationError: no such suite.
    """
    if suite not in SUITES:
        raise EvaluationError(f"no evaluation suite {suite!r}; known: {', '.join(SUITES)}")
    changes = SUITES[suite]
    out = None
    if changes:  # else the place where training itself puts the same evaluation
        folder = f"{split}-{suite.replace('+', '-')}"
        out = Store(artifact).child(layout.evaluation(folder)).url
    return EvaluationConfig(artifact=artifact, split=split, **{"out": out, **settings, **changes})
