"""One fp32 and one bf16 training of the digits preset through Ray, shared by all tests here."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finished:
    """A finished command-line run."""

    storage: Path
    name: str
    output: str

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
    done = subprocess.run(
        [*command, "--name", name, *overrides],
        cwd=ROOT,
        # At Ray's 15 the ranks starve beside the other tests.
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stdout
    return Finished(storage, name, done.stdout)


@pytest.fixture(scope="session")
def storage(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="session")
def digits_run(storage) -> Finished:
    return pretrain(storage, "fp32")


@pytest.fixture(scope="session")
def bf16_run(storage) -> Finished:
    return pretrain(storage, "bf16", "--train.precision", "bf16")
