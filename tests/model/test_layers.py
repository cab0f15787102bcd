import math

import pytest
import torch

from model.networks.head import Head, pairwise_distances
from model.networks.lipnext.layers import (
    Block,
    Stem,
    beta_abs,
    flat_pool,
    l2_pool,
    shift,
)
from model.networks.tensor_ops import space_to_depth
from optim.manifolds import ORTHOGONAL
from tests.model.small_networks import tiny_config


def random(generator, *shape, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=dtype)


def filled_block(generator, **changes) -> Block:
    config = tiny_config(input_shape=(1, 6, 8), **changes)
    block = Block(config).double()
    with torch.no_grad():
        block.R.copy_(ORTHOGONAL.random((config.width, config.width), generator))
        block.M.copy_(ORTHOGONAL.random((config.width, config.width), generator))
        block.b.normal_(generator=generator)
        if block.p is not None:
            block.p.normal_(generator=generator)
    return block


def test_space_to_depth_puts_each_patch_into_channels(generator):
    images = random(generator, 2, 3, 4, 6)
    tokens = space_to_depth(images, 2)
    assert tokens.shape == (2, 2, 3, 12)
    assert torch.equal(tokens[1, 1, 2], images[1, :, 2:4, 4:6].reshape(-1))


def test_stem_centres_pixels_and_embeds_patches(generator):
    stem = Stem(tiny_config()).double()
    with torch.no_grad():
        stem.weight.copy_(ORTHOGONAL.random((16, 16), generator))
    assert not stem(torch.full((1, 1, 4, 4), 0.5)).any()
    images = torch.rand(2, 1, 4, 4, generator=generator, dtype=torch.float64)
    padded = torch.zeros(2, 2, 2, 16, dtype=torch.float64)
    padded[..., :4] = space_to_depth(images - 0.5, 2)
    torch.testing.assert_close(stem(images), padded @ stem.weight.T, rtol=0, atol=1e-14)


def test_shift_rolls_four_groups_and_leaves_the_rest(generator):
    x = random(generator, 2, 3, 5, 11)
    y = shift(x, 2)
    assert torch.equal(y[..., 0:2], torch.roll(x[..., 0:2], -1, 1))
    assert torch.equal(y[..., 2:4], torch.roll(x[..., 2:4], 1, 1))
    assert torch.equal(y[..., 4:6], torch.roll(x[..., 4:6], -1, 2))
    assert torch.equal(y[..., 6:8], torch.roll(x[..., 6:8], 1, 2))
    assert torch.equal(y[..., 8:], x[..., 8:])
    far = shift(x, 2, 3)
    assert torch.equal(far[..., 0:2], x[..., 0:2])  # round a side of three
    assert torch.equal(far[..., 4:6], torch.roll(x[..., 4:6], -3, 2))


def test_max_min_is_beta_abs_between_rotations(generator):
    """Theorem 2 of the paper, beta = 1/2."""
    a, c = random(generator, 50, 4), random(generator, 50, 4)
    eye = torch.eye(4, dtype=torch.float64)
    R = torch.cat([torch.cat([eye, -eye], 1), torch.cat([eye, eye], 1)]) / math.sqrt(2)
    y = beta_abs(torch.cat([a, c], 1) @ R.T, 4) @ R
    expected = torch.cat([torch.maximum(a, c), torch.minimum(a, c)], 1)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fold", ["always", "never"])
def test_block_without_absolute_value_is_an_isometry(generator, fold):
    block = filled_block(generator, beta=0.0, fold=fold)
    x, y = random(generator, 2, 5, 3, 4, 16)
    before = (x - y).flatten(1).norm(dim=1)
    after = (block(x) - block(y)).flatten(1).norm(dim=1)
    torch.testing.assert_close(after, before, rtol=1e-12, atol=0)


def test_block_with_absolute_value_does_not_expand(generator):
    block = filled_block(generator)
    x, y = random(generator, 2, 50, 3, 4, 16)
    ratio = (block(x) - block(y)).flatten(1).norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert ratio.max() <= 1 + 1e-12
    assert ratio.min() < 0.99


