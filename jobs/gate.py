"""The gate of a registered model: which version serves, and on what evidence.

    python -m jobs.gate rule digits --rule.eps 36/255 --tracking.uri ...
    python -m jobs.gate candidate digits EVALUATION     (its folder's URL or its MLflow run)
    python -m jobs.gate promote digits
    python -m jobs.gate rollback digits --reason "..."
    python -m jobs.gate status digits

Exit status: 0 done, 3 judged and not promoted, 2 bad input, 1 a failure.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated

import tyro
from rich.table import Table

from data_shards.command_line.parsing import parse_subcommand
from data_shards.errors import ShardError
from data_shards.untrusted.terminal import PlainConsole
from jobs.command_line import exit_status
from jobs.errors import EvaluationError
from jobs.model_registry import promotion
from jobs.model_registry.promotion_rule import Rule
from model.errors import ModelError
from pipeline.run.wilson_interval import with_interval
from pipeline.tracking.client import TrackingConfig, ui_command
from pipeline.tracking.model_registry import Registry, RegistryError

NOT_PROMOTED = 3
Name = Annotated[str, tyro.conf.Positional]


def _rule(model: Name, rule: Rule, tracking: TrackingConfig) -> int:
    """Set the rule by which versions of a registered model are judged; creates the model.

    Args:
        model: Name of the registered model, one per experiment.
        rule: The rule.
        tracking: MLflow store.
    """
    promotion.set_rule(Registry(tracking), model, rule)
    _say(
        f"{model}: champion by {rule.metric}, alpha {rule.alpha:g} spent over all comparisons on "
        f"the same test set, gain >= {rule.min_gain:.2%}, first champion on at least "
        f"{rule.min_samples} samples"
    )
    return 0


def _candidate(model: Name, evaluation: Name, tracking: TrackingConfig) -> int:
    """Register the model of an evaluation, with the alias `candidate`.

    Args:
        model: Name of the registered model.
        evaluation: URL of the evaluation's folder (certificate.json), or id of its MLflow run.
        tracking: MLflow store.
    """
    version = promotion.register(Registry(tracking), model, evaluation)
    _say(f"{version} is the candidate: certificate {version.tags['certificate_digest'][:12]}")
    return 0


def _promote(
    model: Name,
    tracking: TrackingConfig,
    version: int | None = None,
    against: str | None = None,
    sample: int | None = None,
) -> int:
    """Judge the candidate by the rule and the champion's certificate; verify both; move `champion`.

    Args:
        model: Name of the registered model.
        tracking: MLflow store.
        version: Version to judge; default: the candidate.
        against: Evaluation of the champion to compare with (URL or run id), where the test set has
            changed; default: the one with which it was registered.
        sample: Samples of each certificate that the verifier derives again, beside all weights;
            default: enough to meet a forgery that decided the comparison, but for 1 in 1000.
    """
    if sample is not None and sample < 1:
        raise RegistryError(f"--sample {sample}: at least one sample must be derived again")
    registry = Registry(tracking)
    found = promotion.promote(registry, model, number=version, against=against, sample=sample)
    _say(f"{found.candidate}: {'promoted' if found.promoted else 'NOT promoted'}; {found.reason}")
    command, address = ui_command(tracking.uri, found.run)
    _say(
        f"evidence: {promotion.DECISION} of run {found.run.run_id}\n  {command}\n"
        f"  then open {address}"
    )
    return 0 if found.promoted else NOT_PROMOTED


def _rollback(
    model: Name, tracking: TrackingConfig, to: int | None = None, reason: str = ""
) -> int:
    """Let `champion` point to an earlier champion.

    Args:
        model: Name of the registered model.
        tracking: MLflow store.
        to: Version that was champion before; default: the one before the present champion.
        reason: Recorded.
    """
    version = promotion.rollback(Registry(tracking), model, to=to, reason=reason)
    _say(f"{version} is the champion again")
    return 0


def _status(model: Name, tracking: TrackingConfig) -> int:
    """Show the versions of a registered model, their certified accuracy and what was decided.

    Args:
        model: Name of the registered model.
        tracking: MLflow store.
    """
    registry = Registry(tracking)
    rule = promotion.rule_of(registry, model)
    table = Table(title=f"{model}: {rule.metric}, alpha {rule.alpha:g}, gain >= {rule.min_gain:g}")
    for column in ("version", "alias", "step", "data", "samples", "CRA", "certificate", "decision"):
        table.add_column(column, no_wrap=True)
    for version in registry.versions(model):
        tags = version.tags
        share = tags.get(rule.metric)
        table.add_row(
            str(version.number),
            ", ".join(version.aliases),
            tags.get("step", "?"),
            tags.get("dataset", "?"),
            tags.get("samples", "?"),
            _share(share, tags.get("samples")),
            tags.get("certificate_digest", "none")[:12],
            tags.get("gate.decision", "not judged"),
        )
    _console().print_whole(table)
    champion = registry.aliased(model, promotion.CHAMPION)
    if champion and "gate.promotion_run" not in champion.tags:
        _say(f"WARNING: {champion} is champion, but the gate never promoted it")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run one act of the gate; returns the exit status."""
    acts: dict[str, Callable[..., int]] = {
        "rule": _rule,
        "candidate": _candidate,
        "promote": _promote,
        "rollback": _rollback,
        "status": _status,
    }
    return exit_status(
        lambda *_: parse_subcommand(acts, arguments, prog="python -m jobs.gate"),
        (RegistryError, EvaluationError, ShardError, ModelError, FileNotFoundError),
    )


def _share(share: str | None, samples: str | None) -> str:
    """Certified accuracy with its interval, as far as a version's tags say."""
    try:
        if share is None or samples is None:
            return "?" if share is None else f"{float(share):.2%}"
        return with_interval(float(share), int(samples))
    except ValueError:  # a tag may be anybody's
        return "?"


def _console() -> PlainConsole:
    return PlainConsole()


def _say(text: str) -> None:
    _console().print(text, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
