"""Random calls of the losses: shapes, strides, dtypes, values, rows that count and options are all drawn.

Hypothesis draws the choices and one seed.  From the seed PyTorch's generator makes the numbers, on the default device.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from fused_kd import plan_chunks
from fused_kd.divergences import Divergence, KullbackLeibler, of

from .divergences import NAMES, OBJECTS

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Half of them have rows in two dimensions or more, so that strides matter.
SHAPES = st.one_of(
    st.sampled_from([(2, 3), (3, 2), (2, 1, 2), (1, 2, 2)]),
    st.lists(st.integers(0, 4), max_size=3).map(tuple).filter(lambda shape: math.prod(shape) <= 6),
)
TEMPERATURES = st.one_of(
    st.sampled_from([1, 1.0, 2.0, 4, np.float64(3), np.float32(2), np.int64(2)]), st.floats(0.1, 20)
)
REDUCTIONS = ["mean", "sum", "none"]
IGNORE_INDICES = [-100, -1, 0, 5, 2**31 - 1, -(2**31)]  # of them some are classes
LOGITS = ["flat", "normal", "peaked", "heavy-tailed", "ties"]
LAYOUTS = ["contiguous", "transposed", "sliced", "every other column", "offset", "padded rows", "columns first"]


@dataclass
class Call:
    """A valid call: the arguments by name, and the upstream gradient of what it returns."""

    arguments: dict[str, Any]
    upstream: Tensor
    tile: dict[str, int]  # how the implementations cut the work, which no result may depend on
    clean: dict[str, Any] = field(default_factory=dict)  # arguments without the NaN of what does not count


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Equal values in other strides; what lies between them is NaN."""
    *leading, width = values.shape

    def empty(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=values.dtype)

    if layout == "transposed":
        place = empty(*reversed(leading), width).permute(*reversed(range(len(leading))), -1)
    elif layout == "sliced" and leading:
        place = empty(*leading[:-1], leading[-1] + 1, width)[..., :-1, :]
    elif layout == "every other column":
        place = empty(*leading, 2 * width)[..., ::2]
    elif layout == "offset":
        place = empty(values.numel() + 1)[1:].view(values.shape)
    elif layout == "padded rows":
        place = empty(*leading, width + 3)[..., :width]
    elif layout == "columns first":
        place = empty(width, *leading).movedim(0, -1)
    else:
        place = empty(*values.shape)
    place.copy_(values)
    return place


