"""The check for shared memory, compared with numpy's exact one."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fused_kd import inplace

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@st.composite
def views(draw, elements):  # of a buffer of so many float64
    dtype = draw(st.sampled_from(DTYPES))
    room = elements * 8 // dtype.itemsize
    shape = draw(st.lists(st.integers(0, 6), max_size=4))
    strides = [draw(st.integers(0, 40)) for _ in shape]
    reach = sum(stride * max(0, size - 1) for stride, size in zip(strides, shape, strict=True))
    return dtype, shape, strides, draw(st.integers(0, room - reach - 1))


@given(data=st.data())
def test_tensors_share_memory_where_numpy_says_so(data):
    buffer = torch.zeros(800, dtype=torch.float64)
    pair = []
    for _ in range(2):
        dtype, shape, strides, offset = data.draw(views(buffer.numel()))
        pair.append(buffer.view(dtype).as_strided(shape, strides, offset))
    arrays = [
        np.lib.stride_tricks.as_strided(
            np.frombuffer(buffer.numpy(), np.dtype(f"V{tensor.element_size()}"))[tensor.storage_offset() :],
            tensor.shape, [stride * tensor.element_size() for stride in tensor.stride()],
        )
        for tensor in pair
    ]  # fmt: skip
    expected = np.shares_memory(*arrays)
    assert inplace.shares_memory(*pair) == inplace.shares_memory(*reversed(pair)) == expected


@pytest.mark.parametrize("size", [10, 10_000])
def test_columns_that_alternate_are_apart(size):
    """Halves of every row, and every other column, of as many logits as a model has."""
    logits = torch.empty(8, 2 * size, device="meta")
    assert not inplace.shares_memory(logits[:, ::2], logits[:, 1::2])
    assert not inplace.shares_memory(logits[:, :size], logits[:, size:])
    assert inplace.shares_memory(logits[:, : size + 1], logits[:, size:])
    assert not inplace.shares_memory(logits, torch.empty_like(logits))


def test_a_search_that_takes_too_long_says_that_memory_is_shared(monkeypatch):
    buffer = torch.empty(100, device="meta")
    apart = buffer.as_strided((10,), (5,), 0), buffer.as_strided((10,), (7,), 22)
    assert not inplace.shares_memory(*apart)
    monkeypatch.setattr(inplace, "MOST_STEPS", 3)
    assert inplace.shares_memory(*apart)
