"""The route of a day on a GPU, with parts that stand in for those that need one."""

import importlib.metadata
import json

import pytest

from benchmarks.gpu_day import PARTS, Day, Part
from model.artifact.release import release
from pipeline.driver.preflight import code_version


def say(text, code=0):
    return ("-c", f"print({text!r}); raise SystemExit({code})")


HANGS = ("-c", "import time; print('begun', flush=True); time.sleep(60)")
STANDING_IN = (
    Part("good", 30, say("large"), say("small, {device}, {out}")),
    Part("bad", 30, say("no module", 3)),
    Part("slow", 1, HANGS),
    Part("last", 30, say("at the end")),
)


@pytest.fixture(scope="module")
def day(tmp_path_factory):
    day = Day(tmp_path_factory.mktemp("day"), "cpu", STANDING_IN)
    day.run(["good", "bad", "slow"], 60)
    return day


def test_every_part_leaves_what_it_said_and_how_it_ended(day):
    found = day.results()
    assert found["good"]["said"].startswith("small, cpu, /")
    assert found["good"]["ended"] == "done"
    assert (found["bad"]["ended"], found["bad"]["said"]) == ("exit 3", "no module\n")
    assert found["slow"]["ended"] == "ended after 1 s"
    assert found["slow"]["said"] == "begun\n"
    assert [row["ended"] for row in day.rows()][-1] == "not run"


def test_the_same_command_goes_on_with_what_has_no_result(tmp_path):
    day = Day(tmp_path, "cpu", STANDING_IN)
    day.run(["bad"], 60)
    before = day.results()["bad"]
    day.run([], 60)
    assert day.results()["last"]["said"] == "at the end\n"
    assert day.results()["bad"] == before


def test_no_part_begins_after_the_time_is_over(tmp_path):
    day = Day(tmp_path, "cpu", STANDING_IN)
    day.run([], 0)
    assert day.results() == {}
    with pytest.raises(ValueError, match="no parts x; known: good, bad"):
        day.run(["x"], 1)


def test_the_day_fits_into_its_time_and_its_results_are_one_file(day, tmp_path):
    assert sum(part.limit_s for part in PARTS) <= 480
    assert len({part.name for part in PARTS}) == len(PARTS)
    folder = day._out
    assert [path.name for path in folder.iterdir()] == ["gpu_day.json"]
    assert json.loads((folder / "gpu_day.json").read_text()) == day.results()


def test_a_checkout_that_is_not_installed_says_so(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert release() == "not installed"
    assert code_version()["package"] == "not installed"
