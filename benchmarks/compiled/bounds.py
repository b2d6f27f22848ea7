"""Bounds that the compiled kernels must keep to stay bound by memory; a regression of the code breaks them."""

from collections.abc import Iterator
from typing import NamedTuple

from fused_kd.launching import triton_release

from .profile import OneLaunchFigures, Profile, Resources
from .variants import LAYOUTS, RATIOS, SIZES, Variant, launch_shape


class Limits(NamedTuple):
    """Limits per pair in the main loop of a bfloat16 kernel on NVIDIA's GPUs."""

    instructions: float
    mufu: float
    mufu_of_power: float  # for T = 1, 2, 3, 4, where e^z is a power of e^{z/T}
    bytes: float


# An H100 at 3 TB/s has room for 39 instructions and 4.9 MUFU per pair in the statistics, 59 and 7.4 in the gradient.
LIMITS = {
    "row_statistics": Limits(instructions=27, mufu=3.6, mufu_of_power=2.5, bytes=4.05),
    "logit_gradient": Limits(instructions=30, mufu=3.1, mufu_of_power=3.1, bytes=6.05),
}
# Two tanh more, of 20 instructions each.  The statistics are then bound by arithmetic, at 1.7 times the time that memory
# takes on an H100; a sweep of its own for the softcap would cost 8 bytes per pair on top of 4, three times that time.
SOFTCAP = Limits(instructions=40, mufu=4, mufu_of_power=4, bytes=0)
# One multiply-add and three multiplications or choices more, and one array more to write.
TEACHER_GRAD = Limits(instructions=7, mufu=0, mufu_of_power=0, bytes=2)
# The student's gradient of reverse KL takes no exponential of the teacher's logits.
REVERSE_KL = Limits(instructions=0, mufu=-1, mufu_of_power=-1, bytes=0)
# One sum more, of the log-ratio under the other distribution, or of the student's entropy: a multiply-add per column, and
# one more sum to move to a new maximum.
SUM_MORE = Limits(instructions=3, mufu=0, mufu_of_power=0, bytes=0)
# The divergences of two sweeps, per pair: the sums, the gradient of the student, the gradients of both.  Two logarithms of
# a mixture are one polynomial of eight terms, and the values have one of four where the models are close (`ratios.py`).
# So all but total variation are bound by instructions, not by memory: the limits keep them from growing.
OF_RATIOS = {
    "jsd": (Limits(44, 3.1, 3.1, 4.05), Limits(32, 3.1, 3.1, 6.05), Limits(44, 4.1, 4.1, 8.05)),
    "skew_kl": (Limits(47, 5.1, 5.1, 4.05), Limits(29, 5.1, 5.1, 6.05), Limits(45, 6.1, 6.1, 8.05)),
    "skew_reverse_kl": (Limits(48, 5.1, 5.1, 4.05), Limits(42, 5.1, 5.1, 6.05), Limits(48, 6.1, 6.1, 8.05)),
    "tvd": (Limits(20, 2.1, 2.1, 4.05), Limits(23, 3.1, 3.1, 6.05), Limits(28, 3.1, 3.1, 8.05)),
}
WIDEST_ACCESS = 16  # bytes, on all the targets
REGISTER_STEP = 8  # registers of a thread come in so many
# More than are planned, in steps: on gfx942 Triton 3.8 and 3.9 differ by as much, and two tanh take a step.
MORE_OF_TARGET, MORE_OF_SOFTCAP = {"gfx942": 2}, 1
# Launches of one sweep are planned for forward KL.  The gradient of reverse KL needs the statistic c, which forward KL's
# does not, and its statistics have a rare sweep for models that are nearly equal.  Mixed KL has that sweep, one sum more
# per thread and both gradients; the entropy is one sum more, and jsd and its like have a loop more and both shares of the
# mixture.  More registers leave fewer rows in flight: a simulated H100 takes 1.23 of the floor's time for mixed KL in
# clusters, where forward KL takes 1.02.
MORE_OF_DIVERGENCE = {
    "reverse_kl": {("whole", "sm_80"): 2, ("whole", "sm_90"): 1, ("whole", "sm_100"): 2},  # on sm_90 with Triton 3.6
    "mixed_kl": {
        ("whole", "sm_80"): 2, ("whole", "sm_90"): 2, ("whole", "sm_100"): 4, ("cluster", "sm_90"): 2,
        ("shared", "sm_80"): 4, ("shared", "sm_90"): 4, ("shared", "sm_100"): 4,
    },
    "jsd": {("whole", "sm_80"): 4, ("whole", "sm_90"): 2, ("whole", "sm_100"): 2, ("whole", "gfx942"): 2},
    "skew_kl": {
        ("whole", "sm_80"): 7, ("whole", "sm_90"): 2, ("whole", "sm_100"): 4, ("whole", "gfx942"): 1,
        ("shared", "sm_100"): 5,
    },
    "skew_reverse_kl": {
        ("whole", "sm_80"): 7, ("whole", "sm_90"): 4, ("whole", "sm_100"): 6, ("whole", "gfx942"): 3,
        ("shared", "sm_80"): 4, ("shared", "sm_90"): 5, ("shared", "sm_100"): 7, ("shared", "gfx942"): 2,
    },
}  # fmt: skip
MORE_OF_ENTROPY = {("whole", "sm_90"): 2, ("whole", "sm_100"): 1, ("cluster", "sm_90"): 2}
# Divergences of two sweeps have one planned shape, and few of them need all of its registers: then more rows are in flight.
FEWER_OF_RATIOS = {("shared", "sm_80"): 7, ("shared", "sm_90"): 4, ("shared", "gfx942"): 2}
# The registers of mixed KL, of the divergences of two sweeps and of the entropy are bounded with this release.  With others
# only spills are: 3.6 takes up to 106 registers for skew_kl in one program, and up to 3 instructions per pair more.
COUNTED_WITH = (3, 8)
OTHER_RELEASE = Limits(instructions=3, mufu=0, mufu_of_power=0, bytes=0)
# Steps by which other releases of Triton, with another ptxas or LLVM, differ from 3.8, whose registers the plan counts
# with.  One step less puts an eighth more rows in flight.  A simulated H100 with Triton 3.6 then moves 6.3 bytes
# per pair at V = 151 936, with 3.8 6.1: 1.05 and 1.02 of the floor's time.
STEPS_OF_RELEASE = {
    ("shared", "sm_80"): {(3, 3): 1},
    ("shared", "sm_90"): {(3, 3): 1, (3, 4): -1, (3, 5): -1, (3, 6): -1, (3, 7): -1},
    ("shared", "sm_100"): {(3, 3): 1, (3, 4): -1, (3, 6): -1, (3, 7): -1},
    ("shared", "gfx942"): {(3, 7): 2},
    ("whole", "sm_100"): {(3, 3): 2, (3, 5): 1, (3, 6): 1},
}
# At T = 3 alone; an eighth more rows in flight, as above.  On sm_100 rows are not shared (`Device.sharing`).
STEPS_AT_3 = {("shared", "sm_90", (3, 8)): -1, ("shared", "sm_100", (3, 8)): -1}


