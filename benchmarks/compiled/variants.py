"""The variants that Triton compiles of the kernels, and their compilation for a GPU that need not be there.

A variant is named by what changes its code: dtypes, T, the terms of the loss, and what Triton's JIT sees in a call's
arguments, which it compiles in: an integer that is 1, and whether integers and addresses are multiples of 16.
"""

import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fused_kd.devices import CLUSTER, CTAS, DEVICES, device_of_target
from fused_kd.launch import SinglePass

from . import amdgcn, sass
from .profile import OneLaunchFigures, Profile, Resources, profile, shuffles

if TYPE_CHECKING:  # triton and fused_kd.backends.triton are imported where a worker needs them, see `workers`
    from triton.compiler import ASTSource

KERNELS = ("row_statistics", "ratio_sums", "logit_gradient")
# The kernels of a single pass, by form: one program per row, one cluster per row, several programs per row.
ONE_LAUNCH = {"whole": "whole_kernel", "cluster": "whole_kernel", "shared": "shared_kernel"}
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")  # whose figures are bounded and recorded
TERMS = {"ce+kl": (True, True), "ce": (True, False), "kl": (False, True)}
TEMPERATURES = (1.0, 2.0, 3.0, 4.0, 2.5)  # 2.5 stands for every T of which e^z is no power of e^{z/T}
DIVERGENCES = ("forward_kl", "reverse_kl", "mixed_kl")  # of one sweep of statistics
RATIOS = ("jsd", "skew_kl", "skew_reverse_kl", "tvd")  # of two
MAPS = ("identity", "scale", "softcap")  # of a head's output to logits, the same for student and teacher
SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
SPLITS = 32  # programs per row, of the form of several
# Launches are planned for this device.  It decides the split of rows, which no loop sees.
PROCESSORS = DEVICES["H100"].processors


class Layout(NamedTuple):
    """The layout of logits in memory."""

    rows: int  # N
    vocabulary: int  # V
    student_stride: int  # from row to row
    teacher_stride: int
    column_stride: int
    wide: bool  # whether a thread's K columns can be one access of 16 bytes


LAYOUTS = {
    "dense": Layout(8192, 128256, 128256, 128256, 1, True),
    "padded": Layout(8192, 50257, 50304, 50304, 1, True),  # rows of which `vocab_size` columns are real
    "odd": Layout(8192, 50257, 50257, 50257, 1, False),  # most rows start off a multiple of 16 bytes
    "mixed": Layout(8192, 50257, 50304, 50257, 1, False),  # a padded student with a teacher that is not
    "transposed": Layout(8192, 128256, 1, 1, 8192, False),
    "small": Layout(1024, 128256, 128256, 128256, 1, True),  # under 2 GB AMD has instructions of its own
}


@dataclass(frozen=True)
class Variant:
    kernel: str
    target: str
    student: str
    teacher: str
    temperature: float
    terms: str
    layout: str
    logit_map: str = MAPS[0]
    teacher_grad: bool = False
    divergence: str = DIVERGENCES[0]
    entropy: bool = False  # whether the statistics have h

    @property
    def temperature_name(self) -> str:
        return "other" if self.temperature not in (1, 2, 3, 4) else f"{self.temperature:g}"

    @property
    def divergence_name(self) -> str:
        return self.divergence + " + h" * self.entropy

    @property
    def dtypes(self) -> str:
        return f"{self.student}/{self.teacher}"

    @property
    def name(self) -> str:
        options = f"{self.dtypes} T={self.temperature_name} {self.terms} {self.layout} {self.logit_map}"
        options += " teacher_grad" * self.teacher_grad + f" {self.divergence}" * (self.divergence != DIVERGENCES[0])
        options += " entropy" * self.entropy
        return f"{self.kernel} {self.target} {options}"


def all_variants(targets: Sequence[str] = TARGETS) -> list[Variant]:
    """Return every combination of options for bfloat16 on sm_90, and each option on its own elsewhere, at T = 2.5."""
    return list(dict.fromkeys(v for target in targets for kernel in KERNELS for v in _variants(kernel, target)))


