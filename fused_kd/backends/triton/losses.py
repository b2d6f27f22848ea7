"""The loss and its parts from the merged statistics and the weights of the rows, in one launch.

Per row, with the label's logit z_y, in float64:

    CE          = log d_1 - (z_y - m_s)
    forward KL  = log(d_T / e) + (c / e) UNIT / T
    reverse KL  = log(e / d_T) + (c / d_T) UNIT / T, where near 1 the logarithm is log1p(second / d_T)
    mixed KL    = (1 - r) forward KL + r reverse KL, whose c is `second`
    others      = second
    H           = log d_T - h / (T d_T)
    loss        = w_ce CE + w_d D

The parts are w CE, w D and w H, where w is the row's weight.  A term whose weight is negligible is 0, even if its value is
infinite or NaN.

Each program sums its rows and stores the partial sums, and the program that finishes last adds them up in their order.  So
a result has the same bits in every run.  `single_pass.py` says why the last program sees the sums of the others.

Traffic: 20 to 60 bytes per row, which is nothing beside the row itself.  The logarithms are libdevice's.
"""

import torch
import triton
import triton.language as tl

from ... import statistics as stats
from ...divergences import Objective
from .arguments import objective_arguments
from .doubles import bits_of, double_of, log1p
from .tiles import FORWARD_KL, NOTHING, OF_CE, OF_DIVERGENCE, OF_RATIO, OF_ROW, REVERSE_KL

ROWS, NUM_WARPS = 128, 4  # per program; a row per thread
M_S, D_1, D_T, M_T, E, C, LABEL, SECOND, H = (tl.constexpr(index) for index in range(stats.COUNT))
UNIT = tl.constexpr(float(stats.UNIT))


@triton.jit
def weighted(weight, value):
    """Return weight * value; 0 where the weight is negligible, even if the value is infinite or NaN."""
    return tl.where(tl.abs(weight) < NOTHING, 0.0, weight * value)


@triton.jit
def load_number(statistics, NUMBER: tl.constexpr, stride, inside, other):
    """Return a number of each row, float64."""
    return tl.load(statistics + NUMBER * stride, mask=inside, other=other).to(tl.float64)


@triton.jit
def divergence_of(statistics, stride, inside, scale, parameter, DIVERGENCE: tl.constexpr):
    """Return the divergence of each row; `scale` is UNIT / T."""
    if DIVERGENCE == OF_RATIO:
        value = load_number(statistics, SECOND, stride, inside, 0.0)
    else:
        d_T = load_number(statistics, D_T, stride, inside, 1.0)
        e = load_number(statistics, E, stride, inside, 1.0)
        c = load_number(statistics, C, stride, inside, 0.0)
        if DIVERGENCE == FORWARD_KL:
            value = tl.log(d_T / e) + scale * c / e
        else:
            second = load_number(statistics, SECOND, stride, inside, 0.0)
            if DIVERGENCE == REVERSE_KL:
                log_ratio = tl.where(tl.abs(second) < 0.5 * d_T, log1p(second / d_T), tl.log(e / d_T))
                value = log_ratio + scale * c / d_T
            else:
                forward = tl.log(d_T / e) + scale * c / e
                reverse = tl.log(e / d_T) + scale * second / d_T
                value = (1.0 - parameter) * forward + parameter * reverse
    return value


@triton.jit
def store_result(result_ptr, sums_ptr, row, values, N, programs, REDUCE: tl.constexpr):
    """Store the values of the program's rows, or their sum."""
    if REDUCE:
        tl.store(sums_ptr, tl.sum(values))
    else:
        tl.store(result_ptr + row, values.to(result_ptr.dtype.element_ty), mask=row < N)


