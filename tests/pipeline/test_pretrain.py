"""The entry: what is impossible is refused with one message before a worker starts."""

import json
import math
import shutil

import pytest
import torch

import pipeline.launch.ray_launcher
import pipeline.training.zero3
from data_shards.sources.digits import digits
from data_shards.sources.synthetic import synthetic
from data_shards.write import write_shard_set
from pipeline.config import changes, decides_result
from pipeline.errors import NoEffectError
from pipeline.pretrain import main, parse
from pipeline.run.relative_urls import resolve
from tests.data_shards.test_index import rewrite_header
from tests.pipeline.prepared import prepare

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "digits"
    write_shard_set(digits(), str(folder))
    return folder


@pytest.fixture(autouse=True)
def no_workers(monkeypatch):
    def started(*arguments, **options):
        raise AssertionError("Ray was started although the run is impossible")

    monkeypatch.setattr(pipeline.launch.ray_launcher, "ray_session", started)


@pytest.fixture
def refusal(capsys, tmp_path, shards):
    """Run the entry on the digits shards and return its one message."""

    def run(*overrides, preset="digits", storage=tmp_path / "runs", data=shards):
        arguments = [preset, "--storage", str(storage), "--data.shards", str(data), *overrides]
        code: object
        try:
            code = main(arguments)
        except SystemExit as exit_:  # the parser's own refusals
            code = exit_.code
        captured = capsys.readouterr()
        text = " ".join((captured.out + captured.err).split())
        assert code == 2
        assert "Traceback" not in text
        return text

    return run


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["--bogus", "3"], ["--bogus"]),
        (["--train.epochs", "many"], ["--train.epochs", "many"]),
        (["--optim.lr", "-1"], ["lr", "greater than 0", "-1"]),
        (["--model.width", "4"], ["--model.width 4 ", "16 values of a patch"]),
        (["--model.alpha", "0.3"], ["--model.alpha 0.3", "(0, 1/4]"]),
        (["--model.beta", "1.5"], ["--model.beta 1.5", "[0, 1]"]),
        (["--train.global-batch", "65"], ["--train.global-batch 65", "2 ranks"]),
        (["--train.global-batch", "4096"], ["--train.global-batch 4096", "1149 samples"]),
        (
            ["--train.global-batch", "63", "--train.accumulation", "2"],
            ["63", "--train.accumulation 2"],
        ),
        (["--model.input-shape", "1", "16", "16"], ["1x8x8", "1x16x16"]),
        (["--model.num-classes", "9"], ["10 classes", "9 classes"]),
        (
            ["--data.train-split", "train", "--data.test-split", "validation"],
            ["--data.test-split validation", "--data.train-split fit"],
        ),
        (["--train.epochs", "inf"], ["epochs", "finite"]),
        (["--train.epochs", "0"], ["epochs", "greater than 0"]),
        (["--train.accumulation", "0"], ["accumulation", "greater than or equal to 1"]),
        (["--train.precision", "fp8"], ["--train.precision", "fp8", "bf16"]),
        (["--train.grad-clip", "nan"], ["--train.grad-clip nan"]),
        (["--train.seed", "-1"], ["seed", "-1"]),
        (["--loss.kind", "hinge2"], ["--loss.kind", "hinge2", "ce_hinge"]),
        (["--loss.eps-end", "nan"], ["--loss.eps-end nan", "finite"]),
        (["--loss.scale", "inf"], ["scale", "finite"]),
        (
            ["--loss.kind", "mixture", "--loss.ce-from", "0.9", "--loss.ce-to", "0.1"],
            ["--loss.ce-from 0.9", "--loss.ce-to 0.1"],
        ),
        (["--optim.betas", "0.9", "1"], ["betas", "less than 1"]),
        (["--optim.series", "taylor"], ["--optim.series", "taylor", "spectral"]),
        (["--optim.lookahead-factor", "0"], ["--optim.lookahead-factor 0:", "greater than 0"]),
        (["--optim.residual-limit", "nan"], ["--optim.residual-limit nan", "finite"]),
        (["--model.depth", "0"], ["--model.depth 0", "at least 1"]),
        (["--model.patch", "3"], ["--model.patch 3", "8x8"]),
        (["--checkpoint.evaluate-eps", "abc"], ["eps 'abc'", "36/255"]),
        (["--checkpoint.evaluate-eps", "-1/255"], ["eps '-1/255'"]),
        (["--checkpoint.evaluate-eps", "1/255", "1/255"], ["names a ratio twice"]),
        (["--checkpoint.evaluate-eps", "36/1"], ["36/1", "larger than 8", "36/255"]),
        (["--checkpoint.evaluate-eps"], ["--checkpoint.evaluate-eps", "must have at least 1 item"]),
        (["--checkpoint.every-steps", "-1"], ["--checkpoint.every-steps -1"]),
        (["--cluster.device", "tpu"], ["--cluster.device", "tpu", "cuda"]),
        (["--cluster.workers", "0"], ["workers", "greater than or equal to 1"]),
        (["--cluster.min-workers", "3"], ["--cluster.min-workers 3", "--cluster.workers 2"]),
        (["--cluster.hang-timeout-s", "700"], ["--cluster.hang-timeout-s 700", "600"]),
        (["--cluster.max-failures", "-2"], ["--cluster.max-failures -2", "-1"]),
        (["--data.stream.shift-pixels", "8"], ["--data.stream.shift-pixels 8", "8x8"]),
        (["--data.stream.randaugment", "2"], ["randaugment", "less than or equal to 1"]),
        (["--data.stream.crop", "center"], ["crop", "center", "random-resized"]),
        (["--tracking.uri", "ftp://host/x"], ["ftp://host/x", "sqlite:///"]),
        (
            ["--tracking.uri", "sqlite:///no/such/folder/x.db"],
            ["/no/such/folder/x.db", "no such folder"],
        ),
        (["--storage", "/dev/null/x"], ["storage", "/dev/null/x"]),
        (["--storage", "bogus://x"], ["bogus", "not known"]),
        (["--name", "a/b"], ["--name 'a/b'", "without /"]),
        (["--start-or-resume"], ["start_or_resume", "--name"]),
        (
            ["--start-or-resume", "--name", "a", "--checkpoint.none"],
            ["--checkpoint.none", "nothing to go on from"],
        ),
        (["--resume", "--name", "nothing"], ["--resume", "nothing"]),
        (["--resume"], ["--resume", "no run of preset 'digits'"]),
    ],
)
def test_impossible_settings_are_refused(refusal, overrides, parts):
    text = refusal(*overrides)
    for part in parts:
        assert part in text


