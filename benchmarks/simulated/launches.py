"""The launch of one case of `cases.py`: its inputs, the kernels interpreted and on a simulated chip, the differences.

Memory that a launch may not touch is marked.  Between rows, and in rows that do not count, inputs are poisoned: the
simulator reports a read of them, and they are compared byte for byte afterwards.  Results are poisoned or NaN before they
are written.
"""

import importlib
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fused_kd import statistics as stats
from fused_kd.backends import cpu
from fused_kd.divergences import Objective, of
from fused_kd.launch import Launch, SinglePass, two_passes
from fused_kd.launching import compiles_clusters, device_of, is_wide
from fused_kd.logit_map import LogitMap
from fused_kd.testing.accuracy import EPSILON, unit_in_last_place

from ..compiled.variants import PROCESSORS, TERMS
from .cases import LAYOUTS, ROWS, Case, Placement
from .simulator import MODULE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# A cap that bends most of the logits, of standard deviation 3.
LOGIT_MAPS = {"identity": LogitMap(), "scale": LogitMap(0.7), "softcap": LogitMap(1.5, 5.0)}
RESULTS = ("statistics", "gradient", "teacher gradient")

# Largest differences in float32 epsilons.  From the interpreter 2.9 measured: compiled code fuses multiply-adds and adds
# over threads in another order.  exp2 may be numpy's in the simulator too; a GPU's own, to two units in the last place, is
# then not in the figure.  From float64 4.3, but 14 for a gradient behind a softcap: where logits reach the cap, its slope
# 1 - t^2 cancels, in the interpreter as well.
BOUND = {"interpreter": 4.0, "float64": 6.0}
BOUND_OF_SOFTCAP = 24.0  # from float64
AGAINST = tuple(BOUND)
MISROUNDED_BOUND = 0.001  # of 16-bit elements, one unit in the last place off; 0.06% measured
WRITE_BLOCK = 1024
WITHOUT_CLUSTERS = ("a100",)
POISON = 255  # every byte; a NaN in all the dtypes


@dataclass(frozen=True)
class Inputs:
    student: Tensor  # [outer, inner, V]
    teacher: Tensor  # [outer', inner', V]
    labels: Tensor  # [N]
    ce_weight: Tensor  # [N]
    kl_weight: Tensor  # [N]
    gradient: Tensor  # [outer, inner, V]; may be the student
    teacher_gradient: Tensor | None  # [outer', inner', V]; may be the teacher
    upstream: Tensor | None  # a scalar or [N]; two launches have one

    @property
    def weights(self) -> Tensor:  # [3, N]
        """Return the weights of the rows.  That of the row itself is not used by the sweeps."""
        weights = torch.stack([torch.full_like(self.ce_weight, torch.nan), self.ce_weight, self.kl_weight])
        return _between_others(weights.double())

    @property
    def ignored(self) -> Tensor:  # [N]
        return (self.ce_weight == 0) & (self.kl_weight == 0)

    @property
    def written(self) -> list[Tensor]:
        return [self.gradient] if self.teacher_gradient is None else [self.gradient, self.teacher_gradient]

    @property
    def views(self) -> list[Tensor]:
        """All logits and gradients, each once."""
        return [self.student, self.teacher, *self.only_written]

    @property
    def only_written(self) -> list[Tensor]:
        return [view for view in self.written if view is not self.student and view is not self.teacher]


class Difference(NamedTuple):
    """The difference of a compiled kernel's result from another, in float32 epsilons; see `differences`."""

    result: str  # of RESULTS
    against: str  # of AGAINST
    epsilons: float
    bound: float
    misrounded: float  # share of 16-bit elements that are not the other's, rounded; 0 for float32
    elements: int = 0  # of the result

    @property
    def misrounded_bound(self) -> float:
        """Return the bound for a sample: an element is rounded otherwise where float32's own error reaches across a tie.

        That is chance, as often as MISROUNDED_BOUND at most; of n elements three standard deviations more are chance too.
        """
        return MISROUNDED_BOUND + 3 * math.sqrt(MISROUNDED_BOUND / self.elements) if self.elements else MISROUNDED_BOUND

    @property
    def within_bounds(self) -> bool:
        return self.epsilons <= self.bound and self.misrounded <= self.misrounded_bound  # and not NaN

    def __str__(self) -> str:
        return (
            f"{self.result} differs from {self.against} by {self.epsilons:.3g} float32 epsilons, at most {self.bound:g}, "
            f"and in {self.misrounded:.2%} of 16-bit elements, at most {self.misrounded_bound:.2%}"
        )


