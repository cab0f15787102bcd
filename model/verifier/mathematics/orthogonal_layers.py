"""1-Lipschitz layers of LiResNet and BRONet: docs/explanation/families.md."""

import math

import numpy as np

from model.verifier.mathematics.cholesky import Rows, condition, orthonormal, program_error
from model.verifier.mathematics.eigen_bounds import Complexes, Matrices, adjoint, multiply
from model.verifier.mathematics.matrix_bounds import MatrixBounds, frobenius
from model.verifier.mathematics.rounding import (
    ROUND_UP,
    VERIFIER,
    ErrorState,
    Floats,
    Program,
    U,
    gamma,
    kappa,
)

CHOLESKY, REFLECTION, NECK = 1e-3, 1e-7, 1e-5
PHASE = 64
"""exp(i theta) is computed within so many u."""


def scaled_rows(weight: Floats, depth: int) -> Floats:
    """depth^-1/2 gain V of a tensor (V | gain)."""
    return weight[:, :-1] * (weight[:, -1:] * depth**-0.5)


def dense_rows(weight: Floats, depth: int, share: float, *, transposed: bool) -> Rows:
    """X of a dense layer: the stored matrix, or [I; 0] + depth^-1/2 gain V."""
    stored = scaled_rows(weight, depth) if depth else weight
    one = np.eye(*stored.shape) if depth else np.zeros(1)
    X, size = one + stored, float(np.square(one + np.abs(stored)).sum())
    return Rows((X.T if transposed else X)[None], share, size, 0.0)


def wave_rows(weight: Floats, depth: int, rank: int, torus: tuple[int, int]) -> Rows:
    """X of a circular 3 x 3 convolution V: V^(f)^* at every frequency."""
    channels = len(weight)
    stored = scaled_rows(weight, depth).reshape(channels, rank, 3, 3)
    one = np.zeros_like(stored)
    one[:, :, 1, 1] = np.eye(channels, rank)
    kernel = np.zeros((channels, rank, *torus))
    kernel[:, :, :3, :3] = one + stored
    spectrum = to_waves(kernel).transpose(2, 3, 0, 1).reshape(-1, channels, rank)
    sizes = (one + np.abs(stored)).sum(axis=(2, 3))
    size = float(np.square(sizes).sum()) / math.prod(torus)
    # Each axis: a dot product of complex numbers, and the phases.
    entries = sum(gamma(4 * (n + 2), U) / U + PHASE for n in torus)
    return Rows(adjoint(spectrum), REFLECTION, size, entries)


def bounds_of_rows(weight: Floats, rows: Rows) -> MatrixBounds:
    """The certificate's numbers of such a layer."""
    m = rows.X.shape[-2]
    size = frobenius(weight) * ROUND_UP
    return MatrixBounds(1.0, 0.0, math.sqrt(m), size, condition(rows))


def to_waves(x: Floats) -> Matrices:
    """Unitary transform of real images (..., H, W): the half (..., H, W // 2 + 1) that says all."""
    rows, columns = _waves(x.shape[-2]), _waves(x.shape[-1])
    return multiply(rows, multiply(x, columns[:, : x.shape[-1] // 2 + 1]))


def from_waves(half: Matrices, width: int) -> Floats:
    """Inverse of `to_waves`."""
    rows, columns = _waves(half.shape[-2]), _waves(width)
    # All columns but the first and, for an even width, the last stand for two.
    count = np.full((half.shape[-1], 1), 2.0)
    count[0] = 1
    if width % 2 == 0:
        count[-1] = 1
    back = columns[:, : half.shape[-1]].conj().T * count
    return multiply(multiply(rows.conj().T, half), back).real


def _waves(n: int) -> Complexes:
    """exp(-2 pi i j k / n) / sqrt(n)."""
    ticks = np.arange(n)
    result: Complexes = np.exp(-2j * np.pi * (np.outer(ticks, ticks) % n) / n) * n**-0.5
    return result


class Orthonormal:
    """Q of one layer, and what its rounding adds."""

    def __init__(self, rows: Rows, rho: float) -> None:
        self.rows, self.rho = rows, rho
        self.Q, self.own_error = orthonormal(rows, rho)
        self.m, self.k = rows.X.shape[-2:]
        self.complex = np.iscomplexobj(rows.X)

    def error(self, program: Program) -> float:
        """How far a computed Q is from Q."""
        if program.name == VERIFIER.name:
            return self.own_error
        return program_error(self.rows, self.rho, program)

    def carry_rows(self, state: ErrorState) -> None:
        """Q x."""
        eps, X = self.error(state.program), state.size
        own = kappa(self.k + 1, state.program, copies=0, roundings=1) * math.sqrt(self.m)
        state.see(math.sqrt(self.m) * (1 + eps) * X)
        state.e = state.e + (own * (1 + eps) + eps) * X
        state.see(state.size)

    def carry_reflection(self, state: ErrorState) -> None:
        """X - 2 Q^* Q x: t = Q x first, then the second product, which passes ||Q|| <= 1 + eps."""
        program, eps, X = state.program, self.error(state.program), state.size
        c, r = (4 if self.complex else 1), self.m
        root = math.sqrt(r) * (1 + eps)
        t, e_t = (1 + eps) * X, kappa(c * self.k, program, copies=0, roundings=2) * root * X
        second = 2 * kappa(c * r, program, copies=0, roundings=3) * root * (t + e_t)
        last = gamma(4, program.stored) * (X + 2 * root * (t + e_t))
        state.see(X + 2 * root * (t + e_t))
        state.e = state.e + 2 * eps * (2 + eps) * X + 2 * (1 + eps) * e_t + second + last
        state.see(state.size)


def carry_transform(state: ErrorState, torus: tuple[int, int]) -> None:
    """A unitary transform: the sizes of its terms have the norm sqrt(N) on an axis."""
    u, tau = state.program.wide, 0.0
    for n in torus:
        axis = math.sqrt(n) * (gamma(4 * (n + 2), u) + PHASE * u)
        tau += axis + tau * axis
    state.round(tau)
