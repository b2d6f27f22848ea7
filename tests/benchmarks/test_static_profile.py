"""The static profile: its readers on listings small enough to count by hand, and its bounds on what Triton compiles."""

import json
import re
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
pytest.importorskip("rich")
static_profile: Any = pytest.importorskip("benchmarks.static_profile")
from benchmarks.compiled import amdgcn, bounds, rows, sass, variants, workers  # noqa: E402
from benchmarks.compiled.profile import OneLaunchFigures, profile, shuffles  # noqa: E402
from fused_kd.devices import device_of_target  # noqa: E402
from fused_kd.divergences import DIVERGENCES  # noqa: E402
from fused_kd.statistics import UNIT  # noqa: E402

ONE = "row_statistics sm_90 bf16/bf16 T=4 ce+kl dense identity"


def sass_listing(*lines: str) -> str:
    """As cuobjdump prints it: the address, the text, and its encoding on this line and the next."""
    return "".join(
        f"        /*{16 * i:04x}*/    {line} ;    /* 0x0000000000007919 */\n    /* 0x000e6e0000002500 */\n"
        for i, line in enumerate(lines)
    )


# A loop of zeros, then 4 pairs of bfloat16 a thread, an iteration covering 128 threads x 4 columns.
SASS = sass_listing(
    "MUFU.RCP R4, R4",
    "@!P0 STG.E.128 desc[UR6][R2.64], RZ",  # 0010: the loop of zeros
    "IADD3 R24, R24, 0x200, RZ",
    "ISETP.GE.AND P1, PT, R24, R22, PT",
    "@!P1 BRA 0x10",
    "LDG.E.64 R4, desc[UR6][R2.64]",  # 0050: the main loop
    "LDG.E.64 R8, desc[UR6][R6.64]",
    "PRMT R26, R4, 0x7632, R26",
    "SHF.L.U32 R25, R5, 0x10, RZ",
    "SHF.L.U32 R27, R9, 0x10, RZ",
    "FMNMX R5, R4, R31, !PT",
    "FMUL R35, R6, 1.4426950216293334961",
    "MUFU.EX2 R35, R35",
    "MUFU.EX2 R36, R36",
    "FFMA R19, R4, R19, R37",
    "STG.E.64 desc[UR6][R8.64], R4",
    "UIADD3 UR4, UR4, 0x200, URZ",
    "UISETP.GE.AND UP0, UPT, UR4, UR6, UPT",
    "PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0",
    "@!P0 BRA 0x50",
    "SHFL.BFLY PT, R3, R2, 0x10, 0x1f",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "BRA 0x160",
)


def test_sass_main_loop_is_counted_line_by_line():
    loop = sass.main_loop(SASS)
    assert len(loop.body) == 15
    assert loop.counts() == {"load": 2, "store": 1, "convert": 3, "mufu": 2, "fma": 2, "alu": 4, "control": 1}
    assert loop.columns == 512
    assert loop.bytes_in_flight == 16  # the second load is issued before the first one's registers are used
    assert (loop.widths("load"), loop.widths("store")) == ([8, 8], [8])


def test_sass_figures_are_a_pair():
    resources = sass.resources(
        "REG:45 STACK:0 SHARED:1024 LOCAL:0", shared=16, device=device_of_target("sm_90"), num_warps=4
    )
    figures = profile(resources, sass.main_loop(SASS), lanes=128, columns=4, warp_size=32)
    assert (figures.pairs, figures.instructions, figures.kinds["mufu"], figures.bytes) == (4, 15 / 4, 2 / 4, 24 / 4)
    assert figures.resident_warps == 40  # 48 registers a thread are given out: 10 warps in each of four partitions
    assert figures.kilobytes_in_flight == 40 * 32 * 16 / 1024