@triton.jit
def add_up(result_ptr, sums_ptr, programs, BLOCK: tl.constexpr):
    """Store the sum of the programs' sums."""
    block = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, programs, BLOCK):
        total += tl.load(sums_ptr + start + block, mask=start + block < programs, other=0.0, cache_modifier=".cg")
    tl.store(result_ptr, tl.sum(total).to(result_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["statistics_stride", "weights_stride", "N", "scale_bits", "parameter_bits"])
def row_losses_kernel(
    statistics_ptr,  # [9, N]; neighbouring rows of the loss lie side by side
    weights_ptr,  # [3, N], float64; the same
    loss_ptr, ce_ptr, divergence_ptr, entropy_ptr,  # scalars if REDUCE, otherwise [N]; the parts are written if PARTS
    sums_ptr,  # [4, programs], float64, if REDUCE
    counter_ptr,  # 0, if REDUCE
    statistics_stride, weights_stride,  # from one number of a row to the next
    N,
    scale_bits: tl.int64,  # UNIT / T
    parameter_bits: tl.int64,  # of the divergence
    HAS_CE: tl.constexpr, HAS_DIVERGENCE: tl.constexpr, PARTS: tl.constexpr, REDUCE: tl.constexpr,
    DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    row = program * BLOCK + tl.arange(0, BLOCK)
    inside = row < N
    statistics = statistics_ptr + row
    weights = weights_ptr + row
    of_number = statistics_stride.to(tl.int64)
    of_weight = weights_stride.to(tl.int64)
    weight = tl.zeros([BLOCK], tl.float64)
    if PARTS:
        weight = tl.load(weights + OF_ROW * of_weight, mask=inside, other=0.0)
    loss = tl.zeros([BLOCK], tl.float64)
    sums = sums_ptr + program
    if HAS_CE:
        m_s = load_number(statistics, M_S, of_number, inside, 0.0)
        d_1 = load_number(statistics, D_1, of_number, inside, 1.0)
        label_logit = load_number(statistics, LABEL, of_number, inside, 0.0)
        w_ce = tl.load(weights + OF_CE * of_weight, mask=inside, other=0.0)
        ce = tl.log(d_1) - (label_logit - m_s)
        loss += weighted(w_ce, ce)
        if PARTS:
            store_result(ce_ptr, sums + programs, row, weighted(weight, ce), N, programs, REDUCE)
    if HAS_DIVERGENCE:
        w_d = tl.load(weights + OF_DIVERGENCE * of_weight, mask=inside, other=0.0)
        divergence = divergence_of(
            statistics, of_number, inside, double_of(scale_bits), double_of(parameter_bits), DIVERGENCE
        )
        loss += weighted(w_d, divergence)
        if PARTS:
            store_result(divergence_ptr, sums + 2 * programs, row, weighted(weight, divergence), N, programs, REDUCE)
    if PARTS:
        d_T = load_number(statistics, D_T, of_number, inside, 1.0)
        h = load_number(statistics, H, of_number, inside, 0.0)
        entropy = tl.log(d_T) - double_of(scale_bits) * (1 / UNIT) * h / d_T
        store_result(entropy_ptr, sums + 3 * programs, row, weighted(weight, entropy), N, programs, REDUCE)
    store_result(loss_ptr, sums, row, loss, N, programs, REDUCE)
    if REDUCE:
        tl.debug_barrier()  # one thread stores, and another may release
        if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == programs - 1:
            tl.debug_barrier()  # one thread acquires, and all threads load
            add_up(loss_ptr, sums_ptr, programs, BLOCK)
            if PARTS and HAS_CE:
                add_up(ce_ptr, sums_ptr + programs, programs, BLOCK)
            if PARTS and HAS_DIVERGENCE:
                add_up(divergence_ptr, sums_ptr + 2 * programs, programs, BLOCK)
            if PARTS:
                add_up(entropy_ptr, sums_ptr + 3 * programs, programs, BLOCK)


def row_losses(
    statistics: torch.Tensor,  # [9, N], float32; unit column stride
    weights: torch.Tensor,  # [3, N], float64; unit column stride
    counter: torch.Tensor | None,  # int32; the first element is 0, and is changed; None only if nothing is reduced
    has_ce: bool,
    has_divergence: bool,
    reduce: bool,
    parts: bool,
    dtype: torch.dtype,
    objective: Objective,
) -> tuple[torch.Tensor, ...]:  # four scalars if reduced, otherwise [N]; a missing part is [0]
    """Return the loss, its weighted CE, its weighted divergence and the weighted entropy of the student."""
    N = statistics.shape[1]
    programs = max(1, triton.cdiv(N, ROWS))
    shape = () if reduce else (N,)
    wanted = (True, parts and has_ce, parts and has_divergence, parts)
    results = tuple(statistics.new_empty(shape if wants else (0,), dtype=dtype) for wants in wanted)
    sums = weights.new_empty(4, programs) if reduce else weights
    arguments = objective_arguments(objective)
    row_losses_kernel[(programs,)](
        statistics, weights, *results, sums, weights if counter is None else counter,
        statistics.stride(0), weights.stride(0), N,
        bits_of(stats.UNIT / objective.temperature), bits_of(arguments.parameter),
        HAS_CE=has_ce, HAS_DIVERGENCE=has_divergence, PARTS=parts, REDUCE=reduce,
        DIVERGENCE=arguments.divergence, BLOCK=ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return results
