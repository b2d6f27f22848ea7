"""Invalid arguments: for each argument of a valid call, values to put in its place, and the error that each must raise."""

import functools
import math
import warnings
from decimal import Decimal
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from .strategies import Call


class Spoil(NamedTuple):
    name: str
    values: st.SearchStrategy[Any]
    error: type[Exception]
    named: tuple[str, ...] = ()  # other arguments that the message may name, where the two only disagree


one_of = st.sampled_from
TENSORS = one_of([torch.tensor(1.0), torch.ones(2)])
NOT_A_TENSOR = one_of(["x", 1.0, 2, True, [0.5], (), {}, np.ones(2), [[0.1] * 100] * 100])
NOT_A_NUMBER = st.booleans() | one_of([np.True_, "1", b"1", 1j, {}, {1.0}, np.ones(1), Fraction(1, 2), Decimal(1), int])
NOT_AN_INTEGER = NOT_A_NUMBER | st.floats() | TENSORS | st.just(np.float32(1))
NOT_POSITIVE = st.floats(max_value=0) | st.integers(max_value=0) | one_of([math.nan, math.inf])
OUT_OF_RANGE = st.floats(1e-320, 1e-19) | st.floats(1e19, 1e308) | one_of([10**19, 10**400])
NOT_A_FLAG = one_of([None, 0, 1, "yes", 1.0, np.True_, torch.tensor(True), torch.ones(2), np.ones(2)])
NOT_FLOAT = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
NOT_CLASS_IDS = [torch.float32, torch.bool, torch.uint8, torch.int16, torch.uint64, torch.complex128]
NOT_REAL = [torch.complex64, torch.float8_e5m2]