@dataclass(frozen=True)
class Outcome:
    differences: tuple[Difference, ...]
    findings: tuple[str, ...]


def inputs(case: Case) -> Inputs:
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    N, V = ROWS, case.vocabulary
    need_ce, need_kl = TERMS[case.terms]

    def weight(needed: bool, zeros: list[int]) -> Tensor:
        return (torch.rand(N, generator=generator) + 0.5).index_fill_(0, torch.tensor(zeros), 0.0) * needed

    # The second row counts for nothing, the next two for one of the terms.
    ce_weight, kl_weight = weight(need_ce, [1, 2]), weight(need_kl, [1, 3])
    labels = torch.randint(V, (N,), generator=generator)
    labels[0], labels[-1] = 0, V - 1
    labels[(ce_weight == 0) & (kl_weight == 0)] = -100
    masked = torch.zeros(N, V, dtype=torch.bool)
    if case.logits == "masked":
        masked[:, 1::3] = True
        masked[torch.arange(N), labels.clamp_min(0)] = False

    def logits(dtype: str, placement: Placement) -> Tensor:
        values = (3 * torch.randn(N, V, generator=generator)).masked_fill_(masked, -torch.inf)
        view = empty(DTYPES[dtype], placement, V)
        return view.copy_(values.view(view.shape))

    dtypes, placements = case.dtypes.split("/"), LAYOUTS[case.layout]
    student, teacher = map(logits, dtypes, placements)

    def written(like: Tensor, dtype: str, placement: Placement) -> Tensor:
        if case.gradients.endswith("in place"):
            return like
        return empty(DTYPES[dtype], Placement(placement.outer) if placement.transposed else placement, V)

    gradients = [written(*arguments) for arguments in zip((student, teacher), dtypes, placements, strict=True)]
    teacher_gradient = gradients[1] if case.gradients.startswith("both") else None
    labels = labels.to({"i64": torch.int64, "i32": torch.int32}[case.labels])
    upstream = torch.rand(() if case.labels == "i32" else N, generator=generator) + 0.5
    return Inputs(
        student, teacher, labels, ce_weight, kl_weight, gradients[0], teacher_gradient,
        upstream if case.form == "two launches" else None,
    )  # fmt: skip


def _between_others(numbers: Tensor) -> Tensor:
    """Return the numbers as those of a chunk of rows lie among those of all rows; the others are NaN."""
    memory = numbers.new_full((numbers.shape[0], ROWS + 5), torch.nan)
    memory[:, 2 : ROWS + 2] = numbers
    return memory[:, 2 : ROWS + 2]


def empty(dtype: torch.dtype, placement: Placement, vocabulary: int) -> Tensor:
    """Logits of that placement, poison still."""
    shape = (placement.outer, ROWS // placement.outer, vocabulary)
    strides = placement.strides(vocabulary)
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = torch.empty(placement.start + last + 1 + placement.gap, dtype=dtype)
    memory.view(torch.uint8).fill_(POISON)
    return memory.as_strided(shape, strides, placement.start)


def memory_of(view: Tensor) -> Tensor:
    """Everything that was allocated for a view, flat."""
    return view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)


def outside(view: Tensor, rows: Tensor) -> Tensor:
    """Return a mask of the elements of its memory that are in none of the rows (a mask, [N]) of a view."""
    inside = torch.zeros(memory_of(view).shape, dtype=torch.bool)
    of_view = inside.as_strided(view.shape, view.stride(), view.storage_offset())
    of_view.copy_(rows.view(*view.shape[:2], 1).expand(view.shape))
    return ~inside


