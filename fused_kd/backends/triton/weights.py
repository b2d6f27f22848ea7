"""The weights of the rows, in one launch: what `rows.row_weights` computes for constants, without its operators.

Let t be the token weight of a row, 0 if the row is ignored, and d the divisor: the sum of all t, num_items, or 1.  Then

    row = t / d        ce = row (1 - alpha)        divergence = row alpha T^2

A wrong label makes the weights of its row NaN.  A wrong alpha does so for the rows that it weighs, and a wrong num_items
for all rows.  A divisor of 0 is right only if no row counts; otherwise the rows that count are NaN.

With a shift, row i takes label, token weight and alpha of row i + 1, and the last row of each sequence is ignored.  The
kernel then also writes the labels of the rows.

If all t must be summed, each program sums them by itself, in the same order, and then writes the weights of its own rows.
So no program waits for another, and the bits do not depend on their number.  The labels and token weights of N = 8 192
rows are 64 to 128 KB: the reads of all but the first program hit L2.

Everything is float64.  Nothing is specialised on the value of an argument.
"""

import torch
import triton
import triton.language as tl

from ...rows import RowOptions
from .doubles import bits_of, double_of
from .tiles import OF_CE, OF_DIVERGENCE, OF_ROW

NUM_WARPS = 16
SUMMED, WRITTEN = 2048, 512  # rows per iteration; 4 and 1 per thread
MOST_PROGRAMS = 64
# The constexpr ALPHA: whether alpha is a number, a scalar on the device, or has one value per row.
NUMBER, SCALAR, PER_ROW = (tl.constexpr(kind) for kind in range(3))
# The constexpr DIVISOR.
NO_DIVISOR, GIVEN_NUMBER, GIVEN_SCALAR, SUM = (tl.constexpr(kind) for kind in range(4))