class Violation(NamedTuple):
    figure: str
    value: float
    relation: str
    limit: float

    def __str__(self) -> str:
        return f"{self.figure} is {self.value:.4g}, must be {self.relation} {self.limit:.4g}"


def violations(variant: Variant, profile: Profile) -> Iterator[Violation]:
    yield from _at_most("spill", profile.spill, 0)
    for kind in ("local", "barrier", "shuffle", "shared"):
        yield from _at_most(f"{kind} instructions a pair in the loop", profile.kinds[kind], 0)
    if LAYOUTS[variant.layout].wide:
        yield from _wide_violations(variant, profile)


def one_launch_violations(variant: Variant, figures: OneLaunchFigures) -> Iterator[Violation]:
    """Fewer registers than planned put more rows in flight, which L2 may not hold; more leave fewer, and fewer loads."""
    planned = launch_shape(variant).registers
    yield from _at_most("spill", figures.spill, 0)
    yield from _at_most("shuffles in the loops", figures.shuffles, 0)
    if _is_counted_once(variant) and triton_release() != COUNTED_WITH:
        return
    of_release = STEPS_OF_RELEASE.get((variant.kernel, variant.target), {}).get(triton_release(), 0)
    if variant.temperature == 3:
        of_release += STEPS_AT_3.get((variant.kernel, variant.target, triton_release()), 0)
    more = MORE_OF_TARGET.get(variant.target, 0) + MORE_OF_SOFTCAP * (variant.logit_map == "softcap")
    form = variant.kernel, variant.target
    of_divergence = MORE_OF_DIVERGENCE.get(variant.divergence, {}).get(form, 0)
    more += max(of_divergence, MORE_OF_ENTROPY.get(form, 0) if variant.entropy else 0)
    fewer = FEWER_OF_RATIOS.get(form, 0) if variant.divergence in RATIOS else 0
    yield from _at_most("registers", figures.registers, planned + (more + max(0, of_release)) * REGISTER_STEP)
    if variant.student == variant.teacher == "bf16":
        fewest = planned + (min(0, of_release) - 1 - fewer) * REGISTER_STEP + 1
        yield from _at_least("registers", figures.registers, fewest)