def by_position(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with labels, token weights and alpha as `shift` moves them: of a position, not of a token."""
    if not arguments["shift"]:
        return arguments
    found = dict(arguments)
    for name, last in (("labels", arguments["ignore_index"]), ("token_weights", 0), ("alpha", 0)):
        value = arguments.get(name)
        if isinstance(value, Tensor) and value.dim():
            found[name] = torch.cat([value[..., 1:], torch.full_like(value[..., :1], last)], -1)
    return found


@dataclass
class _Rows:
    """The rows and columns that both losses draw."""

    generator: torch.Generator
    shape: tuple[int, ...]
    V: int
    labels: Tensor | None  # of each position
    counted: Tensor  # bool
    options: dict[str, Any]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def weights_of_kl(divergence: str | Divergence) -> tuple[float, float]:
    """The weights of forward and reverse KL; 0 and 0 for a divergence of two sweeps, which is finite anyway."""
    divergence = of(divergence) if isinstance(divergence, str) else divergence
    return divergence.weights if isinstance(divergence, KullbackLeibler) else (0.0, 0.0)


@st.composite
def _rows(draw: st.DrawFn, widest: int) -> _Rows:
    generator = torch.Generator(torch.get_default_device()).manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape, V = draw(SHAPES), draw(st.one_of(st.integers(1, 8), st.integers(1, widest)))
    ignore_index = draw(st.sampled_from(IGNORE_INDICES))
    temperature = draw(TEMPERATURES)
    options: dict[str, Any] = {"temperature": temperature, "ignore_index": ignore_index, "labels": None, "shift": False}
    options["divergence"] = draw(st.one_of(st.sampled_from(NAMES), st.sampled_from(OBJECTS)))
    labels, counted = None, torch.ones(shape, dtype=torch.bool)
    if draw(st.integers(0, 4)):
        labels = torch.randint(V, shape, generator=generator)
        ignored = torch.rand(shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
        options["shift"] = bool(shape) and draw(st.booleans())
        if options["shift"]:
            ignored[..., -1:] = True
        labels = labels.masked_fill(ignored, ignore_index).to(draw(st.sampled_from([torch.int32, torch.int64])))
        counted = labels != ignore_index
        of_tokens = labels
        if options["shift"]:  # the first is not read, and is no class
            of_tokens = torch.cat([torch.full_like(labels[..., :1], -7), labels[..., :-1]], -1)
        if draw(st.booleans()):
            of_tokens = torch.stack([of_tokens, torch.full_like(labels, -7)], -1)[..., 0]
        options["labels"] = of_tokens
    alphas = [0, 0.0, 0.3, 1, 1.0, np.float64(0.7), np.float32(0.25), np.int64(1), "a tensor", "a row"]
    alpha = draw(st.one_of(st.sampled_from(alphas), st.floats(0, 1))) if labels is not None else 1.0
    if isinstance(alpha, str):
        alpha = torch.rand(shape if alpha == "a row" else (), generator=generator, dtype=torch.float64)
        alpha = torch.where(torch.rand(alpha.shape, generator=generator) < 0.3, alpha.round(), alpha)
        alpha = alpha.to(draw(st.sampled_from([torch.float64, *DTYPES]))).requires_grad_(draw(st.booleans()))
    options["alpha"] = alpha
    reduction = options["reduction"] = draw(st.sampled_from(REDUCTIONS))
    if draw(st.booleans()):
        weights = 2 * torch.rand(shape, generator=generator, dtype=torch.float64)
        weights = torch.where(torch.rand(shape, generator=generator) < 0.2, 0.0, weights)
        dtype = draw(st.sampled_from([torch.float64, *DTYPES, torch.int64, torch.bool]))
        weights = weights.to(dtype)
        weights.requires_grad_(dtype.is_floating_point and draw(st.booleans()))
        options["token_weights"] = weights
        if not weights.requires_grad:  # else a row of weight 0 is read
            counted = counted & (by_position(options)["token_weights"] != 0)
    if reduction == "mean":
        number = draw(st.integers(1, 1000))
        options["num_items"] = draw(
            st.sampled_from([None, number, number / 3, torch.tensor(number), torch.full((1, 1), number / 7)])
        )
    cap, scale = st.floats(1, 50), st.floats(0.06, 4)
    maybe_cap = st.one_of(st.none(), cap)
    options["logit_softcap"] = draw(st.one_of(st.none(), cap, st.tuples(maybe_cap, maybe_cap)))
    options["logit_scale"] = draw(st.one_of(st.just(1.0), scale, st.tuples(scale, scale)))
    options["return_parts"] = draw(st.booleans())
    options["teacher_grad"] = draw(st.booleans())
    return _Rows(generator, shape, V, labels, counted, options)


@st.composite
def _upstream(draw: st.DrawFn, rows: _Rows) -> Tensor:
    factor = draw(st.sampled_from([1.0, -0.5, 3.0, 2.0**-20]))
    return factor * (rows.normal(*rows.shape) if rows.options["reduction"] == "none" else torch.ones(()))


TILES = st.fixed_dictionaries(
    {
        "block_elements": st.sampled_from([1, 700, 2**20]),
        "splits": st.integers(1, 3),
        "lanes": st.sampled_from([16, 128]),
    }
)


@st.composite
def kd_calls(draw: st.DrawFn, float64: bool = False) -> Call:
    """Draw a call of `kd_loss`."""
    rows = draw(_rows(widest=200))
    shape, V, generator = rows.shape, rows.V, rows.generator
    dtypes = [torch.float64, *DTYPES] if float64 else DTYPES
    student_dtype, teacher_dtype = draw(st.sampled_from(dtypes)), draw(st.sampled_from(dtypes))

    def logits(kind: str) -> Tensor:
        z = rows.normal(*shape, V)
        if kind == "flat":
            return 0.1 * z
        if kind == "peaked":
            peak = torch.randint(V, (*shape, 1), generator=generator)
            return (2 * z).scatter_add_(-1, peak, torch.full((*shape, 1), 20.0))
        if kind == "heavy-tailed":
            return 2 * z / torch.rand(*shape, V, generator=generator).clamp_min(1e-3).sqrt()
        return z.round() if kind == "ties" else 3 * z

    student = logits(draw(st.sampled_from(LOGITS)))
    same = draw(st.integers(0, 9)) == 0
    teacher = student.clone() if same else logits(draw(st.sampled_from(LOGITS)))
    masked = torch.rand(V, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.5]))
    masked[0] = False
    if rows.labels is not None:
        masked[rows.labels[rows.counted].long()] = False
    cap = rows.options["logit_softcap"]
    # A KL is infinite where the distribution that it averages over has mass and the other has none.
    forward, reverse = weights_of_kl(rows.options["divergence"])
    if isinstance(cap, tuple) and any(cap[i] is None for i, weight in enumerate((forward, reverse)) if weight):
        masked[:] = False  # one cap would give mass where the other has none
    student[..., masked] = teacher[..., masked] = -torch.inf
    if draw(st.integers(0, 4)) == 0:  # one of them alone has no mass there
        if not reverse and draw(st.integers(0, 2)):
            teacher[..., V // 2 + 1 :] = -torch.inf
        elif not forward and rows.labels is None:
            student[..., V // 2 + 1 :] = -torch.inf

    student, teacher = student.to(student_dtype), teacher.to(teacher_dtype)
    layouts = draw(st.sampled_from([*LAYOUTS, "expanded"])), draw(st.sampled_from([*LAYOUTS, "expanded"]))
    arguments: dict[str, Any] = dict(zip(("student_logits", "teacher_logits"), (student, teacher), strict=True))
    padded = draw(st.booleans())
    for name, layout in zip(arguments, layouts, strict=True):
        z = arguments[name]
        if padded:
            filling = draw(st.sampled_from([50.0, torch.nan, torch.inf]))
            z = torch.cat([z, z.new_full((*shape, draw(st.integers(0, 5))), filling)], -1)
        expanded = layout == "expanded" and shape and shape[0]
        if not expanded:
            z = torch.where(rows.counted[..., None], z, torch.nan)
        arguments[name] = z[:1].expand(z.shape) if expanded else laid_out(z, layout)
    inplace = layouts[0] != "expanded" and draw(st.booleans())
    student = arguments["student_logits"]
    arguments["student_logits"] = (
        laid_out(student.clone().requires_grad_(), layouts[0]) if inplace else student.requires_grad_()
    )
    if isinstance(rows.options["alpha"], float | int) and rows.options["alpha"] == 0 and draw(st.booleans()):
        arguments["teacher_logits"] = None
    learns = rows.options["teacher_grad"] and arguments["teacher_logits"] is not None
    if learns:
        arguments["teacher_logits"].requires_grad_()
    arguments |= {**rows.options, "inplace_backward": inplace}
    arguments["vocab_size"] = V if padded else draw(st.sampled_from([None, V]))
    return Call(arguments, draw(_upstream(rows)), draw(TILES))


@st.composite
def linear_kd_calls(draw: st.DrawFn, float64: bool = False) -> Call:
    """Draw a call of `linear_kd_loss`."""
    rows = draw(_rows(widest=80))
    shape, V = rows.shape, rows.V
    dtypes = [torch.float64, *DTYPES] if float64 else DTYPES
    padded = draw(st.booleans())
    arguments: dict[str, Any] = {}
    clean: dict[str, Any] = {}
    dtype_of, width_of = {}, {}
    for who in ("student", "teacher"):
        dtype = dtype_of[who] = draw(st.sampled_from(dtypes))
        width = width_of[who] = draw(st.integers(1, 16))
        scale = draw(st.sampled_from([0.1, 1.0, 3.0])) / width**0.5
        hidden, weight = rows.normal(*shape, width).to(dtype), (scale * rows.normal(V, width)).to(dtype)
        bias = rows.normal(V).to(dtype) if draw(st.booleans()) else None
        clean |= {f"{who}_hidden": hidden, f"{who}_weight": weight, f"{who}_bias": bias}
        hidden = torch.where(rows.counted[..., None], hidden, torch.nan)
        if padded:
            filling, more = draw(st.sampled_from([50.0, torch.nan])), draw(st.integers(0, 5))

            def pad(parameter: Tensor, value: float, more: int = more) -> Tensor:
                return torch.cat([parameter, parameter.new_full((more, *parameter.shape[1:]), value)])

            clean |= {f"{who}_weight": pad(weight, 0.0), f"{who}_bias": None if bias is None else pad(bias, 0.0)}
            weight, bias = pad(weight, filling), None if bias is None else pad(bias, filling)
        arguments[f"{who}_hidden"] = laid_out(hidden, draw(st.sampled_from(LAYOUTS)))
        arguments[f"{who}_weight"] = laid_out(weight, draw(st.sampled_from(LAYOUTS)))
        arguments[f"{who}_bias"] = bias
    for name in arguments:
        if arguments[name] is not None and (name.startswith("student") or rows.options["teacher_grad"]):
            arguments[name].requires_grad_(draw(st.integers(0, 3)) > 0)
    arguments |= {**rows.options, "vocab_size": V if padded else None}
    if isinstance(rows.options["alpha"], float | int) and rows.options["alpha"] == 0 and draw(st.booleans()):
        without = dict.fromkeys(("teacher_hidden", "teacher_weight", "teacher_bias"))
        arguments |= without
        clean |= without
    logits_dtype = None
    if torch.float64 not in dtype_of.values():
        logits_dtype = draw(st.sampled_from([None, torch.float32]))
    arguments["logits_dtype"] = logits_dtype
    if draw(st.booleans()):
        one = plan_chunks(
            1, V, width_of["student"], width_of["teacher"], dtype=dtype_of["student"],
            teacher_dtype=dtype_of["teacher"], logits_dtype=logits_dtype, teacher_hidden_grad=True,
        )  # fmt: skip
        arguments["workspace_bytes"] = one.workspace_bytes * draw(st.integers(1, 5))
    elif draw(st.booleans()):
        arguments["memory"] = "lean"
    arguments["compact"] = draw(st.sampled_from([None, False]))
    return Call(arguments, draw(_upstream(rows)), draw(TILES), clean)