def test_credentials_in_urls_are_refused_and_not_repeated(refusal):
    text = refusal("--tracking.uri", "https://me:sesame@tracking.example")
    assert "--tracking.uri holds credentials" in text
    assert "sesame" not in text


def test_unknown_preset(refusal):
    assert "unknown preset 'digit' (nearest: digits, " in refusal(preset="digit")


def test_a_gpu_that_is_not_there(refusal, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--cluster.device cuda: this machine" in refusal("--cluster.device", "cuda")


def test_fp16_without_the_arithmetic(refusal, monkeypatch):
    class Cpu:
        def is_fp16_supported(self):
            return False

        def device_name(self):
            return "cpu"

    class DeepSpeed:
        get_accelerator = Cpu

    monkeypatch.setattr(pipeline.training.zero3, "_import_deepspeed", lambda device: DeepSpeed)
    text = refusal("--train.precision", "fp16", "--cluster.device", "cpu")
    assert "--train.precision fp16" in text
    assert "cpu" in text


def test_missing_and_empty_shard_sets(refusal, tmp_path):
    assert "index.json" in refusal(data=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "index.json" in refusal(data=tmp_path / "empty")
    assert "--data.shards" in refusal(preset="cifar10-L32W1024", data="")


def test_index_that_disagrees_with_the_shards(refusal, shards, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    tar = damaged / "test-00000.tar"
    tar.write_bytes(tar.read_bytes()[:-512])
    assert "test-00000.tar" in refusal(data=damaged)
    tar.unlink()
    assert "test-00000.tar" in refusal(data=damaged)


def test_images_of_another_size(refusal, tmp_path):
    write_shard_set(synthetic(samples=40, size=16), str(tmp_path / "set"))
    text = refusal("--model.input-shape", "1", "8", "8", data=tmp_path / "set")
    assert "3x16x16" in text
    assert "1x8x8" in text


def test_a_refused_run_leaves_no_folder(refusal, tmp_path):
    refusal("--train.global-batch", "65", storage=tmp_path / "clean")
    assert not list((tmp_path / "clean").glob("digits-*"))


def test_run_folder_is_opened_once_and_resumed_only_unchanged(tmp_path, shards):
    base = ["digits", "--storage", str(tmp_path), "--data.shards", str(shards), "--name", "a"]
    prepared = prepare(parse(base), world_size=2)
    saved = json.loads(prepared.run.read("run.json"))
    assert saved["name"] == "a"
    assert prepared.job.context["shards_url"] == shards.as_uri()
    # The same in every execution: MLflow keeps the first value of a parameter.
    assert not {"resume", "start_or_resume", "extend_to_epochs"} & prepared.params().keys()
    with pytest.raises(ValueError, match="give --resume to continue it"):
        prepare(parse(base), world_size=2)
    with pytest.raises(ValueError, match=r"train.seed: 0 -> 1"):
        prepare(parse([*base, "--resume", "--train.seed", "1"]), world_size=2)
    with pytest.raises(ValueError, match="no committed checkpoint"):
        prepare(parse([*base, "--resume"]), world_size=2)


def test_a_shard_set_of_the_storage_is_named_from_the_artifact(tmp_path, shards):
    storage = tmp_path / "runs"
    shutil.copytree(shards, storage / "data/digits")
    prepared = prepare(parse(["digits", "--storage", str(storage), "--name", "a"]), world_size=2)
    assert prepared.job.context["shards_url"] == "../../../data/digits"
    artifact = prepared.run.child("artifacts/step-00000005").url
    found = resolve(prepared.job.context["shards_url"], base=artifact)
    assert found == (storage / "data/digits").as_uri()


def test_what_a_killed_driver_left_is_removed(tmp_path, shards):
    base = ["digits", "--storage", str(tmp_path), "--data.shards", str(shards), "--name", "a"]
    run = prepare(parse(base), world_size=2).run
    for name in ("ray-0123abcd/x", "ray-mine/x", "checkpoints/ray-0123abcd"):
        run.write(name, b"")
    prepare(parse([*base, "--start-or-resume"]), world_size=2)
    assert not run.exists("ray-0123abcd")
    assert run.exists("ray-mine/x")
    assert run.exists("checkpoints/ray-0123abcd")


def test_changed_settings_are_listed_and_accepted_when_told(tmp_path, shards):
    base = ["digits", "--storage", str(tmp_path), "--data.shards", str(shards), "--name", "a"]
    again = [*base, "--start-or-resume", "--cluster.max-failures", "3"]
    assert prepare(parse(base), world_size=2).changed == {}
    expected = {"cluster.max_failures": "0 -> 3"}
    earlier = prepare(parse(again), world_size=2)
    assert earlier.changed == expected
    prepared = prepare(parse(again), world_size=2)
    assert prepared.changed == expected  # no rank has begun
    earlier.accept()
    assert prepare(parse(again), world_size=2).changed == expected  # another one had the lease
    prepared = prepare(parse(again), world_size=2)
    prepared.accept()
    assert prepare(parse(again), world_size=2).changed == {}
    with pytest.raises(ValueError, match=r"optim.lr: 0.01 -> 0.004 \(--accept-changes"):
        prepare(parse([*again, "--optim.lr", "4e-3"]), world_size=2)
    told = [*again, "--optim.lr", "4e-3", "--accept-changes"]
    assert prepare(parse(told), world_size=2).changed == {"optim.lr": "0.01 -> 0.004"}


def test_a_set_without_an_index_is_trained_and_never_certified(refusal, tmp_path, shards):
    bare = shutil.copytree(shards, tmp_path / "bare")
    (bare / "index.json").unlink()
    assert "no shard set at" in refusal(data=bare)
    asked = ["--data.unindexed-samples", "1437"]
    assert "never certified; give --checkpoint.no-evaluate" in refusal(*asked, data=bare)
    base = ["digits", "--storage", str(tmp_path), "--data.shards", str(bare), *asked]
    prepared = prepare(parse([*base, "--checkpoint.no-evaluate"]), world_size=2)
    assert (prepared.samples.per_epoch, prepared.tracking.experiment) == (1437, "unindexed")
    assert prepared.job.context["shards_digest"] == ""


def test_raw_images_need_a_crop_and_certify_on_the_test_split(refusal, tmp_path, shards):
    raw = shutil.copytree(shards, tmp_path / "raw")
    rewrite_header(raw, train_shape=None)
    assert "(1, 8, 8): give" in refusal("--data.stream.crop", "none", data=raw)
    crop = ["--data.stream.crop", "random-resized"]
    validation = ["--data.train-split", "fit", "--data.test-split", "validation"]
    text = refusal(*crop, *validation, data=raw)
    assert "only the test split is stored at network size" in text
    # Whole images alone can be certified, so nothing is held out to choose checkpoints by.
    assert "no checkpoint can be certified on another" in refusal(
        *crop, "--data.train-split", "fit", data=raw
    )
    base = ["digits", "--storage", str(tmp_path), "--data.shards", str(raw)]
    base += ["--data.train-split", "train"]
    assert prepare(parse([*base, *crop]), world_size=2).samples.per_epoch == 1437


def test_a_stop_beyond_the_end_is_said_and_a_ratio_of_one_rank_refused(tmp_path, shards):
    base = ["digits", "--storage", str(tmp_path), "--data.shards", str(shards)]
    assert prepare(parse([*base, "--train.stop-after", "3"]), world_size=2).notices == ()
    late = [*base, "--name", "late", "--train.epochs", "1", "--train.stop-after", "999"]
    last = math.ceil(prepare(parse(late), world_size=2).samples.per_epoch / 128)
    (notice,) = prepare(parse([*late, "--start-or-resume"]), world_size=2).notices
    assert notice == f"train.stop_after=999 is never reached: the run ends after step {last}"
    with pytest.raises(NoEffectError, match=r"cluster.straggler_ratio=2.0 .* one rank"):
        prepare(parse([*base, "--cluster.straggler-ratio", "2"]), world_size=1)


def test_how_samples_are_read_may_change_on_resume():
    remote = ["digits", "--data.shards", "memory://bucket/set"]
    base = parse(remote)
    other = parse([*remote, "--data.stream.workers", "3", "--data.stream.disk-cache", "x"])
    assert set(changes(base, other)) == {"data.stream.workers", "data.stream.disk_cache"}
    assert not any(map(decides_result, changes(base, other)))
    assert any(map(decides_result, changes(base, parse([*remote, "--data.stream.flip"]))))


def test_generated_shards_are_written_on_first_use(tmp_path):
    config = parse(["digits", "--storage", str(tmp_path)])
    first = prepare(config, world_size=1)
    assert (tmp_path / "data" / "digits" / "index.json").exists()
    assert first.samples.index.header.splits["test"] == 360