def test_block_is_the_formula_of_the_paper(generator):
    block = filled_block(generator)
    x = random(generator, 2, 3, 4, 16)
    u = torch.einsum("ij,bhwj->bhwi", block.R, x + block.p)
    z = torch.einsum("ij,kj,bhwk->bhwi", block.M, block.R, shift(u, 1)) + block.b
    expected = torch.cat([z[..., :8].abs(), z[..., 8:]], -1)
    torch.testing.assert_close(block(x), expected, rtol=0, atol=1e-13)


def test_position_can_be_left_out():
    names = dict(Block(tiny_config(position=False)).named_parameters())
    assert sorted(names) == ["M", "R", "b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_adds_squares_in_float32(generator, dtype):
    x = random(generator, 2, 16, 16, 3).to(dtype)
    y = l2_pool(x, 1e-6)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, x.double().flatten(1, 2).norm(dim=1).float())


def test_windows_are_pooled_one_by_one(generator):
    x = random(generator, 2, 4, 6, 3)
    y = l2_pool(x, 0.1, 2).reshape(2, 2, 2, 3)
    for row in range(2):
        for column in range(2):
            window = x[:, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            torch.testing.assert_close(y[:, row, column], l2_pool(window, 0.1))


@pytest.mark.parametrize("windows", [1, 2, 4])
def test_pool_does_not_expand_and_has_a_gradient_at_zero(generator, windows):
    x, y = random(generator, 2, 50, 4, 4, 4)
    pooled = l2_pool(x, 0.1, windows) - l2_pool(y, 0.1, windows)
    ratio = pooled.norm(dim=1) / (x - y).flatten(1).norm(dim=1)
    assert ratio.max() <= 1
    zero = torch.zeros(1, 4, 4, 3, requires_grad=True)
    l2_pool(zero, 1e-6, windows).sum().backward()
    assert torch.equal(zero.grad, torch.zeros_like(zero))


def test_the_flat_pool_keeps_every_distance_and_widens(generator):
    x = random(generator, 2, 2, 3, 4).to(torch.bfloat16)
    assert torch.equal(flat_pool(x), x.reshape(2, 24).float())


def test_pairwise_distances_and_their_gradient_equal_brute_force(generator):
    rows = random(generator, 6, 5)
    rows[3] = rows[1]
    rows[4] = rows[1] + 1e-9 * rows[0]
    weights = random(generator, 6, 6)

    def brute(w):
        squared = (w[:, None] - w[None]).square().sum(-1)
        return torch.where(squared > 0, squared, 1).sqrt() * (squared > 0)

    mine, theirs = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    distances = pairwise_distances(mine)
    torch.testing.assert_close(distances, brute(theirs), rtol=1e-12, atol=0)
    assert distances[3, 1] == 0
    (distances * weights).sum().backward()
    (brute(theirs) * weights).sum().backward()
    # Rows 1e-9 apart: the direction of their difference is known to about 1e-7.
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=1e-6)


def test_gradient_of_the_diagonal_is_zero(generator):
    rows = random(generator, 4, 3, dtype=torch.float32).requires_grad_()
    pairwise_distances(rows).diagonal().sum().backward()
    assert torch.equal(rows.grad, torch.zeros(4, 3))


def test_similar_classes_keep_a_positive_factor_in_float32():
    rows = torch.zeros(2, 64)
    rows[:, 0] = 1
    rows[1, 1] = 1e-4
    head = Head(64, 2)
    with torch.no_grad():
        head.weight.copy_(rows)
        head.bias.zero_()
    _, factors = head(torch.zeros(1, 64))
    assert factors[0, 1].item() == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_head_normalises_rows_and_computes_in_float32_or_wider(generator, dtype):
    head = Head(7, 4).to(dtype)
    with torch.no_grad():
        head.weight.normal_(generator=generator)
        head.bias.normal_(generator=generator)
    h = random(generator, 5, 7, dtype=torch.float32)
    logits, factors = head(h)
    assert logits.dtype == factors.dtype == torch.promote_types(dtype, torch.float32)
    w = head.weight.double()
    w = w / w.norm(dim=1, keepdim=True)
    expected = h.double() @ w.T + head.bias.double()
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-5)
    brute = (w[:, None] - w[None]).norm(dim=-1)
    torch.testing.assert_close(factors.double(), brute, rtol=1e-5, atol=1e-6)
