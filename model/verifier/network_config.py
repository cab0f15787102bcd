"""The configuration of a network, read as if an adversary had written it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from model.verifier.errors import UnsupportedError, UnusableError, shown

Config = dict[str, Any]


class Whole(NamedTuple):
    """A whole number and its limits."""

    least: int
    most: int
    default: int | None = None

    def allows(self, value: object) -> bool:
        """Whether the value is one."""
        return type(value) is int and self.least <= value <= self.most


class Number(NamedTuple):
    """A number and its limits."""

    least: float
    most: float
    default: float | None = None

    def allows(self, value: object) -> bool:
        """Whether the value is one."""
        return type(value) in (int, float) and self.least <= value <= self.most  # type: ignore[operator]


class Flag(NamedTuple):
    """True or false."""

    default: bool | None = None

    def allows(self, value: object) -> bool:
        """Whether the value is one."""
        return type(value) is bool


class Choice(NamedTuple):
    """One of some words."""

    words: tuple[str, ...]
    default: str | None = None

    def allows(self, value: object) -> bool:
        """Whether the value is one."""
        return type(value) is str and value in self.words


Setting = Whole | Number | Flag | Choice
SIDE = 1 << 16


def checked(stored: Config, settings: Mapping[str, Setting], place: str) -> Config:
    """The settings of a family with their defaults.

    Raises:
        UnsupportedError: a word that stands for something not verified here.
        UnusableError: an unknown or a missing field, or a value beyond its limits.
    """
    common: dict[str, Setting] = {"num_classes": Whole(2, SIDE)}
    known = {**common, **settings}
    if unknown := sorted(stored.keys() - known.keys() - {"kind", "input_shape"}):
        raise UnusableError(f"{place}: the field {shown(unknown[0])} is not known here")
    config = {"kind": stored["kind"], "input_shape": _shape(stored, place)}
    for name, setting in known.items():
        value = stored.get(name, setting.default)
        if not setting.allows(value):
            if isinstance(setting, Choice) and type(value) is str:
                raise UnsupportedError(f"{place}.{name} {shown(value)} is not verified here")
            limits = setting[:2] if isinstance(setting, Whole | Number) else setting[0]
            raise UnusableError(f"{place}.{name} is {shown(value)}, not of {limits}")
        config[name] = value
    return config


def _shape(stored: Config, place: str) -> list[int]:
    shape = stored.get("input_shape")
    sides = shape if isinstance(shape, list) else []
    if len(sides) != 3 or not all(type(side) is int and 0 < side < SIDE for side in sides):
        raise UnusableError(f"{place}.input_shape is {shown(shape)}")
    return sides
