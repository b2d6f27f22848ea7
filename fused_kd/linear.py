"""The loss from hidden states: check the arguments, gather the rows that count, hand them on."""

from __future__ import annotations  # PyTorch 2.7 does not trace unions in the annotations of a function within another

from typing import Literal, overload

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from . import checks
from .autograd import LinearKDLossFunction, LinearKDRowLossesFunction, apply
from .checks import plain
from .divergences import Divergence
from .head_checks import Heads, check_head_options, check_heads, check_logits_of, may_synchronise, products_dtype
from .heads.sweep import LinearOptions, Outside, planned
from .options import Function, KDLossOutput, Lora, Options, Scale, Softcap
from .rows import ROW, are_read, gathered_rows, readable
from .terms import Terms, constant_teacher, make_terms

WORTH_A_SYNCHRONISATION = 1e-3  # seconds of a planned step


# fmt: off
@overload
def linear_kd_loss(
    student_hidden: Tensor, student_weight: Tensor | None, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
    labels: Tensor | None = ..., *, student_bias: Tensor | None = ..., teacher_bias: Tensor | None = ...,
    student_head: Function | None = ..., teacher_head: Function | None = ..., student_lora: Lora | None = ...,
    alpha: float | Tensor = ..., temperature: float = ..., divergence: str | Divergence = ..., ignore_index: int = ...,
    reduction: str = ..., shift: bool = ..., token_weights: Tensor | None = ...,
    num_items: int | float | Tensor | None = ..., vocab_size: int | None = ..., logit_softcap: Softcap = ...,
    logit_scale: Scale = ..., teacher_grad: bool = ..., logits_dtype: torch.dtype | None = ...,
    workspace_bytes: int | None = ..., memory: str = ..., compact: bool | None = ..., counted_rows: int | None = ...,
    weight_grad_out: Tensor | None = ..., weight_grad_scale: float | Tensor = ...,
    return_parts: Literal[False] = ...,
) -> Tensor: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor, student_weight: Tensor | None, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
    labels: Tensor | None = ..., *, student_bias: Tensor | None = ..., teacher_bias: Tensor | None = ...,
    student_head: Function | None = ..., teacher_head: Function | None = ..., student_lora: Lora | None = ...,
    alpha: float | Tensor = ..., temperature: float = ..., divergence: str | Divergence = ..., ignore_index: int = ...,
    reduction: str = ..., shift: bool = ..., token_weights: Tensor | None = ...,
    num_items: int | float | Tensor | None = ..., vocab_size: int | None = ..., logit_softcap: Softcap = ...,
    logit_scale: Scale = ..., teacher_grad: bool = ..., logits_dtype: torch.dtype | None = ...,
    workspace_bytes: int | None = ..., memory: str = ..., compact: bool | None = ..., counted_rows: int | None = ...,
    weight_grad_out: Tensor | None = ..., weight_grad_scale: float | Tensor = ...,
    return_parts: Literal[True],
) -> KDLossOutput: ...
@overload
def linear_kd_loss(
    student_hidden: Tensor, student_weight: Tensor | None, teacher_hidden: Tensor | None, teacher_weight: Tensor | None,
    labels: Tensor | None = ..., *, student_bias: Tensor | None = ..., teacher_bias: Tensor | None = ...,
    student_head: Function | None = ..., teacher_head: Function | None = ..., student_lora: Lora | None = ...,
    alpha: float | Tensor = ..., temperature: float = ..., divergence: str | Divergence = ..., ignore_index: int = ...,
    reduction: str = ..., shift: bool = ..., token_weights: Tensor | None = ...,
    num_items: int | float | Tensor | None = ..., vocab_size: int | None = ..., logit_softcap: Softcap = ...,
    logit_scale: Scale = ..., teacher_grad: bool = ..., logits_dtype: torch.dtype | None = ...,
    workspace_bytes: int | None = ..., memory: str = ..., compact: bool | None = ..., counted_rows: int | None = ...,
    weight_grad_out: Tensor | None = ..., weight_grad_scale: float | Tensor = ...,
    return_parts: bool,
) -> Tensor | KDLossOutput: ...
# fmt: on
def linear_kd_loss(
    student_hidden: Tensor,  # [..., H_s]
    student_weight: Tensor | None,  # [V, H_s]
    teacher_hidden: Tensor | None,  # [..., H_t]
    teacher_weight: Tensor | None,  # [V, H_t]
    labels: Tensor | None = None,  # [...]
    *,
    student_bias: Tensor | None = None,  # [V]
    teacher_bias: Tensor | None = None,  # [V]
    student_head: Function | None = None,
    teacher_head: Function | None = None,
    student_lora: Lora | None = None,
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
    logits_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    memory: str = "default",
    compact: bool | None = None,
    counted_rows: int | None = None,
    weight_grad_out: Tensor | None = None,  # [V, H_s]
    weight_grad_scale: float | Tensor = 1.0,
    return_parts: bool = False,
) -> Tensor | KDLossOutput:
    """Return `kd_loss` of the logits that output heads give, of which only one chunk exists at a time.

        logits = hidden weight^T + bias, for student and teacher

    The forward pass takes the gradients of the student's hidden states, weight and bias chunk by chunk, and only those that
    are asked for.  With reduction "none" backward takes the gradients, and projects the chunks once more.  The teacher is a
    constant, unless `teacher_grad` is set.  Nothing synchronises with the host, but for one number per step that `compact`
    may read.

    Args:
        student_hidden: `[..., H_s]`, float32, bfloat16, float16, or float64 on the CPU: the input of the head, after the
            model's last norm.
        student_weight: `[V, H_s]`, as in `nn.Linear`, in the dtype of the hidden states; under autocast its dtype may
            differ.  It may be tied to the embeddings.  None with `student_head`.
        teacher_hidden, teacher_weight: `[..., H_t]` and `[V, H_t]`, with a width and a dtype of their own.  Both may be
            None if alpha is 0, and the weight with `teacher_head`.
        labels, alpha, temperature, divergence, ignore_index, reduction, shift, token_weights, num_items: as in `kd_loss`.
        vocab_size, return_parts: as in `kd_loss`.
        student_bias, teacher_bias: `[V]`.  Default: None, no bias.
        teacher_head: a function, such as a module, from hidden states `[C, H_t]` to logits `[C, V]`, in place of
            `teacher_weight`: a quantised head, one with an adapter, one with its own norm before it.  It is called once
            per chunk, without gradients and under the autocast of this call; with reduction "none" again in backward.  It
            must not write into its input, where rows that do not count are left out or 0.  It may return wider logits if
            `vocab_size` is given.  Default: None.
        student_head: the same for a student whose head is frozen, in place of `student_weight`.  The gradient of the
            hidden states is taken through it.  Its own parameters get none.  `vocab_size` is then needed, unless there is
            a `teacher_weight`.  The gradient of a chunk's logits has memory of its own.  Default: None.
        student_lora: (A, B, scale), a low-rank adapter of the student's head, as in LoRA (arXiv:2106.09685) and PEFT: A is
            `[r, H_s]`, B is `[V, r]`, scale a number.  The logits are hidden (weight + scale B A)^T + bias.  A and B get
            gradients if they require grad.  They may be float32 beside a 16-bit head.  Nothing of the size of the weight
            is made.  Default: None.
        logit_softcap, logit_scale: as in `kd_loss`, applied to the head's output.
        teacher_grad: whether those of the teacher's hidden states, weight and bias that require grad get gradients.  They
            take memory and products of their own.  If it is False and the teacher's hidden states require grad, a warning
            says that the teacher is taken as a constant.
        logits_dtype: the dtype of a chunk's logits: torch.float32 or the dtype of the products.  Default: None, float32,
            so that neither the logits of a 16-bit head nor the terms of a bias's gradient are rounded.  On a GPU with
            PyTorch before 2.10, and on ROCm, where float32 results of 16-bit products are slow, None is the dtype of the
            products.
        workspace_bytes: bound of the buffers for a chunk's logits and a group's gradients, in bytes.  Default: as
            `fused_kd.plan_chunks` chooses.
        memory: "default", or "lean" for small cards: slabs of the vocabulary over all tokens, each projected twice.  Then
            nothing grows with N V or V, and there is no float32 sum of the weight's gradient.  A step takes six products
            where the default takes four.  "lean" takes no functions as heads.
        compact: whether rows that do not count are left out of the products.  True: the host reads their number, which is
            one synchronisation per step; it is refused where none is possible, under `torch.compile`, under the
            transforms of `torch.func` and during the capture of a CUDA graph.  False: all rows are projected, and those
            that do not count add nothing, whatever they hold.  Default: None.  On a CPU rows are left out.  On a GPU they
            are left out where the planned step takes over a millisecond and a synchronisation is possible.  Without labels
            and token weights all rows count, and nothing is read.
        counted_rows: a bound, known on the host, of the number of rows that count.  So many rows are gathered on the
            device, in order and without a synchronisation.  If more rows count, ValueError is raised on a CPU, and
            elsewhere the loss, each row's with reduction "none", and its gradients are NaN.  A row whose token weight
            requires grad counts even where that is 0.  Default: None, as `compact` says; a bound takes its place.
        weight_grad_out: `[V, H_s]`, float32 (float64 for float64), contiguous: the caller's sum of the weight's gradient,
            such as Megatron's `main_grad`.  The gradient is added to it in the forward pass (with reduction "none" in
            backward), and `student_weight.grad` stays as it is.  So neither a second float32 sum nor a rounded copy exists.
            What has been added stays if a function as a head raises in a later chunk.  A forward pass that runs twice, as
            under activation checkpointing, adds it twice.  The products of neither model may be float16.  Default: None.
        weight_grad_scale: the factor of what is added to `weight_grad_out`: the upstream gradient that the loss will get
            in backward, such as a loss scale.  If backward gets another one, it raises RuntimeError on a CPU, and elsewhere
            the other gradients are NaN.  Default: 1.

    Under `torch.autocast` the products run in the autocast dtype, as those of `nn.Linear` would, whatever dtypes hidden
    states, weight and bias have; float64 is not cast.  Each gradient has the dtype of its tensor.  Functions as heads and
    `weight_grad_out` break the graph under `torch.compile`, and are refused under `torch.func`.

    Returns:
        The same as `kd_loss`.

    Raises:
        TypeError, ValueError: an argument is wrong.  The message has its name, what was expected and what came.  Nothing
            has been modified.
        IndexError: a label is outside [0, V), on the CPU.  On a GPU, under `torch.compile` and under the transforms of
            `torch.func` the loss of such a row is NaN, and so are its gradients, as in `kd_loss`.
    """
    num_items, weight_grad_scale = plain(num_items), plain(weight_grad_scale)
    options = Options(
        alpha=plain(alpha), temperature=plain(temperature), divergence=divergence, ignore_index=plain(ignore_index),
        reduction=reduction, shift=shift, vocab_size=plain(vocab_size), logit_softcap=logit_softcap,
        logit_scale=logit_scale, teacher_grad=teacher_grad, logits_dtype=logits_dtype,
        workspace_bytes=plain(workspace_bytes), memory=memory, compact=compact, return_parts=return_parts,
    )  # fmt: skip
    given = Heads(
        student_hidden, student_weight, student_bias, student_head, student_lora,
        teacher_hidden, teacher_weight, teacher_bias, teacher_head,
        plain(counted_rows), weight_grad_out, weight_grad_scale,
    )  # fmt: skip
    V = check_heads(given, options)
    maps = checks.check_options(options)
    check_head_options(given, options)
    checks.check_rows(student_hidden, teacher_hidden, "teacher_hidden", labels, token_weights, num_items, options, V)
    terms = make_terms(student_hidden, teacher_hidden, labels, token_weights, num_items, options, V, maps)
    teacher: tuple[Tensor | None, ...] = None, None, None
    if teacher_hidden is not None and terms.need_divergence:
        teacher = constant_teacher(
            (teacher_hidden, teacher_weight, teacher_bias), teacher_grad, terms.options, "teacher_hidden"
        )
    return _loss(given, teacher, terms, options, labels is not None or token_weights is not None)


