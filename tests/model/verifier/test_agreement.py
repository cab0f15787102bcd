"""Evaluator and verifier, written by two from one page, agree on networks of all families."""

import contextlib
import dataclasses
import warnings

import numpy as np
import pytest
import torch

from model.errors import ModelError
from model.networks.registry import build_network
from model.verifier import supported
from model.verifier.errors import DisagreementError, RefusalError
from model.verifier.families.registry import FAMILIES
from model.verifier.mathematics.conv_bounds import observed_norm
from model.verifier.mathematics.convolution import adjoint, convolve
from model.verify import main
from tests.model.certificate_maker import CONFIRMED
from tests.model.small_networks import trained_like
from tests.model.test_conformance import NETWORKS
from tests.model.verifier.honest import check, on_disk, stated
from tests.model.verifier.networks import draw, parsed
from tests.repetitions import mostly_slow

pytestmark = pytest.mark.integration


def network_of(config, seed=0):
    return trained_like(config, seed, torch.float32).requires_grad_(False)


@pytest.mark.parametrize("deployed", mostly_slow(["float32", "bfloat16"], ["float32"]))
@pytest.mark.parametrize("name", NETWORKS)
def test_an_honest_certificate_is_confirmed(name, deployed):
    found = stated(NETWORKS[name], network_of(NETWORKS[name]), deployed)
    assert (found.samples["sound_radius"] > 0).any()
    check(found)


def agree_on(seeds) -> int:
    """Compare random networks; how many the evaluator certified."""
    compared = 0
    for seed in seeds:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config, network, regime = draw(seed)
                found = stated(config, network)
        except (ModelError, ValueError, RuntimeError):
            continue  # the evaluator refuses what such weights cannot be certified for
        try:
            check(found)  # warnings are errors here
        except Exception as error:
            raise AssertionError(f"seed {seed}, {regime}: {error}; {config}") from error
        compared += 1
    return compared


@pytest.mark.slow
def test_random_networks_of_all_families():
    assert agree_on(range(24)) >= 12


def test_a_program_whose_rounding_nothing_bounds_is_not_compared():
    """SortNet, scale 1e15: float32 is used up, and its prediction is another one."""
    config, network, _ = draw(710)
    found = stated(config, network)
    assert found.body["columns"]["deployed"]["largest_error"] is None
    judged = check(found)
    assert (found.samples["nominal_prediction"] != found.samples["sound_prediction"]).all()
    compared = {name: list(column.compared) for name, column in judged.items()}
    nothing = [False] * len(compared["sound"])
    assert compared == {"nominal": nothing, "sound": [True] * len(nothing), "deployed": nothing}
    found.samples["deployed_radius"][0] = 1e-9  # where nothing is known, nothing is proved
    with pytest.raises(DisagreementError, match="deployed_radius"):
        check(found)
    found.samples["deployed_radius"][0] = 0
    found.samples["nominal_prediction"][0] = 99
    with pytest.raises(DisagreementError, match="no class"):
        check(found)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_random_networks_of_all_families():
    assert agree_on(range(1000)) >= 700


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"lipnext_colour"}))
def test_the_files_of_every_family_are_confirmed(name, tmp_path, capsys):
    config = dataclasses.replace(NETWORKS[name], input_shape=(3, 8, 8))
    case = on_disk(config, network_of(config), tmp_path)
    assert main(case.arguments) == CONFIRMED, capsys.readouterr().err


def test_every_family_is_supported():
    from model.networks.registry import FAMILIES as BUILT

    assert set(FAMILIES) == set(BUILT)
    assert not supported({"kind": "sandwich"})
    assert not supported({})


# No radius above the proof: not by the smallest step that the slack leaves.


@pytest.mark.parametrize("name", NETWORKS)
def test_a_radius_above_the_proof_is_refused(name):
    found = stated(NETWORKS[name], network_of(NETWORKS[name]))
    radius = found.samples["sound_radius"]
    i = int(radius.argmax())
    step = radius[i] * 2.0**-24 + 4 * found.body["columns"]["sound"]["largest_error"]
    radius[i] += 10 * step
    with pytest.raises(DisagreementError, match=r"sound_radius is .*"):
        check(found)


@pytest.mark.parametrize("name", ["lipnext", "sll", "liresnet"])
def test_a_vacuous_column_has_no_radius(name):
    """An honest bfloat16 column, its radii set to what would be worth stating."""
    found = stated(NETWORKS[name], network_of(NETWORKS[name]), "bfloat16")
    assert not found.samples["deployed_radius"].any()
    found.samples["deployed_radius"][:] = 1e-4  # within any tolerance of logits
    with pytest.raises(DisagreementError, match="deployed_radius"):
        check(found)


# Stored numbers that training would not leave behind


