"""Every option does something: those of other losses and those without effect are refused."""

import dataclasses
import json
from typing import Any

import pytest

from pipeline.config import RunConfig, default_of, has_centred_layers, has_matrices, value_of
from pipeline.errors import NoEffectError, PipelineError
from pipeline.losses.emma import EmmaLoss
from pipeline.losses.hinge import MixtureLoss
from pipeline.losses.offset import OffsetLoss
from pipeline.losses.registry import LOSSES, option_names
from pipeline.plan import parse as parse_plan
from pipeline.presets.registry import run_preset
from pipeline.pretrain import parse
from tests.pipeline.small_runs import small_run


@pytest.mark.parametrize("kind", LOSSES)
def test_every_loss_is_chosen_on_the_command_line_and_round_trips(kind):
    config = parse(["digits", "--loss.kind", kind, "--loss.eps", "0.25"])
    assert type(config.loss) is LOSSES[kind]
    assert (config.loss.kind, config.loss.eps, config.loss.scale) == (kind, 0.25, 10.0)
    assert RunConfig.from_json(config.to_json()) == config
    assert set(json.loads(config.to_json())["loss"]) == set(option_names(LOSSES[kind]))


def test_another_loss_keeps_what_both_have_and_takes_options_of_its_own():
    config = parse(["digits", "--loss.kind=offset", "--loss.offset=0.5"])
    before: Any = run_preset("digits").loss
    assert config.loss == OffsetLoss(eps=before.eps, scale=before.scale, offset=0.5)
    planned = parse_plan(["digits", "--loss.kind", "mixture", "--loss.ce_from", "0.5"]).run.loss
    assert planned == MixtureLoss(
        eps=before.eps,
        scale=before.scale,
        eps_start=before.eps_start,
        eps_end=before.eps_end,
        ce_from=0.5,
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--loss.kind", "emma", "--loss.offset", "9"], ["--loss.offset", "'emma'", "eps-start"]),
        (["--loss.offset=9"], ["--loss.offset", "'emma'", "--loss.eps-ramp"]),
        (["--loss.kind", "offset", "--loss.eps-end", "2"], ["--loss.eps-end", "'offset'"]),
        (["--loss.kind", "ofset"], ["--loss.kind ofset", "(nearest: offset)", "ce_hinge"]),
    ],
)
def test_an_option_of_another_loss_is_refused(words, parts):
    with pytest.raises(PipelineError) as refused:
        parse(["digits", *words])
    for part in parts:
        assert part in str(refused.value)


def test_an_option_of_another_loss_in_a_file_is_refused():
    body = json.loads(small_run().to_json())
    body["loss"]["offset"] = 9.0
    with pytest.raises(ValueError, match=r"--loss.offset is no option of the loss 'emma'"):
        RunConfig.from_json(json.dumps(body))


IDLE = [
    # preset, what leaves the option without effect, the option, a value
    ("digits", "--optim.lookahead-steps 0", "optim.lookahead_factor", "0.3"),
    ("digits", "--optim.audit-every 0", "optim.residual_limit", "0.1"),
    ("digits-liresnet", "", "optim.polar_every", "7"),
    ("digits-liresnet", "", "optim.audit_every", "7"),
    ("digits-liresnet", "", "optim.series", "frobenius"),
    ("digits-liresnet", "", "optim.retraction", "fast"),
    ("digits", "--optim.retraction fast", "optim.series", "frobenius"),
    ("digits-liresnet", "", "optim.gradient", "trivialized"),
    ("digits-soc", "", "optim.gradient", "trivialized"),
    ("digits-liresnet", "", "optim.increment", "tf32"),
    ("digits", "", "loss.eps_ramp", "0.3"),
    ("digits-sortnet-mlp", "--loss.eps-ramp 0", "loss.eps_start", "0.5"),
    ("digits-sortnet-mlp", "--loss.ce-start 0.01", "loss.ce_from", "0.3"),
    ("digits-sortnet-mlp", "--loss.ce-start 0.01", "loss.ce_to", "0.3"),
    ("digits", "", "train.loss_scale", "8"),
    ("digits", "--train.precision bf16", "train.loss_scale", "8"),
    ("digits", "--train.schedule triangular", "train.warmup_epochs", "3"),
    ("digits-sll", "", "train.lr_floor", "0.1"),
    ("digits", "", "train.calibration_samples", "99"),
    ("digits", "--checkpoint.keep-last 0", "checkpoint.keep_every", "10"),
    ("digits", "--checkpoint.keep-last 0", "checkpoint.keep_best", "2"),
    ("digits", "--checkpoint.no-evaluate", "checkpoint.keep_best", "2"),
    ("digits", "--checkpoint.no-evaluate", "checkpoint.evaluate_tasks", "3"),
    ("digits", "--checkpoint.no-evaluate", "checkpoint.evaluate_gpus", "1"),
    ("digits", "--checkpoint.no-evaluate", "checkpoint.evaluate_placement", "role x"),
    ("digits", "--checkpoint.none", "checkpoint.every_steps", "3"),
    ("digits", "--checkpoint.none", "checkpoint.keep_last", "3"),
    ("digits", "--checkpoint.none", "checkpoint.keep_best", "2"),
    ("digits", "--checkpoint.none", "checkpoint.budget_gb", "2"),
    ("digits", "--checkpoint.none", "checkpoint.evaluate_eps", "1/255"),
    ("digits", "--checkpoint.none", "train.rollbacks", "1"),
    ("digits", "--cluster.launcher local", "checkpoint.evaluate_tasks", "3"),
    ("digits", "--cluster.launcher local", "checkpoint.evaluate_gpus", "1"),
    ("digits", "--cluster.launcher local", "checkpoint.evaluate_placement", "role x"),
    ("digits", "--cluster.launcher local", "cluster.workers", "3"),
    ("digits", "--cluster.launcher local", "cluster.address", "host:6379"),
    ("digits", "--cluster.launcher local", "cluster.placement", "role x"),
    ("digits", "--cluster.launcher local", "cluster.min_workers", "1"),
    ("digits", "--cluster.launcher local", "cluster.max_failures", "1"),
    ("digits", "--cluster.launcher local", "cluster.max_preemptions", "1"),
    ("digits", "--data.shards set", "data.source", "synthetic"),
    ("digits", "--data.unindexed-samples 99", "data.train_split", "fit"),
    ("digits", "--data.unindexed-samples 99", "data.stream.lanes", "3"),
    ("digits", "--data.unindexed-samples 99", "data.stream.window", "3"),
    ("digits", "--data.unindexed-samples 99", "data.stream.cache_bytes", "3"),
    ("digits", "--data.unindexed-samples 99", "data.stream.disk_cache", "folder"),
    ("digits", "", "data.stream.disk_cache_bytes", "99"),
    ("digits", "--data.stream.crop random-resized", "data.stream.cache_bytes", "99"),
    ("digits", "", "data.stream.disk_cache", "folder"),
    (
        "digits",
        "--storage s3://b --data.shards set",
        "data.stream.disk_cache",
        "folder",
    ),
    ("digits", "--checkpoint.every-steps 0", "train.rollbacks", "1"),
    ("digits", "--loss.eps-ramp 0", "loss.eps_start", "0"),
    ("digits", "", "accept_changes", ""),
]


