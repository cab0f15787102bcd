"""LipNeXt (arXiv 2601.18513)."""

import dataclasses
import math
from typing import cast

import torch
from torch import Tensor, nn

from model.certification.matrix_bounds import Matrices
from model.certification.rounding import SLACK, ErrorState, Program, gamma
from model.networks.base import CertifiedNetwork, LipschitzBound
from model.networks.head import Head
from model.networks.lipnext.config import LipNeXtConfig
from model.networks.lipnext.layers import Block, Stem, flat_pool, l2_pool


class LipNeXt(CertifiedNetwork):
    """Stem, blocks, a pool of the grid, linear head."""

    norm = "l2"

    def __init__(self, config: LipNeXtConfig) -> None:
        super().__init__(config)
        self.pool, self.pool_tau = config.pool, config.pool_tau
        self.pool_windows = config.pool_windows
        self.stem = Stem(config)
        self.blocks = nn.ModuleList(Block(config, distance) for distance in config.shift_distances)
        if config.pool != "flat":
            # A norm squares the signs away, so the last activation would change no bit.
            cast(Block, self.blocks[-1]).absolute = 0
        self.head = Head(config.features, config.num_classes, config.head)

    def tokens(self, images: Tensor) -> Tensor:
        """What the pool sees, shape (B, H, W, C); see logits_and_margin_factors."""
        self.check_images(images)
        x = self.stem(images)
        for block in self.blocks:
            x = block(x, recompute=self.recomputes(block))
        return x

    def features(self, images: Tensor) -> Tensor:
        """See CertifiedNetwork."""
        tokens = self.tokens(images)
        if self.pool == "flat":
            return flat_pool(tokens)
        return l2_pool(tokens, self.pool_tau, self.pool_windows)

    @property
    def bounded_matrices(self) -> tuple[str, ...]:
        """See CertifiedNetwork."""
        blocks = (f"blocks.{i}.{matrix}" for i in range(len(self.blocks)) for matrix in "RM")
        return ("stem.weight", *blocks)

    def lipschitz_upper_bound(self, matrices: Matrices | None = None) -> LipschitzBound:
        """sigma(stem) * product over blocks of sigma(M) sigma(R)^2, each factor proved.

        Translations, shift, beta-Abs and pool are 1-Lipschitz exactly.
        """
        known = self.matrix_bounds() if matrices is None else matrices
        parts = {"stem": known["stem.weight"].upper}
        for i in range(len(self.blocks)):
            r, m = known[f"blocks.{i}.R"].upper, known[f"blocks.{i}.M"].upper
            parts[f"blocks.{i}"] = r * r * m
        return LipschitzBound.product(parts, self._factors(known))

    def _factors(self, known: Matrices) -> list[float]:
        """Norms of all products of the forward pass, in order."""
        factors = [known["stem.weight"].upper]
        for i in range(len(self.blocks)):
            r, m = known[f"blocks.{i}.R"].upper, known[f"blocks.{i}.M"].upper
            factors += [r, r, m]
        return factors

    @torch.no_grad()
    def margin_error(
        self, norms: Tensor, program: Program, *, matrices: Matrices, largest_factor: float
    ) -> Tensor:
        """See CertifiedNetwork; docs/explanation/certificate.md section 5."""
        stem, width = matrices["stem.weight"], self.stem.weight.shape[0]
        height, breadth = self.input_shape[1:]
        tokens = height * breadth // self.stem.patch**2
        state = ErrorState.images(norms, math.prod(self.input_shape), program)
        state.multiply(self.stem.used, upper=stem.upper, absolute=stem.absolute)
        for i, block in enumerate(self.blocks):
            _carry_through_block(state, cast(Block, block), f"blocks.{i}", tokens, matrices)
        if self.pool != "flat":  # which rounds nothing
            floor = self.pool_windows**2 * width * self.pool_tau**2
            pooled = (state.computed**2 + floor).sqrt()
            window = tokens // self.pool_windows**2
            state.error = state.error + gamma(window + 4, program.wide) * pooled
            state.norm = (state.norm**2 + floor).sqrt()
            state.note(state.computed)
        error = self.head.margin_error(state, largest_factor)
        operations = (8 * len(self.blocks) + 16) * tokens * (width + 1) ** 2
        growth = _amplification(self._factors(matrices)) * max(1.0, largest_factor)
        size = 2 * state.peak.clamp(min=1) / self.pool_tau
        underflow = operations * program.tiny * growth * size
        return state.finish(error, underflow)


def _amplification(factors: list[float]) -> float:
    """Bound of what any part of the network multiplies an error by."""
    return math.prod(max(1.0, factor) for factor in factors)


def _carry_through_block(
    state: ErrorState, block: Block, name: str, tokens: int, matrices: Matrices
) -> None:
    """One block: p, R, then M R^T in whichever of its two forms has the larger error."""
    r, m, program = matrices[f"{name}.R"], matrices[f"{name}.M"], state.program
    width = r.shape[0]
    if block.p is not None:
        state.translate(math.sqrt(width) * _norm(block.p))
    state.multiply(width, upper=r.upper, absolute=r.absolute)
    bias = math.sqrt(tokens) * _norm(block.b)
    folded = dataclasses.replace(state)
    state.multiply(width, upper=r.upper, absolute=r.absolute)
    state.multiply(width + 1, upper=m.upper, absolute=m.absolute, bias=bias, roundings=2)
    # The rounding of the product P = M R^T itself, entrywise below kappa |M| |R^T|.
    fold = program.product(width, copies=2) * m.absolute * r.frobenius
    upper = m.upper * r.upper
    absolute = math.sqrt(width) * (upper + fold)
    rounding = fold * folded.computed
    folded.multiply(width + 1, upper=upper, absolute=absolute, bias=bias, roundings=2)
    folded.error = folded.error + rounding
    folded.note(folded.computed)
    state.error = torch.maximum(state.error, folded.error)
    state.note(folded.peak)


def _norm(parameter: Tensor) -> float:
    return float(parameter.double().norm()) * SLACK