@triton.jit
def token_weights_of(
    labels_ptr, token_weights_ptr,
    row, N, sequence, ignore_index,
    HAS_LABELS: tl.constexpr, HAS_TOKEN_WEIGHTS: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """Return the token weights of the rows, 0 where they are ignored; labels; whether they are ignored; rows to read."""
    inside = row < N
    source = row
    if MOVED:
        inside &= row % sequence != sequence - 1
        source = row + 1
    label = tl.zeros(row.shape, tl.int64)
    ignored = row < 0
    if HAS_LABELS:
        label = tl.load(labels_ptr + source, mask=inside, other=0).to(tl.int64)
        label = tl.where(inside, label, ignore_index)
        ignored = label == ignore_index
    weight = tl.where(inside, 1.0, 0.0).to(tl.float64)
    if HAS_TOKEN_WEIGHTS:
        weight = tl.load(token_weights_ptr + source, mask=inside, other=0).to(tl.float64)
    return tl.where(ignored, 0.0, weight), label, ignored, inside


@triton.jit(
    do_not_specialize=[
        "N", "sequence", "vocabulary", "ignore_index", "alpha_bits", "num_items_bits", "squared_temperature_bits",
    ]
)  # fmt: skip
def row_weights_kernel(
    labels_ptr,  # [N]; read if HAS_LABELS
    token_weights_ptr,  # [N]; read if HAS_TOKEN_WEIGHTS
    alpha_ptr,  # a scalar, or [N]; read unless ALPHA is NUMBER
    num_items_ptr,  # a scalar; read if DIVISOR is GIVEN_SCALAR
    weights_ptr,  # [3, N], float64
    moved_ptr,  # [N], the labels of the rows; written if MOVED
    N, sequence, vocabulary, ignore_index: tl.int64,
    alpha_bits: tl.int64, num_items_bits: tl.int64, squared_temperature_bits: tl.int64,
    HAS_LABELS: tl.constexpr, HAS_TOKEN_WEIGHTS: tl.constexpr, MOVED: tl.constexpr, ALPHA: tl.constexpr,
    DIVISOR: tl.constexpr, SUMMED: tl.constexpr, WRITTEN: tl.constexpr,
):  # fmt: skip
    divisor = double_of(num_items_bits)
    if DIVISOR == GIVEN_SCALAR:
        divisor = tl.load(num_items_ptr).to(tl.float64)
    if DIVISOR == SUM:
        block = tl.max_contiguous(tl.arange(0, SUMMED), [1])
        sums = tl.zeros([SUMMED], tl.float64)
        for start in tl.range(0, N, SUMMED, loop_unroll_factor=4):
            sums += token_weights_of(
                labels_ptr, token_weights_ptr, start + block, N, sequence, ignore_index,
                HAS_LABELS, HAS_TOKEN_WEIGHTS, MOVED,
            )[0]  # fmt: skip
        divisor = tl.sum(sums)
    elif DIVISOR != NO_DIVISOR:
        divisor = tl.where((divisor >= 0) & (divisor < float("inf")), divisor, float("nan"))
    of_zeros = tl.where(divisor == 0, float("inf"), divisor)
    of_others = tl.where(divisor == 0, float("nan"), divisor)
    alpha = double_of(alpha_bits)
    if ALPHA == SCALAR:
        alpha = tl.load(alpha_ptr).to(tl.float64)
    block = tl.arange(0, WRITTEN)
    for start in range(tl.program_id(0) * WRITTEN, N, tl.num_programs(0) * WRITTEN):
        row = start + block
        weight, label, ignored, inside = token_weights_of(
            labels_ptr, token_weights_ptr, row, N, sequence, ignore_index, HAS_LABELS, HAS_TOKEN_WEIGHTS, MOVED
        )
        if DIVISOR != NO_DIVISOR:
            weight /= tl.where(weight == 0, of_zeros, of_others)
        if HAS_LABELS:
            weight = tl.where(ignored | ((label >= 0) & (label < vocabulary)), weight, float("nan"))
        of_rows = alpha
        if ALPHA == PER_ROW:
            source = row + 1 if MOVED else row
            of_rows = tl.load(alpha_ptr + source, mask=inside, other=0.0).to(tl.float64)
        of_rows = tl.where((of_rows >= 0) & (of_rows <= 1), of_rows, float("nan"))
        pointers = weights_ptr + row
        written = row < N
        stride = N.to(tl.int64)
        tl.store(pointers + OF_ROW * stride, weight, mask=written)
        tl.store(pointers + OF_CE * stride, weight * (1 - of_rows), mask=written)
        tl.store(
            pointers + OF_DIVERGENCE * stride, weight * (of_rows * double_of(squared_temperature_bits)), mask=written
        )
        if MOVED:
            tl.store(moved_ptr + row, label.to(moved_ptr.dtype.element_ty), mask=written)


def row_weights(
    labels: torch.Tensor | None,  # [N], int32 or int64, contiguous
    token_weights: torch.Tensor | None,  # [N], any real dtype
    alpha: torch.Tensor | None,  # a scalar, or [N]; None: the number in the options
    num_items: torch.Tensor | None,  # one element; None: the number in the options
    like: torch.Tensor,  # a tensor on the device of the results
    options: RowOptions,
) -> tuple[torch.Tensor, torch.Tensor]:  # [3, N], float64; with a shift the labels of the rows, [N], otherwise [0]
    """Return the weights of the rows, and the labels that a shift moves."""
    N, alpha_number, num_items_number = options.rows, options.alpha, options.num_items
    weights = torch.empty(3, N, dtype=torch.float64, device=like.device)
    moved = like.new_empty(0) if labels is None else labels.new_empty(N if options.sequence else 0)
    if N == 0:
        return weights, moved
    if alpha is not None and alpha.device != like.device:  # a scalar of the host
        alpha_number, alpha = float(alpha), None
    if num_items is not None and num_items.device != like.device:
        num_items_number, num_items = float(num_items), None
    given = (None if tensor is None else tensor.contiguous() for tensor in (labels, token_weights, alpha, num_items))
    divisor = NO_DIVISOR
    if options.mean:
        divisor = GIVEN_SCALAR if num_items is not None else SUM if num_items_number is None else GIVEN_NUMBER
    row_weights_kernel[(min(triton.cdiv(N, WRITTEN), MOST_PROGRAMS),)](
        *(weights if tensor is None else tensor for tensor in given),
        weights, moved, N, options.sequence, options.vocabulary, options.ignore_index,
        bits_of(alpha_number), bits_of(num_items_number or 0.0), bits_of(options.temperature**2),
        HAS_LABELS=labels is not None, HAS_TOKEN_WEIGHTS=token_weights is not None,
        MOVED=bool(options.sequence) and labels is not None,
        ALPHA=(NUMBER if alpha is None else PER_ROW if alpha.dim() else SCALAR).value, DIVISOR=divisor.value,
        SUMMED=SUMMED, WRITTEN=WRITTEN, num_warps=NUM_WARPS,
    )  # fmt: skip
    return weights, moved