def one_launch_variants(targets: Sequence[str] = TARGETS) -> list[Variant]:
    """Return the single-pass forms on the targets that they are planned for, if the Triton at hand compiles them.

    Registers are what two loops decide together.
    """
    from fused_kd.launching import compiles_clusters

    others = [("cluster", "fp32", "identity"), ("cluster", "bf16", "scale"), ("shared", "bf16", "softcap")]
    variants = [
        Variant(kernel, target, "bf16", "bf16", T, "ce+kl", "dense")
        for kernel in ONE_LAUNCH
        for target in targets
        if kernel != "cluster" or target == "sm_90"
        for T in (2.0, 3.0)
    ] + [
        Variant(kernel, "sm_90", dtype, dtype, 2.0, "ce+kl", "dense", logit_map) for kernel, dtype, logit_map in others
    ]
    usual = [v for v in variants if (v.student, v.logit_map) == ("bf16", MAPS[0])]
    thorough = [v for v in usual if v.target == "sm_90"]
    at_2 = [v for v in usual if v.temperature == 2]
    variants += [replace(v, divergence=name) for name in DIVERGENCES[1:] for v in dict.fromkeys((*at_2, *thorough))]
    variants += [replace(v, entropy=True) for v in at_2]
    variants += [replace(v, divergence=name, entropy=True) for name in DIVERGENCES[1:] for v in at_2 if v in thorough]
    # Clusters take one sweep (`launch.best_single_pass`), and total variation has the shortest of the functions.
    of_two = [v for v in (*at_2, *thorough) if v.kernel != "cluster"]
    variants += [
        replace(v, divergence=name) for name in RATIOS for v in dict.fromkeys(of_two) if name != "tvd" or v in thorough
    ]
    variants += [replace(v, divergence=RATIOS[0], entropy=True) for v in of_two if v in thorough and v in at_2]
    variants = list(dict.fromkeys(variants))
    return [variant for variant in variants if variant.kernel != "cluster" or compiles_clusters()]


def _variants(kernel: str, target: str) -> Iterator[Variant]:
    if kernel != "ratio_sums":
        yield from _of_forward_kl(kernel, target)
    yield from _of_divergences(kernel, target)


def _of_divergences(kernel: str, target: str) -> Iterator[Variant]:
    """Yield the variants of the other divergences, and those with the entropy."""
    thorough = target == "sm_90"
    usual = Variant(kernel, target, "bf16", "bf16", 2.5, "ce+kl", "dense")
    of_two = replace(usual, divergence=RATIOS[0])
    if kernel == "ratio_sums":  # it has no constant for T and none for the terms
        yield from (replace(of_two, divergence=name) for name in RATIOS)
        if thorough:
            yield from (replace(of_two, layout=layout) for layout in ("padded", "odd"))
            yield replace(of_two, logit_map="softcap")
            yield replace(of_two, student="fp32", teacher="fp32")
        return
    for name in DIVERGENCES[1:]:
        yield replace(usual, divergence=name)
        if thorough:
            yield replace(usual, divergence=name, temperature=2.0)
            yield replace(usual, divergence=name, terms="kl")
        if kernel == "logit_gradient" and (thorough or name == "mixed_kl"):
            yield replace(usual, divergence=name, teacher_grad=True)
    if kernel == "row_statistics":  # one and the same for all of two sweeps
        yield of_two
        if thorough:
            yield replace(of_two, temperature=2.0)
        for divergence in DIVERGENCES if thorough else DIVERGENCES[:1]:
            yield replace(usual, divergence=divergence, entropy=True)
        if thorough:
            yield replace(usual, terms="ce", entropy=True)
    else:
        for name in RATIOS:
            yield replace(usual, divergence=name)
            if thorough or name == "skew_kl":
                yield replace(usual, divergence=name, teacher_grad=True)
        if thorough:
            yield replace(of_two, temperature=2.0)


