import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError

import jobs.compare as compare_entry
from data_shards.format.shard_index import load_index
from jobs.compare import compare, main, write
from jobs.comparison import runs as comparison_runs
from jobs.comparison.config import CompareConfig
from jobs.comparison.figures import comparison_png
from jobs.comparison.runs import RunRequest, TrainingRunError
from jobs.comparison.trials import search_space
from jobs.errors import EvaluationError
from jobs.evaluate_cra import evaluate
from jobs.evaluation.stored_result import read_result
from model.networks.registry import FAMILIES, parameter_count
from pipeline.presets.registry import PRESETS, run_preset
from pipeline.run.evaluation_summary import EvaluationSummary
from pipeline.tracking.client import connect

pytestmark = pytest.mark.integration

QUICK, SLOW = "digits", "digits-sll"
SPEED = {QUICK: 50.0, SLOW: 20.0}
"""Steps per processor second of the presets."""


@pytest.fixture(scope="session")
def summary(artifact, shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    return evaluate({"artifact": artifact, "launcher": "local", "record": False, "out": str(out)})


class Ended:
    """A process that has ended."""

    def __init__(self, code):
        self.wait = self.poll = lambda: code


class Machine:
    """Stands for the processes: leaves the folder that a run of that command line would leave.

    QUICK is best at lr 0.02, SLOW at 0.01; certified accuracy falls off from there.
    """

    def __init__(self, artifact, summary):
        self.artifact, self.summary = artifact, summary
        self.started, self.resumed, self.fail, self.overrun = [], [], None, 1.0
        self.too_long = math.inf
        self.best_at = {}  # learning rate by radius, where it is not that of the preset

    def run(self, words, **_):
        """Stands for `Popen`; the run has ended when it returns."""
        return Ended(self._train(words))

    def _train(self, words):
        assert words[:3] == [sys.executable, "-m", "pipeline.pretrain"]
        preset = words[3]
        given = dict(word[2:].split("=", 1) for word in words[4:] if "=" in word)
        if "--resume" in words:
            self.resumed.append(preset)
            return 0
        self.started.append((preset, given))
        if preset == self.fail:
            return 1
        settings = json.loads(run_preset(preset).to_json())
        for name, value in given.items():
            part, _, key = name.replace("-", "_").partition(".")
            if isinstance(settings.get(part), dict) and key in settings[part]:
                settings[part][key] = type(settings[part][key])(value)
        folder = Path(given["storage"], given["name"])
        place = folder / "artifacts" / "step-00000001"
        shutil.copytree(self.artifact, place, dirs_exist_ok=True)
        (folder / "run.json").write_text(json.dumps(settings))
        budget = float(given.get("train.processor-seconds", 0))
        slower = 1.1 if settings["optim"]["lr"] > self.too_long else self.overrun
        steps = int(given.get("train.stop-after", 0)) or round(budget * SPEED[preset])
        steps = steps or math.ceil(
            settings["train"]["epochs"] * self.samples(settings) / settings["train"]["global_batch"]
        )
        (folder / "tracking").mkdir()
        rows = [
            {
                "kind": "metrics",
                "step": i + 1,
                "values": {"train/processor_s": slower * (i + 1) / SPEED[preset]},
                "timestamp_ms": i,
            }
            for i in range(steps)
        ]
        damaged = "\0" * 40  # as a machine that went down leaves it
        lines = [damaged, *map(json.dumps, rows)]
        (folder / "tracking/spool.jsonl").write_text("\n".join(lines) + "\n")
        best = 0.02 if preset == QUICK else 0.01
        sound = self.summary.columns["sound"]
        scores = {
            radius: 0.9
            - abs(math.log2(settings["optim"]["lr"] / self.best_at.get(radius, best))) / 10
            - float(given.get("train.seed", 0)) / 100
            for radius in sound.cra
        }
        sound = dataclasses.replace(sound, cra=scores)
        columns = {**self.summary.columns, "sound": sound}
        evaluation = place / "evaluation" / settings["data"]["test_split"]
        evaluation.mkdir(parents=True)
        whole = dataclasses.replace(self.summary, columns=columns)
        (evaluation / "summary.json").write_bytes(whole.to_json())
        return 0

    def samples(self, settings):
        return len(load_index(self.summary.shards_url).select(settings["data"]["train_split"]))


@pytest.fixture
def machine(artifact, summary, monkeypatch):
    machine = Machine(artifact, summary)
    monkeypatch.setattr(
        comparison_runs, "subprocess", SimpleNamespace(Popen=machine.run, STDOUT=0, DEVNULL=0)
    )
    # What the machine claims follows from no certificate.
    monkeypatch.setattr(comparison_runs, "read_result", claimed)
    return machine


def claimed(out):
    """Samples of which the claimed share is certified, the first ones."""
    summary = EvaluationSummary.from_json(out.read("summary.json"))
    cra = max(summary.columns["sound"].cra.values())
    radius = np.where(np.arange(100) < round(100 * cra), 9.0, -1.0)
    return SimpleNamespace(summary=summary, keys=tuple(range(100)), radius=radius)


def test_a_claim_without_certificate_and_samples_is_not_compared(machine, tmp_path, monkeypatch):
    monkeypatch.setattr(comparison_runs, "read_result", read_result)
    with pytest.raises(EvaluationError, match="no finished evaluation at"):
        compare(config(tmp_path))


def config(tmp_path, **changes):
    settings = {"presets": (QUICK, SLOW), "amount": 2.0, "shards": SHARDS, **changes}
    return CompareConfig(**settings, out=str(tmp_path / "compare"))


SHARDS = "set"


@pytest.fixture(autouse=True)
def samples(summary, monkeypatch):
    """Every set is that of the evaluation that stands for all of them."""
    monkeypatch.setattr(compare_entry, "load_index", lambda url: load_index(summary.shards_url))


def test_equal_time_gives_each_preset_the_steps_it_can_take(machine, tmp_path):
    quick, slow = compare(config(tmp_path, seeds=(0, 1)))
    assert [run.steps for run in quick.finals] == [100, 100]
    assert [run.steps for run in slow.finals] == [40, 40]
    assert {run.seconds for system in (quick, slow) for run in system.finals} == {2.0}
    assert [given["train.seed"] for _, given in machine.started] == ["0", "1"] * 2
    # Schedules have the shape of the preset.
    assert not any("train.epochs" in given for _, given in machine.started)


@pytest.mark.parametrize(("overrun", "held"), [(1.029, True), (0.98, True), (1.04, False)])
def test_a_budget_of_time_is_held_within_three_percent(machine, tmp_path, overrun, held):
    machine.overrun = overrun
    with contextlib.nullcontext() if held else pytest.raises(TrainingRunError, match="of a budget"):
        compare(config(tmp_path, presets=(QUICK,)))


def test_trials_are_judged_by_the_radii_that_are_asked_for(machine, tmp_path):
    machine.best_at = {"255/255": 0.005}
    settings = config(tmp_path, presets=(QUICK,), trials=7, trial_amount=1.0, judge_by=("255/255",))
    [system] = compare(settings)
    rates = [float(given["optim.lr"]) for _, given in machine.started[:7]]
    nearest = min(rates, key=lambda rate: abs(math.log2(rate / 0.005)))
    assert system.changes["optim.lr"] == nearest != min(rates, key=lambda rate: abs(rate - 0.02))
    assert "on `validation` at 255/255" in write(settings, [system])
    started = len(machine.started)
    with pytest.raises(EvaluationError, match=f"--judge-by 7/255: {QUICK} is certified at 36/255"):
        compare(config(tmp_path, presets=(QUICK,), trials=2, judge_by=("7/255",)))
    assert len(machine.started) == started


def test_a_trial_whose_step_is_too_long_counts_as_none(machine, tmp_path):
    machine.too_long = 0.02
    settings = config(tmp_path, presets=(QUICK,), trials=6, trial_amount=1.0)
    [system] = compare(settings)
    rates = [float(given["optim.lr"]) for _, given in machine.started[:6]]
    over = [rate > 0.02 for rate in rates]
    assert [math.isnan(score) for score in system.trials] == over
    assert 0 < sum(over) < 6
    assert system.changes["optim.lr"] < 0.02
    assert f"{sum(over)} of `{QUICK}` had steps too long" in write(settings, [system])
    machine.too_long = 0.0
    with pytest.raises(EvaluationError, match="no trial held its budget"):
        compare(dataclasses.replace(settings, trials=2, trial_amount=3.0))


def test_one_run_alone_makes_the_shards(machine, tmp_path):
    compare(config(tmp_path, shards="", parallel=2, budget="steps", amount=5))
    assert machine.started[0][0] == QUICK
    assert machine.started[0][1]["train.stop-after"] == "1"
    assert not any("train.stop-after" in given for _, given in machine.started[1:])


def test_each_preset_has_the_same_trials_and_keeps_what_was_best(machine, tmp_path):
    quick, slow = compare(config(tmp_path, trials=7, trial_amount=1.0))
    tuning = [run for run in machine.started if run[1].get("data.train-split") == "fit"]
    assert len(tuning) == 2 * 7
    assert {given["data.test-split"] for _, given in tuning} == {"validation"}
    assert {given["train.processor-seconds"] for _, given in tuning} == {"1.0"}
    first = dict(tuning[:2])
    assert float(first[QUICK]["optim.lr"]) == run_preset(QUICK).optim.lr  # the preset itself
    assert first[QUICK]["model.pool"] == "flat"
    assert {"optim.lr", "loss.scale", "model.dense_inner", "model.dense_layers"} < set(first[SLOW])
    for system in (quick, slow):
        rates = [float(run[1]["optim.lr"]) for run in tuning if run[0] == system.preset]
        assert len(set(rates)) > 5
        best = rates[int(np.argmax(system.trials))]
        assert system.changes["optim.lr"] == best
        assert float(system.finals[0].settings["optim"]["lr"]) == best
    assert quick.trials[0] < max(quick.trials)  # its rate was not the best
    assert machine.started[-2][1]["data.train-split"] == "train"


def test_a_comparison_goes_on_where_it_was_stopped(machine, tmp_path):
    machine.fail = SLOW
    settings = config(tmp_path, trials=3)
    with pytest.raises(TrainingRunError, match=r"digits-sll \(trial\) ended with exit code 1"):
        compare(settings)
    machine.fail = None
    done = len(machine.started)
    systems = compare(settings)
    assert [preset for preset, _ in machine.started[done:]].count(QUICK) == 3  # 2 trials, 1 final
    done = len(machine.started)
    again = compare(settings)
    assert len(machine.started) == done
    assert [system.changes for system in again] == [system.changes for system in systems]


def test_a_comparison_that_is_told_to_stop_ends_its_runs(tmp_path, monkeypatch):
    started = []

    def popen(words, **_):
        started.append(subprocess.Popen(["sleep", "600"]))
        os.kill(os.getpid(), signal.SIGTERM)
        return started[-1]

    module = SimpleNamespace(Popen=popen, STDOUT=0, DEVNULL=0)
    monkeypatch.setattr(comparison_runs, "subprocess", module)
    with pytest.raises(SystemExit) as stop:
        main(["--presets", QUICK, SLOW, "--data.shards", "set", "--out", str(tmp_path)])
    assert stop.value.code == 128 + signal.SIGTERM
    assert [process.returncode for process in started] == [-signal.SIGTERM]


def test_a_run_is_resumed_from_its_checkpoint_unless_its_budget_is_time(machine, tmp_path):
    for budget, resumed in (("steps", [QUICK]), ("time", [])):
        machine.resumed.clear()
        settings = config(tmp_path / budget, budget=budget, amount=3)
        compare(settings)
        for folder in Path(settings.out, "runs").glob("*-final-*"):
            (folder / "done.json").unlink()
            if not folder.name.startswith(SLOW):
                (folder / "checkpoints/step-00000001/writer-0001").mkdir(parents=True)
                (folder / "checkpoints/step-00000001/writer-0001/commit.json").write_text("{}")
        done = len(machine.started)
        compare(settings)
        assert machine.resumed == resumed
        begun = {preset for preset, _ in machine.started[done:]}
        assert begun == {QUICK, SLOW} - set(resumed)


def test_a_network_beyond_the_parameter_budget_is_refused(machine, tmp_path):
    with pytest.raises(
        EvaluationError, match=r"digits has [\d,]+ parameters, the budget allows 10"
    ):
        compare(config(tmp_path, budget="parameters", amount=10))


def test_trials_stay_within_the_parameter_budget(machine, tmp_path):
    compare(config(tmp_path, budget="parameters", amount=400_000, trials=4))
    for preset, given in machine.started:
        network = run_preset(preset).model
        for name, value in given.items():
            part, _, key = name.partition(".")
            if part == "model":
                network = dataclasses.replace(network, **{key: type(getattr(network, key))(value)})
        assert parameter_count(network) <= 400_000


def test_steps_are_what_was_asked_for(machine, tmp_path):
    systems = compare(config(tmp_path, budget="steps", amount=30))
    assert {run.steps for system in systems for run in system.finals} == {30}
    # The warm-up keeps its share of the run.
    train, preset = systems[0].finals[0].settings["train"], run_preset(QUICK).train
    share = preset.warmup_epochs / preset.epochs
    assert train["warmup_epochs"] / train["epochs"] == pytest.approx(share)


def test_the_page_has_mean_spread_cost_order_and_a_paired_test(machine, tmp_path):
    settings = config(tmp_path, seeds=(0, 1))
    systems = compare(settings)
    page = write(settings, systems)
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    leader, second, titles, difference = (row.split("`")[1] for row in rows)
    assert (leader, second, titles, difference) == (SLOW, QUICK, SLOW, QUICK)
    assert "| 89.5 ± 0.7 (" in rows[0]  # 90 and 89, and the interval
    # Ten samples (at lr 0.01 instead of 0.02 the score of QUICK is 0.1 lower), all of one side.
    assert "| +10.0 (p = 0.00098) |" in rows[3]  # 11 for one side: 2 / 2^11
    assert "2 processor seconds of training each" in page
    assert (tmp_path / "compare/compare.md").read_text() in page
    client = connect(settings.store().uri)
    [run] = client.search_runs(
        [client.get_experiment_by_name("compare").experiment_id], "tags.stage = 'compare'"
    )
    assert run.data.metrics[f"{SLOW}/cra_sound/l2/36_255"] == pytest.approx(0.895)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "compare.md",
        "compare-l2.png",
    }
    assert comparison_png(systems)[1:4] == b"PNG"


