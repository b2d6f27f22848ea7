"""The products of heads: float32 results of 16-bit operands, rounded once."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fused_kd import linear_kd_loss, reference
from fused_kd.heads import products as matmul
from fused_kd.heads.products import accumulate, project
from fused_kd.heads.sweep import Head
from fused_kd.testing.blocks import blocks_of

from .heads import H_S, N, V, make, run
from .oracle import relative_error
from .test_synchronisation import WithoutCuda

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def slabs():
    """Several of them for a weight."""
    with blocks_of(100 * H_S):
        yield


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("slabs")
def test_products_round_once(dtype, bias):
    """16-bit operands with a float32 result: the products are exact, their sums float32's."""
    given = make("cpu", dtype)
    hidden, weight = given.hidden.detach(), given.weight.detach()
    b = given.bias.detach() if bias else None
    out = torch.empty(N, V)
    project(hidden, weight, b, out)
    exact = torch.nn.functional.linear(hidden.double(), weight.double(), None if b is None else b.double())
    assert relative_error(out, exact) < 2e-7

    gradient = out.to(dtype)
    product = gradient.double().T @ hidden.double()
    total = torch.full((V, H_S), torch.nan)
    accumulate(total, gradient, hidden, first=True)
    assert relative_error(total, product) < 2e-7
    accumulate(total, gradient, hidden, first=False)
    assert relative_error(total, 2 * product) < 2e-7


def test_float32_logits_spare_peaked_logits_their_rounding():
    given = make("cpu", torch.bfloat16, shape=(64,), scale=4.0)
    oracle = run(reference.linear_kd_loss, given.to(torch.float64))
    rounded, exact = (run(linear_kd_loss, given, logits_dtype=dtype) for dtype in (torch.bfloat16, None))
    for name in ("hidden", "weight"):
        assert relative_error(exact[name], oracle[name]) < 0.5 * relative_error(rounded[name], oracle[name])


class ProductsOfAGPU(TorchDispatchMode):
    """Gives CPU tensors the float32 products that PyTorch has for CUDA tensors, which it takes in that release."""

    def __init__(self, release):
        super().__init__()
        self.release = release
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__ not in ("mm.dtype", "mm.dtype_out", "addmm.dtype_out"):
            return func(*args, **kwargs)
        self.seen[func.__name__] += 1
        *addend, a, b, dtype = args
        assert a.dtype == b.dtype == torch.bfloat16
        assert dtype == torch.float32
        result = kwargs.get("out", torch.empty(a.shape[0], b.shape[1]))
        product = a.double() @ b.double()
        if addend:
            assert self.release >= (2, 10)  # before, PyTorch asks for a 16-bit one
            assert addend[0] is result  # else cuBLASLt may be asked to add it
            product += addend[0].double() if kwargs.get("beta", 1) else 0.0
        return result.copy_(product)


@pytest.mark.parametrize("release", [(2, 8), (2, 10)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.usefixtures("slabs")
def test_products_on_a_gpu_give_float32_from_16_bit_operands(bias, release, monkeypatch):
    """Shown on a CPU: the operators, and what they are given, are those for CUDA tensors."""
    if release > matmul.RELEASE:
        pytest.skip(f"PyTorch {torch.__version__} lacks products of {release[0]}.{release[1]}")
    monkeypatch.setattr(matmul, "RELEASE", release)
    monkeypatch.setattr(matmul, "_has_float32_products", lambda operand: True)
    hidden, weight, vector = (torch.randn(*shape).bfloat16() for shape in ((N, H_S), (V, H_S), (V,)))
    exact = hidden.double() @ weight.double().T + (vector.double() if bias else 0.0)
    out, total = torch.full((N, 1280), torch.nan)[:, :V], torch.full((V, H_S), torch.nan)
    gradient = exact.bfloat16()
    with ProductsOfAGPU(release) as products:
        project(hidden, weight, vector if bias else None, out)
        accumulate(total, gradient, hidden, first=True)
        accumulate(total, gradient, hidden, first=False)
    assert relative_error(out, exact) < 1e-7
    assert relative_error(total, 2 * (gradient.double().T @ hidden.double())) < 1e-7
    if release >= (2, 10):
        assert products.seen == ({"addmm.dtype_out": 3} if bias else {"mm.dtype_out": 1, "addmm.dtype_out": 2})
    else:
        assert set(products.seen) == {"mm.dtype"}


def test_float32_products_are_asked_for_where_pytorch_does_not_refuse_them(monkeypatch):
    def asked(dtype=torch.float16, is_cuda=True):
        return matmul._has_float32_products(SimpleNamespace(dtype=dtype, is_cuda=is_cuda))

    monkeypatch.setattr(torch.version, "hip", None)
    assert asked()
    assert not asked(is_cuda=False)
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_fp16_accumulation=True))
    assert not asked()
    assert asked(torch.bfloat16)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not asked(torch.bfloat16)


def test_a_16_bit_bias_gets_logits_without_room_between_the_rows():
    """On a GPU PyTorch rounds the product and the bias once only there."""
    shapes = (2, 8), (4096, 8), (4096,)
    with FakeTensorMode(), WithoutCuda():
        hidden, weight, bias = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes)
        assert Head(hidden, weight, bias).logits_buffer(2, torch.bfloat16).is_contiguous()
        assert not Head(hidden, weight, None).logits_buffer(2, torch.bfloat16).is_contiguous()
