"""Text and tables that fit the terminal without cutting a word.  A table that is too wide for that becomes records."""

import re
import shutil
import textwrap

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

NO_BREAK = "\N{NO-BREAK SPACE}"


def console(width: int, *, highlight: bool = True) -> Console:
    """Return a console on stdout, as wide as COLUMNS or the terminal, or `width` if there is neither."""
    return Console(width=shutil.get_terminal_size((width, 25)).columns, highlight=highlight)


def say(text: str, hanging: str = "") -> None:
    """Print a text on stdout, cut between words at the terminal's width.  In a file it is one line."""
    _print_wrapped(console(10**6), text, "", hanging=hanging)


def print_table(console: Console, table: Table) -> None:
    """Print a table whose columns are wide enough for their longest words.

    Figures, which are aligned right, and columns with `no_wrap` stay in one line where there is room.  If the terminal is
    too narrow for the words, print one record per row, with a line "heading: cell" for each cell.
    """
    texts = [[_plain(console, text) for text in (column.header, *column.cells)] for column in table.columns]
    natural = [max(cell_len(line) for text in column for line in text.split("\n")) for column in texts]
    words = [max((cell_len(word) for text in column for word in text.split()), default=0) for column in texts]
    figures = [
        max([word, *(cell_len(line) for text in texts for line in text.split("\n"))])
        if column.justify == "right" or column.no_wrap
        else word
        for column, word, (_, *texts) in zip(table.columns, words, texts, strict=True)
    ]
    borders = Measurement.get(console, console.options.update(max_width=10**6), table).maximum - sum(natural)
    room = console.width - borders
    if sum(words) > room:
        _print_records(console, table, texts)
        return
    least = figures if sum(figures) <= room else words
    while sum(natural) > room:
        _, widest = max((width, index) for index, width in enumerate(natural) if width > least[index])
        natural[widest] -= 1
    for column, width in zip(table.columns, natural, strict=True):
        column.width, column.no_wrap = width, False
    console.print(table)


def _print_records(console: Console, table: Table, texts: list[list[str]]) -> None:
    if table.title:
        _print_wrapped(console, _plain(console, table.title), "", "table.title")
    headings = [heading for heading, *_ in texts]
    for row in zip(*(cells for _, *cells in texts), strict=True):
        console.print()
        indent = ""
        for heading, cell in zip(headings, row, strict=True):
            if cell.strip():
                text = ", ".join(cell.split("\n"))
                _print_wrapped(console, f"{heading}: {text}" if heading else text, indent, "" if indent else "bold")
                indent = "  "
    console.print()


def _print_wrapped(console: Console, text: str, indent: str, style: str = "", hanging: str = "  ") -> None:
    """Print wrapped text.  A word wider than the terminal is not cut, nor a number at its spaces or from its unit."""
    text = re.sub(r"(?<=\d) (?=\d{3}|[kMG]?B\b)", NO_BREAK, text)
    lines = textwrap.wrap(
        text, console.width, initial_indent=indent, subsequent_indent=indent + hanging,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    console.print(Text("\n".join(lines).replace(NO_BREAK, " "), style=style), soft_wrap=True)


def _plain(console: Console, text: object) -> str:
    return console.render_str(str(text)).plain