@pytest.mark.parametrize(
    ("text", "kind", "size"),
    [
        ("@!P0 LDG.E.U16 R4, desc[UR6][R2.64]", "load", 2),
        ("LDG.E R4, [R2.64]", "load", 4),
        ("LDG.E.EF.128.CONSTANT R4, [R2.64]", "load", 16),
        ("STL [R1], R4", "local", 0),
        ("@P1 SHFL.DOWN PT, R3, R2, 0x10, 0x1f", "shuffle", 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "barrier", 0),
        ("STS.128 [R4], R8", "shared", 0),
        ("FADD2 R8, R8.F32x2.HI_LO, R10.F32x2.HI_LO", "fma", 0),
        ("HADD2.F32 R5, -RZ, R4.H0_H0", "convert", 0),
        ("IMAD.U32 R5, R4, 0x10000, RZ", "convert", 0),
        ("SHF.L.U32 R23, R23, 0x3, RZ", "alu", 0),
    ],
)
def test_sass_kinds_and_widths(text: str, kind: str, size: int):
    instruction = sass.instruction(text)
    assert (instruction.kind, instruction.bytes) == (kind, size)


def test_sass_loads_that_wait_for_one_another_are_not_in_flight_together():
    serial = sass_listing(
        "LDG.E.128 R4, [R2.64]",
        "MUFU.EX2 R4, R4",
        "LDG.E.128 R4, [R10.64]",
        "MUFU.EX2 R4, R5",
        "IADD3 R24, PT, PT, R24, 0x400, RZ",
        "ISETP.GE.AND P1, PT, R24, R22, PT",
        "@!P1 BRA 0x0",
    )
    assert sass.main_loop(serial).bytes_in_flight == 16


def test_sass_shuffles_are_counted_in_loops_that_take_exponentials():
    listing = sass_listing(
        "SHFL.BFLY PT, R5, R4, 0x10, 0x1f",
        "MUFU.EX2 R4, R4",  # 0010
        "SHFL.BFLY PT, R5, R4, 0x8, 0x1f",
        "@!P1 BRA 0x10",
        "SHFL.BFLY PT, R5, R4, 0x4, 0x1f",  # 0040
        "@!P1 BRA 0x40",
        "MUFU.EX2 R4, R4",  # 0060
        "SHFL.BFLY PT, R5, R4, 0x8, 0x1f",
        "@!P1 BRA 0x60",
    )
    assert shuffles(*sass.code_and_loops(listing)) == 2
    with pytest.raises(ValueError, match="no loop takes exponentials"):
        shuffles(*sass.code_and_loops(sass_listing("EXIT")))


def test_sass_loop_counter_is_found_behind_a_copy_of_its_predicate():
    """P0 stands for another comparison before it takes over that of the counter."""
    copied = sass_listing(
        "LDG.E.128 R4, [R2.64]",
        "UIADD3 UR4, UR4, 0x400, URZ",
        "UISETP.GE.AND UP0, UPT, UR4, UR5, UPT",
        "MUFU.EX2 R4, R4",
        "ISETP.NE.U32.AND P0, PT, R21, UR10, PT",
        "PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0",
        "@!P0 BRA 0x0",
    )
    assert sass.main_loop(copied).columns == 0x400


AMDGCN = """\
.LBB0_3:                                ; %.lr.ph
	.loc	1 2 3
	global_load_dwordx4 v[20:23], v[34:35], off
	global_load_short_d16_hi v24, v[36:37], off
	s_addk_i32 s37, 0x800
	s_waitcnt vmcnt(0)
	v_and_b32_e32 v35, 0xffff0000, v20
	v_exp_f32_e32 v26, v26
	v_pk_fma_f32 v[26:27], v[2:3], v[26:27], v[28:29]
	v_add_f32_dpp v2, v3, v3 row_shr:1 row_mask:0xf bank_mask:0xf
	ds_read_b32 v3, v4
	s_barrier
	s_cmp_lt_i32 s37, s33
	s_cbranch_scc1 .LBB0_3
; TotalNumVgprs: 52
; ScratchSize: 0
; Occupancy: 8
    .sgpr_spill_count: 0
    .vgpr_spill_count: 3
"""


