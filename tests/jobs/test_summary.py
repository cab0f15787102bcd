"""What training and the evaluation job share: one record of an evaluation and one table of it."""

import dataclasses
import io
import re
import shlex
from unittest import mock

from data_shards.untrusted.terminal import PlainConsole
from pipeline.driver.console import RunConsole
from pipeline.driver.session import _show
from pipeline.run.evaluation_summary import report
from tests.jobs.test_plots import summary


def printed(show):
    file = io.StringIO()
    show(PlainConsole(file=file, width=80))
    return file.getvalue()


def rows(text):
    """(step, column) of the table's rows."""
    found = re.findall(r"^ +(\d+) +(cra_\w+|under attack) ", text, re.MULTILINE)
    return [(int(step), column) for step, column in found]


def test_earlier_evaluations_show_what_is_proved_and_the_last_one_everything():
    evaluations = [dataclasses.replace(summary(), step=step) for step in (500, 1000)]
    text = printed(lambda console: report(console, evaluations))
    assert rows(text) == [
        (500, "cra_sound"),
        *((1000, f"cra_{name}") for name in evaluations[-1].columns),
        (1000, "under attack"),
    ]
    assert max(map(len, text.split("Lipschitz constant")[0].splitlines())) <= 80


def test_a_column_that_proves_nothing_says_so():
    text = printed(lambda console: report(console, [summary(vacuous=True)]))
    (line,) = [line for line in text.splitlines() if re.match(r" *\d+ +cra_deployed", line)]
    assert line.count("vacuous") == len(summary().columns["sound"].cra)


def test_training_prints_the_table_of_the_job():
    evaluation = summary()
    prepared, tracker = mock.Mock(), mock.Mock(run=None)
    prepared.job.run_url = "file:///runs/a"
    prepared.job.config.checkpoint.none = False
    prepared.schedule.last_step = prepared.schedule.total_steps = 1000
    by_job = printed(lambda console: report(console, [evaluation]))
    by_training = printed(
        lambda console: _show([evaluation], prepared, tracker, RunConsole(console))
    )
    assert by_training == f"{by_job}artifacts:   /runs/a/artifacts\n"


def test_training_that_was_told_to_stop_says_how_to_go_on():
    prepared = mock.Mock()
    prepared.job.run_url = "file:///runs/a"
    prepared.job.config.checkpoint.none = False
    prepared.schedule.last_step, prepared.schedule.total_steps = 10, 764
    prepared.job.config.name, prepared.job.config.storage = "my run", "s3://b/runs"
    prepared.job.config.continuable = True
    text = printed(lambda console: _show([], prepared, mock.Mock(run=None), RunConsole(console)))
    assert "stopped after step 10 of 764, as --train.stop-after says" in text
    assert "--resume --name 'my run' --storage s3://b/runs\n" in text


def test_training_that_cannot_go_on_does_not_say_how():
    prepared = mock.Mock()
    prepared.job.run_url = "file:///runs/a"
    prepared.job.config.checkpoint.none = False
    prepared.schedule.last_step, prepared.schedule.total_steps = 10, 764
    prepared.job.config.continuable = False
    text = printed(lambda console: _show([], prepared, mock.Mock(run=None), RunConsole(console)))
    assert text == "artifacts:   /runs/a/artifacts\n"


def test_names_from_outside_end_no_run():
    hostile = dataclasses.replace(
        summary(),
        dataset="[/x][bold]<script>",
        out_url="file:///a [/b]/it's",
        shards_url="s3://me:secret@bucket/$(reboot)",
    )
    text = printed(lambda console: report(console, [hostile]))
    assert "[/x][bold]<script>" in text
    (line,) = [line for line in text.splitlines() if line.startswith("check it:")]
    words = shlex.split(line.removeprefix("check it:"))
    assert words[3] == "/a [/b]/it's"
    assert words[-1] == "s3://bucket/$(reboot)"