def _of_forward_kl(kernel: str, target: str) -> Iterator[Variant]:
    thorough = target == "sm_90"
    for terms in TERMS:
        for layout in ("dense", "padded", "odd"):
            for T in TEMPERATURES:
                usual = [terms == "ce+kl", layout == "dense", T in TEMPERATURES[-1:]]
                if sum(usual) >= (1 if thorough else 2):
                    yield Variant(kernel, target, "bf16", "bf16", T, terms, layout)
    for student, teacher in (("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16")):
        for T in TEMPERATURES if thorough else TEMPERATURES[-1:]:
            yield Variant(kernel, target, student, teacher, T, "ce+kl", "dense")
    for logit_map in MAPS[1:]:
        for T in TEMPERATURES if thorough else TEMPERATURES[-1:]:
            yield Variant(kernel, target, "bf16", "bf16", T, "ce+kl", "dense", logit_map)
    if kernel == "logit_gradient":
        for layout, dtype in (("dense", "bf16"), ("odd", "bf16"), ("dense", "fp32")):
            for T in TEMPERATURES if thorough else TEMPERATURES[-1:]:
                yield Variant(kernel, target, dtype, dtype, T, "ce+kl", layout, teacher_grad=True)
    for layout in ("mixed", "transposed", "small"):
        if layout != "small" or target == "gfx942":
            yield Variant(kernel, target, "bf16", "bf16", TEMPERATURES[-1], "ce+kl", layout)


class Pointer(NamedTuple):
    """A tensor of a call, as far as Triton's JIT looks: allocations are aligned."""

    dtype: str
    bytes: int


def call_arguments(variant: Variant) -> dict[str, Pointer | int | float]:
    """Return the run-time arguments, by name, of the call that the functions in `fused_kd.backends.triton` would make."""
    from fused_kd.backends.triton.arguments import divergence_number, temperature_arguments
    from fused_kd.backends.triton.statistics import numbers_of_a_slice

    numbers = numbers_of_a_slice(divergence_number(variant.divergence), variant.entropy)
    z = _map_arguments(variant)
    layout = LAYOUTS[variant.layout]
    in_one_launch = variant.kernel in ONE_LAUNCH
    splits = launch(variant).splits
    N, V, need_ce = layout.rows, layout.vocabulary, TERMS[variant.terms][0]
    T = temperature_arguments(variant.temperature)
    dtypes = {"student": variant.student, "teacher": variant.teacher, "gradient": variant.student}
    dtypes["teacher_gradient"] = variant.teacher if variant.teacher_grad else variant.student
    weights = Pointer("fp64", 24 * N)
    pointers = {f"{name}_ptr": Pointer(dtype, N * V * SIZES[dtype]) for name, dtype in dtypes.items()}
    strides = {
        "student": (layout.student_stride, layout.column_stride),
        "teacher": (layout.teacher_stride, layout.column_stride),
        "gradient": (layout.student_stride if layout.column_stride == 1 else V, 1),  # contiguous, like the student
    }
    strides["teacher_gradient"] = strides["gradient"]
    arguments: dict[str, Pointer | int | float] = {
        **pointers,
        "labels_ptr": Pointer("i64", 8 * N) if need_ce else weights,
        "weights_ptr": weights,
        "statistics_ptr": Pointer("fp32", 36 * N),
        "upstream_ptr": Pointer("fp32", 4),
        "parts_ptr": Pointer("fp32", 4 * numbers * N * splits if splits > 1 else 36 * N),
        "counters_ptr": Pointer("i32", 128 * (1 + N)) if splits > 1 else Pointer("fp32", 36 * N),
        "weights_stride": N,
        "statistics_stride": N,
        "upstream_stride": 0,
        "N": N,
        "V": V,
        "S": splits,
        "columns_per_split": launch(variant).columns_per_split,
        "exp2_scale": T.exp2_scale,
        "inverse_T": T.inverse,
        "parameter": 0.5,
        "student_factor": z.factor,
        "student_cap": z.cap,
        "teacher_factor": z.factor,
        "teacher_cap": z.cap,
    }
    for name, (row, column) in strides.items():
        # One launch takes rows that are one stride apart as N batches of one.
        inner, outer = (1, row) if in_one_launch else (N, N * row)
        arguments |= {f"{name}_rows_inner": inner, f"{name}_stride_outer": outer}
        arguments |= {f"{name}_stride_inner": row, f"{name}_stride_column": column}
    return arguments