def test_amdgcn_main_loop_and_resources():
    loop = amdgcn.main_loop(AMDGCN)
    assert loop.counts() == dict.fromkeys(("mufu", "fma", "convert", "shuffle", "shared", "barrier"), 1) | {
        "load": 2,
        "alu": 2,
        "control": 2,
    }
    assert (loop.columns, loop.bytes_in_flight, loop.widths("load")) == (0x800, 18, [16, 2])
    resources = amdgcn.resources(AMDGCN, shared=16, num_warps=4)
    assert (resources.registers, resources.spill, resources.resident_warps) == (52, 3, 32)


def test_a_kernel_without_a_main_loop_is_an_error():
    with pytest.raises(ValueError, match="none of 0 innermost loops"):
        sass.main_loop(sass_listing("EXIT"))


def test_variants_cover_every_target_and_have_names_of_their_own():
    names = [variant.name for variant in variants.all_variants()]
    assert len(names) == len(set(names))
    assert {name.split()[1] for name in names} == set(variants.TARGETS)


def test_variants_cover_every_divergence_in_both_launches():
    """Those of two sweeps in each of their kernels; tests define more divergences, which have none."""
    ours = {name: kind for name, kind in DIVERGENCES.items() if kind.__module__.startswith("fused_kd.")}
    in_two, in_one = variants.all_variants(["sm_90"]), variants.one_launch_variants(["sm_90"])
    with_teacher = [variant for variant in in_two if variant.teacher_grad]
    assert all({variant.divergence for variant in found} == set(ours) for found in (in_two, in_one, with_teacher))
    of_sums = {variant.divergence for variant in in_two if variant.kernel == "ratio_sums"}
    assert of_sums == set(variants.RATIOS) == set(bounds.OF_RATIOS)
    assert of_sums == {name for name, kind in ours.items() if kind().sweeps == 2}


def _of_tritons_jit(kernel: Any, arguments: Iterable[Any]) -> tuple[list[tuple[str, Any]], Any]:
    """Return what Triton's JIT looks up the compiled kernel of a call by, and the backend that reads it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(kernel.signature, kernel.params, backend)(*arguments)[1], backend


def _beside_tritons_jit(variant: variants.Variant | rows.RowVariant) -> list[tuple[Any, Any]]:
    """Runs in a worker, where the kernels are not under the interpreter: ours beside Triton's own, of one call."""
    if isinstance(variant, rows.RowVariant):
        source, _ = rows.source(variant)
        kernel, call = rows.launch_of(rows.CALLS[variant.kernel, variant.call])
    else:
        source, kernel = variants.source(variant), variants._kernel(variant.kernel)
        call = variants.call_arguments(variant) | variants._constants(variant)
    dtypes = {name: dtype for dtype, name in rows.TYPES.items()}
    arguments = (call[parameter.name] for parameter in kernel.params)
    theirs, backend = _of_tritons_jit(
        kernel, (rows.some(1, dtype=dtypes[a.dtype]) if isinstance(a, variants.Pointer) else a for a in arguments)
    )
    ours = list(source.signature.values())
    return [
        ((ours[i], source.attrs.get((i,), [])), (kind, backend.parse_attr(key) if isinstance(key, str) else []))
        for i, (kind, key) in enumerate(theirs)
    ]


def test_specialisation_is_that_of_tritons_jit():
    cases = [
        *(
            variants.Variant("logit_gradient", "sm_90", "bf16", "fp32", 3.0, "ce+kl", layout, "softcap")
            for layout in ("dense", "odd", "transposed")
        ),
        variants.Variant("row_statistics", "sm_90", "bf16", "bf16", 2.0, "ce", "padded"),
        variants.Variant("ratio_sums", "sm_90", "bf16", "fp32", 2.0, "ce+kl", "odd", divergence="jsd"),
        *(variants.Variant(kernel, "sm_90", "bf16", "bf16", 2.0, "kl", "padded") for kernel in variants.ONE_LAUNCH),
        *rows.row_variants(["sm_90"]),
    ]
    found = workers.in_workers(_beside_tritons_jit, cases, workers=1)
    for case, pairs in found.items():
        if isinstance(pairs, ImportError):
            pytest.skip(f"another Triton: {pairs}")
        assert not isinstance(pairs, BaseException), f"{case.name}: {pairs!r}"
        for ours, theirs in pairs:
            assert ours == theirs, case.name


