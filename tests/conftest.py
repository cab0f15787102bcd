"""Environment of every test, set before a library reads it."""

import os
from pathlib import Path

import torch

LONGEST = Path(__file__).parent / "end_to_end"

if not torch.cuda.is_available():
    # DeepSpeed registers a seeder with pytest-randomly, so the first test of any file imports it.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def pytest_collection_modifyitems(items):
    """The longest files first, so that two processes end at about the same time."""
    items.sort(key=lambda item: not item.path.is_relative_to(LONGEST))
