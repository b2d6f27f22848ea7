"""`kd_loss`: the one place where a user's arguments are checked and shaped."""

import torch
from torch import Tensor

from . import checks
from .autograd import KDLossFunction, KDOptions
from .output import KDLossOutput
from .rows import as_rows, row_weights


def kd_loss(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor | None,  # [..., V]
    labels: Tensor | None = None,  # [...]
    *,
    alpha: float | Tensor = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,  # [...]
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    inplace_backward: bool = False,
    return_parts: bool = False,
) -> Tensor | KDLossOutput:
    """Knowledge-distillation loss from logits, without a probability ever written to memory.

        L = (1 - alpha) CE(y, softmax(z_s)) + alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T))

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531).  The gradient goes
    to the student only; the teacher is a constant.  Nothing synchronises with the host.

    Args:
        student_logits: `[..., V]`, float32, bfloat16, float16, or float64 on the CPU; any number of leading dimensions
            and any strides.  A slice such as `logits[:, :-1]` is not copied.
        teacher_logits: the same shape; dtype and strides of its own.  May be None where alpha is 0.
        labels: `[...]`, int32 or int64, class ids in [0, V) or `ignore_index`.  A row that is ignored adds nothing to
            either term and costs nothing; its logits may hold anything.  Without labels alpha must be 1.
        alpha: weight of the KL term in [0, 1]: 0 is supervised training, 1 a copy of the teacher.  A tensor gives one
            value a row (1 for a row whose label is not to be trusted).
        temperature: T, > 0, of both distributions in the KL term.
        ignore_index: the label of rows that do not count.
        reduction: "mean" divides by the sum of the weights of the rows that count, "sum", or "none" for one value a
            row.  Where no row counts the loss is 0.
        token_weights: `[...]`, one weight a row.  A row of weight 0 counts as ignored.
        num_items: replaces the divisor of "mean", for gradient accumulation: the number of rows that count in the
            whole batch.
        vocab_size: how many leading columns are real, where vocabularies are padded (to different sizes even).  The
            rest adds nothing, whatever it holds, and its gradient is 0.
        inplace_backward: the gradient takes the memory of the student's logits, which saves an `[N, V]` array.  Using
            the logits after backward then raises PyTorch's error about a tensor modified in place.
        return_parts: return `KDLossOutput(loss, kl, ce)`, with detached parts for logging.

    Returns:
        The loss in float32 (float64 if an input is float64): a scalar, or `[...]` with reduction "none".  alpha and
        token_weights, where they are tensors that require it, get gradients too.

    Raises:
        TypeError, ValueError: the argument's name, what was expected and what came.  Nothing has been modified.
        IndexError: a label outside [0, V) on the CPU.  On a GPU, where raising would need a synchronisation, the loss
            of such a row is NaN.
    """
    V = checks.check_logits(student_logits, teacher_logits, vocab_size)
    checks.check_options(temperature, ignore_index, reduction, num_items)
    checks.check_alpha(alpha, student_logits, teacher_logits, labels)
    if labels is not None:
        checks.check_labels(labels, student_logits, V, ignore_index)
    if token_weights is not None:
        checks.check_token_weights(token_weights, student_logits)
    if inplace_backward:
        checks.check_inplace_backward(student_logits)

    student = as_rows(student_logits)
    N = student.shape[0] * student.shape[1]
    in_float64 = torch.float64 in (student_logits.dtype, None if teacher_logits is None else teacher_logits.dtype)
    dtype = torch.float64 if in_float64 else torch.float32
    labels = None if labels is None else labels.reshape(N).contiguous()
    weights = row_weights(
        labels,
        None if token_weights is None else token_weights.reshape(N),
        alpha.reshape(N) if isinstance(alpha, Tensor) else alpha,
        rows=N,
        device=student.device,
        temperature=temperature,
        vocabulary=V,
        ignore_index=ignore_index,
        reduction=reduction,
        num_items=num_items,
    )
    ce_in_loss = isinstance(alpha, Tensor) or alpha < 1
    kl_in_loss = isinstance(alpha, Tensor) or alpha > 0
    need_ce = labels is not None and (ce_in_loss or return_parts)
    teacher = None
    if teacher_logits is not None and (kl_in_loss or return_parts):
        teacher = as_rows(teacher_logits.detach()[..., :V])
    losses, ce, kl = KDLossFunction.apply(
        student,
        teacher,
        labels if need_ce else None,
        weights.ce,
        weights.kl,
        KDOptions(float(temperature), V, ce_in_loss, kl_in_loss, inplace_backward, dtype),
    )
    shape = student_logits.shape[:-1]
    loss: Tensor = (losses.reshape(shape) if reduction == "none" else losses.sum()).to(dtype)
    if not return_parts:
        return loss
    return KDLossOutput(
        loss,
        weights.reduce(kl, reduction, shape).to(dtype) if teacher is not None else None,
        weights.reduce(ce, reduction, shape).to(dtype) if need_ce else None,
    )