def poison(given: Inputs, mark: Callable[[Tensor], Any]) -> None:
    """Marks what no launch may read: all of the memory, of which the logits that count are then written by a kernel."""
    for view in (given.student, given.teacher):
        memory = memory_of(view)
        logits = memory.clone()
        places = (~outside(view, ~given.ignored)).nonzero().flatten()
        mark(memory)
        write_kernel[(triton.cdiv(places.numel(), WRITE_BLOCK),)](memory, logits, places, places.numel(), WRITE_BLOCK)
    for view in given.only_written:
        mark(memory_of(view))


@triton.jit(do_not_specialize=["number"])
def write_kernel(memory_ptr, values_ptr, places_ptr, number, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = index < number
    place = tl.load(places_ptr + index, mask=mask, other=0)
    tl.store(memory_ptr + place, tl.load(values_ptr + place, mask=mask, other=0.0), mask=mask)


def launch(case: Case, itemsize: int) -> Any:
    """Return the plan for the case's rows and columns, but with its splits."""
    whole = two_passes(ROWS, case.vocabulary, itemsize, PROCESSORS)
    tile = whole.lanes * whole.columns
    return whole._replace(splits=case.splits, columns_per_split=-(-case.vocabulary // (case.splits * tile)) * tile)


def single_pass(case: Case, itemsize: int, clusters: bool) -> SinglePass:
    """Return the launch of a single pass.

    A row gets several programs; or one with two accesses, or a cluster with one access.  The cluster has 2 blocks, 1
    behind a softcap, which Triton does not compile for more.
    """
    columns = 16 // itemsize
    if case.form == "whole":
        ctas = 1 + (case.splits > 1 and clusters and "softcap" not in (case.student_map, case.teacher_map))
        accesses = 1 + (case.splits == 1)
        return SinglePass(ctas, 4, 32, accesses * columns, 0, case.vocabulary, accesses)
    columns *= 2  # of a thread, in two accesses
    tile = 4 * 32 * columns
    # The last splits have no columns where tiles are few.
    per_split = -(-case.vocabulary // (case.splits * tile)) * tile
    return SinglePass(1, 4, 32, columns, case.splits, per_split, 2)


def run(case: Case, given: Inputs, clusters: bool = True) -> dict[str, Tensor]:
    """Return the results of the kernels: statistics [9, N], gradients [N, V]."""
    from fused_kd.backends import triton as kernels

    given_to, objective = _of_case(case, given)
    read = [tensor.element_size() for tensor in given_to[:2] if tensor is not None]
    written = read if given.teacher_gradient is not None else read[:1]
    weights, statistics = given.weights, _statistics(given)
    torch.use_deterministic_algorithms(True)  # what PyTorch allocates is NaN until it is written
    if case.form != "two launches":
        planned = single_pass(case, max(read), clusters)
        kernels.statistics_and_gradient(
            *given_to, weights, statistics, given.gradient, None, planned, objective, False
        )  # fmt: skip
        torch.use_deterministic_algorithms(False)
        return _named(statistics, given.gradient, None)
    kernels.row_statistics(*given_to, weights, statistics, None, objective, False, launch(case, min(read)))
    torch.use_deterministic_algorithms(False)
    kernels.logit_gradient(
        *given_to, statistics, weights, given.upstream, given.gradient, given.teacher_gradient, objective,
        launch(case, max(written)),
    )  # fmt: skip
    return _named(statistics, given.gradient, given.teacher_gradient)


def _of_case(case: Case, given: Inputs) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Objective]:
    """Return student, teacher and labels, without those that the terms leave out, and the objective."""
    need_ce, need_kl = TERMS[case.terms]
    objective = Objective(LOGIT_MAPS[case.student_map], LOGIT_MAPS[case.teacher_map], case.temperature, case.divergence)
    return (given.student, given.teacher if need_kl else None, given.labels if need_ce else None), objective


def _statistics(given: Inputs) -> Tensor:  # [9, N]
    """Return memory for the statistics, NaN."""
    return _between_others(torch.full((stats.COUNT, ROWS), torch.nan)).to(given.student.device)


def formula(case: Case) -> dict[str, Tensor]:
    """Return the results in float64, by the CPU operators, of logits that are rounded to the case's dtypes."""
    given = inputs(case)
    (student, teacher, labels), objective = _of_case(case, given)
    student, teacher = student.double(), None if teacher is None else teacher.double()
    gradient = torch.empty_like(student)
    teacher_gradient = None if given.teacher_gradient is None else torch.empty_like(given.teacher.double())
    statistics = torch.zeros(stats.COUNT, ROWS, dtype=torch.float64)
    upstream = None if given.upstream is None else given.upstream.double()
    cpu.row_statistics(student, teacher, labels, given.weights, statistics, None, objective)
    cpu.logit_gradient(
        student, teacher, labels, statistics, given.weights, upstream, gradient, teacher_gradient, objective
    )
    # The maximum of no columns is the lowest finite number, of another dtype here.
    return _named(statistics.clamp_min(torch.finfo(torch.float32).min), gradient, teacher_gradient)


def _named(statistics: Tensor, gradient: Tensor, teacher_gradient: Tensor | None) -> dict[str, Tensor]:
    results = {"statistics": statistics, "gradient": gradient.flatten(0, 1)}
    return results if teacher_gradient is None else {**results, "teacher gradient": teacher_gradient.flatten(0, 1)}


def interpret(folder: Path, case: Case) -> None:
    """Run a case in a worker under the interpreter, and keep what `simulate` compares with."""
    prepare_process()
    given = inputs(case)
    poison(given, lambda memory: memory.view(torch.uint8).fill_(POISON))
    torch.save({"interpreter": run(case, given), "float64": formula(case)}, _file(folder, case))


def simulate(folder: Path, item: tuple[Case, str]) -> Outcome:
    """Run a case on a chip, in a worker that compiles."""
    prepare_process()
    case, chip = item
    file = _file(folder, case)
    expected = torch.load(file) if file.exists() else {}
    given = inputs(case)
    with importlib.import_module(MODULE).device(chip, check_races=True, check_init=True, cache_model=False) as device:
        poison(given, device.poison)
        before = [_bytes(view).clone() for view in given.views]
        clusters = chip not in WITHOUT_CLUSTERS and compiles_clusters()
        try:
            results = run(case, given, clusters)
            other_bits = [] if case.form == "two launches" else list(_other_bits(case, results, clusters))
        except Exception as error:
            return Outcome((), (f"{type(error).__name__}: {error}",))
    found = _outcome(case, given, before, results, expected)
    return replace(found, findings=(*found.findings, *other_bits))


def _other_bits(case: Case, results: dict[str, Tensor], clusters: bool) -> Iterator[str]:
    """Compare a single pass with two launches.

    Given the statistics, the gradient has the same bits.  Where the columns of a thread are summed in the same order, the
    statistics have them too.
    """
    from fused_kd.backends import triton as kernels

    given = inputs(case)  # the logits may have been overwritten
    given_to, objective = _of_case(case, given)
    read = [tensor.element_size() for tensor in given_to[:2] if tensor is not None]
    one = single_pass(case, max(read), clusters)
    two = Launch(one.lanes, one.columns, one.num_warps, 1, case.vocabulary)
    kernels.logit_gradient(
        *given_to, results["statistics"], given.weights, None, given.gradient, None, objective, two
    )  # fmt: skip
    if not torch.equal(results["gradient"], given.gradient.flatten(0, 1)):
        yield "the gradient has other bits than that of two launches from the same statistics"
    given = inputs(case)
    given_to, _ = _of_case(case, given)
    alone = one.splits == 0 and one.ctas == 1  # nothing but threads is merged
    if alone and not is_wide(*(tensor for tensor in given_to[:2] if tensor is not None)):
        statistics = _statistics(given)
        kernels.row_statistics(*given_to, given.weights, statistics, None, objective, False, two)
        if not torch.equal(results["statistics"], statistics):
            yield "the statistics have other bits than those of two launches"


def on_device(case: Case, device: torch.device) -> tuple[Outcome, dict[str, Tensor]]:
    """A case on a GPU, or interpreted on a CPU, beside the formula in float64; and its results."""
    given = _moved(_marked(inputs(case)), device)
    before = [_bytes(view).cpu() for view in given.views]
    planned = device_of(device)
    results = run(case, given, clusters=planned is not None and planned.clusters)
    results = {name: result.cpu() for name, result in results.items()}
    return _outcome(case, given, before, results, {"float64": formula(case)}), results


def _marked(given: Inputs) -> Inputs:
    """Inputs of which all is poison but the logits that count."""
    for view in (given.student, given.teacher):
        memory, places = memory_of(view), ~outside(view, ~given.ignored)
        logits = memory[places]
        memory.view(torch.uint8).fill_(POISON)
        memory[places] = logits
    return given


def _moved(given: Inputs, device: torch.device) -> Inputs:
    """The same views of copies of the same memory; what shares memory still does."""
    tensors = {name: tensor for name, tensor in vars(given).items() if tensor is not None}
    copies = {id(tensor): memory_of(tensor).to(device) for tensor in tensors.values()}
    moved = {
        name: copies[id(tensor)].as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
        for name, tensor in tensors.items()
    }
    for name, other in (("gradient", "student"), ("teacher_gradient", "teacher")):
        if tensors.get(name) is tensors[other]:
            moved[name] = moved[other]
    return replace(given, **moved)


def _outcome(
    case: Case,
    given: Inputs,  # after the launch
    before: Sequence[Tensor],  # the bytes of its views
    results: dict[str, Tensor],
    expected: dict[str, dict[str, Tensor]],
) -> Outcome:
    findings = []
    for view, bytes_before in zip(given.views, before, strict=True):
        may_change = torch.tensor([any(view is written for written in given.written)]).expand(ROWS)
        untouched = outside(view, may_change)
        if not torch.equal(_bytes(view).cpu()[untouched], bytes_before[untouched]):
            findings.append(f"bytes of {tuple(view.shape)} {view.dtype} changed that are in no row to write")
    found = tuple(differences(case, results, expected))
    return Outcome(found, (*findings, *(str(difference) for difference in found if not difference.within_bounds)))


def prepare_process() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # of numpy in the interpreter: NaN in poisoned rows, infinities


def _file(folder: Path, case: Case) -> Path:
    return folder / f"{zlib.crc32(case.name.encode()):08x}.pt"


def _bytes(view: Tensor) -> Tensor:
    memory = memory_of(view)
    return memory.view(torch.uint8).view(-1, memory.element_size())


def differences(case: Case, results: dict[str, Tensor], expected: dict[str, dict[str, Tensor]]) -> Iterator[Difference]:
    for against, others in expected.items():
        is_capped = against == "float64" and "softcap" in (case.student_map, case.teacher_map)
        for name, other in others.items():
            bound = BOUND_OF_SOFTCAP if is_capped and name != "statistics" else BOUND[against]
            result = results[name]
            if name != "statistics":
                yield Difference(
                    name, against, _of_gradient(result, other), bound, _misrounded(result, other), result.numel()
                )
                continue
            yield Difference(name, against, _of_statistics(result, other, case), bound, misrounded=0.0)


def _of_statistics(result: Tensor, other: Tensor, case: Case) -> float:
    """Return the largest of any number.

    Sums of differences are relative to about T e, or T d_T for reverse KL, and e - d_T to both.  Sums of a second sweep are
    relative to 1.
    """
    result, other = result.double(), other.double()
    size = other.abs()
    difference = case.temperature / stats.UNIT
    if of(case.divergence).sweeps == 2:
        size[[stats.C, stats.SECOND]] += 1.0
    elif case.divergence == "reverse_kl":
        size[stats.C] += other[stats.D_T] * difference
        size[stats.SECOND] += other[stats.D_T] + other[stats.E]
    else:
        size[stats.C] += other[stats.E] * difference
        size[stats.SECOND] += other[stats.D_T] * difference
    error = (result - other).abs()
    return float(torch.where(error == 0, 0.0, error / size).max() / EPSILON)


def _of_gradient(result: Tensor, other: Tensor) -> float:
    """The largest of any row, norm-relative; of 16-bit elements, what is beyond one unit in the last place."""
    error = (result.double() - other.double()).abs()
    if result.element_size() == 2:
        error = (error - unit_in_last_place(other.double(), result.dtype)).clamp_min(0)
    error, size = error.norm(dim=1), other.double().norm(dim=1)
    return float(torch.where(error == 0, 0.0, error / size).max() / EPSILON)


def _misrounded(result: Tensor, other: Tensor) -> float:
    return float((result != other.to(result.dtype)).double().mean()) if result.element_size() == 2 else 0.0
