"""Whatever an artifact stores, its sign, zeros and sizes included, breaks no bound."""

import hashlib
import json

import pytest
import torch

from data_shards.storage.store import Store
from model.artifact.artifact import read_artifact, read_tensors, write_artifact
from model.artifact.safetensors_io import read_header
from model.certification.rounding import FLOAT32, FLOAT64
from model.certify import ProvedCertifier
from model.empirical_lipschitz import observed_lipschitz
from model.errors import ModelError
from model.networks.registry import build_network
from model.networks.soc.network import SocConfig
from model.networks.soc.skew_conv import remainder
from tests.model.small_networks import trained_like
from tests.model.test_conformance import NETWORKS


def stored(name):
    """A float32 network as an artifact holds it."""
    return trained_like(NETWORKS[name]).float().requires_grad_(False)


def double(network, name):
    copy = build_network(NETWORKS[name]).double().eval().requires_grad_(False)
    copy.load_state_dict(network.state_dict())
    return copy


def errors(network, norms, program):
    matrices = network.matrix_bounds()
    return network.margin_error(
        norms,
        program,
        matrices=matrices,
        largest_factor=float(network.margin_factor_bounds().max()),
    )


def images_of(network, generator):
    return torch.rand(4, *network.input_shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("factor", "terms"), [(-0.42, 3), pytest.param(-4.0, 15, marks=pytest.mark.slow)]
)
def test_the_constant_of_a_skew_convolution_does_not_ask_for_the_sign_of_its_scale(
    factor, terms, generator
):
    config = SocConfig(
        input_shape=(1, 4, 4), num_classes=3, depth=1, stages=1, width=2, terms=terms
    )
    network = trained_like(config)
    with torch.no_grad():
        for block in network.blocks:
            block.convolution.scale.mul_(factor)
    x = torch.rand(1, 4, 4, generator=generator, dtype=torch.float64)
    seen = 0.0
    for _ in range(10):
        jacobian = torch.autograd.functional.jacobian(lambda z: network.features(z[None])[0], x)
        _, singular, right = torch.linalg.svd(jacobian.flatten(1))
        seen = max(seen, float(singular[0]))
        x = x + 1.5 * right[0].view_as(x)
    bound = network.lipschitz_upper_bound().value
    assert 1.0001 < seen <= bound
    norms = torch.ones(1, dtype=torch.float64)
    with torch.no_grad():
        mirrored = errors(network, norms, FLOAT64)
        for block in network.blocks:
            block.convolution.scale.neg_()
    assert network.lipschitz_upper_bound().value == bound
    assert torch.equal(errors(network, norms, FLOAT64), mirrored)


def test_a_scale_that_was_never_stored_bounds_nothing():
    assert remainder(float("nan"), 15) == float("inf")
    network = build_network(NETWORKS["soc"]).double().eval()
    with torch.no_grad():
        for p in network.parameters():
            p.fill_(0.5)
    assert network.lipschitz_upper_bound().value == float("inf")


CHANGES = {
    "negative": lambda tensor: -tensor,
    "zero": torch.zeros_like,
    "large": lambda tensor: tensor * 1e12,
    "small": lambda tensor: tensor * 1e-12,
    "huge": lambda tensor: torch.full_like(tensor, 3e38) * tensor.sign(),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NETWORKS)
def test_no_stored_tensor_takes_a_bound_below_what_is_seen(name, change, generator):
    certified = 0
    for tensor_name in stored(name).state_dict():
        network = stored(name)
        tensor = network.state_dict()[tensor_name]
        tensor.copy_(CHANGES[change](tensor))
        exact = double(network, name)
        images = images_of(network, generator)
        norms = images.flatten(1).norm(dim=1)
        if network.norm == "linf":
            norms = images.flatten(1).amax(1)
        try:
            known = network.matrix_bounds()
            bound = network.lipschitz_upper_bound(known).value
            error = ProvedCertifier(network, FLOAT32, known)._error(norms)
        except ModelError:
            continue
        if bound == float("inf"):
            continue
        assert observed_lipschitz(exact, images, steps=3) <= bound * (1 + 1e-9), tensor_name
        if not bool(error.isfinite().all()):
            continue
        certified += 1
        logits, truth = network(images.float()).double(), exact(images)
        wrong = (logits - truth).unsqueeze(2) - (logits - truth).unsqueeze(1)
        assert bool((wrong.abs().amax((1, 2)) <= error).all()), (tensor_name, wrong, error)
    assert certified or change == "huge"