def _specialised(call: Callable[[], None]) -> list[Any]:
    """Return what Triton's JIT looks up the compiled kernel of a call by."""
    kernel, values = rows.launch_of(call)
    return _of_tritons_jit(kernel, (values[parameter.name] for parameter in kernel.params))[0]


def _of_other_steps(_: None) -> list[tuple[list[Any], list[Any]]]:
    """Runs in a worker.  Between two steps the number of rows changes, the length of the sequences, every number."""
    import torch

    some, F64, I64 = rows.some, torch.float64, torch.int64

    def prologue(N: int, **given: Any) -> Callable[[], None]:
        usual = {"labels": some(N, dtype=I64), "alpha": some(N), "rows": N}
        return lambda: rows.row_weights(**{**usual, **given})

    def logits(outer: int, inner: int, V: int, stride: int) -> Callable[[], None]:
        return lambda: rows.scale(some(outer, inner, stride, dtype=torch.bfloat16)[..., :V])

    pairs = [
        (prologue(8192, sequence=2048, temperature=2.0), prologue(1, sequence=1, temperature=1.0)),
        (prologue(16, num_items=16.0, alpha=0.25), prologue(17, num_items=0.5, alpha=1.0)),
        (lambda: rows.row_losses(True, True, parts=True), lambda: rows.row_losses(True, True, parts=True, N=1)),
        (lambda: rows.unit_weights(some(16)), lambda: rows.unit_weights(some(1), N=1)),
        (lambda: rows.merge("mixed_kl"), lambda: rows.merge("mixed_kl", N=1)),
        (lambda: rows.copy_counted(some(16, 64), F64), lambda: rows.copy_counted(some(1, 64), F64, N=1)),
        (logits(2, 5, 999, 999), logits(8, 4096, 100_000, 100_000)),
        (logits(2, 16, 1000, 1024), logits(1, 17, 1000, 1024)),
    ]
    return [(_specialised(one), _specialised(other)) for one, other in pairs]


def test_nothing_is_compiled_again_from_step_to_step():
    (pairs,) = workers.in_workers(_of_other_steps, [None], workers=1).values()
    if isinstance(pairs, ImportError):
        pytest.skip(f"another Triton: {pairs}")
    for one, other in pairs:
        assert one == other


def keeps_its_bounds(variant: variants.Variant, registers: int, shuffled: int = 0) -> bool:
    return not list(bounds.one_launch_violations(variant, OneLaunchFigures(registers, 0, 0, 32, shuffled)))


@pytest.mark.parametrize(
    ("dtype", "logit_map", "registers", "kept"),
    [
        ("bf16", "identity", 56, False), ("bf16", "identity", 57, True), ("bf16", "identity", 64, True),
        ("bf16", "identity", 65, False), ("bf16", "softcap", 72, True), ("bf16", "softcap", 73, False),
        ("fp32", "identity", 40, True),
    ],
)  # fmt: skip
def test_registers_are_those_that_rows_in_flight_are_planned_by(
    monkeypatch: pytest.MonkeyPatch, dtype: str, logit_map: str, registers: int, kept: bool
):
    """64 on an H100."""
    monkeypatch.setattr("triton.__version__", "3.8.0")
    variant = variants.Variant("shared", "sm_90", dtype, dtype, 2.0, "ce+kl", "dense", logit_map)
    assert keeps_its_bounds(variant, registers) == kept
    assert not keeps_its_bounds(variant, registers, shuffled=1)