def _map_arguments(variant: Variant) -> Any:
    from fused_kd.backends.triton.arguments import map_arguments
    from fused_kd.logit_map import LogitMap

    return map_arguments(
        {"identity": LogitMap(), "scale": LogitMap(0.5), "softcap": LogitMap(1.0, 30.0)}[variant.logit_map]
    )


def launch_shape(variant: Variant) -> Any:
    """Return threads, columns and planned registers of a kernel in one launch."""
    device = device_of_target(variant.target)
    shared = device.shared if variant.divergence in DIVERGENCES else device.shared_two_sweeps
    return {"whole": device.whole[-1], "cluster": CLUSTER, "shared": shared}[variant.kernel]


def _one_launch(variant: Variant) -> SinglePass:
    shape, vocabulary = launch_shape(variant), LAYOUTS[variant.layout].vocabulary
    ctas = CTAS[-1] if variant.kernel == "cluster" else 1
    splits = SPLITS if variant.kernel == "shared" else 0
    columns = shape.columns_of(max(SIZES[variant.student], SIZES[variant.teacher]))
    lanes = ctas * shape.num_warps * warp_size(variant.target)
    per_split = -(-vocabulary // (max(1, splits) * lanes * columns)) * lanes * columns
    return SinglePass(ctas, shape.num_warps, warp_size(variant.target), columns, splits, per_split, shape.accesses)


def launch(variant: Variant) -> Any:
    from fused_kd.launch import two_passes

    if variant.kernel in ONE_LAUNCH:
        return _one_launch(variant)
    layout = LAYOUTS[variant.layout]
    student, teacher = SIZES[variant.student], SIZES[variant.teacher]
    written = max(student, teacher) if variant.teacher_grad else student
    itemsize = written if variant.kernel == "logit_gradient" else min(student, teacher)
    return two_passes(layout.rows, layout.vocabulary, itemsize, PROCESSORS, warp_size(variant.target))


def warp_size(target: str) -> int:
    return device_of_target(target).warp_size


def source(variant: Variant) -> "ASTSource":
    """Return what Triton's JIT would compile for the call."""
    from triton.compiler import ASTSource

    kernel = _kernel(variant.kernel)
    constants = _constants(variant)
    arguments = call_arguments(variant)
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], int | float | bool | Pointer] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, parameter in enumerate(kernel.params):
        if parameter.name in constants:
            signature[parameter.name], constexprs[index,] = "constexpr", constants[parameter.name]
            continue
        value = arguments[parameter.name]
        signature[parameter.name], attribute = specialise(value, not parameter.do_not_specialize, variant.target)
        if signature[parameter.name] == "constexpr":
            constexprs[index,] = value
        elif attribute:
            attributes[index,] = attribute
    return ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def specialise(value: Pointer | int | float, wanted: bool, target: str) -> tuple[str, list[list[Any]]]:
    """Return the type that Triton's JIT gives an argument, and what it tells the compiler of the value."""
    aligned = [["tt.divisibility", 16]]
    if isinstance(value, Pointer):
        buffer = [["tt.pointer_range", 32]] if target.startswith("gfx") and value.bytes < 2**31 else []
        return f"*{value.dtype}", aligned + buffer
    if isinstance(value, float):
        return "fp32", []
    if wanted and value == 1:
        return "constexpr", []
    return "i32" if -(2**31) <= value < 2**31 else "i64", aligned if wanted and value % 16 == 0 else []


