"""What a person can act on: the errors that are shown without a traceback."""

from data_shards.errors import ShardError
from model.errors import ModelError
from optim.errors import OptimizerError
from untrusted.limits import UntrustedError


class PipelineError(ValueError):
    """What makes a run impossible: a setting, a machine, a number."""


class NoEffectError(Exception):
    """A setting that changes nothing beside the others.

    No ValueError, which pydantic and the parser of the command line would wrap: who parses asks
    whether the option was given or comes from a preset.

    Attributes:
        option: its dotted name in the run's configuration.
        default: the value at which it says nothing.
    """

    def __init__(self, option: str, value: object, default: object, reason: str) -> None:
        super().__init__(f"{option}={value} has no effect with {reason}; leave it at {default!r}")
        self.option, self.default = option, default


class ExposureError(ValueError):
    """A cluster or server that must not be used; the message names it and says what to do."""


class TokenError(ExposureError):
    """A cluster asks for a token that this process does not have."""


REFUSALS = (
    PipelineError,
    NoEffectError,
    ShardError,
    ModelError,
    OptimizerError,
    ExposureError,
    UntrustedError,
)
"""The error of this kind of every package."""
