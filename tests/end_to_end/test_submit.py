"""Ray jobs on a real cluster: what the README says, exit codes, stops, parallel submissions."""

import json
import re
import time

import pytest
from mlflow import MlflowClient

from tests.end_to_end.ray_cluster import MAKE, ROOT, cluster
from tests.strangers import answers, drive, listening, machine_addresses, off_loopback, post_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

SHORT = "--train.epochs 1 --train.warmup-epochs 0.2 --model.width 24 --model.depth 1"


def example():
    """The lines of the README that start a cluster, prepare the shell and submit a run."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (start,) = [line for block in blocks for line in block.splitlines() if line.startswith(MAKE)]
    (submit,) = [block for block in blocks if "ray job submit" in block]
    export, command = submit.splitlines()
    return start.partition("#")[0].strip(), export, command


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def head(home):
    """The cluster that the README starts."""
    with cluster(home, example()[0]) as running:
        yield running


def tracked(home):
    """The training runs in the store that the jobs share."""
    client = MlflowClient(f"sqlite:///{home}/certified-pretrain/mlflow.db")
    experiment = client.get_experiment_by_name("digits").experiment_id
    runs = client.search_runs([experiment], "tags.stage = 'train'")
    return client, {run.info.run_name: run for run in runs}


def submission(output):
    return re.search(r"Job '(\S+)' submitted", output)[1]


def test_the_example_of_the_readme_runs(head, home):
    _, export, submit = example()
    assert "http://127.0.0.1:8265" in submit
    submit = submit.replace("http://127.0.0.1:8265", head.address)
    code, output = head.run(f"{export}; {submit} {SHORT} --name example")
    assert code == 0, output
    assert "36/255" in output
    # Ray warns of leaving .git out of what it uploads.
    lines = [line for line in output.splitlines() if "working_dir.py" not in line]
    for noise in ("Warning", "WARNING", "Traceback"):
        assert not [line for line in lines if noise in line]
    job = submission(output)
    assert head.jobs()[job].driver_exit_code == 0
    _, runs = tracked(home)
    run = runs["example"]
    assert run.info.status == "FINISHED"
    assert run.data.tags["ray_job"] == job
    assert run.data.tags["code"].startswith("uploaded-")
    folder = home / "certified-pretrain/example"
    (summary,) = folder.glob("artifacts/*/evaluation/test/summary.json")
    assert json.loads(summary.read_text())["samples"] == 360


def test_no_stranger_reaches_what_make_cluster_starts(head, home, tmp_path):
    token = home / ".ray/auth_token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.parent.stat().st_mode & 0o777 == 0o700
    sockets = listening(head.nodes[0].pid)
    assert off_loopback(sockets) == set()
    ports = {port for _, _, port in sockets}
    gcs, dashboard = (int(address.rpartition(":")[2]) for address in (head.gcs, head.address))
    assert {gcs, dashboard} < ports
    marker = tmp_path / "code-of-a-stranger-ran"
    found = {(h, port): post_job(h, port, marker) for h in machine_addresses() for port in ports}
    served = {place: statuses for place, statuses in found.items() if statuses != {None}}
    assert served["127.0.0.1", dashboard] == {401}
    assert {host for host, _ in served} == {"127.0.0.1"}
    assert list(served.values()).count({401}) >= 2  # the dashboard and the job agent
    for host in machine_addresses():
        if host == "127.0.0.1" or answers(host, gcs):
            assert not drive(host, gcs, marker), host
    assert not marker.exists()


@pytest.mark.slow
def test_exit_codes_and_metadata_of_jobs(head, home):
    command = 'ray job submit --working-dir . --metadata-json \'{"user": "ada"}\''
    bad = f"{command} -- python -m pipeline.pretrain digits --train.global-batch 65"
    code, output = head.run(bad)
    assert code == 1
    assert "global_batch=65" in output
    assert head.jobs()[submission(output)].driver_exit_code == 2


@pytest.mark.slow
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
