"""Ray jobs on a real cluster: exit codes, stops, parallel submissions."""

import json
import time

import pytest

from tests.end_to_end.conftest import submission, training_runs

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(900)]

SHORT = (
    "--train.epochs 1 --train.global-batch 64 --train.warmup-epochs 0.2 --model.width 24 "
    "--model.depth 1"
)


def tracked(home):
    """The training runs in the store that the jobs share."""
    client, runs = training_runs(home / "certified-pretrain")
    return client, {run.info.run_name: run for run in runs}


def test_exit_codes_and_metadata_of_jobs(head, home):
    command = 'ray job submit --working-dir . --metadata-json \'{"user": "ada"}\''
    bad = f"{command} -- python -m pipeline.pretrain digits --train.global-batch 65"
    code, output = head.run(bad)
    assert code == 1
    assert "global_batch=65" in output
    assert head.jobs()[submission(output)].driver_exit_code == 2


def test_two_submissions_at_once_then_stop_and_resubmit(head, home):
    long = "python -m pipeline.pretrain digits --checkpoint.every-steps 5"
    base = 'ray job submit --working-dir . --no-wait --metadata-json \'{"user": "ada"}\' -- '
    stopped = f"{base}{long} --train.epochs 500 --start-or-resume --name stopped"
    jobs = [submission(head.run(stopped)[1])]
    jobs += [submission(head.run(f"{base}{long} {SHORT} --name beside")[1])]
    run = home / "certified-pretrain/stopped"
    wait_for(lambda: list(run.glob("checkpoints/*/*/commit.json")))
    code, output = head.run(f"ray job stop {jobs[0]}")
    assert code == 0, output
    assert head.jobs()[jobs[0]].status == "STOPPED"
    client, runs = tracked(home)
    assert runs["stopped"].info.status == "KILLED"
    assert runs["stopped"].data.tags["mlflow.user"] == "ada"
    kept = sorted(path.parent for path in run.glob("checkpoints/*/*/commit.json"))
    wait_for(lambda: head.jobs()[jobs[1]].status.is_terminal())
    assert head.jobs()[jobs[1]].status == "SUCCEEDED"

    step = json.loads((kept[-1] / "commit.json").read_text())["step"]
    more = f"--train.stop-after {step + 5}"
    code, output = head.run(f"{stopped.replace('--no-wait ', '')} {more}")
    assert code == 0, output
    assert f"resumed: after step {step}" in output
    run = client.get_run(runs["stopped"].info.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["ray_job"] == submission(output)


def wait_for(condition, seconds=400):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1)
