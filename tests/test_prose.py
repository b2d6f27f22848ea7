"""Docstrings begin with a verb or with the thing itself."""

import ast
from pathlib import Path

import pytest

import fused_kd

PACKAGE = Path(fused_kd.__file__).parent
# Replies to a question that nobody has asked.
FRAGMENTS = {
    "Also",
    "As",
    "At",
    "By",
    "For",
    "From",
    "How",
    "In",
    "Of",
    "On",
    "Those",
    "What",
    "When",
    "Where",
    "Whether",
    "Who",
}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_begin_with_what_is_done_or_what_it_is(path):
    tree = ast.parse(path.read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module)]
    openings = {getattr(node, "name", "module"): (ast.get_docstring(node) or "The").split()[0] for node in nodes}
    assert {name: word for name, word in openings.items() if word.strip(",.:") in FRAGMENTS} == {}
