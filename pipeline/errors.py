"""What a person can act on: the errors that are shown without a traceback."""

from data_shards.errors import ShardError
from model.errors import ModelError
from optim.errors import OptimizerError


class PipelineError(ValueError):
    """What makes a run impossible: a setting, a machine, a number."""


class ExposureError(ValueError):
    """A cluster or server that must not be used; the message names it and says what to do."""


class TokenError(ExposureError):
    """A cluster asks for a token that this process does not have."""


REFUSALS = (PipelineError, ShardError, ModelError, OptimizerError, ExposureError)
"""Every package's error of this kind."""
