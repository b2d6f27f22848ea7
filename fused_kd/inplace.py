"""Checks of the memory that `inplace_backward` overwrites: arithmetic on sizes and strides, which reads no element."""

import math
from collections import Counter

import torch
from torch import Tensor

MOST_STEPS = 10_000  # steps of a search: a few milliseconds


def check_inplace_backward(student: Tensor, teacher: Tensor | None) -> None:
    """Raise ValueError if the student's logits may not be overwritten."""
    for tensor, what in ((student, "a leaf"), (student._base, "a view of a leaf")):
        if tensor is not None and tensor.is_leaf and tensor.requires_grad:
            raise ValueError(
                f"inplace_backward: expected student_logits computed by a model, got {what} that requires grad, whose "
                f"memory its owner holds; pass inplace_backward=False"
            )
    if overlaps_itself(student):
        raise ValueError(
            f"inplace_backward: expected student_logits whose elements have memory of their own, got strides "
            f"{student.stride()} for shape {tuple(student.shape)} (an expanded tensor?); pass "
            f"inplace_backward=False, or a copy"
        )
    if teacher is not None and not torch.compiler.is_compiling() and _is_spoilt(teacher, student):
        raise ValueError(
            "inplace_backward: expected teacher_logits with memory of their own, or exactly that of student_logits, got "
            "some in the place of other logits of the student, which are written over; pass inplace_backward=False, or "
            "a copy"
        )


def _is_spoilt(teacher: Tensor, student: Tensor) -> bool:
    """Return whether overwriting the student changes a logit of the teacher before that is read.

    It does not if each logit of the teacher lies in the place of the same logit of the student, as in `student.detach()`:
    a pair of logits is read before its gradient is written.
    """
    strides = [pair for *pair, size in zip(teacher.stride(), student.stride(), teacher.shape, strict=True) if size > 1]
    same_place = teacher.data_ptr() == student.data_ptr() and all(a == b for a, b in strides)
    return shares_memory(teacher, student) and not (same_place and teacher.dtype == student.dtype)


def overlaps_itself(tensor: Tensor) -> bool:
    """Return whether two elements of a tensor share memory.

    While a compiler traces, symbolic sizes cannot be compared, so only expanded dimensions are found.
    """
    dimensions = [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
    if torch.compiler.is_compiling():
        return any(stride == 0 for stride, _ in dimensions)
    extent = 1  # the elements spanned by the dimensions so far, which come in the order of their strides
    for stride, size in sorted(dimensions):
        if stride < extent:
            return True
        extent += stride * (size - 1)
    return False


def shares_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether an element of `a` and one of `b` have a byte in common; True if the search takes too long.

    The distance from an element of `a` to one of `b` is a sum of strides times indices, in which the terms of `a` are
    negative.  The indices of `a` are counted down from their last one, so that no term is negative.  Equal strides are one
    term, whose largest index is the sum of their largest indices.
    """
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata or 0 in (a.numel(), b.numel()):
        return False
    a_width, b_width = a.element_size(), b.element_size()
    distance = int(a.storage_offset()) * a_width - int(b.storage_offset()) * b_width  # the sum that terms must reach
    largest: Counter[int] = Counter()  # the largest index of each stride in bytes
    for tensor, sign in ((a, 1), (b, 0)):
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True):
            stride *= tensor.element_size()
            distance += sign * stride * (size - 1)
            largest[stride] += (size - 1) * (stride > 0)
    terms = sorted((term for term in largest.items() if term[1]), reverse=True)
    return _has_sum(terms, distance - b_width + 1, distance + a_width - 1)


def _has_sum(terms: list[tuple[int, int]], low: int, high: int) -> bool:
    """Return whether some sum of factor * x over the terms lies from `low` to `high`.

    Each term is (factor, largest x), and its x is an integer from 0 to the largest x.
    """
    after = [0]  # the largest sum of the terms from each index on
    divisors = [0]  # the greatest common divisor of their factors
    for factor, largest in reversed(terms):
        after.insert(0, after[0] + factor * largest)
        divisors.insert(0, math.gcd(divisors[0], factor))
    open_, steps = [(0, low, high)], 0
    while open_:
        i, low, high = open_.pop()
        if low <= 0 <= high:
            return True
        if i == len(terms) or high // divisors[i] * divisors[i] < low:
            continue
        factor, largest = terms[i]
        first, last = max(0, -((after[i + 1] - low) // factor)), min(largest, high // factor)
        steps += max(0, last - first + 1)
        if steps > MOST_STEPS:
            return True
        open_ += [(i + 1, low - factor * x, high - factor * x) for x in range(first, last + 1)]
    return False
