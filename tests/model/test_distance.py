import math
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.networks.linf import distance as module
from model.networks.linf.distance import (
    TRAINED_OPERATIONS,
    PowerMean,
    RankedSum,
    Subsets,
    distance,
    largest,
)
from model.networks.linf.sortnet import SortNetConfig
from pipeline.planner.meta_pass import LiveBytes

COEFFICIENTS = (0.5, 0.25, 0.15)


def brute(x, w, reduction):
    """The formulas, with the whole tensor of distances."""
    a = (x[:, None] - w).abs()
    if isinstance(reduction, PowerMean):
        return a.pow(reduction.p).sum(-1).pow(1 / reduction.p)
    c = torch.tensor(reduction.coefficients, dtype=x.dtype)
    return (a.sort(-1, descending=True).values[..., : len(c)] * c).sum(-1)


@pytest.fixture(
    params=[PowerMean(8.0), PowerMean(31.7), RankedSum((1.0,)), RankedSum(COEFFICIENTS)]
)
def reduction(request):
    return request.param


@pytest.fixture
def points(generator):
    x = torch.randn(7, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    w = torch.randn(11, 24, generator=generator, dtype=torch.float64, requires_grad=True)
    return x, w


@pytest.mark.parametrize("tile", [1, 100, 1 << 18])
def test_values_and_gradients_are_the_formulas_for_every_tile(reduction, points, monkeypatch, tile):
    monkeypatch.setitem(module._TILE_ELEMENTS, "cpu", tile)
    weights = torch.linspace(-1, 2, 77, dtype=torch.float64).view(7, 11)
    x, w = points
    found, expected = distance(x, w, reduction), brute(x, w, reduction)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    mine = torch.autograd.grad((found * weights).sum(), points)
    theirs = torch.autograd.grad((expected * weights).sum(), points)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_groups_see_their_subsets_only(reduction, points, generator):
    x, w = points
    inputs = torch.stack([torch.randperm(24, generator=generator)[:9] for _ in range(3)])
    outputs = torch.stack([torch.randperm(11, generator=generator)[:5] for _ in range(3)])
    found = distance(x[:, :9], w, reduction, Subsets(3, inputs, outputs))
    parts = [
        brute(x[3 * g : 3 * g + 3, :9], w[outputs[g]][:, inputs[g]], reduction) for g in range(3)
    ]
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-12, atol=0)
    mine = torch.autograd.grad(found.square().sum(), points)
    theirs = torch.autograd.grad(torch.cat(parts).square().sum(), points)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


def test_the_power_mean_approaches_the_maximum_from_above(points):
    x, w = points
    exact = distance(x, w, RankedSum((1.0,)))
    for p in (8.0, 100.0, 1000.0):
        mean = distance(x, w, PowerMean(p))
        assert (mean >= exact * (1 - 1e-12)).all()
        assert (mean <= exact * 24 ** (1 / p) * (1 + 1e-12)).all()


