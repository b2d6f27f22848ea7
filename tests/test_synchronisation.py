"""No loss waits for the device: shown without a GPU by fake CUDA tensors, and with one by a CUDA graph.

Fake tensors have no values, so reading a value raises.  The operators run down to their kernels, which are stubs here.
"""

from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu.graphs import captured
from fused_kd import functional, kd_loss, linear, linear_kd_loss, sweep
from fused_kd.autograd import (
    KDLossFunction,
    SinglePassFunction,
)
from fused_kd.heads import head
from fused_kd.heads import sweep as sweep_of_heads
from fused_kd.launch import SinglePass
from fused_kd.launching import ONE, TWO
from fused_kd.testing import launching
from fused_kd.testing.launches import Float32Products, Launches, counted_kernels, opened_operators

N, V, H_S, H_T = 40, 137, 8, 12
CHUNKED = 16 * 2 * 192 * 4


class WithoutCuda(TorchFunctionMode):
    """`tensor[...]`, `~`, `copy_` and `out=`, for which PyTorch needs a build with CUDA, fake tensors or not."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if (out := kwargs.pop("out", None)) is not None:
            result = func(*args, **kwargs)
            assert (result.shape, result.dtype, result.device) == (out.shape, out.dtype, out.device)
            return out
        if func is torch.Tensor.__invert__:
            return torch.bitwise_not(*args)
        if func is torch.Tensor.__getitem__:
            return self.view(*args)
        if func is torch.Tensor.__setitem__ and not isinstance(args[2], torch.Tensor):
            return self.view(*args[:2]).fill_(args[2])
        if func in (torch.Tensor.__setitem__, torch.Tensor.copy_):  # there are no values to be copied
            target = self.view(*args[:2]) if func is torch.Tensor.__setitem__ else args[0]
            assert target.device == args[-1].device
            assert target.shape == torch.broadcast_shapes(target.shape, args[-1].shape)
            return target
        return func(*args, **kwargs)

    @staticmethod
    def view(tensor, index):
        index = index if isinstance(index, tuple) else (index,)
        dim = 0
        for i, item in enumerate(index):
            if item is None:
                tensor = tensor.unsqueeze(dim)
            elif item is Ellipsis:
                dim = tensor.dim() - sum(other is not None for other in index[i + 1 :]) - 1
            elif isinstance(item, slice):
                tensor = torch.ops.aten.slice(tensor, dim, item.start, item.stop, item.step or 1)
            else:
                tensor, dim = tensor.select(dim, item), dim - 1
            dim += 1
        return tensor


class CopiesBetweenDevices(TorchDispatchMode):
    """Names of the operators that move data to or from the device, and of all others."""

    def __init__(self):
        super().__init__()
        self.found, self.seen = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
        if len({tensor.device for tensor in tensors if tensor.dim()}) > 1 or "lift" in str(func):
            self.found.append(str(func))
        self.seen.add(func.overloadpacket.__name__)
        return result


@pytest.fixture
def kernels():
    """The launches of kernels: `kernels.kernels` keeps the counts."""
    return Launches()


@pytest.fixture
def fake_device(monkeypatch, kernels):
    """Kernels that are counted, and operators that fake tensors do not keep outside."""
    for module in (sweep, sweep_of_heads, head):
        monkeypatch.setattr(module, "device_of", lambda tensor: nullcontext())
    on_a_gpu = launching(device="H100"), opened_operators(), counted_kernels(kernels)
    with ExitStack() as contexts:
        for context in (*on_a_gpu, FakeTensorMode(), Float32Products(), WithoutCuda()):
            contexts.enter_context(context)
        yield torch.device("cuda", 0)


def inputs(device, dtype):
    given = {"dtype": dtype, "device": device}
    return SimpleNamespace(
        logits=torch.randn(N, V, **given), teacher_logits=torch.randn(N, V, **given),
        heads=[torch.randn(*shape, **given) for shape in ((N, H_S), (V, H_S), (N, H_T), (V, H_T))],
        bias=torch.randn(V, **given), labels=torch.randint(V, (N,), device=device),
        row=torch.rand(N, device=device), count=torch.ones((), device=device),
    )  # fmt: skip


class Context(SimpleNamespace):
    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def set_materialize_grads(self, value):
        pass


def apply_by_hand(function, teacher_grad, found):
    """Forward and backward, one after the other: recording a graph needs a build with CUDA, fake tensors or not."""

    def apply(*inputs):
        if len(inputs) == 13:  # a linear function, whose inputs require no gradient as long as none is recorded
            *others, options, outside = inputs
            needed = (True,) * 3 + (False,) * 2 + (teacher_grad,) * 2 + (False,)
            if inputs[10] is not None:  # the upstream gradient of weight_grad_out
                out = torch.zeros(inputs[1].shape, dtype=torch.float32, device=inputs[1].device)
                outside = outside._replace(weight_grad_out=out)
            inputs = *others, options._replace(needed=needed), outside
        output = function.forward(*inputs)
        is_tensor = [isinstance(value, torch.Tensor) for value in inputs]
        is_tensor[1] &= teacher_grad or function not in (KDLossFunction, SinglePassFunction)
        context = Context(needs_input_grad=is_tensor)
        function.setup_context(context, inputs, output)
        found.append(function.backward(context, torch.ones_like(output[0]), *[None] * (len(output) - 1)))
        return output

    return apply


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("teacher_grad", "in_one_launch"), [(False, False), (False, True), (True, False)])
@torch.no_grad()
def test_nothing_reads_a_value_or_moves_between_devices(
    fake_device, kernels, dtype, reduction, teacher_grad, in_one_launch, monkeypatch
):
    gradients = []
    along = in_one_launch and reduction != "none"
    launch = (
        SinglePass(1, 4, 32, 8, 0, V, 1) if along else None
    )  # fake tensors that are not recorded require no gradient
    monkeypatch.setattr(functional, "_single_pass", lambda *arguments: launch)
    for module in (functional, linear):
        monkeypatch.setattr(
            module, "apply", lambda function, *inputs: apply_by_hand(function, teacher_grad, gradients)(*inputs)
        )
    given = inputs(fake_device, dtype)
    options = {
        "token_weights": given.row, "alpha": given.row, "reduction": reduction, "return_parts": True,
        "num_items": given.count if reduction == "mean" else None, "temperature": 3.0, "teacher_grad": teacher_grad,
    }  # fmt: skip
    with launching(ONE if in_one_launch else TWO), CopiesBetweenDevices() as copies:
        for inplace in (False, True):
            kd_loss(given.logits, given.teacher_logits, given.labels, inplace_backward=inplace, **options)
        options |= {"student_bias": given.bias, "workspace_bytes": CHUNKED}
        for own in ({}, {"compact": False}, {"counted_rows": N // 2}, {"counted_rows": N, "compact": True}):
            linear_kd_loss(*given.heads, given.labels, **own, **options)
        if reduction == "mean":
            options["weight_grad_scale"] = given.count
        out = torch.zeros(V, H_S, device=fake_device)
        linear_kd_loss(*given.heads, given.labels, weight_grad_out=out, **options)
    assert copies.found == []
    assert {"mm", "addmm"} <= copies.seen  # the heads
    launched = {"row_weights_kernel", "row_losses_kernel"}
    launched |= {"whole_kernel", "scale_kernel"} if along else {"row_statistics_kernel", "logit_gradient_kernel"}
    assert launched <= kernels.kernels.keys()
    assert "log" in copies.seen  # the gradients of the weights
    of_heads = [True] * 3 + [False] * 2 + [teacher_grad] * 2
    of_the_sum = [True, False, True, *of_heads[3:]]
    for found, wanted in zip(gradients, [[True, teacher_grad]] * 2 + [of_heads] * 4 + [of_the_sum], strict=True):
        assert [gradient is not None for gradient in found[: len(wanted)]] == wanted
        assert found[0].device == fake_device


class Nonzeros(TorchFunctionMode):
    """Counts the calls of `nonzero`, which waits for the device, and says that half of the rows are not zero."""

    count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.Tensor.nonzero:
            return func(*args, **(kwargs or {}))
        self.count += 1
        return torch.zeros(args[0].shape[0] // 2, 1, dtype=torch.int64, device=args[0].device)


LARGE = 8192, 32_000, 512, 512  # planned at some 2 ms on an H100
SMALL = 256, 32_000, 64, 64
TO_READ = [
    (SMALL, {"compact": True}, 1), (LARGE, {"compact": True}, 1), (SMALL, {}, 0), (LARGE, {}, 1),
    (LARGE, {"compact": False}, 0), (LARGE, {"counted_rows": 4096}, 0), (LARGE, {"counted_rows": 8192}, 0),
    (LARGE, {"counted_rows": 4096, "compact": True}, 0), (LARGE, {"labels": None, "alpha": 1.0}, 0),
]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("sizes", "options", "reads"), TO_READ)
def test_the_number_of_rows_that_count_is_the_only_value_that_is_read(fake_device, sizes, options, reads):
    """Once per step: where it is asked for, and by default where the step takes long enough."""
    rows, vocabulary, student, teacher = sizes
    shapes = (rows, student), (vocabulary, student), (rows, teacher), (vocabulary, teacher)
    heads = [torch.randn(shape, dtype=torch.bfloat16, device=fake_device) for shape in shapes]
    labels = torch.randint(vocabulary, (rows,), device=fake_device)
    with Nonzeros() as nonzeros, CopiesBetweenDevices() as copies:
        linear_kd_loss(*heads, **{"labels": labels, **options})
    assert nonzeros.count == reads
    assert copies.found == []


@torch.no_grad()
@pytest.mark.parametrize("mistake", ["read", "copy to the host", "constant from the host"])
def test_a_mistake_would_be_seen(fake_device, mistake, monkeypatch):
    given = inputs(fake_device, torch.float32)
    wrong = {
        "read": lambda statistics: statistics[0] * statistics.sum().item(),
        "copy to the host": lambda statistics: statistics[0].cpu().to(statistics.device),
        "constant from the host": lambda statistics: statistics[0] * torch.ones(N).to(statistics.device),
    }[mistake]
    row_losses = sweep.row_losses

    def mistaken(*arguments):
        losses = row_losses(*arguments)
        return losses._replace(loss=losses.loss * wrong(losses.statistics))

    monkeypatch.setattr(sweep, "row_losses", mistaken)
    with CopiesBetweenDevices() as copies:
        if mistake == "read":
            with pytest.raises(Exception, match="_local_scalar_dense"):
                kd_loss(given.logits, given.teacher_logits.detach(), given.labels)
        else:
            kd_loss(given.logits, given.teacher_logits.detach(), given.labels)
            assert copies.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("from_logits", [True, False])
def test_a_cuda_graph_replays_on_new_data(from_logits):
    """Capture raises at the first synchronisation; the replay has to follow what changes: labels, ignored rows, values."""
    generator = torch.Generator("cuda").manual_seed(0)

    def fresh(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    shapes = [(512, 32_000)] * 2 if from_logits else [(512, 256), (32_000, 256), (512, 384), (32_000, 384)]
    static = [fresh(*shape).requires_grad_(i < len(shapes) // 2) for i, shape in enumerate(shapes)]
    labels = torch.randint(32_000, (512,), device="cuda", generator=generator)
    function = kd_loss if from_logits else linear_kd_loss
    leaves = static[: len(shapes) // 2]

    def step():
        loss = function(*static, labels, temperature=2.0)
        return [loss, *torch.autograd.grad(loss, leaves)]

    graph, written = captured(step)
    with torch.no_grad():
        for tensor in static:
            tensor.copy_(fresh(*tensor.shape))
        labels.copy_(labels.flip(0))
        labels[:100] = -100
    graph.replay()
    torch.cuda.synchronize()
    for ours, expected in zip(written, step(), strict=True):
        assert torch.equal(ours, expected)