def _is_counted_once(variant: Variant) -> bool:
    return variant.entropy or variant.divergence in (*RATIOS, "mixed_kl")


def row_violations(resources: Resources) -> Iterator[Violation]:
    yield from _at_most("spill", resources.spill, 0)


def _wide_violations(variant: Variant, profile: Profile) -> Iterator[Violation]:
    def widest(*dtypes: str) -> int:
        return min(WIDEST_ACCESS, *(profile.columns * SIZES[dtype] for dtype in dtypes))

    yield from _at_least("narrowest load, bytes", profile.load_width, widest(variant.student, variant.teacher))
    if variant.kernel == "logit_gradient":
        written = (variant.student, variant.teacher) if variant.teacher_grad else (variant.student,)
        yield from _at_least("narrowest store, bytes", profile.store_width, widest(*written))
    if variant.target.startswith("sm_") and variant.dtypes == "bf16/bf16":
        limits = _limits(variant)
        mufu = limits.mufu if variant.temperature_name == "other" else limits.mufu_of_power
        yield from _at_most("instructions a pair", profile.instructions, limits.instructions)
        yield from _at_most("MUFU a pair", profile.kinds["mufu"], mufu)
        yield from _at_most("bytes a pair", profile.bytes, limits.bytes)


def _limits(variant: Variant) -> Limits:
    is_gradient = variant.kernel == "logit_gradient"
    more = [SOFTCAP] * (variant.logit_map == "softcap") + [SUM_MORE] * variant.entropy
    if variant.divergence in RATIOS and variant.kernel != "row_statistics":
        limits = OF_RATIOS[variant.divergence][is_gradient + variant.teacher_grad]
    else:
        limits = LIMITS[variant.kernel]
        more += [TEACHER_GRAD] * variant.teacher_grad
        if variant.divergence == "reverse_kl" and is_gradient and not variant.teacher_grad:
            more.append(REVERSE_KL)
        if variant.divergence == "mixed_kl" and not is_gradient:
            more.append(SUM_MORE)
    if _is_counted_once(variant) and triton_release() != COUNTED_WITH:
        more.append(OTHER_RELEASE)
    return Limits(*map(sum, zip(limits, *more, strict=True)))


def _at_most(figure: str, value: float, limit: float) -> Iterator[Violation]:
    if value > limit:
        yield Violation(figure, value, "at most", limit)


def _at_least(figure: str, value: float, limit: float) -> Iterator[Violation]:
    if value < limit:
        yield Violation(figure, value, "at least", limit)
