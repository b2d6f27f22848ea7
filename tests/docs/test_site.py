"""The pages hold together: all are in the navigation, links resolve, lines are short enough to be compared."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .pages import CHANGELOG, CONTRIBUTING, DOCS, PAGES, ROOT, PageError, name_of, prose_of

yaml = pytest.importorskip("yaml")

LONGEST = 124  # characters of a line of prose
OF_THE_ROOT = {"contributing.md": CONTRIBUTING, "changelog.md": CHANGELOG}  # docs/hooks.py makes pages of these
LINK = re.compile(r"\]\(([^)\s]+)\)")  # the text before it may begin on the line above
WRITTEN = re.compile(r"<!-- written by .*?-->.*?<!-- end -->", re.DOTALL)  # by scripts, which do not break lines


def files_of(entries: list[dict[str, object]]) -> Iterator[str]:
    """Give the files of a navigation."""
    for entry in entries:
        for value in entry.values():
            if isinstance(value, list):
                yield from files_of(value)
            else:
                yield str(value)


def test_every_page_is_in_the_navigation_and_there():
    pages = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}
    files = list(files_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(files) == sorted(pages | OF_THE_ROOT.keys())
    assert all(page.exists() for page in OF_THE_ROOT.values())


def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as code hosts and mkdocs make them."""
    headings = [line.lstrip("#").strip() for line in prose_of(page) if re.match("#+ ", line)]
    words = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in words}


@pytest.mark.parametrize("page", [*PAGES, CHANGELOG], ids=name_of)
def test_links_resolve(page: Path):
    for number, line in enumerate(prose_of(page), 1):
        for target in LINK.findall(re.sub(r"`[^`]*`", "", line)):
            if re.match("https?:|mailto:", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            if not file.exists():
                raise PageError(page, number, f"there is no {target}")
            if DOCS in page.parents and DOCS not in file.parents:
                raise PageError(
                    page, number, f"{target} is outside of docs/, which the site cannot show: name it as code"
                )
            if anchor and file.suffix == ".md" and anchor not in anchors_of(file):
                raise PageError(page, number, f"{path or 'this page'} has no heading for #{anchor}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_are_there(page: Path):
    folders = [ROOT, *(ROOT / name for name in ("fused_kd", "tests", "benchmarks"))]
    for number, line in enumerate(prose_of(page), 1):
        for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|md|json|png|svg|toml|yml))`", line):
            if not any((folder / name).exists() for folder in folders):
                raise PageError(page, number, f"there is no {name}")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_lines_of_prose_are_short(page: Path):
    written = {number for found in WRITTEN.finditer(page.read_text()) for number in lines_of(found, page.read_text())}
    for number, line in enumerate(prose_of(page), 1):
        if len(line) > LONGEST and not line.lstrip().startswith("|") and number not in written:
            raise PageError(page, number, f"expected at most {LONGEST} characters, got {len(line)}")


def lines_of(found: re.Match[str], text: str) -> range:
    """Return the numbers of the lines of a match."""
    first = text.count("\n", 0, found.start()) + 1
    return range(first, first + found[0].count("\n") + 1)
