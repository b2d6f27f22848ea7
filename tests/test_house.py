"""The structure of the package: the direction of imports, the length of files, the share of the commands."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fused_kd"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST = 400  # lines
COMMANDS = 0.4  # the share of the package's lines


def folder(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0]


def imports(file: Path) -> Iterator[str]:
    """Give the whole name of every module or name that a file imports, also inside functions."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def of(name: str, *modules: str) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_nothing_imports_upwards(file: Path):
    above = {"cli": ["benchmarks", "tests"], "testing": ["fused_kd.cli", "benchmarks", "tests"]}
    of_library = ["fused_kd.cli", "fused_kd.testing", "benchmarks", "tests"]
    if file.name == "__main__.py":
        of_library.remove("fused_kd.cli")
    refused = above.get(folder(file), of_library)
    assert [name for name in imports(file) if of(name, *refused, "unittest", "pytest")] == []


def test_tests_and_benchmarks_import_nothing_of_the_commands_but_what_they_test():
    others = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    others = [file for file in others if "cli" not in file.relative_to(ROOT).parts]
    found = {file.name: [name for name in imports(file) if of(name, "fused_kd.cli")] for file in others}
    assert {file: names for file, names in found.items() if set(names) - {"fused_kd.cli.main"}} == {}


def test_files_are_short_and_commands_are_the_smaller_part():
    lines = {file: len(file.read_text().splitlines()) for file in FILES}
    assert {file.name: count for file, count in lines.items() if count >= LONGEST} == {}
    assert sum(count for file, count in lines.items() if folder(file) == "cli") < COMMANDS * sum(lines.values())
