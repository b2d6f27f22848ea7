"""Peers and their formulas, the shapes and buffers of a step, its memory and launches."""

from types import SimpleNamespace

import pytest
import torch

from fused_kd.testing import agreement, peers, problems, shapes, steps

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
LOGITS = shapes.Shape("models", "small", "logits", 16, 301, 24, 40, torch.float32)
HIDDEN = LOGITS._replace(inputs="hidden")
PLAIN = [peer for peer in peers.PEERS if peer.package is None and peer.name != "torch.compile"]
OTHERS = [peer for peer in peers.PEERS if peer.package is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peer", PLAIN, ids=lambda peer: f"{peer.name}-{peer.inputs}-{peer.divergence}")
def test_the_loss_agrees_with_its_formula(peer, dtype):
    shape = LOGITS._replace(inputs=peer.inputs, dtype=dtype)
    assert agreement.check(peer, peer.build(), shape, CPU, 2.0).agrees


@pytest.mark.parametrize("peer", OTHERS, ids=lambda peer: f"{peer.name}-{peer.inputs}-{peer.divergence}")
def test_a_package_computes_what_is_said_of_it(peer):
    """Check a peer that is installed (extra "bench") and runs here; skip the others."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (reason := peer.missing(device)) is not None:
        pytest.skip(reason)
    found = agreement.check(peer, peer.build(), LOGITS._replace(inputs=peer.inputs), device, 2.0)
    assert found.agrees, found


@pytest.mark.parametrize(
    "wrong",
    [
        lambda i, T: peers.eager_loss(i, T) - problems.ALPHA * 1e-3,  # the value
        lambda i, T: peers.eager_loss(i, T) + 1e-3 * (i.student[0] - i.student[0].detach()).sum(),  # the gradient
        lambda i, T: peers.eager_loss(i, 1.0),  # T is forgotten
        lambda i, T: peers.eager_loss(i, T).detach() + (0.0 * i.student[0]).sum(),  # no gradient
    ],
)
def test_a_wrong_peer_is_seen(wrong):
    peer = next(peer for peer in PLAIN if peer.name == "eager PyTorch")
    assert not agreement.check(peer, wrong, LOGITS, CPU, 2.0).agrees


@pytest.mark.parametrize("part", problems.PARTS)
def test_parts_from_hidden_states_are_those_of_their_logits(part):
    inputs = problems.make(HIDDEN, CPU)
    value, (hidden_gradient, weight_gradient) = problems.exact(part, inputs, 2.0)
    logits = [problems.logits_of(tuple(t.detach().double() for t in s)) for s in (inputs.student, inputs.teacher)]
    same, (gradient,) = problems.exact(part, problems.Inputs((logits[0],), (logits[1],), inputs.labels), 2.0)
    torch.testing.assert_close(value, same)
    torch.testing.assert_close(hidden_gradient, gradient @ inputs.student[1].double())
    torch.testing.assert_close(weight_gradient, gradient.T @ inputs.student[0].double())


def test_the_kl_part_is_the_divergence_at_t():
    inputs = problems.make(LOGITS, CPU)
    p, q = (torch.softmax(stream[0].detach().double() / 2.0, -1) for stream in (inputs.student, inputs.teacher))
    value, _ = problems.exact("KL", inputs, 2.0)
    torch.testing.assert_close(value, (q * (q.log() - p.log())).sum(-1).mean())


@pytest.mark.parametrize("divergence", problems.WORDS)
def test_the_parts_of_a_divergence(divergence):
    """Each part is the sum of its terms, each divergence has peers of its own, and none is another's."""
    inputs, word = problems.make(LOGITS, CPU), problems.WORDS[divergence]
    (value, _), (ce, _), (alone, _) = (problems.exact(part, inputs, 2.0) for part in (f"CE + {word}", "CE", word))
    torch.testing.assert_close(value, (1 - problems.ALPHA) * ce + problems.ALPHA * 4 * alone)
    assert {peer.name for peer in peers.of(LOGITS, divergence)} >= {peers.OURS, "eager PyTorch", "torch.compile"}
    assert all(word in peer.part for peer in peers.of(HIDDEN, divergence) if peer.divergence != "forward_kl")


def test_the_soft_part_has_another_value_and_the_gradient_of_the_loss():
    inputs = problems.make(LOGITS, CPU)
    (value, (gradient,)), (soft, (of_soft,)) = (
        problems.exact(part, inputs, 1.0) for part in ("CE + KL", "CE + soft CE")
    )
    torch.testing.assert_close(of_soft, gradient)
    assert soft > value + 0.1


def test_a_peer_that_overwrites_its_inputs_gets_its_own():
    buffers = [problems.make(LOGITS, CPU)]
    for overwrites in (False, True):
        peer = peers.Peer("another", "logits", lambda: peers.eager_loss, overwrites=overwrites)
        step, agreed = agreement.prepared(peer, LOGITS, buffers, CPU)
        assert agreed.agrees
        assert (step.buffers[0].student[0] is buffers[0].student[0]) != overwrites
        assert torch.equal(step.buffers[0].student[0], buffers[0].student[0])


def test_launches_are_the_profilers_events_on_the_gpu(monkeypatch):
    kernel, host = (SimpleNamespace(device_type=SimpleNamespace(name=name)) for name in ("CUDA", "CPU"))

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            return [host, kernel, kernel, host, kernel]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    step = steps.Step(peers.eager_loss, [problems.make(LOGITS, CPU)], 2.0)
    assert steps.launches(step, torch.device("cuda")) == 3
    assert steps.launches(step, CPU) is None


def test_buffers_rotate_past_the_l2_cache(monkeypatch):
    inputs = problems.make(LOGITS, CPU)
    cache = 10 * inputs.nbytes
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=cache))
    assert steps.rotation(inputs, CPU) == [inputs]
    buffers = steps.rotation(inputs, torch.device("cuda"))
    assert sum(buffer.nbytes for buffer in buffers[:-1]) >= steps.COLD * cache
    assert torch.equal(buffers[1].student[0], inputs.student[0])
    assert buffers[1].student[0] is not inputs.student[0]
    step = steps.Step(peers.eager_loss, buffers, 2.0)
    assert {id(step.next()) for _ in buffers} == {id(buffer) for buffer in buffers}


