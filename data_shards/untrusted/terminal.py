"""The terminal, on which text from outside is only text."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from data_shards.untrusted.text import printable

_ANY_WIDTH = 1000


class PlainConsole(Console):
    """A console without markup, on which no text can move the cursor or hide another one.

    Styles are given as `rich.text.Text`, never inside of a text.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, "emoji": False, **options})

    def print_whole(self, table: RenderableType) -> None:
        """Print a table with nothing of it cut, also into a pipe and on a narrow terminal."""
        needed = self.measure(table, options=self.options.update(max_width=_ANY_WIDTH)).maximum
        own = self.width
        self.width = max(own, needed)
        try:
            self.print(table)
        finally:
            self.width = own

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The parts of what is shown; all output passes through here."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment(printable(segment.text), segment.style)
