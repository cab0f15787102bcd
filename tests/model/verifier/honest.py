"""Certificates of small networks as the evaluator makes them, in memory and on disk."""

import copy
import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from data_shards.sources.synthetic import synthetic
from data_shards.storage.store import Store
from data_shards.write import write_shard_set
from jobs.evaluate_cra import main as evaluate
from model.artifact.artifact import write_artifact
from model.certification.rounding import FLOAT32, FLOAT64, PROGRAMS
from model.certify import ProvedCertifier, certify, image_norms
from model.networks.base import CertifiedNetwork
from model.networks.config import NetworkConfig
from model.networks.registry import build_network
from model.verifier.families.base import Family
from model.verifier.families.registry import family_of
from model.verifier.mathematics.certificate_bounds import check_bounds
from model.verifier.samples import check_batch
from tests.model.certificate_maker import Case

PIXELS = 6


@dataclasses.dataclass
class Stated:
    """What the evaluator says of a network and some images."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    body: dict[str, Any]
    samples: dict[str, np.ndarray]
    pixels: np.ndarray


def on_disk(
    config: NetworkConfig, network: CertifiedNetwork, root: Path, *options: str, samples: int = 24
) -> Case:
    """Artifact, shard set and certificate of a network, made by the evaluation job."""
    case = Case(root)
    source = synthetic(
        classes=config.num_classes, size=config.input_shape[1], samples=8 * samples, seed=3
    )
    write_shard_set(source, str(case.shards))
    tensors = [*network.named_parameters(), *network.named_buffers()]
    write_artifact(Store(str(case.model)).open, network_config=config, tensors=tensors, context={})
    arguments = [*case.arguments[1:], "--out", str(case.certificate), "--cluster.launcher", "local"]
    evaluate([*arguments, "--no-record", *options])
    return case


@torch.no_grad()
def stated(config: NetworkConfig, network: CertifiedNetwork, deployed: str = "float32") -> Stated:
    """What the evaluator states of random images, without files.

    Raises:
        ModelError: it refuses.
    """
    generator = torch.Generator().manual_seed(7)
    shape = (PIXELS, *config.input_shape)
    pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    pixels[0], pixels[1] = 0, 255
    matrices = network.matrix_bounds()
    bound = network.lipschitz_upper_bound(matrices)
    plain = ProvedCertifier(network, FLOAT64, matrices)
    norms, labels = image_norms(pixels, network.norm), torch.zeros(PIXELS, dtype=torch.long)
    single, factors = _run(config, network, pixels, "float32")
    double, slopes = _run(config, network, pixels, "float64")
    serving = single if deployed == "float32" else _run(config, network, pixels, deployed)[0]

    def proved(program: str, logits: torch.Tensor) -> Any:
        certifier = ProvedCertifier(network, PROGRAMS[program], matrices)
        return certifier.certify(logits, norms, labels, slopes)

    found = {
        "nominal": certify(
            single, factors, labels, lipschitz=1.0, curvature=plain.curvature,
            radii=network.feature_radii,
        ),
        "sound": proved("float64", double),
        "deployed": proved(deployed, serving),
    }  # fmt: skip
    programs = {"nominal": FLOAT32.name, "sound": FLOAT64.name, "deployed": deployed}
    samples: dict[str, Any] = {"key": np.array([str(i) for i in range(PIXELS)], dtype=object)}
    columns = {}
    for name, part in found.items():
        for field in ("prediction", "rival", "margin", "radius"):
            samples[f"{name}_{field}"] = getattr(part, field).numpy()
        for field in ("margin", "radius"):
            samples[f"{name}_{field}"] = samples[f"{name}_{field}"].astype(np.float64)
        columns[name] = {
            "program": programs[name],
            "largest_error": _number(part.error.max()),
            "largest_error_ball": _number(part.error_ball.max()),
        }
    body = {
        "layers": [dataclasses.asdict(matrix) for matrix in matrices.values()],
        "parts": dict(bound.parts),
        "network_bound": bound.value,
        "head": {"kind": network.head_rule, "largest_factor": float(plain.factors.max())},
        "observed_lipschitz": bound.value / 2,
        "columns": columns,
    }
    body = json.loads(json.dumps(body, allow_nan=False))
    dumped = TypeAdapter(type(config)).dump_python(config, mode="json")
    tensors = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    return Stated(dumped, tensors, body, samples, pixels.numpy())


def _number(value: torch.Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None


def _run(
    config: NetworkConfig, network: CertifiedNetwork, pixels: torch.Tensor, program: str
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = PROGRAMS[program].dtype
    copied = build_network(config).to(dtype).eval()
    copied.load_state_dict(network.state_dict())
    images = pixels.to(torch.promote_types(dtype, torch.float32)) / 255
    return copied.logits_and_slopes(images)


class InMemory(dict):
    """Tensors by name, with the digests that a file of weights has."""

    def shape(self, name: str) -> tuple[int, ...]:
        return self[name].shape

    def sha256(self, name: str) -> str:
        return hashlib.sha256(self[name].tobytes()).hexdigest()


def derived(found: Stated) -> Family:
    """The verifier's network."""
    family, config = family_of(copy.deepcopy(found.config), "network")
    tensors = InMemory({k: np.array(v, np.float32, order="C") for k, v in found.tensors.items()})
    assert {name: t.shape for name, t in tensors.items()} == family.shapes(config)
    names = family.bounded(config)
    matrices = {name: family.bound_matrix(config, name, tensors[name]) for name in names}
    return family(config, tensors, matrices)


def check(found: Stated) -> dict:
    """Verify what was stated; returns what was derived by column.

    Raises:
        RefusalError: the verifier does not confirm it.
    """
    with np.errstate(all="ignore"):
        network = derived(found)
    check_bounds(network, network.tensors, found.body)
    return check_batch(network, found.pixels, found.samples, np.arange(PIXELS), found.body)