def test_a_row_that_is_normalised_to_zero_is_not_certified():
    network = stored("sll")
    norms = torch.ones(1, dtype=torch.float64)
    assert errors(network, norms, FLOAT32).isfinite().all()
    with torch.no_grad():
        network.head.weight.mul_(1e25)
    images = torch.rand(1, *network.input_shape)
    # The squares of the row overflow in float32, so the program sees the bias alone.
    assert torch.equal(network(images)[0], network.head.bias)
    assert errors(network, norms, FLOAT32).isinf().all()
    assert errors(network, norms, FLOAT64).isfinite().all()


def test_a_row_of_groupsort_that_is_divided_by_infinity_is_not_certified():
    network = stored("groupsort")
    norms = torch.ones(1, dtype=torch.float64)
    assert errors(network, norms, FLOAT32).isfinite().all()
    with torch.no_grad():
        network.head.weight.fill_(3e38)
    images = torch.rand(1, *network.input_shape)
    assert torch.equal(network(images)[0], network.head.bias)
    assert errors(network, norms, FLOAT32).isinf().all()
    assert errors(network, norms, FLOAT64).isfinite().all()


@pytest.mark.parametrize(
    ("name", "tensor", "value"),
    [
        ("lipnext_linear", "head.weight", 3e38),
        ("lipnext", "head.bias", 3e38),
        ("soc_mlp", "head.outer", 3e38),
        ("soc_mlp", "head.outer_bias", 3e38),
    ],
)
def test_logits_that_may_overflow_are_not_certified(name, tensor, value):
    network = stored(name)
    norms = torch.ones(1, dtype=torch.float64)
    assert errors(network, norms, FLOAT32).isfinite().all()
    with torch.no_grad():
        network.get_parameter(tensor)[0] = value
    assert errors(network, norms, FLOAT32).isinf().all()


def test_a_gain_that_a_program_may_flush_is_not_certified():
    network = stored("liresnet")
    layer = network.dense[0]
    norms = torch.ones(1, dtype=torch.float64)
    assert errors(network, norms, FLOAT32).isfinite().all()
    with torch.no_grad():
        layer.weight[:, :-1] *= 1e36
        layer.weight[:, -1] *= 1e-36
    assert errors(network, norms, FLOAT32).isinf().all()
    assert errors(network, norms, FLOAT64).isfinite().all()


def test_a_scale_that_a_program_may_flush_is_not_certified():
    network = stored("soc")
    layer = network.blocks[1].convolution
    norms = torch.ones(1, dtype=torch.float64)
    assert errors(network, norms, FLOAT32).isfinite().all()
    with torch.no_grad():
        layer.weight *= 1e36
        layer.scale *= 1e-36
    assert errors(network, norms, FLOAT32).isinf().all()
    assert errors(network, norms, FLOAT64).isfinite().all()


@pytest.mark.parametrize("factors", [(0.0, 1.0), (-1.0, -1.0), (0.5, 1.0)])
def test_a_stored_norm_below_the_observed_one_is_refused(factors):
    network = stored("liresnet")
    network.lipschitz_upper_bound()
    with torch.no_grad():
        for layer, factor in zip((network.stem, network.blocks[0]), factors, strict=True):
            layer.norm.mul_(factor)
    with pytest.raises(ModelError, match=r"stem stores .* as the norm of its convolution"):
        network.lipschitz_upper_bound()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tensor", ["blocks.1.convolution.scale", "blocks.1.after.angle"])
def test_an_artifact_with_a_value_that_is_not_finite_is_refused(tensor, value, tmp_path):
    config = NETWORKS["soc_angles" if tensor.endswith("angle") else "soc"]
    network = trained_like(config)
    opener = Store(str(tmp_path)).open
    tensors = (*network.named_parameters(), *network.named_buffers())
    write_artifact(opener, network_config=config, tensors=tensors, context={})
    path = tmp_path / "weights.safetensors"
    with path.open("rb") as stream:
        place = read_header(stream)[0][tensor]
    data = bytearray(path.read_bytes())
    entry = torch.tensor([value], dtype=torch.float32).numpy().tobytes()
    data[place.start : place.start + 4] = entry
    path.write_bytes(data)
    body = json.loads((tmp_path / "artifact.json").read_text())
    body["weights_sha256"] = hashlib.sha256(data).hexdigest()
    named = {key: body[key] for key in ("network", "weights_sha256")}
    text = json.dumps(named, sort_keys=True, separators=(",", ":"))
    body["digest"] = hashlib.sha256(text.encode()).hexdigest()
    (tmp_path / "artifact.json").write_text(json.dumps(body))
    with pytest.raises(ModelError, match=f"{tensor} holds values that are not finite"):
        read_artifact(opener)
    with pytest.raises(ModelError, match=f"{tensor} holds values that are not finite"):
        list(read_tensors(opener, [tensor]))
