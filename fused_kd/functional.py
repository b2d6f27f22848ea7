"""The loss from logits: check the arguments, shape them, hand them on."""

from __future__ import annotations  # PyTorch 2.7 does not trace unions in the annotations of a function within another

from typing import Literal, overload

import torch
from torch import Tensor

from . import checks
from .autograd import (
    KDLossFunction,
    OverwriteFunction,
    Overwritten,
    SinglePassFunction,
    apply,
)
from .checks import plain
from .divergences import Divergence
from .inplace import check_inplace_backward
from .launch import SinglePass
from .options import KDLossOutput, Options, Scale, Softcap
from .rows import as_rows
from .scaling import is_batched
from .sweep import Logits, chosen_launch
from .terms import Terms, constant_teacher, make_terms


# fmt: off
@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None = ..., *,
    alpha: float | Tensor = ..., temperature: float = ..., divergence: str | Divergence = ..., ignore_index: int = ...,
    reduction: str = ..., shift: bool = ..., token_weights: Tensor | None = ...,
    num_items: int | float | Tensor | None = ..., vocab_size: int | None = ..., logit_softcap: Softcap = ...,
    logit_scale: Scale = ..., teacher_grad: bool = ..., inplace_backward: bool = ...,
    return_parts: Literal[False] = ...,
) -> Tensor: ...
@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None = ..., *,
    alpha: float | Tensor = ..., temperature: float = ..., divergence: str | Divergence = ..., ignore_index: int = ...,
    reduction: str = ..., shift: bool = ..., token_weights: Tensor | None = ...,
    num_items: int | float | Tensor | None = ..., vocab_size: int | None = ..., logit_softcap: Softcap = ...,
    logit_scale: Scale = ..., teacher_grad: bool = ..., inplace_backward: bool = ...,
    return_parts: Literal[True],
) -> KDLossOutput: ...
@overload
def kd_loss(
    student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None = ..., *,
    alpha: float | Tensor = ..., temperature: float = ..., divergence: str | Divergence = ..., ignore_index: int = ...,
    reduction: str = ..., shift: bool = ..., token_weights: Tensor | None = ...,
    num_items: int | float | Tensor | None = ..., vocab_size: int | None = ..., logit_softcap: Softcap = ...,
    logit_scale: Scale = ..., teacher_grad: bool = ..., inplace_backward: bool = ...,
    return_parts: bool,
) -> Tensor | KDLossOutput: ...
# fmt: on
def kd_loss(
    student_logits: Tensor,  # [..., V]
    teacher_logits: Tensor | None,  # [..., V]
    labels: Tensor | None = None,  # [...]
    *,
    alpha: float | Tensor = 0.5,
    temperature: float = 1.0,
    divergence: str | Divergence = "forward_kl",
    ignore_index: int = -100,
    reduction: str = "mean",
    shift: bool = False,
    token_weights: Tensor | None = None,  # [...]
    num_items: int | float | Tensor | None = None,
    vocab_size: int | None = None,
    logit_softcap: Softcap = None,
    logit_scale: Scale = 1.0,
    teacher_grad: bool = False,
    inplace_backward: bool = False,
    return_parts: bool = False,
) -> Tensor | KDLossOutput:
    """Return the knowledge-distillation loss of logits.  No array of probabilities is ever written to memory.

        L = (1 - alpha) CE(y, softmax(z_s)) + alpha T^2 D(softmax(z_t / T), softmax(z_s / T))

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015 (arXiv:1503.02531).  The teacher
    is a constant, unless `teacher_grad` is set.  Nothing synchronises with the host.

    Args:
        student_logits: `[..., V]`, float32, bfloat16, float16, or float64 on the CPU.  It may have any number of leading
            dimensions and any strides.  A slice such as `logits[:, :-1]` is not copied.
        teacher_logits: the same shape, with a dtype and strides of its own.  It may be None if alpha is 0.
        labels: `[...]`, int32 or int64, class ids in [0, V) or `ignore_index`.  An ignored row adds nothing to either term,
            and its logits may hold anything.  Without labels alpha must be 1.
        alpha: the weight of the divergence, in [0, 1].  With 0 the loss is the cross-entropy alone, with 1 the divergence
            alone.  A tensor gives one value per row (such as 1 for a row with a doubtful label), or one value for all rows
            if it has no dimensions.
        temperature: T > 0, applied to both distributions in the divergence.  With PyTorch 2.9 or newer, `torch.compile`
            compiles twice for a temperature that changes from call to call, not once for every value.
        divergence: D, of the student's distribution p and the teacher's q: a name, which stands for the defaults, or an
            object of `fused_kd.divergences`, or one of a class of your own.
            "forward_kl", `ForwardKL()`, is KL(q || p) = sum q log(q / p): the student covers all that the teacher says.
            "reverse_kl", `ReverseKL()`, is KL(p || q) = sum p log(p / q): the student leaves out what the teacher would not
            say.
            "mixed_kl", `MixedKL(reverse=0.5)`, is (1 - reverse) KL(q || p) + reverse KL(p || q).
            "jsd", `JSD(beta=0.5)`, is beta KL(q || m) + (1 - beta) KL(p || m), where m = (1 - beta) p + beta q.
            "skew_kl", `SkewKL(skew=0.1)`, is KL(q || skew q + (1 - skew) p).
            "skew_reverse_kl", `SkewReverseKL(skew=0.1)`, is KL(p || skew p + (1 - skew) q).
            "tvd", `TotalVariation()`, is sum |p - q| / 2.
            A token that both models mask with minus infinity adds nothing.  Forward KL is infinite if the teacher has mass
            at a token where the student has none.  Reverse KL is infinite if the student has mass where the teacher has
            none, and its gradient is then not finite either.  In the opposite cases the token adds nothing.  Mixed KL is
            infinite in both cases, and the others in neither.
        ignore_index: the label of rows that do not count.
        reduction: "mean" divides the sum by the sum of the weights of the rows that count.  "sum" does not divide.  "none"
            returns one value per row.  If no row counts, the loss is 0.
        shift: for causal language models, in which position t predicts token t + 1.  If True, `labels`, `token_weights` and
            an alpha per row are given per token, as a tokenizer gives them, and the loss moves all three by one position.
            Position t of the last leading dimension, the sequence, is scored with the label, weight and alpha of t + 1.
            The last position of every sequence counts as ignored.  Loss and gradients are those of `logits[:, :-1]` with
            `labels[:, 1:]`, and nothing of the size of the logits is sliced or copied.  The first label is not read.  A
            single leading dimension is one sequence, so do not flatten a batch.  `num_items` counts moved labels.
        token_weights: `[...]`, one weight per row.  A row of weight 0 counts as ignored.  If the weights require grad, such
            a row is read for the gradient of its weight, and still adds nothing to the loss; rows that hold NaN must then
            be ignored by their labels.  If all weights are 0 under "mean", the loss is 0 and so are their gradients.
        num_items: the divisor of "mean", for gradient accumulation: the number of rows that count in the whole batch.
            Default: the sum of the weights of the rows that count.
        vocab_size: the number of leading columns that are real, if vocabularies are padded (possibly to different sizes).
            The other columns add nothing, whatever they hold, and their gradient is 0.  Default: all columns.
        logit_softcap: c > 0.  The loss takes c tanh(z / c) of each given logit z (Gemma 2: 30).  None: no softcap.  A pair
            (student, teacher) gives one value for each model.
        logit_scale: a factor of the given logits, applied before the softcap (Cohere's logit_scale; Granite:
            1 / logits_scaling).  A pair (student, teacher) gives one value for each model.
        teacher_grad: whether the teacher learns too (mutual or online distillation).  Its logits get the gradient of the
            divergence from the same sweep: per row alpha T q_T (log(q_T / p_T) - D) for forward KL, and
            alpha T (q_T - p_T) for reverse KL.  If it is False and the teacher requires grad, a warning says that the
            teacher is taken as a constant.
        inplace_backward: whether the gradient overwrites the student's logits, which saves an `[N, V]` array.  They are
            overwritten before the call returns, on every device, so nothing may read them afterwards.  They are overwritten
            only in backward if they are a view or float16, with reduction "none" or `teacher_grad`, if a term is only
            logged, and under `torch.compile`.  Backward raises RuntimeError if something saved the logits before they were
            overwritten, or was computed from them afterwards.  ValueError refuses leaves that require grad, views of such
            leaves, and teacher logits in the memory of other logits of the student.  Nothing is overwritten under
            `torch.func`.
        return_parts: whether to return `KDLossOutput(loss, ce, divergence, entropy)`, all reduced alike, and all but the
            loss detached, for logging.  `divergence` is without alpha and T^2.  `entropy` is that of the student's
            distribution at temperature T, in nats, from the same sweep.  It needs neither labels nor a teacher.

    Returns:
        The loss in float32, or in float64 if an input is float64.  It is a scalar, or `[...]` with reduction "none".  It
        is differentiable also in alpha and token_weights, if these are tensors that require grad.

    Raises:
        TypeError, ValueError: an argument is wrong.  The message has its name, what was expected and what came.  Nothing
            has been modified.
        IndexError: a label is outside [0, V), on the CPU.  On a GPU the check would need a synchronisation; there, under
            `torch.compile` and under the transforms of `torch.func` the loss of such a row and its gradient are NaN.  The
            same holds for a tensor with an alpha outside [0, 1] or a num_items below 0, which elsewhere is a ValueError.

    On a CPU, and on a GPU whose L2 cache holds the logits between two readings, the student's gradient comes with the loss.
    Each logit is then read from memory once, and backward only multiplies the gradient.  If the upstream gradient is not a
    power of two, a bfloat16 gradient is rounded a second time: for a factor of 1/3 its error grows from 0.18% to 0.23% of
    the norm.  Pass `num_items` instead of dividing the loss.  The environment variable FUSED_KD_PLAN overrides the choice.
    It is "one-launch", "two-launches", "auto" or a launch, as `fused_kd.launching.requested` describes it.
    """
    num_items = plain(num_items)
    options = Options(
        alpha=plain(alpha), temperature=plain(temperature), divergence=divergence, ignore_index=plain(ignore_index),
        reduction=reduction, shift=shift, vocab_size=plain(vocab_size), logit_softcap=logit_softcap,
        logit_scale=logit_scale, teacher_grad=teacher_grad, inplace_backward=inplace_backward, return_parts=return_parts,
    )  # fmt: skip
    V = checks.check_logits(student_logits, teacher_logits, options.vocab_size)
    maps = checks.check_options(options)
    inplace_backward = inplace_backward and not is_batched(student_logits)  # nothing is overwritten under torch.func
    if inplace_backward:
        check_inplace_backward(student_logits, teacher_logits)
    checks.check_rows(student_logits, teacher_logits, "teacher_logits", labels, token_weights, num_items, options, V)
    terms = make_terms(student_logits, teacher_logits, labels, token_weights, num_items, options, V, maps)
    student = as_rows(student_logits)
    teacher: Tensor | None = None
    if teacher_logits is not None and terms.need_divergence:
        # A slice of all columns would make backward copy the gradient into the slice's place.
        real = teacher_logits if teacher_logits.shape[-1] == V else teacher_logits[..., :V]
        (teacher,) = constant_teacher((as_rows(real),), teacher_grad, terms.options, "teacher_logits")
    arguments = teacher, terms.labels, terms.weights, terms.options
    launch = _single_pass(student_logits, Logits(student, teacher, terms.labels), terms, inplace_backward)
    if launch is not None:
        written = None
        if inplace_backward:
            written = Overwritten()
            student = as_rows(OverwriteFunction.apply(student_logits, written))
        return terms.output(*apply(SinglePassFunction, student, *arguments, launch, written)[:4])
    return terms.output(*apply(KDLossFunction, student, *arguments, inplace_backward)[:4])


def _single_pass(
    student: Tensor,  # the argument of the user, [..., V']
    logits: Logits,
    terms: Terms,
    inplace_backward: bool,
) -> SinglePass | None:
    """Return the launch that takes the gradient with the loss, for an upstream gradient of 1; None: backward takes it.

    Backward takes it in the following cases.  In float16 the gradient of a mean over many rows would underflow before a
    loss scale multiplies it.  A teacher that learns needs a second gradient.  A compiler's backward pass would multiply the
    gradient into a second array.  PyTorch would copy the gradient of a view that is overwritten.
    """
    if (
        not terms.options.reduce
        or not (torch.is_grad_enabled() and student.requires_grad)
        or student.dtype == torch.float16
        or (logits.teacher is not None and logits.teacher.requires_grad)
        or torch.compiler.is_compiling()
        or (inplace_backward and student._is_view())
    ):
        return None
    return chosen_launch(logits, terms.options, in_place=inplace_backward, always=inplace_backward)
