import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC

from data_shards.errors import ShardError
from data_shards.format.decode import decode_image
from data_shards.sources.base import VALIDATION, hold_out, with_validation
from data_shards.sources.digits import digits
from data_shards.sources.synthetic import synthetic
from data_shards.sources.transcode import image_extension


def decoded(source):
    encoded = [source.encode(i) for i in range(len(source.labels))]
    return torch.stack([decode_image(data, image_extension(data)) for data in encoded]).numpy()


def test_digits_are_the_pixels_of_scikit_learn():
    source, data = digits(), load_digits()
    images = decoded(source)
    assert images.shape == (1797, 1, 8, 8)
    assert np.array_equal(images[:, 0], np.rint(data.images * 255 / 16))
    assert np.array_equal(source.labels, data.target)


@pytest.mark.parametrize("source", [digits(), synthetic(samples=500, classes=7)])
def test_splits_are_stratified(source):
    total = len(source.labels)
    assert source.test.sum() == np.ceil(total / 5)
    assert source.validation.sum() == np.ceil((total - source.test.sum()) / 5)
    assert not (source.test & source.validation).any()
    for label in range(len(source.class_names)):
        members = source.labels == label
        assert abs(source.test[members].sum() - members.sum() / 5) < 1
        rest = (members & ~source.test).sum()
        assert abs(source.validation[members].sum() - rest / 5) < 1


def test_splits_are_fixed():
    source = digits()
    assert np.flatnonzero(source.test)[:6].tolist() == [3, 4, 19, 21, 26, 33]
    assert np.flatnonzero(source.validation)[:6].tolist() == [6, 10, 14, 15, 17, 18]


def test_no_more_than_ten_thousand_are_held_out():
    labels = np.arange(120_000) % 7
    among = labels != 3
    held = hold_out(labels, among, VALIDATION)
    assert held.sum() == 10_000
    assert not held[~among].any()
    counts = np.bincount(labels[held], minlength=7)
    assert counts[3] == 0
    assert counts[[0, 1, 2, 4, 5, 6]].max() - counts[[0, 1, 2, 4, 5, 6]].min() <= 1


def test_validation_has_the_size_that_is_asked_for():
    source = digits()
    smaller = with_validation(source, 100)
    assert smaller.validation.sum() == 100
    assert (smaller.validation <= source.validation).all()
    counts = np.bincount(source.labels[smaller.validation])
    assert counts.max() - counts.min() <= 1
    assert smaller.parameters == {**source.parameters, "validation_samples": 100}


@pytest.mark.parametrize("samples", [0, -1, 1437])
def test_a_validation_that_leaves_nothing_is_refused(samples):
    with pytest.raises(ShardError, match=f"^{samples} images for validation: .* from 1 to 1436"):
        with_validation(digits(), samples)


@pytest.mark.parametrize("source", [digits(), synthetic(samples=30, classes=3)])
def test_sources_travel_to_other_processes(source):
    again = pickle.loads(pickle.dumps(source))
    assert again.encode(17) == source.encode(17)
    assert again.load([3, 5]) == [source.encode(3), source.encode(5)]


def test_synthetic_depends_on_its_parameters_alone():
    first, again, other = (synthetic(samples=40, seed=seed) for seed in (1, 1, 2))
    assert [first.encode(i) for i in range(40)] == [again.encode(i) for i in range(40)]
    assert first.encode(0) != other.encode(0)
    assert len({first.encode(i) for i in range(40)}) == 40


@pytest.mark.parametrize(("classes", "size"), [(2, 8), (37, 24), (1000, 16)])
def test_synthetic_of_any_size(classes, size):
    source = synthetic(classes=classes, size=size, samples=2 * classes)
    image = decode_image(source.encode(classes - 1), "jpg")
    assert image.shape == (3, size, size)
    assert np.bincount(source.labels).tolist() == [2] * classes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"classes": 1}, r"classes 1 is not in \[2"),
        ({"size": 4}, r"size 4 is not in \[8, 4096\]"),
        ({"samples": 19}, r"samples 19 is not in \[20"),
    ],
)
def test_synthetic_limits(fields, message):
    with pytest.raises(ShardError, match=message):
        synthetic(**fields)


def test_synthetic_is_half_linear():
    source = synthetic(classes=10, size=32, samples=1200)
    images, labels, test = decoded(source) / 255.0 - 0.5, source.labels, source.test
    flat = images.reshape(len(images), -1)
    model = LogisticRegression(C=0.01, max_iter=200).fit(flat[~test], labels[~test])
    linear = model.score(flat[test], labels[test])
    assert 0.3 <= linear <= 0.7
    # The power of local frequencies, blind to phase: a nonlinear map that a linear one lacks.
    power = np.log1p(np.abs(np.fft.rfft2(images.mean(axis=1)))[:, :, :12].reshape(len(images), -1))
    model = SVC(C=10.0).fit(power[~test], labels[~test])
    assert model.score(power[test], labels[test]) >= linear + 0.15
