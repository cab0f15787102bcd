"""A rank whose process is stopped for good: found, named, ended, and the run goes on."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import pipeline.launch.ray_launcher
from pipeline.launch.event_queue import EventSender
from pipeline.pretrain import main
from tests.end_to_end.conftest import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

RUN = (
    *("--train.epochs", "10", "--train.warmup-epochs", "0.2", "--checkpoint.every-steps", "20"),
    *("--checkpoint.no-evaluate", "--train.global-batch", "64", "--name", "run"),
)


def ranks_of(process):
    """Processes of the ranks, by their age: actors of Ray, or children of torchrun."""
    words = [(p, " ".join(p.cmdline())) for p in psutil.Process(process.pid).children(True)]
    found = [p for p, line in words if "RayTrainWorker" in line]
    found = found or [p for p, line in words if "-m pipeline.pretrain" in line]
    return sorted(found, key=lambda p: p.create_time())


def stop_one_after(folder, process):
    """SIGSTOP for the youngest rank once a checkpoint is committed."""
    deadline = time.monotonic() + 600
    while not list(folder.glob("checkpoints/*/*/commit.json")):
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    victim = ranks_of(process)[-1]
    victim.send_signal(signal.SIGSTOP)
    return victim


class StopsAtTheEnd(EventSender):
    """Once, the last rank is stopped when it has nothing left to do but to return."""

    def wait(self):
        super().wait()
        stopped = Path(os.environ["STOPPED"])
        if os.environ["RANK"] == "1" and not stopped.exists():
            stopped.touch()
            os.kill(os.getpid(), signal.SIGSTOP)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_rank_that_is_stopped_after_its_last_step(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("STOPPED", str(tmp_path / "stopped"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the ranks
    monkeypatch.setattr(pipeline.launch.ray_launcher, "EventSender", StopsAtTheEnd)
    flags = ["--train.epochs", "1", *RUN[2:], "--cluster.hang-timeout-s", "10"]
    assert main(["digits", "--storage", str(tmp_path), *flags, "--cluster.max-failures", "1"]) == 0
    assert (tmp_path / "stopped").exists()
    assert "resumed: after step 18" in capsys.readouterr().out


@pytest.mark.parametrize("launcher", ["ray", "torchrun"])
def test_a_stopped_rank(tmp_path, launcher):
    flags = ["digits", "--storage", str(tmp_path), *RUN, "--cluster.hang-timeout-s", "10"]
    if launcher == "ray":
        start = [sys.executable, "-m"]
        flags += ["--cluster.max-failures", "1"]
    else:
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
        flags += ["--cluster.launcher", "local"]
    process = subprocess.Popen(
        [*start, "pipeline.pretrain", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        victim = stop_one_after(tmp_path / "run", process)
        output, _ = process.communicate(timeout=900)
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    assert not victim.is_running()
    assert list((tmp_path / "run/hangs").glob("step-*-rank-*.txt"))
    if launcher == "ray":
        assert process.returncode == 0, output
        assert "does not answer" in output
        assert "resumed: after step" in output
    else:
        assert process.returncode != 0
        assert "does not answer" in output
        with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
            assert database.execute("SELECT status FROM runs").fetchall() == [("FAILED",)]
