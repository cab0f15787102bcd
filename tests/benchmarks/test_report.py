import json
import re
import subprocess
from datetime import datetime, timezone

import pytest
import torch

from benchmarks import report

GPU = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def test_a_result_is_kept_with_where_and_when(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "commit", lambda: "abc1234-dirty")
    monkeypatch.setattr(report, "hardware", lambda: "two cores")
    path = report.write_result(
        "step",
        [{"what": "a|b", "ratio": 1.23456}, {"what": "c", "peer": "not run"}],
        ["one thread"],
        folder=tmp_path,
    )
    stored = json.loads(path.read_text())
    date = stored.pop("date")
    assert abs(datetime.now(timezone.utc) - datetime.fromisoformat(date)).days == 0
    assert stored == {
        "name": "step",
        "commit": "abc1234-dirty",
        "hardware": "two cores",
        "rows": [{"what": "a|b", "ratio": 1.23456}, {"what": "c", "peer": "not run"}],
        "notes": ["one thread"],
    }
    assert path.parent == tmp_path / "step"
    assert re.fullmatch(r"\d{8}T\d{6}Z-abc1234-dirty\.json", path.name)
    text = (tmp_path / "step.md").read_text()
    assert text == (
        f"# step\n\n{date}, commit abc1234-dirty; two cores.\n\n"
        "| what | ratio | peer |\n| --- | --- | --- |\n"
        "| a\\|b | 1.235 |  |\n| c |  | not run |\n\n- one thread\n"
    )
    assert text in capsys.readouterr().out


def test_the_hardware_is_that_of_this_process():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert f", 3 thread(s), {GPU}, torch {torch.__version__}" in report.hardware()
    finally:
        torch.set_num_threads(threads)


def test_history_is_in_order_of_time(tmp_path):
    for name in ("20260102T000000Z-b", "20260101T000000Z-a"):
        file = tmp_path / "step" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"commit": name[-1]}))
    assert [result["commit"] for result in report.history("step", folder=tmp_path)] == ["a", "b"]
    assert report.history("unknown", folder=tmp_path) == []


def test_a_table_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'step' has no rows"):
        report.write_result("step", [], folder=tmp_path)


def test_the_commit_says_whether_code_was_changed(tmp_path, monkeypatch):
    def git(*words):
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    code, results = tmp_path / "step.py", tmp_path / "step.md"
    code.write_text("")
    results.write_text("")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(report, "__file__", str(tmp_path / "benchmarks" / "report.py"))
    first = git("rev-parse", "--short", "HEAD")
    results.write_text("other figures")
    assert report.commit() == first
    code.write_text("other code")
    assert report.commit() == f"{first}-dirty"
    git("commit", "-am", "second")
    assert report.commit() == git("rev-parse", "--short", "HEAD") != first
