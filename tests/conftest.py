"""Environment of every test, set before a library reads it."""

import collections
import contextlib
import gc
import importlib.util
import os
import signal
import sqlite3

# Threads of tests that run beside each other would wait for each other, many times their work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path

import pytest

LONGEST = Path(__file__).parent / "end_to_end"
LONG = {"distributed", "integration", "ray"}
SERVERS = {"s3_address"}  # fixtures

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def _seed_torch(seed: int) -> None:
    import torch

    torch.manual_seed(seed % 2**63)


# Tests of a GPU run where pytest and nothing of its kind is installed.
with contextlib.suppress(ImportError):
    import pytest_randomly

    # The same as DeepSpeed's seeder, which pytest-randomly would load: that imports MLflow, and
    # takes longer than all other imports of a test process together.
    pytest_randomly.entrypoint_reseeds = [_seed_torch]


def _do_not_wait_for_the_disk(connection, _record):
    """MLflow commits thousands of times, and no test cuts the power."""
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


def pytest_configure(config):
    """Prepare a process that runs tests; all wait for the one that only starts them."""
    if getattr(config.option, "dist", "no") != "no":
        return
    gc.disable()  # until everything is imported
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.suppress(ImportError):
        from hypothesis import HealthCheck, settings

        # A loaded machine is slow.
        unhurried = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
        settings.register_profile("unhurried", **unhurried)
        settings.load_profile("unhurried")
    with contextlib.suppress(ImportError):
        from sqlalchemy import event
        from sqlalchemy.engine import Engine

        event.listen(Engine, "connect", _do_not_wait_for_the_disk)


def pytest_addoption(parser):
    help_ = "of each parametrised test at most so many cases, others with another seed of the order"
    parser.addoption("--cases", type=int, metavar="N", help=help_)
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "of pytest-timeout, which is not installed")


def pytest_ignore_collect(collection_path, config):
    """Of `-m gpu` the files that have such tests: what others import need not be installed."""
    if config.option.markexpr != "gpu":
        return None
    folder = collection_path.is_dir()
    files = collection_path.rglob("test_*.py") if folder else [collection_path]
    return not any("mark.gpu" in file.read_text() for file in files) or None


def pytest_collection_modifyitems(config, items):
    """Some cases where it is asked; the longest files first, for processes to end together."""
    if config.option.cases is not None:
        keep_cases(config, items, config.option.cases)
    for item in items:
        if SERVERS & set(item.fixturenames):
            item.add_marker("integration")
    long = {item.path for item in items if LONG & {mark.name for mark in item.iter_markers()}}
    items.sort(key=lambda item: (not item.path.is_relative_to(LONGEST), item.path not in long))


def keep_cases(config, items, most):
    """Of each function the first cases, in the order that they run in."""
    seen, kept, left = collections.Counter(), [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        seen[function] += 1
        (kept if seen[function] <= most else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """Modules stay: who collects garbage, as DeepSpeed does at every start, passes them over."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _sigterm_as_before():
    """A command that runs in this process handles SIGTERM its way; after it pytest does again."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
