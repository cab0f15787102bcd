"""Every preset of the papers: the paper's figures, ours where it was run, `not run` elsewhere.

python -m benchmarks.published                   # writes benchmarks/results/published.md
python -m benchmarks.published --add FOLDER ...  # and takes finished runs into the table before
"""

import argparse
import dataclasses
import hashlib
import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS
from jobs.comparison.runs import Outcome, RunRequest
from model.networks.registry import parameter_count
from pipeline.presets.registry import PRESETS, run_preset
from pipeline.run import layout

PAGE = RESULTS / "published.md"
RUNS = RESULTS / "published"
NOT_RUN = "not run"
NOT_KNOWN = "none read"


@dataclasses.dataclass(frozen=True)
class Published:
    """What a paper or its authors state of a network, in per cent.

    Attributes:
        clean: accuracy.
        certified: certified robust accuracy by radius in pixels of [0, 1].
        source: where it stands.
    """

    clean: float | None
    certified: Mapping[str, float]
    source: str


def _l2(source: str, clean: float, *certified: float) -> Published:
    """Certified at 36, 72, 108 and 255 of 255, as many as are stated."""
    radii = ("36/255", "72/255", "108/255", "255/255")
    return Published(clean, dict(zip(radii, certified, strict=False)), source)


def _linf(source: str, clean: float | None, eps: str, certified: float) -> Published:
    return Published(clean, {eps: certified}, source)


_LIPNEXT = "arXiv 2601.18513, from summaries of it"
_LIRESNET = "run again by the authors of arXiv 2505.15174"
_BRONET = "authors of arXiv 2505.15174, with logit annealing"
_SLL = "arXiv 2303.03169"
_AOL = "arXiv 2208.03160, as compared in arXiv 2303.03169"
_SOC = "arXiv 2211.08453, certified by curvature"
_SORTNET = "arXiv 2210.01787"
_DISTANCE = "README of the repository of arXiv 2102.05363, 5 layers, 400 epochs"

FIGURES: dict[str, Published] = {
    "cifar10-L32W1024": _l2(_LIPNEXT, 81.5, 71.2, 59.2, 45.9),
    "cifar10-L32W2048": _l2(_LIPNEXT, 85.0, 73.2, 58.8, 43.3),
    "tiny-imagenet-L32W2048": _l2(_LIPNEXT, 45.5, 35.0, 25.9, 18.0),
    "imagenet-L32W4096": _l2(_LIPNEXT, 55.9, 40.3),
    "imagenet-2B": _l2(_LIPNEXT, 57.0, 41.2),
    "cifar10-soc-mlp-15": _l2(_SOC, 79.4, 67.0, 52.6, 38.3),
    "cifar10-sll-XL": _l2(f"{_SLL}, after its erratum", 73.3, 64.8),
    "cifar100-sll-S": _l2(_SLL, 44.9, 34.7),
    "cifar100-sll-XL": _l2(_SLL, 46.5, 36.5),
    "tiny-imagenet-sll-S": _l2(_SLL, 26.6, 19.5),
    "tiny-imagenet-sll-XL": _l2(_SLL, 32.1, 23.2),
    "cifar10-cpl-XL": _l2(_SLL, 78.5, 64.4, 48.0, 33.0),
    "cifar10-aol-L": _l2(_AOL, 71.6, 64.0, 56.4, 49.0, 23.7),
    "mnist-sortnet-1_10": _linf(_SORTNET, 99.01, "1/10", 98.14),
    "mnist-sortnet-3_10": _linf(_SORTNET, 98.46, "3/10", 93.40),
    "cifar10-sortnet-2_255": _linf(_SORTNET, 65.96, "2/255", 56.67),
    "cifar10-sortnet-8_255": _linf(_SORTNET, 54.84, "8/255", 40.39),
    "cifar10-sortnet-mlp-2_255": _linf(_SORTNET, 67.72, "2/255", 56.94),
    "cifar10-sortnet-mlp-8_255": _linf(_SORTNET, 54.13, "8/255", 39.99),
    "tiny-imagenet-sortnet-mlp-1_255": _linf(_SORTNET, 24.17, "1/255", 17.92),
    "tiny-imagenet-sortnet-mlp2x-1_255": _linf(_SORTNET, 25.69, "1/255", 18.18),
    "imagenet64-sortnet-mlp-1_255": _linf(_SORTNET, 13.48, "1/255", 9.02),
    "imagenet64-sortnet-mlp2x-1_255": _linf(_SORTNET, 14.79, "1/255", 9.54),
    "cifar10-liresnet": _l2(_LIRESNET, 81.0, 69.8, 56.3, 42.9),
    "cifar100-liresnet": _l2(_LIRESNET, 53.0, 40.2, 28.3, 19.2),
    "tiny-imagenet-liresnet": _l2(_LIRESNET, 40.9, 26.2, 15.7, 8.9),
    "imagenet-liresnet": _l2(_LIRESNET, 47.3, 35.3, 25.1, 16.9),
    "cifar10-bronet": _l2(_BRONET, 81.6, 70.6, 57.2, 42.5),
    "cifar100-bronet": _l2(_BRONET, 54.3, 40.2, 29.1, 20.3),
    "tiny-imagenet-bronet": _l2(_BRONET, 41.2, 29.0, 19.0, 12.1),
    "imagenet-bronet": _l2(_BRONET, 49.3, 37.6, 27.9, 19.6),
    "fashion-mnist-linfdist": _linf(_DISTANCE, None, "1/10", 79.23),
}
"""By preset; figures that could only be recalled and not read again are left out."""


