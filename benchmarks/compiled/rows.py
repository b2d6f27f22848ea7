"""The variants of the kernels on a few numbers per row, and of those that copy or scale rows.

They have no main loop whose instructions count per pair: their registers and spills are what is looked at.  A variant is
one call of a function in `fused_kd.backends.triton` with tensors that have no memory, and its kernel is compiled for the
arguments that the call launches it with.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_kd.testing.replacing import replaced

from .profile import Resources
from .variants import TARGETS, Pointer, compiled_for, read, specialise

if TYPE_CHECKING:
    from triton.compiler import ASTSource

N, V, H = 8192, 128256, 4096
TYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.bool: "i1",
}  # fmt: skip


@dataclass(frozen=True)
class RowVariant:
    kernel: str  # with the call a key of CALLS
    target: str
    call: str

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.target} {self.call}"


def row_variants(targets: Sequence[str] = TARGETS) -> list[RowVariant]:
    return [RowVariant(kernel, target, call) for target in targets for kernel, call in CALLS]


def some(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def row_weights(**given: Any) -> None:
    """Call the prologue; `given` has the tensors and the options that are not the usual ones."""
    from fused_kd.backends import triton as kernels
    from fused_kd.rows import RowOptions

    names = ("labels", "token_weights", "alpha", "num_items")
    tensors = [given.pop(name, None) if isinstance(given.get(name), Tensor) else None for name in names]
    options = RowOptions(N, 0, V, -100, mean=True, alpha=0.5, num_items=None, temperature=2.0)
    kernels.row_weights(*tensors, some(1), options._replace(**given))


def row_losses(
    *terms: bool, reduce: bool = True, parts: bool = False, divergence: str = "forward_kl", N: int = N
) -> None:
    """Call the epilogue; the terms are has_ce and has_divergence, and with the parts comes the entropy."""
    from fused_kd.backends import triton as kernels
    from fused_kd.divergences import Objective

    counter = some(1, 32, dtype=torch.int32)
    objective = Objective(temperature=2.0, divergence=divergence)
    kernels.row_losses(
        some(9, N), some(3, N, dtype=torch.float64), counter, *terms, reduce, parts, torch.float32, objective
    )


def scale(source: Tensor, target: Tensor | None = None, factors: int = 1) -> None:
    from fused_kd.backends import triton as kernels

    kernels.scale_(source, [some() for _ in range(factors)], source if target is None else target)


def unit_weights(upstream: Tensor | None, N: int = N) -> None:
    from fused_kd.backends import triton as kernels

    kernels.unit_weights(some(3, N, dtype=torch.float64), upstream, 1.0, 0.5)


def merge(divergence: str, entropy: bool = False, N: int = N) -> None:
    from fused_kd.backends import triton as kernels
    from fused_kd.divergences import Objective

    objective = Objective(temperature=2.0, divergence=divergence)
    labels = some(N, dtype=torch.int64)
    kernels.merge_(some(9, N, dtype=torch.float64), some(9, N), labels, 64, objective, entropy)


def copy_counted(hidden: Tensor, dtype: torch.dtype, N: int = N) -> None:
    from fused_kd.backends import triton as kernels

    kernels.copy_counted(hidden, some(3, N, dtype=torch.float64), some(*hidden.shape, dtype=dtype))


BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
I32, I64 = torch.int32, torch.int64
CALLS: dict[tuple[str, str], Callable[[], None]] = {
    ("row_weights", "mean"): lambda: row_weights(labels=some(N, dtype=I64)),
    ("row_weights", "sum"): lambda: row_weights(mean=False),
    ("row_weights", "mean token_weights i32"): lambda: row_weights(labels=some(N, dtype=I32), token_weights=some(N)),
    ("row_weights", "num_items"): lambda: row_weights(labels=some(N, dtype=I64), num_items=some(dtype=I64)),
    ("row_weights", "mean token_weights alpha shift"): lambda: row_weights(
        labels=some(N, dtype=I64), token_weights=some(N, dtype=BF16), alpha=some(N, dtype=F64), sequence=2048
    ),
    ("row_losses", "ce+kl"): lambda: row_losses(True, True),
    ("row_losses", "ce+kl parts"): lambda: row_losses(True, True, parts=True),
    ("row_losses", "ce+kl parts reverse_kl"): lambda: row_losses(True, True, parts=True, divergence="reverse_kl"),
    ("row_losses", "ce+kl parts mixed_kl"): lambda: row_losses(True, True, parts=True, divergence="mixed_kl"),
    ("row_losses", "ce+kl parts jsd"): lambda: row_losses(True, True, parts=True, divergence="jsd"),
    ("row_losses", "ce"): lambda: row_losses(True, False),
    ("row_losses", "kl none"): lambda: row_losses(False, True, reduce=False, parts=True),
    ("scale", "bf16 in place"): lambda: scale(some(1, N, V, dtype=BF16)),
    ("scale", "bf16 in place padded"): lambda: scale(some(1, N, V + 64, dtype=BF16)[..., :V]),
    ("scale", "bf16 in place odd"): lambda: scale(some(1, N, V + 1, dtype=BF16)[..., :V]),
    ("scale", "fp32 to bf16"): lambda: scale(some(V, H), some(V, H, dtype=BF16), 2),
    ("scale", "fp32 to bf16 transposed"): lambda: scale(some(H, V).T, some(V, H, dtype=BF16)),
    ("unit_weights", "usual"): lambda: unit_weights(None),
    ("unit_weights", "upstream"): lambda: unit_weights(some(N)),
    ("merge", "forward_kl"): lambda: merge("forward_kl"),
    ("merge", "reverse_kl entropy"): lambda: merge("reverse_kl", entropy=True),
    ("merge", "mixed_kl entropy"): lambda: merge("mixed_kl", entropy=True),
    ("copy_counted", "bf16 to bf16"): lambda: copy_counted(some(N, H, dtype=BF16), BF16),
    ("copy_counted", "fp32 to bf16"): lambda: copy_counted(some(N, H), BF16),
    ("copy_counted", "bf16 to bf16 odd"): lambda: copy_counted(some(N, H + 1, dtype=BF16)[:, :H], BF16),
}


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Record launches, each as kernel, arguments and options, instead of making them."""
    from fused_kd.testing.launches import kernels

    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return lambda *arguments, **options: launches.append((self.kernel, arguments, options))

    with replaced((module, name, Recorder(kernel)) for name, (module, kernel) in kernels().items()):
        yield launches


