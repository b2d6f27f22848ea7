"""Repairs of Triton's interpreter: for releases of numpy that are newer than it, and for speed."""

import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from fused_kd.testing.interpreter import _take_indices_from_arrays


@pytest.mark.parametrize("scope", [(), (object(),)])  # Triton 3.6 and later pass one
@pytest.mark.parametrize("data", [np.int32(3), np.array(3), np.array([3]), np.array([[3]])], ids=str)
def test_an_array_of_one_element_is_an_index(data, scope):
    class Tensor:
        handle = SimpleNamespace(data=data)

    def patch_tensor(tensor, *given):
        assert given == scope
        tensor.__index__ = None

    interpreter = SimpleNamespace(_patch_lang_tensor=patch_tensor)
    for _ in range(2):
        _take_indices_from_arrays(interpreter)
        interpreter._patch_lang_tensor(Tensor, *scope)
        assert list(range(Tensor())) == [0, 1, 2]


def test_an_interpreter_without_the_function_is_left_alone():
    interpreter = SimpleNamespace()
    _take_indices_from_arrays(interpreter)
    assert vars(interpreter) == {}


def test_a_hastened_interpreter_gives_the_same_bits():
    code = """
import torch
from fused_kd import kd_loss
from fused_kd.testing import interpreter, launching

interpreter._take_indices_from_arrays(__import__("triton.runtime.interpreter").runtime.interpreter)
torch.manual_seed(0)
given = [torch.randn(3, 200).to(dtype) for dtype in (torch.float32, torch.bfloat16)]
labels = torch.tensor([1, -100, 199])

def results():
    found = []
    for launch in ("one-launch", "two-launches"):
        for options in ({}, {"temperature": 2.5, "logit_softcap": 5.0}):
            student = given[1].clone().requires_grad_()
            with launching(launch):
                loss = kd_loss(student, given[0], labels, **options)
                loss.backward()
            found += [loss.detach(), student.grad]
    return found

before = results()
for _ in range(2):
    interpreter.hasten()
    assert all(map(torch.equal, before, results()))
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)
