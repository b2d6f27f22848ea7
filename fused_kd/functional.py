"""The losses: the one place where a user's arguments are checked and shaped."""

from __future__ import annotations  # PyTorch 2.7 does not trace unions in the annotations of a function within another

import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks
from .autograd import (
    KDLossAndGradientFunction,
    KDLossFunction,
    LinearKDLossFunction,
    LinearKDRowLossesFunction,
    OverwriteFunction,
    Overwritten,
)
from .heads.products import RELEASE
from .heads.sweep import Head, LinearOptions, planned_chunk
from .logit_map import LogitMap, Scale, Softcap
from .options import KDLossOutput
from .rows import RowWeights, as_rows, counted_rows, row_weights
from .scaling import is_batched
from .sweep import KDOptions, fits_one_launch


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
    logit_softcap: Softcap = None,
    logit_scale: Scale = 1.0,
    teacher_grad: bool = False,
    inplace_backward: bool = False,
    return_parts: bool = False,
) -> Tensor | KDLossOutput:
    """Knowledge-distillation loss from logits, without a probability ever written to memory.

        L = (1 - alpha) CE(y, softmax(z_s)) + alpha T^2 KL(softmax(z_t / T) || softmax(z_s / T))

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531).  The teacher
    is a constant, unless `teacher_grad` is set.  Nothing synchronises with the host.

    Where the student's logits require a gradient it comes from the same launch as the loss, for an upstream gradient of
    1, on GPUs whose L2 cache holds the logits between two readings: each is then read from memory once, and backward
    hands the gradient on, or multiplies it in place.  Neither model's logits are kept.  By anything but a power of two a
    bfloat16 gradient is then rounded a second time (for a third 0.23% of its norm off, not 0.18%): `num_items` divides
    before.  Two launches, which keep the logits, take float16 logits, reduction "none", `teacher_grad`, a term that is
    only logged, a loss under `torch.compile`, other GPUs and the CPU.  The environment variable FUSED_KD_PLAN overrides
    the choice: "one-launch", "two-launches" or "auto", or a launch, as `fused_kd.launch.requested` describes it.

    Args:
        student_logits: `[..., V]`, float32, bfloat16, float16, or float64 on the CPU; any number of leading dimensions
            and any strides.  A slice such as `logits[:, :-1]` is not copied.
        teacher_logits: the same shape; dtype and strides of its own.  May be None where alpha is 0.
        labels: `[...]`, int32 or int64, class ids in [0, V) or `ignore_index`.  A row that is ignored adds nothing to
            either term and costs nothing; its logits may hold anything.  Without labels alpha must be 1.
        alpha: weight of the KL term in [0, 1]: 0 is supervised training, 1 a copy of the teacher.  A tensor gives one
            value per row (1 for a row whose label is not to be trusted), or, without dimensions, one for all rows.
        temperature: T, > 0, of both distributions in the KL term.  `torch.compile` compiles one that changes from call to
            call (annealing) twice, not for every value, with PyTorch from 2.9 on.
        ignore_index: the label of rows that do not count.
        reduction: "mean" divides by the sum of the weights of the rows that count, "sum", or "none" for one value a
            row.  Where no row counts the loss is 0.
        token_weights: `[...]`, one weight a row.  A row of weight 0 counts as ignored, unless the weights require grad: it
            is read then, for its weight's gradient, and still adds nothing to the loss.  Rows that hold NaN are to be
            ignored by their labels there.  Where "mean" has no weight but 0, the gradients of the weights are 0, as the
            loss is.
        num_items: replaces the divisor of "mean", for gradient accumulation: the number of rows that count in the
            whole batch.
        vocab_size: how many leading columns are real, where vocabularies are padded (to different sizes even).  The
            rest adds nothing, whatever it holds, and its gradient is 0.
        logit_softcap: c, > 0: the logits are c tanh(z / c) of what is passed (Gemma 2: 30).  None: no softcap.  A pair
            gives student and teacher one each.
        logit_scale: what is passed is multiplied by it first (Cohere's logit_scale; Granite: 1 / logits_scaling).  A pair
            likewise.
        teacher_grad: the teacher learns too (mutual, online distillation): its logits get the gradient of the KL term,
            alpha T (log-ratio - KL) q_T a row, from the same sweep.  A teacher that requires grad without it is warned of
            once, and is a constant.
        inplace_backward: the gradient takes the memory of the student's logits, which saves an `[N, V]` array.  It does so
            before the call returns, on every device, and nothing may read the logits afterwards.  It waits for backward
            where the logits are a view or float16, with reduction "none" or `teacher_grad`, where a term is only logged,
            and under `torch.compile`.  Backward raises RuntimeError if something saved the logits before they were
            written over, or was computed from them afterwards.  Refused are leaves that require grad, views of these,
            and teacher logits in the memory of other logits of the student.  Nothing is written over under `torch.func`.
        return_parts: return `KDLossOutput(loss, kl, ce)`, with detached parts for logging.

    Returns:
        The loss in float32 (float64 if an input is float64): a scalar, or `[...]` with reduction "none".  alpha and
        token_weights, where they are tensors that require it, get gradients too.

    Raises:
        TypeError, ValueError: the argument's name, what was expected and what came.  Nothing has been modified.
        IndexError: a label outside [0, V) on the CPU.  Where values are not looked at, the loss of such a row and its
            gradient are NaN: on a GPU, where that would need a synchronisation, under `torch.compile`, on the CPU too, and
            under the transforms of `torch.func`.  The same holds for an alpha outside [0, 1] or a num_items below 0 in a
            tensor, which elsewhere are a ValueError.
    """
    alpha, temperature, ignore_index, num_items, vocab_size = map(
        checks.plain, (alpha, temperature, ignore_index, num_items, vocab_size)
    )
    V = checks.check_logits(student_logits, teacher_logits, vocab_size)
    maps = checks.check_options(
        alpha=alpha, temperature=temperature, ignore_index=ignore_index, reduction=reduction, vocab_size=vocab_size,
        logit_softcap=logit_softcap, logit_scale=logit_scale, teacher_grad=teacher_grad,
        inplace_backward=inplace_backward, return_parts=return_parts,
    )  # fmt: skip
    inplace_backward = inplace_backward and not is_batched(student_logits)  # nothing is written over under torch.func
    if inplace_backward:
        checks.check_inplace_backward(student_logits, teacher_logits)
    terms = _terms(
        student_logits, teacher_logits, "teacher_logits", labels, V, maps,
        alpha=alpha, temperature=temperature, ignore_index=ignore_index, reduction=reduction,
        token_weights=token_weights, num_items=num_items, return_parts=return_parts,
    )  # fmt: skip
    student = as_rows(student_logits)
    teacher: Tensor | None = None
    if teacher_logits is not None and terms.need_kl:
        # A slice of all columns would be copied in backward, to put its gradient in its place.
        real = teacher_logits if teacher_logits.shape[-1] == V else teacher_logits[..., :V]
        (teacher,) = _teacher((as_rows(real),), teacher_grad, terms.options, "teacher_logits")
    arguments = teacher, terms.labels, terms.weights.ce, terms.weights.kl, terms.options
    if _takes_gradient_along(student_logits, teacher, terms, inplace_backward):
        written = None
        if inplace_backward:
            written = Overwritten()
            student = as_rows(OverwriteFunction.apply(student_logits, written))
        loss, ce, kl, _ = KDLossAndGradientFunction.apply(student, *arguments, written)
        return terms.output(loss, ce, kl)
    losses, ce, kl, _ = KDLossFunction.apply(student, *arguments, inplace_backward)
    return terms.output(losses if reduction == "none" else losses.sum(), ce, kl)


