"""The radius of one sample: section 6 of docs/explanation/certificate.md.

What is proved is proved at the stated radius r itself. With f the real function of the stored
weights, m_j = f_c - f_j and y the verifier's own float64 logits, g_j = y_c - y_j:

    m_j(x)         >= g_j - E_64(N)                  (E_64: the error of float64 margins)
    m_j(x + delta) >= m_j(x) - used_j(r)             (||delta|| < r; used_j: by L and the head)
    the program's margin at x + delta >= m_j(x + delta) - E(N + r)

So if g_j - E_64(N) - E(N + r) >= used_j(r) for every rival j, then c is the class of f and of the
program on the whole open ball. No bound, error or logit that the certificate states enters.
"""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from model.verifier.families.base import Family
from model.verifier.mathematics.linear_head import Classes
from model.verifier.mathematics.rounding import GUARD, VERIFIER, Floats, Program

SLACK = 2.0**-26
"""What the producer takes off so that another program's proof is not below its own (section 6)."""


class Judged(NamedTuple):
    """What is derived for a batch of images, given their predicted classes."""

    margins: Floats
    """g_j of the verifier's logits, shape (B, K); infinite at the prediction itself."""
    radii: Floats
    """The document's radius for every rival, (B, K); infinite at the prediction itself."""
    proved: npt.NDArray[np.bool_]
    """Whether the stated radius is proved, shape (B,)."""
    error: Floats
    """E_x, shape (B,); 0 for nominal."""
    error_ball: tuple[Floats, Floats]
    """Limits of E_ball, shape (B,): it follows from the program's own margins."""
    compared: npt.NDArray[np.bool_]
    """Whether anything bounds the program's rounding, shape (B,), so that it can be compared."""


def image_norms(images: npt.NDArray[np.uint8], norm: str) -> Floats:
    """N of every image, shape (B,); the sum of squares is exact in integers."""
    flat = images.reshape(len(images), -1).astype(np.int64)
    if norm == "linf":
        return flat.max(axis=1) / 255 * (1 + GUARD)
    return np.sqrt(np.square(flat).sum(axis=1).astype(np.float64)) / 255 * (1 + GUARD)


def nominal(network: Family, values: Floats, local: Any, prediction: Classes) -> Judged:
    """What papers report: no rounding is accounted for, and nothing is proved."""
    margins = _margins(values, prediction)
    with np.errstate(all="ignore"):
        found = network.head.nominal_radii(margins, local, prediction) / network.nominal_bound
    zero = np.zeros(len(values))
    every = zero == 0
    return Judged(margins, without(found, prediction), every, zero, (zero, zero), every)


@np.errstate(all="ignore")  # what is not a number proves nothing
def judge(
    network: Family,
    program: Program,
    values: Floats,
    local: Any,
    norms: Floats,
    prediction: Classes,
    stated: Floats,
) -> Judged:
    """Derive radii of `sound` or `deployed`, and prove the stated ones.

    Args:
        network: the network.
        program: whose predictions the column is about.
        values: the verifier's float64 logits, shape (B, K).
        local: what the head knows of every image.
        norms: bounds of the norms of the images, shape (B,).
        prediction: stated classes, shape (B,).
        stated: stated radii, shape (B,).
    """
    margins = _margins(values, prediction)
    local = network.settle(local, norms, VERIFIER)
    own, at_image = network.margin_error(norms, VERIFIER), network.margin_error(norms, program)

    def reached(left: Floats) -> Floats:
        found = network.head.radii(left, local, prediction) / network.bound
        return without(np.where(np.isnan(found), 0.0, found), prediction)

    def ball(left: Floats) -> Floats:
        first = np.maximum(reached(left).min(axis=1), 0.0)
        return network.margin_error((norms + first) * (1 + GUARD), program)

    # The program's margins differ from the verifier's by the errors of both.
    apart = (at_image + own)[:, None]
    low, high = ball(margins - apart), ball(margins + apart)
    middle = ball(margins)
    taken = (3 if program.name == "float64" else 1) * at_image + middle
    left = margins - taken[:, None] - SLACK * (margins + (at_image + middle)[:, None])
    radii = reached(left) * (1 - SLACK)

    within = network.margin_error((norms + stated) * (1 + GUARD), program)
    remains = margins * (1 - GUARD) - own[:, None] - within[:, None]
    used = network.head.used(stated * network.bound * (1 + GUARD), local, prediction) * (1 + GUARD)
    holds = without(remains, prediction) >= _with_prediction(used, prediction, 0.0)
    proved = (stated == 0) | (np.isfinite(stated) & (stated > 0) & holds.all(axis=1))
    radii, known = without(radii, prediction), np.isfinite(at_image)
    return Judged(margins, radii, proved, at_image, (low, high), known)


def _margins(values: Floats, prediction: Classes) -> Floats:
    margins = values[np.arange(len(values)), prediction][:, None] - values
    return without(margins, prediction)


def without(values: Floats, prediction: Classes) -> Floats:
    """Leave the prediction itself out of a minimum over rivals."""
    return _with_prediction(values, prediction, np.inf)


def _with_prediction(values: Floats, prediction: Classes, value: float) -> Floats:
    values = values.copy()
    values[np.arange(len(values)), prediction] = value
    return values
