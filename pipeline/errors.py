"""What a person can act on: the errors that are shown without a traceback."""

import contextlib
from collections.abc import Callable, Iterator

from data_shards.errors import ShardError
from data_shards.untrusted.limits import UntrustedError
from model.errors import ModelError
from optim.errors import OptimizerError


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


class RunFailedError(PipelineError):
    """What ends a run that had begun to train: no refusal any more, which says that nothing was."""


class ProcessDiedError(RuntimeError):
    """A process that the run needs has died, more often than it may; the message says which."""


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


@contextlib.contextmanager
def failing(begun: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """What the block refuses is a failure once the run has begun.

    Raises:
        RunFailedError: in place of the other REFUSALS, with their message.
    """
    try:
        yield
    except REFUSALS as error:
        if isinstance(error, RunFailedError) or not begun():
            raise
        raise RunFailedError(str(error)) from error
