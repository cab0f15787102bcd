"""How processor time grows with what there is much of: `python -m benchmarks.growth`.

Runs, checkpoints, registered versions and evaluations in an MLflow store, shards and samples of a
set: each is made 1, 10 and 100 times as many, and what reads all of them is timed.
"""

import io
import logging
import math
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from mlflow import MlflowClient

from benchmarks.index import make_set
from benchmarks.report import Row, write_result
from data_shards.config import StreamConfig
from data_shards.format.external_scan import Layout
from data_shards.format.shard_index import load_index
from data_shards.format.tar import add_end, add_member
from data_shards.sources.base import encode_png
from data_shards.storage.store import Store
from data_shards.streaming.fetcher import Shares, SplitReader
from data_shards.streaming.sampler import Cursor
from data_shards.writing.external_set import IndexOptions, index_external_set
from data_shards.writing.shard_patterns import find_shards
from pipeline.tracking.checkpoint_query import CheckpointQuery
from pipeline.tracking.client import EvaluationRecord, MlflowConnection, TrackingConfig, now_ms
from pipeline.tracking.reader import Reader

TIMES = (1, 10, 100)
REPEATS = 3
MOST = 1.1
_REGISTERED = "registered"
Works = dict[str, Callable[[], object]]


class Records:
    """Fills an MLflow store as training, evaluation and promotion do.

    Args:
        tracking: The store.
    """

    def __init__(self, tracking: TrackingConfig) -> None:
        self._server = MlflowConnection(tracking)
        self._client = MlflowClient(tracking.uri, tracking.uri)
        self._tracking = tracking
        self._client.create_registered_model(_REGISTERED)
        self._steps = 0

    def add_run(self) -> str:
        """Record a training run with one checkpoint; returns its id."""
        name = f"run-{self._steps}"
        run = self._server.start_run(name, None, name, {"seed": "0"}, {}, now_ms())
        self.add_checkpoint(run.run_id)
        self._server.finish_run(run.run_id, "FINISHED", now_ms())
        return str(run.run_id)

    def add_checkpoint(self, run_id: str) -> None:
        """Record a checkpoint, a version and an evaluation of it."""
        self._steps += 1
        url, digest = f"file:///checkpoints/{self._steps}", f"{self._steps:064x}"
        model_id = self._server.find_or_create_model(
            run_id, step=self._steps, artifact_url=url, digest=digest, params={}
        )
        self._client.create_model_version(_REGISTERED, url, tags={"model_id": model_id})
        self._server.log_evaluation(
            EvaluationRecord(
                eval_key=digest, artifact_url=url, artifact_digest=digest, dataset_name="set",
                dataset_digest="0", dataset_url="file:///set", metrics={"cra": 0.5}, params={},
                artifacts={}, step=self._steps, train_run_id=run_id, model_id=model_id,
            )
        )  # fmt: skip

    def readings(self) -> Works:
        """What reads all of it: a report, and one look of a scheduler."""

        def report() -> None:
            reader = Reader(self._tracking)
            runs = reader.training_runs()
            reader.evaluations(runs)
            reader.models(runs)

        def look() -> None:
            query = CheckpointQuery(
                self._tracking.uri, (self._tracking.experiment,), (_REGISTERED,)
            )
            query.recorded({"", *(checkpoint.run_id for checkpoint in query.checkpoints())})

        return {"a report reads the store": report, "a scheduler looks at the store": look}


def processor_s(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """Smallest processor time of some calls."""
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        found.append(time.process_time() - begin)
    return min(found)


def exponent(tenfold: float, hundredfold: float) -> float:
    """Exponent of growth from 10 to 100 times; below, what does not grow weighs too much."""
    return math.log10(hundredfold / tenfold)


def tracked(folder: Path, what: str, first: int) -> list[tuple[str, dict[int, float]]]:
    """Times of recording and of reading by the number of runs, or of checkpoints of one run."""
    folder.mkdir()
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="growth")
    records = Records(tracking)
    found: dict[str, dict[int, float]] = {}
    recording, there, run_id = 0.0, 0, ""
    for times in TIMES:
        begin = time.process_time()
        for _ in range(there, first * times):
            if what == "runs" or not run_id:
                run_id = records.add_run()
            else:
                records.add_checkpoint(run_id)
        there = first * times
        recording += time.process_time() - begin
        found.setdefault("record them", {})[times] = recording
        for name, work in records.readings().items():
            found.setdefault(name, {})[times] = processor_s(work)
    return [(f"{first} {what}: {name}", measured) for name, measured in found.items()]