@pytest.mark.parametrize(("preset", "cause", "option", "value"), IDLE)
def test_an_option_without_effect_is_refused(preset, cause, option, value):
    flag = "--" + option.replace("_", "-")
    given = [preset, *cause.split(), flag, *value.split()]
    with pytest.raises(NoEffectError, match=option) as refused:
        parse(given)
    assert refused.value.option == option
    assert refused.value.default == default_of(run_preset(preset), option)


def test_the_message_names_option_value_cause_and_default():
    with pytest.raises(NoEffectError) as refused:
        parse(["digits", "--train.loss-scale", "8"])
    assert str(refused.value) == (
        "train.loss_scale=8.0 has no effect with train.precision=fp32; leave it at 1024.0"
    )


@pytest.mark.parametrize(("preset", "cause"), sorted({(row[0], row[1]) for row in IDLE}))
def test_what_leaves_an_option_without_effect_is_itself_accepted(preset, cause):
    parse([preset, *cause.split()])


def test_what_a_preset_says_steps_back_where_a_flag_leaves_it_without_effect():
    preset = run_preset("cifar10-L32W1024")
    assert (preset.cluster.workers, preset.train.warmup_epochs) == (8, 20)
    words = "--cluster.launcher local --train.schedule triangular --optim.lookahead-steps 0"
    config = parse(["cifar10-L32W1024", *words.split()])
    for option in ("cluster.workers", "train.warmup_epochs", "optim.lookahead_factor"):
        assert value_of(config, option) == default_of(config, option)
    # The same settings in a program are refused: there nothing says what was meant.
    with pytest.raises(NoEffectError, match=r"cluster\.workers=8"):
        dataclasses.replace(preset, cluster=dataclasses.replace(preset.cluster, launcher="local"))


@pytest.mark.parametrize(
    "words",
    [
        "--data.stream.disk-cache folder --storage s3://bucket/runs",
        "--data.stream.disk-cache folder --data.shards memory://bucket/set",
        "--checkpoint.every-steps 0 --train.rollbacks 1 --start-or-resume --name a",
        "--loss.eps-ramp 0.1 --loss.eps-start 0",
    ],
)
def test_the_same_options_are_accepted_where_they_have_one(words):
    parse(["digits", *words.split()])


def test_the_ratio_that_names_a_straggler_is_refused_on_one_rank():
    small_run().require_effects(world_size=1)
    config = dataclasses.replace(
        small_run(), cluster=dataclasses.replace(small_run().cluster, straggler_ratio=2.0)
    )
    config.require_effects(world_size=2)
    with pytest.raises(NoEffectError, match=r"cluster.straggler_ratio=2.0 .* one rank"):
        config.require_effects(world_size=1)


def test_both_values_that_say_nothing_are_accepted():
    train = dataclasses.replace(small_run().train, schedule="triangular")
    for warmup in (0, default_of(small_run(), "train.warmup_epochs")):
        small_run(train=dataclasses.replace(train, warmup_epochs=warmup))
    with pytest.raises(NoEffectError):
        small_run(train=dataclasses.replace(train, warmup_epochs=1))


def test_what_a_network_has_is_read_from_the_network():
    assert has_matrices(run_preset("digits").model)
    assert not has_matrices(run_preset("digits-soc").model)
    pointwise = parse(["digits-soc", "--model.pointwise", "manifold", "--optim.polar-every", "7"])
    assert pointwise.optim.polar_every == 7
    assert has_centred_layers(run_preset("digits-sortnet").model)
    assert not has_centred_layers(run_preset("digits").model)


def test_a_loss_without_a_ramp_trains_at_the_reference_radius():
    assert OffsetLoss(eps=0.5).training_radius(3, total=10) == 0.5
    assert EmmaLoss(eps=0.5, eps_start=0, eps_end=2, eps_ramp=1).training_radius(5, total=10) == 0.5