@pytest.mark.parametrize(
    ("kernel", "target", "version", "kept"),
    [
        ("shared", "sm_90", "3.6.0", range(49, 65)), ("shared", "sm_90", "3.8.0", range(57, 65)),
        ("shared", "sm_80", "3.6.0", range(57, 65)), ("whole", "sm_100", "3.6.0", range(57, 73)),
        ("whole", "sm_100", "3.9.0", range(57, 65)),
    ],
)  # fmt: skip
def test_other_releases_of_triton_take_other_registers_where_it_is_said(
    monkeypatch: pytest.MonkeyPatch, kernel: str, target: str, version: str, kept: range
):
    monkeypatch.setattr("triton.__version__", version)
    variant = variants.Variant(kernel, target, "bf16", "bf16", 2.0, "ce+kl", "dense")
    assert [registers for registers in range(40, 90) if keeps_its_bounds(variant, registers)] == list(kept)


def test_programs_that_share_a_row_take_fewer_registers_at_3_where_it_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("triton.__version__", "3.8.0")
    variant = variants.Variant("shared", "sm_90", "bf16", "bf16", 3.0, "ce+kl", "dense")
    assert [registers for registers in range(40, 90) if keeps_its_bounds(variant, registers)] == list(range(49, 65))


@pytest.mark.parametrize(
    ("divergence", "entropy", "kept"),
    [
        ("forward_kl", False, range(41, 49)), ("reverse_kl", False, range(41, 57)), ("mixed_kl", False, range(41, 65)),
        ("forward_kl", True, range(41, 65)), ("mixed_kl", True, range(41, 65)), ("jsd", False, range(41, 65)),
        ("tvd", False, range(41, 49)),
    ],
)  # fmt: skip
def test_other_divergences_take_more_registers_where_it_is_said(
    monkeypatch: pytest.MonkeyPatch, divergence: str, entropy: bool, kept: range
):
    monkeypatch.setattr("triton.__version__", "3.8.0")
    variant = variants.Variant(
        "whole", "sm_90", "bf16", "bf16", 2.0, "ce+kl", "dense", divergence=divergence, entropy=entropy
    )
    assert [registers for registers in range(30, 90) if keeps_its_bounds(variant, registers)] == list(kept)


@pytest.mark.parametrize(("version", "there"), [("3.7.1", False), ("3.8.0", True)])
def test_clusters_are_profiled_where_they_are_launched(monkeypatch: pytest.MonkeyPatch, version: str, there: bool):
    monkeypatch.setattr("triton.__version__", version)
    kernels = {variant.kernel for variant in variants.one_launch_variants()}
    assert kernels == ({"whole", "shared", "cluster"} if there else {"whole", "shared"})


def test_one_variant_keeps_its_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "profile.json"
    assert static_profile.main(["--check", "--variant", ONE, "--workers", "1", "--listing", "--json", str(file)]) == 0
    assert "1 variants keep their bounds" in capsys.readouterr().out
    (figures,) = json.loads(file.read_text())["variants"]
    assert figures["violations"] == []
    assert figures["bytes"] == 4
    assert 10 < figures["instructions"] <= 27
    assert 2 <= figures["kinds"]["mufu"] <= 2.5  # two exponentials a pair, and one a tile to move to new maxima
    assert len(figures["listing"]) == figures["instructions"] * figures["pairs"]


def test_the_kernels_of_rows_spill_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    chosen = [argument for kernel, _ in rows.CALLS for argument in ("--kernel", kernel)]
    assert static_profile.main(["--check", "--target", "sm_90", *chosen]) == 0
    assert f"{len(rows.CALLS)} variants keep their bounds" in capsys.readouterr().out
    monkeypatch.setattr(
        static_profile, "in_workers", lambda _, variants, __: {variants[0]: bounds.Resources(32, 8, 0, 64)}
    )
    assert static_profile.main(["--check", "--target", "sm_90", "--kernel", "scale"]) == 1
    assert "spill is 8, must be at most 0" in capsys.readouterr().out


