"""Random calls: valid ones against the float64 oracle, and invalid ones against the errors that they must raise.

`pytest tests/test_fuzz.py --hypothesis-profile=thorough` draws thousands of each instead of a hundred.
"""

import contextlib
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fused_kd import kd_loss, linear_kd_loss, reference
from fused_kd import launching as launches
from fused_kd.divergences.base import SMALLEST_SHARE
from fused_kd.launch import Launch, SinglePass
from fused_kd.rows import as_rows
from fused_kd.testing.blocks import blocks_of

from .spoils import Spoil, kd_spoils, linear_kd_spoils
from .strategies import Call, by_position, kd_calls, linear_kd_calls, weights_of_kl

# An error may be twice eager's plus a few epsilons of the terms.  The terms, not the result: of a small difference of
# large terms nothing computed in float32 knows more.
EAGER_ERRORS = 2
EPSILONS = 4

REFERENCES = reference.kd_loss, reference.linear_kd_loss
PARTS = ("hidden", "weight", "bias")
pytestmark = pytest.mark.usefixtures("one_thread")


@contextlib.contextmanager
def cut(tile: dict[str, int]) -> Iterator[None]:
    """Blocks of the CPU operators and tiles of the kernels so small that few columns make many of them."""

    def launch(student: Tensor, itemsize: int) -> Launch:
        lanes = max(32, tile["lanes"]) if student.is_cuda else tile["lanes"]
        columns = 16 // itemsize
        whole = lanes * columns
        columns_per_split = -(-student.shape[2] // (whole * tile["splits"])) * whole
        return Launch(lanes, columns, max(1, lanes // 32), tile["splits"], columns_per_split)

    def single_pass(
        student: Tensor, teacher: Tensor | None, vocab_size: int | None = None, **options: bool
    ) -> SinglePass | None:
        if of(student, teacher, vocab_size, **options) is None:
            return None
        itemsize = 4 if student.dtype == torch.bfloat16 else student.element_size()  # as it is written, interpreted
        two = launch(student[..., :vocab_size], max(itemsize, 0 if teacher is None else teacher.element_size()))
        warp_size, accesses = two.lanes // two.num_warps, max(1, two.columns * itemsize // 16)
        return SinglePass(1, two.num_warps, warp_size, two.columns, two.splits, two.columns_per_split, accesses)

    of = launches.single_pass

    with pytest.MonkeyPatch.context() as patch, blocks_of(tile["block_elements"]):
        patch.setattr(launches, "single_pass", single_pass)
        for name in ("statistics", "gradient"):
            patch.setattr(sys.modules[f"fused_kd.backends.triton.{name}"], "default_launch", launch)
        yield


def dtypes(*given: Tensor | None) -> set[torch.dtype]:
    return {tensor.dtype for tensor in given if tensor is not None}


def tensors(call: Call) -> dict[str, Tensor]:
    return {name: value for name, value in call.arguments.items() if isinstance(value, Tensor)}


def copies(call: Call) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors(call).items()}


def assert_unmodified(call: Call, before: dict[str, Tensor], *, but: str | None = None) -> None:
    for name, tensor in tensors(call).items():
        if name != but:
            torch.testing.assert_close(tensor.detach(), before[name], rtol=0, atol=0, equal_nan=True)


def of_oracle(call: Call, dtype: torch.dtype | None) -> dict[str, Any]:
    """The arguments in another dtype (None: the heads' and logits' own), as the reference takes them."""
    result = dict(call.arguments) | call.clean
    for name, value in result.items():
        if not isinstance(value, Tensor):
            continue
        if name == "num_items":
            result[name] = value.item()
        elif name in ("alpha", "token_weights"):
            result[name] = value.detach().to(dtype or torch.float32)
        elif name != "labels":
            result[name] = value.detach().to(dtype or value.dtype)
        if name in call.arguments and call.arguments[name].requires_grad:
            result[name].requires_grad_()
    if dtype is not None:
        result.pop("logits_dtype", None)
    return result


def run(loss: Callable[..., Any], arguments: dict[str, Any], upstream: Tensor) -> dict[str, Tensor | None]:
    """Loss, parts and every gradient that is asked for, by name.

    Caught on its way: a view that was written over since is not what the loss was taken of, by PyTorch's count.
    """
    wanted = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.requires_grad}
    gradients = {name: torch.zeros_like(x) for name, x in wanted.items()}
    hooks = [x.register_hook(functools.partial(gradients.__setitem__, name)) for name, x in wanted.items()]
    output = loss(**arguments)
    value, *parts = output if arguments["return_parts"] else (output,)
    if parts and parts[1] is None and loss in REFERENCES:  # they leave the divergence out for a number alpha = 0
        parts[1] = loss(**arguments | {"alpha": torch.zeros(arguments["labels"].shape)}).divergence
    if value.requires_grad:
        value.backward(upstream.to(value.dtype))
    for hook in hooks:
        hook.remove()
    return {
        "loss": value.detach(),
        **dict(zip(("ce", "divergence", "entropy"), parts, strict=bool(parts))),
        **gradients,
    }


def pair(value: Any) -> tuple[Any, Any]:
    return value if isinstance(value, tuple) else (value, value)


class Terms:
    """How large the terms are that add up, or cancel, to a row's loss and to its gradient, `[N]` each in float64.

    Everything is an error already: epsilons times a size, to first order, of arithmetic whose every step rounds once.
    """

    def __init__(
        self,
        call: Call,
        student: Tensor,  # [N, V], a head's output, in float64
        teacher: Tensor | None,
        epsilon: float,  # of the arithmetic
        student_error: Tensor | float = 0.0,  # of a head's output, [N]
        teacher_error: Tensor | float = 0.0,
    ) -> None:
        given = by_position(call.arguments)
        N, T = student.shape[0], float(given["temperature"])
        self.counted, weight, unit = self._rows(given, N)

        def logits(x: Tensor, error: Tensor | float, which: int) -> tuple[Tensor, Tensor]:
            """The logits, and their error after a map that is not the identity."""
            scale, cap = pair(given["logit_scale"])[which], pair(given["logit_softcap"])[which]
            z = reference.mapped(torch.where(self.counted[:, None], x, 0.0), scale, cap)
            size = torch.where(z.isinf(), 0.0, z).abs().amax(1)
            return z, scale * error + epsilon * size * (scale != 1 or cap is not None)

        z, z_error = logits(student, student_error, 0)
        labels = given["labels"]
        ce = ce_gradient = ce_size = torch.zeros(N, dtype=torch.float64)
        if labels is not None:
            label = labels.reshape(N).long().where(self.counted, 0)
            u = z - z.amax(1, keepdim=True)
            ce = epsilon * (1 - u.gather(1, label[:, None])[:, 0].nan_to_num(0.0, 0.0, 0.0)) + 2 * z_error
            p = z.softmax(1).norm(dim=1)
            ce_size, ce_gradient = 1 + p, epsilon + (epsilon + 2 * z_error) * p
        kl = kl_gradient = kl_size = of_teacher = of_teacher_size = torch.zeros_like(ce)
        if teacher is not None:
            y, y_error = logits(teacher, teacher_error, 1)
            far = ((z - z.amax(1, keepdim=True)).abs() + (y - y.amax(1, keepdim=True)).abs()) / T
            forward, reverse = weights_of_kl(given["divergence"])
            if not (forward or reverse):  # of the logarithms of a mixture
                far, forward, reverse = far.nan_to_num(posinf=-math.log(SMALLEST_SHARE)), 1.0, 1.0
            for weight_of_kl, is_reverse in ((forward, False), (reverse, True)):
                if not weight_of_kl:
                    continue
                (x, p_error), (w, q_error) = ((y, y_error), (z, z_error))[:: 1 if is_reverse else -1]
                value, *sizes = self._of_kl(x / T, 2 * p_error / T, w / T, 2 * q_error / T, far, epsilon)
                of_student, of_teacher_too = sizes[:: -1 if is_reverse else 1]
                kl = kl + weight_of_kl * value
                kl_size, kl_gradient = (
                    kl_size + weight_of_kl * of_student[0],
                    kl_gradient + weight_of_kl * of_student[1],
                )
                of_teacher_size = of_teacher_size + weight_of_kl * of_teacher_too[0]
                of_teacher = of_teacher + weight_of_kl * of_teacher_too[1]
        alpha = given["alpha"]
        one_alpha = not isinstance(alpha, Tensor) or alpha.dim() == 0
        alpha = float(alpha) if one_alpha else alpha.detach().double().reshape(N)
        upstream = call.upstream.double().abs()
        upstream = upstream.reshape(N) if given["reduction"] == "none" else upstream
        self.ce, self.divergence = weight * ce, weight * kl
        p = (z / T).softmax(1)
        mean = 1 + math.log(z.shape[1]) + (p * ((z - z.amax(1, keepdim=True)).abs() / T).where(p > 0, 0.0)).sum(1)
        self.entropy = weight * (epsilon + 2 * z_error / T) * mean
        row = (1 - alpha) * ce + alpha * T**2 * kl
        self.loss = weight * row
        # Less where the map is flat, but of its slope 1 - tanh^2 nothing is left there either.
        slope, teacher_slope = pair(given["logit_scale"])
        self.teacher_gradient = teacher_slope * upstream * weight * alpha * T * of_teacher
        self.teacher_gradient_size = teacher_slope * upstream * weight * alpha * T * of_teacher_size
        self.gradient = slope * upstream * weight * ((1 - alpha) * ce_gradient + alpha * T * kl_gradient)
        self.gradient_size = slope * upstream * weight * ((1 - alpha) * ce_size + alpha * T * kl_size)
        self.alpha = upstream * weight * (ce + T**2 * kl)
        self.alpha = self.alpha.sum() if one_alpha else self.alpha
        self.token_weights = upstream * unit * row
        if given["reduction"] == "mean" and given.get("num_items") is None:  # the weight is in the divisor too
            total = self.token_weight.sum()
            self.token_weights = self.token_weights + upstream * self.loss.sum() / (total if total > 0 else 1.0)

    def _of_kl(
        self, x: Tensor, p_error: Tensor, w: Tensor, q_error: Tensor, far: Tensor, epsilon: float
    ) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return the error of KL(q || p), and sizes and errors of the gradients of p and q."""
        p, q = x.softmax(1), w.softmax(1)
        far = (1 + far).where(q > 0, 0.0)  # of log q - log p
        mean = (q * far).sum(1)
        kl = (epsilon + q_error) * mean + p_error
        of_q_size = (q * (far + mean[:, None])).norm(dim=1)
        p, q = p.norm(dim=1), q.norm(dim=1)
        of_p = p + q, (epsilon + p_error) * p + (epsilon + q_error) * q
        of_q = of_q_size, (epsilon + q_error) * of_q_size + q * (kl + p_error + q_error)
        return kl, of_p, of_q

    def _rows(self, given: dict[str, Any], N: int) -> tuple[Tensor, Tensor, Tensor]:
        """Which rows are read, their weights in the loss, and these in units of the token weights."""
        weight, learns = given.get("token_weights"), False
        if weight is None:
            weight = torch.ones(N).double()
        else:
            weight, learns = weight.detach().reshape(N).double(), weight.requires_grad
        named = torch.ones(N, dtype=torch.bool)
        if given["labels"] is not None:
            named = given["labels"].reshape(N) != given["ignore_index"]
        self.token_weight = weight = weight.where(named, 0.0)
        unit = named.double()
        if given["reduction"] == "mean":
            items = given.get("num_items")
            divisor = weight.sum() if items is None else torch.tensor(float(items)).double()
            unit = unit / divisor if divisor else torch.zeros_like(unit)
        return named if learns else weight != 0, weight * unit, unit


def norms(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per row, where the bound is per row."""
    if like.dim() == 0:
        return values.norm()
    return values.norm(dim=-1) if values.dim() > like.dim() else values.abs()


def assert_close(name: str, ours: Tensor, eager: Tensor, oracle: Tensor, term: Tensor) -> None:
    info = torch.finfo(ours.dtype)
    rounding = info.eps * norms(oracle, term) + info.smallest_normal * info.eps * max(1, ours.numel()) ** 0.5
    allowed = EAGER_ERRORS * norms(eager.double() - oracle, term) + EPSILONS * term + rounding
    error = norms(ours.double() - oracle, term)
    assert (error <= allowed).all(), f"{name}: error {error.tolist()}, allowed {allowed.tolist()}"


def assert_as_the_oracle(
    ours: dict[str, Tensor | None],
    eager: dict[str, Tensor | None],
    oracle: dict[str, Tensor | None],
    terms: dict[str, Tensor],
) -> None:
    assert ours.keys() == oracle.keys()
    for name, exact in oracle.items():
        if exact is None:
            assert ours[name] is None
            continue
        assert_close(name, ours[name], eager[name], exact, terms[name])


def sizes(terms: Terms, arguments: dict[str, Any], shape: torch.Size) -> dict[str, Tensor]:
    """The bound of what both losses give, one a row or of a sum."""
    reduced = {name: getattr(terms, name) for name in ("loss", "ce", "divergence", "entropy")}
    if arguments["reduction"] != "none":
        reduced = {name: term.sum() for name, term in reduced.items()}
    found = reduced | {"alpha": terms.alpha, "token_weights": terms.token_weights}
    found = {name: term.reshape(shape) if term.dim() else term for name, term in found.items()}
    if arguments["shift"]:  # back from positions to tokens
        for name in ("alpha", "token_weights"):
            if found[name].dim():
                found[name] = torch.cat([torch.zeros_like(found[name][..., :1]), found[name][..., :-1]], -1)
    return found


def float64_too(device: torch.device) -> bool:
    """Whether the backend computes in float64: the CPU operators, since the kernels do not."""
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1"


# --- valid calls


@given(data=st.data())
def test_kd_loss_of_any_valid_call(device, data):
    with device:
        assert_kd_loss_is_the_oracles(data.draw(kd_calls(float64=float64_too(device)), label="call"))


def assert_kd_loss_is_the_oracles(call: Call) -> None:
    arguments, before = call.arguments, copies(call)
    student, teacher = arguments["student_logits"], arguments["teacher_logits"]
    V, shape = arguments["vocab_size"] or student.shape[-1], student.shape[:-1]
    dtype = torch.float64 if torch.float64 in dtypes(student, teacher) else torch.float32
    results = [run(reference.kd_loss, of_oracle(call, of), call.upstream) for of in (dtype, torch.float64)]
    with cut(call.tile):
        ours = run(kd_loss, arguments, call.upstream)
    assert ours["loss"].dtype == dtype
    assert ours["student_logits"].dtype == student.dtype

    student_output, teacher_output = (
        before[name][..., :V].double().reshape(-1, V) if name in before else None
        for name in ("student_logits", "teacher_logits")
    )
    terms = Terms(call, student_output, teacher_output, torch.finfo(dtype).eps)
    bounds = sizes(terms, arguments, shape) | {
        "student_logits": terms.gradient.reshape(shape),
        "teacher_logits": terms.teacher_gradient.reshape(shape),
    }
    assert_as_the_oracle(ours, *results, bounds)
    for name in ours.keys() & {"student_logits", "teacher_logits"}:
        assert not ours[name][..., V:].any()
        assert not ours[name][~terms.counted.reshape(shape)].any()
    # Rows that two strides cannot address are copied, and the gradient takes the place of the copy.
    in_place = arguments["inplace_backward"] and as_rows(student).data_ptr() == student.data_ptr()
    if in_place:
        assert torch.equal(ours["student_logits"], student)
    assert_unmodified(call, before, but="student_logits" if in_place else None)


@given(data=st.data())
def test_linear_kd_loss_of_any_valid_call(device, data):
    with device:
        assert_linear_kd_loss_is_the_oracles(data.draw(linear_kd_calls(float64=float64_too(device)), label="call"))


def assert_linear_kd_loss_is_the_oracles(call: Call) -> None:
    arguments, before = call.arguments, copies(call)
    hidden, weight = arguments["student_hidden"], arguments["student_weight"]
    V, shape = arguments["vocab_size"] or weight.shape[0], hidden.shape[:-1]
    dtype = torch.float64 if torch.float64 in dtypes(hidden, arguments["teacher_hidden"]) else torch.float32
    epsilon = torch.finfo(dtype).eps
    results = [run(reference.linear_kd_loss, of_oracle(call, of), call.upstream) for of in (None, torch.float64)]
    with cut(call.tile):
        ours = run(linear_kd_loss, arguments, call.upstream)
    assert ours["loss"].dtype == dtype

    def head(who: str) -> tuple[Tensor | None, Tensor | float]:
        """A head's output, and the rounding that its dtype brings; sums round in float32."""
        if call.clean[f"{who}_hidden"] is None:
            return None, 0.0
        x, w, b = (None if t is None else t.double() for t in (call.clean[f"{who}_{part}"] for part in PARTS))
        x, w, b = x.reshape(-1, x.shape[-1]), w[:V], (0.0 if b is None else b[:V])
        z, sums = x @ w.T + b, x.abs() @ w.abs().T + abs(b)
        logits = torch.finfo(arguments["logits_dtype"] or call.clean[f"{who}_hidden"].dtype).eps
        return z, (logits * z.abs() + epsilon * sums).amax(1)

    (student_output, student_error), (teacher_output, teacher_error) = head("student"), head("teacher")
    terms = Terms(call, student_output, teacher_output, epsilon, student_error, teacher_error)
    bounds = sizes(terms, arguments, shape)
    for who, error, size in (
        ("student", terms.gradient, terms.gradient_size),
        ("teacher", terms.teacher_gradient, terms.teacher_gradient_size),
    ):
        if call.clean[f"{who}_hidden"] is None:
            continue
        x, w = call.clean[f"{who}_hidden"], call.clean[f"{who}_weight"].double()
        logit_gradient = error + torch.finfo(x.dtype).eps * size  # rounded before it is multiplied
        bounds |= {
            f"{who}_hidden": (logit_gradient * torch.linalg.matrix_norm(w, 2)).reshape(shape),
            f"{who}_weight": (logit_gradient * x.double().reshape(-1, x.shape[-1]).norm(dim=1)).sum(),
            f"{who}_bias": logit_gradient.sum(),
        }
    assert_as_the_oracle(ours, *results, bounds)
    learns = ("student", "teacher") if arguments["teacher_grad"] else ("student",)
    for name in (f"{who}_{part}" for who in learns for part in PARTS):
        assert (name in ours) == (arguments[name] is not None and arguments[name].requires_grad)
        if name in ours:
            assert ours[name].dtype == arguments[name].dtype
            uncounted = ours[name][~terms.counted.reshape(shape)] if name.endswith("hidden") else ours[name][V:]
            assert not uncounted.any()
    assert_unmodified(call, before)


# --- calls that are valid but for one argument


def assert_refused(loss: Callable[..., Any], call: Call, spoil: Spoil, value: Any) -> None:
    with pytest.raises(spoil.error) as raised:
        loss(**call.arguments | {spoil.name: value})
    message = str(raised.value)
    name, _, said = message.partition(": ")
    assert name == spoil.name or name in spoil.named, message
    assert re.search("expected .*, got ", said), message
    assert len(message) < 400


@given(data=st.data())
def test_kd_loss_refuses(data):
    call = data.draw(kd_calls(float64=True), label="call")
    before = copies(call)
    for spoil in kd_spoils(call):
        assert_refused(kd_loss, call, spoil, data.draw(spoil.values, label=spoil.name))
    assert_unmodified(call, before)


@given(data=st.data())
def test_linear_kd_loss_refuses(data):
    call = data.draw(linear_kd_calls(float64=True), label="call")
    before = copies(call)
    for spoil in linear_kd_spoils(call):
        assert_refused(linear_kd_loss, call, spoil, data.draw(spoil.values, label=spoil.name))
    assert_unmodified(call, before)
