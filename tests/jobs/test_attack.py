import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import jobs.evaluation.attack_task
from data_shards.format.shard_index import load_index
from data_shards.storage.store import Store
from data_shards.streaming.sample_reader import read_shard
from jobs.errors import EvaluationError
from jobs.evaluate_cra import evaluate
from jobs.evaluation.attack_task import (
    CertificateViolationError,
    attack_tasks,
    lies_inside,
    merge_attack,
)
from jobs.evaluation.certify_tasks import ArtifactTask, forget, shard_tasks
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.sample_records import (
    merge,
)
from jobs.evaluation.suites import ATTACK_SUITES
from model.artifact.artifact import read_info
from model.certification.eps import eps_value
from model.certify import ProvedCertifier

pytestmark = pytest.mark.integration

EPS = ("36/255", "1/255", "255/255")


@pytest.fixture(scope="module")
def certified(artifact, shards, network):
    """Tasks and records of the certificates, in shard order."""
    where = ArtifactTask(
        url=Store(artifact).url, digest=read_info(Store(artifact).open).digest, device="cpu"
    )
    tasks = shard_tasks(
        where,
        load_index(shards),
        "test",
        3,
        matrices=list(network.matrix_bounds().values()),
        deployed="float32",
    )
    return tasks, merge([task.run() for task in tasks], {t.shard.file: t.keys for t in tasks})


@pytest.fixture(scope="module")
def attacks(artifact, certified):
    config = EvaluationConfig(artifact=artifact, eps=EPS, attack="fast", attack_seed=5)
    return attack_tasks(config, *certified)


@pytest.fixture(scope="module")
def sound(certified):
    """Certified robust accuracy of the sound column."""
    _, records = certified
    columns = [part.columns["sound"] for part in records]
    radius = np.concatenate([column.radius for column in columns])
    prediction = np.concatenate([column.prediction for column in columns])
    right = prediction == np.concatenate([part.label for part in records])
    return {ratio: float(np.mean(right & (radius > eps_value(ratio)))) for ratio in EPS}


@pytest.fixture(scope="module")
def results(attacks):
    return [task.run() for task in attacks]


def test_what_is_certified_holds_and_the_rest_shrinks_with_eps(results, sound, certified):
    found = merge_attack(results, sound)
    _, records = certified
    labels = np.concatenate([part.label for part in records])
    predictions = np.concatenate([part.columns["sound"].prediction for part in records])
    clean = float(np.mean(labels == predictions))
    assert (found.suite, found.steps, found.restarts, found.clipped) == ("fast", 20, 1, True)
    assert found.methods == ("pgd", "apgd_ce")
    assert found.samples == len(labels)
    assert found.inside_radius_samples == len(labels)
    assert found.inside_radius_flips == 0
    assert list(found.accuracy) == list(EPS)
    assert sound["1/255"] > 0
    assert clean >= found.accuracy["1/255"] >= sound["1/255"]
    assert found.accuracy["1/255"] >= found.accuracy["36/255"] >= found.accuracy["255/255"]
    assert found.accuracy["255/255"] < clean


def test_the_result_depends_on_the_seed_alone_not_on_the_order_of_tasks(attacks, results):
    forget()
    again = [task.run() for task in reversed(attacks)][::-1]
    for first, second in zip(results, again, strict=True):
        assert first.inside == second.inside
        for ratio in EPS:
            np.testing.assert_array_equal(first.robust[ratio], second.robust[ratio])


def test_starts_belong_to_seed_shard_batch_radius_and_method(attacks, monkeypatch):
    starts = []

    def attack(network, images, classes, eps, *, generator, **_):
        starts.append(torch.rand(1, generator=generator).item())
        return images

    suite = dataclasses.replace(ATTACK_SUITES["fast"], methods={"a": attack, "b": attack})
    monkeypatch.setitem(ATTACK_SUITES, "fast", suite)
    first, second = attacks[:2]
    for task in (first, second, dataclasses.replace(first, seed=6)):
        task.run()
    assert len(starts) == len(set(starts)) > 3 * 4
    count = len(starts)
    first.run()
    assert starts[count:] == starts[: len(starts) - count]


def test_samples_without_a_radius_are_attacked_at_the_radii_of_the_table_only(attacks, results):
    found = dataclasses.replace(attacks[0], radius=np.zeros_like(attacks[0].radius)).run()
    assert found.inside == 0
    assert found.violations == ()
    for ratio in EPS:
        np.testing.assert_array_equal(found.robust[ratio], results[0].robust[ratio])


def test_an_infinite_radius_is_searched_as_far_as_images_are_apart(attacks):
    found = dataclasses.replace(attacks[0], radius=np.full_like(attacks[0].radius, np.inf)).run()
    assert found.inside == len(attacks[0].radius)
    assert found.violations
    assert all(violation.distance <= math.sqrt(3 * 8 * 8) for violation in found.violations)


def test_an_attack_on_broken_samples_is_not_repeated(attacks, monkeypatch):
    calls = []

    def attack(network, images, classes, eps, *, clip, **_):
        calls.append((len(images), clip))
        return images

    suite = dataclasses.replace(ATTACK_SUITES["fast"], methods={"a": attack})
    monkeypatch.setitem(ATTACK_SUITES, "fast", suite)
    found = attacks[0].run()
    right = attacks[0].prediction == attacks[0].index.rows.label
    np.testing.assert_array_equal(found.robust["255/255"], right)
    radius = [count for count, clip in calls if not clip]
    assert sum(radius) == len(right)
    # Every eps only takes samples that are classified correctly.
    assert sum(count for count, clip in calls if clip) == len(EPS) * right.sum()


