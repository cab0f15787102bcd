import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from data_shards.format.index import load_index
from jobs.compare import compare, main, write
from jobs.evaluate_cra import evaluate
from jobs.evaluation.sample_records import EvaluationError
from jobs.reporting import comparison_runs
from jobs.reporting.comparison_config import CompareConfig
from jobs.reporting.comparison_report import comparison_png
from jobs.reporting.comparison_runs import RunRequest
from pipeline.run.evaluation_summary import EvaluationSummary
from pipeline.tracking.client import connect

pytestmark = pytest.mark.integration

SETTINGS = {
    "data": {"train_split": "train", "test_split": "test"},
    "loss": {"eps": 0.4, "scale": 10.0, "kind": "emma"},
    "optim": {"lr": 0.01},
    "train": {"epochs": 10.0, "warmup_epochs": 1.0, "global_batch": 4},
}
SPEED = {"quick": 200.0, "slow": 50.0}
"""Images per second of the presets."""


@pytest.fixture(scope="session")
def summary(artifact, shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluation")
    return evaluate({"artifact": artifact, "launcher": "local", "record": False, "out": str(out)})


class Machine:
    """Stands for the processes: leaves the folder that a run of that command line would leave.

    The preset `quick` is best at lr 0.02, `slow` at 0.01; certified accuracy falls off from there.
    """

    def __init__(self, artifact, summary):
        self.artifact, self.summary = artifact, summary
        self.started, self.resumed, self.fail = [], [], None

    def run(self, words, **_):
        assert words[:3] == [sys.executable, "-m", "pipeline.pretrain"]
        preset = words[3]
        given = dict(word[2:].split("=", 1) for word in words[4:] if "=" in word)
        if "--resume" in words:
            self.resumed.append(preset)
            return SimpleNamespace(returncode=0)
        self.started.append((preset, given))
        if preset == self.fail:
            return SimpleNamespace(returncode=1)
        settings = json.loads(json.dumps(SETTINGS))
        for name, value in given.items():
            part, _, key = name.replace("-", "_").partition(".")
            if part in settings:
                settings[part][key] = value if part == "data" else float(value)
        folder = Path(given["storage"], given["name"])
        place = folder / "artifacts" / "step-00000001"
        shutil.copytree(self.artifact, place, dirs_exist_ok=True)
        (folder / "run.json").write_text(json.dumps(settings))
        steps = int(given.get("train.stop-after", 0)) or math.ceil(
            settings["train"]["epochs"] * self.samples(settings) / 4
        )
        (folder / "tracking").mkdir()
        rows = [
            {
                "kind": "metrics",
                "step": i + 1,
                "values": {"train/images_per_s": SPEED[preset]},
                "timestamp_ms": i,
            }
            for i in range(steps)
        ]
        damaged = "\0" * 40  # as a machine that went down leaves it
        lines = [damaged, *map(json.dumps, rows)]
        (folder / "tracking/spool.jsonl").write_text("\n".join(lines) + "\n")
        best = 0.02 if preset == "quick" else 0.01
        score = 0.9 - abs(math.log2(settings["optim"]["lr"] / best)) / 10
        score -= float(given.get("train.seed", 0)) / 100
        sound = dataclasses.replace(
            self.summary.columns["sound"],
            cra=dict.fromkeys(self.summary.columns["sound"].cra, score),
        )
        columns = {**self.summary.columns, "sound": sound}
        evaluation = place / "evaluation" / settings["data"]["test_split"]
        evaluation.mkdir(parents=True)
        whole = dataclasses.replace(self.summary, columns=columns)
        (evaluation / "summary.json").write_bytes(whole.to_json())
        return SimpleNamespace(returncode=0)

    def samples(self, settings):
        return len(load_index(self.summary.shards_url).select(settings["data"]["train_split"]))


@pytest.fixture
def machine(artifact, summary, monkeypatch):
    machine = Machine(artifact, summary)
    monkeypatch.setattr(
        comparison_runs, "subprocess", SimpleNamespace(run=machine.run, STDOUT=0, DEVNULL=0)
    )
    # What the machine claims follows from no certificate.
    monkeypatch.setattr(comparison_runs, "read_result", claimed)
    return machine


def claimed(out):
    return SimpleNamespace(summary=EvaluationSummary.from_json(out.read("summary.json")))


def test_a_claim_without_certificate_and_samples_is_not_compared(machine, tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(
        comparison_runs, "subprocess", SimpleNamespace(run=machine.run, STDOUT=0, DEVNULL=0)
    )
    with pytest.raises(EvaluationError, match="no finished evaluation at"):
        compare(config(tmp_path))


def config(tmp_path, **changes):
    settings = {
        "presets": ("quick", "slow"),
        "amount": 2.0,
        "probe_steps": 4,
        "shards": "set",
        **changes,
    }
    return CompareConfig(**settings, out=str(tmp_path / "compare"))


def test_equal_time_gives_each_preset_the_steps_it_can_take(machine, tmp_path):
    quick, slow = compare(config(tmp_path, seeds=(0, 1)))
    assert [run.steps for run in quick.finals] == [100, 100]  # 2 s at 200 images/s, batch 4
    assert [run.steps for run in slow.finals] == [25, 25]
    assert quick.finals[0].seconds == pytest.approx(2.0)
    assert slow.finals[1].seconds == pytest.approx(2.0)
    # The warm-up keeps its share of the run.
    epochs, warmup = (quick.finals[0].setting(f"train.{x}") for x in ("epochs", "warmup_epochs"))
    assert warmup / epochs == pytest.approx(0.1)
    assert [given["train.seed"] for _, given in machine.started[2:4]] == ["0", "1"]


def test_one_run_alone_makes_the_shards(machine, tmp_path):
    compare(config(tmp_path, shards="", parallel=2))
    assert machine.started[0][0] == "quick"
    assert machine.started[0][1]["train.stop-after"] == "1"
    assert {given["train.stop-after"] for _, given in machine.started[1:3]} == {"4"}


def test_each_preset_has_the_same_trials_and_keeps_what_was_best(machine, tmp_path):
    quick, slow = compare(
        config(tmp_path, trials=4, changes=("optim.lr*2", "optim.lr*2", "loss.eps*0.5"))
    )
    tuning = [given for _, given in machine.started if given.get("data.train-split") == "fit"]
    assert len(tuning) == 7  # slow would repeat its second trial: that run is there already
    assert {given["data.test-split"] for given in tuning} == {"validation"}
    # The same number of steps on the smaller split, so more passes.
    assert float(tuning[0]["train.epochs"]) > quick.finals[0].setting("train.epochs")
    assert quick.trials == pytest.approx((0.8, 0.9, 0.8, 0.9))
    assert quick.changes == {"optim.lr": 0.02, "loss.eps": 0.2}
    assert slow.changes == {"loss.eps": 0.2}
    assert machine.started[-2][1]["optim.lr"] == "0.02"
    assert machine.started[-2][1]["data.train-split"] == "train"


def test_a_comparison_goes_on_where_it_was_stopped(machine, tmp_path):
    machine.fail = "slow"
    with pytest.raises(EvaluationError, match=r"slow \(probe\) ended with exit code 1"):
        compare(config(tmp_path))
    machine.fail = None
    done = len(machine.started)
    compare(config(tmp_path))
    assert [preset for preset, _ in machine.started[done:]] == ["slow", "quick", "slow"]
    done = len(machine.started)
    compare(config(tmp_path))
    assert len(machine.started) == done


def test_a_run_is_resumed_from_its_checkpoint_and_begun_again_without_one(machine, tmp_path):
    compare(config(tmp_path))
    for folder in (tmp_path / "compare/runs").glob("*-final-*"):
        (folder / "done.json").unlink()
        if folder.name.startswith("quick"):
            (folder / "checkpoints/step-00000001/writer-0001").mkdir(parents=True)
            (folder / "checkpoints/step-00000001/writer-0001/commit.json").write_text("{}")
    done = len(machine.started)
    compare(config(tmp_path))
    assert machine.resumed == ["quick"]
    assert [preset for preset, _ in machine.started[done:]] == ["slow"]


def test_a_network_beyond_the_parameter_budget_is_refused(machine, tmp_path):
    with pytest.raises(EvaluationError, match=r"quick has [\d,]+ parameters, the budget allows 10"):
        compare(config(tmp_path, budget="parameters", amount=10))


def test_steps_are_what_was_asked_for(machine, tmp_path):
    systems = compare(config(tmp_path, budget="steps", amount=30))
    assert {run.steps for system in systems for run in system.finals} == {30}


def test_the_page_has_mean_spread_cost_and_order(machine, tmp_path):
    settings = config(tmp_path, seeds=(0, 1))
    systems = compare(settings)
    page = write(settings, systems)
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == ["slow", "quick"]
    assert "| 89.5 ± 0.7 (" in rows[0]  # 90 and 89, and the interval
    assert "2 s of training each" in page
    assert (tmp_path / "compare/compare.md").read_text() in page
    client = connect(settings.store().uri)
    [run] = client.search_runs(
        [client.get_experiment_by_name("compare").experiment_id], "tags.stage = 'compare'"
    )
    assert run.data.metrics["slow/cra_sound/l2/36_255"] == pytest.approx(0.895)
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {
        "compare.md",
        "compare-l2.png",
    }
    assert comparison_png(systems)[1:4] == b"PNG"


def test_names_differ_with_everything_that_changes_a_number(tmp_path):
    settings = config(tmp_path)
    names = {
        RunRequest("quick", "final", {"train.seed": 0}).name(settings),
        RunRequest("quick", "final", {"train.seed": 1}).name(settings),
        RunRequest("quick", "final", {"train.seed": 0}).name(
            dataclasses.replace(settings, workers=2)
        ),
        RunRequest("quick", "trial", {"train.seed": 0}).name(settings),
    }
    assert len(names) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"changes": ("lr=2",)}, "not of the form setting"),
        ({"changes": ("optim.lr*0",)}, "not of the form setting"),
        ({"trials": 3, "changes": ("optim.lr*2",)}, "at most 2 trials"),
        ({"seeds": (1, 1)}, "names one twice"),
    ],
)
def test_bad_settings_are_refused(changes, message, tmp_path):
    with pytest.raises(ValidationError, match=message):
        config(tmp_path, **changes)


def test_a_change_of_what_is_no_number_is_named(machine, tmp_path):
    with pytest.raises(EvaluationError, match=r"quick has no number loss\.kind"):
        compare(config(tmp_path, trials=2, changes=("loss.kind*2",)))


@pytest.mark.slow
def test_two_presets_on_digits(tmp_path, capsys):
    words = "--presets digits digits-sll --budget steps --amount 8 --probe-steps 4 --trials 2"
    out = tmp_path / "compare"
    code = main([*words.split(), "--parallel", "2", "--out", str(out)])
    assert code == 0, capsys.readouterr().err
    page = (out / "compare.md").read_text()
    assert "`digits`" in page
    assert "`digits-sll`" in page
    assert (out / "compare-l2.png").stat().st_size > 10_000
