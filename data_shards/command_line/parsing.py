"""The command line of every entry: tyro parses it; a refusal is one line that names what was typed.

A refused command line ends with exit status 2.
"""

import contextlib
import dataclasses
import functools
import io
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import tyro
from pydantic import ValidationError

# The one structured account of a refusal; private, so pyproject.toml names the versions.
from tyro import _errors as tyro_errors

from data_shards.command_line.help_page import show_help
from data_shards.command_line.nearest import nearest
from data_shards.command_line.settings import Setting, settings
from data_shards.untrusted.terminal import PlainConsole

T = TypeVar("T")

_FLAG = re.compile(r"(?<!\S)--[a-z][\w.-]*")
_REFUSED = 2
_VALUE = r"""'[^']*'|"[^"]*"|\([^)]*\)|[^\s,;)]*[^\s,;:.)]"""
_WORDING = {
    r"^(Input|Tuple|List|Dictionary|String) should ": "must ",
    "^Value error, ": "",
    " after validation": "",
}
"""What of the words of pydantic is said in others."""


def parse_words(
    target: Callable[..., T],
    words: Sequence[str] | None,
    *,
    prog: str,
    default: T | None = None,
) -> T:
    """Make an object of a dataclass, or call a function, as the command line says.

    Args:
        target: the dataclass, or the function.
        words: the command line; None: that of this process.
        prog: how the entry is called.
        default: an object of the dataclass that has the defaults.

    Raises:
        SystemExit: with status 2 after one line on standard error, or 0 after the help.
    """
    words = sys.argv[1:] if words is None else list(words)
    options: dict[str, Any] = {} if default is None else {"default": default}
    if not dataclasses.is_dataclass(target):
        parse = functools.partial(tyro.cli, target, prog=prog)
        with _refusing(list, lambda: _flags_of_help(lambda: parse(args=["--help"])), prog):
            return parse(args=words)
    if any(word in ("-h", "--help") for word in words):
        show_help(target, default, prog=prog)
        raise SystemExit(0)
    known = functools.partial(settings, target, default)
    with _refusing(known, lambda: _flags(known()), prog):
        made: T = tyro.cli(target, args=words, prog=prog, **options)
        return made


def parse_subcommand(
    entries: Mapping[str, Callable[..., T]], words: Sequence[str] | None, *, prog: str
) -> T:
    """Call the function that the first word names.

    Raises:
        SystemExit: as of `parse_words`.
    """
    words = sys.argv[1:] if words is None else list(words)
    run = functools.partial(tyro.extras.subcommand_cli_from_dict, dict(entries), prog=prog)
    first = words[0] if words else ""
    if first not in (*entries, "-h", "--help"):
        unknown = f"there is no {first!r}{nearest(first, entries)}; " if first else ""
        refuse_words(f"{unknown}the first word must be one of {', '.join(entries)}")
    with _refusing(list, lambda: _flags_of_help(lambda: run(args=[first, "--help"])), prog):
        return run(args=words)


def _flags(known: Iterable[Setting]) -> set[str]:
    return {flag for one in known for flag in _FLAG.findall(one.synopsis.replace(",", ""))}


def _flags_of_help(show: Callable[[], object]) -> set[str]:
    """The flags that a help page names."""
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        show()
    return set(_FLAG.findall(page.getvalue()))


@contextlib.contextmanager
def _refusing(
    known: Callable[[], Sequence[Setting]], flags: Callable[[], set[str]], prog: str
) -> Iterator[None]:
    """What tyro refuses in the block is said in one line.

    Args:
        known: the settings, for their names in messages.
        flags: all flags, for the nearest ones.
        prog: how the entry is called.
    """

    def refuse(event: Any) -> NoReturn:
        refuse_words(_message(event, known(), flags, f" ({prog} --help)"))

    with tyro_errors.on_parse_error(refuse):
        yield


def refuse_words(text: str) -> NoReturn:
    """End the process on a command line that cannot be used.

    Raises:
        SystemExit: with status 2.
    """
    PlainConsole(stderr=True, soft_wrap=True).print(f"refused: {text}")
    raise SystemExit(_REFUSED)


