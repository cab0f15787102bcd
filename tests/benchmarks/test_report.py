import json
import re

import pytest

from benchmarks.report import commit, hardware, history, markdown, write_result


def test_a_result_is_kept_with_where_and_when(tmp_path, capsys):
    path = write_result(
        "step",
        [{"what": "a|b", "ratio": 1.23456}, {"what": "c", "peer": "not run"}],
        ["one thread"],
        folder=tmp_path,
    )
    stored = json.loads(path.read_text())
    assert stored["rows"][0] == {"what": "a|b", "ratio": 1.23456}
    assert stored["commit"] == commit()
    assert stored["hardware"] == hardware()
    assert commit() in path.name
    text = (tmp_path / "step.md").read_text()
    assert text == markdown(stored)
    assert "| what | ratio | peer |\n| --- | --- | --- |\n| a\\|b | 1.235 |  |" in text
    assert "- one thread" in text
    assert text in capsys.readouterr().out


def test_history_is_in_order_of_time(tmp_path):
    for name in ("20260102T000000Z-b", "20260101T000000Z-a"):
        file = tmp_path / "step" / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"commit": name[-1]}))
    assert [result["commit"] for result in history("step", folder=tmp_path)] == ["a", "b"]
    assert history("unknown", folder=tmp_path) == []


def test_a_table_without_rows_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'step' has no rows"):
        write_result("step", [], folder=tmp_path)


def test_the_commit_is_that_of_the_checkout():
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?", commit())
