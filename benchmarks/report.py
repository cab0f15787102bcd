"""Results of the benchmarks: one JSON file per run, one Markdown table of the newest, the history.

python -m benchmarks.report [NAME ...]
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")
Row = dict[str, Any]


def write_result(
    name: str,
    rows: Sequence[Row],
    notes: Sequence[str] = (),
    *,
    folder: Path = RESULTS,
) -> Path:
    """Record a run as `NAME/TIME-COMMIT.json` and its table as `NAME.md`, and print the table.

    Args:
        name: The benchmark, for example "optimizer_step".
        rows: The table: JSON values by column; a row may lack columns.
        notes: Sentences under the table: settings, targets, what was not run and why.
        folder: Where results are kept.

    Returns:
        The JSON file.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError(f"benchmark {name!r} has no rows to write")
    result = {"name": name, **here(), "rows": [dict(row) for row in rows], "notes": list(notes)}
    return keep(result, folder=folder)


def here() -> dict[str, str]:
    """When and where something is measured: date, commit and hardware."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "commit": commit(), "hardware": hardware()}


def keep(result: Mapping[str, Any], *, folder: Path = RESULTS) -> Path:
    """Write a result, also one that another machine has measured; returns the JSON file."""
    date, name = datetime.fromisoformat(result["date"]), result["name"]
    path = folder / name / f"{date:%Y%m%dT%H%M%SZ}-{result['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    text = markdown(result)
    (folder / f"{name}.md").write_text(text)
    print(text)
    return path


def history(name: str, *, folder: Path = RESULTS) -> list[dict[str, Any]]:
    """All recorded runs of one benchmark, oldest first."""
    return [json.loads(path.read_text()) for path in sorted((folder / name).glob("*.json"))]


def markdown(result: Mapping[str, Any]) -> str:
    """A result as Markdown: when and where, the table, the notes."""
    columns = list(dict.fromkeys(column for row in result["rows"] for column in row))
    lines = [
        f"# {result['name']}",
        "",
        f"{result['date']}, commit {result['commit']}; {result['hardware']}.",
        "",
        _line(columns),
        _line(["---"] * len(columns)),
        *(_line([_cell(row.get(column)) for column in columns]) for row in result["rows"]),
        "",
        *(f"- {note}" for note in result["notes"]),
    ]
    return "\n".join(lines).rstrip() + "\n"


def commit() -> str:
    """Short hash of the checkout, with `-dirty` when a tracked file was changed.

    Of a copy without its history, what CERTIFIED_PRETRAIN_COMMIT says, else "unknown".
    """
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    # Results and documents do not change what was measured.
    status = ("status", "--porcelain", "--untracked-files=no", "--", "*.py", "pyproject.toml")
    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git(*status) else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CERTIFIED_PRETRAIN_COMMIT", "unknown")


def hardware() -> str:
    """Processor, threads in use, accelerator and torch version, in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = f"{len(models)} cores {models[0].split(':')[1].strip()}" if models else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{cpu}, {torch.get_num_threads()} thread(s), {gpu}, torch {torch.__version__}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")


def main(names: Sequence[str]) -> None:
    """Print every recorded run of the named benchmarks, or of all."""
    for name in names or sorted(path.name for path in RESULTS.iterdir() if path.is_dir()):
        for result in history(name):
            print(markdown(result))


if __name__ == "__main__":
    main(sys.argv[1:])
