"""Help that is read: settings with what follows them, their default and what they mean."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import docstring_parser
from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from data_shards.command_line.settings import Group, Setting, groups
from data_shards.untrusted.terminal import PlainConsole

_WIDTH = 100
_INDENT = 6


def show_help(
    configuration: Any,
    default: Any,
    *,
    prog: str,
    examples: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Print all settings of an entry on standard output.

    Args:
        configuration: its dataclass.
        default: an object of it that has the defaults, or None.
        prog: how it is called.
        examples: command lines, with what they do.
    """
    console = help_console()
    found = groups(configuration, default)
    words = [one for group in found for one in group.settings if not one.flag.startswith("--")]
    usage = " ".join([*(one.flag.upper() for one in words), "[--setting value ...]"])
    console.print(f"usage: {prog} {usage}")
    about = docstring_parser.parse(configuration.__doc__ or "")
    console.print(f"\n{about.short_description}")
    show_examples(console, examples)
    show_groups(console, found)


def help_console() -> Console:
    """Standard output, no wider than is read well."""
    console = PlainConsole()
    console.width = min(console.width, _WIDTH)
    return console


def show_examples(console: Console, examples: Mapping[str, str]) -> None:
    """Print command lines with what they do."""
    if not examples:
        return
    console.print("\nexamples:", style="bold")
    for command, effect in examples.items():
        console.print(f"  {command}", soft_wrap=True)
        console.print(Padding(Text(effect, "dim"), (0, 0, 0, _INDENT)))


def show_groups(console: Console, found: Iterable[Group]) -> None:
    """Print settings under the headings of their groups."""
    for group in found:
        title = f"{group.name}: {group.meaning}" if group.name else "settings"
        console.print(f"\n{title}", style="bold")
        for one in group.settings:
            show_setting(console, one)


def show_setting(console: Console, one: Setting) -> None:
    """Print one setting."""
    default = f"  [{one.default}]" if one.default else ""
    console.print(Text.assemble("  ", (one.synopsis, "cyan"), (default, "green")))
    if one.meaning:
        console.print(Padding(one.meaning, (0, 0, 0, _INDENT)))
