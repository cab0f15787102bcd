"""Several jobs of one name at the same time: one trains, one is refused, one waits."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.end_to_end.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

SETTINGS = (
    *("--name", "run", "--start-or-resume", "--cluster.launcher", "local"),
    *("--train.epochs", "500", "--train.warmup-epochs", "0.2", "--checkpoint.every-steps", "20"),
    *("--checkpoint.no-evaluate", "--train.global-batch", "64", "--train.log-every", "1"),
)


def submit(storage, *flags):
    command = [sys.executable, "-m", "pipeline.pretrain", "digits", "--storage", str(storage)]
    return subprocess.Popen(
        [*command, *SETTINGS, *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def steps_of(storage):
    """Steps of which the loss was recorded, in order."""
    spool = storage / "run/tracking/spool.jsonl"
    if not spool.exists():
        return []
    rows = [json.loads(line) for line in spool.read_text().splitlines() if line.endswith("}")]
    return [row["step"] for row in rows if "train/loss" in row.get("values", {})]


def wait_for_step(storage, process, step):
    deadline = time.monotonic() + 600
    while max(steps_of(storage), default=0) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)


def stop(process):
    """SIGTERM; what it had printed. It keeps a checkpoint first."""
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, output
    return output


def test_one_trains_one_is_refused_and_one_waits(tmp_path):
    first = submit(tmp_path)
    wait_for_step(tmp_path, first, 1)
    held = f"is written by process {first.pid} on "
    second, third = submit(tmp_path), submit(tmp_path, "--wait-for-lease")
    refusal, _ = second.communicate(timeout=300)
    assert second.returncode == 2, refusal
    assert held in refusal
    assert held in third.stdout.readline()
    stop(first)
    done = steps_of(tmp_path)[-1]
    wait_for_step(tmp_path, third, done + 1)
    assert f"resumed: after step {done}" in stop(third)
    steps = steps_of(tmp_path)
    assert steps == list(range(1, steps[-1] + 1))
    leases = sorted(path.name for path in (tmp_path / "run/lease").glob("*.claim"))
    assert leases == ["run.0001.claim", "run.0002.claim"]
