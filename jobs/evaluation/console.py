"""What a person sees of an evaluation on the terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from jobs.evaluation.progress import EvaluationProgress, OnProgress
from jobs.evaluation.results import AttackScores, EvaluationSummary
from jobs.evaluation.runner import FIGURE, HISTOGRAM, LAYERS
from jobs.evaluation.stored_result import CERTIFICATE
from model.certification.intervals import with_interval

_LINE_EVERY_S = 30.0


@contextlib.contextmanager
def following(console: Console) -> Iterator[OnProgress]:
    """Show the tasks that have ended and their scores so far: a bar, in a log a line at times."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    last = time.monotonic()
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(progress: EvaluationProgress) -> None:
            nonlocal last
            bar.update(
                task, completed=progress.done, total=progress.total, description=str(progress)
            )
            if not console.is_terminal and time.monotonic() - last >= _LINE_EVERY_S:
                console.print(str(progress), soft_wrap=True)
                last = time.monotonic()

        yield show


def report(console: Console, summary: EvaluationSummary) -> None:
    """Print the three columns, the bound, the attack and how to check the certificate."""
    table = Table(
        title=f"certified robust accuracy, {summary.samples} samples of {summary.dataset} "
        "(95 % Wilson intervals)"
    )
    table.add_column(f"eps ({summary.norm})")
    for name, column in summary.columns.items():
        table.add_column(f"cra_{name}\n{column.program}", justify="right")
    if summary.attack:
        table.add_column(f"under attack\n{summary.attack.suite}", justify="right")
    count = summary.samples
    table.add_row(
        "clean", *(with_interval(column.clean, count) for column in summary.columns.values())
    )
    for ratio in summary.columns["sound"].cra:
        cells = [
            "vacuous" if column.vacuous else with_interval(column.cra[ratio], count)
            for column in summary.columns.values()
        ]
        if summary.attack:
            cells.append(with_interval(summary.attack.accuracy[ratio], count))
        table.add_row(ratio, *cells)
    console.print(table)
    sound = summary.columns["sound"]
    console.print(
        f"Lipschitz constant: proved <= {summary.network_bound:.9f}, observed >= "
        f"{summary.observed_lipschitz:.9f}; float64 error of a margin <= "
        f"{sound.largest_error_ball or float('inf'):.1e}\n"
        f"mean certified radius {sound.mean_radius:.4f}; artefact {summary.artifact_digest[:12]}, "
        f"step {summary.step}, largest orthogonality residual {summary.orthogonality_residual:.1e}"
    )
    if summary.attack:
        console.print(_attack_line(summary.attack))
    console.print(f"certificate: {summary.out_url}/{CERTIFICATE}", soft_wrap=True)
    if summary.verifiable:
        console.print(
            f"check it:    python -m model.verify {summary.out_url} --artifact "
            f"{summary.artifact_url} --shards {summary.shards_url}",
            soft_wrap=True,
        )
    figures = [FIGURE, HISTOGRAM] + [LAYERS] * bool(summary.layers)
    console.print(f"figures:     {', '.join(figures)} beside it")


def _attack_line(attack: AttackScores) -> str:
    pixels = "pixels kept in [0, 1]" if attack.clipped else "pixels not clipped"
    return (
        f"attack {attack.suite}: {', '.join(attack.methods)}; {attack.steps} steps, "
        f"{attack.restarts} restarts, {attack.samples} samples, {pixels}; "
        f"{attack.inside_radius_samples} attacked inside their radius, "
        f"{attack.inside_radius_flips} changed class"
    )