def over_sets(
    folder: Path, what: str, first: int, make: Callable[[Path, int], Works], repeats: int = REPEATS
) -> list[tuple[str, dict[int, float]]]:
    """Times of what is done with sets of `first` and more shards or samples."""
    found: dict[str, dict[int, float]] = {}
    for times in TIMES:
        place = folder / str(times)
        place.mkdir(parents=True)
        for name, work in make(place, first * times).items():
            found.setdefault(name, {})[times] = processor_s(work, repeats)
    return [(f"{first} {what}: {name}", measured) for name, measured in found.items()]


def of_samples(folder: Path, samples: int) -> Works:
    """Loading an index and beginning an epoch."""
    make_set(folder, samples=samples, shards=16)
    index = load_index(str(folder))

    def begin() -> None:
        shares = Shares(len(index.select("train")), 1024, 3, 8)
        config = StreamConfig(crop="random-resized")
        next(SplitReader(index, config, "train", shares, Cursor(seed=1)).readings())

    return {"load the index": lambda: load_index(str(folder)), "begin an epoch": begin}


def of_shards(folder: Path, shards: int) -> Works:
    """Loading an index, and cutting it into what the tasks of an evaluation are sent."""
    make_set(folder, samples=4 * shards, shards=shards)
    index = load_index(str(folder))

    def cut() -> None:
        for shard in index.shards_of("train"):
            part = pickle.loads(pickle.dumps(index.part("train", shard)))
            part.rows_of(part.shards[0])

    return {"load the index": lambda: load_index(str(folder)), "send a part per shard": cut}


def of_external_shards(folder: Path, shards: int) -> Works:
    """Indexing shards of another program, 4 small images in each."""
    image = encode_png(np.zeros((8, 8, 3), np.uint8))
    for number in range(shards):
        tar = io.BytesIO()
        for key in range(4):
            add_member(tar, f"{number:05d}{key}.png", image)
            add_member(tar, f"{number:05d}{key}.cls", b"0")
        add_end(tar)
        (folder / f"train-{number:05d}.tar").write_bytes(tar.getvalue())
    root = Store(folder)

    def index() -> None:
        found = find_shards(root, [f"train=train-{{00000..{shards - 1:05d}}}.tar"])
        index_external_set(root, found, root, IndexOptions(layout=Layout("cls", "")))

    return {"index them": index}


def main() -> None:
    """Measure and write benchmarks/results/growth.md."""
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = over_sets(folder / "samples", "samples", 10_000, of_samples)
        found += over_sets(folder / "shards", "shards", 40, of_shards)
        found += over_sets(
            folder / "external", "external shards", 10, of_external_shards, repeats=1
        )
        found += tracked(folder / "runs", "runs", 4)
        found += tracked(folder / "checkpoints", "checkpoints", 10)
    rows: list[Row] = [
        {
            "what": what,
            **{f"{times}x [s]": seconds for times, seconds in measured.items()},
            "exponent": exponent(measured[10], measured[100]),
            "target": f"<= {MOST}",
        }
        for what, measured in found
    ]
    notes = [
        f"Processor time of this process, smallest of {REPEATS} (of one where a store or an index "
        "is written); the exponent is log10 of the last over the one before it.",
        "An MLflow store is a database of this process, behind MLflow's client. Every run has a "
        "checkpoint; every checkpoint a registered version and an evaluation.",
    ]
    write_result("growth", rows, notes)


if __name__ == "__main__":
    main()