def soc(scale):
    config = parsed(kind="soc", input_shape=[1, 8, 8], num_classes=3, depth=2, stages=1, width=2,
                    terms=3)  # fmt: skip
    network = network_of(config)
    for block in network.blocks:
        block.convolution.scale *= scale
    return config, network


def jacobian_norm(config, network) -> float:
    double = build_network(config).double().eval().requires_grad_(False)
    double.load_state_dict(network.state_dict())
    x = torch.rand(1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(lambda z: double.features(z[None])[0], x)
    return float(torch.linalg.matrix_norm(jacobian.flatten(1), 2))


@pytest.mark.parametrize("scale", mostly_slow([-0.42, -4.0, 0.0, 3.0], [-0.42, 0.0]))
def test_the_sign_and_size_of_a_stored_scale_are_in_the_bound(scale):
    from tests.model.verifier.honest import derived

    config, network = soc(scale)
    verified = derived(stated(config, network))
    assert verified.bound >= jacobian_norm(config, network)
    assert verified.bound >= 1


STORED = {
    "soc_angles": ["convolution.scale", "after.angle"],
    "sortnet": ["head.weight", "centre.mean"],
    "liresnet": ["norm", "centre.mean"],
    "sll": ["log_q"],
}


@pytest.mark.parametrize("value", [-1.0, 0.0, 1e-30, 1e30])
@pytest.mark.parametrize(("name", "part"), [(n, p) for n in STORED for p in STORED[n]])
def test_any_stored_number_is_proved_or_refused(name, part, value):
    config, network = NETWORKS[name], network_of(NETWORKS[name])
    state = {
        n: torch.full_like(t, value) if part in n else t for n, t in network.state_dict().items()
    }
    network.load_state_dict(state)
    try:
        found = stated(config, network)
    except (ModelError, ValueError):
        return
    with contextlib.suppress(RefusalError):
        check(found)  # one line at the most, and no warning


@pytest.mark.parametrize("share", mostly_slow([0.98, 0.5, 1e-6, 0.0, -1.0], [0.98, -1.0]))
def test_a_stored_norm_that_is_below_the_true_one_is_refused(share):
    """The evaluator makes no such certificate; nominal radii follow the stored norm, as stated."""
    found = stated(NETWORKS["liresnet"], network_of(NETWORKS["liresnet"]))
    check(found)
    stored = found.tensors["blocks.1.norm"]
    found.tensors["blocks.1.norm"] = np.asarray(stored * np.float32(share), np.float32)
    if share:
        found.samples["nominal_radius"] = np.maximum(found.samples["nominal_radius"] / share, 0)
    with pytest.raises(DisagreementError, match=r"blocks\.1\.norm is .* is observed"):
        check(found)


def test_no_proof_asks_for_a_stored_norm(monkeypatch):
    """Sound and deployed radii are proved without it, whatever it is."""
    found = stated(NETWORKS["liresnet"], network_of(NETWORKS["liresnet"]))
    monkeypatch.setattr(FAMILIES["liresnet"], "refuted", lambda network: None)
    found.tensors["stem.norm"] = np.asarray(0.5, np.float32)
    found.samples["nominal_radius"] *= float(network_of(NETWORKS["liresnet"]).stem.norm) / 0.5
    check(found)
    found.samples["sound_radius"] *= 1.001
    with pytest.raises(DisagreementError, match="sound_radius"):
        check(found)


def test_observed_norms_are_below_and_close():
    """Against the whole operator's matrix."""
    random = np.random.default_rng(0)
    for stride, padding, side in ((1, 1, 3), (2, 2, 5), (3, 0, 2), (2, 1, 3)):
        kernel, shape = random.normal(size=(4, 2, side, side)), (7, 6)
        units = np.eye(2 * 7 * 6).reshape(-1, 2, *shape)
        operator = convolve(units, kernel, stride=stride, padding=padding).reshape(len(units), -1)
        y = random.normal(size=(3, 4, *convolve(units[:1], kernel, stride=stride,
                                                padding=padding).shape[2:]))  # fmt: skip
        back = adjoint(y, kernel, shape, stride=stride, padding=padding)
        np.testing.assert_allclose(back.reshape(3, -1), y.reshape(3, -1) @ operator.T, atol=1e-12)
        exact = np.linalg.norm(operator, 2)
        assert 0.999 * exact < observed_norm(kernel, shape, stride, padding) <= exact


def test_what_overflows_certifies_nothing():
    found = stated(NETWORKS["sll"], network_of(NETWORKS["sll"]))
    found.tensors["blocks.2.log_q"] = np.full_like(found.tensors["blocks.2.log_q"], 1e4)
    found.samples["sound_radius"][:] = 1e-9
    with pytest.raises(RefusalError):
        check(found)
