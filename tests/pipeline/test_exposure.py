"""What listens beyond the loopback device without asking who is there is refused."""

import contextlib
import http.server
import threading

import pytest

from jobs import schedule
from jobs.scheduling.launchers import RayJobs
from pipeline import pretrain
from pipeline.run import exposure
from pipeline.run.exposure import TRUST, ExposureError, is_loopback, own_addresses, require_closed

PATHS = ("/api/jobs/", "/api/2.0/mlflow/experiments/search?max_results=1")
OUTSIDE = own_addresses()[:1]
needs_network = pytest.mark.skipif(not OUTSIDE, reason="this machine has the loopback device alone")


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(self.server.status if self.path in PATHS else 404)
        self.end_headers()

    def log_message(self, *arguments):
        pass


@contextlib.contextmanager
def server(host, status=200):
    """An HTTP server that answers the probes with `status`; yields its port."""
    with http.server.ThreadingHTTPServer((host, 0), Handler) as listening:
        listening.status = status
        thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
        thread.start()
        yield listening.server_address[1]
        listening.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv(TRUST, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def test_loopback_is_told_from_everything_else():
    assert is_loopback("localhost")
    assert is_loopback("127.0.0.9")
    assert is_loopback("::1")
    assert not is_loopback("192.0.2.7")
    assert not is_loopback("no-such-host.invalid")


def test_servers_on_loopback_alone_pass():
    with server("127.0.0.1") as port:
        require_closed(ray=f"http://127.0.0.1:{port}", mlflow=f"http://localhost:{port}")
    require_closed(ray="", mlflow="sqlite:////somewhere/mlflow.db")


@needs_network
@pytest.mark.parametrize("kind", ["ray", "mlflow"])
@pytest.mark.parametrize("named", ["127.0.0.1", *OUTSIDE])
def test_an_open_server_on_all_devices_is_refused_whatever_its_name(kind, named):
    with server("0.0.0.0") as port, pytest.raises(ExposureError) as refused:
        require_closed(**{kind: f"http://{named}:{port}"})
    assert f"http://{OUTSIDE[0]}:{port}" in str(refused.value)
    assert {"ray": "RAY_AUTH_MODE=token", "mlflow": "basic-auth"}[kind] in str(refused.value)


@needs_network
@pytest.mark.parametrize("status", [401, 403])
def test_a_server_that_asks_for_credentials_passes(status):
    with server("0.0.0.0", status) as port:
        url = f"http://{OUTSIDE[0]}:{port}"
        require_closed(ray=url, mlflow=url)


@needs_network
def test_trust_is_said_in_the_environment(monkeypatch):
    monkeypatch.setenv(TRUST, "1")
    with server("0.0.0.0") as port:
        require_closed(ray=f"http://{OUTSIDE[0]}:{port}", mlflow=f"http://{OUTSIDE[0]}:{port}")


@pytest.mark.parametrize(
    "address", ["192.0.2.7:6379", "ray://192.0.2.7:10001", "[2001:db8::1]:6379"]
)
def test_a_cluster_on_the_network_needs_a_token(address, monkeypatch):
    with pytest.raises(ExposureError, match="RAY_AUTH_MODE=token"):
        require_closed(ray=address)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    require_closed(ray=address)


def test_what_ray_makes_of_a_loopback_address_is_this_machine(monkeypatch):
    monkeypatch.setattr(exposure, "own_addresses", lambda: ["192.0.2.7"])
    with server("127.0.0.1") as port:
        monkeypatch.setattr(exposure, "_DASHBOARD_PORT", port)
        require_closed(ray="192.0.2.7:6379")


@needs_network
@pytest.mark.parametrize("address", ["auto", "127.0.0.1:6379"])
def test_the_dashboard_of_a_cluster_on_this_machine_is_found(address, monkeypatch):
    with server("0.0.0.0") as port:
        monkeypatch.setattr(exposure, "_DASHBOARD_PORT", port)
        with pytest.raises(ExposureError, match="--dashboard-host"):
            require_closed(ray=address)
    with server("127.0.0.1") as port:
        monkeypatch.setattr(exposure, "_DASHBOARD_PORT", port)
        require_closed(ray=address)


@needs_network
def test_training_is_refused_before_anything_is_made(tmp_path, capsys):
    with server("0.0.0.0") as port:
        url = f"http://{OUTSIDE[0]}:{port}"
        storage = tmp_path / "runs"
        code = pretrain.main(["digits", "--storage", str(storage), "--mlflow", url])
    assert code == 2
    assert "lets anybody change runs and registered models" in capsys.readouterr().out
    assert not storage.exists()


def test_training_on_an_open_cluster_is_refused(tmp_path, capsys):
    arguments = ["digits", "--storage", str(tmp_path / "runs")]
    assert pretrain.main([*arguments, "--cluster.address", "192.0.2.7:6379"]) == 2
    assert "192.0.2.7:6379" in capsys.readouterr().out


@needs_network
def test_jobs_and_their_scheduler_are_refused(tmp_path, capsys):
    with server("0.0.0.0") as port:
        url = f"http://{OUTSIDE[0]}:{port}"
        with pytest.raises(ExposureError):
            RayJobs(url, {})
        claims = str(tmp_path / "claims")
        options = ["--once", "--tracking.uri", url, "--claims", claims]
        assert schedule.main([*options, "--tracking.experiment", "digits"]) == 2
    assert "lets anybody change runs" in capsys.readouterr().out