def _kernel(name: str) -> Any:
    from fused_kd.testing.launches import kernels

    return kernels()[ONE_LAUNCH.get(name, f"{name}_kernel")][1]


def _constants(variant: Variant) -> dict[str, Any]:
    from fused_kd.backends.triton.arguments import (
        divergence_number,
        functions_of,
        teacher_grad_of,
        temperature_arguments,
    )
    from fused_kd.divergences import Objective

    need_ce, need_kl = TERMS[variant.terms]
    plan, objective = launch(variant), Objective(divergence=variant.divergence)
    of_teacher = teacher_grad_of(objective) if variant.teacher_grad else 0
    functions = functions_of(objective, of_teacher) | {"TEACHER_GRAD": of_teacher}
    return {
        "NEED_CE": need_ce,
        "NEED_KL": need_kl,
        "NEED_ENTROPY": variant.entropy,
        "DIVERGENCE": divergence_number(variant.divergence),
        **functions,
        "NUMBERS": 0,  # of a slice: a row has one program
        "POWER": temperature_arguments(variant.temperature).power,
        "LANES": plan.lanes,
        "K": plan.columns,
        "WIDE": LAYOUTS[variant.layout].wide * (plan.accesses if variant.kernel in ONE_LAUNCH else 1),
        "STUDENT_MAP": _map_arguments(variant).kind,
        "TEACHER_MAP": _map_arguments(variant).kind,
        "HAS_UPSTREAM": True,
        **({"S": plan.splits} if variant.kernel == "shared" else {}),
        "S_ROUNDED": 1 << (plan.splits - 1).bit_length() if plan.splits else 1,
    }


def compile_variant(variant: Variant) -> Any:
    return compiled_for(source(variant), variant.target, launch(variant).options)


def compiled_for(source: "ASTSource", target: str, options: dict[str, Any]) -> Any:
    """Compile as a launch on the target would, without a GPU."""
    import triton
    from triton.backends.compiler import GPUTarget

    is_amd = target.startswith("gfx")
    arch = target if is_amd else int(target.removeprefix("sm_"))
    gpu = GPUTarget("hip" if is_amd else "cuda", arch, warp_size(target))
    return triton.compile(source, target=gpu, options=options)


def ptx(variant: Variant) -> str:
    return str(compile_variant(variant).asm["ptx"])


def llir(variant: Variant) -> str:
    """Return LLVM's representation, in which no multiplication is fused into an addition yet."""
    return str(compile_variant(variant).asm["llir"])


def ttir(variant: Variant) -> str:
    """Return Triton's first representation, where a pointer and the offset that is added to it still have their types."""
    return str(compile_variant(variant).asm["ttir"])


def measure(variant: Variant) -> Profile:
    plan = launch(variant)
    found, read, code = _read(variant)
    return profile(found, read.main_loop(code), plan.lanes, plan.columns, warp_size(variant.target))


def figures(variant: Variant) -> Profile | OneLaunchFigures:
    if variant.kernel not in ONE_LAUNCH:
        return measure(variant)
    found, read, code = _read(variant)
    return OneLaunchFigures(**vars(found), shuffles=shuffles(*read.code_and_loops(code)))


def _read(variant: Variant) -> tuple[Resources, Any, str]:
    return read(compile_variant(variant), variant.target, launch(variant).num_warps)


def read(compiled: Any, target: str, num_warps: int) -> tuple[Resources, Any, str]:
    """Return resources, the module that reads the instruction set, and the code."""
    shared = compiled.metadata.shared
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        return amdgcn.resources(code, shared, num_warps), amdgcn, code
    code = _disassemble(compiled.asm["cubin"])
    return sass.resources(code, shared, device_of_target(target), num_warps), sass, code


def _disassemble(cubin: bytes) -> str:
    """Disassemble with the cuobjdump that ships inside the triton wheel."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-sass", "-res-usage", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
