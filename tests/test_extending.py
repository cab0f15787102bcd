"""How to add a network family, a loss, a data source: one file and one registration each.

What would be the file is a class or a function here (the family's is `tests/model/toy_network.py`),
and `monkeypatch.setitem` stands for the line in the table. Hooks of the training loop and metrics
are added in `tests/pipeline/test_hooks.py`.
"""

import functools
from typing import Literal

import numpy as np
import pytest
import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from data_shards import write
from data_shards.config import StreamConfig
from data_shards.format.shard_index import load_index
from data_shards.sources.base import TEST, VALIDATION, Source, encode_png, hold_out
from data_shards.sources.registry import SOURCES
from data_shards.storage.store import Store
from data_shards.streaming.sampler import Cursor
from data_shards.streaming.stream import SampleStream
from jobs.evaluate_cra import evaluate
from model.artifact.artifact import write_artifact
from model.networks.registry import FAMILIES, Family, build_network
from optim.config import OptimConfig
from optim.param_groups import parameter_groups
from optim.reference_adam import ReferenceManifoldAdam
from pipeline.config import DataConfig, RunConfig
from pipeline.driver.preflight import prepare
from pipeline.errors import PipelineError
from pipeline.losses.base import STRICT, Loss, relative_logits
from pipeline.losses.registry import LOSSES
from pipeline.planner.meta_pass import training_flops
from pipeline.pretrain import parse
from pipeline.training.objective import Objective
from pipeline.training.schedules import StepContext
from tests.model.toy_network import Toy, ToyConfig
from tests.pipeline.small_runs import batches, small_run, small_shards

pytestmark = pytest.mark.integration

# A network family: model/networks/FAMILY.py, and a line of model/networks/registry.py.


def test_a_family_is_one_file_and_one_line(tmp_path, monkeypatch):
    """Configured, planned, trained for a step, exported, certified."""
    monkeypatch.setitem(FAMILIES, "toy", Family(ToyConfig, Toy))
    run = small_run(
        model=ToyConfig(input_shape=(1, 8, 8), num_classes=10), optim=OptimConfig(lr=1e-2)
    )
    assert RunConfig.from_json(run.to_json()) == run
    network = build_network(run.model)
    network.initialise(seed=0)
    # The head's products with 10 rows of 64, forward and twice backward.
    assert training_flops(run) == 3 * 2 * 64 * 10
    losses = _train(network, run)
    assert losses[-1] < losses[0]
    images = batches(1, 24)[0][0]
    network.calibrate([images / 255])
    folder = Store(str(tmp_path / "artifact"))
    tensors = [*network.named_parameters(), *network.named_buffers()]
    write_artifact(folder.open, network_config=run.model, tensors=tensors, context={})
    shards = small_shards(tmp_path / "shards")
    summary = evaluate(
        {"artifact": folder.url, "shards": shards, "launcher": "local", "record": False}
    )
    assert summary.network_bound == 0.5
    assert summary.samples > 0


def _train(network, run, steps=8) -> list[float]:
    """Losses of some steps on one batch, as training takes them but in one process."""
    objective = Objective(network, run.loss)
    groups = parameter_groups(network.named_parameters(), run.optim)
    optimizer = ReferenceManifoldAdam(groups, run.optim)
    [(images, labels)] = batches(1, 24)
    losses = []
    for step in range(steps):
        eps = run.loss.training_radius(step, total=steps)
        optimizer.zero_grad()
        loss, _ = objective(images, labels, StepContext(step, step / steps, 1.0, eps))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


# A loss: pipeline/losses/LOSS.py, and a line of pipeline/losses/registry.py.


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ToyLoss(Loss):
    """Mean over samples and rivals of softplus(rival - label + eps rate) ** power."""

    kind: Literal["toy"] = "toy"
    power: float = Field(default=1.0, ge=1)
    """Large margins that are missing count more."""

    def mean(
        self, y_BK: Tensor, d_BK: Tensor, t_B: Tensor, *, eps: float, progress: float
    ) -> Tensor:
        """See Loss."""
        missing_BK = relative_logits(y_BK, t_B) + eps * d_BK
        return F.softplus(self.scale * missing_BK).pow(self.power).mean()


def test_a_loss_is_one_file_and_one_line(monkeypatch):
    """On the command line with its own options, in run.json, and in a step of training."""
    monkeypatch.setitem(LOSSES, "toy", ToyLoss)
    run = parse(["digits", "--loss.kind", "toy", "--loss.power", "2", "--model.width", "32"])
    assert run.loss == ToyLoss(power=2.0, eps=108 / 255, scale=10.0)
    assert RunConfig.from_json(run.to_json()) == run
    with pytest.raises(PipelineError, match=r"--loss.power is no option of the loss 'emma'"):
        parse(["digits", "--loss.power", "2"])
    with pytest.raises(PipelineError, match=r"'toy', which has .*--loss.power"):
        parse(["digits", "--loss.kind", "toy", "--loss.eps-ramp", "0.2"])
    network = build_network(run.model)
    network.initialise(seed=0)
    losses = _train(network, run)
    assert losses[-1] < losses[0]


# A data source: data_shards/sources/SOURCE.py, and a line of data_shards/sources/registry.py.


def stripes(*, samples: int = 60, size: int = 8) -> Source:
    """Grey images with one bright row, whose number is the class.

    Args:
        samples: Number of images, train and test together.
        size: Height and width in pixels, and classes.
    """
    labels = np.arange(samples, dtype=np.int64) % size
    test = hold_out(labels, np.ones(samples, dtype=bool), TEST)
    return Source(
        name="stripes",
        image_shape=(1, size, size),
        class_names=tuple(f"row {row}" for row in range(size)),
        labels=labels,
        test=test,
        validation=hold_out(labels, ~test, VALIDATION),
        load=functools.partial(_striped, size),
        parameters={"source": "stripes", "samples": samples, "size": size},
    )


def _striped(size: int, numbers) -> list[bytes]:
    return [
        encode_png(np.uint8(255) * np.eye(size, dtype=np.uint8)[:, [number % size]].repeat(size, 1))
        for number in numbers
    ]


def test_a_source_is_one_file_and_one_line(tmp_path, monkeypatch):
    """A subcommand with its own flags, a shard set that streams, and a value of `data.source`."""
    with pytest.raises(ValueError, match=r"data.source='stripes' cannot be made here: none, "):
        DataConfig(source="stripes")
    monkeypatch.setitem(SOURCES, "stripes", stripes)
    write.main(["stripes", "--out", str(tmp_path / "set"), "--samples", "80"])
    index = load_index(str(tmp_path / "set"))
    assert (index.header.splits["train"], index.header.splits["test"]) == (64, 16)
    reading = {"split": "train", "global_batch": 16, "cursor": Cursor(seed=0)}
    with SampleStream(index, StreamConfig(), **reading) as stream:
        batch = next(stream)
    rows = batch.images[:, 0].float().mean(2).argmax(1)
    assert torch.equal(rows, batch.labels)
    words = ["--data.source", "stripes", "--model.num-classes", "8", "--train.global-batch", "24"]
    config = parse(["digits", "--storage", str(tmp_path), *words])
    with prepare(config, world_size=2) as prepared:
        assert prepared.samples.index.header.name == "stripes"
    assert (tmp_path / "data/stripes/index.json").exists()


# An evaluation suite is a line of jobs/evaluation/suites.py: tests/jobs/test_suites.py adds one.
# A hook and a metric: tests/pipeline/test_hooks.py.
