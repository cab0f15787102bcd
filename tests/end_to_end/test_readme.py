"""The job that the README submits, through every real component to the certificate."""

import json
import subprocess
import sys

import pytest
import torch

from data_shards.format.shard_index import load_index
from data_shards.storage.store import Store
from data_shards.streaming.sample_reader import read_shard
from model.artifact.artifact import read_artifact
from model.attacks import apgd, margins
from model.certify import certify
from model.networks.lipnext.layers import Block
from tests.end_to_end.conftest import ROOT, submission, training_runs
from tests.strangers import answers, drive, listening, machine_addresses, off_loopback, post_job

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]


def test_the_job_is_done(submitted_run, head):
    job = submission(submitted_run.output)
    assert head.jobs()[job].driver_exit_code == 0
    (run,) = training_runs(submitted_run.storage)[1]
    assert run.info.status == "FINISHED"
    assert run.data.tags["ray_job"] == job
    assert run.data.tags["code"].startswith("uploaded-")
    (summary,) = submitted_run.summaries()
    assert summary["samples"] == 360
    # Training has begun, and the proof is free: the constant is 1 + 5e-7.
    sound, nominal = summary["columns"]["sound"], summary["columns"]["nominal"]
    assert sound["clean"] > 0.9
    assert nominal["cra"]["36/255"] - sound["cra"]["36/255"] < 0.0005


def test_a_third_party_can_check_the_certificate(submitted_run):
    """With the command that the run printed."""
    line = next(line for line in submitted_run.output.splitlines() if line.startswith("check it:"))
    command = line.removeprefix("check it:").split()
    assert command[:3] == ["python", "-m", "model.verify"]
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "OK" in done.stdout
    assert "360" in done.stdout


def test_the_person_sees_table_figure_and_mlflow_command(submitted_run):
    output = submitted_run.output
    assert "partitioned matrices: 7 of 7" in output
    for text in ("certified robust accuracy", "36/255", "255/255", "cra_sound", "cra_nominal"):
        assert text in output
    figure = next(line.split()[-1] for line in output.splitlines() if line.startswith("CRA curve:"))
    assert Store(figure.rpartition("/")[0]).read("cra.png").startswith(b"\x89PNG")
    assert "mlflow ui --backend-store-uri" in output
    # Ray warns of leaving .git out of what it uploads.
    lines = [line for line in output.splitlines() if "working_dir.py" not in line]
    for noise in ("Warning", "WARNING", "Traceback"):
        assert not [line for line in lines if noise in line]


def test_store_holds_config_metrics_checkpoints_and_evaluations(submitted_run):
    client, (run,) = training_runs(submitted_run.storage)
    experiment = run.info.experiment_id
    assert run.data.params["optim.lookahead_steps"] != "0"
    assert run.data.params["optim.polar_every"] != "0"
    config = json.loads((submitted_run.folder / "run.json").read_text())
    assert run.data.params["train.epochs"] == str(config["train"]["epochs"])
    losses = client.get_metric_history(run.info.run_id, "train/loss")
    steps = sorted(point.step for point in losses)
    assert steps == list(range(1, steps[-1] + 1))
    models = client.search_logged_models([experiment])
    mine = [m for m in models if m.source_run_id == run.info.run_id]
    digests = {
        json.loads(path.read_text())["digest"]
        for path in submitted_run.folder.glob("artifacts/*/artifact.json")
    }
    assert len(digests) >= 2
    assert {m.tags["artifact_digest"] for m in mine} == digests
    evaluations = client.search_runs(
        [experiment], f"tags.stage = 'cra-eval' and tags.train_run_id = '{run.info.run_id}'"
    )
    assert {r.data.tags["model_id"] for r in evaluations} == {m.model_id for m in mine}
    # Each checkpoint on validation, and one of them on the test split.
    assert len(evaluations) == len(digests) + 1
    metric = "cra_nominal/l2/36_255"
    chosen_by = client.get_metric_history(run.info.run_id, f"validation/{metric}")
    assert len(chosen_by) == len(digests)
    (result,) = client.get_metric_history(run.info.run_id, metric)
    (summary,) = submitted_run.summaries()
    assert (result.step, result.value) == (
        summary["step"],
        summary["columns"]["nominal"]["cra"]["36/255"],
    )
    committed = list(submitted_run.folder.glob("checkpoints/*/*/commit.json"))
    assert len(committed) == len(digests)


def trained(run):
    step = max(path.name for path in run.folder.glob("artifacts/*"))
    artifact = read_artifact(Store(run.folder / "artifacts" / step).open)
    index = load_index(run.storage / "data" / "digits")
    batches = [b for s in index.shards_of("test") for b in read_shard(index, s, 512)]
    images = torch.cat([b.images for b in batches]).double() / 255
    return artifact.network.double(), images, torch.cat([b.labels for b in batches])


# torch.func.jvp itself calls what its next release will not have.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_network_is_1_lipschitz_within_its_residuals(submitted_run, monkeypatch):
    network, images, _ = trained(submitted_run)
    images = images[:40]
    bound = network.lipschitz_upper_bound().value
    assert 1.0 <= bound < 1 + 1e-4
    first = network.tokens(images).flatten(1)
    second = network.tokens(images.flip(0)).flatten(1)
    moved = (first - second).norm(dim=1)
    distance = (images - images.flip(0)).flatten(1).norm(dim=1)
    assert (moved <= distance * bound + 1e-12).all()
    monkeypatch.setattr(Block, "plain", True)  # with the operators that autograd knows
    pixels = torch.eye(images[0].numel(), dtype=images.dtype).view(-1, *images[0].shape)
    point = images[:1].expand_as(pixels).contiguous()
    columns = torch.func.jvp(network.tokens, (point,), (pixels,))[1]
    values = torch.linalg.svdvals(columns.detach().flatten(1))
    # Gradient-norm preserving up to the pool: every singular value is 1 within the residuals.
    assert values.max() <= bound
    assert values.min() >= 2 - bound


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_threads")
def test_no_attack_inside_the_certified_radius_succeeds(submitted_run):
    network, images, labels = trained(submitted_run)
    images, labels = images[:16], labels[:16]
    with torch.no_grad():
        logits, factors = network.logits_and_margin_factors(images)
        certificates = certify(logits, factors, labels, lipschitz=1.0)
    inside = apgd(
        network,
        images,
        certificates.prediction,
        certificates.radius * (1 - 1e-6),
        loss=margins,
        steps=10,
        generator=torch.Generator().manual_seed(0),
    )
    assert (network(inside).argmax(1) == certificates.prediction).all()
    # The attack is not blind: beyond the certified radius it does succeed.
    beyond = apgd(network, images, certificates.prediction, certificates.radius * 2 + 0.1, steps=10)
    assert (network(beyond).argmax(1) != certificates.prediction).float().mean() > 0.3


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