def test_check_fails_when_a_bound_is_lower(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    limits = bounds.LIMITS["row_statistics"]._replace(instructions=10)
    monkeypatch.setitem(bounds.LIMITS, "row_statistics", limits)
    assert static_profile.main(["--check", "--variant", ONE, "--workers", "1"]) == 1
    assert f"BROKEN {ONE}: instructions a pair" in capsys.readouterr().out


def test_a_sum_over_threads_rounds_alike_in_all_of_them():
    """Both partners of a shuffle add the same two values: were one a product fused into the addition, its own on each
    side, they would round differently, and what is stored would depend on which thread comes last.
    """
    cases = [
        variants.Variant("row_statistics", "sm_90", "bf16", "bf16", temperature, "ce+kl", layout)
        for temperature in (1.0, 2.0, 3.0)
        for layout in ("dense", "padded", "odd")
    ] + [
        variants.Variant(kernel, target, "bf16", "bf16", 2.0, "ce+kl", "dense")
        for kernel, target in (("whole", "sm_90"), ("whole", "sm_100"), ("shared", "sm_90"))
    ]
    codes = workers.in_workers(variants.ptx, cases, workers=1)
    for case, code in codes.items():
        shuffled = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)", code))
        addends = set(re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", code))
        assert len(shuffled) > 10
        assert len(addends) > 10
        assert not shuffled & addends, case.name


@pytest.mark.parametrize("divergence", variants.DIVERGENCES)
def test_a_change_of_unit_is_not_fused_into_a_sum(divergence: str):
    """It would be in a kernel with nothing between that and the sum, and there the sum's product would be rounded.  One
    launch would not have the statistics of two.
    """
    unit = f"0f{int.from_bytes(struct.pack('>f', 1 / UNIT)):08X}"
    cases = [
        variants.Variant(kernel, "sm_90", "bf16", "bf16", T, "ce+kl", "dense", divergence=divergence)
        for kernel in ("row_statistics", "whole")
        for T in (2.0, 2.5)
    ]
    for case, code in workers.in_workers(variants.ptx, cases, workers=1).items():
        products = set(re.findall(r"mul\.f32\s+(%\w+),", code))
        fused = re.findall(rf"fma\.rn\.f32\s+%\w+, %\w+, {unit}, (%\w+);", code)
        assert unit in code
        assert not products & set(fused), case.name


@pytest.mark.slow
@pytest.mark.parametrize("divergence", variants.DIVERGENCES)
def test_no_sum_of_two_products_is_left_to_the_compiler(divergence: str):
    """It fuses either product into the addition, which rounds the other one: it chooses otherwise in another kernel, and
    even for another column.  One launch would not have the gradient of two.
    """
    cases = [
        variants.Variant("logit_gradient", "sm_90", "bf16", "bf16", T, "ce+kl", "padded", logit_map, True, divergence)
        for T, logit_map in ((1.0, "identity"), (2.0, "identity"), (3.0, "softcap"), (2.5, "softcap"))
    ]
    for case, code in workers.in_workers(variants.llir, cases, workers=1).items():
        products: set[str] = set()
        additions = 0
        for line in code.splitlines():
            if re.match(r"[\w.$-]+:", line):
                products = set()  # another basic block, over which nothing is fused
            elif found := re.match(r"\s+(%\w+) = (fmul|fadd|fsub) .*?(\S+), (\S+?)(,|$)", line):
                result, operation, *operands, _ = found.groups()
                if operation == "fmul":
                    products.add(result)
                else:
                    additions += 1
                    assert not products.issuperset(operands), f"{case.name}: {line}"
        assert additions > 20


def test_wrong_arguments_exit_with_2():
    with pytest.raises(SystemExit) as exit_:
        static_profile.main(["--variant", "no-such-word"])
    assert exit_.value.code == 2