def test_settings_of_one_preset_are_compared_under_their_words(machine, tmp_path):
    varied = f"{QUICK} --optim.lr=0.02"
    settings = config(tmp_path, presets=(QUICK, varied))
    systems = compare(settings)
    assert [given.get("optim.lr") for _, given in machine.started] == [None, "0.02"]
    assert [system.preset for system in systems] == [QUICK, varied]
    page = write(settings, systems)
    leaders = [line.split("`")[1] for line in page.splitlines() if line.startswith("| `")]
    assert leaders[:2] == [varied, QUICK]
    client = connect(settings.store().uri)
    [run] = client.search_runs(
        [client.get_experiment_by_name("compare").experiment_id], "tags.stage = 'compare'"
    )
    name = f"{QUICK} --optim.lr 0.02/cra_sound/l2/36_255"
    assert run.data.metrics[name] == pytest.approx(0.9)


def test_words_after_a_preset_are_checked_before_anything_runs(machine, tmp_path):
    with pytest.raises(EvaluationError, match=r"emma.*offset"):
        compare(config(tmp_path, presets=(f"{QUICK} --loss.kind emma --loss.offset 9",)))
    assert not machine.started


def test_names_differ_with_everything_that_changes_a_number(tmp_path):
    settings = config(tmp_path)
    names = {
        RunRequest(QUICK, "final", {"train.seed": 0}).name(settings),
        RunRequest(QUICK, "final", {"train.seed": 1}).name(settings),
        RunRequest(QUICK, "final", {"train.seed": 0}).name(
            dataclasses.replace(settings, budget="steps", workers=2)
        ),
        RunRequest(QUICK, "trial", {"train.seed": 0}).name(settings),
        RunRequest(f"{QUICK} --optim.lr 1", "final", {"train.seed": 0}).name(settings),
        RunRequest(f"{QUICK} --optim.lr -1", "final", {"train.seed": 0}).name(settings),
    }
    assert len(names) == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": (1, 1)}, "names one twice"),
        ({"workers": 2}, "give --budget steps"),
        ({"presets": ("--optim.lr=1",)}, "'--optim.lr=1' does not begin with the name of a preset"),
        ({"presets": ("",)}, "'' does not begin with"),
        ({"budget": "parameters", "trial_amount": 3}, "trial_amount=3 has no effect"),
    ],
)
def test_bad_settings_are_refused(changes, message, tmp_path):
    with pytest.raises(ValidationError, match=message):
        config(tmp_path, **changes)


