"""The base of all divergences, the registry of their names, and the block of rows that slopes are taken from."""

import numbers
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..statistics import SECOND
from ..statistics import C as FIRST

Temperature = float | Tensor  # a scalar tensor only in a compiled graph whose temperature changes from call to call

# The divergences by name.  A subclass of `Divergence` that has a `name` is registered when it is defined.
# If this module is reloaded, those of other modules stay.
DIVERGENCES: dict[str, type["Divergence"]] = globals().get("DIVERGENCES", {})
_instances: dict[tuple[str, tuple[float, ...]], "Divergence"] = {}

# Stands for the bound of |dD/dz| T where there is none: the slope of reverse KL grows with the difference of the logits, in
# nats.  A float16 gradient overflows above 2^7 times this.
NO_BOUND = 2.0**6
SMALLEST_SHARE = 1e-9


class Ratio(NamedTuple):
    """A block of rows of teacher and student whose normalisers are known."""

    p: Tensor  # e^{u/T}, [rows, V]
    q: Tensor  # e^{v/T}, [rows, V]
    log_ratio: Tensor  # log(q / p) of the probabilities, [rows, V]; may be overwritten
    d_T: Tensor  # noqa: N815  # [rows, 1]
    e: Tensor  # [rows, 1]
    free: tuple[Tensor, Tensor]  # buffers, [rows, V]
    apply: Callable[[str, Tensor], Tensor]  # applies a method of tensors, such as "expm1_", to one of the buffers


class Slopes(NamedTuple):
    """The slopes of a divergence in a block of rows.  They may be NaN in columns without the mass that they belong to."""

    student: Tensor  # [rows, V]; times a it is G d_T
    teacher: Tensor  # [rows, V]; times b it is K e
    a: float | Tensor  # or [rows, 1]
    b: float | Tensor
    value: Tensor | None = None  # [rows, 1]: the divergence; None: the sum of G and K, which keeps its digits


@dataclass(frozen=True)
class Divergence:
    """A divergence D = sum_j f(p_j, q_j) of the student's distribution p and the teacher's q.

    A divergence of your own is a subclass: a frozen dataclass with a `name`, whose fields are numbers, and with `elements`.
    On a GPU it needs `kernels` too.  docs/adding-a-divergence.md has an example.

    Attributes:
        name: the name that stands for the divergence in messages and in compiled graphs.
        sweeps: the sweeps over the logits that its statistics take: 1 or 2.
        parameters: the values of the fields.
    """

    name: ClassVar[str]
    sweeps: ClassVar[int] = 2
    parameters: ClassVar[tuple[float, ...]] = ()  # of each instance; not a property, which PyTorch 2.7 does not trace

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        name = cls.__dict__.get("name")
        if name is None:
            return
        known = DIVERGENCES.get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(
                f"name: expected one that no divergence has, got {name!r}, the name of {known.__qualname__}"
            )
        DIVERGENCES[name] = cls
        for key in [key for key in _instances if key[0] == name]:  # of a class that has been defined anew
            del _instances[key]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", tuple(float(getattr(self, field.name)) for field in fields(self)))

    @property
    def largest_slope(self) -> float:
        """Return an upper bound of |dD/dz| T.  Gradients in float16 are counted in a unit that follows from it."""
        return NO_BOUND

    @property
    def kernel_parameter(self) -> float:
        """Return the number that kernels get, in float32: the first parameter, or 0."""
        return self.parameters[0] if self.parameters else 0.0

    def elements(
        self,
        log_p: Tensor,  # log-probabilities of the student, of any shape
        log_q: Tensor,  # log-probabilities of the teacher, of the same shape
    ) -> Tensor:  # of the same shape, in nats
        """Return f of each pair, differentiable in both.

        f must be homogeneous, f(a p, a q) = a f(p, q).  If p = q makes its slopes 0 too, values of nearly equal
        distributions keep their digits; a multiple of p - q can be added for that.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a method elements(log_p, log_q), got none")

    def kernels(self) -> tuple[Any, ...]:
        """Return the `@triton.jit` functions (value, slope): f and G of `backends.triton.ratios.Elements`.

        A third function gives the teacher's slope K, if it is not f - G or loses digits by that subtraction.  G may leave
        out a multiple of p, and K the same multiple of -q, since they cancel in the gradients.
        """
        raise NotImplementedError(
            f"divergence: expected one with kernels for CUDA tensors, got {self!r}; give its class a method kernels() that "
            f"returns two Triton functions, or move the tensors to the CPU"
        )

    def slopes(self, x: Ratio) -> Slopes:
        """Return the slopes of a block: those of `elements`, in float64."""
        log_q = x.q.double().log() - x.e.double().log()
        log_p = torch.where(x.q > 0, log_q - x.log_ratio.double(), x.p.double().log() - x.d_T.double().log())
        with _recording():
            given = log_p.clone().requires_grad_(), log_q.clone().requires_grad_()
            G, K = torch.autograd.grad(self.elements(*given).sum(), given)
        student, teacher = x.free
        return Slopes(student.copy_(G * x.d_T), teacher.copy_(K * x.e), 1.0, 1.0)

    def value(
        self,
        statistics: Tensor,  # [9, N]
        temperature: Temperature,
    ) -> Tensor:  # [N], float64, in nats
        """Return the divergence of each row."""
        return statistics[SECOND].double()

    def means(
        self,
        statistics: Sequence[Tensor],  # nine of any shape
        temperature: Temperature,
    ) -> tuple[Tensor, Tensor]:
        """Return the coefficients R and S."""
        return statistics[FIRST], statistics[SECOND] - statistics[FIRST]


def of(name: str, parameters: Sequence[float] = ()) -> Divergence:
    """Return the divergence with that name and these parameters, or with its defaults."""
    key = (name, tuple(parameters))
    if key not in _instances:
        _instances[key] = DIVERGENCES[name](*key[1])
    return _instances[key]


def named(divergence: str | Divergence) -> tuple[str, tuple[float, ...]]:
    """Return the name and the parameters of a divergence; no parameters for a name, which stands for the defaults."""
    return (divergence, ()) if isinstance(divergence, str) else (divergence.name, divergence.parameters)


@contextmanager
def _recording() -> Iterator[None]:
    """Let autograd record, which PyTorch has switched off for the inside of an operator and of inference mode."""
    with torch._C._ForceDispatchKeyGuard(*_RECORDING), torch.inference_mode(False), torch.enable_grad():
        yield


with torch.inference_mode(False):
    _RECORDING = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


def check_share(divergence: Divergence, name: str, at_0: str, at_1: str | None) -> None:
    value = getattr(divergence, name)
    if type(value).__module__ == "numpy" and isinstance(value, numbers.Real):
        value = float(value)
        object.__setattr__(divergence, name, value)
    number = isinstance(value, (float, int)) and not isinstance(value, bool)
    if number and SMALLEST_SHARE <= value <= 1 - SMALLEST_SHARE:
        return
    hint = ""
    if number and value in (0, 1):
        hint = f"; pass {at_0}" if value == 0 else f"; pass {at_1}" if at_1 else "; such a divergence is always 0"
    raise (ValueError if number else TypeError)(
        f"{type(divergence).__name__}: expected {name} from {SMALLEST_SHARE} to 1 - {SMALLEST_SHARE}, got {value!r}{hint}"
    )
