"""What serves strangers is refused before anything is sent to it."""

import contextlib

import pytest

from jobs import schedule
from jobs.scheduling.launchers import RayJobs
from pipeline import pretrain
from pipeline.run import server_exposure
from pipeline.run.ray_session import cluster_address
from pipeline.run.server_exposure import (
    TRUST,
    ExposureError,
    TokenError,
    is_loopback,
    own_addresses,
    require_closed,
)
from tests import fake_ray

OUTSIDE = own_addresses()[:1]
needs_network = pytest.mark.skipif(not OUTSIDE, reason="this machine has the loopback device alone")
TOKEN = "a-token-of-ours"
COMMANDS = ("export RAY_AUTH_MODE=token", "ray get-auth-token --generate")


def mlflow_server(host, **options):
    """An MLflow server as far as a stranger asks it."""
    return fake_ray.http_door({"/api/2.0/mlflow/experiments/search": {}}, host=host, **options)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.delenv(TRUST, raising=False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.fixture
def node(monkeypatch):
    """Opens the job agent and the client server of a node by their tokens; their ports."""
    with contextlib.ExitStack() as stack:

        def start(*, agent=TOKEN, client=TOKEN):
            port = stack.enter_context(fake_ray.agent(token=agent))
            client_port = stack.enter_context(fake_ray.client_server(token=client))
            monkeypatch.setattr(server_exposure, "_AGENT_PORT", port)
            monkeypatch.setattr(server_exposure, "_CLIENT_PORT", client_port)
            return port, client_port

        yield start


def test_loopback_is_told_from_everything_else():
    assert is_loopback("localhost")
    assert is_loopback("127.0.0.9")
    assert is_loopback("::1")
    assert not is_loopback("192.0.2.7")
    assert not is_loopback("no-such-host.invalid")


DOORS = {
    "http://127.0.0.1:{}": fake_ray.dashboard,
    "127.0.0.1:{}": fake_ray.gcs,
    "ray://127.0.0.1:{}": fake_ray.client_server,
}


@pytest.mark.parametrize("form", DOORS)
def test_a_server_of_a_cluster_that_serves_a_stranger_is_refused_also_on_loopback(form):
    with DOORS[form]() as port, pytest.raises(ExposureError) as refused:
        require_closed(ray=form.format(port))
    assert f"runs the code of whoever reaches {form.format(port).removeprefix('ray://')}" in str(
        refused.value
    )
    for command in COMMANDS:
        assert command in str(refused.value)


@pytest.mark.parametrize("form", DOORS)
def test_trust_is_said_in_the_environment(form, monkeypatch):
    monkeypatch.setenv(TRUST, "1")
    with DOORS[form]() as port:
        require_closed(ray=form.format(port))


@pytest.mark.parametrize("form", DOORS)
def test_a_cluster_that_asks_for_the_token_passes(form):
    with DOORS[form](token=TOKEN) as port:
        require_closed(ray=form.format(port))


@pytest.mark.parametrize("form", list(DOORS)[:2])
def test_a_token_that_is_not_ours_is_said_at_once(form):
    with DOORS[form](token="of-somebody-else") as port, pytest.raises(TokenError) as refused:
        require_closed(ray=form.format(port))
    assert "RAY_AUTH_TOKEN_PATH" in str(refused.value)
    assert TRUST not in str(refused.value)


@pytest.mark.parametrize("open_door", ["agent", "client"])
@pytest.mark.parametrize("asked", ["gcs", "dashboard"])
def test_the_other_servers_of_the_cluster_are_asked_too(asked, open_door, node):
    def cluster(agent_port):
        nodes = [("127.0.0.1", agent_port)] if asked == "gcs" else ["127.0.0.1"]
        return getattr(fake_ray, asked)(token=TOKEN, nodes=nodes)

    prefix = "http://" if asked == "dashboard" else ""
    with cluster(node()[0]) as port:
        require_closed(ray=f"{prefix}127.0.0.1:{port}")
    ports = dict(zip(("agent", "client"), node(**{open_door: ""}), strict=True))
    with cluster(ports["agent"]) as port, pytest.raises(ExposureError) as refused:
        require_closed(ray=f"{prefix}127.0.0.1:{port}")
    assert f"127.0.0.1:{ports[open_door]}:" in str(refused.value)


def test_a_server_that_serves_a_stranger_never_sees_the_token(monkeypatch):
    seen = []
    get = server_exposure._get

    def spied(*arguments):
        seen.append(arguments)
        return get(*arguments)

    monkeypatch.setattr(server_exposure, "_get", spied)
    with fake_ray.dashboard() as port, pytest.raises(ExposureError):
        require_closed(ray=f"http://127.0.0.1:{port}")
    assert [arguments[1:] for arguments in seen] == [()]


def nodes_of_dashboard(hosts):
    return fake_ray.dashboard(token=TOKEN, nodes=hosts)


def nodes_of_gcs(hosts):
    return fake_ray.gcs(token=TOKEN, nodes=[(host, 1) for host in hosts])


@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}"])
def test_an_answer_without_an_end_is_read_to_the_limit_and_refused(form, monkeypatch):
    """Nodes that nobody could ask are not taken for closed."""
    monkeypatch.setenv("CERTIFIED_PRETRAIN_LIMIT_JSON_BYTES", "20000")
    make = nodes_of_dashboard if form.startswith("http") else nodes_of_gcs
    with make(["192.0.2.7"] * 2000) as port, pytest.raises(ExposureError) as refused:
        require_closed(ray=form.format(port))
    assert "names its nodes in more than 20,000 bytes" in str(refused.value)
    assert "LIMIT_JSON_BYTES" in str(refused.value)


