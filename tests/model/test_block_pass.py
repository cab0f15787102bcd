"""The fast pass of a block against the operators of its formula."""

import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from model.networks.lipnext.layers import Block
from optim.manifolds import ORTHOGONAL, ask_trivialized
from tests.model.small_networks import filled, tiny_config

WIDTH = 20
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-4, torch.bfloat16: 0.1}


def block_of(generator, *, grid=(3, 5), distance=1, dtype=torch.float64, **changes):
    height, breadth = grid
    config = tiny_config(input_shape=(1, 2 * height, 2 * breadth), width=WIDTH, **changes)
    return filled(Block(config, distance), generator).to(dtype)


def ask(block, wanted=True):
    """For R^T dR and M^T dM."""
    for matrix in (block.R, block.M):
        ask_trivialized(matrix, wanted)
    return block


def tokens(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64).to(dtype)


def passed(block, x, gradient):
    leaf = x.detach().requires_grad_()
    out = block(leaf)
    return out, torch.autograd.grad(out, [leaf, *block.parameters()], gradient)


@pytest.mark.parametrize("fold", ["always", "never"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("grid", "changes"),
    [
        ((3, 5), {"alpha": 0.25}),
        ((1, 2), {"beta": 0.0}),
        ((2, 1), {"beta": 1.0, "position": False}),
        ((1, 1), {}),
        ((4, 5), {"distance": 2}),
    ],
)
def test_the_fast_pass_is_the_plain_one(grid, changes, dtype, fold, generator, monkeypatch):
    block = block_of(generator, grid=grid, dtype=dtype, fold=fold, **changes)
    x, g = (tokens(generator, 4, *grid, dtype=dtype) for _ in range(2))
    for layout in (x, x.transpose(1, 2).contiguous().transpose(1, 2)):
        before = layout.clone(), g.clone()
        out, fast = passed(block, layout, g)
        assert torch.equal(layout, before[0])
        assert torch.equal(g, before[1])
        monkeypatch.setattr(Block, "plain", True)
        expected, plain = passed(block, layout, g)
        monkeypatch.undo()
        assert torch.equal(out, expected)
        with torch.no_grad():
            assert torch.equal(block(layout), expected)
        for mine, theirs in zip(fast, plain, strict=True):
            scale = float(theirs.abs().max())
            torch.testing.assert_close(mine, theirs, rtol=0, atol=TOLERANCE[dtype] * scale)


def test_a_value_of_zero_has_the_gradient_that_torch_gives_it(generator, monkeypatch):
    block = block_of(generator, position=False)
    with torch.no_grad():
        block.b.zero_()
    x, g = torch.zeros(1, 3, 5, WIDTH, dtype=torch.float64), tokens(generator, 1, 3, 5)
    _, fast = passed(block, x, g)
    monkeypatch.setattr(Block, "plain", True)
    _, plain = passed(block, x, g)
    assert plain[-1].any()
    assert not plain[-1][: WIDTH // 2].any()
    for mine, theirs in zip(fast, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


@pytest.mark.parametrize("trivialized", [False, True])
@pytest.mark.parametrize("fold", ["always", "never"])
def test_gradients_of_gradients_are_those_of_the_plain_pass(
    trivialized, fold, generator, monkeypatch
):
    block = ask(block_of(generator, fold=fold), trivialized)
    x = tokens(generator, 2, 3, 5).requires_grad_()
    found = []
    for plain in (False, True):
        monkeypatch.setattr(Block, "plain", plain)
        sources = [x, block.R, block.M, block.b]
        first = torch.autograd.grad(block(x).pow(3).sum(), sources, create_graph=True)
        second = sum(gradient.square().sum() for gradient in first)
        found.append(torch.autograd.grad(second, [*sources, block.p]))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("fold", ["always", "never"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_gradients_of_the_matrices_in_the_lie_algebra(dtype, fold, generator):
    """X^T G for matrices that are not orthogonal, too, and nothing else is another."""
    block = block_of(generator, dtype=dtype, fold=fold, alpha=0.25)
    with torch.no_grad():
        block.R.mul_(1.5)
        block.M[0] += 1
    x, g = (tokens(generator, 4, 3, 5, dtype=dtype) for _ in range(2))
    out, ambient = passed(block, x, g)
    again, found = passed(ask(block), x, g)
    assert torch.equal(again, out)
    names = ["x", *dict(block.named_parameters())]
    for name, mine, theirs in zip(names, found, ambient, strict=True):
        assert mine.is_contiguous()
        if name not in "RM":
            assert torch.equal(mine, theirs)
            continue
        expected = getattr(block, name).detach().double().mT @ theirs.double()
        scale = float(expected.abs().max())
        torch.testing.assert_close(mine.double(), expected, rtol=0, atol=TOLERANCE[dtype] * scale)
        assert (mine - mine.mT).abs().max() > 0.1 * mine.abs().max()
        assert (mine + mine.mT).abs().max() > 0.1 * mine.abs().max()
    for mine, theirs in zip(passed(ask(block, False), x, g)[1], ambient, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-3)])
def test_norms_of_gradients_are_the_same_in_either_form(dtype, least, generator):
    """So clipping is: where X is orthogonal, and nearly so where it is rounded to bfloat16."""
    block = block_of(generator)
    with torch.no_grad():
        for matrix in (block.R, block.M):
            matrix.copy_(ORTHOGONAL.random((WIDTH, WIDTH), generator))
    block = block.to(dtype)
    x, g = (tokens(generator, 4, 3, 5, dtype=dtype) for _ in range(2))
    _, (_, *ambient) = passed(block, x, g)
    _, (_, *found) = passed(ask(block), x, g)
    for mine, theirs in zip(found[:2], ambient[:2], strict=True):
        ratio = float(mine.double().norm() / theirs.double().norm())
        assert abs(ratio - 1) < least


def test_a_matrix_alone_is_asked_for_its_form(generator):
    block = block_of(generator)
    x, g = (tokens(generator, 4, 3, 5) for _ in range(2))
    _, (_, R, M, *_) = passed(block, x, g)
    ask_trivialized(block.M, True)
    _, (_, same, found, *_) = passed(block, x, g)
    torch.testing.assert_close(same, R, rtol=0, atol=1e-12)
    torch.testing.assert_close(found, block.M.detach().mT @ M, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fold", ["always", "never"])
def test_trivialized_gradients_take_no_product_more(fold, generator):
    block = block_of(generator, fold=fold)
    x, flops = tokens(generator, 4, 3, 5), []
    for wanted in (False, True):
        ask(block, wanted)
        for recompute in (False, True):
            leaf = x.clone().requires_grad_()
            with FlopCounterMode(display=False) as counting:
                block(leaf, recompute=recompute).square().sum().backward()
            flops.append(counting.get_total_flops())
    less = 0 if fold == "always" else 2 * 60 * WIDTH**2
    assert [flops[0] - flops[2], flops[1] - flops[3]] == [less, less]


def kept_by(block, x, **options):
    """Shapes and bytes of what a forward pass keeps; parameters left out, each storage once."""
    kept = {}

    def save(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = (*tensor.shape, tensor.itemsize)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        block(x, **options)
    return sorted(kept.values())


@pytest.mark.parametrize(("fold", "inner"), [("always", (WIDTH,) * 2), ("never", (60, WIDTH))])
def test_a_block_keeps_what_its_products_read_and_a_byte_for_each_sign(fold, inner, generator):
    """No weight but as the parameter itself: ZeRO-3 takes the values away between the passes."""
    block = block_of(generator, dtype=torch.bfloat16, fold=fold)
    x = tokens(generator, 4, 3, 5, dtype=torch.bfloat16)
    least = [(4, 3, 5, WIDTH, 2), (60, WIDTH // 2, 1)]
    assert kept_by(block, x, recompute=True) == least
    assert kept_by(block, x) == sorted([*least, (60, WIDTH, 2), (*inner, 2)])


@pytest.mark.parametrize("fold", ["always", "never"])
def test_what_is_recomputed_is_the_same_and_no_more_than_needed(fold, generator):
    block = block_of(generator, fold=fold)
    x = tokens(generator, 4, 3, 5)
    found, flops = [], []
    for recompute in (False, True):
        leaf = x.clone().requires_grad_()
        with FlopCounterMode(display=False) as counting:
            block(leaf, recompute=recompute).square().sum().backward()
        flops.append(counting.get_total_flops())
        found.append([leaf.grad, *(p.grad for p in block.parameters())])
        block.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    again = 60 + WIDTH if fold == "always" else 2 * 60
    assert flops[1] - flops[0] == 2 * WIDTH**2 * again


def test_tokens_are_made_by_the_translation_the_products_and_the_signs_alone(generator):
    """No copy for a layout, a shift, a fold or a bias."""
    block = block_of(generator, dtype=torch.float32)
    x = tokens(generator, 4, 3, 5, dtype=torch.float32).requires_grad_()
    g = tokens(generator, 4, 3, 5, dtype=torch.float32)

    class Made(TorchDispatchMode):
        whole: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            given = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if out.nbytes == x.nbytes and out.data_ptr() not in given:
                self.whole.append(func.overloadpacket.__name__)
            return out

    with Made() as made:
        block(x).backward(g)
    assert made.whole == ["add", "mm", "addmm", "clone", "mm", "mm"]


def test_only_the_wanted_gradients_are_computed(generator):
    block = block_of(generator, fold="always").requires_grad_(False)
    x = tokens(generator, 4, 3, 5).requires_grad_()
    with FlopCounterMode(display=False) as counting:
        block(x).sum().backward()
    assert counting.get_total_flops() == 2 * WIDTH**2 * (4 * 60 + WIDTH)


@pytest.mark.integration
def test_kernels_equal_the_operators_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.model.fused_cases"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[0]) > 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_kernels_equal_the_operators_on_the_device():
    pytest.importorskip("triton")
    from model.networks.lipnext import ops
    from tests.model import fused_cases

    assert ops.uses_kernels(torch.empty(0, device="cuda"))
    assert fused_cases.check_all("cuda") > 30
