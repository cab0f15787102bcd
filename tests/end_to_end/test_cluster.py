"""Two nodes: training as a Ray job, evaluations scheduled beside it, a worker killed meanwhile."""

import contextlib
import json
import subprocess
import sys
import time

import psutil
import pytest

from data_shards.storage.store import Store
from jobs.evaluate_cra import evaluate
from jobs.evaluation.suites import EVALUATION_SUITES
from pipeline.tracking.checkpoint_query import CheckpointQuery
from tests.end_to_end.ray_cluster import ROOT, cluster
from tests.strangers import answers, drive, listening, machine_addresses, post_job

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]

SUITE = "certify+fast-attack"
TRAINING = (
    "python -m pipeline.pretrain digits --name run --train.epochs 1 --train.warmup-epochs 0.2 "
    "--train.global-batch 64 --checkpoint.every-steps 12 --checkpoint.no-evaluate"
)


@pytest.fixture
def two_nodes(tmp_path):
    with cluster(tmp_path, "ray start --head --num-cpus 4") as running:
        address = f"env -u RAY_ADDRESS ray start --address {running.gcs}"
        running.start(address, "--num-cpus", "2", "--labels", "role=evaluation")
        running.wait_for_nodes(2)
        yield running


def scheduler(running, store):
    command = [sys.executable, "-m", "jobs.schedule", "--cluster.address", running.address]
    command += ["--tracking.uri", store, "--tracking.experiment", "digits"]
    command += ["--rules", f"{SUITE}@checkpoint", "--poll-s", "3"]
    command += ["--cluster.placement", "role", "evaluation"]
    log = (running.folder / "schedule.log").open("wb")
    with log:
        return subprocess.Popen(command, cwd=ROOT, env=running.environment, stdout=log, stderr=log)


def evaluation_workers(node):
    """Worker processes of a node that run a task of an evaluation."""
    found = []
    for process in psutil.Process(node.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::run_task"):
                found.append(process)
    return found


def result(folder):
    store = Store(folder)
    summary = json.loads(store.read("summary.json"))
    del summary["out_url"]
    return summary, store.read("samples.parquet")


def test_a_killed_evaluation_worker_changes_nothing(two_nodes, tmp_path):
    home = tmp_path / "certified-pretrain"
    home.mkdir()
    store = f"sqlite:///{home}/mlflow.db"
    process = scheduler(two_nodes, store)
    killed = set()
    try:
        code, output = two_nodes.run(f"ray job submit --working-dir . -- {TRAINING}")
        assert code == 0, output
        watch = CheckpointQuery(store, ("digits",))
        checkpoints = watch.checkpoints()
        assert len(checkpoints) == 2, output
        run_id = checkpoints[0].run_id
        deadline = time.monotonic() + 900
        while len(watch.recorded([run_id])) < 2:
            log = (two_nodes.folder / "schedule.log").read_text()
            assert time.monotonic() < deadline, log
            assert process.poll() is None, log
            for worker in evaluation_workers(two_nodes.nodes[1])[: 2 - len(killed)]:
                worker.kill()
                killed.add(worker.pid)
            time.sleep(0.5)
    finally:
        process.terminate()
        process.wait(60)
    assert len(killed) == 2
    jobs = [job for name, job in two_nodes.jobs().items() if name.startswith("cra-")]
    assert [job.status for job in jobs] == ["SUCCEEDED", "SUCCEEDED"]
    assert {job.metadata["suite"] for job in jobs} == {SUITE}
    no_stranger_reaches(two_nodes, tmp_path / "code-of-a-stranger-ran")
    for checkpoint in checkpoints:
        alone = {
            **EVALUATION_SUITES[SUITE],
            "artifact": checkpoint.artifact_url,
            "split": "validation",  # by which checkpoints of the preset are chosen
            "launcher": "local",
            "record": False,
            "out": str(tmp_path / f"alone-{checkpoint.step}"),
        }
        evaluate(alone)
        folder = f"validation-{SUITE.replace('+', '-')}"
        beside = Store(checkpoint.artifact_url).child("evaluation", folder)
        assert result(beside.url) == result(alone["out"])


def no_stranger_reaches(running, marker):
    """These nodes listen on the network: the token protects them."""
    agents = 0
    for node in running.nodes:
        for name, _, port in listening(node.pid):
            for host in machine_addresses():
                statuses = post_job(host, port, marker)
                agents += "DashboardAgent" in name and statuses == {401}
    assert agents >= len(running.nodes)
    port = int(running.gcs.rpartition(":")[2])
    for host in machine_addresses():
        if answers(host, port):
            assert not drive(host, port, marker), host
    assert not marker.exists()