def run_record(folder: Path) -> dict[str, Any]:
    """What the table needs of a finished run.

    Args:
        folder: of the run; its newest artifact has been certified on the test split.

    Raises:
        EvaluationError: it was not, or what lies there contradicts itself.
    """
    run = Outcome(RunRequest(preset="", role="final", values={}), folder)
    sound = run.summary.columns["sound"]
    certificate = run.artifact / layout.evaluation(run.summary.split) / layout.CERTIFICATE
    return {
        "preset": run.setting("preset"),
        "seed": run.setting("train.seed"),
        "commit": run.info.context["code"]["commit"],
        "processor_s": round(run.seconds),
        "steps": run.steps,
        "samples": run.summary.samples,
        "clean": sound.clean,
        "certified": sound.cra,
        "certificate_sha256": hashlib.sha256(certificate.read_bytes()).hexdigest(),
    }


def page(records: Iterable[Mapping[str, Any]]) -> str:
    """The table as Markdown.

    Args:
        records: of runs, see run_record.
    """
    runs: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        runs.setdefault(record["preset"], []).append(record)
    lines = [
        "# Presets of the papers",
        "",
        "Per cent, clean and certified at the radii. Ours: mean over the seeds, column `sound` on "
        "the test split, and the processor seconds of training. `none read`: no source with a "
        "figure of this network was at hand.",
        "",
        "| preset | parameters | radii | published | source | ours |",
        "|---|---|---|---|---|---|",
        *(_line(name, runs.get(name, [])) for name in _rows()),
    ]
    return "\n".join(lines) + "\n"


def _rows() -> Iterator[str]:
    """Presets whose data are not made here, and those with a figure to compare with."""
    for name, preset in PRESETS.items():
        if preset().data.source == "none" or name in FIGURES:
            yield name


def _line(name: str, records: Sequence[Mapping[str, Any]]) -> str:
    config = run_preset(name)
    figure = FIGURES.get(name)
    radii = tuple(figure.certified) if figure else config.checkpoint.evaluate_eps
    published, source = NOT_KNOWN, ""
    if figure:
        published, source = _figures([figure.clean, *figure.certified.values()]), figure.source
    cells = (
        f"`{name}`",
        f"{parameter_count(config.model):,}",
        ", ".join(radii),
        published,
        source,
        _ours(records, radii) if records else NOT_RUN,
    )
    return "| " + " | ".join(cells) + " |"


def _ours(records: Sequence[Mapping[str, Any]], radii: Sequence[str]) -> str:
    columns = [[record["clean"] for record in records]]
    columns += [[record["certified"][radius] for record in records] for radius in radii]
    seeds = ", ".join(str(record["seed"]) for record in records)
    commits = ", ".join(sorted({record["commit"][:7] for record in records}))
    means = _figures([100 * statistics.fmean(column) for column in columns])
    used = statistics.fmean(record["processor_s"] for record in records)
    return f"{means} (seeds {seeds}; {used:.0f} processor s each; {commits})"


def _figures(values: Sequence[float | None]) -> str:
    return " / ".join("-" if value is None else f"{value:.4g}" for value in values)


def stored_records() -> list[dict[str, Any]]:
    """Records of all runs that were taken in."""
    return [json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))]


def main() -> None:
    """Take runs in and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--add", nargs="*", default=[], type=Path, help="folders of finished runs")
    for folder in parser.parse_args().add:
        record = run_record(folder)
        RUNS.mkdir(exist_ok=True)
        file = RUNS / f"{record['preset']}-seed{record['seed']}.json"
        file.write_text(json.dumps(record, indent=1) + "\n")
    PAGE.write_text(page(stored_records()))
    print(PAGE)


if __name__ == "__main__":
    main()