def test_an_unknown_preset_is_refused_before_anything_runs(machine, tmp_path):
    with pytest.raises(EvaluationError, match=r"unknown preset 'digit'"):
        compare(config(tmp_path, presets=("digit",)))
    assert not machine.started


def test_exit_codes_tell_a_refusal_from_a_failure(machine, tmp_path, monkeypatch, capsys):
    words = ["--out", str(tmp_path), "--data.shards", SHARDS, "--amount", "2", "--presets"]
    assert main([*words, "digit"]) == 2
    assert "error: digit: unknown preset 'digit'" in capsys.readouterr().err
    machine.fail = SLOW
    assert main([*words, QUICK, SLOW]) == 1
    assert "failed: TrainingRunError: digits-sll (final) ended" in capsys.readouterr().err


def test_trials_without_optuna_say_what_to_install(machine, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(EvaluationError, match=r"pip install certified-pretrain\[compare\]"):
        compare(config(tmp_path, trials=1))
    compare(config(tmp_path))  # which needs none


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_has_sizes_to_try(family):
    preset = next(name for name in PRESETS if run_preset(name).model.kind == family)
    space = search_space(run_preset(preset))
    assert {"optim.lr", "loss.scale"} < set(space)
    assert sum(name.startswith("model.") and name != "model.pool" for name in space) == 2


@pytest.mark.slow
def test_two_presets_on_digits(tmp_path, capsys):
    words = "--presets digits digits-sll --amount 3 --trials 2 --trial-amount 1.5"
    out = tmp_path / "compare"
    code = main([*words.split(), "--parallel", "2", "--out", str(out)])
    assert code == 0, capsys.readouterr().err
    page = (out / "compare.md").read_text()
    assert "`digits`" in page
    assert "`digits-sll`" in page
    assert (out / "compare-l2.png").stat().st_size > 10_000
