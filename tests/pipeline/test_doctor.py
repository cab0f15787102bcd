"""The doctor names what is wrong: each fault is made, and its row is looked at."""

import contextlib
import functools
import http.server
import json
import os
import socket
import threading
import time
from email.utils import formatdate

import pytest
from packaging.requirements import Requirement

from pipeline import doctor
from pipeline.planner import environment_checks
from pipeline.planner.environment_checks import Finding, all_checks, bounded
from tests.fake_ray import dashboard
from tests.pipeline.small_runs import small_shards

pytestmark = pytest.mark.integration


@contextlib.contextmanager
def server(*, status=200, ahead_s=0.0):
    """An HTTP server on loopback with a clock of its own; yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.end_headers()

        do_HEAD = do_GET  # noqa: N815

        def date_time_string(self, timestamp=None):
            return formatdate(time.time() + ahead_s, usegmt=True)

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{listening.server_address[1]}"
        listening.shutdown()
        thread.join()


@pytest.fixture
def dead_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        yield probe.getsockname()[1]  # bound, and nobody listens


def look(check, *arguments, timeout_s=20.0):
    return bounded(functools.partial(check, *arguments), timeout_s)


def test_a_sound_environment_passes_every_check_that_needs_no_gpu(tmp_path):
    url = small_shards(tmp_path / "shards")
    found = {
        name: bounded(check, 60)
        for name, check in all_checks(
            storage=str(tmp_path), mlflow_uri="", shards_url=url, address="", timeout_s=60
        )
    }
    assert {name for name, row in found.items() if row.status == "FAIL"} == set()
    for name in ("python", "torch", "ray", "mlflow", "all_reduce, gloo", "storage", "shards"):
        assert found[name].status == "OK", name
    assert "training samples" in found["shards"].value
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("doctor-")]


def test_an_old_and_a_missing_package_are_named():
    old = look(environment_checks.package, Requirement("numpy>=99"))
    assert old.status == "FAIL"
    assert old.advice == "pip install 'numpy>=99'"
    missing = look(environment_checks.package, Requirement("no-such-package>=1"))
    assert (missing.status, missing.value) == ("FAIL", "not installed")


def test_an_old_python_is_named(monkeypatch):
    monkeypatch.setattr(environment_checks.platform, "python_version", lambda: "3.8.1")
    assert look(environment_checks.python) == Finding("FAIL", "3.8.1", "use Python <3.13,>=3.10")


def test_a_store_that_cannot_be_written_is_named(tmp_path, dead_port, monkeypatch):
    (tmp_path / "file").write_text("")
    refused = look(
        environment_checks.store, str(tmp_path / "file")
    )  # also for root, whom no mode stops
    assert refused.status == "FAIL"
    assert "NotADirectoryError" in refused.value

    monkeypatch.setattr("data_shards.storage.retry.PATIENCE_S", 0.2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{dead_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    away = look(environment_checks.store, "s3://bucket/runs")
    assert away.status == "FAIL"
    assert "s3://bucket/runs" in away.value


def test_a_folder_without_the_right_to_write_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = look(environment_checks.disk, str(tmp_path / "runs"))
    assert (found.status, found.advice) == ("FAIL", "choose another --storage")
    assert str(tmp_path) in found.value


def test_a_store_that_lets_two_create_the_same_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(environment_checks.Store, "create", lambda self, name, data: True)
    found = look(environment_checks.store, str(tmp_path))
    assert found.status == "FAIL"
    assert "an object can be created twice" in found.value


def test_a_full_disk_and_little_shared_memory_are_named(tmp_path, monkeypatch):
    def usage(path):
        return os.terminal_size if path is None else type("U", (), {"free": 5e8, "total": 6.4e7})()

    monkeypatch.setattr(environment_checks.shutil, "disk_usage", usage)
    full = look(environment_checks.disk, str(tmp_path))
    assert full.status == "FAIL"
    assert full.value.startswith("0.5 GB free")
    small = look(environment_checks.shared_memory, str(tmp_path))
    assert small.status == "WARN"
    assert "--shm-size" in small.advice


def test_few_open_files_are_named(monkeypatch):
    monkeypatch.setattr(environment_checks.resource, "getrlimit", lambda which: (1024, 4096))
    assert look(environment_checks.open_files).status == "WARN"


@pytest.mark.parametrize(("ahead_s", "status"), [(0.0, "OK"), (30.0, "WARN"), (-600.0, "FAIL")])
def test_a_server_whose_clock_is_off_is_named(ahead_s, status):
    with server(ahead_s=ahead_s) as url:
        found = look(environment_checks.server_clock, url)
    assert found.status == status
    assert abs(float(found.value.split()[0]) - ahead_s) < 3


def test_the_clock_of_the_store_is_compared(tmp_path, monkeypatch):
    assert look(environment_checks.store_clock, str(tmp_path)).status == "OK"
    monkeypatch.setattr(environment_checks.Store, "modified", lambda self, name: time.time() + 400)
    found = look(environment_checks.store_clock, str(tmp_path))
    assert (found.status, found.advice) == ("FAIL", "synchronise the clocks (NTP, chrony)")


def test_dead_servers_are_named(dead_port):
    for check, address in (
        (environment_checks.ray, f"127.0.0.1:{dead_port}"),
        (environment_checks.ray, f"http://127.0.0.1:{dead_port}"),
        (environment_checks.mlflow, f"http://127.0.0.1:{dead_port}"),
    ):
        found = look(check, address)
        assert found.status == "FAIL", address


def test_a_cluster_must_want_a_token_that_we_have(monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with server(status=401) as url:
        found = look(environment_checks.ray, url)
    assert (found.status, found.value) == ("FAIL", "asks for a token")
    assert "RAY_AUTH_TOKEN_PATH" in found.advice
    with server() as url:
        found = look(environment_checks.ray, url)
    assert (found.status, found.value) == ("FAIL", "open to strangers")
    with dashboard(token="a-token") as port:
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN", "a-token")
        assert look(environment_checks.ray, f"http://127.0.0.1:{port}").status == "OK"


def test_a_check_that_hangs_fails_in_time():
    go_on = threading.Event()

    def check():
        assert go_on.wait(60)
        return Finding("OK", "")

    found = bounded(check, 0.2)
    go_on.set()  # only now, so nobody has waited for it
    assert found.status == "FAIL"
    assert "no answer within 0.2 s" in found.value


def test_a_broken_collective_is_named(monkeypatch):
    monkeypatch.setattr(environment_checks, "_SUM", "import sys; sys.exit('no route to host')")
    found = look(environment_checks.all_reduce, "gloo", 20.0)
    assert found.status == "FAIL"
    assert found.value == "no route to host"
    monkeypatch.setattr(environment_checks, "_SUM", "import time; time.sleep(60)")
    assert "no sum within 1 s" in look(environment_checks.all_reduce, "gloo", 1.0).value


def test_the_entry_prints_rows_and_its_exit_status_tells(monkeypatch, capsys):
    rows = [("good", lambda: Finding("OK", "fine")), ("bad", lambda: 1 / 0)]
    monkeypatch.setattr(doctor, "all_checks", lambda **options: iter(rows))
    assert doctor.main(["--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found[0] == {"check": "good", "status": "OK", "value": "fine", "advice": ""}
    assert found[1]["status"] == "FAIL"
    assert "ZeroDivisionError" in found[1]["value"]
    rows.pop()
    assert doctor.main([]) == 0
    assert "good" in capsys.readouterr().out
