import numpy as np
import torch

from data_shards.augment import augment_batch


def words(*rows):
    return np.array(rows, dtype=np.uint64)


def test_off_returns_the_input():
    images = torch.zeros(2, 1, 3, 3, dtype=torch.uint8)
    assert augment_batch(images, words([1] * 4, [2] * 4), shift_pixels=0, flip=False) is images


def test_shift_moves_zeros_in():
    images = torch.arange(1, 10, dtype=torch.uint8).reshape(1, 1, 3, 3)
    # word mod 3 is the source offset in an image padded by one: 1 = no shift.
    same = augment_batch(images, words([1, 1, 0, 0]), shift_pixels=1, flip=False)
    assert torch.equal(same, images)
    moved = augment_batch(images, words([0, 2, 0, 0]), shift_pixels=1, flip=False)
    assert moved[0, 0].tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]


def test_flip_mirrors_where_the_bit_is_set():
    images = torch.arange(12, dtype=torch.uint8).reshape(2, 3, 1, 2)
    out = augment_batch(images, words([0, 0, 1, 0], [0, 0, 2, 0]), shift_pixels=0, flip=True)
    assert torch.equal(out[0], images[0].flip(2))
    assert torch.equal(out[1], images[1])


def test_every_shift_is_a_plain_translation():
    generator = np.random.Generator(np.random.Philox(1))
    images = torch.from_numpy(generator.integers(1, 256, (25, 3, 6, 7), dtype=np.uint8))
    draws = words(*[[i % 5, i // 5, i, 0] for i in range(25)])
    out = augment_batch(images, draws, shift_pixels=2, flip=True)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for i in range(25):
        top, left = i % 5, i // 5
        source = padded[i].clone()
        if i % 2:
            source = source.flip(2)
            left = 4 - left
        assert torch.equal(out[i], source[:, top : top + 6, left : left + 7])
