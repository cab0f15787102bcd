"""How settings reach a run: presets, files, existing runs; help, lists and their reference."""

import re

import pytest
import yaml

import docs.settings_page
from data_shards.command_line.settings import settings
from data_shards.sources.digits import digits
from data_shards.write import write_shard_set
from jobs import predict, report, schedule
from pipeline import plan
from pipeline.command_line.run_help import OFTEN
from pipeline.config import RunConfig
from pipeline.driver import preflight
from pipeline.errors import NoEffectError, PipelineError
from pipeline.losses.offset import OffsetLoss
from pipeline.losses.registry import LOSSES
from pipeline.presets.registry import PRESETS, run_preset
from pipeline.pretrain import main, parse
from pipeline.run.config_file import to_yaml, tomllib
from tests.pipeline.prepared import prepare


@pytest.fixture(scope="module")
def storage(tmp_path_factory):
    """A storage with the digits, and with a run `a` of 3 epochs that stops after step 5."""
    folder = tmp_path_factory.mktemp("runs")
    write_shard_set(digits(), str(folder / "data/digits"))
    words = ["--name", "a", "--train.epochs", "3", "--train.stop-after", "5", "--optim.lr", "0.02"]
    prepare(parse(["digits-dense", "--storage", str(folder), *words]), world_size=2)
    return folder


@pytest.fixture
def at_step(monkeypatch):
    """Gives every run checkpoints after these steps."""

    def put(*steps):
        monkeypatch.setattr(preflight, "committed", lambda run: dict.fromkeys(steps, run))

    return put


def output(capsys, *words, code=0):
    assert main(list(words)) == code
    return capsys.readouterr().out


# -- presets and files ---------------------------------------------------------------------------


def test_a_preset_is_the_first_word_or_a_flag_and_not_two():
    assert parse(["--preset", "digits-sll"]) == parse(["digits-sll"]) == run_preset("digits-sll")
    assert parse(["--preset=digits-sll", "--train.epochs", "3"]).train.epochs == 3
    with pytest.raises(PipelineError, match="the first word names the preset 'digits'"):
        parse(["digits", "--preset", "digits-sll"])
    with pytest.raises(PipelineError, match=r"nearest: cifar10-L32W1024, .*; --list shows all"):
        parse(["--preset", "cifar10-L32W102"])


def test_printed_settings_are_a_file_that_makes_the_same_run(capsys, tmp_path):
    file = tmp_path / "settings.yaml"
    words = ["digits-sll", "--loss.kind", "offset", "--loss.offset", "0.5", "--train.seed", "3"]
    file.write_text(output(capsys, *words, "--print-config"))
    assert parse(["--config", str(file)]) == parse(words)
    above = parse([f"--config={file}", "--train.seed", "4"])
    assert (above.train.seed, above.loss) == (
        4,
        OffsetLoss(eps=0.4235294117647059, scale=10, offset=0.5),
    )
    with pytest.raises(PipelineError, match=r"settings.yaml is of preset 'digits-sll'"):
        parse(["digits", "--config", str(file)])