def inflated(task, factor=1000.0):
    return dataclasses.replace(task, radius=task.radius * factor)


def test_a_radius_that_is_too_large_is_refuted_by_name(attacks, sound, network):
    task = inflated(attacks[0])
    found = task.run()
    assert found.violations
    one = found.violations[0]
    row = task.index.rows.key.tolist().index(one.key.encode())
    assert one.shard == task.shard.file
    assert one.radius == task.radius[row]
    assert attacks[0].radius[row] < one.distance < one.radius
    assert one.certified == task.prediction[row] != one.found
    with pytest.raises(CertificateViolationError) as caught:
        merge_attack([found], sound)
    assert isinstance(caught.value, EvaluationError)
    for text in (one.shard, one.key, f"class {one.found}", repr(one.radius), repr(one.distance)):
        assert text in str(caught.value)


def test_a_radius_that_is_too_large_at_the_radii_of_the_table_is_refuted_too(attacks):
    """Without the search inside the radius, the one at eps below the radius still counts."""
    task = dataclasses.replace(inflated(attacks[0]), eps=("255/255",))
    (batch,) = read_shard(task.index, task.shard, 100)
    attack = jobs.evaluation.attack_task._BatchAttack(task, batch, 0, task.prediction, task.radius)
    holding = attack.at_eps()["255/255"].numpy()
    broken = {
        key
        for key, holds, radius, right in zip(
            batch.keys,
            holding,
            task.radius,
            task.prediction == task.index.rows.label,
            strict=True,
        )
        if right and not holds and radius > 1
    }
    assert broken
    assert {violation.key for violation in attack.violations} == broken


def test_a_certified_class_that_the_program_does_not_return_is_refuted(attacks):
    swapped = dataclasses.replace(attacks[0], prediction=(attacks[0].prediction + 1) % 4)
    found = swapped.run()
    assert {violation.key for violation in found.violations} == {
        key.decode() for key in swapped.index.rows.key
    }
    assert found.violations[0].distance == 0


def test_accuracy_below_the_certified_one_is_an_error(results):
    with pytest.raises(CertificateViolationError, match=r"at eps 36/255 is .*, below .* 1\.0"):
        merge_attack(results, {"36/255": 1.0})


def test_an_evaluation_with_inflated_radii_fails_and_leaves_no_summary(fields, monkeypatch):
    proved = ProvedCertifier.certify

    def lying(self, *arguments):
        found = proved(self, *arguments)
        return dataclasses.replace(found, radius=found.radius * 1000)

    monkeypatch.setattr(ProvedCertifier, "certify", lying)
    with pytest.raises(CertificateViolationError, match=r"refuted for \d+ samples; sample '"):
        evaluate(fields | {"attack": "fast"})
    assert not Store(fields["out"]).exists("summary.json")
    assert not Store(fields["out"]).exists("certificate.json")


def test_suites():
    assert set(ATTACK_SUITES) == {"fast", "strong"}
    assert tuple(ATTACK_SUITES["strong"].methods) == ("pgd", "apgd_ce", "apgd_t_dlr")
    assert ATTACK_SUITES["strong"].steps == 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": "none"}, "no attack suite 'none'; known: fast, strong"),
        ({"radius": np.zeros(1)}, r"test-00000\.tar: \d+ samples, \d+ predictions and 1 radii"),
    ],
)
def test_a_wrong_task_is_refused(attacks, changes, message):
    with pytest.raises(EvaluationError, match=message):
        dataclasses.replace(attacks[0], **changes)


class TestLiesInside:
    def test_the_ball_is_open_and_its_centre_is_the_rational_pixel(self):
        pixels = torch.tensor([[[0, 255]]], dtype=torch.uint8)
        point = torch.tensor([[[0.1, 1.0]]], dtype=torch.float64)
        for norm in ("l2", "linf"):
            assert not lies_inside(point, pixels, 0.1, norm)
            assert lies_inside(point, pixels, math.nextafter(0.1, 1), norm)
        third = torch.tensor([[[85]]], dtype=torch.uint8)
        nearest = torch.tensor([[[1 / 3]]], dtype=torch.float64)
        error = float(abs(Fraction(1 / 3) - Fraction(1, 3)))
        assert not lies_inside(nearest, third, error / 2, "l2")
        assert lies_inside(nearest, third, error * 2, "l2")

    def test_norms(self):
        pixels = torch.zeros(1, 1, 2, dtype=torch.uint8)
        point = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
        assert not lies_inside(point, pixels, 5.0, "l2")
        assert lies_inside(point, pixels, math.nextafter(5.0, 6), "l2")
        assert not lies_inside(point, pixels, 4.0, "linf")
        assert lies_inside(point, pixels, math.nextafter(4.0, 5), "linf")
        assert lies_inside(point, pixels, math.inf, "l2")

    def test_float64_would_not_see_the_difference(self):
        """The squares sum to 1 + 2^-60, which float64 rounds to 1."""
        pixels = torch.zeros(1, 1, 2, dtype=torch.uint8)
        point = torch.tensor([[[1.0, 2.0**-30]]], dtype=torch.float64)
        assert point.norm() == 1
        assert not lies_inside(point, pixels, 1.0, "l2")
