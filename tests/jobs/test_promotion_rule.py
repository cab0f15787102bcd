import itertools
import math

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError
from scipy.stats import hypergeom

from jobs.model_registry.promotion_rule import (
    MISSED_FORGERY,
    Comparison,
    Rule,
    compare,
    comparison_key,
    samples_to_verify,
)

RULE = Rule(eps="36/255")


def bits(samples, *ones):
    found = np.zeros(samples, dtype=bool)
    for begin, end in ones:
        found[begin:end] = True
    return found


def judged(ours, theirs, samples=1000, rule=RULE):
    """A comparison with so many samples certified by one side only."""
    both = (500, 600)
    return compare(rule, bits(samples, (0, ours), both), bits(samples, (200, 200 + theirs), both))


def test_p_value_is_the_exact_one_sided_sign_test():
    found = judged(10, 2)
    assert found.p_value == pytest.approx(sum(math.comb(12, k) for k in range(10, 13)) / 2**12)
    assert (found.candidate_only, found.champion_only, found.samples) == (10, 2, 1000)
    assert found.gain == pytest.approx(0.008)
    assert found.passes
    assert judged(0, 0).p_value == 1.0


@pytest.mark.parametrize(
    ("ours", "theirs", "passes"),
    [(6, 0, True), (5, 0, False), (12, 3, True), (11, 3, False), (3, 12, False), (0, 0, False)],
)
def test_a_gain_must_be_significant(ours, theirs, passes):
    assert judged(ours, theirs).passes == passes


def test_a_gain_must_reach_the_least():
    rule = Rule(eps="36/255", min_gain=0.02)
    assert not judged(19, 0, rule=rule).passes
    assert judged(20, 0, rule=rule).passes


def test_the_first_champion_certifies_something():
    first = compare(RULE, bits(200, (0, 20)), None)
    assert (first.passes, first.candidate_cra, first.champion_cra) == (True, 0.1, None)
    assert not compare(RULE, bits(200), None).passes


def test_the_first_champion_was_seen_on_enough_samples():
    refused = compare(RULE, bits(199, (0, 199)), None)
    assert not refused.passes
    assert "199 of 199 samples certified, 100.00% (98.1 to 100.0)" in refused.reason
    assert "needed: 1 of at least 200 samples" in refused.reason
    assert compare(Rule(eps="36/255", min_samples=199), bits(199, (0, 199)), None).passes


@pytest.mark.parametrize(("before", "passes"), [(0, True), (1, False)])
def test_the_level_falls_with_the_comparisons_so_far(before, passes):
    candidate, champion = bits(1000, (0, 12)), bits(1000, (500, 503))
    found = compare(RULE, candidate, champion, judged_before=before)
    assert found.p_value == pytest.approx(0.01758, rel=1e-3)
    judged = before + 1
    assert (found.judged, found.level) == (judged, 0.05 / (judged * (judged + 1)))
    assert found.passes == passes
    assert f"at most {found.level:.3g}, that is 0.05 / ({judged} * {judged + 1})" in found.reason


def test_the_levels_of_all_comparisons_sum_to_less_than_alpha():
    """Which alpha / k does not: its sum grows without end."""
    found = [compare(RULE, bits(9), bits(9), judged_before=n) for n in range(40)]
    spent = list(itertools.accumulate(each.level for each in found))
    assert [each.spent for each in found] == pytest.approx(spent)
    assert spent[-1] == pytest.approx(RULE.alpha * 40 / 41)


def test_the_first_champion_spends_nothing():
    found = compare(RULE, bits(200, (0, 20)), None, judged_before=3)
    assert (found.judged, found.level) == (3, 0.0)
    assert found.spent == compare(RULE, bits(9), bits(9), judged_before=2).spent


def test_equal_models_are_seldom_promoted_however_many_are_tried():
    """40 retrained models, each of which differs from the champion in 40 samples, by chance."""
    wins = np.random.default_rng(0).binomial(40, 0.5, (4000, 40))
    p_values = np.array([judged(count, 40 - count).p_value for count in range(41)])[wins]
    found = [compare(RULE, bits(9), bits(9), judged_before=n) for n in range(40)]
    promoted = (p_values <= [each.level for each in found]).any(axis=1).mean()
    assert 0 < promoted <= RULE.alpha
    divided = (p_values <= RULE.alpha / np.arange(1, 41)).any(axis=1).mean()
    assert divided > 2 * RULE.alpha


def test_the_key_of_a_comparison_is_what_its_p_value_depends_on():
    ours, theirs = bits(100, (0, 12)), bits(100, (50, 53))
    key = comparison_key(RULE, ours, theirs)
    assert key == comparison_key(Rule(eps="36/255", alpha=0.5), ours.copy(), theirs)
    others = [(RULE, theirs, ours), (RULE, ours[:99], theirs[:99]), (RULE, ~ours, theirs)]
    others.append((Rule(eps="72/255"), ours, theirs))
    assert len({key, *(comparison_key(*other) for other in others)}) == 5


def test_the_verified_samples_follow_the_level():
    candidate, champion = bits(1000, (0, 30)), bits(1000, (500, 505))
    first, late = (compare(RULE, candidate, champion, judged_before=n) for n in (0, 19))
    assert late.passes
    # Less has to be forged to bring a decision about that is nearer to its level.
    assert samples_to_verify(RULE, late) > samples_to_verify(RULE, first)


@pytest.mark.parametrize(
    ("ours", "theirs", "samples"), [(30, 5, 1000), (6, 0, 700), (900, 300, 9000)]
)
def test_enough_samples_are_verified_to_meet_a_forgery_that_decided(ours, theirs, samples):
    rule, both = RULE, max(ours + theirs, 600)
    candidate = bits(samples, (0, ours), (both, samples))
    champion = bits(samples, (ours, ours + theirs), (both, samples))
    found = compare(rule, candidate, champion)
    assert found.passes
    drawn = samples_to_verify(rule, found)
    forged = next(
        count
        for count in range(1, ours + 1)
        if not compare(rule, candidate & ~bits(samples, (0, count)), champion).passes
    )
    assert hypergeom.pmf(0, samples, forged, drawn) <= MISSED_FORGERY
    assert drawn <= samples


def test_a_clear_advantage_needs_few_samples():
    clear = Comparison(50_000, 0.6, 0.5, 6000, 1000, 0.0, True, "", 1, 0.05)
    close = Comparison(50_000, 0.504, 0.5, 1200, 1000, 0.0, True, "", 1, 0.05)
    assert samples_to_verify(RULE, clear) < 100
    assert samples_to_verify(RULE, close) > 1000


@pytest.mark.parametrize("change", [{"eps": "0.1"}, {"alpha": 0.6}, {"alpha": 0}, {"min_gain": -1}])
def test_a_rule_that_says_nothing_is_refused(change):
    with pytest.raises(ValidationError):
        TypeAdapter(Rule).validate_python({"eps": "36/255", **change})