def test_what_a_file_leaves_out_is_that_of_its_preset(tmp_path):
    text = 'preset = "digits-dense"\n[train]\nepochs = 3\n[loss]\nkind = "offset"\noffset = 0.5\n'
    file = tmp_path / "settings.toml"
    file.write_text(text)
    found = parse(["--config", str(file)])
    below = run_preset("digits-dense")
    assert (found.model, found.train.epochs) == (below.model, 3)
    assert found.loss == OffsetLoss(offset=0.5)  # another kind: nothing of the preset's loss stays
    assert tomllib.loads(text)["loss"]["kind"] == "offset"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {epoks: 3}",
            r"s.yaml: there is no setting train.epoks \(nearest: train.epochs",
        ),
        ("train: {epochs: 0}", r"s.yaml: --train.epochs 0: must be greater than 0"),
        ("train: {loss_scale: 8}", r"s.yaml: train.loss_scale=8.0 has no effect"),
        ("train: [", "--config .*s.yaml: while parsing"),
        ("3", "settings by name are needed"),
        ("preset: nothing", "unknown preset 'nothing'"),
        (None, "--config .*s.yaml: FileNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(tmp_path, text, message):
    file = tmp_path / "s.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PipelineError, match=message):
        parse(["--config", str(file)])


def test_errors_of_the_entry_name_flags_as_typed(capsys):
    said = output(capsys, "digits", "--train.loss-scale", "8", code=2)
    assert said.strip() == (
        "refused: --train.loss-scale 8.0 has no effect with --train.precision fp32; leave it at "
        "1024.0"
    )
    words = ("digits", "--cluster.launcher", "local", "--storage", "bogus://x")
    assert output(capsys, *words, code=2).startswith("refused: cannot open bogus:")


# -- existing runs -------------------------------------------------------------------------------


def test_a_run_writes_its_settings_as_a_file(storage):
    text = (storage / "a/config.yaml").read_text()
    assert yaml.safe_load(text)["train"]["epochs"] == 3
    again = parse(["--config", str(storage / "a/config.yaml"), "--name", "b"])
    assert again.optim.lr == 0.02
    assert to_yaml(again) == text


def test_resume_takes_the_settings_of_the_run(storage):
    found = parse(["--resume", "--name", "a", "--storage", str(storage)])
    assert (found.preset, found.optim.lr, found.train.epochs) == ("digits-dense", 0.02, 3)
    assert (found.resume, found.train.stop_after) == (True, 0)
    changed = parse(["--resume", "--name", "a", "--storage", str(storage), "--optim.lr", "0.03"])
    assert changed.optim.lr == 0.03
    with pytest.raises(PipelineError, match="run a is of preset 'digits-dense'"):
        parse(["digits", "--resume", "--name", "a", "--storage", str(storage)])
    with pytest.raises(PipelineError, match=r"--resume: there is no run .*/none"):
        parse(["--resume", "--name", "none", "--storage", str(storage)])
    with pytest.raises(NoEffectError, match="start_or_resume"):
        parse(["--resume", "--start-or-resume", "--name", "a", "--storage", str(storage)])


def test_resume_without_a_name_takes_the_run_that_was_started_last(tmp_path):
    with pytest.raises(PipelineError, match="no run under"):
        parse(["--resume", "--storage", str(tmp_path)])
    for preset, time in (("digits", "20250101-000000"), ("digits-sll", "20240101-000000-2")):
        folder = tmp_path / f"{preset}-{time}"
        folder.mkdir()
        (folder / "run.json").write_text(run_preset(preset).to_json())
    words = ["--resume", "--storage", str(tmp_path)]
    assert parse(words).name == "digits-20250101-000000"
    assert parse(["digits-sll", *words]).name == "digits-sll-20240101-000000-2"
    with pytest.raises(PipelineError, match="no run of preset 'digits-soc'"):
        parse(["digits-soc", *words])


def resumed(storage, *words):
    config = parse(["--resume", "--name", "a", "--storage", str(storage), *words])
    return prepare(config, world_size=2)


def test_more_epochs_state_what_they_do_to_the_schedule(storage, at_step):
    at_step(5)
    prepared = resumed(storage, "--extend-to-epochs", "6")
    assert prepared.job.config.train.epochs == 6
    assert prepared.schedule.total_steps > 100
    (notice,) = prepared.notices
    assert re.fullmatch(
        r"extended from 3 to 6 epochs \(54 to 108 steps\): from step 5 on the schedule is that of "
        r"a run of this length; there the learning rate is .*e-\d\d in place of .*e-\d\d, the "
        r"training radius 0\.371 in place of 0\.371",
        notice,
    )
    with pytest.raises(PipelineError, match="--extend-to-epochs 2: run a has 3"):
        resumed(storage, "--extend-to-epochs", "2")
    with pytest.raises(PipelineError, match=r"train.epochs: 3.0 -> 6.0 .*--accept-changes"):
        resumed(storage, "--train.epochs", "6")


def test_a_finished_run_and_a_stop_that_is_behind_are_said(storage, at_step):
    at_step(54)
    assert resumed(storage).notices == (
        "run a is at step 54 of 54 already: nothing is trained; --extend-to-epochs with more than "
        "3 goes on",
    )
    with pytest.raises(PipelineError, match="stop_after=10 lies before step 54, at which the run"):
        resumed(storage, "--train.stop-after", "10")


# -- help ----------------------------------------------------------------------------------------


def test_short_help_is_short_and_has_what_people_change(capsys):
    assert "--model.depth" not in output(capsys, "digits-sll", "--help")  # it has groups
    text = output(capsys, "--help")
    assert len(text.splitlines()) < 90
    assert len(OFTEN) == 20
    known = {one.option: one.flag for one in settings(RunConfig, run_preset("digits"))}
    for option in OFTEN:
        assert f"\n  {known[option]}" in text
    assert text.count("  python -m pipeline.pretrain") == 3
    assert max(map(len, text.splitlines())) <= 100


def test_all_help_has_every_setting_of_the_preset_in_groups(capsys):
    text = output(capsys, "digits-sll", "--help-all")
    for one in settings(RunConfig, run_preset("digits-sll")):
        assert f"\n  {one.synopsis}" in text
    for group in ("model:", "data.stream:", "optim:", "loss:", "train:", "cluster:"):
        assert f"\n{group}" in text


@pytest.mark.parametrize("columns", ["40", "200"])
def test_the_list_has_every_preset_with_its_facts_in_any_terminal(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    few = {name: PRESETS[name] for name in ("cifar10-soc-10", "cifar10-soc-5", "digits")}
    monkeypatch.setattr("pipeline.command_line.run_help.PRESETS", few)
    rows = [line.split() for line in output(capsys, "--list").splitlines()]
    assert [row[0] for row in rows] == ["preset", "cifar10-soc-5", "cifar10-soc-10", "digits"]
    assert rows[3] == [
        "digits",
        "lipnext",
        "120",
        "k",
        "1x8x8",
        "10",
        "l2",
        "made",
        "on",
        "first",
        "use",
    ]


def every_setting():
    """Where it is, and the setting: of a run, of every network and loss, of every other entry."""
    model = run_preset("digits").model
    yield from (
        ("run", one) for one in settings(RunConfig, RunConfig(preset="digits", model=model))
    )
    for kind, configuration in {**docs.settings_page.networks(), **LOSSES}.items():
        yield from ((kind, one) for one in settings(configuration))
    for entry, configuration in docs.settings_page.ENTRIES.items():
        yield from ((entry, one) for one in settings(configuration))


def test_every_setting_has_a_meaning_and_says_what_0_and_nothing_mean():
    values = {"train.seed", "attack_seed", "seeds"}  # a seed: 0 is a number as any other
    for where, one in every_setting():
        assert one.meaning, (where, one.flag)
        assert "=" not in one.default, (where, one.flag, one.default)  # no object of a library
        if one.default in ("0", "-1") and one.option not in values:
            said = re.search(rf"(?<![\d.-]){one.default}(?![\d.])", one.meaning)
            assert said, (where, one.flag, one.meaning)


def test_the_reference_of_settings_is_current():
    assert docs.settings_page.PAGE.read_text() == docs.settings_page.page(), (
        "python -m docs.settings_page writes it"
    )


# -- one vocabulary ------------------------------------------------------------------------------


def test_one_thing_has_one_name_in_every_entry():
    """A flag that ends as one of the run's, of what all entries share, is that very flag."""
    shared = {
        one.flag.rpartition(".")[2]: one.flag
        for one in settings(RunConfig, run_preset("digits"))
        if one.flag.startswith(("--tracking.", "--data.shards", "--cluster.", "--storage"))
    }
    shared.pop("device"), shared.pop("placement"), shared.pop("workers")
    for where, one in every_setting():
        last = one.flag.removeprefix("--").rpartition(".")[2]
        if where in docs.settings_page.ENTRIES and last in shared:
            assert one.flag == shared[last], (where, one.flag)
    for where in (predict.PredictConfig, report.ReportConfig, schedule.ScheduleConfig):
        flags = {one.flag for one in settings(where)}
        assert {"--tracking.uri", "--tracking.experiment"} <= flags
    assert "--data.shards" not in {one.flag for one in settings(plan.Request)}  # of its run


def test_a_plan_counts_the_samples_of_the_set_at_hand(storage):
    asked = ["digits", "--data.shards", str(storage / "data/digits")]
    request = plan.parse(asked)
    images, size = request.data()
    assert images == 1149  # the fit part of 1437
    assert 50 < size < 300
    assert request.verification().images == 360
    everything = plan.parse([*asked, "--data.train-split", "train", "--images", "99"])
    assert everything.data()[0] == 99
    assert plan.parse([*asked, "--data.train-split", "train"]).data()[0] == 1437
