"""Class, certified radius and verdict for images.

    python -m jobs.predict models:/digits@champion photos/ more.png --eps 36/255
    python -m jobs.predict s3://bucket/artifacts/step-1 s3://bucket/images --cluster.launcher ray

The radius is the sound one: no perturbation of the pixels smaller than it changes the class that
this float64 program returns. One row per image, in the order of the inputs; exit status 0, 1 if an
image could not be used (its row has an `error`), 2 for bad input.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Annotated, Any, Literal

import pydantic
import torch
import tyro
from rich.console import Console

from data_shards.command_line.parsing import parse_words
from data_shards.command_line.progress import ProgressBar
from data_shards.errors import ShardError
from data_shards.storage.store import Store
from data_shards.untrusted.limits import UntrustedError
from jobs.command_line import exit_status
from jobs.errors import EvaluationError
from jobs.evaluation.certify_tasks import ArtifactTask, matrix_tasks
from jobs.evaluation.executor import map_inline, map_shards
from jobs.evaluation.runner import artifact_info, run_task, task_device
from jobs.model_registry.promotion import rule_of
from jobs.prediction.image_files import Picture, PreparedImage, find_pictures, prepare
from jobs.prediction.predictor import SoundPredictor, artifact_url
from model.artifact.artifact import ArtifactInfo
from model.certification.eps import eps_value
from model.certification.matrix_bounds import MatrixBound
from model.errors import ModelError
from pipeline.run.ray_session import ray_session
from pipeline.tracking.client import TrackingConfig
from pipeline.tracking.model_registry import Registry, RegistryError

FIELDS = ("path", "label", "class", "radius", "norm", "eps", "certified", "size", "resize", "error")
_TASKS_PER_WAVE = 64
_NAMED = 3
Run = Callable[[Sequence[Any]], list[Any]]


@pydantic.dataclasses.dataclass(
    frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid")
)
class PredictConfig:
    """Class, certified radius and verdict for images."""

    model: tyro.conf.Positional[str]
    """models:/NAME@ALIAS, models:/NAME/VERSION, or the URL of a model artifact or of a run: then
    the artifact that was evaluated on its test split, else its newest."""
    inputs: tyro.conf.Positional[tuple[str, ...]]
    """Image files and folders (png, jpg, webp, bmp, gif, tiff), paths or URLs."""
    eps: str | None = None
    """Radius of the verdict; default: that of the registered model's rule, else 36/255."""
    resize: bool = False
    """Bring images of another shape to the network's, and say so in their rows; without it they are
    refused."""
    out: str = "-"
    """File or URL of the result; - is the standard output."""
    format: Literal["auto", "jsonl", "csv"] = "auto"
    """auto: by the name of the file, jsonl on the standard output."""
    batch_size: Annotated[int, pydantic.Field(gt=0)] = 64
    """Images per forward pass and task."""
    # In the order of the other entries: `typing` takes both for one, and help has the first it met.
    launcher: Annotated[Literal["ray", "local"], tyro.conf.arg(name="cluster.launcher")] = "local"
    """ray: batches as Ray tasks."""
    max_in_flight: Annotated[int, pydantic.Field(gt=0)] = 2
    """Ray tasks under way at the same time."""
    num_gpus: Annotated[float, pydantic.Field(ge=0)] = 0.0
    """GPUs, or a fraction of one, of each Ray task; 0: none."""
    device: Annotated[Literal["auto", "cpu", "cuda"], tyro.conf.arg(name="cluster.device")] = "auto"
    """Device of the forward pass; auto: cuda where the process or the task may use one."""
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)
    """MLflow store of registered models."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictTask:
    """Predict one batch of files."""

    artifact: ArtifactTask
    matrices: tuple[MatrixBound, ...]
    pictures: tuple[Picture, ...]
    eps: str
    resize: bool

    def run(self) -> list[dict[str, Any]]:
        """Return one row per file, in order."""
        predictor = _predictor(self.artifact, self.matrices)
        shape = tuple(predictor.info.native_input_shape)
        prepared = [_open(picture, shape, self.resize) for picture in self.pictures]
        usable = [image for image in prepared if isinstance(image, PreparedImage)]
        answers: Iterator[tuple[int, float]] = iter(())
        if usable:
            found = predictor.predict(torch.stack([image.pixels for image in usable]))
            answers = zip(found.prediction.tolist(), found.radius.tolist(), strict=True)
        rows = []
        for picture, image in zip(self.pictures, prepared, strict=True):
            row: dict[str, Any] = dict.fromkeys(FIELDS)
            row |= {"path": picture.path, "norm": predictor.info.norm, "eps": self.eps}
            if isinstance(image, PreparedImage):
                label, radius = next(answers)
                row["class"] = predictor.info.class_name(label)
                row |= {"label": label, "radius": radius, "certified": radius > eps_value(self.eps)}
                row |= {"size": image.size, "resize": image.resize or "none"}
            else:
                row["error"] = image
            rows.append(row)
        return rows


@dataclasses.dataclass
class Count:
    """What `predict` saw."""

    images: int = 0
    certified: int = 0
    failed: int = 0
    others: tuple[str, ...] = ()
    """Files of the folders that are no images by their names."""


def predict(
    config: PredictConfig, write: Callable[[dict[str, Any]], object], *, progress: bool = False
) -> Count:
    """Predict all inputs, handing rows to `write` in the order of the inputs.

    Args:
        config: the model and the inputs.
        write: receives the rows.
        progress: show a bar on standard error.

    Raises:
        EvaluationError, RegistryError, ModelError: the model, or an input that is not there.
        FileNotFoundError: there is no artifact.
    """
    url, digest, eps = _resolve(config)
    pictures, others = find_pictures(list(config.inputs))
    info = artifact_info(url)
    if digest is not None and info.digest != digest:
        raise EvaluationError(f"the artifact at {url} has digest {info.digest}, not {digest}")
    device = task_device(config.device, launcher=config.launcher, num_gpus=config.num_gpus)
    artifact = ArtifactTask(url=Store(url).url, digest=info.digest, device=device)
    count = Count(others=tuple(others))
    bar = ProgressBar("predicting", len(pictures), unit="images", shown=progress)
    with _runner(config) as run, bar:
        for row in _rows(config, artifact, info, pictures, eps, run):
            write(row)
            bar.advance()
            count.images += 1
            count.failed += row["error"] is not None
            count.certified += bool(row["certified"])
    return count


def _rows(
    config: PredictConfig,
    artifact: ArtifactTask,
    info: ArtifactInfo,
    pictures: Sequence[Picture],
    eps: str,
    run: Run,
) -> Iterator[dict[str, Any]]:
    """In waves: what is done is written, and what waits does not fill the memory."""
    matrices = tuple(matrix for part in run(matrix_tasks(artifact, info)) for matrix in part)
    wave = config.batch_size * _TASKS_PER_WAVE
    for begin in range(0, len(pictures), wave):
        part = pictures[begin : begin + wave]
        tasks = [
            PredictTask(
                artifact=artifact,
                matrices=matrices,
                pictures=tuple(part[i : i + config.batch_size]),
                eps=eps,
                resize=config.resize,
            )
            for i in range(0, len(part), config.batch_size)
        ]
        for rows in run(tasks):
            yield from rows


def _resolve(config: PredictConfig) -> tuple[str, str | None, str]:
    """Artifact, the digest that it must have, and eps."""
    url, digest, eps = config.model, None, config.eps
    if config.model.startswith("models:/"):
        registry = Registry(config.tracking)
        version = registry.resolve(config.model)
        url, digest = version.tags.get("artifact_url", ""), version.tags.get("artifact_digest", "")
        if not url or not digest:
            raise RegistryError(f"{version} names no model artifact: the gate did not register it")
        registry.require_address(url)
        eps = eps or rule_of(registry, version.name).eps
    else:
        url = artifact_url(url)
    eps = eps or "36/255"
    eps_value(eps)
    return url, digest, eps


def _open(picture: Picture, shape: Any, resize: bool) -> PreparedImage | str:
    """The image, or what is wrong with it."""
    try:
        data = Store(picture.folder).read(picture.name, limit="image_bytes")
        return prepare(data, shape, resize=resize)
    except (ShardError, EvaluationError, UntrustedError, OSError) as error:
        return str(error)


@functools.lru_cache(maxsize=1)
def _predictor(artifact: ArtifactTask, matrices: tuple[MatrixBound, ...]) -> SoundPredictor:
    """Read the artifact once per process."""
    return SoundPredictor(
        artifact.url, digest=artifact.digest, device=artifact.device, matrices=matrices
    )


@contextmanager
def _runner(config: PredictConfig) -> Iterator[Run]:
    if config.launcher == "ray":
        with ray_session():
            yield lambda tasks: map_shards(
                run_task, tasks, max_in_flight=config.max_in_flight, num_gpus=config.num_gpus
            )
        return
    try:
        yield lambda tasks: map_inline(run_task, tasks)
    finally:
        _predictor.cache_clear()


@contextmanager
def _writer(config: PredictConfig) -> Iterator[Callable[[dict[str, Any]], object]]:
    """Rows to a file, a URL or the standard output."""
    kind = config.format
    if kind == "auto":
        kind = "csv" if config.out.endswith(".csv") else "jsonl"
    if config.out == "-":
        yield _formatted(sys.stdout, kind)
        return
    folder, _, name = config.out.rpartition("/")
    with Store(folder or ".").durable(name) as file:
        yield _formatted(_Text(file), kind)


class _Text:
    """A binary file for the csv module."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file

    def write(self, text: str) -> None:
        self._file.write(text.encode())


