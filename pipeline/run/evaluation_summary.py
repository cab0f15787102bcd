"""The result of an evaluation, and the table that a person sees of it.

The evaluation fills an `EvaluationSummary` and writes it as `summary.json`; training, which reaches
the evaluation by name only, gets the same record back. Both print it with `report`.
"""

import functools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from pydantic import TypeAdapter, ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import Self

from data_shards.storage.store import Store
from data_shards.untrusted.json_input import parse_object
from data_shards.untrusted.limits import UntrustedError
from model.artifact.artifact import class_name
from model.verifier import supported
from pipeline.run.layout import (
    BOUNDS_FIGURE,
    CERTIFICATE,
    CLOSEST_FIGURE,
    CRA_FIGURE,
    RADIUS_FIGURE,
    SUMMARY,
)
from pipeline.run.relative_urls import moved, roots
from pipeline.run.wilson_interval import wilson


@dataclass(frozen=True)
class ColumnScores:
    """The summary of one column.

    Attributes:
        program: arithmetic that computed the logits.
        lipschitz: Lipschitz constant that was used; 1 in the nominal column.
        unit_roundoff: unit roundoff of the program's activations.
        clean: accuracy.
        certified: number of samples certified at each eps.
        cra: certified robust accuracy by eps ratio.
        mean_radius: average certified radius; a wrong prediction counts as 0.
        vacuous: the error terms leave no radius to any sample that has a positive margin.
        largest_error: largest error of a margin at a sample; None: nothing can be said.
        largest_error_ball: largest error of a margin on a ball; None: nothing can be said.
        curve: (eps, certified robust accuracy) over a grid.
    """

    program: str
    lipschitz: float
    unit_roundoff: float
    clean: float
    certified: dict[str, int]
    cra: dict[str, float]
    mean_radius: float
    vacuous: bool
    largest_error: float | None
    largest_error_ball: float | None
    curve: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class AttackScores:
    """Accuracy under attack; it bounds the true robust accuracy from above.

    Attributes:
        suite: name of the attack suite.
        methods: attacks of the suite, in the order in which they are tried.
        steps: gradient steps of each attack.
        restarts: runs of each attack.
        samples: samples attacked.
        clipped: attacked images stay in [0, 1].
        accuracy: share of samples that no attack broke, by eps ratio.
        inside_radius_samples: samples attacked just inside their certified radius.
        inside_radius_flips: of these, how many changed class; anything but 0 is an error.
    """

    suite: str
    methods: tuple[str, ...]
    steps: int
    restarts: int
    samples: int
    clipped: bool
    accuracy: dict[str, float]
    inside_radius_samples: int
    inside_radius_flips: int


@dataclass(frozen=True)
class LayerRow:
    """Bounds of the norm of one matrix: proved from above, observed from below."""

    name: str
    upper: float
    lower: float


_CONFUSIONS_TOLD = 3
MOST_CONFUSIONS = 200
"""Pairs of classes that a summary lists: all of up to 14 classes."""


@dataclass(frozen=True)
class EvaluationSummary:
    """The result of an evaluation; the same for every number of tasks.

    Attributes:
        columns: scores by column: `nominal` is the float32 program with layers taken as exactly
            orthogonal and no rounding term; `sound` and `deployed` are proved, for the float64
            program and for the one that serves.
        per_class: clean and sound certified accuracy by true class.
        orthogonality_residual: the artifact's largest ``‖XᵀX - I‖``.
        network_bound: proved Lipschitz constant of the features.
        observed_lipschitz: largest constant that a gradient showed: a lower bound.
        layers: bounds of every matrix.
        attack: accuracy under attack, if one was asked for.
        certificate_digest: digest of certificate.json.
        family: kind of the network.
        class_names: one per class; empty: they have none.
        confusions: (label, prediction, samples) of the wrong predictions of the sound column, the
            most frequent first, at most `MOST_CONFUSIONS`.
    """

    norm: str
    eval_key: str
    artifact_url: str
    artifact_digest: str
    shards_url: str
    dataset: str
    index_digest: str
    split: str
    out_url: str
    step: int
    samples: int
    columns: dict[str, ColumnScores]
    per_class: tuple[dict[str, float], ...]
    orthogonality_residual: float
    network_bound: float
    observed_lipschitz: float
    layers: tuple[LayerRow, ...]
    attack: AttackScores | None
    certificate_digest: str
    family: str
    class_names: tuple[str, ...] = ()
    confusions: tuple[tuple[int, int, int], ...] = ()

    def found_at(self, out_url: str) -> Self:
        """The same after the storage was copied or moved: with addresses of where it lies now.

        Args:
            out_url: where this evaluation was found.
        """
        before, now = roots(self.out_url, out_url)
        here = functools.partial(moved, before=before, now=now)
        return replace(
            self,
            artifact_url=here(self.artifact_url),
            shards_url=here(self.shards_url),
            out_url=here(self.out_url),
        )

    def class_name(self, label: int) -> str:
        """Name of a class; its number where the classes have no names."""
        return class_name(self.class_names, label)

    @property
    def verifiable(self) -> bool:
        """Whether `model.verify`, which shares no code with the rest, knows the network."""
        return supported({"kind": self.family})

    def metrics(self) -> dict[str, float]:
        """Return the scalars by metric name, e.g. ``cra_sound/l2/36_255``.

        A vacuous column has none.
        """
        found = {"clean": self.columns["sound"].clean}
        for name, column in self.columns.items():
            if not column.vacuous:
                for ratio, value in column.cra.items():
                    found[f"cra_{name}/{self.norm}/{metric_suffix(ratio)}"] = value
                found[f"mean_radius_{name}"] = column.mean_radius
        for ratio, value in (self.attack.accuracy if self.attack else {}).items():
            found[f"attack/{self.norm}/{metric_suffix(ratio)}"] = value
        return found

    def to_json(self) -> bytes:
        """Return the bytes of ``summary.json``."""
        return json.dumps(asdict(self), indent=2, allow_nan=False).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> "EvaluationSummary":
        """Read the bytes of ``summary.json``.

        Raises:
            UntrustedError: too large, no JSON object, or not the fields of a summary.
        """
        body = json.dumps(parse_object(data, SUMMARY))
        try:
            return TypeAdapter(cls).validate_json(body, strict=True)
        except ValidationError as error:
            problem = error.errors()[0]
            field = ".".join(map(str, problem["loc"]))
            raise UntrustedError(f"{SUMMARY} is damaged: {field}: {problem['msg']}") from error


