"""Modules that are reloaded (by hand or by %autoreload) or imported anew: functions and graphs made before still work."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # each test compiles in a process of its own

PACKAGE = Path(importlib.util.find_spec("fused_kd").origin).parent  # type: ignore[union-attr, arg-type]

GIVEN = """
import importlib, sys, torch
import fused_kd
from fused_kd import reference
assert fused_kd.__file__.startswith(sys.argv[1]), fused_kd.__file__

torch.manual_seed(0)
torch._dynamo.config.recompile_limit = 100
N, V, H = 4, 30, 5
student, teacher, labels = torch.randn(N, V, requires_grad=True), torch.randn(N, V), torch.randint(V, (N,))
hidden, weight = torch.randn(N, H, requires_grad=True), torch.randn(V, H, requires_grad=True)

def losses(package):
    yield package.kd_loss, (student, teacher, labels)
    yield package.linear_kd_loss, (hidden, weight, hidden.detach(), weight.detach().flip(0), labels)

def results(package, wrap=lambda function: function):
    for loss, given in losses(package):
        for options in ({"temperature": 2.0}, {"reduction": "none"}):
            value = wrap(lambda *given: loss(*given, **options).sum())(*given)
            leaves = [tensor for tensor in given if tensor.requires_grad]
            yield from (value.detach(), *torch.autograd.grad(value, leaves))

def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)

expected = list(results(reference))

def check(package=fused_kd, wraps=(lambda function: function, compiled)):
    for wrap in wraps:
        for ours, exact in zip(results(package, wrap), expected, strict=True):
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)

def modules():
    return [name for name in sys.modules if name.split(".")[0] == "fused_kd"]

old = fused_kd
step = compiled(lambda: old.kd_loss(student, teacher, labels, temperature=2.0))
torch.testing.assert_close(step(), expected[0])
check()
"""

RELOADED = """
for name in sys.argv[2:] or reversed(modules()):
    importlib.reload(sys.modules[name])
    check(wraps=(lambda function: function,))
check()
torch.testing.assert_close(step(), expected[0])
"""

IMPORTED_ANEW = """
pending = [loss(*given, temperature=2.0) for loss, given in losses(old)]
for turn in range(2):
    for name in modules():
        del sys.modules[name]
    import fused_kd
    assert fused_kd is not old
    check(fused_kd)
    check(old)
    torch.testing.assert_close(step(), expected[0])
for loss in pending:
    loss.backward()
torch.testing.assert_close(student.grad, expected[1])
"""

EDITED = """
import pathlib
ops = sys.modules["fused_kd.operators"]
path = pathlib.Path(ops.__file__)
text = path.read_text()
path.write_text(text.replace(", weights, unpacked(", ", weights * torch.nan, unpacked("))
assert path.read_text() != text
importlib.reload(ops)
torch._dynamo.reset()
for wrap in (lambda function: function, compiled):
    assert next(results(fused_kd, wrap)).isnan()
path.write_text(text.replace("bool ce_in_loss", "bool with_ce"))  # a schema
importlib.reload(ops)
torch._dynamo.reset()
check()
assert "with_ce" in str(ops.losses.packet.default._schema)
"""


def run(code: str, folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-B", "-c", GIVEN + code, str(folder), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env={"PYTHONPATH": str(folder)})
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(
    "names", [(), ("fused_kd.operators", "fused_kd.heads.operator", "fused_kd.functional", "fused_kd")]
)
def test_modules_may_be_reloaded(names):
    run(RELOADED, PACKAGE.parent, *names)


def test_the_package_may_be_imported_anew():
    run(IMPORTED_ANEW, PACKAGE.parent)


def test_reloaded_operators_are_the_edited_ones(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "fused_kd", ignore=shutil.ignore_patterns("__pycache__", "cli"))
    run(EDITED, tmp_path)
