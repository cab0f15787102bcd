"""Two nodes with a rank each: one is lost, training shrinks and goes on; it returns, it grows."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.end_to_end.ray_cluster import ROOT, cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]

INTERVAL = 50
FLAGS = (
    # A small rate: what rounding does to the weights stays below 1e-5, what other samples would
    # do to the loss of a step does not.
    *("digits", "--optim.lr", "1e-5", "--model.depth", "1", "--model.width", "32"),
    *("--train.epochs", "2000", "--train.warmup-epochs", "0", "--checkpoint.no-evaluate"),
    *("--checkpoint.every-steps", str(INTERVAL)),
)
PATIENCE_S = 1200


def start(folder, log, *flags, environment):
    command = [sys.executable, "-m", "pipeline.pretrain", *FLAGS, "--storage", str(folder), *flags]
    with log.open("wb") as stream:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=stream, stderr=stream)


def records(folder):
    """Steps and losses in the order in which they were recorded."""
    path = folder / "tracking/spool.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    bodies = [json.loads(line) for line in lines if line.startswith('{"kind": "metrics"')]
    return [(b["step"], b["values"]["train/loss"]) for b in bodies if "train/loss" in b["values"]]


def wait_for(condition, process, log):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def kill_node(node):
    for process in [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]:
        process.kill()


@pytest.fixture
def head(tmp_path):
    with cluster(tmp_path, "ray start --head --num-cpus 1") as running:
        join(running)
        running.wait_for_nodes(2)
        yield running


def join(running):
    running.start(f"env -u RAY_ADDRESS ray start --address {running.gcs}", "--num-cpus", "1")


def test_training_shrinks_and_grows_with_the_cluster(head, tmp_path):
    log = tmp_path / "elastic.log"
    environment = {**head.environment, "RAY_ADDRESS": head.gcs}
    flags = ("--name", "elastic", "--cluster.min-workers", "1", "--cluster.max-failures", "2")
    process = start(tmp_path, log, *flags, environment=environment)
    folder = tmp_path / "elastic"
    try:
        sizes = []
        for change in (None, lambda: kill_node(head.nodes[1]), lambda: join(head)):
            if change is not None:
                change()
            sizes = [2, 1, 2][: len(sizes) + 1]
            expected = "".join(f"ranks: {size} on cpu, " for size in sizes)

            def reached(expected=expected):
                lines = [line for line in log.read_text().splitlines() if line.startswith("ranks:")]
                return "".join(line.split("fp32")[0] for line in lines) == expected

            wait_for(reached, process, log)
            begun = len(records(folder))
            wait_for(lambda begun=begun: len(records(folder)) > begun + INTERVAL, process, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 143, log.read_text()
    finally:
        process.kill()
        process.wait()

    found = records(folder)
    steps = [step for step, _ in found]
    last = steps[-1]
    assert sorted(set(steps)) == list(range(1, last + 1)), "a step is missing"
    (back,) = [i for i in range(1, len(steps)) if steps[i] != steps[i - 1] + 1]
    repeated = steps[back - 1] - steps[back] + 1
    assert 0 < repeated <= INTERVAL + 10, "lost with the node"
    # No second break: growing repeated nothing, the ranks were paused.
    log = tmp_path / "reference.log"
    alone = ("--name", "reference", "--cluster.launcher", "local", "--train.stop-after", str(last))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    reference = start(tmp_path, log, *alone, environment=environment)
    assert reference.wait(PATIENCE_S) == 0, log.read_text()
    losses = dict(records(tmp_path / "reference"))
    assert len(losses) == last
    for step, loss in found:
        assert loss == pytest.approx(losses[step], rel=1e-5), step
