"""The acts of the gate: set the rule, register a candidate, promote it, roll back.

The alias `champion` moves on the certified samples of two certificates that verify, and on nothing
else: metrics are never read for a decision. Every act is an MLflow run with the tag `stage` =
`gate`, and what it rests on is in its `decision.json`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from data_shards.storage.store import Store
from jobs.errors import EvaluationError
from jobs.evaluation.runner import artifact_info
from jobs.model_registry.certificate_bundle import CertificateBundle, VerificationError
from jobs.model_registry.promotion_rule import (
    Comparison,
    Rule,
    compare,
    comparison_key,
    samples_to_verify,
)
from model.artifact.artifact import WEIGHTS
from model.verifier import supported
from pipeline.tracking.client import RunReference
from pipeline.tracking.model_registry import Registry, RegistryError, Version

CHAMPION, CANDIDATE = "champion", "candidate"
DECISION = "decision.json"
_SERVED = Path(__file__).with_name("served_model.py")
_RULE_TAGS = {field.name: f"gate.{field.name}" for field in dataclasses.fields(Rule)}


@dataclasses.dataclass(frozen=True)
class Decision:
    """The outcome of `promote`.

    Attributes:
        promoted: whether the alias `champion` moved.
        candidate: the version that was judged.
        champion: the champion before; None if there was none.
        reason: why, in words.
        comparison: the numbers of the rule.
        run: the MLflow run with the evidence.
    """

    promoted: bool
    candidate: Version
    champion: Version | None
    reason: str
    comparison: Comparison
    run: RunReference


def set_rule(registry: Registry, name: str, rule: Rule) -> None:
    """Set the rule of a registered model, which is created if there is none."""
    before = registry.model_tags(name) or {}
    body = TypeAdapter(Rule).dump_python(rule, mode="json")
    with registry.gate_run(f"gate-rule-{name}", _tags("rule", name)) as run:
        registry.fill_run(
            run.run_id,
            params=body,
            metrics={},
            files=_decision_file({"rule": body, "before": _rule_fields(before)}),
        )
        registry.set_model_tags(name, {_RULE_TAGS[key]: str(value) for key, value in body.items()})


def rule_of(registry: Registry, name: str) -> Rule:
    """The rule of a registered model.

    Raises:
        RegistryError: it has none, or one that does not validate.
    """
    fields = _rule_fields(registry.model_tags(name) or {})
    if "eps" not in fields:
        raise RegistryError(
            f"registered model {name!r} has no rule: set one with "
            f"`python -m jobs.gate rule {name} --rule.eps 36/255`"
        )
    try:
        return TypeAdapter(Rule).validate_python(fields)
    except ValueError as error:
        raise RegistryError(f"the rule of registered model {name!r} is damaged: {error}") from error


def register(registry: Registry, name: str, evaluation: str) -> Version:
    """Register the model of an evaluation and let the alias `candidate` point to it.

    Registering the same certificate again only moves the alias.

    Args:
        registry: where.
        name: the registered model; it must have a rule.
        evaluation: URL of the evaluation's folder, or the id of its MLflow run.

    Raises:
        EvaluationError, ModelError: certificate and artifact do not fit each other or the rule, or
            the verifier does not know such networks.
        RegistryError: no rule, or no such run.
    """
    rule = rule_of(registry, name)
    evidence = _evidence_of(registry, evaluation)
    certified = evidence.certified(rule)
    url = evidence.summary.artifact_url
    info = artifact_info(url)
    if info.digest != evidence.model_digest:
        raise EvaluationError(
            f"certificate {evidence.digest[:12]} is of model {evidence.model_digest}; the artifact "
            f"at {url} has digest {info.digest}"
        )
    network = evidence.body["model"]["network"]
    if not supported(network):
        raise EvaluationError(
            f"{network['kind']} networks are not supported by the gate: `model.verify` cannot "
            "derive their certificates again"
        )
    with registry.gate_run(f"gate-candidate-{name}", _tags("candidate", name)) as run:
        version = _with_certificate(registry, name, evidence.digest)
        if version is None:
            step = evidence.summary.step
            model_id = registry.find_or_create_model(
                run.run_id, step=step, artifact_url=url, digest=info.digest, params={}
            )
            registry.package(
                model_id,
                code=_SERVED,
                settings={"artifact_url": url, "artifact_digest": info.digest, "eps": rule.eps},
                input_shape=info.native_input_shape,
                evidence=evidence.files,
                evidence_key=evidence.digest,
            )
            tags = {
                "artifact_url": url,
                "artifact_digest": info.digest,
                "certificate_digest": evidence.digest,
                "evaluation_run": registry.evaluation_with(evidence.digest) or "",
                "dataset": evidence.dataset,
                "step": str(step),
                "samples": str(len(certified)),
                rule.metric: f"{certified.mean():.6f}",
            }
            version = registry.add_version(name, model_id=model_id, run_id=run.run_id, tags=tags)
        registry.fill_run(
            run.run_id,
            params={"version": version.number},
            metrics={rule.metric: float(certified.mean())},
            files=_decision_file({"version": version.number, "tags": dict(version.tags)}),
        )
        registry.point(CANDIDATE, version)
    return registry.version(name, version.number)


def promote(
    registry: Registry,
    name: str,
    *,
    number: int | None = None,
    against: str | None = None,
    sample: int | None = None,
) -> Decision:
    """Judge a version by the rule, and let the alias `champion` point to it if it passes.

    Args:
        registry: where.
        name: the registered model.
        number: the version; default: the one with the alias `candidate`.
        against: evaluation of the champion that the comparison uses (URL or run id); default: the
            one with which it was registered. Needed when the test set has changed.
        sample: samples of each certificate that are derived again; default: as many as
            `samples_to_verify` says. The weights always are, all of them.

    Raises:
        RegistryError, EvaluationError: there is nothing that could be judged.
    """
    rule = rule_of(registry, name)
    candidate = registry.version(name, number) if number else registry.aliased(name, CANDIDATE)
    if candidate is None:
        raise RegistryError(
            f"registered model {name!r} has no alias {CANDIDATE!r}; python -m jobs.gate candidate "
            f"{name} EVALUATION registers one"
        )
    champion = registry.aliased(name, CHAMPION)
    if champion and champion.number == candidate.number:
        raise RegistryError(f"{candidate} is the champion already")
    evidence = {candidate.number: _packaged(registry, candidate)}
    theirs = None
    if champion is not None:
        theirs = _champions(registry, champion, against)
        evidence[champion.number] = theirs
        if not evidence[candidate.number].same_samples(theirs):
            raise EvaluationError(
                f"{candidate} and {champion} were not certified on the same test samples: evaluate "
                f"the champion on those of the candidate and name that evaluation with --against"
            )
    used = evidence[candidate.number]
    comparison, key = _compare(registry, rule, used, theirs)
    reason, promoted = comparison.reason, comparison.passes
    verification: dict[str, Any] = {}
    if promoted:  # what is refused anyway need not be verified
        verification, failure = _verify(rule, comparison, evidence, sample)
        promoted, reason = failure is None, failure or reason
    body = {
        "promoted": promoted,
        "reason": reason,
        "rule": TypeAdapter(Rule).dump_python(rule, mode="json"),
        "candidate": _described(candidate, evidence),
        "champion": _described(champion, evidence) if champion else None,
        "comparison": dataclasses.asdict(comparison),
        "verification": verification,
    }
    if promoted:
        _require_champion(registry, candidate, champion)
        _require_place(registry, used.index_digest, key, comparison)
    run = _record(
        registry,
        name,
        rule,
        comparison,
        body,
        {"gate.index_digest": used.index_digest, "gate.comparison": key},
    )
    _act(registry, candidate, champion, promoted=promoted, run_id=run.run_id)
    return Decision(promoted, candidate, champion, reason, comparison, run)


def _compare(
    registry: Registry, rule: Rule, candidate: CertificateBundle, champion: CertificateBundle | None
) -> tuple[Comparison, str]:
    """Apply the rule; also the key by which later comparisons count this one, empty without one."""
    ours, before = candidate.certified(rule), registry.comparisons(candidate.index_digest)
    if champion is None:
        return compare(rule, ours, None, judged_before=len(before)), ""
    theirs = champion.certified(rule)
    key = comparison_key(rule, ours, theirs)
    return compare(rule, ours, theirs, judged_before=_place(before, key)), key


def _place(before: Sequence[str], key: str) -> int:
    """How many comparisons came first; the same one again keeps its place and its level."""
    return before.index(key) if key in before else len(before)


def rollback(registry: Registry, name: str, *, to: int | None = None, reason: str = "") -> Version:
    """Let the alias `champion` point to a version that the gate promoted before.

    Args:
        registry: where.
        name: the registered model.
        to: the version; default: the champion before the present one.
        reason: recorded.

    Raises:
        RegistryError: no such version, or one that was never promoted.
        EvaluationError, ModelError: its artifact is gone, or is another one.
    """
    present = registry.aliased(name, CHAMPION)
    if to is None:
        before = present.tags.get("gate.previous", "") if present else ""
        if not before:
            raise RegistryError(f"registered model {name!r} has no earlier champion")
        to = int(before)
    target = registry.version(name, to)
    if present and present.number == to:
        raise RegistryError(f"{target} is the champion already")
    if "gate.promotion_run" not in target.tags:
        raise RegistryError(f"{target} never was champion: `promote` judges it")
    _packaged(registry, target)
    _require_artifact(registry, target)
    body = {"from": present.number if present else None, "to": to, "reason": reason}
    with registry.gate_run(f"gate-rollback-{name}", _tags("rollback", name)) as run:
        registry.fill_run(run.run_id, params=body, metrics={}, files=_decision_file(body))
        registry.point(CHAMPION, target)
        if present:
            registry.tag_version(present, {"gate.decision": f"rolled back to {to}"})
        registry.tag_version(target, {"gate.decision": "promoted"})
    return registry.version(name, to)


def _verify(
    rule: Rule,
    comparison: Comparison,
    evidence: Mapping[int, CertificateBundle],
    sample: int | None,
) -> tuple[dict[str, Any], str | None]:
    """Verify both certificates; what was done, and why it failed."""
    count = samples_to_verify(rule, comparison) if sample is None else sample
    count = min(count, comparison.samples)
    seed = secrets.randbits(32)  # drawn now: nobody could know which samples
    done: dict[str, Any] = {"sample": count, "of": comparison.samples, "seed": seed}
    try:
        for number, each in evidence.items():
            done[f"version {number}"] = each.verify(count, seed)
    except VerificationError as error:
        return {**done, "refused": str(error)}, f"version {number}: {error}"
    return done, None


def _record(
    registry: Registry,
    name: str,
    rule: Rule,
    comparison: Comparison,
    body: Mapping[str, Any],
    counted: Mapping[str, str],
) -> RunReference:
    """The run of a decision, written before anything moves."""
    decision = "promoted" if body["promoted"] else "rejected"
    tags = {**_tags("promote", name), "gate.decision": decision, "gate.reason": body["reason"]}
    tags |= counted
    with registry.gate_run(f"gate-promote-{name}", tags) as run:
        metrics = {
            rule.metric: comparison.candidate_cra,
            "gate/gain": comparison.gain,
            "gate/p_value": comparison.p_value,
            "gate/candidate_only": float(comparison.candidate_only),
            "gate/champion_only": float(comparison.champion_only),
            "gate/judged": float(comparison.judged),
            "gate/level": comparison.level,
            "gate/spent": comparison.spent,
        }
        params = {
            **body["rule"],
            "version": body["candidate"]["version"],
            "champion": body["champion"]["version"] if body["champion"] else "none",
        }
        registry.fill_run(run.run_id, params=params, metrics=metrics, files=_decision_file(body))
    return run


def _require_champion(registry: Registry, candidate: Version, champion: Version | None) -> None:
    """Verifying takes time: another promotion may have come in between."""
    now = registry.aliased(candidate.name, CHAMPION)
    if (now and now.number) != (champion and champion.number):
        raise RegistryError(
            f"the champion of {candidate.name!r} became {now} while {candidate} was judged against "
            f"{champion}: promote again"
        )


def _require_place(registry: Registry, test_set: str, key: str, comparison: Comparison) -> None:
    """Each place has a level of its own: two comparisons may not take the same one."""
    if key and _place(registry.comparisons(test_set), key) + 1 != comparison.judged:
        raise RegistryError(
            "another comparison on this test set was recorded in the meantime: promote again"
        )


def _act(
    registry: Registry, candidate: Version, champion: Version | None, *, promoted: bool, run_id: str
) -> None:
    """Tag the version and its evaluation; move the alias."""
    tags = {"gate.decision": "promoted" if promoted else "rejected", "gate.run": run_id}
    if promoted:
        tags["gate.promotion_run"] = run_id
        tags["gate.previous"] = str(champion.number) if champion else ""
    registry.tag_version(candidate, tags)
    if candidate.tags.get("evaluation_run"):
        registry.tag_run(candidate.tags["evaluation_run"], {"gate.decision": tags["gate.decision"]})
    if promoted:
        registry.point(CHAMPION, candidate)
        if CANDIDATE in candidate.aliases:
            registry.drop_alias(candidate.name, CANDIDATE)


def _evidence_of(registry: Registry, evaluation: str) -> CertificateBundle:
    """Evidence by the URL of its folder, or by the id of its MLflow run."""
    if not re.fullmatch("[0-9a-f]{32}", evaluation):
        return CertificateBundle.read(evaluation)
    recorded = registry.recorded_evaluation(evaluation)
    place = registry.require_address(registry.located(str(recorded.summary.get("out_url"))))
    evidence = CertificateBundle.read(place)
    stated = recorded.params.get("certificate_digest")
    if evidence.digest != stated:
        raise EvaluationError(
            f"run {evaluation} recorded certificate {stated}; at {place} lies {evidence.digest}"
        )
    return evidence


def _packaged(registry: Registry, version: Version) -> CertificateBundle:
    """The evidence with which a version was registered."""
    stated = version.tags.get("certificate_digest", "")
    evidence = CertificateBundle.of_files(registry.evidence(version, stated), version)
    evidence = evidence.found_at(registry.located(evidence.summary.out_url))
    for address in (evidence.summary.artifact_url, evidence.summary.shards_url):
        registry.require_address(address)
    _require_digests(version, evidence)
    if evidence.digest != stated:
        raise EvaluationError(f"{version} was registered with certificate {stated}, not this one")
    return evidence


def _champions(registry: Registry, champion: Version, against: str | None) -> CertificateBundle:
    if against is None:
        return _packaged(registry, champion)
    evidence = _evidence_of(registry, against)
    _require_digests(champion, evidence)
    return evidence


def _require_digests(version: Version, evidence: CertificateBundle) -> None:
    digest = version.tags.get("artifact_digest")
    if evidence.model_digest != digest:
        raise EvaluationError(
            f"certificate {evidence.digest[:12]} is of model {evidence.model_digest}, {version} is "
            f"model {digest}"
        )


def _require_artifact(registry: Registry, version: Version) -> None:
    """The artifact of a version is where it was, and is what it was."""
    url = registry.require_address(version.tags["artifact_url"])
    found = artifact_info(url).digest
    if found != version.tags["artifact_digest"]:
        raise EvaluationError(f"the artifact of {version} at {url} has digest {found} now")
    if not Store(url).exists(WEIGHTS):
        raise EvaluationError(f"the artifact of {version} at {url} has no {WEIGHTS}")


def _with_certificate(registry: Registry, name: str, digest: str) -> Version | None:
    same = (v for v in registry.versions(name) if v.tags.get("certificate_digest") == digest)
    return next(same, None)


def _described(version: Version, evidence: Mapping[int, CertificateBundle]) -> dict[str, Any]:
    used = evidence[version.number]
    return {
        "version": version.number,
        "artifact_digest": used.model_digest,
        "artifact_url": used.summary.artifact_url,
        "shards_url": used.summary.shards_url,
        "certificate_digest": used.digest,
    }


def _rule_fields(tags: Mapping[str, str]) -> dict[str, str]:
    return {field: tags[tag] for field, tag in _RULE_TAGS.items() if tag in tags}


def _tags(action: str, name: str) -> dict[str, str]:
    return {"gate.action": action, "registered_model": name}


def _decision_file(body: Mapping[str, Any]) -> dict[str, bytes]:
    return {DECISION: json.dumps(body, indent=1, sort_keys=True, default=str).encode() + b"\n"}
