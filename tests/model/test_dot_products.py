"""Evaluation is made of sums of products: of nothing whose rounding a library keeps to itself."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model.certification.dot_products import convolve, product
from model.certification.rounding import BFLOAT16, FLOAT32, FLOAT64, PROGRAMS, ErrorState, gamma
from model.networks.registry import build_network
from tests.model.small_networks import trained_like
from tests.model.test_conformance import NETWORKS
from tests.repetitions import mostly_slow


class Refusing(TorchDispatchMode):
    """Notes every convolution, every Fourier transform and every product of complex matrices."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        tensors = [tensor for tensor in args if isinstance(tensor, torch.Tensor)]
        if "conv" in name or "fft" in name:
            self.seen.add(name)
        if name in {"mm", "bmm", "addmm", "baddbmm", "dot", "mv"} and any(
            tensor.is_complex() for tensor in tensors
        ):
            self.seen.add(f"complex {name}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("program", mostly_slow(PROGRAMS, ["float32"]))
def test_evaluation_has_no_product_of_unknown_rounding(name, program):
    config = NETWORKS[name]
    network = build_network(config).to(PROGRAMS[program].dtype).eval().requires_grad_(False)
    network.load_state_dict(trained_like(config).state_dict())
    images = torch.rand(2, *config.input_shape)
    with Refusing() as noted:
        network.logits_and_slopes(
            images.to(torch.promote_types(network_type(network), images.dtype))
        )
    assert not noted.seen


def network_type(network):
    return next(network.parameters()).dtype


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_convolution_by_products_is_rounded_once(generator, dtype):
    x = torch.randn(2, 5, 6, 7, generator=generator).to(dtype)
    kernel = torch.randn(3, 5, 3, 3, generator=generator).to(dtype)
    found = convolve(x, kernel, stride=1, padding=1)
    exact = F.conv2d(x.double(), kernel.double(), padding=1)
    sizes = F.conv2d(x.double().abs(), kernel.double().abs(), padding=1)
    program = {p.dtype: p for p in PROGRAMS.values()}[dtype]
    assert found.dtype == dtype
    allowed = program.activation * exact.abs() + 2 * gamma(45, program.accumulation) * sizes
    assert ((found.double() - exact).abs() <= allowed).all()


def test_products_of_real_and_complex_matrices(generator):
    real = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    other = torch.randn(3, 4, 4, generator=generator, dtype=torch.complex128)
    for a in (real, other, other.mH):
        for b in (real, other, other.mH):
            expected = torch.einsum("...ik,...kj->...ij", a.to(other.dtype), b.to(other.dtype))
            torch.testing.assert_close(product(a, b).to(other.dtype), expected)


@pytest.mark.parametrize("program", [FLOAT64, FLOAT32, BFLOAT16])
def test_a_pixel_is_charged_a_reciprocal_and_the_rounding_of_what_is_given(program):
    u, n = program.wide, torch.tensor([7.0], dtype=torch.float64)
    # No program is more wrong than this before it subtracts: x + delta given in its wide type ...
    before = gamma(3, u) * n
    size = n + 0.5 * 16**0.5
    error = before + u * (size + before)
    error = error + program.activation * (size + error)
    assert torch.equal(ErrorState.images(n, 16, program).error, error)
    # ... and x / 255 as x * fl(1 / 255), which is two roundings and more than one can explain.
    k = torch.arange(1, 256, dtype=torch.float64)
    reciprocal = (k.float() * torch.tensor(1 / 255, dtype=torch.float32)).double()
    worst = float(((reciprocal - k / 255).abs() / (k / 255)).max())
    assert FLOAT32.wide < worst <= gamma(3, FLOAT32.wide)
