import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_shards.storage.store import Store
from jobs.evaluate_cra import evaluate
from jobs.evaluation.executor import TaskLostError, map_shards
from pipeline.run.ray_session import ray_session
from tests.strangers import (
    answers,
    drive,
    listening,
    machine_addresses,
    off_loopback,
    post_job,
    process_tree,
)

AGENT_PORT = 52365

pytestmark = pytest.mark.ray


def files(fields):
    store = Store(fields["out"])
    summary = json.loads(store.read("summary.json"))
    del summary["out_url"]
    return summary, store.read("samples.parquet")


@pytest.fixture
def dies_first():
    """A task function that kills its worker at the first call for an item."""

    def run(item):  # local, so that Ray sends it by value: workers cannot import tests
        folder, number = item
        marker = Path(folder, str(number))
        if not marker.exists():
            marker.touch()
            os._exit(1)
        return number

    return run


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_the_result_is_the_same_for_every_number_of_tasks(fields, local_ray, tmp_path):
    evaluate(fields)
    expected = files(fields)
    for tasks in (2,):
        changes = {"launcher": "ray", "max_in_flight": tasks, "out": str(tmp_path / str(tasks))}
        evaluate(fields | changes)
        assert files(fields | changes) == expected
    assert local_ray.is_initialized()


def test_errors_of_tasks_keep_their_type(fields, local_ray, artifact, tmp_path):
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("artifact.json", "weights.safetensors"):
        (changed / name).write_bytes(Store(artifact).read(name))
    with (changed / "weights.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"?")
    with pytest.raises(ValueError, match="sha256"):
        evaluate(fields | {"artifact": str(changed), "launcher": "ray"})


def test_results_come_in_order_and_lost_tasks_are_repeated(local_ray, dies_first, tmp_path):
    calls = []
    items = [(str(tmp_path), number) for number in range(3)]
    found = map_shards(dies_first, items, max_in_flight=2, max_retries=1, on_done=calls.append)
    assert found == [0, 1, 2]
    assert sorted(calls) == found


def test_a_task_that_is_lost_too_often_is_an_error(local_ray, dies_first, tmp_path):
    with pytest.raises(TaskLostError, match="task 0 lost its worker 1 times"):
        map_shards(dies_first, [(str(tmp_path), 0)], max_in_flight=2, max_retries=0)


def job_agent(marker):
    """Port of the job agent, which listens a while after the rest of its process.

    Of several Rays of a machine the first one's has the port, and the others' listen nowhere.
    """
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        taken = answers("127.0.0.1", AGENT_PORT)
        own = {(name, port) for name, _, port in listening(os.getpid())}
        for name, port in own:
            if "DashboardAgent" in name and post_job("127.0.0.1", port, marker) == {401}:
                return port
        if taken and AGENT_PORT not in {port for _, port in own}:
            pytest.skip(f"another Ray of this machine has port {AGENT_PORT}")
        time.sleep(0.5)
    raise AssertionError("no job agent of the local Ray asks a stranger for a token")


def test_no_stranger_reaches_a_local_ray_at_any_address(local_ray, tmp_path):
    with ray_session() as again:
        assert again is local_ray
    marker = tmp_path / "code-of-a-stranger-ran"
    agent = job_agent(marker)
    local_ray.get(local_ray.remote(lambda: None).remote())  # a worker listens, too
    sockets = listening(os.getpid())
    kinds = " ".join(name for name, _, _ in sockets)
    for kind in ("gcs_server", "raylet", "DashboardAgent", "RuntimeEnvAgent", "ray::"):
        assert kind in kinds  # else the list below would be empty for a wrong reason
    assert off_loopback(sockets) == set()
    servers = {port for name, _, port in sockets if name == "gcs_server"}  # now and then two
    for host in machine_addresses():
        assert post_job(host, agent, marker) == ({401} if host == "127.0.0.1" else {None}), host
        for gcs in servers:
            if host == "127.0.0.1" or answers(host, gcs):
                assert not drive(host, gcs, marker), (host, gcs)
    assert not marker.exists()


def test_the_token_of_a_local_ray_is_in_one_private_file(local_ray):
    path = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    token = path.read_text()
    assert len(token) == 64
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    for process in process_tree(os.getpid()):
        with contextlib.suppress(psutil.Error):
            assert token not in " ".join(process.cmdline())
            assert token not in " ".join(process.environ().values())
    others = [p for p in path.parent.rglob("*") if p.is_file() and not p.is_symlink() and p != path]
    assert any("gcs_server" in p.name for p in others)  # Ray's logs
    assert [p for p in others if token.encode() in p.read_bytes()] == []


def test_a_local_ray_has_a_token_of_its_own_and_leaves_nothing(local_ray, tmp_path):
    # In a process of its own: this one has the Ray of the other tests.
    code = """
import os, pathlib
from pipeline.run.ray_session import ray_session
before = dict(os.environ)
with ray_session(num_cpus=1) as ray:
    path = pathlib.Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    print(path.read_text())
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert ray.get(ray.remote(lambda: 3).remote()) == 3
assert not path.parent.exists()
for name in ("AUTH_MODE", "AUTH_TOKEN", "AUTH_TOKEN_PATH", "ENABLE_WINDOWS_OR_OSX_CLUSTER"):
    assert os.environ.get(f"RAY_{name}") == before.get(f"RAY_{name}")
"""
    ours = {"RAY_AUTH_TOKEN": "of-another-cluster", "RAY_AUTH_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **ours, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    assert not (tmp_path / ".ray").exists()  # where `ray.init` would keep a token for good


def test_an_error_kills_no_worker(local_ray, tmp_path):
    """It may have gone on to another task by then, which would be charged with the loss."""
    begun, go_on, ended = (tmp_path / name for name in ("begun", "go on", "ended"))

    def run(number):
        mine, theirs = (begun, go_on) if number else (tmp_path, begun)
        mine.touch()
        while not theirs.exists():
            time.sleep(0.01)
        if not number:
            raise ValueError("deliberate failure")
        ended.touch()

    with pytest.raises(ValueError, match="deliberate failure"):
        map_shards(run, range(2), max_in_flight=2)
    time.sleep(0.5)  # for a kill to arrive
    go_on.touch()
    wait_for(ended.exists)
