"""The settings of an entry, read from its dataclass: flag, type, default and meaning of each."""

import dataclasses
import functools
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal

import docstring_parser
import tyro
from pydantic.fields import FieldInfo

_NAMES = {str: "TEXT", int: "INT", float: "FLOAT", bool: "", type(None): ""}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        option: dotted name in the configuration, as `train.log_every`.
        flag: as it is typed, `--train.log-every`; a word without dashes for a positional one.
        type: what follows the flag.
        default: its value without the flag, as it is typed; empty for none.
        meaning: one or more sentences.
    """

    option: str
    flag: str
    type: str
    default: str
    meaning: str

    @property
    def synopsis(self) -> str:
        """Flag and what follows it."""
        if self.type or not self.flag.startswith("--"):
            return f"{self.flag} {self.type}".strip()
        return f"{self.flag}, {self.negated}"

    @property
    def negated(self) -> str:
        """What switches it off: `--train.no-flip`."""
        path, dot, name = self.flag.removeprefix("--").rpartition(".")
        return f"--{path}{dot}no-{name}"


@dataclasses.dataclass(frozen=True)
class Group:
    """Settings that share a prefix.

    Attributes:
        name: the prefix; empty for settings without one.
        meaning: what they are about.
        settings: in the order of the dataclass.
    """

    name: str
    meaning: str
    settings: tuple[Setting, ...]


def groups(configuration: type, default: Any = None) -> list[Group]:
    """The settings of a dataclass and of those nested in it.

    Args:
        configuration: the dataclass.
        default: an object of it that has the defaults; without it those of the fields.
    """
    found: dict[str, list[Setting]] = {"": []}
    meanings = {"": ""}
    for group, meaning, setting in _walk(configuration, default, "", "", ""):
        found.setdefault(group, []).append(setting)
        meanings.setdefault(group, meaning)
    return [Group(name, meanings[name], tuple(found[name])) for name in found if found[name]]


def settings(configuration: type, default: Any = None) -> list[Setting]:
    """All settings of a dataclass, without their groups."""
    return [one for group in groups(configuration, default) for one in group.settings]


def _walk(
    configuration: type, default: Any, options: str, flags: str, about: str
) -> Iterator[tuple[str, str, Setting]]:
    """Group, what the group is about, and setting."""
    meanings = _meanings(configuration)
    hints = typing.get_type_hints(configuration, include_extras=True)
    for field in dataclasses.fields(configuration):
        hint, marks = _parts(hints[field.name])
        if tyro.conf.Suppress in marks:
            continue
        value = _default(field, default)
        given = [mark.name for mark in marks if getattr(mark, "name", None) is not None]
        name = given[0] if given else field.name.replace("_", "-")
        meaning = " ".join(meanings.get(field.name, "").split())
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            nested = f"{flags}{name}." if name else flags
            yield from _walk(type(value), value, f"{options}{field.name}.", nested, meaning)
            continue
        if not name:  # settings of another entry, which are not given here
            continue
        flag = name if tyro.conf.Positional in marks else f"--{flags}{name}"
        setting = Setting(f"{options}{field.name}", flag, _type(hint), _typed(value), meaning)
        yield flags.rstrip("."), about, setting


@functools.cache
def _meanings(configuration: type) -> dict[str, str]:
    """What docstrings say of each field: they are looked up in source files, which takes long."""
    return {
        part.arg_name: part.description or ""
        for above in reversed(configuration.__mro__[:-1])  # a field may be documented by a base
        for part in docstring_parser.parse_from_object(above).params
    }


def _default(field: Any, default: Any) -> Any:
    if default is not None:
        return getattr(default, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if isinstance(field.default, FieldInfo):  # a limit of pydantic's with the default in it
        required = field.default.is_required()
        return (
            dataclasses.MISSING
            if required
            else field.default.get_default(call_default_factory=True)
        )
    return field.default


def _parts(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type and what it is annotated with."""
    if typing.get_origin(hint) is typing.Annotated:
        inner, *marks = typing.get_args(hint)
        return inner, tuple(marks)
    return hint, ()


def _type(hint: Any) -> str:
    """What follows a flag of this type."""
    hint, _ = _parts(hint)
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin in (typing.Union, types.UnionType):
        return "|".join(filter(None, map(_type, parts)))
    if origin is tuple:
        if parts[-1] is Ellipsis:
            return f"{_type(parts[0])} ..."
        return " ".join(map(_type, parts))
    if origin is dict:
        return "NAME VALUE ..."
    return _NAMES.get(hint, "TEXT")


def _typed(value: Any) -> str:
    """A value as it is typed after its flag; empty for none."""
    if value is None or value is dataclasses.MISSING or value is tyro.MISSING:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        value = [word for pair in value.items() for word in pair]
    if isinstance(value, tuple | list):
        return " ".join(map(_typed, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
