"""What a verification is said to cost, against the verifier itself."""

import dataclasses
import math
import tracemalloc

import numpy as np
import pytest
from pydantic import TypeAdapter

from model.networks.registry import build_network
from model.verifier.families.registry import family_of
from model.verifier.mathematics.matrix_bounds import bounds_of_matrix
from model.verifier.mathematics.rounding import PROGRAMS, VERIFIER
from model.verifier.operation_counts import bounds_work, gram_iteration, image_work
from pipeline.errors import PipelineError
from pipeline.plan import parse
from pipeline.planner.verify_time import verification
from pipeline.presets.registry import run_preset


class Counting(np.ndarray):
    """Counts the operations of products."""

    operations = 0.0

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **settings):
        plain = [x.view(np.ndarray) if isinstance(x, Counting) else x for x in inputs]
        if ufunc is np.matmul:
            a, b = (x[None] if x.ndim == 1 else x for x in plain[:2])
            b = b.T if plain[1].ndim == 1 else b
            count = math.prod(np.broadcast_shapes(a.shape[:-2], b.shape[:-2]))
            Counting.operations += 2.0 * count * math.prod(a.shape[-2:]) * b.shape[-1]
        if out:
            settings["out"] = tuple(x.view(np.ndarray) for x in out)
        result = getattr(ufunc, method)(*plain, **settings)
        return result.view(Counting) if isinstance(result, np.ndarray) else result


def counted(name, monkeypatch):
    """Operations of the bounds and of the pass of one image; and the configuration."""

    def counting(made):
        return lambda *args, **settings: made(*args, **settings).view(Counting)

    for made in ("tril", "pad", "zeros", "empty", "eye", "stack"):  # they forget what counts
        monkeypatch.setattr(np, made, counting(getattr(np, made)))
    config = dataclasses.replace(run_preset(name).model, **SMALLER.get(name, {}))
    network = build_network(config).float().eval()
    network.initialise(0)
    stored = TypeAdapter(type(config)).dump_python(config, mode="json")
    family, checked = family_of(stored, "network")
    tensors = {k: v.detach().numpy() for k, v in network.state_dict().items()}
    tensors = {k: np.nan_to_num(v, nan=1.0).view(Counting) for k, v in tensors.items()}
    Counting.operations = 0.0
    names = family.bounded(checked)
    matrices = {n: family.bound_matrix(checked, n, tensors[n]) for n in names}
    verified = family(checked, tensors, matrices)
    for program in (PROGRAMS["float32"], PROGRAMS["float64"], VERIFIER):
        verified.margin_error(np.ones(1), program)
    bounds = Counting.operations
    images = np.zeros((1, *config.input_shape), np.uint8)
    verified.evaluate(images)
    return stored, bounds, Counting.operations - bounds


SMALLER = {"digits-soc-mlp": {"hidden": 48}, "digits-liresnet": {"depth": 1, "dense_width": 64}}


@pytest.mark.parametrize(
    "name",
    ["digits", "digits-sll", "digits-cpl", "digits-aol", "digits-soc", "digits-soc-mlp",
     "digits-liresnet", "digits-bronet"],
)  # fmt: skip
def test_the_operations_are_those_of_the_verifier(name, monkeypatch):
    stored, bounds, image = counted(name, monkeypatch)
    planned = sum(step.operations for step in bounds_work(stored))
    assert 0.6 * planned < bounds < 1.4 * planned, (bounds, planned)
    one = image_work(stored).operations
    assert 0.7 * one < image < 1.3 * one, (image, one)


def test_the_memory_is_that_of_the_verifier():
    for shape in ((512, 512), (300, 700)):
        matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        tracemalloc.start()
        bounds_of_matrix(matrix)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        planned = 8 * gram_iteration(shape, 6)[1]
        assert 0.7 * planned < peak < 1.05 * planned, (peak, planned)


def test_a_billion_parameters_are_planned_matrix_by_matrix():
    network = run_preset("imagenet-L32W4096").model
    found = verification(network, images=50_000, gflops=20)
    assert len(found.steps) == 65
    assert {step.shape for step in found.steps} == {(4096, 4096)}
    operations = 8.0 * 4096**3 + 120 * 4096**2  # a Gram matrix, three squarings, a norm from below
    assert {step.operations for step in found.steps} == {operations}
    assert found.weights > 4e9
    assert found.bounds_s == pytest.approx(65 * operations / 20e9 + found.reading_s)
    assert found.peak < 1.2e9  # one matrix at a time, never the network
    several = verification(network, images=50_000, gflops=20, processes=8)
    assert several.bounds_s - several.reading_s == pytest.approx(9 * operations / 20e9)
    assert several.peak < 8 * found.peak + 1
    assert found.total_s == pytest.approx(found.bounds_s + 50_000 * found.image_s)
    faster = verification(network, images=50_000, gflops=200)
    assert faster.seconds(1e12) == found.seconds(1e12) / 10


@pytest.mark.parametrize("option", [["--verify-gflops", "0"], ["--verify-processes", "0"]])
def test_rates_that_are_none_are_refused(option):
    with pytest.raises(PipelineError, match=option[0]):
        parse(["digits", *option])
