"""The pages that a reader sees, and the blocks of code on them."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
README, CONTRIBUTING, CHANGELOG = (ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG"))
PAGES = [page for page in (README, CONTRIBUTING, *sorted(DOCS.rglob("*.md"))) if page.exists()]

FENCE = re.compile(r"( *)```(.*)")


def name_of(page: Path) -> str:
    return os.path.relpath(page, ROOT)


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str  # without the fence's indentation
    line: int  # the number of its first line, below the fence
    follows: str | None  # the language of the block above it, where nothing stands between the two


class PageError(AssertionError):
    """Says what is wrong with a page, and in which line."""

    def __init__(self, page: Path, line: int, message: str) -> None:
        super().__init__(f"{name_of(page)}:{line}: {message}")


def blocks_of(page: Path) -> Iterator[Block]:
    """Give the blocks of a page, in their order."""
    lines = page.read_text().splitlines()
    opened: tuple[int, str, str] | None = None  # the line, the indentation and the language of an open fence
    last: tuple[int, str] | None = None  # the line and the language of the last closed fence
    for number, line in enumerate(lines, 1):
        if not (fence := FENCE.fullmatch(line)):
            continue
        if opened is None:
            opened = number, fence[1], fence[2].strip()
            continue
        start, indentation, language = opened
        if fence.groups() != (indentation, ""):
            raise PageError(page, number, f"expected the end of the block of line {start}, got {line!r}")
        text = "".join(f"{line.removeprefix(indentation)}\n" for line in lines[start : number - 1])
        between = lines[last[0] : start - 1] if last else ["the page's beginning"]
        yield Block(language, text, start + 1, last[1] if last and not any(map(str.strip, between)) else None)
        opened, last = None, (number, language)
    if opened is not None:
        raise PageError(page, opened[0], "this block does not end")


def prose_of(page: Path) -> list[str]:
    """Return the lines of a page, with blank ones in the place of those in blocks."""
    lines = page.read_text().splitlines()
    for block in blocks_of(page):
        count = block.text.count("\n")
        lines[block.line - 1 : block.line - 1 + count] = [""] * count
    return lines