def _loss(
    given: Heads,
    teacher: tuple[Tensor | None, ...],  # hidden states, weight and bias; None without a divergence
    terms: Terms,
    options: Options,
    may_ignore: bool,  # whether there may be rows that do not count
) -> Tensor | KDLossOutput:
    """Return the loss of checked arguments."""
    student, teacher_hidden = _as_matrix(given.student_hidden), None if teacher[0] is None else _as_matrix(teacher[0])
    dtype = products_dtype(given.student_hidden)
    teacher_dtype = dtype if teacher_hidden is None else products_dtype(teacher_hidden)
    lora = (None, None) if given.student_lora is None else given.student_lora[:2]
    tensors = student, given.student_weight, given.student_bias, *lora, teacher_hidden, *teacher[1:]
    needed = [tensor is not None and tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors]
    if given.student_lora is not None:
        needed[3] |= needed[0]
    if given.weight_grad_out is not None:
        needed[1] = torch.is_grad_enabled()
    sweep = LinearOptions(
        terms.options,
        tuple(needed),
        dtype,
        teacher_dtype,
        options.logits_dtype,
        options.workspace_bytes,
        options.memory,
    )
    counted, weights, too_many = _gathered(
        student, teacher_hidden, given.counted_rows, terms, options, sweep, may_ignore
    )

    def rows(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or counted is None else tensor.index_select(0, counted)

    def spread(values: Tensor) -> Tensor:  # values of all N rows, with 0 for rows that do not count
        if counted is None or values.shape != counted.shape:  # a sum, or a part that was not asked for
            return values
        all_rows = values.new_zeros(terms.weights.shape[1])
        if too_many is not None:
            all_rows = all_rows.masked_fill(too_many, torch.nan)
        return all_rows.index_copy(0, counted, values)

    own = rows(student)
    low_rank = None if given.student_lora is None else _low_rank(own, weights, given.student_lora, dtype)  # type: ignore[arg-type]
    heads = own, given.student_weight, given.student_bias, low_rank, lora[1], rows(teacher_hidden), *teacher[1:]
    if options.workspace_bytes is not None and not torch.compiler.is_compiling():
        # A bound that is too small is refused now, and not only in backward, which needs more buffers.
        planned(heads[0], heads[3], heads[5], sweep)  # type: ignore[arg-type]
    outside = Outside(
        _as_called("student_head", given.student_head, student, terms, options),
        None
        if teacher_hidden is None
        else _as_called("teacher_head", given.teacher_head, teacher_hidden, terms, options),
        given.weight_grad_out if needed[1] else None,
    )
    arguments = (*heads, rows(terms.labels), weights, _upstream(given, weights), sweep, outside)
    if torch.compiler.is_compiling() and any(part is not None for part in outside):
        found = _apply_outside_of_graphs(options.reduction, arguments)
    else:
        found = _apply(options.reduction, arguments)
    return terms.output(*map(spread, found[:4]))


def _apply(reduction: str, arguments: tuple[object, ...]) -> tuple[Tensor, ...]:
    return apply(LinearKDRowLossesFunction if reduction == "none" else LinearKDLossFunction, *arguments)


# `torch.compiler.disable` would import Triton here.  A call does, which a compiler has imported by then.
_apply_outside_of_graphs = _disable_dynamo(_apply)


def _gathered(
    student_hidden: Tensor,  # [N, H_s]
    teacher_hidden: Tensor | None,  # [N, H_t]
    bound: int | None,  # counted_rows
    terms: Terms,
    options: Options,
    sweep: LinearOptions,
    may_ignore: bool,
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """Return the rows that are projected, None for all; their weights, `[3, K]`; and whether they are too few.

    That is a scalar, which makes the loss of all rows NaN, or None if it was looked at.
    """
    weights = terms.weights
    every_row = None, weights, None
    if bound is not None and not readable(weights):
        return gathered_rows(weights, bound) if bound < weights.shape[1] else every_row
    if bound is None:
        if options.compact is False or not may_ignore:
            return every_row
        if not (readable(weights) or options.compact or _pays(student_hidden, teacher_hidden, sweep)):
            return every_row
    found = (weights[ROW] != 0).nonzero().flatten()  # on a GPU the one synchronisation of a step
    if bound is not None and found.shape[0] > bound:
        raise ValueError(
            f"counted_rows: expected at least {found.shape[0]}, the number of rows that count, got {bound}; a row whose "
            "token weight requires grad counts even where it is 0"
        )
    if found.shape[0] == weights.shape[1]:
        return every_row
    return found, weights.index_select(1, found), None


def _pays(student_hidden: Tensor, teacher_hidden: Tensor | None, sweep: LinearOptions) -> bool:
    """Return whether a synchronisation on a GPU is possible, and costs less than rows that do not count may."""
    if not student_hidden.is_cuda or not may_synchronise():
        return False
    return planned(student_hidden, None, teacher_hidden, sweep).modelled_seconds > WORTH_A_SYNCHRONISATION


def _as_matrix(hidden: Tensor) -> Tensor:  # [N, H]
    return hidden.reshape(-1, hidden.shape[-1])


def _low_rank(
    hidden: Tensor,  # [K, H_s]
    weights: Tensor,  # [3, K]
    lora: Lora,
    products: torch.dtype,
) -> Tensor:  # [K, r]
    """Return the hidden states of the adapter, whose own head is B.  Autograd takes it from there to A and to hidden.

    A row that does not count may hold anything, and the gradient of A would have 0 times NaN.
    """
    A, _, scale = lora
    counted = are_read(weights)
    if not (readable(counted) and bool(counted.all())):
        hidden = torch.where(counted[:, None], hidden, 0.0)
    low_rank = torch.nn.functional.linear(hidden.to(A.dtype), A) * scale
    return low_rank.to(torch.promote_types(low_rank.dtype, products))


def _upstream(given: Heads, weights: Tensor) -> Tensor | None:
    if given.weight_grad_out is None:
        return None
    scale = given.weight_grad_scale
    if isinstance(scale, Tensor):
        return scale.detach().double().reshape(())
    return torch.full((), scale, dtype=torch.float64, device=weights.device)


def _as_called(name: str, function: Function | None, like: Tensor, terms: Terms, options: Options) -> Function | None:
    """Return the function with a check of its logits, under the autocast of this call; the sweep runs without autocast."""
    if function is None:
        return None
    kind, V, is_exact = like.device.type, terms.options.vocab_size, options.vocab_size is None
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def called(hidden: Tensor) -> Tensor:
        with torch.autocast(kind, dtype=dtype, enabled=enabled):
            logits = function(hidden)
        check_logits_of(name, logits, hidden, V, is_exact=is_exact)
        return logits

    return called
