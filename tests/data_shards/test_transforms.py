import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.errors import ShardError
from data_shards.format.crop_box import random_crop_box
from data_shards.streaming.transforms import place


def words(*rows):
    return np.array(rows, dtype=np.uint64)


def placed(images, draws, **options):
    """A batch of images, each put into its slot."""
    out = np.full(images.shape, 7, np.uint8)
    for slot, image, row in zip(out, images, draws, strict=True):
        place(slot, image, row, **options)
    return out


def test_off_is_a_copy():
    images = np.arange(18, dtype=np.uint8).reshape(2, 1, 3, 3)
    out = placed(images, words([1] * 4, [2] * 4), shift_pixels=0, flip=False)
    assert np.array_equal(out, images)


def test_shift_moves_zeros_in():
    images = np.arange(1, 10, dtype=np.uint8).reshape(1, 1, 3, 3)
    # word mod 3 is the source offset in an image padded by one: 1 = no shift.
    same = placed(images, words([1, 1, 0, 0]), shift_pixels=1, flip=False)
    assert np.array_equal(same, images)
    moved = placed(images, words([0, 2, 0, 0]), shift_pixels=1, flip=False)
    assert moved[0, 0].tolist() == [[0, 0, 0], [2, 3, 0], [5, 6, 0]]


def test_flip_mirrors_where_the_bit_is_set():
    images = np.arange(12, dtype=np.uint8).reshape(2, 3, 1, 2)
    out = placed(images, words([0, 0, 1, 0], [0, 0, 2, 0]), shift_pixels=0, flip=True)
    assert np.array_equal(out[0], images[0, :, :, ::-1])
    assert np.array_equal(out[1], images[1])


@given(
    shape=st.tuples(st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9)),
    shift=st.integers(0, 12),
    flip=st.booleans(),
    seed=st.integers(0, 2**32),
    channels_last=st.booleans(),
)
def test_every_pixel_comes_from_where_the_words_say(shape, shift, flip, seed, channels_last):
    """The same by gathering: source coordinates in an image padded by the largest shift."""
    generator = np.random.Generator(np.random.Philox(seed))
    image = generator.integers(0, 256, shape, dtype=np.uint8)
    row = generator.integers(0, 2**64, 4, dtype=np.uint64)
    columns = np.arange(shape[2])
    if flip and int(row[2]) % 2:
        columns = columns[::-1]
    down, right = (int(word) % (2 * shift + 1) for word in row[:2])
    padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)))
    expected = padded[:, np.arange(shape[1])[:, None] + down, columns + right]
    if channels_last:
        image = np.ascontiguousarray(image.transpose(1, 2, 0)).transpose(2, 0, 1)
    out = placed(image[None], row[None], shift_pixels=shift, flip=flip)[0]
    assert np.array_equal(out, expected)


def test_crop_boxes_are_uniform_in_area_shape_and_place():
    drawn = np.random.Generator(np.random.Philox(2)).integers(0, 2**64, (4000, 4), dtype=np.uint64)
    boxes = np.array([random_crop_box(375, 500, row, scale=(0.08, 0.4)) for row in drawn])
    top, bottom, left, right = boxes.T
    rows, columns = bottom - top, right - left  # all of these fit
    area = rows * columns / (375 * 500)
    shape = np.log(columns / rows) / np.log(4 / 3)
    for values in (
        (area - 0.08) / 0.32,
        (shape + 1) / 2,
        top / (375 - rows),
        left / (500 - columns),
    ):
        assert -0.02 < values.min() < 0.02  # sides are whole pixels
        assert 0.98 < values.max() < 1.02
        assert np.abs(np.quantile(values, [0.25, 0.5, 0.75]) - [0.25, 0.5, 0.75]).max() < 0.03


def test_crop_boxes_stay_inside():
    drawn = np.random.Generator(np.random.Philox(2)).integers(0, 2**64, (500, 4), dtype=np.uint64)
    for height, width in ((375, 500), (500, 375), (30, 30), (7, 3)):
        top, bottom, left, right = np.array([random_crop_box(height, width, w) for w in drawn]).T
        assert (top >= 0).all()
        assert (top < bottom).all()
        assert (bottom <= height).all()
        assert (left >= 0).all()
        assert (left < right).all()
        assert (right <= width).all()


def test_crop_box_of_an_image_that_no_box_fits_is_its_centre():
    drawn = np.random.Generator(np.random.Philox(2)).integers(0, 2**64, (50, 4), dtype=np.uint64)
    wide = {random_crop_box(10, 1000, row, scale=(0.5, 1.0)) for row in drawn}
    assert wide == {(0, 10, 493, 506)}  # 13 = 10 * 4/3 columns
    tall = {random_crop_box(1000, 10, row, scale=(0.5, 1.0)) for row in drawn}
    assert tall == {(493, 506, 0, 10)}
    assert random_crop_box(1, 1, drawn[0]) == (0, 1, 0, 1)
    whole = {random_crop_box(30, 40, row, scale=(1, 1), ratio=(1, 4 / 3)) for row in drawn}
    assert (0, 30, 0, 40) in whole


def test_impossible_crops_are_refused():
    for options in ({"scale": (0, 1)}, {"scale": (0.5, 0.4)}, {"ratio": (0, 1)}):
        with pytest.raises(ShardError, match="is not possible"):
            random_crop_box(9, 9, words([1] * 4)[0], **options)
