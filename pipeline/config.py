"""The run's configuration: composes the parts of all packages; rules between parts live here.

A setting that changes nothing beside the others is refused: every part says in `without_effect`
which of its options are idle, and an idle option has to be at its default, or off (0, empty).
"""

import dataclasses
import functools
import json
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from data_shards.config import INDEXED_ONLY, SAME_SAMPLES, StreamConfig
from data_shards.sources.registry import generated_sources
from data_shards.storage.store import Store
from data_shards.untrusted.json_input import parse_object
from data_shards.untrusted.text import unprintable
from model.certification.eps import check_reach, check_table
from model.networks.centering import Centering
from model.networks.config import NetworkConfig
from model.networks.registry import FAMILIES, AnyNetwork, on_meta_device
from optim.config import MANIFOLD_OPTIONS, OptimConfig
from optim.manifolds import can_trivialize, manifold_of
from pipeline.errors import NoEffectError, PipelineError
from pipeline.losses.emma import EmmaLoss
from pipeline.losses.registry import AnyLoss

SCHEMA_VERSION = 3
RESERVED_NAMES = ("data", "claims", "mlartifacts", "mlflow.db", "mlflow.db.lock")
"""What lies beside the runs in their storage."""
_LONGEST_NAME = 255
_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
_ZERO_IS_A_VALUE = ("loss.eps_start",)
"""Options that 0 does not switch off."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class DataConfig:
    """Where the samples come from."""

    shards: str = ""
    """URL of the shard set (any fsspec store). Empty: `<storage>/data/<source>`."""
    source: str = "none"
    """A source that needs no archive (`digits`, `synthetic`) or knows where a package of the system
    puts it (`fashion-mnist`): its shard set is written on first use. `none`: the set is there."""
    train_split: Literal["train", "fit"] = "train"
    """`fit` leaves the validation part of the training split out, so that checkpoints can be chosen
    by it; with `train` nothing is held out, and the newest checkpoint is the result."""
    test_split: Literal["test", "validation"] = "test"
    """Split on which the result of the run is certified, once, at the end."""
    unindexed_samples: int = Field(default=0, ge=0)
    """Samples per epoch of a set without an index, which stock WebDataset then draws at random:
    no exact order, no exact resume, no certification. 0: the set has an index."""
    stream: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    """How samples are read."""

    @property
    def selection_split(self) -> str | None:
        """Split on which every kept checkpoint is certified; None where nothing is held out."""
        return "validation" if self.train_split == "fit" else None

    def __post_init__(self) -> None:
        """Refuse a source that cannot be made here."""
        known = ["none", *generated_sources()]
        if self.source not in known:
            raise PipelineError(
                f"data.source={self.source!r} cannot be made here: {', '.join(known)}; write any "
                "other with `python -m data_shards.write` and give --data.shards"
            )


def _of_a_switch(value: Any) -> Any:
    """Runs of an earlier version have a switch where a number of blocks is now."""
    return ("all" if value else "none") if isinstance(value, bool) else value


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrainConfig:
    """The loop."""

    epochs: float = Field(default=40, gt=0)
    """Passes over the training split."""
    processor_seconds: float = Field(default=0.0, ge=0)
    """Ends the run with the step nearest to so much processor time of its one rank, all threads
    counted; schedules follow the share that is used, in the shape that `epochs` gives them. Systems
    of different speed compare under such a budget, so a set that is kept in memory is decoded
    before it begins. 0: ends after `epochs`."""
    global_batch: int = Field(default=64, ge=1)
    """Samples per optimizer step over all ranks; must be divisible by workers * accumulation."""
    accumulation: int = Field(default=1, ge=1)
    """Backward passes per optimizer step on each rank; more where memory does not suffice."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of the working weights; masters, moments and gradient sums stay in fp32."""
    loss_scale: float = Field(default=1024.0, gt=0)
    """Static loss scale of fp16."""
    schedule: Literal["cosine", "triangular"] = "cosine"
    """Learning rate: warm-up and cosine, or linear to its peak at 2/5 of the run, to 1/20 of it at
    4/5 and to 0 (arXiv 2303.03169), without a warm-up of its own."""
    warmup_epochs: float = Field(default=2, ge=0)
    """Linear warm-up of the learning rate before the cosine."""
    lr_floor: float = Field(default=1e-5, ge=0, lt=1)
    """Smallest learning-rate factor of the cosine."""
    grad_clip: float = Field(default=0.0, ge=0)
    """Largest global norm of the ambient gradient; 0 switches clipping off."""
    max_skipped: int = Field(default=3, ge=0)
    """Steps in a row that may be skipped on all ranks because a loss or gradient is not finite."""
    rollbacks: int = Field(default=0, ge=0)
    """How often a run with more of them goes back to its newest checkpoint and on with the samples
    after them, instead of ending; 0: it ends."""
    activation_checkpointing: Annotated[
        Literal["none", "auto", "all"] | Annotated[int, Field(ge=0)], BeforeValidator(_of_a_switch)
    ] = "none"
    """Blocks that are recomputed in the backward pass, from the first on: `none`, `all`, a number,
    or as many as the memory of the GPUs asks for (`auto`; none on a CPU). Results are the same bit
    for bit. Where memory does not suffice all the same, the run starts again with all of them."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of the initial weights and of the order of the samples."""
    calibration_samples: int = Field(default=2048, ge=1)
    """Training samples over which an exported network's centred layers take their means."""
    log_every: int = Field(default=1, ge=1)
    """Steps between two metric records; metrics leave the device only then."""
    stop_after: int = Field(default=0, ge=0)
    """Stop cleanly after this step with a checkpoint (schedules unchanged); 0 runs to the end."""

    def recomputed(self, blocks: int) -> int:
        """How many of so many blocks are recomputed; of `auto` none, until it is decided."""
        asked = self.activation_checkpointing
        if isinstance(asked, int):
            return min(asked, blocks)
        return blocks if asked == "all" else 0

    def without_effect(self) -> dict[str, str]:
        """Options that the others leave without effect: name -> the setting that does so."""
        found: dict[str, str] = {}
        if self.precision != "fp16":  # the only type whose gradients underflow
            found["loss_scale"] = f"precision={self.precision}"
        if self.schedule == "triangular":
            found |= dict.fromkeys(("warmup_epochs", "lr_floor"), "schedule=triangular")
        return found


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ZeroConfig:
    """DeepSpeed ZeRO-3. 0 derives a value from the largest matrix."""

    sub_group_size: int = Field(default=1_000_000_000, ge=1)
    """Elements of one optimizer sub-group; cut at whole parameters."""
    reduce_bucket_size: int = Field(default=0, ge=0)
    """Elements of one gradient reduction. 0: four times those of the largest parameter."""
    prefetch_bucket_size: int = Field(default=0, ge=0)
    """Elements gathered ahead of use. 0: those of the largest block."""
    max_live_parameters: int = Field(default=0, ge=0)
    """Gathered elements kept on a rank; small values free a block as soon as it was used.
    0: three times those of the largest block."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class CheckpointConfig:
    """When the state is kept."""

    none: bool = False
    """Write no checkpoint and no artifact, not even of the last step: for measurements. Nothing is
    certified, and the run cannot be continued."""
    every_steps: int = Field(default=0, ge=0)
    """Steps between checkpoints; the last step always has one. 0: only the last."""
    keep_last: int = Field(default=5, ge=0)
    """Newest checkpoints that stay; 0: all. Artifacts, a fifth of their size, always stay."""
    keep_every: int = Field(default=0, ge=0)
    """A checkpoint whose step this divides stays, too; 0: none for that reason."""
    keep_best: int = Field(default=1, ge=0)
    """Checkpoints with the highest cra_sound on `validation` at the first radius of the table stay,
    too, and the best of them is the result; 0: the newest is. Needs data.train_split=fit."""
    budget_gb: float = Field(default=0.0, ge=0)
    """10^9 bytes that the checkpoints of the run may fill; 0: no limit. The newest always stays."""
    evaluate: bool = True
    """Certify every kept checkpoint on `validation`, and the result on data.test_split, in
    downstream tasks."""
    evaluate_eps: tuple[str, ...] = Field(
        default=("36/255", "72/255", "108/255", "255/255"), min_length=1
    )
    """Radii of the table, in the network's norm, as ratios of pixels in [0, 1]."""
    evaluate_tasks: int = Field(default=2, ge=1)
    """Evaluation tasks under way at the same time."""
    evaluate_gpus: float = Field(default=0.0, ge=0)
    """GPUs, or a fraction of one, for each evaluation task; 0 certifies on CPUs. Needs
    evaluate_placement: on the nodes that train, waiting tasks would take the GPUs of a restart."""
    evaluate_placement: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that may certify, as pairs of Ray's label selectors, e.g.
    `role evaluation` or `role !training`. Default: any node with free resources."""

    def __post_init__(self) -> None:
        """Refuse a table that no evaluation would make."""
        check_table(self.evaluate_eps)

    @property
    def certifies(self) -> bool:
        """Whether the run has its checkpoints evaluated."""
        return self.evaluate and not self.none

    def without_effect(self) -> dict[str, str]:
        """Options that the others leave without effect: name -> the setting that does so."""
        found: dict[str, str] = {}
        if self.none:
            return {
                field.name: "none=True, which writes no checkpoint"
                for field in dataclasses.fields(self)
                if field.name not in ("none", "evaluate")
            }
        if not self.keep_last:
            found |= dict.fromkeys(("keep_every", "keep_best"), "keep_last=0, which keeps all")
        if not self.evaluate:
            # Not the table: a scheduler that certifies the checkpoints later makes the same one.
            names = ("keep_best", "evaluate_tasks", "evaluate_gpus", "evaluate_placement")
            found |= dict.fromkeys(names, "evaluate=False")
        return found


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ClusterConfig:
    """Workers and where they run."""

    launcher: Literal["ray", "local"] = "ray"
    """`local`: this process (or the ranks of torchrun), without Ray."""
    workers: int = Field(default=2, ge=1)
    """Ranks. `local` takes the number from torchrun instead, 1 without it."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPUs reserved for each rank, and its compute threads on CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` uses GPUs when every rank can have one."""
    address: str = ""
    """Ray cluster to join; empty joins RAY_ADDRESS (set inside a Ray job) or starts a local one."""
    placement: dict[str, str] = Field(default_factory=dict)
    """Labels of the nodes that may train, as `checkpoint.evaluate_placement`."""
    min_workers: int = Field(default=0, ge=0)
    """Elastic on Ray: as many ranks as the cluster has room for, from this number to `workers`, of
    those that divide the batch; ranks come and go with nodes. 0: always `workers`."""
    max_failures: int = Field(default=0, ge=-1)
    """Restarts from the newest checkpoint after ranks, also while they start, or Ray Train's
    controller have died; 0: none, -1: any number."""
    max_preemptions: int = Field(default=-1, ge=-1)
    """The same after nodes that were taken away with notice, counted on its own; -1: any number."""
    persist_below: int = Field(default=-1, ge=-1)
    """Elements below which working weights are whole on every rank during a step, gathered at once
    and not module by module; masters, moments and gradients are partitioned in any case. 0: none;
    -1: all of a network of up to 16,777,216 elements, none of a larger one."""
    collective_timeout_s: int = Field(default=600, ge=1)
    """A collective that waits longer stops the run."""
    hang_timeout_s: int = Field(default=300, ge=0)
    """Without a step for so long (five times as long for the first one) the ranks write down their
    stacks and the rank they wait for, and end; what is then restarted is said by `max_failures`. At
    most `collective_timeout_s`, after which nobody could tell any more; 0: never."""
    straggler_ratio: float = Field(default=1.5, gt=1)
    """A rank whose forward pass takes so many times the median for 30 s and 5 records is named."""
    price_per_device_hour: float = Field(default=0.0, ge=0)
    """Price of one rank's device for an hour, in any currency, for `cost/total`; 0: unknown."""
    peak_tflops: float = Field(default=0.0, ge=0)
    """TFLOP/s that a device can reach, for `perf/mfu`; 0: from its name, where it is known."""

    def without_effect(self) -> dict[str, str]:
        """Options that the others leave without effect: name -> the setting that does so."""
        if self.launcher == "ray":
            return {}
        # torchrun places, counts and restarts the ranks.
        names = (
            "workers",
            "address",
            "placement",
            "min_workers",
            "max_failures",
            "max_preemptions",
        )
        return dict.fromkeys(names, f"launcher={self.launcher}")


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TrackingSettings:
    """The MLflow store of a run."""

    uri: str = ""
    """MLflow store: an http(s) server or sqlite:///path. Empty: `mlflow.db` beside the runs."""
    experiment: str = ""
    """MLflow experiment. Empty: name of the shard set."""


