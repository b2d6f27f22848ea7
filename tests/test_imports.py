"""Imports: there is no cycle, kernels import no user option, and the reference imports nothing but types."""

import ast
from functools import cache
from pathlib import Path

import fused_kd

PACKAGE = Path(fused_kd.__file__).parent
FOR_USERS = {"autograd", "checks", "functional", "modules", "options", "terms"}  # what a backend knows nothing of


def _modules() -> dict[str, Path]:
    paths = {path: path.relative_to(PACKAGE.parent).with_suffix("").parts for path in PACKAGE.rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in paths.items()}


MODULES = _modules()


@cache
def imports(module: str) -> frozenset[str]:
    """Return the package's modules that a module imports, wherever in its code."""
    path, found = MODULES[module], set()
    package = module.split(".")[: None if path.name == "__init__.py" else -1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            names = {f"{target}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else target for name in names}
    return frozenset(found & MODULES.keys() - {module})


def of_library() -> list[str]:
    return [m for m in MODULES if m.split(".")[1:2] not in (["cli"], ["testing"], ["__main__"])]


def test_no_import_comes_back():
    @cache
    def floor(module: str, above: tuple[str, ...] = ()) -> int:
        assert module not in above, f"{' -> '.join(above)} -> {module}"
        return 1 + max((floor(below, (*above, module)) for below in imports(module)), default=0)

    assert max(floor(module) for module in MODULES) > 10


def test_backends_know_no_autograd_and_no_user_option():
    for module in of_library():
        if module.startswith("fused_kd.backends"):
            assert not {name for name in imports(module) if name.split(".")[1] in FOR_USERS}, module


def test_the_reference_shares_types_alone():
    assert imports("fused_kd.reference") == {"fused_kd.divergences", "fused_kd.options"}
