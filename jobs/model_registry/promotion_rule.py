"""When a model may become champion: pure functions of which samples two models certify."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
import pydantic
from scipy.stats import binomtest

from model.certification.eps import eps_value
from pipeline.run.wilson_interval import with_interval

MISSED_FORGERY = 1e-3
"""Largest probability that a forgery which decided the comparison is not met."""
SPENDING = "alpha / (k (k + 1)) for the k-th comparison on a test set"
_FIRST_SHARE = 0.01  # of the samples: what a forged first champion could gain unseen
Bits = npt.NDArray[np.bool_]


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid")
)
class Rule:
    """The rule of one registered model, set once for an experiment.

    A candidate becomes champion if, on the same test set, it has at least `min_gain` more cra_sound
    at eps than the champion, and chance would give an advantage as large in at most `alpha` of all
    cases: of the samples that only one of the two certifies, each is the candidate's with
    probability 1/2 (exact one-sided sign test on paired samples, McNemar 1947). Whoever compares
    many candidates on one test set meets chance more often, so `alpha` is spent over all
    comparisons there will ever be: the k-th on a test set may use alpha / (k (k + 1)), and these
    sum to alpha. So chance promotes anything at all, ever, in at most `alpha` of all cases. The
    first champion is compared with none and spends nothing: it needs one certified sample, and a
    test set of `min_samples`.
    """

    eps: str
    """Radius at which models are compared, as a ratio such as 36/255."""
    norm: Literal["l2", "linf"] = "l2"
    """Norm of the radius."""
    alpha: Annotated[float, pydantic.Field(gt=0, le=0.5)] = 0.05
    """Probability that chance alone ever promotes on a test set, over all comparisons together."""
    min_gain: Annotated[float, pydantic.Field(ge=0, lt=1)] = 0.0
    """Smallest gain of cra_sound, a share of the samples."""
    min_samples: Annotated[int, pydantic.Field(ge=1)] = 200
    """Fewest test samples of a first champion; with 200 a share is known to 7 points at best."""

    @pydantic.field_validator("eps")
    @classmethod
    def _ratio(cls, eps: str) -> str:
        eps_value(eps)
        return eps

    @property
    def metric(self) -> str:
        """Name of the metric that this rule reads out of a certificate."""
        return f"cra_sound/{self.norm}/{self.eps.replace('/', '_')}"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A candidate beside a champion, sample by sample.

    Attributes:
        samples: samples of the test set.
        candidate_cra: share of them that the candidate certifies.
        champion_cra: the same of the champion; None: there is no champion.
        candidate_only: samples that only the candidate certifies.
        champion_only: samples that only the champion certifies.
        p_value: probability of such an advantage, or a larger one, by chance.
        passes: what the rule says.
        reason: why, in words.
        judged: comparisons on this test set so far, this one included.
        level: largest p-value that passes, alpha / (judged (judged + 1)); 0 for a first champion,
            where nothing is compared.
        spent: sum of the levels of all comparisons so far, this one included; it stays below alpha.
        spending: the rule of the levels.
    """

    samples: int
    candidate_cra: float
    champion_cra: float | None
    candidate_only: int
    champion_only: int
    p_value: float
    passes: bool
    reason: str
    judged: int
    level: float
    spent: float = 0.0
    spending: str = SPENDING

    @property
    def gain(self) -> float:
        """Difference of the two shares."""
        return self.candidate_cra - (self.champion_cra or 0.0)


def compare(
    rule: Rule, candidate: Bits, champion: Bits | None, *, judged_before: int = 0
) -> Comparison:
    """Apply the rule to the certified bits of the same samples in the same order.

    Args:
        rule: the rule.
        candidate: whether each sample is certified.
        champion: the same; None: there is no champion.
        judged_before: other comparisons that were made on these samples before.
    """
    samples = len(candidate)
    share = float(candidate.mean())
    if champion is None:
        count = int(candidate.sum())
        passes = count > 0 and samples >= rule.min_samples
        reason = (
            f"first champion, {count} of {samples} samples certified, "
            f"{with_interval(share, samples)} (needed: 1 of at least {rule.min_samples} samples, "
            "rule.min_samples)"
        )
        spent = rule.alpha * judged_before / (judged_before + 1)
        return Comparison(
            samples, share, None, count, 0, 1.0, passes, reason, judged_before, 0.0, spent
        )
    judged = judged_before + 1
    level = rule.alpha / (judged * (judged + 1))
    ours, theirs = int((candidate & ~champion).sum()), int((champion & ~candidate).sum())
    p_value = _p_value(ours, theirs)
    gain = (ours - theirs) / samples
    passes = _passes(rule, level, ours, theirs, samples)
    reason = (
        f"{rule.metric} on {samples} samples: {with_interval(share, samples)} against "
        f"{with_interval(float(champion.mean()), samples)}, gain {gain:+.4%} "
        f"(needed: more than 0 and at least {rule.min_gain:.4%}); {ours} samples certified by the "
        f"candidate only, {theirs} by the champion only, p = {p_value:.3g} (needed: at most "
        f"{level:.3g}, that is {rule.alpha:g} / ({judged} * {judged + 1}) for comparison {judged} "
        "on this test set)"
    )
    return Comparison(
        samples,
        share,
        float(champion.mean()),
        ours,
        theirs,
        p_value,
        passes,
        reason,
        judged,
        level,
        rule.alpha * judged / (judged + 1),
    )


def comparison_key(rule: Rule, candidate: Bits, champion: Bits) -> str:
    """Digest of everything that a p-value depends on: the same key means the same test again."""
    bits = np.packbits(np.concatenate([candidate, champion])).tobytes()
    return hashlib.sha256(f"{rule.metric} {len(candidate)} ".encode() + bits).hexdigest()


def samples_to_verify(rule: Rule, found: Comparison) -> int:
    """How many samples must be drawn and derived again before a decision is believed.

    At least one of the samples that would have to be forged to bring about the decision is drawn
    with probability 1 - MISSED_FORGERY. For a first champion that is one sample in a hundred.
    """
    forged = math.ceil(_FIRST_SHARE * found.samples)
    if found.champion_cra is not None:
        forged = 1
        ours, theirs = found.candidate_only, found.champion_only
        while _passes(rule, found.level, ours, theirs + forged, found.samples):
            forged += 1
    if forged >= found.samples:
        return 1
    # Drawing with replacement would miss more often: an upper bound.
    needed = math.log(MISSED_FORGERY) / math.log1p(-forged / found.samples)
    return min(found.samples, math.ceil(needed))


def _p_value(ours: int, theirs: int) -> float:
    if ours + theirs == 0:
        return 1.0
    return float(binomtest(ours, ours + theirs, 0.5, alternative="greater").pvalue)


def _passes(rule: Rule, level: float, ours: int, theirs: int, samples: int) -> bool:
    # Integers: a gain of exactly min_gain must not be lost to rounding.
    gain = ours - theirs
    enough = gain > 0 and gain >= rule.min_gain * samples * (1 - 1e-12)
    return enough and _p_value(ours, theirs) <= level
