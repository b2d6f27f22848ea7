"""Valid set-ups of a call: inference mode, autocast, shared memory, rows that do not count.

Each call is compared with the same call without the set-up, bit for bit if the set-up rounds nothing.
"""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused_kd import kd_loss, linear_kd_loss

from .oracle import relative_error
from .strategies import kd_calls, laid_out, linear_kd_calls
from .test_fuzz import cut, float64_too, run

pytestmark = pytest.mark.usefixtures("one_thread")
FEW = settings(max_examples=settings().max_examples // 8)
CALLS = {kd_loss: kd_calls(), linear_kd_loss: linear_kd_calls()}


def assert_same(ours: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert ours.keys() == expected.keys()
    for name, wanted in expected.items():
        assert (ours[name] is None) == (wanted is None)
        if wanted is not None:
            torch.testing.assert_close(ours[name], wanted, rtol=0, atol=0, equal_nan=True, msg=name)


def copied(tensor: Tensor) -> Tensor:
    """With its strides, on which the bits of a product depend."""
    storage = tensor.untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


@pytest.mark.parametrize("loss", CALLS)
@FEW
@given(data=st.data())
def test_constants_made_in_inference_mode(device, loss, data):
    with device:
        call = data.draw(CALLS[loss], label="call")
        arguments = dict(call.arguments)
        if arguments.pop("inplace_backward", False):  # its logits are computed, for one backward pass
            arguments["student_logits"] = arguments["student_logits"].detach().requires_grad_()
        with torch.inference_mode():
            made = {
                name: copied(value) if isinstance(value, Tensor) and not value.requires_grad else value
                for name, value in arguments.items()
            }
        with cut(call.tile):
            assert_same(run(loss, made, call.upstream), run(loss, arguments, call.upstream))


@FEW
@given(data=st.data())
def test_any_pair_of_dtypes_under_autocast_is_what_casting_gives(device, data):
    frozen = data.draw(st.booleans(), label="frozen")
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    autocast_dtype = data.draw(st.sampled_from([torch.bfloat16, torch.float16]), label="autocast")
    reduction = data.draw(st.sampled_from(["mean", "none"]), label="reduction")
    logits_dtype = data.draw(st.sampled_from([None, torch.float32]), label="logits_dtype")
    N, V, H = 5, 40, 8
    given = {
        f"{who}_{part}": torch.randn(shape, device=device).to(data.draw(dtypes, label=f"{who}_{part}"))
        for who in ("student", "teacher")
        for part, shape in {"hidden": (N, H), "weight": (V, H), "bias": (V,)}.items()
    }
    labels = torch.randint(V, (N,), device=device)
    options = {"temperature": 2.0, "reduction": reduction, "logits_dtype": logits_dtype}

    def results(tensors, context):
        leaves = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        for part in ("hidden", *(() if frozen else ("weight", "bias"))):
            leaves[f"student_{part}"].requires_grad_()
        with context:
            value = linear_kd_loss(labels=labels, **leaves, **options)
        value.sum().backward()
        return value.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    value, gradients = results(given, torch.autocast(device.type, dtype=autocast_dtype))
    cast = {name: tensor.to(autocast_dtype) for name, tensor in given.items()}
    expected, its_gradients = results(cast, contextlib.nullcontext())
    assert torch.equal(value, expected)
    for name, gradient in gradients.items():
        assert gradient.dtype == given[name].dtype
        coarser = max(torch.finfo(gradient.dtype).eps, torch.finfo(autocast_dtype).eps)
        assert relative_error(gradient, its_gradients[name].double()) <= coarser, name


@st.composite
def places(draw, rows: int, columns: int, *, apart: bool) -> tuple[int, int, int]:
    """Strides and offset of a `[rows, columns]` view; `apart`: no two elements in one place."""
    column = draw(st.integers(1, 3))
    row = draw(st.one_of(st.integers(column * columns, column * columns + 9), st.just(0 if not apart else 200)))
    if column > 1 and draw(st.booleans()):  # rows between one another's columns
        row = 1 if rows <= column else row
    return row, column, draw(st.integers(0, 60))


@pytest.mark.parametrize("whole", [False, True])
@FEW
@given(data=st.data())
def test_teacher_and_student_in_one_memory(device, whole, data):
    """In place their elements lie apart, or each in the place of the other; anything else is refused."""
    N, V = data.draw(st.integers(1, 4), label="N"), data.draw(st.integers(1, 30), label="V")
    in_place = data.draw(st.booleans(), label="in place")
    leaf = torch.randn(N if whole else 1000, V if whole else 1, device=device, requires_grad=True)
    memory = leaf * 1
    of_student = (V, 1, 0) if whole else data.draw(places(N, V, apart=True), label="student")
    same = data.draw(st.integers(0, 4), label="same place") == 0
    if whole:
        of_teacher = data.draw(st.sampled_from([(V, 1, 0), (0, 1, 0), (0, 1, V * (N - 1))]), label="teacher")
    else:
        of_teacher = of_student if same else data.draw(places(N, V, apart=False), label="teacher")

    def view(place) -> Tensor:
        row, column, offset = place
        return memory.as_strided((N, V), (row, column), offset)

    def elements(place) -> list[int]:
        row, column, offset = place
        return [offset + i * row + j * column for i in range(N) for j in range(V)]

    student, teacher = memory if whole else view(of_student), view(of_teacher).detach()
    options = {"labels": torch.randint(V, (N,), device=device), "temperature": 3.0}
    ours, theirs = elements(of_student), elements(of_teacher)
    spoilt = bool(set(ours) & set(theirs)) and ours != theirs
    expected = kd_loss(student, teacher.clone(), **options)
    (its_gradient,) = torch.autograd.grad(expected, leaf, retain_graph=True)
    before = memory.detach().clone()
    if in_place and spoilt:
        with pytest.raises(ValueError, match="inplace_backward: expected teacher_logits"):
            kd_loss(student, teacher, inplace_backward=True, **options)
        assert torch.equal(memory, before)
        return
    found = kd_loss(student, teacher, inplace_backward=in_place, **options)
    (gradient,) = torch.autograd.grad(found, leaf)
    assert torch.equal(found, expected)
    assert torch.equal(gradient, its_gradient)
    written = set(ours) if in_place else set()
    assert all(memory.view(-1)[i] == before.view(-1)[i] for i in range(memory.numel()) if i not in written)


@FEW
@given(data=st.data())
def test_rows_that_count_between_others(device, data):
    """They give what they give alone, on a CPU to the last bit; kernels sum columns in an order that strides decide."""
    of_a_cpu = float64_too(device)
    shapes = [(60,), (15, 4), (4, 15), (30, 1, 2)] if of_a_cpu else [(12,), (3, 4), (4, 3), (6, 1, 2)]
    shape = data.draw(st.sampled_from(shapes), label="shape")
    V = data.draw(st.integers(1, 40), label="V")
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]), label="dtype")
    layouts = st.sampled_from(["contiguous", "sliced", "padded rows", "transposed", "every other column"])
    pattern = data.draw(st.sampled_from(["every other", "last of each", "random", "runs", "one", "none"]), label="rows")
    N = math.prod(shape)
    index = torch.arange(N, device=device)
    counted = {
        "every other": index % 2 == 0,
        "last of each": index % shape[-1] != shape[-1] - 1,
        "random": torch.rand(N, device=device) < data.draw(st.sampled_from([0.1, 0.5, 0.9]), label="share"),
        "runs": (index // 7) % 2 == 0,
        "one": index == data.draw(st.integers(0, N - 1), label="row"),
        "none": index < 0,
    }[pattern]
    labels = torch.where(counted, torch.randint(V, (N,), device=device), -100)
    student, teacher = (torch.where(counted[:, None], 3 * torch.randn(N, V, device=device), torch.nan) for _ in "st")
    with device:
        student, teacher = (
            laid_out(z.to(dtype).reshape(*shape, V), data.draw(layouts, label="layout")) for z in (student, teacher)
        )
    options = {"temperature": data.draw(st.sampled_from([1.0, 2.0, 3.0, 0.7]), label="T"), "reduction": "none"}
    student.requires_grad_()
    tile = {"block_elements": data.draw(st.sampled_from([1, 100, 2**20]), label="block"), "splits": 1, "lanes": 16}
    with cut(tile):
        found = kd_loss(student, teacher, labels.reshape(shape), **options)
        (gradient,) = torch.autograd.grad(found.sum(), student)
        alone = student.detach().reshape(N, V)[counted].requires_grad_()
        expected = kd_loss(alone, teacher.reshape(N, V)[counted], labels[counted], **options)
        (its_gradient,) = torch.autograd.grad(expected.sum(), alone)
    exact = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(
        found.reshape(N)[counted], expected, **exact if of_a_cpu else {"rtol": 1e-5, "atol": 1e-6}
    )
    torch.testing.assert_close(
        gradient.reshape(N, V)[counted], its_gradient,
        **exact if of_a_cpu else {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6},
    )  # fmt: skip
    assert not found.reshape(N)[~counted].any()
    assert not gradient.reshape(N, V)[~counted].any()
