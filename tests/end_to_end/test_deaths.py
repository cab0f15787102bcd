"""Deaths of what a run on Ray consists of, also before its first step: at most `max_failures`."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.end_to_end.ray_cluster import ROOT, cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

PATIENCE_S = 600
FLAGS = (
    *("digits", "--name", "run", "--start-or-resume", "--cluster.device", "cpu"),
    *("--train.global-batch", "48", "--train.warmup-epochs", "0", "--checkpoint.no-evaluate"),
    *("--model.width", "24", "--model.depth", "2", "--checkpoint.every-steps", "10"),
)
SERVERS = {"controller": "TrainController", "raylet": "raylet/raylet", "gcs": "gcs_server"}


@contextlib.contextmanager
def submitted(folder, *flags, environment=os.environ):
    """A run of digits, on a Ray of its own unless told; yields the process, which is ended."""
    command = [sys.executable, "-m", "pipeline.pretrain", *FLAGS, "--storage", str(folder), *flags]
    environment = {**environment, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def descendants(process, name):
    """Processes under another one whose command holds a name, the youngest last."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if name in " ".join(child.cmdline()):
                    found.append(child)
    return sorted(found, key=lambda child: child.pid)


def rows(folder, file="run/events.jsonl"):
    path = folder / file
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def failures(folder):
    return [row for row in rows(folder) if row["event"] == "GroupFailed"]


def steps(folder):
    values = rows(folder, "run/tracking/spool.jsonl")
    return [row["step"] for row in values if "train/loss" in row.get("values", {})]


def wait_for(condition, process, folder):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, (folder / "log").read_text()
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)


def status(folder):
    """Of the one run in the MLflow store."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    return run.info.status


@pytest.mark.parametrize("after_s", [0.0, 4.0, 9.0, 15.0])
def test_ranks_that_die_while_they_start_are_charged(tmp_path, after_s):
    """SIGKILL of every rank that appears: `max_failures` restarts, one clear line, and no more."""
    killed, seen = 0, set()
    flags = ("--cluster.max-failures", "1", "--train.epochs", "500")  # a fast one trains by then
    with submitted(tmp_path, *flags) as process:
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            for worker in descendants(process, "RayTrainWorker"):
                if worker.pid not in seen and time.time() - worker.create_time() >= after_s:
                    seen.add(worker.pid)
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.kill()
                        killed += 1
            time.sleep(0.05)
    said = (tmp_path / "log").read_text()
    assert process.returncode == 1, said
    assert [row["restarts_left"] for row in failures(tmp_path)] == [0, -1], said
    assert "no restart is left of cluster.max_failures=1" in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert killed >= 2
    assert status(tmp_path) == "FAILED"


def test_a_rank_that_dies_in_the_start_once_costs_one_restart(tmp_path):
    flags = ("--cluster.max-failures", "1", "--train.stop-after", "5")
    with submitted(tmp_path, *flags) as process:
        wait_for(lambda: descendants(process, "RayTrainWorker"), process, tmp_path)
        descendants(process, "RayTrainWorker")[0].kill()
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    assert [row["restarts_left"] for row in failures(tmp_path)] == [0]
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_the_controller_is_replaced(tmp_path):
    flags = ("--cluster.max-failures", "1", "--train.stop-after", "45")
    with submitted(tmp_path, *flags) as process:
        wait_for(lambda: max(steps(tmp_path), default=0) >= 12, process, tmp_path)
        descendants(process, SERVERS["controller"])[0].kill()
        assert process.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    (failure,) = failures(tmp_path)
    assert "the controller of Ray Train" in failure["error"]
    assert set(steps(tmp_path)) == set(range(1, 46))
    assert status(tmp_path) == "FINISHED"


@pytest.mark.parametrize("server", ["controller", "raylet", "gcs"])
def test_a_server_of_ray_dies(tmp_path, server):
    """One clear line, the MLflow run is marked, and the run can be resumed."""
    with submitted(tmp_path, "--train.epochs", "500") as process:
        wait_for(lambda: max(steps(tmp_path), default=0) >= 12, process, tmp_path)
        descendants(process, SERVERS[server])[0].kill()
        assert process.wait(PATIENCE_S) == 1, (tmp_path / "log").read_text()
    said = (tmp_path / "log").read_text()
    assert "failed: the " in said
    assert "--resume" in said
    assert "Traceback" not in said
    assert "state-dump" not in said
    assert status(tmp_path) == "FAILED"
    assert not list((tmp_path / "run").glob("ray-*"))


@pytest.mark.parametrize("sign", ["preparing", "gcs_server", "TrainController", "RayTrainWorker"])
def test_sigterm_during_the_start(tmp_path, sign):
    """At every moment after the imports: status 143, as the documents say."""
    with submitted(tmp_path) as process:
        shards = tmp_path / "data/digits/index.json"
        seen = {"preparing": shards.exists}.get(sign, lambda: descendants(process, sign))
        wait_for(seen, process, tmp_path)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    assert "interrupted" not in (tmp_path / "log").read_text()


def test_nothing_stays_of_a_killed_driver(tmp_path):
    """No folder after the next execution; on a cluster that others use no process either."""
    with cluster(tmp_path, "ray start --head --num-cpus 4") as ray:
        flags = ("--cluster.address", ray.gcs)
        with submitted(tmp_path, *flags, environment=ray.environment) as process:
            wait_for(lambda: max(steps(tmp_path), default=0) >= 12, process, tmp_path)
            process.kill()
            process.wait()
        assert list((tmp_path / "run").glob("ray-*"))
        names = ("TrainController", "RayTrainWorker", "PlacementGroupCleaner", "ControlActor")
        deadline = time.monotonic() + PATIENCE_S
        while any(descendants(ray.nodes[0], name) for name in names):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        stop = ("--train.stop-after", str(max(steps(tmp_path)) + 5))
        with submitted(tmp_path, *flags, *stop, environment=ray.environment) as process:
            assert process.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
        assert not list((tmp_path / "run").glob("ray-*"))
        assert not descendants(ray.nodes[0], "PlacementGroupCleaner")