def _nested(like: Tensor, **layout: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # in beta
        return torch.nested.nested_tensor([like.reshape(-1)], **layout)


OTHER_LAYOUTS = one_of([Tensor.to_sparse, _nested, functools.partial(_nested, layout=torch.jagged)])


def _no_such_tensors(name: str, shape: tuple[int, ...], dtype: torch.dtype, others: list[torch.dtype]) -> list[Spoil]:
    """In the place of a tensor that may have the dtype, and none of the others."""
    return [
        Spoil(name, one_of(others).map(lambda other: torch.zeros(shape, dtype=other)), TypeError),
        Spoil(name, OTHER_LAYOUTS.map(lambda layout: layout(torch.zeros(shape, dtype=dtype))), TypeError),
        Spoil(name, st.builds(torch.zeros, st.just(shape), dtype=st.just(dtype), device=st.just("meta")), ValueError),
    ]


@st.composite
def _other_shapes(draw: st.DrawFn, shape: tuple[int, ...], *rest: int) -> Tensor:
    """Zeros of the shape with one dimension more or less, or of another size, and the rest as it is."""
    changed = list(shape)
    dimension = draw(st.integers(0, len(changed)))
    if dimension == len(changed):
        changed.append(draw(st.integers(0, 3)))
    elif draw(st.booleans()):
        changed[dimension] += draw(st.integers(1, 3))
    else:
        del changed[dimension]
    return torch.zeros([*changed, *rest])


@st.composite
def _one_value(draw: st.DrawFn, like: Tensor, values: st.SearchStrategy[Any], first: int = 0) -> Tensor:
    """The tensor, but for one value somewhere, of an index from `first` on in the last dimension."""
    wrong, places = like.clone(), torch.arange(like.numel()).reshape(like.shape)
    places = places[..., first:] if first else places
    wrong.view(-1)[draw(st.sampled_from(places.flatten().tolist()))] = draw(values)
    return wrong


def _pairs(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return values | st.tuples(values, st.just(2.0)) | st.tuples(st.just(2.0), values).map(list)


def _spoils_of_both(call: Call, rows: torch.Size, V: int, columns: int) -> list[Spoil]:
    """Return the spoils of the arguments that both losses have; the labels are below V, `columns` is the narrower width."""
    arguments = call.arguments
    labels, alpha, ignore_index = arguments["labels"], arguments["alpha"], arguments["ignore_index"]
    ones, classes = torch.ones(rows), torch.zeros(rows, dtype=torch.int64 if labels is None else labels.dtype)
    nothing = st.none()
    held = torch.iinfo(classes.dtype)
    found = [
        Spoil("temperature", NOT_A_NUMBER | TENSORS | nothing | st.just([1.0]), TypeError),
        Spoil("temperature", NOT_POSITIVE | OUT_OF_RANGE, ValueError),
        Spoil("logit_scale", _pairs(NOT_A_NUMBER | TENSORS | nothing), TypeError),
        Spoil("logit_softcap", _pairs(NOT_A_NUMBER | TENSORS), TypeError),
        *(Spoil(name, _pairs(NOT_POSITIVE | OUT_OF_RANGE), ValueError) for name in ("logit_scale", "logit_softcap")),
        *(Spoil(name, one_of([(), (1.0,), [1.0] * 3]), ValueError) for name in ("logit_scale", "logit_softcap")),
        Spoil("ignore_index", NOT_AN_INTEGER | nothing, TypeError),
        Spoil(
            "reduction", one_of(["", "avg", "Mean", None, 1, ["mean"], np.array(["mean"]), torch.ones(2)]), ValueError
        ),
        Spoil("divergence", one_of(["", "kl", "Forward_KL", None, 1, ["reverse_kl"], torch.ones(2)]), ValueError),
        Spoil("shift", NOT_A_FLAG, TypeError),
        Spoil("vocab_size", NOT_AN_INTEGER, TypeError),
        Spoil("vocab_size", st.integers(max_value=0) | st.integers(min_value=columns + 1), ValueError),
        Spoil("return_parts", NOT_A_FLAG, TypeError),
        Spoil("teacher_grad", NOT_A_FLAG, TypeError),
        *_no_such_tensors("labels", rows, classes.dtype, NOT_CLASS_IDS),
        Spoil("labels", NOT_A_TENSOR, TypeError),
        Spoil("labels", _other_shapes(rows).map(Tensor.long), ValueError),
        *_no_such_tensors("token_weights", rows, torch.float32, NOT_REAL),
        Spoil("token_weights", NOT_A_TENSOR, TypeError),
        Spoil("token_weights", _other_shapes(rows), ValueError),
        *_no_such_tensors("alpha", rows, torch.float32, NOT_FLOAT),
        Spoil("alpha", NOT_A_NUMBER | nothing | st.just([0.5]), TypeError),
        Spoil(
            "alpha", st.floats(max_value=-1e-9) | st.floats(1.0000001) | st.integers(2) | st.just(math.nan), ValueError
        ),
        Spoil("alpha", _other_shapes(rows).filter(lambda alpha: alpha.dim() > 0), ValueError),
    ]
    if labels is not None:
        too_large = st.integers(max_value=held.min - 1) | st.integers(min_value=held.max + 1)
        found.append(Spoil("ignore_index", too_large, ValueError))
        if isinstance(alpha, Tensor) or alpha < 1 or arguments["shift"]:
            found.append(Spoil("labels", nothing, ValueError))
    if labels is None or not rows:
        found.append(Spoil("shift", st.just(True), ValueError, ("labels",)))
    if ones.numel():
        no_class = (st.integers(held.min, -1) | st.integers(V, held.max)).filter(lambda label: label != ignore_index)
        first = int(arguments["shift"])  # a label that is not read may be no class
        if held.min <= ignore_index <= held.max and (not first or rows[-1] > 1):
            found.append(Spoil("labels", _one_value(classes, no_class, first), IndexError))
        found.append(Spoil("alpha", _one_value(ones, one_of([-0.1, 1.5, math.nan])), ValueError))
    if arguments["reduction"] != "mean":
        return [*found, Spoil("num_items", one_of([4, 4.0, torch.tensor(4)]), ValueError)]
    return [
        *found,
        Spoil("num_items", NOT_A_NUMBER | st.just([1.0]), TypeError),
        Spoil("num_items", NOT_POSITIVE | OUT_OF_RANGE, ValueError),
        Spoil("num_items", one_of([torch.ones(2), torch.ones(0), torch.ones(1, 2)]), ValueError),
        Spoil("num_items", one_of([-1.0, math.nan, math.inf]).map(torch.tensor), ValueError),
        *_no_such_tensors("num_items", (), torch.float32, [*NOT_REAL, torch.bool]),
    ]


def kd_spoils(call: Call) -> list[Spoil]:
    arguments = call.arguments
    student, teacher, vocab_size = (arguments[name] for name in ("student_logits", "teacher_logits", "vocab_size"))
    *rows, width = student.shape
    columns = width if teacher is None else min(width, teacher.shape[-1])
    found = _spoils_of_both(call, student.shape[:-1], vocab_size or columns, columns)
    for name in ("student_logits", "teacher_logits"):
        found += [
            *_no_such_tensors(name, student.shape, torch.float32, NOT_FLOAT),
            Spoil(name, NOT_A_TENSOR, TypeError),
            Spoil(name, one_of([torch.ones(()), torch.zeros(*rows, 0)]), ValueError),
        ]
    others = ("teacher_logits", "labels", "alpha", "token_weights")
    found += [
        Spoil("student_logits", st.none(), TypeError),
        Spoil("student_logits", _other_shapes(tuple(rows), width), ValueError, others),
        Spoil("teacher_logits", _other_shapes(tuple(rows), width), ValueError),
        Spoil("inplace_backward", NOT_A_FLAG, TypeError),
    ]
    if vocab_size is None:
        found.append(Spoil("teacher_logits", st.just(torch.zeros(*rows, width + 1)), ValueError))
    if isinstance(arguments["alpha"], Tensor) or arguments["alpha"] > 0:
        found.append(Spoil("teacher_logits", st.none(), ValueError))
    if not arguments["inplace_backward"]:  # the logits are a leaf then
        found.append(Spoil("inplace_backward", st.just(True), ValueError))
    return found


def linear_kd_spoils(call: Call) -> list[Spoil]:
    arguments = call.arguments
    hidden, weight, teacher_weight = (arguments[f"{n}"] for n in ("student_hidden", "student_weight", "teacher_weight"))
    columns = min(w.shape[0] for w in (weight, teacher_weight) if w is not None)
    found = _spoils_of_both(call, hidden.shape[:-1], arguments["vocab_size"] or columns, columns)
    for who in ("student", "teacher"):
        hidden, weight = arguments[f"{who}_hidden"], arguments[f"{who}_weight"]
        if hidden is None:
            found.append(Spoil("teacher_bias", st.just(torch.ones(columns)), ValueError))
            continue
        (*rows, H), (V, _) = hidden.shape, weight.shape
        other = torch.float16 if hidden.dtype == torch.float32 else torch.float32
        for part, like in (("hidden", hidden), ("weight", weight), ("bias", torch.zeros(V))):
            name = f"{who}_{part}"
            found += [
                *_no_such_tensors(name, like.shape, torch.float32, NOT_FLOAT),
                Spoil(name, NOT_A_TENSOR, TypeError),
            ]
            if part != "hidden":
                found.append(Spoil(name, st.just(torch.zeros(like.shape, dtype=other)), ValueError))
        missing = TypeError if who == "student" else ValueError
        others = (
            f"{who}_weight",
            *(("teacher_hidden", "labels", "alpha", "token_weights") if who == "student" else ()),
        )
        found += [
            *(Spoil(f"{who}_{part}", st.none(), missing) for part in ("hidden", "weight")),
            Spoil(
                f"{who}_hidden",
                one_of([torch.ones(()), torch.zeros(*rows, 0), torch.zeros(*rows, H + 1)]),
                ValueError,
                others,
            ),
            Spoil(
                f"{who}_hidden",
                _other_shapes(tuple(rows), H).map(lambda z, to=hidden.dtype: z.to(to)),
                ValueError,
                others,
            ),
            Spoil(f"{who}_weight", one_of([(V,), (V, H + 1), (1, V, H), (0, H)]).map(torch.zeros), ValueError),
            Spoil(f"{who}_bias", one_of([(V + 1,), (), (V, 1), (1, V)]).map(torch.zeros), ValueError),
        ]
    return [
        *found,
        Spoil("logits_dtype", one_of(["float32", np.float32, 1, torch.ones(2), np.ones(2), float]), TypeError),
        Spoil("logits_dtype", one_of([torch.int64, torch.complex64, torch.float8_e4m3fn]), ValueError),
        Spoil("workspace_bytes", NOT_AN_INTEGER, TypeError),
        Spoil("workspace_bytes", st.integers(max_value=127), ValueError),  # a row of 16-bit logits takes 128
    ]
