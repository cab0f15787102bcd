"""The error of this package that a person can act on."""


class OptimizerError(ValueError):
    """Bad input to an optimizer or manifold: names the value, the limit and the place."""
