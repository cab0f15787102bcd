"""One fp32 and one bf16 training of the digits preset through Ray, shared by all tests here."""

import contextlib
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.strangers import listening

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Finished:
    """A finished command-line run; `sockets` is what its processes listened on, by `listening`."""

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
