import pytest

from pipeline.run.wilson_interval import wilson, with_interval


@pytest.mark.parametrize(
    ("count", "samples", "low", "high"),
    [
        # Newcombe (1998), table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_intervals_are_those_of_the_literature(count, samples, low, high):
    assert wilson(count, samples) == pytest.approx((low, high), abs=5e-5)


def test_a_share_is_shown_with_its_interval():
    assert with_interval(335 / 360, 360) == "93.06% (89.9 to 95.3)"
    assert with_interval(1.0, 16) == "100.00% (80.6 to 100.0)"
