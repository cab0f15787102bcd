"""The 95 % Wilson interval of an accuracy measured on a test set."""


def wilson(count: int, samples: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share.

    Args:
        count: samples that count.
        samples: samples in all, at least one.
    """
    from scipy.stats import binomtest  # slow to import

    found = binomtest(count, samples).proportion_ci(method="wilson")
    return float(found.low), float(found.high)


def with_interval(share: float, samples: int) -> str:
    """A share of so many samples in per cent with its interval: `93.06% (90.0 to 95.3)`."""
    low, high = wilson(round(share * samples), samples)
    return f"{share:.2%} ({100 * low:.1f} to {100 * high:.1f})"