def _takes_gradient_along(
    student: Tensor,  # the user's, [..., V']
    teacher: Tensor | None,
    terms: _Terms,
    inplace_backward: bool,
) -> bool:
    """Whether the gradient is taken with the loss, for an upstream gradient of 1.

    Not in float16, where the gradient of a mean over many rows underflows before a loss scale multiplies it; not where the
    teacher learns; not under a compiler, whose backward pass would multiply it into a second array; not over a view, of
    whose gradient PyTorch would then make a copy.
    """
    return (
        terms.reduction != "none"
        and torch.is_grad_enabled()
        and student.requires_grad
        and student.dtype != torch.float16
        and not (teacher is not None and teacher.requires_grad)
        and not torch.compiler.is_compiling()
        and not (inplace_backward and student._is_view())
        and fits_one_launch(student, teacher, terms.labels, terms.options, in_place=inplace_backward)
    )


def linear_kd_loss(
    student_hidden: Tensor,  # [..., H_s]
    student_weight: Tensor,  # [V, H_s]
    teacher_hidden: Tensor | None,  # [..., H_t]
    teacher_weight: Tensor | None,  # [V, H_t]
    labels: Tensor | None = None,  # [...]
    *,
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    alpha: float | Tensor = 0.5,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    token_weights: Tensor | None = None,  # [...]
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    logit_softcap: Softcap = None,
    logit_scale: Scale = 1.0,
    teacher_grad: bool = False,
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    return_parts: bool = False,
) -> Tensor | KDLossOutput:
    """`kd_loss` from the last hidden states and the output heads: only a chunk of the logits exists at a time.

        logits = hidden weight^T + bias, of student and teacher

    The gradients of the student's hidden states, weight and bias are taken in the forward pass, chunk by chunk, each only
    where it is asked for; the weight's is summed in float32.  With reduction "none" they are taken in backward, which
    projects the chunks once more.  The teacher is a constant, unless `teacher_grad` is set.  Nothing synchronises with the
    host.

    Args:
        student_hidden: `[..., H_s]`, float32, bfloat16, float16, or float64 on the CPU; what the head takes, so after the
            model's last norm.
        student_weight: `[V, H_s]`, as in `nn.Linear`, in the dtype of the hidden states, or in another one under
            autocast; may be tied to the embeddings.
        teacher_hidden, teacher_weight: `[..., H_t]` and `[V, H_t]`, with a width and a dtype of their own.  May be None
            where alpha is 0.
        labels, alpha, temperature, ignore_index, reduction, token_weights, num_items, vocab_size, return_parts: as in
            `kd_loss`.  On the CPU rows that do not count are not projected; on a GPU leaving them out would need a
            synchronisation, so they are, and whatever they hold adds nothing.
        student_bias, teacher_bias: `[V]`.
        logit_softcap, logit_scale: as in `kd_loss`, applied to the head's output.
        teacher_grad: the teacher's hidden states, weight and bias get gradients, each where it requires one, and the
            memory and the products that take.  Teacher hidden states that require grad without it are warned of once.
        logits_dtype: of a chunk's logits.  Default: the dtype of the products, which is what a model's own head gives.
            torch.float32 spares 16-bit logits their rounding, and the gradient of a bias that of its terms.
        workspace_bytes: bound of the buffers for a chunk's logits, in bytes.  Default: what `plan_chunks` chooses.

    Under `torch.autocast` the products run in the autocast dtype, as those of `nn.Linear` would, whatever dtypes hidden
    states, weight and bias have; float64 is not cast.  The gradients have the dtype of what they are a gradient of.

    Returns:
        As `kd_loss`.

    Raises:
        TypeError, ValueError: the argument's name, what was expected and what came.  Nothing has been modified.
        IndexError: a label outside [0, V) on the CPU.  On a GPU, under `torch.compile` and under the transforms of
            `torch.func` the loss of such a row is NaN, and so are its gradients, as in `kd_loss`.
    """
    alpha, temperature, ignore_index, num_items, vocab_size, workspace_bytes = map(
        checks.plain, (alpha, temperature, ignore_index, num_items, vocab_size, workspace_bytes)
    )
    student_head = student_hidden, student_weight, student_bias
    teacher_head = teacher_hidden, teacher_weight, teacher_bias
    V = checks.check_heads(student_head, teacher_head, vocab_size)
    maps = checks.check_options(
        alpha=alpha, temperature=temperature, ignore_index=ignore_index, reduction=reduction, vocab_size=vocab_size,
        logit_softcap=logit_softcap, logit_scale=logit_scale, teacher_grad=teacher_grad, logits_dtype=logits_dtype,
        workspace_bytes=workspace_bytes, return_parts=return_parts,
    )  # fmt: skip
    checks.check_logits_dtype(student_hidden, teacher_hidden, logits_dtype)
    terms = _terms(
        student_hidden, teacher_hidden, "teacher_hidden", labels, V, maps,
        alpha=alpha, temperature=temperature, ignore_index=ignore_index, reduction=reduction,
        token_weights=token_weights, num_items=num_items, return_parts=return_parts,
    )  # fmt: skip
    counted = counted_rows(terms.weights)

    def rows(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or counted is None else tensor.index_select(0, counted)

    def as_matrix(hidden: Tensor) -> Tensor | None:  # [N, H] of the rows that count
        return rows(hidden.reshape(-1, hidden.shape[-1]))

    def spread(values: Tensor) -> Tensor:  # back to [N]
        if counted is None:
            return values
        return torch.zeros_like(terms.weights.row).index_copy(0, counted, values)

    student = as_matrix(student_hidden), student_weight, student_bias
    teacher: tuple[Tensor | None, ...] = None, None, None
    dtype = teacher_dtype = checks.products_dtype(student_hidden)
    if teacher_hidden is not None and terms.need_kl:
        teacher_dtype = checks.products_dtype(teacher_hidden)
        teacher = _teacher(
            (as_matrix(teacher_hidden), teacher_weight, teacher_bias), teacher_grad, terms.options, "teacher_hidden"
        )
    needed = tuple(
        tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in student + teacher
    )
    options = LinearOptions(terms.options, needed, dtype, teacher_dtype, logits_dtype, workspace_bytes)
    if (
        workspace_bytes is not None and not torch.compiler.is_compiling()
    ):  # refused now, not by backward, which takes more
        planned_chunk(Head(*student), None if teacher[0] is None else Head(*teacher), options)  # type: ignore[arg-type]
    function = LinearKDRowLossesFunction if reduction == "none" else LinearKDLossFunction
    loss, ce, kl, *_ = function.apply(
        *student, *teacher, rows(terms.labels), rows(terms.weights.ce), rows(terms.weights.kl), options
    )
    return terms.output(spread(loss) if reduction == "none" else loss, spread(ce), spread(kl))


def _teacher(
    tensors: tuple[Tensor | None, ...],  # logits; or hidden states, weight and bias
    learns: bool,  # teacher_grad
    options: KDOptions,
    name: str,  # of the first
) -> tuple[Tensor | None, ...]:
    """The teacher's tensors, without their graph unless it learns."""
    if learns and options.kl_in_loss:
        return tensors
    if not learns and tensors[0] is not None and tensors[0].requires_grad and torch.is_grad_enabled():
        warnings.warn(
            f"{name} requires grad, and the loss takes the teacher as a constant; compute it under torch.no_grad(), which "
            f"saves its graph, or pass teacher_grad=True if the teacher learns too",
            stacklevel=3,
        )
    return tuple(None if tensor is None else tensor.detach() for tensor in tensors)


UNUSUAL = 1234.5  # no graph compares a temperature with it, so only of a constant is it known which of them is larger


def _constant_or_tensor(temperature: float) -> float | Tensor:
    """A tensor, if it is a temperature that changes from call to call of one compiled graph."""
    temperature = float(temperature)
    if not torch.compiler.is_compiling() or RELEASE < (2, 9):
        return temperature
    is_known = torch.fx.experimental.symbolic_shapes.statically_known_true
    if is_known(temperature < UNUSUAL) or is_known(temperature >= UNUSUAL):
        return temperature
    return torch.ones((), dtype=torch.float64) * temperature  # torch.full would make it a constant


class _Terms(NamedTuple):
    """What both losses make of the arguments that they share."""

    labels: Tensor | None  # [N]; None where CE is not needed
    weights: RowWeights
    options: KDOptions
    need_kl: bool
    reduction: str
    shape: torch.Size  # of the leading dimensions
    return_parts: bool

    def output(
        self,
        loss: Tensor,  # reduced; [N] for reduction "none"
        ce: Tensor,  # [N]
        kl: Tensor,  # [N]
    ) -> Tensor | KDLossOutput:
        dtype = self.options.dtype
        loss = (loss.reshape(self.shape) if self.reduction == "none" else loss).to(dtype)
        if not self.return_parts:
            return loss
        return KDLossOutput(
            loss,
            self.weights.reduce(kl, self.reduction, self.shape).to(dtype) if self.need_kl else None,
            self.weights.reduce(ce, self.reduction, self.shape).to(dtype) if self.labels is not None else None,
        )


def _terms(
    student: Tensor,  # [..., any], logits or hidden states
    teacher: Tensor | None,
    teacher_name: str,
    labels: Tensor | None,  # [...]
    V: int,
    maps: tuple[LogitMap, LogitMap],
    *,
    alpha: float | Tensor,
    temperature: float,
    ignore_index: int,
    reduction: str,
    token_weights: Tensor | None,
    num_items: int | float | Tensor | None,
    return_parts: bool,
) -> _Terms:
    checks.check_num_items(num_items, reduction, student)
    checks.check_alpha(alpha, student, teacher, labels, teacher_name)
    if labels is not None:
        checks.check_labels(labels, student, V, ignore_index)
    if token_weights is not None:
        checks.check_token_weights(token_weights, student)
    N = math.prod(student.shape[:-1])  # not Size.numel, which makes a traced size a constant
    labels = None if labels is None else labels.reshape(N).contiguous()
    weights = row_weights(
        labels,
        None if token_weights is None else token_weights.reshape(N),
        alpha.reshape(N) if isinstance(alpha, Tensor) and alpha.dim() else alpha,
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
    in_float64 = torch.float64 in (student.dtype, None if teacher is None else teacher.dtype)
    dtype = torch.float64 if in_float64 else torch.float32
    return _Terms(
        labels if ce_in_loss or return_parts else None,
        weights,
        KDOptions(_constant_or_tensor(temperature), V, ce_in_loss, kl_in_loss, dtype, *maps),
        teacher is not None and (kl_in_loss or return_parts),
        reduction,
        student.shape[:-1],
        return_parts,
    )