# The whole input would be repeated in every message, with whatever a URL holds.
@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", hide_input_in_errors=True))
class RunConfig:
    """Everything that defines one pretraining run."""

    preset: str
    """Named run whose settings the others change; on the command line also the first word."""
    model: AnyNetwork
    """The network."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The samples."""
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    """The manifold optimizer."""
    loss: AnyLoss = dataclasses.field(default_factory=EmmaLoss)
    """The loss; `--loss.kind` chooses another one."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """The loop."""
    zero: ZeroConfig = dataclasses.field(default_factory=ZeroConfig)
    """Partitioning."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """Checkpoints."""
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    """Workers."""
    tracking: TrackingSettings = dataclasses.field(default_factory=TrackingSettings)
    """Where MLflow records the run."""
    storage: str = ""
    """URL of all runs and data. Empty: `./runs`, in a Ray job `~/certified-pretrain`."""
    name: str = ""
    """Name of the run. Empty: preset, date and time; with --resume the run started last."""
    profile: int = Field(default=0, ge=0)
    """Steps of which rank 0 writes a trace and what they held in memory, to `<run>/profile`; 0:
    none."""
    resume: bool = False
    """Continue the run of this --name, or the one that was started last, from its newest committed
    checkpoint, with its own settings; those of the command line change them."""
    start_or_resume: bool = False
    """Continue the run of this --name if there is one, else start it: for jobs that are submitted
    again by a machine."""
    wait_for_lease: bool = False
    """Wait until the process that trains the run of this --name has ended, and then go on; without
    it a second one is refused."""
    extend_to_epochs: float = Field(default=0.0, ge=0)
    """Continue a run to more epochs in all than it has: from its newest checkpoint on, learning
    rate and training radius are those of a run that was this long from its start, which may raise
    the learning rate; what changes is said. 0: the epochs that it has."""
    accept_changes: bool = False
    """Continue a run although settings differ that decide what is computed. The network and the
    kinds of optimizer state must fit its checkpoints; the order of the samples stays that of the
    seed with which it began."""

    def __post_init__(self) -> None:
        """Rules that involve two parts, and what must not be saved beside every checkpoint."""
        for name, url in (
            ("storage", self.storage),
            ("tracking.uri", self.tracking.uri),
            ("data.shards", self.data.shards),
        ):
            if "@" in urlsplit(url).netloc:
                raise PipelineError(
                    f"{name} holds credentials, which would be saved with the configuration: "
                    "give them in the environment or in the store's own settings"
                )
        _check_name(self.name)
        if self.start_or_resume and not self.name:
            raise PipelineError("start_or_resume needs --name: else no run is the same one again")
        if self.checkpoint.none and (self.resume or self.start_or_resume):
            raise PipelineError(
                "checkpoint.none: a run that writes no checkpoint is not continued, there is "
                "nothing to go on from; start a new one"
            )
        if self.wait_for_lease and not (self.name or self.resume):
            raise PipelineError("wait_for_lease needs --name or --resume: a new run has no writer")
        hang, collective = self.cluster.hang_timeout_s, self.cluster.collective_timeout_s
        if hang > collective:
            raise PipelineError(
                f"cluster.hang_timeout_s={hang} exceeds cluster.collective_timeout_s={collective}, "
                "which would end the run before it could tell why"
            )
        if self.train.processor_seconds and (
            self.cluster.launcher != "local" or self.resume or self.start_or_resume
        ):
            raise PipelineError(
                f"train.processor_seconds={self.train.processor_seconds:g} needs "
                "cluster.launcher=local and a run that is not continued: what an earlier execution "
                "has used is not known"
            )
        split = self.train.global_batch
        parts = self.train.accumulation
        if split % parts:
            raise PipelineError(
                f"train.global_batch={split} is not divisible by train.accumulation={parts}"
            )
        if self.data.test_split == "validation" and self.data.train_split != "fit":
            raise PipelineError(
                "data.test_split=validation needs data.train_split=fit: "
                "the network would be certified on samples it was trained on"
            )

        self._check_images()
        self._check_effects()

    @property
    def continuable(self) -> bool:
        """Whether `--resume` goes on with the run: not where a budget of time ends it."""
        return not (self.checkpoint.none or self.train.processor_seconds)

    def _check_effects(self) -> None:
        """Refuse a setting that would be ignored."""
        parts = ("data.stream", "optim", "loss", "train", "checkpoint", "cluster")
        for path in parts:
            for name, reason in value_of(self, path).without_effect().items():
                self._require_idle(f"{path}.{name}", f"{path}.{reason}")
        for name, reason in self._without_effect().items():
            self._require_idle(name, reason)

    def _require_idle(self, option: str, reason: str) -> None:
        if self._is_set(option):
            raise NoEffectError(option, value_of(self, option), default_of(self, option), reason)

    def _is_set(self, option: str) -> bool:
        """Whether an option says something: 0 and an empty value switch most of them off."""
        value = value_of(self, option)
        off = not value and option not in _ZERO_IS_A_VALUE
        return not off and value != default_of(self, option)

    def require_effects(self, *, world_size: int) -> None:
        """Refuse settings that change nothing on so many ranks.

        Raises:
            NoEffectError: naming the setting.
        """
        if world_size == 1:
            self._require_idle("cluster.straggler_ratio", "one rank, slower than no other")

    def _without_effect(self) -> dict[str, str]:
        """Settings that another part leaves without effect, and how."""
        found: dict[str, str] = {}
        if not (self.resume or self.start_or_resume):
            names: tuple[str, ...] = ("accept_changes", "extend_to_epochs")
            found |= dict.fromkeys(names, "resume=False and start_or_resume=False")
        if self.resume:
            found["start_or_resume"] = "resume=True"
        if self.data.shards:
            found["data.source"] = f"data.shards={self.data.shards}"
        if self.data.unindexed_samples:
            names = ("data.train_split", *(f"data.stream.{name}" for name in INDEXED_ONLY))
            found |= dict.fromkeys(names, "data.unindexed_samples, for a set without an index")
        elif Store(self.data.shards or self.storage or ".").local_path():
            names = ("data.stream.disk_cache", "data.stream.disk_cache_bytes")
            found |= dict.fromkeys(names, "a shard set on this machine's file systems")
        if not (self.checkpoint.every_steps or self.resume or self.start_or_resume):
            found["train.rollbacks"] = "checkpoint.every_steps=0: there is nothing to go back to"
        if self.cluster.launcher == "local":
            names = ("evaluate_tasks", "evaluate_gpus", "evaluate_placement")
            found |= {f"checkpoint.{name}": "cluster.launcher=local" for name in names}
        return found | self._unused_by_network()

    def _unused_by_network(self) -> dict[str, str]:
        """Settings of what the network has not got."""
        # Building it, even on the meta device, takes time: only where an answer matters.
        kind = f"model.kind={self.model.kind}, which"
        found: dict[str, str] = {}
        manifold = [f"optim.{name}" for name in MANIFOLD_OPTIONS]
        if any(map(self._is_set, manifold)) and not has_matrices(self.model):
            found |= dict.fromkeys(manifold, f"{kind} has no matrix on a manifold")
        elif self._is_set("optim.gradient") and not has_trivialized(self.model):
            found["optim.gradient"] = f"{kind} has no layer that delivers X^T G"
        samples = "train.calibration_samples"
        if self._is_set(samples) and not has_centred_layers(self.model):
            found[samples] = f"{kind} has no centred layer"
        return found

    def _check_images(self) -> None:
        """Rules that involve the size of the images."""
        shape, shift = self.model.input_shape, self.data.stream.shift_pixels
        if shift >= min(shape[1:]):
            raise PipelineError(
                f"data.stream.shift_pixels={shift} would move images of {shape[1]}x{shape[2]} "
                "out of sight"
            )
        check_reach(self.checkpoint.evaluate_eps, FAMILIES[self.model.kind].network.norm, shape)

    def to_json(self) -> str:
        """Resolved configuration as JSON, with its schema version."""
        body = TypeAdapter(type(self)).dump_python(self, mode="json")
        return json.dumps({"schema_version": SCHEMA_VERSION, **body}, indent=1, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Inverse of to_json.

        Raises:
            PipelineError: another schema version, or a field that does not validate.
            UntrustedError: no JSON object.
        """
        body = parse_object(text, "the configuration of the run")
        version = body.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise PipelineError(
                f"configuration schema_version={version}, expected {SCHEMA_VERSION}"
            )
        try:
            return TypeAdapter(cls).validate_python(body)
        except ValidationError as error:
            raise PipelineError(f"configuration does not validate: {error}") from error


