"""A preset takes shape, classes, patch and sampling from the shard set, unless they are given."""

import io

import numpy as np
import pytest
from PIL import Image

from data_shards.errors import ShardError
from data_shards.sources.imagefolder import imagefolder_set
from data_shards.sources.synthetic import synthetic
from data_shards.write import write_shard_set
from model.networks.lipnext.config import LipNeXtConfig
from pipeline.errors import PipelineError
from pipeline.plan import parse as parse_plan
from pipeline.presets.lipnext import SIZES
from pipeline.pretrain import parse
from pipeline.training.data import open_samples


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """80 images of 64x64 in three classes, 16 of them the test split."""
    url = str(tmp_path_factory.mktemp("square") / "set")
    write_shard_set(synthetic(classes=3, size=64, samples=80, seed=1), url)
    return url


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """Images of 37x37, a prime."""
    url = str(tmp_path_factory.mktemp("odd") / "set")
    write_shard_set(synthetic(classes=3, size=37, samples=30, seed=1), url)
    return url


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Files of different sizes, of which the test split alone has the size of the network."""
    root = tmp_path_factory.mktemp("photos")
    pick = np.random.default_rng(0)
    for number in range(30):
        pixels = pick.integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG")
        folder = root / "in" / ("cat", "hot dog", "fox")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(file.getvalue())
    source = imagefolder_set(str(root / "in"), test_size=32, hold_out=0.2)
    write_shard_set(source, str(root / "set"))
    return str(root / "set")


def patch_of(words):
    model = parse(words).model
    assert isinstance(model, LipNeXtConfig)
    return model.patch


@pytest.mark.parametrize("preset", [*SIZES, "digits", "digits-aol", "digits-sll", "cifar10-soc-5"])
def test_any_preset_takes_shape_and_classes_from_the_set(preset, square):
    config = parse([preset, "--data.shards", square])
    assert config.preset == preset
    assert (config.model.input_shape, config.model.num_classes) == ((3, 64, 64), 3)
    assert open_samples(square, config.data, config.model, certify=True).class_names


def test_the_patch_keeps_the_grid_as_near_as_it_can(square, odd):
    assert patch_of(["cifar10-L32W1024", "--data.shards", square]) == 4
    assert patch_of(["lipnext-S", "--data.shards", odd]) == 1  # 37 would need a width
    plain = parse(["lipnext-S"]).model
    assert isinstance(plain, LipNeXtConfig)
    assert (plain.width, plain.depth, plain.patch) == (128, 4, 2)


def test_what_the_command_line_says_stays(square):
    words = ["lipnext-S", f"--data.shards={square}", "--train.epochs", "3", "--model.patch", "2"]
    config = parse([*words, "--data.train-split", "train"])
    assert (config.train.epochs, config.data.train_split) == (3, "train")
    assert patch_of(words) == 2
    shaped = parse([*words, "--model.input-shape", "3", "32", "32"]).model
    assert (shaped.input_shape, shaped.num_classes) == ((3, 32, 32), 3)


def test_epochs_and_batch_of_a_size_come_from_the_samples(square):
    config = parse(["lipnext-S", "--data.shards", square])
    assert (config.train.epochs, config.train.global_batch) == (200, 32)  # 51 samples to fit


def test_images_of_different_sizes_are_cropped_and_all_of_train_is_used(photos):
    config = parse(["lipnext-S", "--data.shards", photos])
    assert config.data.stream.crop == "random-resized"
    assert config.data.train_split == "train"
    samples = open_samples(photos, config.data, config.model, certify=True)
    assert samples.class_names == ("cat", "fox", "hot dog")


def test_the_plan_is_of_the_set_at_hand(square):
    assert parse_plan(["lipnext-S", "--data.shards", square]).run.model.input_shape == (3, 64, 64)


def test_a_preset_that_cannot_take_the_images_is_refused_with_the_reason(odd):
    with pytest.raises(PipelineError, match=r"3x37x37.*pool=4 does not divide .* lipnext-S"):
        parse(["cifar10-sll-S", "--data.shards", odd])


def test_a_patch_that_does_not_divide_is_refused_with_those_that_fit(square, capsys):
    with pytest.raises(SystemExit):
        parse(["lipnext-S", "--data.shards", square, "--model.patch", "5"])
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "of width 128 these fit: 1, 2, 4" in said


def test_a_set_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ShardError, match="no shard set at"):
        parse(["lipnext-S", "--data.shards", str(tmp_path)])