def _formatted(file: Any, kind: str) -> Callable[[dict[str, Any]], object]:
    if kind == "jsonl":
        return lambda row: file.write(json.dumps(row, allow_nan=False) + "\n")
    table = csv.DictWriter(file, FIELDS, lineterminator="\n")
    table.writeheader()
    return lambda row: table.writerow({name: _encodable(cell) for name, cell in row.items()})


def _encodable(cell: Any) -> Any:
    """A cell as UTF-8 can have it: names of files need not be text."""
    if not isinstance(cell, str):
        return cell
    return cell.encode("utf-8", "backslashreplace").decode()


def _left_aside(others: Sequence[str]) -> str:
    if not others:
        return ""
    more = ", ..." if len(others) > _NAMED else ""
    return f"; no images by their names: {len(others)}, {', '.join(others[:_NAMED])}{more}"


def main(arguments: list[str] | None = None) -> int:
    """Run the job; returns 0, 1 if an image failed, 2 for bad input."""

    def act(_: Console, errors: Console) -> int:
        config = parse_words(PredictConfig, arguments, prog="python -m jobs.predict")
        with _writer(config) as write:
            count = predict(config, write, progress=config.out != "-" or not sys.stdout.isatty())
        errors.print(
            f"{count.images} images, {count.certified} certified, {count.failed} failed"
            f"{_left_aside(count.others)}",
            soft_wrap=True,
        )
        return 1 if count.failed else 0

    package = (EvaluationError, RegistryError, ShardError, ModelError)
    return exit_status(act, (*package, FileNotFoundError, ConnectionError, ValueError))


if __name__ == "__main__":
    sys.exit(main())