def _message(
    event: Any, known: Sequence[Setting], flags: Callable[[], set[str]], where: str
) -> str:
    """What is wrong with a command line, in one line."""
    match event:
        case tyro_errors.UnrecognizedArgs():
            return _unknown(event.tokens, flags()) + where
        case tyro_errors.InvalidChoice():
            choices = ", ".join(event.choices)
            return f"{_name(event.argument)} {event.value}: must be one of {choices}"
        case tyro_errors.BadValue():
            return f"{_name(event.argument)} needs {event.argument.lowered.metavar or 'no value'}"
        case tyro_errors.MissingArgs():
            unknown = event.unrecognized_tokens
            said = [_unknown(unknown, flags())] if unknown else []
            needed = ", ".join(_name(one.arg) for one in event.missing_arguments)
            return "; ".join([*said, f"{needed} must be given"]) + where
        case tyro_errors.InstantiationFailure():
            return _impossible(event, known)
    return f"{type(event).__name__}{where}"


def _name(argument: Any) -> str:
    """An argument as it is typed."""
    if argument.is_positional():
        return str(argument.field.intern_name)
    return str(argument.lowered.name_or_flags[0])


def _unknown(tokens: Sequence[str], flags: set[str]) -> str:
    said = []
    for token in tokens:
        if token.startswith("--"):
            flag = token.partition("=")[0].replace("_", "-")
            said.append(f"there is no {flag}{nearest(flag, flags)}")
    return "; ".join(said) or f"{' '.join(tokens)!r} belongs to no option"


def _impossible(event: Any, known: Sequence[Setting]) -> str:
    """Words that are options, and values that are none."""
    if event.argument is not None:
        return f"{_name(event.argument)}: {event.message}"
    error = sys.exc_info()[1]
    section = str(getattr(error, "arg", ""))
    cause = error if isinstance(error, ValidationError) else getattr(error, "__context__", None)
    if isinstance(cause, ValidationError):
        return one_line(cause, known, section=section)
    return as_typed(str(event.message), known, section=section)


def one_line(error: ValidationError, known: Iterable[Setting] = (), *, section: str = "") -> str:
    """What does not validate, as flags and values, without the names of the checks.

    Args:
        error: of pydantic.
        known: settings, whose dotted names become flags.
        section: dotted name of the part of the configuration that was checked.
    """
    known = list(known)
    flags = {one.option: one.flag for one in known}
    said = []
    for part in error.errors(include_url=False):
        text = part["msg"]
        for before, after in _WORDING.items():
            text = re.sub(before, after, text)
        path = ".".join(name for name in part["loc"] if isinstance(name, str))
        option = ".".join(filter(None, (section, path)))
        if part["type"] == "unexpected_keyword_argument":
            near = nearest(option, (one.option for one in known))
            said.append(f"there is no setting {option}{near}")
            continue
        if not path:
            said.append(as_typed(text, known, section=section))
            continue
        value = part["input"]
        shown = f"{value:g}" if isinstance(value, float) else str(value)
        said.append(f"{flags.get(option, option)} {shown}: {text}")
    return "; ".join(said)


def as_typed(text: str, known: Iterable[Setting], *, section: str = "") -> str:
    """A message whose options are named as they are typed: `--train.epochs 3` for `train.epochs=3`.

    Args:
        text: the message.
        known: settings.
        section: dotted name of the part of the configuration whose settings the message may name
            without it.
    """
    for one in known:
        names = [one.option]
        inside = one.option.removeprefix(f"{section}.")
        if section and "." not in inside:
            names.append(inside)
        for name in names:
            text = _flagged(text, name, one)
    return text


def _flagged(text: str, name: str, setting: Setting) -> str:
    """A message with one name of an option replaced."""

    def typed(match: re.Match[str]) -> str:
        value = match[1]
        if value in ("True", "False") and not setting.type:
            return setting.flag if value == "True" else setting.negated
        return f"{setting.flag} {value}"

    edge = r"(?<![\w.-])"
    text = re.sub(rf"{edge}{re.escape(name)}=({_VALUE})", typed, text)
    if "." in name:  # a word that only a setting has
        text = re.sub(rf"{edge}{re.escape(name)}(?![\w.=-]*\w)", setting.flag, text)
    return text
