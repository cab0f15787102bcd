"""Ranks are like processes started for the test, and a rank that fails or hangs fails the test."""

import os
import random
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from zlib import crc32

import fsspec
import numpy as np
import pytest
import torch

from tests.conftest import keep_cases
from tests.harness import PRELOADED, RankError, forking_context, run_command, run_ranks

pytestmark = pytest.mark.distributed


def state_of_a_rank(rank, world_size):
    """What a rank finds before it has done anything."""
    return {
        "pid": os.getpid(),
        "parent": os.getppid(),
        "folder": os.getcwd(),
        "environment": dict(os.environ),
        "modules": set(sys.modules),
        "threads": {thread.name for thread in threading.enumerate()},
        "torch threads": torch.get_num_threads(),
        "drawn": (random.random(), np.random.random(), torch.rand(()).item()),  # noqa: NPY002
    }


def test_ranks_inherit_modules_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setenv("SET_BY_A_TEST", "before the first")
    first = run_ranks(state_of_a_rank, 2)
    monkeypatch.setenv("SET_BY_A_TEST", "before the second")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    torch.manual_seed(0)
    second = run_ranks(state_of_a_rank, 2)
    ranks = first + second
    assert len({rank["pid"] for rank in ranks}) == 4
    for rank in second:
        assert rank["environment"]["SET_BY_A_TEST"] == "before the second"
        assert "RAY_USAGE_STATS_ENABLED" not in rank["environment"]
    for rank in ranks:
        assert rank["threads"] == {"MainThread"}
        assert rank["torch threads"] == 1
        assert rank["folder"] == os.getcwd()
    for numbers in zip(*(rank["drawn"] for rank in ranks), strict=True):
        assert len(set(numbers)) == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="no server beside a GPU")
def test_ranks_are_forked_from_one_server_that_has_imported_the_libraries():
    ranks = [rank for _ in range(2) for rank in run_ranks(state_of_a_rank, 1)]
    assert len({rank["parent"] for rank in ranks}) == 1
    assert ranks[0]["parent"] != os.getpid()
    assert {*PRELOADED, "torch", "deepspeed"} <= ranks[0]["modules"]


def server_threads(answers):
    tasks = Path(f"/proc/{os.getppid()}/task").iterdir()
    answers.send({(task / "comm").read_text().strip() for task in tasks})


@pytest.mark.skipif(torch.cuda.is_available(), reason="no server beside a GPU")
def test_the_server_runs_no_thread_that_a_fork_would_lose():
    context = forking_context()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=server_threads, args=(sender,))
    process.start()
    assert receiver.poll(60)
    # jemalloc starts its own thread again after a fork; all others would be missing in the ranks.
    assert receiver.recv() - {"jemalloc_bg_thd"} == {"python"}
    process.join()


def strings_in_a_set(rank, world_size):
    return list({f"name {i}" for i in range(100)})


def test_fresh_ranks_iterate_in_different_orders():
    first, second = run_ranks(strings_in_a_set, 2, fresh=True)
    assert set(first) == set(second)
    assert first != second


def main(words):
    given = [*words, os.environ["OF_THE_COMMAND"], fsspec.config.conf["file"]["auto_mkdir"]]
    sys.stdout.write(" ".join(given))
    sys.stderr.write("told")
    if words[0] == "raise":
        raise ValueError("deliberate failure")
    if words[0] == "hang":
        time.sleep(1000)
    return int(words[0])


def test_a_command_has_its_words_environment_output_and_code(capfd):
    run = partial(
        run_command, "tests.test_harness", OF_THE_COMMAND="set", FSSPEC_FILE_AUTO_MKDIR="x"
    )
    done = run("3", "4")
    assert (done.returncode, done.stdout) == (3, "3 4 set x")
    assert done.stderr == "told"
    failed = run("raise")
    assert failed.returncode == 1
    assert "ValueError: deliberate failure" in failed.stderr
    with pytest.raises(subprocess.TimeoutExpired):
        run("hang", timeout=0.5)
    assert "OF_THE_COMMAND" not in os.environ
    assert "".join(capfd.readouterr()) == ""


def fail_on_rank_1(rank, world_size):
    if rank == 1:
        raise ValueError("deliberate failure")
    torch.distributed.barrier()


def test_a_traceback_comes_home():
    with pytest.raises(RankError, match="deliberate failure") as caught:
        run_ranks(fail_on_rank_1, 2)
    assert "in fail_on_rank_1" in str(caught.value)


def die_on_rank_1(rank, world_size):
    if rank == 1:
        os._exit(7)
    torch.distributed.barrier()


def test_a_rank_that_dies_is_named():
    with pytest.raises(RankError, match="rank 1:\nthe process died without an answer"):
        run_ranks(die_on_rank_1, 2)


def hang_on_rank_1(rank, world_size, folder):
    Path(folder, str(rank)).write_text(str(os.getpid()))
    torch.distributed.barrier()
    if rank == 0:
        raise ValueError("deliberate failure")
    time.sleep(1000)


def test_a_rank_that_hangs_is_named_and_ended(tmp_path):
    with pytest.raises(RankError, match="deliberate failure") as caught:
        run_ranks(hang_on_rank_1, 2, str(tmp_path))
    assert "no answer from ranks [1]" in str(caught.value)
    for rank in "01":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / rank).read_text()), 0)


def hang(rank, world_size):
    time.sleep(1000)


def test_ranks_have_no_longer_than_the_timeout():
    with pytest.raises(RankError, match=r"no answer from ranks \[0, 1\]"):
        run_ranks(hang, 2, timeout=1.0)


def test_torch_is_seeded_for_every_test(request):
    seed = request.config.getoption("randomly_seed") + crc32(request.node.nodeid.encode())
    assert torch.initial_seed() == seed


def test_some_cases_of_each_test():
    """As `make test-fast` asks: the first in the order that they run in."""
    names = ("a[1]", "b[x]", "a[2]", "c", "b[y]", "a[3]")
    items = [SimpleNamespace(nodeid=f"file.py::{name}") for name in names]
    left = []
    hook = SimpleNamespace(pytest_deselected=lambda items: left.extend(items))
    keep_cases(SimpleNamespace(hook=hook), items, 2)
    assert [item.nodeid for item in items] == [f"file.py::{name}" for name in names[:5]]
    assert [item.nodeid for item in left] == ["file.py::a[3]"]
