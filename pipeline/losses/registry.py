"""The losses by name, and from settings to a loss.

A new loss is one file with a subclass of `pipeline.losses.base.Loss`, and one line of `LOSSES`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, TypeAdapter

from model.errors import known_names
from pipeline.errors import PipelineError
from pipeline.losses.base import Loss
from pipeline.losses.certificate_regularization import CertificateLoss
from pipeline.losses.emma import EmmaLoss
from pipeline.losses.hinge import CeHingeLoss, MixtureLoss
from pipeline.losses.logit_annealing import LogitAnnealingLoss
from pipeline.losses.offset import OffsetLoss

LOSSES: dict[str, type[Loss]] = {
    "emma": EmmaLoss,
    "logit_annealing": LogitAnnealingLoss,
    "mixture": MixtureLoss,
    "ce_hinge": CeHingeLoss,
    "offset": OffsetLoss,
    "certificate": CertificateLoss,
}
"""By `kind`."""


def loss_class(kind: object) -> type[Loss]:
    """The loss of that name.

    Raises:
        PipelineError: there is none.
    """
    if kind not in LOSSES:
        raise PipelineError(f"--loss.kind {kind}: no such loss{known_names(kind, LOSSES)}")
    return LOSSES[str(kind)]


def option_names(loss: type[Loss]) -> list[str]:
    """Names of the options that a loss has, its kind first."""
    return [field.name for field in dataclasses.fields(loss)]


def require_options(kind: object, names: Iterable[str]) -> None:
    """Refuse options that the loss does not have.

    Raises:
        PipelineError: naming the option, the loss and the options that it has; or no such loss.
    """
    own = option_names(loss_class(kind))
    for name in names:
        if name not in own:
            flags = ", ".join(flag(option) for option in own)
            raise PipelineError(
                f"{flag(name)} is no option of the loss {kind!r}, which has {flags}"
            )


def flag(option: str) -> str:
    """How an option of the loss is given on the command line."""
    return f"--loss.{option.replace('_', '-')}"


def another_loss(loss: Loss, kind: str) -> Loss:
    """The loss of another kind; what both have keeps its value, the rest has its defaults.

    Raises:
        PipelineError: there is no such loss.
    """
    found = loss_class(kind)
    both = (set(option_names(type(loss))) & set(option_names(found))) - {"kind"}
    return found(**{name: getattr(loss, name) for name in both})


def _parse(value: Any) -> Loss:
    if isinstance(value, Loss):
        return value
    if not isinstance(value, dict):
        raise PipelineError(f"a loss has options, this is {type(value).__name__}")
    kind = value.get("kind")
    require_options(kind, value)
    return TypeAdapter(loss_class(kind)).validate_python(value)


AnyLoss = Annotated[SerializeAsAny[Loss], BeforeValidator(_parse)]
"""Type of a field that holds any loss; JSON keeps all of its options."""
