"""The operators `fused_kd::row_statistics` and `fused_kd::logit_gradient`: schemas, fake versions, device dispatch.

CUDA (and ROCm) tensors go to the Triton kernels, CPU tensors to `cpu.py`; with TRITON_INTERPRET=1, CPU tensors go to the
kernels too, which Triton then runs in Python.  Triton is imported when the first kernel is needed.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from . import cpu
from . import statistics as stats
from .logit_map import LogitMap

ROW_STATISTICS = "fused_kd::row_statistics"
LOGIT_GRADIENT = "fused_kd::logit_gradient"
LOGIT_GRADIENT_INPLACE = "fused_kd::logit_gradient_"

_GRADIENT_ARGUMENTS = (
    "Tensor? teacher, Tensor? labels, Tensor statistics, Tensor ce_weight, Tensor kl_weight, float temperature, "
    "int vocab_size, float[] student_map, float[] teacher_map"
)
for _name, _schema in {
    ROW_STATISTICS: "(Tensor student, Tensor? teacher, Tensor ce_weight, Tensor kl_weight, float temperature, "
    "bool need_ce, float[] student_map, float[] teacher_map) -> Tensor",
    LOGIT_GRADIENT: f"(Tensor student, {_GRADIENT_ARGUMENTS}) -> Tensor",
    LOGIT_GRADIENT_INPLACE: f"(Tensor(a!) student, {_GRADIENT_ARGUMENTS}) -> ()",
}.items():
    torch.library.define(_name, _schema, tags=torch.Tag.pt2_compliant_tag)

row_statistics = torch.ops.fused_kd.row_statistics
logit_gradient = torch.ops.fused_kd.logit_gradient
logit_gradient_ = torch.ops.fused_kd.logit_gradient_


def _kernels() -> ModuleType:
    try:
        from . import kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ModuleNotFoundError(
            "fused_kd runs CUDA tensors with Triton kernels, and the package triton is not installed: "
            "`pip install triton` (Linux), or move the tensors to the CPU",
            name="triton",
        ) from error
    return kernels


def _backend(student: Tensor, dtype: torch.dtype) -> ModuleType:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1" and dtype == torch.float32
    return _kernels() if student.is_cuda or interpreted else cpu


def _device_of(student: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(student.device) if student.is_cuda else nullcontext()


@torch.library.impl(ROW_STATISTICS, ("cpu", "cuda"))
def _row_statistics(
    student: Tensor,  # [outer, inner, V]
    teacher: Tensor | None,  # [outer', inner', V], as many rows; None leaves out d_T, m_t, e and c
    ce_weight: Tensor,  # [N]
    kl_weight: Tensor,  # [N]; a row with both weights 0 is not read, its statistics are those of no columns
    temperature: float,
    need_ce: bool,  # False leaves out d_1
    student_map: Sequence[float],  # a LogitMap
    teacher_map: Sequence[float],
) -> Tensor:  # [6, N], in the dtype of the weights
    with _device_of(student):
        parts = _backend(student, ce_weight.dtype).row_statistics(
            student, teacher, ce_weight, kl_weight, temperature, need_ce, LogitMap(*student_map), LogitMap(*teacher_map)
        )
        return stats.merge(parts, temperature)


@torch.library.register_fake(ROW_STATISTICS)
def _(student, teacher, ce_weight, *arguments):  # type: ignore[no-untyped-def]
    return ce_weight.new_empty(6, ce_weight.shape[0])


def _write_gradient(
    gradient: Tensor,  # [outer, inner, V'], may be the student
    student: Tensor,  # [outer, inner, V']
    teacher: Tensor | None,  # [outer', inner', V], as many rows; None leaves out KL
    labels: Tensor | None,  # [N]; None leaves out CE
    statistics: Tensor,  # [6, N]
    ce_weight: Tensor,  # [N]
    kl_weight: Tensor,  # [N]; a row with both weights 0 is not read, its gradient is 0
    temperature: float,
    vocab_size: int,  # V; columns from V to V' have gradient 0
    student_map: Sequence[float],  # a LogitMap
    teacher_map: Sequence[float],
) -> None:
    with _device_of(student):
        _backend(student, statistics.dtype).logit_gradient(
            student[..., :vocab_size], teacher, labels, statistics, ce_weight, kl_weight, temperature,
            gradient[..., :vocab_size], LogitMap(*student_map), LogitMap(*teacher_map),
        )  # fmt: skip
        gradient[..., vocab_size:] = 0


@torch.library.impl(LOGIT_GRADIENT, ("cpu", "cuda"))
def _logit_gradient(student: Tensor, *arguments) -> Tensor:  # type: ignore[no-untyped-def]
    gradient = torch.empty_like(student, memory_format=torch.contiguous_format)
    _write_gradient(gradient, student, *arguments)
    return gradient


@torch.library.register_fake(LOGIT_GRADIENT)
def _(student, *arguments):  # type: ignore[no-untyped-def]
    return torch.empty_like(student, memory_format=torch.contiguous_format)


@torch.library.impl(LOGIT_GRADIENT_INPLACE, ("cpu", "cuda"))
def _logit_gradient_(student: Tensor, *arguments) -> None:  # type: ignore[no-untyped-def]
    _write_gradient(student, student, *arguments)


@torch.library.register_fake(LOGIT_GRADIENT_INPLACE)
def _(student, *arguments):  # type: ignore[no-untyped-def]
    return None
