"""Cost of certified evaluation as a job: python -m benchmarks.jobs.

1. N shards on two Ray workers against one, in wall time, start of Ray and pictures left out.
2. What the scheduler itself takes for one evaluation: to find it, claim it and start its process.
3. The certification of all shards (decoding, digests, three columns, observed constant) against
   the bare forward passes of the same programs at the same batch size, in processor time.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import tyro

from benchmarks.report import Row, write_result
from benchmarks.timing import interleaved
from data_shards.format.shard_index import load_index
from data_shards.sources.synthetic import synthetic
from data_shards.storage.store import Store
from data_shards.streaming.sample_reader import read_shard
from data_shards.write import write_shard_set
from jobs.evaluation.certify_tasks import (
    ArtifactTask,
    exact_program,
    forget,
    in_program,
    shard_tasks,
)
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.runner import artifact_info, compute
from jobs.schedule import Scheduler
from jobs.scheduling.backlog import Backlog
from jobs.scheduling.claims import Claims
from jobs.scheduling.config import ScheduleConfig
from jobs.scheduling.launchers import Processes
from model.artifact.artifact import write_artifact
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.registry import build_network
from pipeline.run.ray_session import ray_session
from pipeline.tracking.checkpoint_query import CheckpointQuery
from pipeline.tracking.client import MlflowConnection, TrackingConfig, now_ms

_NETWORK = LipNeXtConfig(input_shape=(3, 32, 32), num_classes=10, patch=4, width=256, depth=4)
_SPLIT = "test"


def export(folder: Path, shards: str, config: LipNeXtConfig = _NETWORK, seed: int = 0) -> str:
    """Write an artifact of untrained weights: certification costs the same."""
    network = build_network(config)
    network.initialise(seed=seed)
    write_artifact(
        Store(folder).open,
        network_config=config,
        tensors=network.named_parameters(),
        context={"shards_url": shards, "step": seed},
    )
    return folder.as_uri()


def scaling_rows(folder: Path, artifact: str, shards: str, batch: int, repeats: int) -> list[Row]:
    """Wall time of an evaluation by the number of its tasks in flight, in turn."""
    times: dict[int, list[float]] = {1: [], 2: []}
    with ray_session():
        for turn in range(-1, repeats):  # the first turn starts the workers
            for tasks, found in times.items():
                out = str(folder / f"out-{turn}-{tasks}")
                begin = time.perf_counter()
                compute(
                    EvaluationConfig(
                        artifact=artifact, shards=shards, record=False, max_in_flight=tasks,
                        batch_size=batch, out=out,
                    )
                )  # fmt: skip
                if turn >= 0:
                    found.append(time.perf_counter() - begin)
    one, two = (statistics.median(found) for found in times.values())
    return [
        {"what": "evaluation, one worker", "seconds": one},
        {"what": "evaluation, two workers", "seconds": two, "ratio": one / two, "target": ">= 1.8"},
    ]


def scheduler_row(folder: Path, shards: str, evaluations: int) -> Row:
    """Wall time in which the scheduler finds, claims and starts evaluations that do nothing."""
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="bench")
    server = MlflowConnection(tracking)
    small = LipNeXtConfig(input_shape=(3, 32, 32), num_classes=10, patch=2, width=16, depth=1)
    run = server.start_run("bench", None, "bench", {}, {}, now_ms())
    for step in range(evaluations):
        url = export(folder / f"checkpoint-{step}", shards, small, seed=step)
        digest = artifact_info(url).digest
        server.find_or_create_model(
            run.run_id, step=step, artifact_url=url, digest=digest, params={}
        )
    config = ScheduleConfig(
        tracking=tracking, parallel=evaluations, entry="benchmarks.jobs:nothing"
    )
    claims = Claims(config.claims_url, lease_s=config.lease_s)
    submitter = Processes(folder / "logs")
    watch = CheckpointQuery(tracking.uri, (tracking.experiment,))
    scheduler = Scheduler(config, claims, Backlog(config, claims, watch), submitter)
    begin = time.perf_counter()
    scheduler.look(config.suites)
    scheduler.tick()
    seconds = (time.perf_counter() - begin) / evaluations
    while scheduler.waiting:
        time.sleep(0.5)
        scheduler.tick()
    if scheduler.failures:
        raise RuntimeError(f"{scheduler.failures} evaluations failed: see {folder / 'logs'}")
    return {"what": "scheduler, per submitted evaluation", "seconds": seconds, "target": "< 1 s"}


def nothing(arguments: list[str], *, before_record: Callable[[], object]) -> int:
    """An evaluation that costs nothing."""
    before_record()
    return 0


def throughput_rows(artifact: str, shards: str, batch: int, repeats: int) -> list[Row]:
    """Certification of all shards against the bare forward passes in float32 and float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    index = load_index(shards)
    task = ArtifactTask(url=artifact, digest=artifact_info(artifact).digest, device=device)
    bounded = build_network(_NETWORK).bounded_matrices
    network = in_program(task, "float32")
    matrices = [network.bound_matrix(n, network.get_parameter(n)) for n in bounded]
    tasks = shard_tasks(task, index, _SPLIT, batch, matrices=matrices, deployed="float32")
    pixels = [b.images for t in tasks for b in read_shard(t.index, t.shard, batch)]
    images = sum(len(part) for part in pixels)

    def forward(program: str) -> None:
        network = in_program(task, program)
        kind = next(network.parameters()).dtype
        with torch.no_grad(), exact_program(device):
            for part in pixels:
                network(part.to(device).to(kind) / 255)

    def bare() -> None:
        forward("float32")
        forward("float64")

    def certified() -> None:
        for one in tasks:
            with exact_program(device):
                one.run()

    times = interleaved(
        {"bare": bare, "certified": certified, "float32": partial(forward, "float32")},
        torch.device(device),
        repeats=repeats,
        budget_s=120.0,
    )
    forget()
    ratio = times["bare"] / times["certified"]
    return [
        {"what": "bare forward passes, float32 + float64", "images/s": images / times["bare"]},
        {"what": "bare forward pass, float32", "images/s": images / times["float32"]},
        {
            "what": "certification of all shards",
            "images/s": images / times["certified"],
            "ratio": ratio,
            "target": ">= 0.95",
        },
    ]


def main(
    shards: int = 4, samples: int = 1024, batch: int = 64, repeats: int = 3, evaluations: int = 10
) -> None:
    """Measure and write benchmarks/results/jobs.md.

    Args:
        shards: test shards of the evaluation.
        samples: samples of a test shard.
        batch: images per forward pass.
        repeats: turns of every measurement.
        evaluations: evaluations that the scheduler starts.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = synthetic(samples=5 * shards * samples, size=32)
        url = str(folder / "shards")
        write_shard_set(source, url, samples_per_shard=samples)
        artifact = export(folder / "artifact", url)
        rows = throughput_rows(artifact, url, batch, repeats)
        rows.append(scheduler_row(folder, url, evaluations))
        rows += scaling_rows(folder, artifact, url, batch, repeats)
    notes = [
        f"{shards} shards of {samples} samples, LipNeXt 3x32x32, width {_NETWORK.width}, depth "
        f"{_NETWORK.depth}, batches of {batch}; medians of {repeats} turns.",
        "Throughput in processor time of one thread; scaling and scheduler in wall time, which "
        "other work on the machine lengthens.",
    ]
    write_result("jobs", rows, notes)


if __name__ == "__main__":
    tyro.cli(main)
