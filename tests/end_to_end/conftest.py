"""Trainings of the digits preset through Ray, shared by all tests here.

`submitted_run` is short: a job on the cluster that the README starts. `digits_run` and `bf16_run`
are whole, each with a Ray of its own.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from tests.end_to_end.ray_cluster import MAKE, ROOT, cluster
from tests.strangers import listening


@dataclass(frozen=True)
class Finished:
    """A finished run; `sockets` is what processes of its command listened on, by `listening`."""

    storage: Path
    name: str
    output: str
    sockets: frozenset[tuple[str, str, int]]

    @property
    def folder(self) -> Path:
        return self.storage / self.name

    def summaries(self) -> list[dict]:
        """Summaries of the evaluations, by step."""
        found = sorted(self.folder.glob("artifacts/*/evaluation/test/summary.json"))
        return [json.loads(path.read_text()) for path in found]


def pretrain(storage: Path, name: str, *overrides: str) -> Finished:
    """Run the entry as a person would."""
    command = [sys.executable, "-m", "pipeline.pretrain", "digits", "--storage", str(storage)]
    log = storage / f"{name}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--name", name, *overrides],
            cwd=ROOT,
            # At Ray's 15 the ranks starve beside the other tests.
            env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    sockets = set()
    deadline = time.monotonic() + 1000
    while process.poll() is None:
        assert time.monotonic() < deadline, log.read_text()
        sockets |= listening(process.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(4)
    assert process.returncode == 0, log.read_text()
    return Finished(storage, name, log.read_text(), frozenset(sockets))


@pytest.fixture(scope="session")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="session")
def digits_run(storage) -> Finished:
    return pretrain(storage, "fp32")


@pytest.fixture(scope="session")
def bf16_run(storage) -> Finished:
    return pretrain(storage, "bf16", "--train.precision", "bf16")


def readme_cluster() -> tuple[str, str, str]:
    """The documented lines that start a cluster, prepare the shell and submit a run."""
    pages = (ROOT / "README.md", ROOT / "docs/how-to/ray-cluster.md")
    blocks = [re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL) for page in pages]
    (start,) = [line for block in blocks[1] for line in block.splitlines() if line.startswith(MAKE)]
    # Both pages have the same lines.
    (submit,) = {block for found in blocks for block in found if "ray job submit" in block}
    export, command = submit.splitlines()
    return start.partition("#")[0].strip(), export, command


def submission(output: str) -> str:
    """Ray's name of the job that `ray job submit` says it submitted."""
    return re.search(r"Job '(\S+)' submitted", output)[1]


def training_runs(storage: Path) -> tuple[MlflowClient, list[Run]]:
    """The MLflow store of a storage and the trainings of digits in it."""
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    experiment = client.get_experiment_by_name("digits").experiment_id
    return client, client.search_runs([experiment], "tags.stage = 'train'")


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("home")


# Of the package: it would cost a tenth of the machine as long as other tests run.
@pytest.fixture(scope="package")
def head(home):
    """The cluster that the README starts."""
    with cluster(home, readme_cluster()[0]) as running:
        yield running


@pytest.fixture(scope="package")
def submitted_run(head, home) -> Finished:
    """What the README submits, with fewer epochs."""
    _, export, submit = readme_cluster()
    assert "http://127.0.0.1:8265" in submit
    submit = submit.replace("http://127.0.0.1:8265", head.address)
    code, output = head.run(
        f"{export}; {submit} --train.epochs 9 --checkpoint.every-steps 60 --name example"
    )
    assert code == 0, output
    return Finished(home / "certified-pretrain", "example", output, frozenset())