class HoldsThree(torch.autograd.Function):
    """Three arrays of the input's size from forward to backward, which makes a gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(*(torch.zeros_like(x) for _ in range(3)))
        return x.new_zeros(())

    @staticmethod
    def backward(ctx, upstream):
        return torch.ones_like(ctx.saved_tensors[0])


def test_memory_is_what_a_step_holds_beyond_inputs_and_gradients():
    step = steps.Step(lambda i, T: HoldsThree.apply(i.student[0]), [problems.make(LOGITS, CPU)], 2.0)
    size = LOGITS.logits * 4
    assert 3 * size <= steps.peak_beyond(step, CPU) <= 3 * size + 1000
    assert step.buffers[0].student[0].grad is None


def test_shapes_fit_the_device(monkeypatch):
    for memory in (24e9, 80e9):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d, m=memory: SimpleNamespace(total_memory=m))
        for shape in shapes.model_shapes(torch.device("cuda"), torch.bfloat16):
            assert 16 <= shape.rows <= shapes.GPU_ROWS
            assert shape.logits * shapes.GPU_BYTES_PER_LOGIT <= memory
    on_cpu = shapes.model_shapes(CPU, torch.float32)
    assert {shape.vocab_size for shape in on_cpu} == {pair.vocab_size for pair in shapes.PAIRS.values()}
    assert all(shape.flops <= shapes.CPU_FLOPS for shape in on_cpu if shape.inputs == "hidden")