def _check_name(name: str) -> None:
    """Refuse what is no name of one folder, or would deceive who reads it."""
    if "/" in name or name in (".", ".."):
        raise PipelineError(f"name={name!r} must be the name of one folder, without /")
    if name in RESERVED_NAMES:
        raise PipelineError(f"name={name!r} is taken: the storage keeps something else there")
    if found := unprintable(name):
        raise PipelineError(f"name={name!a} holds {found[0]!a}, which no terminal shows")
    if len(name.encode()) > _LONGEST_NAME:
        raise PipelineError(
            f"name={name[:40]!r}... has {len(name.encode())} bytes; file systems take "
            f"{_LONGEST_NAME}"
        )


def has_matrices(model: NetworkConfig) -> bool:
    """Whether the network has parameters that the optimizer keeps on a manifold."""
    return any(manifold_of(p) is not None for p in on_meta_device(model).parameters())


def has_trivialized(model: NetworkConfig) -> bool:
    """Whether layers of the network can deliver X^T G as the gradient of their matrices."""
    return any(can_trivialize(p) for p in on_meta_device(model).parameters())


def has_centred_layers(model: NetworkConfig) -> bool:
    """Whether an artifact of the network holds means that are taken of training samples."""
    return any(isinstance(module, Centering) for module in on_meta_device(model).modules())


