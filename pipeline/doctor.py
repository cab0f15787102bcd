"""Entry: `python -m pipeline.doctor [--storage URL] [--tracking.uri URI] [--data.shards URL] ...`.

Looks at the environment in which a run would start and says what to fix. Exit codes: 0 nothing
fails, 1 something does.
"""

import dataclasses
import json as json_format
import os
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro
from rich.table import Table
from rich.text import Text

from data_shards.command_line.parsing import parse_words
from data_shards.untrusted.terminal import PlainConsole
from pipeline.planner.environment_checks import Finding, all_checks, bounded

_COLOURS = {"OK": "green", "WARN": "yellow", "FAIL": "bold red"}


def examine(
    storage: str = "runs",
    mlflow: Annotated[str, tyro.conf.arg(name="tracking.uri")] = "",
    shards: Annotated[str, tyro.conf.arg(name="data.shards")] = "",
    address: Annotated[str, tyro.conf.arg(name="cluster.address")] = "",
    json: bool = False,
    timeout_s: float = 60.0,
) -> int:
    """Check this environment.

    Args:
        storage: URL of runs and data; a local folder that does not exist is not made.
        mlflow: MLflow store, as for training.
        shards: URL of a shard set.
        address: Ray cluster, HOST:PORT or http://HOST:8265. Default: RAY_ADDRESS.
        json: print JSON.
        timeout_s: seconds after which a check has failed.

    Returns:
        1 if a check failed.
    """
    checks = all_checks(
        storage=storage,
        mlflow_uri=mlflow,
        shards_url=shards,
        address=address or os.environ.get("RAY_ADDRESS", ""),
        timeout_s=timeout_s,
    )
    found = {name: bounded(check, timeout_s) for name, check in checks}
    console = PlainConsole()
    if json:
        rows = [{"check": name, **dataclasses.asdict(row)} for name, row in found.items()]
        console.print(json_format.dumps(rows, indent=1), soft_wrap=True)
    else:
        console.print(_table(found))
    return int(any(row.status == "FAIL" for row in found.values()))


def _table(found: dict[str, Finding]) -> Table:
    table = Table("check", "", "value", "what to do")
    for name, row in found.items():
        table.add_row(name, Text(row.status, _COLOURS[row.status]), row.value, row.advice)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the entry; returns the exit code."""
    return parse_words(examine, arguments, prog="python -m pipeline.doctor")


if __name__ == "__main__":
    sys.exit(main())
