"""Attack the samples of a shard: accuracy under attack, and a test of the certificate itself.

`cra_sound <= true robust accuracy <= accuracy under attack`. The search runs in float32; whether a
point changes class is decided by the float64 program, the one that `cra_sound` speaks of.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from data_shards.format.shard_index import Shard, ShardIndex
from data_shards.streaming.sample_reader import ShardBatch, read_shard
from jobs.errors import EvaluationError
from jobs.evaluation.certify_tasks import ArtifactTask, ShardTask, in_program
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.sample_records import (
    ShardRecords,
)
from jobs.evaluation.suites import ATTACK_SUITES
from model.certification.eps import eps_value
from model.certification.rounding import FLOAT32, FLOAT64
from pipeline.run.evaluation_summary import AttackScores

INSIDE = 1 - 1e-6
"""Share of a radius that is searched: rounding cannot carry a point out of the open ball."""


class CertificateViolationError(EvaluationError):
    """A sample changes class inside its certified radius: the certificate or its code is wrong."""


@dataclass(frozen=True)
class Violation:
    """A point inside the certified ball of a sample that the float64 program puts elsewhere.

    Attributes:
        shard: name of the shard.
        key: key of the sample.
        radius: its certified radius.
        distance: of the point from the stored image, in float64; that it is below the radius was
            checked in exact arithmetic.
        certified: class that the certificate promises.
        found: class of the point.
    """

    shard: str
    key: str
    radius: float
    distance: float
    certified: int
    found: int

    def __str__(self) -> str:
        return (
            f"sample {self.key!r} of shard {self.shard}: class {self.found} at distance "
            f"{self.distance!r}, but class {self.certified} is certified up to {self.radius!r}"
        )


@dataclass(frozen=True)
class AttackRecords:
    """What the attacks did to one shard.

    Attributes:
        suite: name of the attack suite.
        robust: by eps ratio, whether each sample is classified correctly and no attack broke it.
        inside: number of samples attacked just inside their certified radius.
        violations: refutations of the certificate, confirmed in float64 with exact distances.
    """

    suite: str
    robust: Mapping[str, np.ndarray]
    inside: int
    violations: tuple[Violation, ...]


@dataclass(frozen=True, kw_only=True)
class AttackTask:
    """Attack the samples of one shard; `index` holds these samples and this shard only.

    Raises:
        EvaluationError: there is not one certificate per sample, or no such suite.
    """

    artifact: ArtifactTask
    index: ShardIndex
    batch_size: int
    eps: tuple[str, ...]
    """Ratios such as 36/255; these attacks keep pixels in [0, 1], as images do."""
    suite: str
    seed: int
    prediction: np.ndarray
    """Class of each sample that its sound certificate promises."""
    radius: np.ndarray
    """Sound certified radius of each sample."""

    @property
    def shard(self) -> Shard:
        """The shard."""
        return self.index.shards[0]

    def __post_init__(self) -> None:
        if self.suite not in ATTACK_SUITES:
            raise EvaluationError(
                f"no attack suite {self.suite!r}; known: {', '.join(ATTACK_SUITES)}"
            )
        counts = (len(self.index.rows), len(self.prediction), len(self.radius))
        if len(set(counts)) > 1:
            raise EvaluationError(
                f"shard {self.shard.file}: {counts[0]} samples, {counts[1]} predictions and "
                f"{counts[2]} radii"
            )

    def run(self) -> AttackRecords:
        """Attack every sample at every eps, and just inside its own radius.

        Randomness belongs to (seed, shard, batch), and batches are cut inside the shard: the result
        is the same for every number of tasks.

        Raises:
            ShardError: a sample's bytes differ from the index.
        """
        robust: dict[str, list[Tensor]] = {ratio: [] for ratio in self.eps}
        violations: list[Violation] = []
        inside = 0
        batches = read_shard(self.index, self.shard, self.batch_size)
        for number, batch in enumerate(batches):
            rows = slice(number * self.batch_size, number * self.batch_size + len(batch.keys))
            attack = _BatchAttack(self, batch, number, self.prediction[rows], self.radius[rows])
            inside += attack.inside_radius()
            for ratio, holding in attack.at_eps().items():
                robust[ratio].append(holding.cpu())
            violations += attack.violations
        return AttackRecords(
            suite=self.suite,
            robust={ratio: torch.cat(parts).numpy() for ratio, parts in robust.items()},
            inside=inside,
            violations=tuple(violations),
        )


class _BatchAttack:
    """The attacks on one batch, and the violations that they found."""

    def __init__(
        self,
        task: AttackTask,
        batch: ShardBatch,
        number: int,
        prediction: np.ndarray,
        radius: np.ndarray,
    ) -> None:
        device = task.artifact.device
        self.task, self.batch, self.number = task, batch, number
        self.single = in_program(task.artifact, FLOAT32.name)
        self.double = in_program(task.artifact, FLOAT64.name)
        self.images = batch.images.to(device).double() / 255
        self.labels = batch.labels.to(device)
        self.prediction = torch.from_numpy(prediction).to(device)
        self.radius = torch.from_numpy(radius).to(device)
        self.violations: list[Violation] = []

    def inside_radius(self) -> int:
        """Attack each sample anywhere in R^n just inside its radius; the number attacked."""
        attacked = self.radius > 0
        centres = self.images[attacked]
        self._refute(attacked.nonzero().squeeze(1), centres, self._classes(centres))
        # A radius may be infinite; no two images are further apart than this.
        diameter = math.sqrt(self.images[0].numel()) if self.single.norm == "l2" else 1.0
        eps = self.radius.clamp(max=diameter)
        self._attack("radius", self.prediction, eps, attacked, clip=False)
        return int(attacked.sum())

    def at_eps(self) -> dict[str, Tensor]:
        """By eps ratio, the samples that are classified correctly and hold against all attacks."""
        holding = self._classes(self.images) == self.labels
        found = {}
        for ratio in sorted(self.task.eps, key=eps_value):
            eps = torch.full_like(self.radius, eps_value(ratio))
            # What broke in a smaller ball is broken in this one.
            holding = self._attack(ratio, self.labels, eps, holding, clip=True)
            found[ratio] = holding
        return found

    def _attack(
        self, stage: str, classes: Tensor, eps: Tensor, attacked: Tensor, *, clip: bool
    ) -> Tensor:
        """Which of the attacked samples keep their class in the float64 program, bool (B,)."""
        suite = ATTACK_SUITES[self.task.suite]
        holding = attacked.clone()
        images = self.images.float()
        for name, method in suite.methods.items():
            rows = holding.nonzero().squeeze(1)
            if len(rows) == 0:
                break
            points = method(
                self.single,
                images[rows],
                classes[rows],
                eps[rows] * INSIDE,
                norm=self.single.norm,
                steps=suite.steps,
                restarts=suite.restarts,
                clip=clip,
                generator=self._generator(stage, name),
            )
            # The same step from the image itself, which float32 has rounded.
            moved = self.images[rows] + (points.double() - images[rows].double())
            moved = moved.clamp(0, 1) if clip else moved
            found = self._classes(moved)
            self._refute(rows, moved, found)
            holding[rows] = found == classes[rows]
        return holding

    def _refute(self, rows: Tensor, points: Tensor, found: Tensor) -> None:
        """Keep the points of another class than the certified one that lie inside the ball."""
        radius, certified = self.radius[rows], self.prediction[rows]
        order = 2 if self.single.norm == "l2" else math.inf
        distance = (points - self.images[rows]).flatten(1).norm(p=order, dim=1)
        suspects = (found != certified) & (distance <= radius * (1 + 1e-9))
        for i in suspects.nonzero().squeeze(1).tolist():
            row = int(rows[i])
            pixels = self.batch.images[row]
            if lies_inside(points[i], pixels, float(radius[i]), self.single.norm):
                violation = Violation(
                    shard=self.task.shard.file,
                    key=self.batch.keys[row],
                    radius=float(radius[i]),
                    distance=float(distance[i]),
                    certified=int(certified[i]),
                    found=int(found[i]),
                )
                self.violations.append(violation)

    @torch.no_grad()
    def _classes(self, images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            return self.double(images).argmax(1)

    def _generator(self, stage: str, method: str) -> torch.Generator:
        key = f"{self.task.seed}/{self.task.shard.file}/{self.number}/{stage}/{method}"
        digest = hashlib.sha256(key.encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def lies_inside(point: Tensor, pixels: Tensor, radius: float, norm: str) -> bool:
    """Whether a point lies in the open ball around a stored image, in exact arithmetic.

    Args:
        point: float64 (C, H, W).
        pixels: uint8 (C, H, W); the image is pixels / 255, not its float64 rounding.
        radius: radius of the ball, in pixels of [0, 1].
        norm: `l2` or `linf`.
    """
    if math.isinf(radius):
        return True
    pairs = zip(point.flatten().tolist(), pixels.flatten().tolist(), strict=True)
    steps = [Fraction(value) - Fraction(pixel, 255) for value, pixel in pairs]
    if norm == "linf":
        return max(map(abs, steps)) < Fraction(radius)
    return sum(step**2 for step in steps) < Fraction(radius) ** 2


def attack_tasks(
    config: EvaluationConfig, tasks: Sequence[ShardTask], records: Sequence[ShardRecords]
) -> list[AttackTask]:
    """Return one attack per shard, on the certificates that its task found.

    Args:
        config: suite, seed and eps.
        tasks: what was certified.
        records: their merged records, in the same order.

    Raises:
        EvaluationError: see AttackTask.
    """
    return [
        AttackTask(
            artifact=task.artifact,
            index=task.index,
            batch_size=task.batch_size,
            eps=config.eps,
            suite=config.attack,
            seed=config.attack_seed,
            prediction=found.columns["sound"].prediction,
            radius=found.columns["sound"].radius,
        )
        for task, found in zip(tasks, records, strict=True)
    ]


def merge_attack(parts: Sequence[AttackRecords], cra: Mapping[str, float]) -> AttackScores:
    """Return the scores of all shards.

    Args:
        parts: one per shard, all of one suite.
        cra: sound certified robust accuracy by eps ratio.

    Raises:
        CertificateViolationError: a sample changed class inside its certified radius, or the
            accuracy under attack is below the certified one.
    """
    violations = [violation for part in parts for violation in part.violations]
    refuted = {(violation.shard, violation.key) for violation in violations}
    if violations:
        raise CertificateViolationError(
            f"the certificate is refuted for {len(refuted)} samples; {violations[0]}"
        )
    robust = {ratio: np.concatenate([part.robust[ratio] for part in parts]) for ratio in cra}
    accuracy = {ratio: int(holding.sum()) / holding.size for ratio, holding in robust.items()}
    for ratio, certified in cra.items():
        if accuracy[ratio] < certified:
            raise CertificateViolationError(
                f"accuracy under attack at eps {ratio} is {accuracy[ratio]!r}, below the certified "
                f"{certified!r}"
            )
    suite = ATTACK_SUITES[parts[0].suite]
    return AttackScores(
        suite=parts[0].suite,
        methods=tuple(suite.methods),
        steps=suite.steps,
        restarts=suite.restarts,
        samples=next(iter(robust.values())).size,
        clipped=True,
        accuracy=accuracy,
        inside_radius_samples=sum(part.inside for part in parts),
        inside_radius_flips=len(refuted),
    )