def test_of_an_answer_of_a_stranger_no_more_than_the_limit_is_read(monkeypatch):
    monkeypatch.setenv("CERTIFIED_PRETRAIN_LIMIT_JSON_BYTES", "1000")
    with fake_ray.http_door({"/x": "0" * (8 << 20)}) as port:
        status, body = server_exposure._get(f"http://127.0.0.1:{port}/x")
    assert (status, len(body)) == (200, 1001)


@pytest.mark.parametrize(
    "host", [5, None, "", "evil/latest/meta-data#", "x@evil", ["a"], "h" * 300]
)
def test_a_node_that_a_server_names_is_a_host_or_is_not_asked(host, monkeypatch):
    asked = []
    monkeypatch.setattr(server_exposure, "_open_on", asked.append)
    with nodes_of_dashboard([host]) as port:
        require_closed(ray=f"http://127.0.0.1:{port}")
    if isinstance(host, str):
        with nodes_of_gcs([host]) as port:
            require_closed(ray=f"127.0.0.1:{port}")
    assert asked == []


def test_an_answer_that_is_none_of_a_gcs_names_no_node():
    with fake_ray.grpc_door(fake_ray.GCS, token=TOKEN, answer=b"\xff" * 40) as port:
        require_closed(ray=f"127.0.0.1:{port}")


def test_who_speaks_something_else_serves_no_stranger(monkeypatch):
    monkeypatch.setattr(server_exposure, "_ANSWER_S", 1.0)
    with fake_ray.http_door({}) as port:
        require_closed(ray=f"127.0.0.1:{port}")
    with fake_ray.grpc_door("/other.Service/Method") as port:
        require_closed(ray=f"127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["head", "head:", "head:ray", "ray://head"])
def test_an_address_without_a_port_is_refused(address):
    with pytest.raises(ExposureError, match="HOST:PORT"):
        require_closed(ray=address)


def test_the_address_of_a_cluster(monkeypatch):
    assert cluster_address() == cluster_address("local") == ""
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster_address() == "head:6379"
    assert cluster_address("other:6379") == "other:6379"
    assert cluster_address("local") == ""
    with pytest.raises(ConnectionError, match="ray job submit"):
        cluster_address("http://head:8265")
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: None)
    with pytest.raises(ConnectionError, match="no Ray cluster was started"):
        cluster_address("auto")
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda folder: "h:1")
    assert cluster_address("auto") == "h:1"


# -- MLflow --------------------------------------------------------------------------------------


def test_an_mlflow_server_on_loopback_alone_passes():
    with mlflow_server("127.0.0.1") as port:
        require_closed(mlflow=f"http://localhost:{port}")
    require_closed(ray="", mlflow="sqlite:////somewhere/mlflow.db")


@needs_network
@pytest.mark.parametrize("named", ["127.0.0.1", *OUTSIDE])
def test_an_open_mlflow_server_on_all_devices_is_refused_whatever_its_name(named):
    with mlflow_server("0.0.0.0") as port, pytest.raises(ExposureError) as refused:
        require_closed(mlflow=f"http://{named}:{port}")
    assert f"http://{OUTSIDE[0]}:{port}" in str(refused.value)
    assert "basic-auth" in str(refused.value)


@needs_network
def test_an_mlflow_server_that_asks_for_credentials_passes(monkeypatch):
    with mlflow_server("0.0.0.0", token="x") as port:
        require_closed(mlflow=f"http://{OUTSIDE[0]}:{port}")
    monkeypatch.setenv(TRUST, "1")
    with mlflow_server("0.0.0.0") as port:
        require_closed(mlflow=f"http://{OUTSIDE[0]}:{port}")


# -- who asks ------------------------------------------------------------------------------------


@needs_network
def test_training_is_refused_before_anything_is_made(tmp_path, capsys):
    with mlflow_server("0.0.0.0") as port:
        url = f"http://{OUTSIDE[0]}:{port}"
        storage = tmp_path / "runs"
        code = pretrain.main(["digits", "--storage", str(storage), "--tracking.uri", url])
    assert code == 2
    assert "lets anybody change runs and registered models" in capsys.readouterr().out
    assert not storage.exists()


def test_training_on_an_open_cluster_is_refused(tmp_path, capsys):
    storage = tmp_path / "runs"
    with fake_ray.gcs() as port:
        options = ["--storage", str(storage), "--cluster.address", f"127.0.0.1:{port}"]
        assert pretrain.main(["digits", *options]) == 2
    assert f"runs the code of whoever reaches 127.0.0.1:{port}" in capsys.readouterr().out
    assert not storage.exists()


@needs_network
def test_jobs_and_their_scheduler_are_refused(tmp_path, capsys):
    with fake_ray.dashboard() as port, pytest.raises(ExposureError):
        RayJobs(f"http://127.0.0.1:{port}", {})
    with mlflow_server("0.0.0.0") as port:
        claims = str(tmp_path / "claims")
        options = ["--once", "--tracking.uri", f"http://{OUTSIDE[0]}:{port}", "--claims", claims]
        assert schedule.main([*options, "--tracking.experiment", "digits"]) == 2
    assert "lets anybody change runs" in capsys.readouterr().out
