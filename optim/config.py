"""Settings of the manifold Adam optimizer."""

import math
from typing import Annotated, Literal

import torch
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

from optim.matmul import Precision, unit_roundoff
from optim.matrix_exp import SeriesRule, check_series
from optim.retraction import RetractionRule

MANIFOLD_OPTIONS = (
    "retraction",
    "series",
    "increment",
    "gradient",
    "polar_every",
    "audit_every",
    "residual_limit",
)
"""Options of `OptimConfig` that say how matrices on a manifold are stepped, and nothing else."""

DRIFT_SHARE = 0.1
"""Of `residual_limit`: more is expected of no reduced precision that `auto` chooses, and measured
of none that it keeps."""

Rate = Annotated[float, Field(gt=0)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class OptimConfig:
    """Manifold Adam for matrices with a declared manifold, NAdam or AdamW for all others."""

    lr: Rate = 1e-3
    """Peak learning rate of the manifold matrices."""

    euclidean_lr_factor: Rate = 1.0
    """Learning rate of the Euclidean parameters, as a multiple of lr."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """Decay of the first and second moment, per step."""

    eps: Rate = 1e-8
    """Added to the root of the second moment."""

    retraction: Literal["exp", "fast"] = "exp"
    """Where an increment D takes X: to X exp(D), or in fewer products to X p(D), which is as near
    the manifold by proof and near X exp(D) to second order (`optim.retraction`)."""

    series: SeriesRule = "spectral"
    """Order of the exponential's series: by a proved truncation error, or by the paper's table."""

    increment: Literal["auto"] | Precision = "auto"
    """Precision of the products that make a matrix's increment (`optim.matrix_exp`); X stays
    float32.

    TF32 adds nothing to be seen to the drift away from the manifold, bf16 three to seven times
    what float32 has; neither is faster on a CPU. `auto` is tf32 on CUDA where the drift that is
    expected of it stays far below residual_limit, and full from the first audit on that finds more
    than a tenth of that limit; full elsewhere.
    """

    gradient: Literal["ambient", "trivialized"] = "ambient"
    """What the backward pass delivers of a matrix: its gradient G, of which the optimizer forms
    X^T G, or X^T G itself where the layer has it at hand, and one product is saved. Then nothing
    but the network may add to the gradient of a matrix, such as a penalty of one's own."""

    euclidean: Literal["nadam", "adamw"] = "nadam"
    """Update rule of the Euclidean parameters."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of the Euclidean parameters; 0: none."""

    lookahead_steps: Count = 6
    """Steps between two Lookahead synchronisations; 0 switches Lookahead off."""

    lookahead_factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the fast way that the slow copy follows at a synchronisation."""

    polar_every: Count = 200
    """Steps between two polar projections to the manifold; 0 switches them off."""

    audit_every: Count = 50
    """Steps between two measurements of ||X^T X - I||_F of every matrix; 0 switches them off."""

    residual_limit: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Residual beyond which a matrix is re-projected at once.

    Round-off and truncation leave less than 1e-4 between two projections; at 1e-3 the Lipschitz
    constant of one matrix is at most sqrt(1 + 1e-3), that of 96 in a row 1.05.
    """

    @property
    def rule(self) -> RetractionRule:
        """How a matrix moves: "fast", or the rule of the exponential's series."""
        return "fast" if self.retraction == "fast" else self.series

    def precision(self, device: str, largest: int) -> Precision:
        """Precision of a matrix's increment before any audit.

        In s steps rounded factors move ||X^T X - I||_F by about 0.7 u^2 ||M||_F sqrt(s)
        (`optim.matrix_exp`), and Adam's entries are about lr at most, so ||M||_F by lr n.

        Args:
            device: Kind of the device, as torch calls it.
            largest: Rows of the largest matrix.
        """
        if self.increment != "auto":
            return self.increment
        audited = self.audit_every > 0 and self.polar_every > 0
        if device != "cuda" or self.rule == "frobenius" or not audited:
            return "full"
        u = unit_roundoff(torch.float32, "tf32")
        drift = 0.7 * u * u * self.lr * largest * math.sqrt(self.polar_every)
        return "tf32" if drift <= self.residual_limit * DRIFT_SHARE else "full"

    def without_effect(self) -> dict[str, str]:
        """Options that the others leave without effect: name -> the setting that does so.

        Both Euclidean rules use all of theirs: learning rate, betas, eps and weight decay.
        """
        found = {}
        if self.retraction == "fast":
            found["series"] = "retraction=fast"
        if not self.lookahead_steps:
            found["lookahead_factor"] = "lookahead_steps=0"
        if not self.audit_every:
            found["residual_limit"] = "audit_every=0"
        return found

    @model_validator(mode="after")
    def _check(self) -> "OptimConfig":
        if self.increment != "auto":
            check_series(self.series, self.increment)
        return self
