"""Errors of the verifier, and the comparison of what is stated with what is derived."""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np

Value = TypeVar("Value")

SAME_BOUND = 1e-9
"""Relative difference of two float64 computations of one bound."""


class RefusalError(Exception):
    """The verifier stops; the message is for the person who called it."""

    status = 2


class UnusableError(RefusalError):
    """An input that cannot be read as what it should be."""


class UnsupportedError(UnusableError):
    """A network that this verifier has no proof for."""


class DisagreementError(RefusalError):
    """Something that can be read, and differs from what is derived."""

    status = 1


def shown(value: object) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value.item() if isinstance(value, np.generic) else value)
    return text if len(text) <= 100 else f"{text[:100]}..."


def differ(place: str, stored: object, derived: object) -> NoReturn:
    """Stop at a disagreement."""
    raise DisagreementError(f"{place} is {shown(stored)}, derived {shown(derived)}")


class Near(NamedTuple):
    """A derived number and the relative difference that is allowed; null stands for infinity."""

    value: float
    tolerance: float = SAME_BOUND


class Within(NamedTuple):
    """A number that is derived up to an interval, both ends included."""

    least: float
    most: float


def agree(stored: object, derived: object, place: str) -> None:
    """Compare a part of the certificate with what was derived, down to its leaves.

    Raises:
        DisagreementError: at the first difference, a missing or an unknown field among them.
    """
    if isinstance(derived, dict):
        if not isinstance(stored, dict) or stored.keys() != derived.keys():
            differ(f"{place} (fields)", _names(stored), sorted(derived))
        for name in derived:
            agree(stored[name], derived[name], f"{place}.{name}")
    elif isinstance(derived, list):
        if not isinstance(stored, list) or len(stored) != len(derived):
            differ(place, stored, derived)
        for i, item in enumerate(derived):
            agree(stored[i], item, f"{place}[{i}]")
    elif isinstance(derived, Near | Within):
        number: Any = math.inf if stored is None else stored
        if type(number) not in (int, float) or not _close(number, derived):
            differ(place, stored, derived.value if isinstance(derived, Near) else tuple(derived))
    elif isinstance(stored, bool) != isinstance(derived, bool) or stored != derived:
        differ(place, stored, derived)


def _names(stored: object) -> object:
    return sorted(stored) if isinstance(stored, dict) else stored


def _close(number: float, derived: Near | Within) -> bool:
    if isinstance(derived, Within):
        return derived.least <= number <= derived.most
    if abs(number) > sys.float_info.max or math.isinf(derived.value):
        return number == derived.value
    allowed = derived.tolerance * max(abs(number), abs(derived.value))
    return abs(number - derived.value) <= allowed


def attempt(place: str, action: Callable[[], Value]) -> Value:
    """Run a parser over hostile input; whatever it raises becomes one line."""
    try:
        return action()
    except RefusalError:
        raise
    except Exception as error:
        raise UnusableError(f"{place}: {type(error).__name__}: {shown(str(error))}") from error


def take(body: object, name: str, kind: type, place: str) -> Any:
    """A field of a JSON object, of one type; true and false are not numbers here."""
    if not isinstance(body, dict) or name not in body:
        raise UnusableError(f"{place} has no field {name}")
    value = body[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UnusableError(f"{place}.{name} is {shown(value)}, not of type {kind.__name__}")
    return value
