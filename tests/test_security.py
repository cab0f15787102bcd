"""Versions with known vulnerabilities, and secrets in what a run leaves behind."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from pipeline.config import RunConfig
from pipeline.errors import PipelineError
from pipeline.presets.registry import run_preset
from pipeline.pretrain import parse
from tests.harness import run_command
from tests.mlflow_database import empty_database
from tests.pipeline.small_runs import small_shards

ROOT = Path(__file__).resolve().parents[1]
FIXED = {
    # Package: (first version without it, what it is)
    "torch": ("2.11.0", "CVE-2025-32434, CVE-2026-24747, CVE-2026-4538: code from files"),
    "ray": ("2.56.0", "CVE-2025-62593, CVE-2026-27482, CVE-2026-57516: dashboard, unpickling"),
    "mlflow": ("3.11.0", "CVE-2026-2614, CVE-2026-2651, CVE-2026-4137: files of the server"),
    "deepspeed": ("0.15.1", "CVE-2024-43497: unpickling"),
    "pillow": ("12.3.0", "CVE-2026-25990, CVE-2026-59199: writes out of bounds"),
    "pyarrow": ("14.0.1", "CVE-2023-47248: unpickling"),
    "jinja2": ("3.1.6", "CVE-2025-27516: leaves the sandbox"),
    "scikit-learn": ("1.5.0", "CVE-2024-5206: keeps training data"),
    # Needed by these:
    "aiohttp": ("3.13.3", "CVE-2025-69223: exhausts memory"),
    "h11": ("0.16.0", "CVE-2025-43859: request smuggling"),
    "gunicorn": ("23.0.0", "CVE-2024-6827: request smuggling"),
    "requests": ("2.32.4", "CVE-2024-47081: sends credentials elsewhere"),
    "starlette": ("0.49.1", "CVE-2025-62727: exhausts the processor"),
    "urllib3": ("2.6.3", "CVE-2026-21441: exhausts memory"),
}
FAKE = {
    "AWS_ACCESS_KEY_ID": "AKIAFAKEFAKEFAKEFAKE",
    "AWS_SECRET_ACCESS_KEY": "fake/aws+secret/0123456789",
    "AWS_SESSION_TOKEN": "fake-session-token-4711",
    "MLFLOW_TRACKING_USERNAME": "fake-user-ada-0815",
    "MLFLOW_TRACKING_PASSWORD": "fake-mlflow-password-42",
    "MLFLOW_TRACKING_TOKEN": "fake-mlflow-token-43",
    "RAY_AUTH_TOKEN": "fake-ray-token-44",
    "HF_TOKEN": "hf_fakefakefake45",
    "FSSPEC_S3": '{"key": "fake-fsspec-key-46", "secret": "fake-fsspec-secret-47"}',
}
SECRETS = [
    *(value for name, value in FAKE.items() if name != "FSSPEC_S3"),
    "fake-fsspec-key-46",
    "fake-fsspec-secret-47",
]


def requirements():
    text = (
        (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("\n]")[0]
    )
    return {r.name: r for r in map(Requirement, re.findall(r'^\s*"(.+)",', text, re.MULTILINE))}


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    found = (line.partition("==") for line in lines if line and not line.startswith("#"))
    return {name.lower(): Version(version) for name, _, version in found}


@pytest.mark.parametrize("package", FIXED)
def test_no_version_with_a_known_vulnerability_is_admitted(package):
    fixed = Version(FIXED[package][0])
    assert pins()[package] >= fixed
    declared = requirements().get(package)
    if declared is not None:
        lowest = min(Version(s.version) for s in declared.specifier if s.operator in (">=", "=="))
        assert lowest >= fixed, FIXED[package][1]


def pretrain(folder, *options):
    """One short run as a person would start it, with fake secrets all around it."""
    words = ["digits", "--cluster.launcher", "local", "--storage", str(folder / "runs")]
    small = ["--model.width", "24", "--model.depth", "1", "--train.epochs", "0.2",
             "--train.global-batch", "24", "--name", "run"]  # fmt: skip
    return run_command("pipeline.pretrain", *words, *small, *options, **FAKE)


def leaks(folder, done):
    """Fake secrets in the output of a run or in any file that it left, and where."""
    texts = {"output": (done.stdout + done.stderr).encode()}
    texts |= {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [(s, place) for s in SECRETS for place, text in texts.items() if s.encode() in text]


@pytest.mark.integration
def test_a_run_leaves_no_secret_in_any_file(tmp_path):
    url = small_shards(tmp_path / "shards")
    (tmp_path / "runs").mkdir()
    empty_database(tmp_path / "runs", "digits")
    done = pretrain(tmp_path, "--data.shards", url)
    assert done.returncode == 0, done.stderr
    written = {path.suffix for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    assert {".json", ".jsonl", ".db", ".safetensors", ".parquet"} <= written
    assert leaks(tmp_path, done) == []


@pytest.mark.integration
def test_a_run_that_crashes_leaves_no_secret_in_its_traceback(tmp_path):
    url = small_shards(tmp_path / "shards")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/mlflow.db").write_text("no database")
    done = pretrain(tmp_path, "--data.shards", url, "--train.grad-clip", "nan")
    assert done.returncode != 0
    assert done.stderr or done.stdout
    assert leaks(tmp_path, done) == []


@pytest.mark.parametrize("option", ["--storage", "--tracking.uri", "--data.shards"])
def test_credentials_in_a_url_are_refused_and_not_repeated(option, capsys):
    with pytest.raises(SystemExit) as refused:
        parse(["digits", option, f"https://ada:{FAKE['RAY_AUTH_TOKEN']}@host.invalid/x"])
    assert refused.value.code == 2
    said = "".join(capsys.readouterr())
    assert "holds credentials" in said
    assert FAKE["RAY_AUTH_TOKEN"] not in said


def test_a_configuration_read_from_a_file_is_no_way_around():
    text = run_preset("digits").to_json().replace('"storage": ""', '"storage": "s3://a:b@c/d"')
    with pytest.raises(PipelineError, match="holds credentials"):
        RunConfig.from_json(text)
