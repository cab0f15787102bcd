"""Two schedulers, fifty checkpoints, random kills: fifty evaluations, none twice."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.jobs.mlflow_store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINTS = 50
KILLS = {"jobs.schedule": 6, "jobs.scheduling.claimed_evaluation": 15}


class Schedulers:
    """Two scheduler processes that are started again when they die."""

    def __init__(self, store):
        self.command = [sys.executable, "-m", "jobs.schedule", "--tracking.uri", store.tracking.uri]
        self.command += [
            "--tracking.experiment",
            "set",
            "--rules",
            "certify+fast-attack@checkpoint",
        ]
        self.command += [
            "--entry",
            "tests.jobs.fake_evaluation:main",
            "--cluster.launcher",
            "local",
        ]
        self.command += ["--lease-s", "8", "--poll-s", "1", "--parallel", "2", "--attempts", "99"]
        self.log = (store.folder / "schedulers.log").open("ab")
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(store.folder / "cache")}
        self.processes: list[subprocess.Popen | None] = [None, None]
        self.mark = store.folder.name

    def keep_two(self):
        for i, process in enumerate(self.processes):
            if process is None or process.poll() is not None:
                self.processes[i] = subprocess.Popen(
                    self.command, cwd=ROOT, env=self.environment, stdout=self.log, stderr=self.log
                )

    def victims(self, module):
        """All schedulers or evaluations of this test, orphans included."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if module in words and any(self.mark in word for word in words):
                found.append(process)
        return found

    def end(self):
        for module in KILLS:
            for process in self.victims(module):
                process.kill()
        for process in self.processes:
            if process is not None:
                process.wait()
        self.log.close()


def test_every_checkpoint_is_evaluated_once(tmp_path, shards):
    dice = random.Random(1)
    store = Store(tmp_path, shards)
    folders = [store.fake_checkpoint(step) for step in range(CHECKPOINTS)]
    watch, schedulers = store.watch(), Schedulers(store)
    runs = {c.run_id for c in watch.checkpoints()}
    kills = Counter()
    deadline = time.monotonic() + 1300
    try:
        while len(watch.recorded(runs)) < CHECKPOINTS:
            assert time.monotonic() < deadline, len(watch.recorded(runs))
            schedulers.keep_two()
            time.sleep(dice.uniform(0.5, 3.0))
            # Schedulers at times only: they take seconds to start and are to do something.
            module = (
                "jobs.schedule" if dice.random() < 0.1 else "jobs.scheduling.claimed_evaluation"
            )
            victims = schedulers.victims(module)
            if victims and kills[module] < KILLS[module]:
                dice.choice(victims).send_signal(signal.SIGKILL)
                kills[module] += 1
        time.sleep(5)  # whoever still believes in work may do it now
    finally:
        schedulers.end()
    assert min(kills[module] for module in KILLS) >= 3, kills
    client = watch._client
    records = client.search_runs(
        [client.get_experiment_by_name("set").experiment_id], "tags.stage = 'cra-eval'"
    )
    assert len(records) == CHECKPOINTS
    assert {r.data.tags["train_run_id"] for r in records} == runs
    for folder in folders:
        words = [line.split() for line in (folder / "journal").read_text().splitlines()]
        assert [word for word, *_ in words].count("end") == 1
        never_at_once(words)


def never_at_once(words):
    """An attempt that began and did not end was killed before the next one began."""
    for (word, pid, _), (following, other, _) in itertools.pairwise(words):
        assert (word, following) in {("begin", "begin"), ("begin", "end")}
        assert (pid == other) == (following == "end")