def launch_of(call: Callable[[], None]) -> tuple[Any, dict[str, Any]]:
    """Return the kernel that a call launches, and its arguments and the options of the launch by name."""
    with recorded() as launches:
        call()
    [(kernel, arguments, options)] = launches
    names = [parameter.name for parameter in kernel.params]
    return kernel, {**dict(zip(names, arguments, strict=False)), **options}


def source(variant: RowVariant) -> tuple["ASTSource", dict[str, Any]]:
    """Return what Triton's JIT would compile for the call, and the options of the launch."""
    from triton.compiler import ASTSource

    kernel, values = launch_of(CALLS[variant.kernel, variant.call])
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = values.pop(name)
        if parameter.is_constexpr:
            signature[name], constexprs[index,] = "constexpr", value
            continue
        if isinstance(value, Tensor):
            value = Pointer(TYPES[value.dtype], value.untyped_storage().nbytes())
        signature[name], attribute = specialise(value, not parameter.do_not_specialize, variant.target)
        signature[name] = parameter.annotation_type or signature[name]
        if signature[name] == "constexpr":
            constexprs[index,] = value
        elif attribute:
            attributes[index,] = attribute
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes), values


def measure(variant: RowVariant) -> Resources:
    to_compile, options = source(variant)
    return read(compiled_for(to_compile, variant.target, options), variant.target, options["num_warps"])[0]