def metric_suffix(ratio: str) -> str:
    """36/255 -> 36_255: a slash would open a new group of charts."""
    return ratio.replace("/", "_")


def report(console: Console, summaries: Sequence[EvaluationSummary]) -> None:
    """Print a table of evaluations, and of the last one its bounds and how to check it.

    Earlier ones show `cra_sound` alone, the last one every column and the accuracy under attack.

    Args:
        console: where to.
        summaries: at least one, in the order in which they were made; of the splits of one set.
    """
    last = summaries[-1]
    console.print(_table(summaries))
    for line in _lines(last):
        console.print(line, soft_wrap=True)  # no wrapping of what is to be copied


def _table(summaries: Sequence[EvaluationSummary]) -> Table:
    last = summaries[-1]
    title = f"certified robust accuracy, {last.norm}, {last.dataset}"
    table = Table(
        title=Text(title),
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption="below: 95 % Wilson intervals",
    )
    table.add_column("step", justify="right")
    table.add_column("samples")
    ratios = tuple(last.columns["sound"].cra)
    for name in ("clean", *ratios):
        table.add_column(name, justify="right", no_wrap=True)
    for summary in summaries:
        for name in summary.columns if summary is last else ("sound",):
            column = summary.columns[name]
            shares = {"clean": column.clean, **({} if column.vacuous else column.cra)}
            table.add_row(*_cells(summary, name, ratios, shares))
    if last.attack:
        table.add_row(*_cells(last, "attack", ratios, last.attack.accuracy))
    return table


def _cells(
    summary: EvaluationSummary, name: str, ratios: Sequence[str], shares: Mapping[str, float]
) -> Iterator[str]:
    """A row: what was judged, then each share with its interval below it."""
    count = summary.samples
    kind = f"cra_{name}" if name in summary.columns else "under attack"
    yield from (str(summary.step), f"{kind}\n{count} {summary.split}")
    for key in ("clean", *ratios):
        share = shares.get(key)
        if share is None:
            yield "vacuous" if name in summary.columns else "-"
        else:
            low, high = wilson(round(share * count), count)
            yield f"{share:.2%}\n{100 * low:.1f}-{100 * high:.1f}"


def _lines(summary: EvaluationSummary) -> Iterator[str]:
    sound, deployed = summary.columns["sound"], summary.columns["deployed"]
    yield (
        f"Lipschitz constant: proved <= {summary.network_bound:.9f}, observed >= "
        f"{summary.observed_lipschitz:.9f}; {sound.program} error of a margin <= "
        f"{sound.largest_error_ball or float('inf'):.1e}"
    )
    yield (
        f"mean certified radius {sound.mean_radius:.4f}; artifact {summary.artifact_digest[:12]}, "
        f"step {summary.step}, largest orthogonality residual "
        f"{summary.orthogonality_residual:.1e}"
    )
    yield (
        f"cra_deployed proves the {deployed.program} program of a server, whose rounding costs "
        "radius; predictions and the gate go by cra_sound"
    )
    if summary.attack:
        yield _attack_line(summary.attack)
    out = local_path(summary.out_url)
    yield f"CRA curve:   {out}/{CRA_FIGURE}"
    others = [CLOSEST_FIGURE, RADIUS_FIGURE] + [BOUNDS_FIGURE] * bool(summary.layers)
    yield f"figures:     {', '.join(others)} beside it; the first shows the test images"
    yield from _confused(summary)
    yield f"certificate: {out}/{CERTIFICATE}"
    if summary.verifiable:
        artifact, shards = local_path(summary.artifact_url), local_path(summary.shards_url)
        words = (
            "python",
            "-m",
            "model.verify",
            out,
            "--artifact",
            artifact,
            "--data.shards",
            shards,
        )
        yield f"check it:    {shlex.join(words)}"


def _confused(summary: EvaluationSummary) -> Iterator[str]:
    if summary.confusions and summary.class_names:
        pairs = "; ".join(
            f"{summary.class_name(label)} as {summary.class_name(prediction)} {count}x"
            for label, prediction, count in summary.confusions[:_CONFUSIONS_TOLD]
        )
        yield f"taken for:   {pairs}"


def _attack_line(attack: AttackScores) -> str:
    pixels = "pixels kept in [0, 1]" if attack.clipped else "pixels not clipped"
    return (
        f"attack {attack.suite}: {', '.join(attack.methods)}; {attack.steps} steps, "
        f"{attack.restarts} restarts, {attack.samples} samples, {pixels}; "
        f"{attack.inside_radius_samples} attacked inside their radius, "
        f"{attack.inside_radius_flips} changed class"
    )


def local_path(url: str) -> str:
    """A path that a person can open on this machine, else the URL without credentials."""
    store = Store(url)
    return str(store.local_path() or store)
