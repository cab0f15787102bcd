"""Environment of every test, set before a library reads it."""

import os

import torch

if not torch.cuda.is_available():
    # DeepSpeed registers a seeder with pytest-randomly, so the first test of any file imports it.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # loopback only
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
