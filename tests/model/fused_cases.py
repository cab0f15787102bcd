"""The kernels against the operators of torch, case by case.

`TRITON_INTERPRET=1 python -m tests.model.fused_cases` runs all on a processor; the variable must be
set before Triton is imported, hence a process of its own.
"""

import itertools
import sys

import torch

from model.networks.lipnext import ops, triton_kernels
from model.networks.lipnext.layers import Block
from tests.model.small_networks import filled, tiny_config

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Grids of tokens (B, H, W), channels, of which shifted in each direction.
SMALL = (((2, 1, 1), 4, 1), ((1, 1, 5), 9, 2), ((2, 2, 1), 9, 0))
LARGE = ((1, 13, 11), 300, 70)  # several blocks of tokens and of channels


def values(*shape, dtype, device):
    """Normal numbers, and those that are special."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x.view(-1)[:3] = torch.tensor([0.0, -0.0, -torch.inf])
    return x.to(device)


def same(found, expected):
    """Equal, and so are the signs of zeros."""
    return torch.equal(found, expected) and torch.equal(found.signbit(), expected.signbit())


def check_shift(shape, dtype, device):
    grid, width, shifted = shape
    x = values(*grid, width, dtype=dtype, device=device)
    for back in (False, True):
        found, expected = x.clone(), x.cpu()
        triton_kernels.shift_(found, shifted, back=back)
        assert same(found.cpu(), ops.shift_(expected.clone(), shifted, back=back))
        assert torch.equal(found, x) == (grid[1:] == (1, 1) or not shifted)


def check_fold(shape, dtype, device):
    grid, width, shifted = shape
    x = values(grid[0] * grid[1] * grid[2], width, dtype=dtype, device=device)
    for folded in {0, 2 * shifted, width}:
        mine, theirs, silent = x.clone(), x.to("cpu", copy=True), x.clone()
        signs = torch.empty(len(x), folded, dtype=torch.int8, device=device)
        triton_kernels.fold_(mine, folded, signs)
        triton_kernels.fold_(silent, folded, None)
        expected = ops.fold_(theirs, folded, keep=True)
        assert same(mine.cpu(), theirs)
        assert same(silent.cpu(), theirs)
        assert torch.equal(signs.cpu(), expected)
        check_unfold(x.flip(0).clamp(-100, 100), signs)


def check_unfold(gradient, signs):
    """Products bit for bit; sums to the accuracy of their type."""
    out, sums = triton_kernels.unfold(gradient, signs)
    plain, _ = ops.unfold(gradient.cpu(), signs.cpu())
    assert same(out.cpu(), plain)
    exact = plain.double()
    wide = torch.promote_types(plain.dtype, torch.float32)
    allowed = (len(plain) * torch.finfo(wide).eps) * exact.abs().sum(0)
    allowed += torch.finfo(plain.dtype).eps * exact.sum(0).abs()
    assert ((sums.cpu().double() - exact.sum(0)).abs() <= allowed).all()
    assert sums.dtype == gradient.dtype


def block_and_gradients(block, x, gradient):
    leaf = x.detach().requires_grad_()
    out = block(leaf)
    return [out, *torch.autograd.grad(out, [leaf, *block.parameters()], gradient)]


def check_block(fold, dtype, device):
    """A whole block with the kernels against one without them."""
    plain = Block(tiny_config(input_shape=(1, 6, 10), width=20, fold=fold))
    block = filled(plain, torch.Generator().manual_seed(0)).to(device, dtype)
    x = values(3, 3, 5, 20, dtype=dtype, device=device).clamp(-3, 3)
    x = x.transpose(1, 2).contiguous().transpose(1, 2)
    gradient = x.flip(0)
    choice = ops.uses_kernels
    try:
        ops.uses_kernels = lambda x: True
        found = block_and_gradients(block, x, gradient)
        ops.uses_kernels = lambda x: False
        expected = block_and_gradients(block, x, gradient)
    finally:
        ops.uses_kernels = choice
    names = ["out", "x", *dict(block.named_parameters())]
    for name, mine, theirs in zip(names, found, expected, strict=True):
        # The gradient of the bias alone is added up in another order.
        error = (mine.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert error <= (torch.finfo(dtype).eps * 4 if name == "b" else 0), (name, error)


def check_all(device):
    """Every case; raises with its name at the first that differs."""
    shapes = [*itertools.product(SMALL, DTYPES), *itertools.product([LARGE], DTYPES[::2])]
    cases = [(check, *case) for check in (check_shift, check_fold) for case in shapes]
    cases += [(check_block, *case) for case in itertools.product(("always", "never"), DTYPES)]
    for check, *case in cases:
        run(check, case, device)
    return len(cases)


def run(check, case, device):
    try:
        check(*case, device)
    except Exception as error:
        raise AssertionError(f"{check.__name__}{case} on {device}") from error


if __name__ == "__main__":
    sys.stdout.write(f"{check_all('cpu')} cases\n")