@pytest.mark.parametrize("p", [8.0, 1000.0])
def test_large_powers_stay_in_the_range_of_float32(p):
    x = torch.tensor([[1e-3, 2e-3, 0.0], [3e4, -1e4, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    y = distance(x, torch.zeros(1, 3), PowerMean(p))
    scale = (1 + 2.0**-p) ** (1 / p)
    torch.testing.assert_close(y[:2, 0], torch.tensor([2e-3 * scale, 3e4]), rtol=1e-3, atol=0)
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad[1, 0] == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize(("n", "count"), [(1024, 10), (40, 10), (96, 3), (7, 7), (13, 1)])
def test_largest_values_are_those_of_a_sort(generator, n, count):
    a = torch.randint(0, n, (5, 3, n), generator=generator).double()  # with ties
    values, indices = largest(a, count)
    assert torch.equal(values, a.sort(-1, descending=True).values[..., :count])
    assert torch.equal(a.gather(-1, indices), values)
    assert all(len(set(row.tolist())) == count for row in indices.flatten(0, 1))


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns, in bytes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_no_tensor_of_all_distances_is_made(reduction):
    x = torch.randn(64, 512, requires_grad=True)
    w = torch.randn(512, 512, requires_grad=True)
    with Largest() as seen:
        distance(x, w, reduction).sum().backward()
    everything = 4 * 64 * 512 * 512
    assert seen.bytes <= 2 * 4 * module._TILE_ELEMENTS["cpu"] < everything / 20


def test_mean_of_the_maximum_over_kept_inputs_is_the_sum_of_sorted_distances(generator):
    """The identity that lets training drop inputs instead of sorting (arXiv 2210.01787)."""
    q, draws = 0.6, 200_000
    x, w = torch.rand(2, 1, 9, generator=generator, dtype=torch.float64)
    sums = RankedSum(tuple(q * (1 - q) ** i for i in range(9)))
    a = (x - w).abs().expand(draws, -1)
    kept = torch.rand(draws, 9, generator=generator) < q
    maxima = torch.where(kept, a, 0.0).amax(1)
    error = 4 * float(maxima.std()) / math.sqrt(draws)
    assert float(distance(x, w, sums)) == pytest.approx(float(maxima.mean()), abs=error)


def test_sorted_distances_contain_linear_units_and_group_sort(generator):
    """On |x| <= B: weights -(2 (n - i) + 1) B keep the order; 2B on a group ranks it."""
    n, bound = 6, 1.0
    x = (2 * torch.rand(50, n, generator=generator, dtype=torch.float64) - 1) * bound
    c = torch.tensor([0.3, -0.2, 0.1, 0.25, -0.1, 0.05], dtype=torch.float64)
    offsets = (2 * torch.arange(n, 0, -1, dtype=torch.float64) + 1) * bound
    linear = distance(x, -offsets[None], RankedSum(tuple(c.tolist())))
    torch.testing.assert_close(linear[:, 0], (x + offsets) @ c, rtol=0, atol=1e-12)
    group = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64) * 2 * bound
    for rank in range(3):
        one = tuple(float(i == rank) for i in range(n))
        found = distance(x, -group[None], RankedSum(one))[:, 0] - 2 * bound
        expected = x[:, [1, 3, 4]].sort(1, descending=True).values[:, rank]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


class CountedElements(TorchDispatchMode):
    """Counts the elements on which additions, comparisons and logarithms or powers act."""

    kinds: ClassVar = {
        **dict.fromkeys(("sub", "add", "sum"), "additions"),
        **dict.fromkeys(("amax", "clamp", "clamp_"), "comparisons"),
        **dict.fromkeys(("log2", "log2_", "exp2", "exp2_"), "logarithms and powers"),
    }

    def __init__(self):
        super().__init__()
        self.counts = dict.fromkeys(TRAINED_OPERATIONS, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kind = self.kinds.get(func.__name__.split(".")[0])
        if kind:
            given = (*args, *(kwargs or {}).values())  # with what is written to
            self.counts[kind] += max(a.numel() for a in given if isinstance(a, torch.Tensor))
        return func(*args, **(kwargs or {}))


def test_the_operations_of_a_distance_are_those_that_a_power_mean_does():
    b, o, n = 40, 40, 300  # so many that what is done once per point does not count
    x, w = torch.rand(b, n), torch.rand(o, n, requires_grad=True)
    with CountedElements() as counted:
        distance(x.requires_grad_(), w, PowerMean(8.0)).sum().backward()
    for name, count in TRAINED_OPERATIONS.items():
        assert counted.counts[name] / (b * o * n) == pytest.approx(count, rel=0.05), name


class CountedCalls(LiveBytes):
    """Counts the operators beside the bytes that they hold."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def passes(device, b, o, n):
    """Operators and most bytes of both passes of a power mean on a device."""
    x, w = torch.rand(b, n, device=device), torch.rand(o, n, device=device)
    with CountedCalls() as seen:
        distance(x.requires_grad_(), w.requires_grad_(), PowerMean(8.0)).sum().backward()
    return seen.calls, seen.peak


def test_a_planned_network_needs_the_operators_of_one_tile_and_the_bytes_of_all(monkeypatch):
    monkeypatch.setattr(module, "_TILE_ELEMENTS", dict.fromkeys(("cpu", "meta"), 1000))
    planned, bytes_planned = passes("meta", 37, 50, 30)
    real, bytes_real = passes("cpu", 37, 50, 30)
    assert bytes_planned == bytes_real
    assert planned < 100 < real / 10
    assert passes("meta", 256, 5120, 5120)[0] == planned


def test_operations_of_a_sortnet_count_the_layers_that_training_sees():
    config = SortNetConfig(input_shape=(1, 4, 4), num_classes=3, width=10, depth=3, keep=0.5)
    pairs = 16 * 5 + 5 * 5 + 5 * 3
    assert config.operations()["additions"] == pytest.approx(7 * pairs)
