"""The error of this package that a person can act on."""


class ModelError(ValueError):
    """A network setting, an image, a weight or an artifact file that is not valid."""
