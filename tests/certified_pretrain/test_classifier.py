"""The library: what it says of a network is what the jobs say, and what is saved is read again."""

import math

import matplotlib.figure
import numpy as np
import pytest
import torch

import certified_pretrain as cp
from data_shards.format.shard_index import load_index
from data_shards.sources.synthetic import synthetic
from data_shards.streaming.sample_reader import read_shard
from data_shards.write import write_shard_set
from jobs.evaluate_cra import evaluate
from jobs.prediction.predictor import SoundPredictor
from model.certify import certify
from model.errors import ModelError

pytestmark = pytest.mark.integration

SHAPE = (3, 8, 8)
NAMES = ("cat", "hot dog", "snow leopard", "fox")
IMAGES = np.random.default_rng(0).integers(0, 256, (6, *SHAPE), dtype=np.uint8)


@pytest.fixture(scope="module")
def net():
    network = cp.networks.lipnext(SHAPE, 4, patch=2, width=16, depth=1, seed=3)
    return cp.certified(network, NAMES)


@pytest.fixture(scope="module")
def saved(net, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    net.save(folder, origin="a loop of one's own")
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("shards"))
    write_shard_set(synthetic(classes=4, size=8, samples=60, seed=1), folder)
    return folder


def test_classes_and_radii_are_those_of_the_jobs(net, saved):
    served = SoundPredictor(str(saved)).predict(torch.from_numpy(IMAGES))
    found = net.certify(IMAGES, norm="l2", eps="36/255")
    assert torch.equal(found.prediction, served.prediction)
    assert torch.equal(found.radius, served.radius)
    assert torch.equal(found.certified, served.radius > 36 / 255)
    assert torch.equal(net.predict(torch.from_numpy(IMAGES)), served.prediction)


def test_what_is_saved_is_read_again_with_its_names(net, saved):
    again = cp.load(saved)
    assert again.class_names == NAMES
    assert torch.equal(again.certify(IMAGES).radius, net.certify(IMAGES).radius)


def test_the_radius_is_that_of_the_margin(net):
    images = torch.from_numpy(IMAGES) / 255
    logits, factors = net.network.logits_and_margin_factors(images)
    nominal = certify(logits, factors, logits.argmax(1), lipschitz=1.0)
    found = net.certify(IMAGES)
    assert found.radius == pytest.approx(nominal.radius, rel=1e-3)  # of the float32 program


def test_another_norm_gets_the_largest_ball_inside_the_proved_one(net):
    l2, linf = (net.certify(IMAGES, norm=norm).radius for norm in ("l2", "linf"))
    assert (linf < l2 / math.sqrt(math.prod(SHAPE))).all()
    assert linf == pytest.approx(l2 / math.sqrt(math.prod(SHAPE)), rel=1e-12)
    other = cp.certified(cp.networks.build("groupsort", SHAPE, 4, width=16, depth=2))
    assert other.norm == "linf"
    own, converted = (other.certify(IMAGES, norm=norm).radius for norm in ("linf", "l2"))
    assert converted == pytest.approx(own, rel=1e-12)
    with pytest.raises(ModelError, match="norm 'l1' is neither"):
        net.certify(IMAGES, norm="l1")


def test_an_attack_changes_classes_outside_of_the_radius_and_none_inside(net):
    radius = net.certify(IMAGES).radius
    assert not net.attack(IMAGES, 0.999 * radius, steps=10).changed.any()
    far = net.attack(IMAGES, 20 * radius, steps=10)
    assert far.changed.any()
    distance = (far.images - torch.from_numpy(IMAGES) / 255).flatten(1).norm(dim=1)
    assert (distance <= 20 * radius * (1 + 1e-9)).all()
    assert torch.equal(far.prediction != net.predict(IMAGES), far.changed)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES / 255, "uint8"),
        (IMAGES[0], "shape"),
        (IMAGES[:, :1], "shape"),
    ],
)
def test_images_that_are_none_of_its_own_are_refused(net, images, message):
    with pytest.raises(ModelError, match=message):
        net.certify(images)


def test_bad_settings_are_refused(net):
    with pytest.raises(ValueError, match="eps=-1"):
        net.certify(IMAGES, eps=-1)
    with pytest.raises(ModelError, match="1 class names for 4 classes"):
        cp.certified(net.network, ["one"])
    with pytest.raises(ModelError, match="these fit: 1, 2"):
        cp.networks.lipnext(SHAPE, 4, patch=3, width=16)
    with pytest.raises(ModelError, match=r"lipnext: widht: Unexpected"):
        cp.networks.lipnext(SHAPE, 4, patch=2, widht=16)
    with pytest.raises(ModelError, match=r"\(nearest: lipnext\)"):
        cp.networks.build("lipnex", SHAPE, 4)
    with pytest.raises(FileNotFoundError):
        cp.load("nowhere")


def test_the_evaluation_of_a_shard_set_is_that_of_the_job(net, saved, shards, tmp_path):
    job = evaluate(
        {
            "artifact": str(saved), "shards": shards, "launcher": "local", "record": False,
            "out": str(tmp_path / "out"),
        }
    )  # fmt: skip
    found = cp.evaluate(net, shards)
    sound = job.columns["sound"]
    assert (found.samples, found.clean, found.cra) == (job.samples, sound.clean, sound.cra)
    assert found.mean_radius == pytest.approx(sound.mean_radius, rel=1e-12)


def test_arrays_and_datasets_give_the_same_evaluation(net, shards):
    index = load_index(shards)
    parts = [b for s in index.shards_of("test") for b in read_shard(index, s, 100)]
    images, labels = (torch.cat([getattr(p, name) for p in parts]) for name in ("images", "labels"))
    whole = cp.evaluate(net, shards, ["1/255"])
    for dataset in (
        (images, labels),
        (images.numpy(), labels.tolist()),
        zip(images, labels, strict=True),
    ):
        assert cp.evaluate(net, dataset, ["1/255"]).cra == whole.cra
    with pytest.raises(ModelError, match="no sample"):
        cp.evaluate(net, [])
    with pytest.raises(ModelError, match=r"outside of 0\.\.3"):
        cp.evaluate(net, (images, labels + 1))


def test_the_curve_counts_the_radii_beyond_each_eps(net):
    label = net.predict(IMAGES)
    label[0] = (label[0] + 1) % 4
    found = cp.evaluate(net, (IMAGES, label), ["1/255"])
    eps, share = found.curve(50)
    proved = torch.where(found.prediction == label, found.radius, 0.0)
    expected = [float((proved > at).double().mean()) for at in eps.tolist()]
    assert share.tolist() == pytest.approx(expected, abs=1e-12)
    axes = found.plot(matplotlib.figure.Figure().add_subplot())
    assert axes.get_legend().get_texts()[0].get_text().startswith("1/255: ")


def test_what_is_no_artifact_and_no_array_is_named(tmp_path, net):
    with pytest.raises(FileNotFoundError, match="is neither a model artifact nor a run"):
        cp.load(tmp_path / "nothing")
    with pytest.raises(ModelError, match="images are a list; needed: a tensor or array"):
        net.predict([1, 2])
    shape = "x".join(map(str, net.input_shape))
    classes = net.network.num_classes
    assert repr(net) == f"<CertifiedClassifier: lipnext, images {shape}, {classes} classes, l2>"
