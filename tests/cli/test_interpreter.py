"""Repairs of Triton's interpreter for releases of numpy that are newer than it."""

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