def value_of(config: RunConfig, option: str) -> Any:
    """Value of an option by its dotted name."""
    return functools.reduce(getattr, option.split("."), config)


def default_of(config: RunConfig, option: str) -> Any:
    """Default of an option of these settings: a network and a loss have their own."""
    path, _, name = option.rpartition(".")
    if not path:  # of the run: no network is a default, so no run is one
        return RunConfig.__dataclass_fields__[name].default
    return getattr(type(value_of(config, path))(), name)


def replaced(config: RunConfig, option: str, value: Any) -> RunConfig:
    """The settings with one option changed.

    Raises:
        PipelineError, pydantic.ValidationError: they do not go together.
    """
    path, _, name = option.rpartition(".")
    if not path:
        return dataclasses.replace(config, **{name: value})
    return replaced(config, path, dataclasses.replace(value_of(config, path), **{name: value}))


MATHEMATICS = ("model", "data", "optim", "loss", "train")
"""Parts that must not change when a run is resumed."""
HOW_TO_CONTINUE = (
    "name",
    "resume",
    "start_or_resume",
    "wait_for_lease",
    "accept_changes",
    "extend_to_epochs",
)
"""Settings of one execution: no later one takes them over."""
_FREE_ON_RESUME = {
    "train.accumulation",  # as the number of ranks: it changes the rounding of sums
    "train.activation_checkpointing",  # what is recomputed is the same
    "train.stop_after",
    "train.max_skipped",
    "train.rollbacks",
    "train.log_every",
    "data.shards",
    "data.source",  # as the URL: how the set came to be, not what it holds
    *(f"data.stream.{name}" for name in SAME_SAMPLES),
}


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionary -> {"a.b": value}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def changes(old: RunConfig, new: RunConfig) -> dict[str, str]:
    """Settings that differ, as `name: "old -> new"`; how a run is continued is none of them."""
    adapter = TypeAdapter(RunConfig)
    before = flatten(adapter.dump_python(old, mode="json"))
    after = flatten(adapter.dump_python(new, mode="json"))
    return {
        key: f"{before.get(key)} -> {after.get(key)}"
        for key in sorted(before.keys() | after.keys())
        if key not in HOW_TO_CONTINUE and before.get(key) != after.get(key)
    }


def decides_result(name: str) -> bool:
    """Whether a setting decides what is computed, beyond the rounding of sums."""
    return name.split(".")[0] in MATHEMATICS and name not in _FREE_ON_RESUME
