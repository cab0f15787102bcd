"""The command `python -m model.verify`."""

import argparse
import re
import secrets
import sys
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from model.verifier.artifact import read_artifact
from model.verifier.certificate import COLUMNS, radii_of_table, read_certificate, read_samples
from model.verifier.errors import Near, RefusalError
from model.verifier.families.base import Family
from model.verifier.files import Body, Table
from model.verifier.mathematics.certificate_bounds import bound_matrices, check_bounds
from model.verifier.samples import (
    Unknown,
    certified_samples,
    check_errors,
    check_samples,
    check_table,
)
from model.verifier.shards import read_index


def verify(
    certificate: str,
    artifact: str,
    shards: str,
    sample: int | None = None,
    seed: int | None = None,
    processes: int = 1,
    eps: Iterable[str] = (),
) -> str:
    """Derive a certificate again.

    Args:
        certificate: URL of its folder or of certificate.json.
        artifact: URL of the model artifact.
        shards: URL of the shard set.
        sample: how many samples to evaluate; None for all.
        seed: of the choice among them; None to draw one.
        processes: how many bound matrices side by side.
        eps: radii of the printed table beside those that the certificate names.

    Returns:
        A short report.

    Raises:
        RefusalError: the first disagreement, or an input that cannot be used.
    """
    head, _, name = certificate.rpartition("/")
    folder = (head or ".") if name == "certificate.json" else certificate
    with np.errstate(all="ignore"):  # what overflows or is not a number proves nothing
        return _verify(folder, artifact, shards, sample, seed, processes, radii_of_table(eps))


def _verify(
    folder: str,
    artifact: str,
    shards: str,
    sample: int | None,
    seed: int | None,
    processes: int,
    asked: dict[str, Fraction],
) -> str:
    body = read_certificate(folder)
    samples = read_samples(folder, body)
    family, config, weights = read_artifact(artifact, body)
    network = family(config, weights, bound_matrices(config, weights, processes))
    check_bounds(network, weights, body)
    images = read_index(shards, config["num_classes"], body, samples)
    check_table(body, samples, Near(network.bound, network.same_bound))
    count = len(samples["key"])
    chosen, how = np.arange(count), ""
    if sample is not None and sample < count:
        seed = secrets.randbits(64) if seed is None else seed
        chosen = np.sort(np.random.default_rng(seed).choice(count, sample, replace=False))
        how = f", drawn with seed {seed}"
    largest, unknown = check_samples(network, images, samples, chosen, body)
    complete = len(chosen) == count
    check_errors(body, largest, complete)
    share = f"{len(chosen)} of {count} ({len(chosen) / count:.1%}){how}"
    return report(body, network, samples, asked, share, not_derived(network, unknown, complete))


UNDERIVED = {
    "code_version": "",
    "eps": " (the producer's choice of radii; --eps shows others)",
    "observed_lipschitz": " (positive, not above the bound)",
}
"""Fields of certificate.json that may be another without a disagreement, and what is known."""


def not_derived(network: Family, unknown: Unknown, complete: bool) -> list[str]:
    """What was accepted as it is stated."""
    found = [name + known for name, known in UNDERIVED.items()]
    if any(bounds.lower == 0 for bounds in network.matrices.values()):
        found.append("lower of layers that are no plain matrices (not above upper)")
    for name, count in unknown.items():
        if count:
            found.append(
                f"{name} of {count} samples, where nothing bounds the rounding of its program"
            )
    if not complete:
        found.append("errors and radii of samples that were not drawn")
    return found


def report(
    body: Body,
    network: Family,
    samples: Table,
    asked: dict[str, Fraction],
    share: str,
    underived: list[str],
) -> str:
    """What was checked, what was not derived, and the table."""
    columns, bound = body["columns"], network.bound
    lines = [
        f"OK: certificate {body['digest'][:12]} of model {body['model']['digest'][:12]}",
        f"family: {network.config['kind']}; radii proved in {network.norm} with the verifier's own "
        "bounds, sound and deployed",
        f"weights checked: all, {len(network.matrices)} matrices; network bound {bound:.9f}",
        f"samples checked: {share}",
        "not proved: nominal (recomputed within 1e-4, or its rounding); margins and predictions of "
        "deployed (within its rounding)",
        f"not derived: {'; '.join(underived)}",
        "".join(f"{text:>16}" for text in (f"eps ({network.norm})", *COLUMNS)),
        "".join(f"{text:>16}" for text in ("", *(columns[name]["program"] for name in COLUMNS))),
    ]
    rows = {"clean": [columns[name]["clean"] for name in COLUMNS]}
    radii = radii_of_table(body["eps"]) | asked
    found = [certified_samples(samples, name, radii) for name in COLUMNS]
    rows |= {eps: [each[eps] / len(samples["key"]) for each in found] for eps in radii}
    for eps, shares in rows.items():
        lines.append(f"{eps:>16}" + "".join(f"{value:>16.2%}" for value in shares))
    if vacuous := [name for name in COLUMNS if columns[name]["vacuous"]]:
        lines.append(f"vacuous: {', '.join(vacuous)}")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="model.verify", description="Derive a certificate again.")
    parser.add_argument("certificate", help="URL of its folder or of certificate.json")
    parser.add_argument("--artifact", required=True, help="URL of the model artifact")
    parser.add_argument("--data.shards", dest="shards", required=True, help="URL of the shard set")
    parser.add_argument("--sample", type=_natural, help="evaluate so many samples; default: all")
    parser.add_argument("--seed", type=_natural, help="of the choice of samples; default: drawn")
    parser.add_argument("--processes", type=_natural, default=1, help="bound matrices side by side")
    parser.add_argument("--eps", nargs="+", default=(), help="further radii, such as 36/255")
    options = parser.parse_args(arguments)
    try:
        text = verify(**vars(options))
    except RefusalError as error:
        title = "DISAGREEMENT" if error.status == 1 else "unusable input"
        sys.stderr.write(f"{title}: {error}\n")
        return error.status
    sys.stdout.write(text)
    return 0


def _natural(text: str) -> int:
    if not re.fullmatch("[0-9]{1,30}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a natural number")
    return int(text)
