"""Functions, modules, overloads, reference and documents have the options of `fused_kd/options.py`."""

import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path

import pytest
import torch

from fused_kd import KDLoss, LinearKDLoss, kd_loss, linear_kd_loss, reference
from fused_kd import options as types
from fused_kd.options import Options

OPTIONS = {option.name: option.default for option in dataclasses.fields(Options)}
TYPES = typing.get_type_hints(Options)
MODULES = {kd_loss: KDLoss, linear_kd_loss: LinearKDLoss}
OF_ONE = {kd_loss: {"inplace_backward"}, linear_kd_loss: {"logits_dtype", "workspace_bytes", "memory", "compact"}}
both = pytest.mark.parametrize("loss", MODULES)
TABLE = (Path(__file__).parents[1] / "docs" / "getting-started.md").read_text()


def keywords(function):
    """The keyword arguments by name, with their defaults."""
    found = inspect.signature(function).parameters.values()
    return {parameter.name: parameter.default for parameter in found if parameter.kind == parameter.KEYWORD_ONLY}


def options(loss):
    of_others = set().union(*(names for other, names in OF_ONE.items() if other is not loss))
    return {name: default for name, default in OPTIONS.items() if name not in of_others}


@both
def test_a_function_has_the_options_with_their_types_and_defaults(loss):
    found = {name: default for name, default in keywords(loss).items() if name in OPTIONS}
    assert list(found.items()) == list(options(loss).items())  # in the same order too
    hints = typing.get_type_hints(loss)
    assert {name: hints[name] for name in found} == {name: TYPES[name] for name in found}


@both
def test_a_module_is_made_of_the_options_and_called_with_the_rest(loss):
    module = MODULES[loss]
    assert list(keywords(module.__init__).items()) == list(options(loss).items())
    called = inspect.signature(module.forward).parameters
    rest = [parameter for name, parameter in inspect.signature(loss).parameters.items() if name not in OPTIONS]
    assert [(p.name, p.default, p.kind, p.annotation) for p in list(called.values())[1:]] == [
        (p.name, p.default, p.kind, eval(p.annotation, {**vars(typing), **vars(types), "Tensor": torch.Tensor}))
        for p in rest
    ]
    hints = {name: kind for base in module.__mro__ for name, kind in inspect.get_annotations(base).items()}
    assert {name: hints[name] for name in options(loss)} == {name: TYPES[name] for name in options(loss)}
    assert vars(module())["_names"] == tuple(options(loss))


@both
def test_the_reference_has_the_signature_of_the_function(loss):
    ours, its = (inspect.signature(f).parameters.values() for f in (loss, getattr(reference, loss.__name__)))
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in its]
    hints = [typing.get_type_hints(f) for f in (loss, getattr(reference, loss.__name__))]
    assert hints[0] == hints[1]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing.get_overloads is of Python 3.11")
@pytest.mark.parametrize("loss", [*MODULES, reference.kd_loss, reference.linear_kd_loss])
def test_overloads_have_the_parameters_of_the_function(loss):
    """All but `return_parts`, by which they differ."""
    parameters = list(inspect.signature(loss).parameters.values())
    hints = typing.get_type_hints(loss)
    overloads = typing.get_overloads(loss)
    assert len(overloads) == 3
    for overload in overloads:
        its = list(inspect.signature(overload).parameters.values())
        assert [(p.name, p.kind) for p in its] == [(p.name, p.kind) for p in parameters]
        assert [p.default is p.empty for p in its[:-1]] == [p.default is p.empty for p in parameters[:-1]]
        its_hints = typing.get_type_hints(overload)
        assert all(its_hints[p.name] == hints[p.name] for p in parameters[:-1])


@both
def test_the_documents_name_every_argument(loss):
    described = re.search(r"    Args:\n(.*?)\n\n", inspect.getdoc(loss).replace("Args:", "    Args:"), re.DOTALL)[1]
    names = re.sub(r"\([^)]*\)|`[^`]*`", "", described)
    assert [name for name in inspect.signature(loss).parameters if not re.search(rf"\b{name}\b", names)] == []
    table = "\n".join(line for line in TABLE.splitlines() if line.startswith("| `"))
    assert [name for name in keywords(loss) if f"`{name}`" not in table] == []


def test_a_module_shows_the_options_that_are_not_the_default():
    assert repr(KDLoss()) == "KDLoss()"
    assert repr(KDLoss(shift=True, temperature=2, alpha=0.5)) == "KDLoss(temperature=2, shift=True)"
    assert repr(LinearKDLoss(alpha=torch.ones(2), logits_dtype=torch.float32)) == (
        "LinearKDLoss(alpha=Tensor(2,), logits_dtype=torch.float32)"
    )
