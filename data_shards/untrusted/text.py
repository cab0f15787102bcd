"""Text from outside on its way to a person: one function per kind of output.

A shell word is `shlex.quote`, HTML is Jinja's `autoescape`; a terminal and Markdown are here.
"""

import re
import unicodedata

from markupsafe import Markup

_KEPT = "\n\t"
_INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Control, format (bidirectional and zero-width among them), lone surrogates, other line ends."""
_MARKDOWN = re.compile(r"([\\`*_\[\]|~])")
_TICKS = re.compile("`+")


def unprintable(text: str) -> list[str]:
    """Characters that no terminal shows, or that change how it shows the others, each once."""
    return sorted({char for char in text if unicodedata.category(char) in _INVISIBLE})


def printable(text: str) -> str:
    r"""The text with such characters written out (`\x1b`); ends of lines and tabs stay."""
    if text.isprintable():
        return text
    return "".join(
        char.encode("unicode_escape").decode()
        if char not in _KEPT and unicodedata.category(char) in _INVISIBLE
        else char
        for char in text
    )


def figure_text(text: str) -> str:
    """A text in a figure, where `$` would begin a formula; one line."""
    return " ".join(printable(text).split("\n")).replace("$", r"\$")


def shown(value: object) -> object:
    """A value for an HTML page, which Jinja escapes after this; texts as `printable`."""
    return printable(value) if type(value) is str else value


def markdown(text: object) -> str:
    """A text that stands in a line, a cell or a heading of a Markdown page as it is written.

    What is `Markup` (the result of `code`) stays as it is.
    """
    if isinstance(text, Markup):
        return text
    line = " ".join(printable(str(text)).split("\n"))
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKDOWN.sub(r"\\\1", line)


def code(text: object) -> Markup:
    """A code span of a Markdown page, in a cell of a table as well."""
    line = " ".join(printable(str(text)).split("\n")).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, _TICKS.findall(line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return Markup(f"{fence}{space}{line}{space}{fence}")
