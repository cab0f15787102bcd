"""Evaluation suites and attack suites by name; adding one takes an entry of a table.

An attack suite says how images are attacked (`--attack fast`). An evaluation suite says what is
computed of a checkpoint (`--rules certify@checkpoint`), an attack suite included. No name occurs in
both tables, and the name of an evaluation suite lists its parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from model.attacks import apgd, apgd_targeted, pgd

NO_ATTACK = "none"


@dataclass(frozen=True)
class AttackSuite:
    """Attacks that are tried in this order on the samples that still hold."""

    methods: Mapping[str, Callable[..., Tensor]]
    """Functions of model.attacks by name."""
    steps: int
    """Gradient steps of a run."""
    restarts: int = 1
    """Runs of each method (per target class where it has targets)."""


ATTACK_SUITES: dict[str, AttackSuite] = {
    "fast": AttackSuite({"pgd": pgd, "apgd_ce": apgd}, steps=20),
    # 9 targets: as many as AutoAttack's targeted attacks try (arXiv 2003.01690).
    "strong": AttackSuite(
        {"pgd": pgd, "apgd_ce": apgd, "apgd_t_dlr": partial(apgd_targeted, rivals=9)}, steps=100
    ),
}

EVALUATION_SUITES: dict[str, Mapping[str, Any]] = {
    # The certificate alone: the evaluation that training itself makes of every kept checkpoint.
    "certify": {},
    # With a first upper bound of the true robust accuracy.
    "certify+fast-attack": {"attack": "fast"},
    # With the strongest upper bound that this project has.
    "certify+strong-attack": {"attack": "strong"},
    # And the column cra_deployed of the program that most accelerators serve.
    "certify+strong-attack+bfloat16": {"attack": "strong", "deployed": "bfloat16"},
}
"""Fields of EvaluationConfig that a suite sets, by its name."""
