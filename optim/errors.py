"""The error of the optimizer room."""


class OptimizerError(ValueError):
    """Bad input to an optimizer or manifold: names the value, the limit and the place."""
