"""Products with a head's weight whose operands and result may differ in dtype.

A product of 16-bit operands with a float32 result is rounded once.  PyTorch has such products for CUDA tensors: `mm` with
`out_dtype` since 2.8, and `addmm` that adds to a float32 matrix since 2.10.  Elsewhere the operands are converted to
float32, a slab of the vocabulary at a time.  docs/versions.md has the tests of these releases.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SLAB_ELEMENTS = 2**21  # elements that are converted to float32 at once: 8 MB


RELEASE = tuple(int(part) for part in torch.__version__.split(".")[:2])


def _since(release: tuple[int, int], operand: Tensor) -> bool:
    """Return whether PyTorch is this release or newer, and has products of such operands with a float32 result."""
    return release <= RELEASE and _has_float32_products(operand)


def _has_float32_products(operand: Tensor) -> bool:
    """Return whether PyTorch multiplies tensors on this device with a float32 result: on CUDA, not on ROCm.

    PyTorch refuses it for float16 under `allow_fp16_accumulation`.
    """
    return operand.is_cuda and torch.version.hip is None and not _sums_in_float16(operand.dtype)


def _sums_in_float16(dtype: torch.dtype) -> bool:
    return dtype == torch.float16 and bool(torch.backends.cuda.matmul.allow_fp16_accumulation)


def has_float32_logits(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether logits of 16-bit products can be float32 by a single product.

    On a CPU, which converts operands anyway, they always can.
    """
    if device.type == "cpu" or dtype.itemsize > 2:
        return True
    return RELEASE >= (2, 10) and torch.version.hip is None and not _sums_in_float16(dtype)


def project(
    hidden: Tensor,  # [C, H]
    weight: Tensor,  # [V, H], in the dtype of hidden, as is the bias
    bias: Tensor | None,  # [V]; None if the logits are added
    out: Tensor,  # [C, V], written; in the dtype of hidden or float32
    *,
    add: bool = False,  # True: the logits are added to `out`
) -> None:
    """Compute out = hidden weight^T + bias."""
    if add:
        accumulate(out, hidden.T, weight.T, first=False)
    elif out.dtype == hidden.dtype:
        _ = torch.mm(hidden, weight.T, out=out) if bias is None else torch.addmm(bias, hidden, weight.T, out=out)
    elif _since((2, 10), hidden):
        if bias is None:
            torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
        else:  # the bias as a matrix: PyTorch's comments say that cuBLASLt adds a vector wrongly for these dtypes
            torch.addmm(out.copy_(bias), hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        for slab in _slabs(weight, hidden):
            out[:, slab] = _widened_mm(hidden, weight[slab].T)
            if bias is not None:
                out[:, slab] += bias[slab]


def accumulate(
    total: Tensor,  # [V, H], added to; in the dtype of the operands or float32
    gradient: Tensor,  # [C, V]
    hidden: Tensor,  # [C, H]
    *,
    first: bool,  # True: the total has no value yet, and is overwritten
) -> None:
    """Compute total += gradient^T hidden."""
    if total.dtype == gradient.dtype:
        torch.addmm(total, gradient.T, hidden, beta=0 if first else 1, out=total)
    elif _since((2, 10), gradient):
        torch.addmm(total, gradient.T, hidden, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    else:
        for slab in _slabs(total, hidden):
            product = _widened_mm(gradient[:, slab].T, hidden)
            total[slab] = product if first else product.add_(total[slab])


def _slabs(matrix: Tensor, hidden: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of a `[V, H]` matrix.

    Neither a slab, `[slab, H]`, nor its logits, `[C, slab]`, have more than SLAB_ELEMENTS elements.
    """
    size = max(1, SLAB_ELEMENTS // max(1, *hidden.shape))
    return (slice(first, first + size) for first in range(0, matrix.shape[0], size))


def _widened_mm(a: Tensor, b: Tensor) -> Tensor:
    """Return the product of 16-bit matrices in float32."""
    if _since((2, 8), a):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
