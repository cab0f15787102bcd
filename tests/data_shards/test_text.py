"""Text from outside on a terminal, a Markdown page, an HTML page and in a command to copy."""

import io
import shlex
from html.parser import HTMLParser

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from data_shards.untrusted.terminal import PlainConsole
from data_shards.untrusted.text import code, markdown, printable, shown, unprintable

HOSTILE = [
    "[/x]<script>alert(1)</script>",
    "[bold red]x[/]",
    "[link=http://evil]x[/link]",
    ":warning:",
    "x\x1b[2J\x1b]0;title\x07",
    "a\u202egnp.exe",
    "a\u2066b\u2069",
    "zero\u200bwidth",
    "a\x00b\x7f\x9bc",
    "lone \ud800",
    "one\rtwo",
    "'; rm -rf ~; '",
    "$(id) `id` \\",
    "| a | b |\n|---|---|",
    "![x](http://evil/x.png) [y](javascript:z)",
    "<img src=x onerror=alert(1)>&lt;",
    "``x`` ` ```",
    "# heading\n- list",
]
NAMES = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(exclude_categories=()), max_size=30),
    st.text("[]/<>&`|\\*_~!(){}$;'\"\x1b\n\r\u202e ab", max_size=30),
)


def printed(*renderables, **options):
    out = io.StringIO()
    console = PlainConsole(file=out, width=4000, force_terminal=True, color_system=None, **options)
    for renderable in renderables:
        console.print(renderable, soft_wrap=True)
    return out.getvalue()


@given(NAMES)
def test_on_a_terminal_a_text_is_only_text(name):
    table = Table(name, title=name, caption=name)
    table.add_row(name, Text(name, "red"))
    said = printed(f"run {name} ended", Text.assemble(("kept", "green"), f" {name}"), table)
    assert all(character in "\n\t" for character in unprintable(said))
    # Rich itself drops some of the control characters; whatever is left is there as it was.
    if not set(name) & set("\n\t"):  # which it lays out
        assert printable(name.translate(dict.fromkeys([7, 8, 11, 12, 13]))) in said


@given(NAMES)
def test_printable_keeps_what_can_be_shown(name):
    safe = printable(name)
    assert all(character in "\n\t" for character in unprintable(safe))
    safe.encode("utf-8")
    if not unprintable(name):
        assert safe == name


class Elements(HTMLParser):
    """What a browser makes of a page."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text += data


@given(NAMES)
def test_on_an_html_page_a_text_is_only_text(name):
    environment = jinja2.Environment(autoescape=True, finalize=shown)
    page = environment.from_string("<p>{{ name }}</p>").render(name=name)
    elements = Elements(page)
    assert elements.tags == ["p"]
    assert elements.text == printable(name)


def unescaped(line):
    """Markdown's active characters of a line that no backslash takes their meaning from."""
    found, at = [], 0
    while at < len(line):
        if line[at] == "\\" and at + 1 < len(line):
            at += 2
            continue
        if line[at] in "\\`*_[]<>|~":
            found.append(line[at])
        at += 1
    return found


@given(NAMES)
def test_on_a_markdown_page_a_text_is_one_line_without_meaning(name):
    line = markdown(name)
    assert "\n" not in line
    assert not unprintable(line.replace("\t", ""))
    assert unescaped(line) == []
    assert Elements(line).tags == []
    assert markdown(markdown_span := code(name)) == markdown_span


@given(NAMES)
def test_a_code_span_ends_where_it_should(name):
    span = str(code(name))
    assert "\n" not in span
    fence = span[: len(span) - len(span.lstrip("`"))]
    if not fence or set(span) == {"`"}:
        return  # of an empty text
    inside = span[len(fence) : -len(fence)]
    assert span.endswith(fence)
    assert fence not in inside.replace("`" * (len(fence) + 1), "")
    assert inside.count("|") == inside.count(r"\|")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_command_to_copy_is_one_word_per_name(name):
    words = ("python", "-m", "model.verify", name)
    assert shlex.split(shlex.join(words)) == list(words)


def test_a_name_that_ended_finished_runs_is_printed():
    assert printed("[/x]<script>") == "[/x]<script>\n"
