"""`fused-kd bench`: peers that are right, wrong or missing; the stopwatches; what is compared; the command as a whole."""

import dataclasses
import json
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from fused_kd.cli import main
from fused_kd.cli.benchmarking import (
    agreement,
    comparison,
    measure,
    peers,
    problems,
    shapes,
    suite,
    tables,
)

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
LOGITS = shapes.Shape("models", "small", "logits", 16, 301, 24, 40, torch.float32)
HIDDEN = LOGITS._replace(inputs="hidden")
PLAIN = [peer for peer in peers.PEERS if peer.package is None and peer.name != "torch.compile"]
OTHERS = [peer for peer in peers.PEERS if peer.package is not None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peer", PLAIN, ids=lambda peer: f"{peer.name}-{peer.inputs}")
def test_the_loss_agrees_with_its_formula(peer, dtype):
    shape = LOGITS._replace(inputs=peer.inputs, dtype=dtype)
    assert agreement.check(peer, peer.build(), shape, CPU, 2.0).agrees


@pytest.mark.parametrize("peer", OTHERS, ids=lambda peer: f"{peer.name}-{peer.inputs}")
def test_a_package_computes_what_is_said_of_it(peer):
    """Where it is installed (extra "bench") and runs."""
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


def test_the_soft_part_has_another_value_and_the_gradient_of_the_loss():
    inputs = problems.make(LOGITS, CPU)
    (value, (gradient,)), (soft, (of_soft,)) = (
        problems.exact(part, inputs, 1.0) for part in ("CE + KL", "CE + soft CE")
    )
    torch.testing.assert_close(of_soft, gradient)
    assert soft > value + 0.1


def test_what_cannot_run_says_why(monkeypatch):
    peer = peers.Peer("another", "logits", lambda: peers.eager_loss, package="no_such_package", distribution="no-such")
    assert peer.missing(CPU) == "no-such is not installed"
    assert dataclasses.replace(peer, package=None, needs_gpu=True).missing(CPU) == "its Triton kernels need a GPU"

    def broken():
        raise ImportError("cannot import name 'x'\nand more")

    monkeypatch.setattr(peers, "PEERS", (*PLAIN, peer, peers.Peer("broken", "logits", broken)))
    results = {result.peer: result for result in suite.measured(LOGITS, CPU, 0.01)}
    assert results["another"].reason == "no-such is not installed"
    assert results["broken"].reason == "ImportError: cannot import name 'x'"
    assert results["fused_kd"].agrees
    assert tables.skipped(results.values())["no-such is not installed"] == ["another"]


def test_a_peer_that_overwrites_its_inputs_gets_its_own():
    buffers = [problems.make(LOGITS, CPU)]
    for overwrites in (False, True):
        peer = peers.Peer("another", "logits", lambda: peers.eager_loss, overwrites=overwrites)
        step, agreed = suite.prepared(peer, LOGITS, buffers, CPU)
        assert agreed.agrees
        assert (step.buffers[0].student[0] is buffers[0].student[0]) != overwrites
        assert torch.equal(step.buffers[0].student[0], buffers[0].student[0])


def test_a_failure_of_our_own_loss_is_not_hidden(monkeypatch):
    def broken():
        raise ImportError("ours")

    monkeypatch.setattr(peers, "PEERS", (peers.Peer(peers.OURS, "logits", broken),))
    with pytest.raises(ImportError, match="ours"):
        suite.measured(LOGITS, CPU, 0.01)


def test_only_the_pass_is_timed(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    class Slow(measure.Step):
        def forward(self):
            clock.now += 3.0
            super().forward()

        def backward(self):
            clock.now += 5.0
            super().backward()

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock.now)
    step = Slow(peers.eager_loss, [problems.make(LOGITS, CPU)], 2.0)
    for which, seconds in (("forward", 3.0), ("backward", 5.0), ("both", 8.0)):
        spread = measure.times({"it": step}, which, CPU, 1.0)["it"]
        assert (spread.median, spread.low, spread.high) == (seconds,) * 3
        assert spread.rounds == measure.MIN_ROUNDS


def test_peers_take_turns():
    order = []

    class Noted(measure.Step):
        def forward(self):
            order.append(self.loss)
            self.value = torch.zeros((), requires_grad=True)

    inputs = problems.make(LOGITS, CPU)
    measure.times({name: Noted(name, [inputs], 2.0) for name in "ab"}, "forward", CPU, 0.001)
    assert "".join(order).startswith("ababab")


def test_on_a_gpu_events_are_recorded_around_a_run_and_waited_for_once_a_round(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, end):
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    stopwatch = measure._CudaStopwatch(torch.device("cuda"))
    for name in "ab":
        stopwatch.time(name, lambda: log.append("run"))
    stopwatch.wait()
    assert log == ["record", "run", "record"] * 2 + ["wait"]
    assert stopwatch.seconds("b") == [0.25]


@pytest.fixture
def nvml(monkeypatch):
    """NVML's counter of energy, 2 J a look, beside a GPU that is not there."""
    counter = iter(range(0, 10**6, 2000))  # millijoules
    module = SimpleNamespace(
        NVMLError=OSError, nvmlInit=lambda: None, nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(counter),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(measure.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return module


def test_energy_of_a_step_is_the_counters_over_the_steps_of_a_second(nvml):
    step = measure.Step(peers.eager_loss, [problems.make(LOGITS, CPU)], 2.0)
    assert measure.joules(step, torch.device("cuda"), seconds=0.25) == 2.0 / 4
    assert measure.joules(step, CPU, seconds=0.25) is None


def test_energy_is_left_out_where_the_gpu_does_not_count_it(nvml):
    def refuse(handle):
        raise nvml.NVMLError("not supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    step = measure.Step(peers.eager_loss, [problems.make(LOGITS, CPU)], 2.0)
    assert measure.joules(step, torch.device("cuda"), seconds=0.25) is None


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
    step = measure.Step(peers.eager_loss, [problems.make(LOGITS, CPU)], 2.0)
    assert measure.launches(step, torch.device("cuda")) == 3
    assert measure.launches(step, CPU) is None


def test_buffers_rotate_past_the_l2_cache(monkeypatch):
    inputs = problems.make(LOGITS, CPU)
    cache = 10 * inputs.nbytes
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=cache))
    assert measure.rotation(inputs, CPU) == [inputs]
    buffers = measure.rotation(inputs, torch.device("cuda"))
    assert sum(buffer.nbytes for buffer in buffers[:-1]) >= measure.COLD * cache
    assert torch.equal(buffers[1].student[0], inputs.student[0])
    assert buffers[1].student[0] is not inputs.student[0]
    step = measure.Step(peers.eager_loss, buffers, 2.0)
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
    step = measure.Step(lambda i, T: HoldsThree.apply(i.student[0]), [problems.make(LOGITS, CPU)], 2.0)
    size = LOGITS.logits * 4
    assert 3 * size <= measure.peak_beyond(step, CPU) <= 3 * size + 1000
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


def result(seconds, quartile, peak=1000, **other):
    spread = measure.Spread(seconds, seconds - quartile, seconds + quartile, 9)
    base = suite.Result.of(LOGITS, PLAIN[0], both=spread, peak_bytes=peak)
    return dataclasses.replace(base, **other)


@pytest.mark.parametrize(
    ("before", "after", "moved"),
    [
        (result(1.0, 0.01), result(1.04, 0.01), []),  # clear, but less than 5%
        (result(1.0, 0.2), result(1.2, 0.2), []),  # within the quartiles
        (result(1.0, 0.01), result(1.2, 0.01), ["both, ms"]),
        (result(1.0, 0.01), result(0.5, 0.01), ["both, ms"]),
        (result(1.0, 0.01), result(1.0, 0.01, peak=1100), ["memory, MB"]),
        (result(1.0, 0.01), result(9.0, 0.01, rows=17), []),  # another shape
        (result(1.0, 0.01), result(9.0, 0.01, dtype="bfloat16"), []),
    ],
)
def test_what_moved_beyond_noise(before, after, moved):
    found, compared = comparison.changes([before], [after])
    assert [change.figure for change in found] == moved
    assert compared == (2 if before.key == after.key else 0)


@pytest.fixture
def tiny(monkeypatch):
    """A measurement of a second or two: the peers that need no package, small shapes."""
    monkeypatch.setattr(peers, "PEERS", (*PLAIN, *OTHERS[-1:]))
    monkeypatch.setattr(shapes, "PAIRS", {"small": shapes.Pair("Small 1 from 2", 301, 24, 40)})
    monkeypatch.setattr(shapes, "CPU_LOGITS", 4096)
    monkeypatch.setattr(shapes, "CPU_HEADS", ("small",))
    monkeypatch.setattr(shapes, "CPU_FLOPS", 1e6)
    monkeypatch.setattr(shapes, "SWEEP_V", (64, 256))
    monkeypatch.setattr(shapes, "SWEEP_N", {"cpu": (16, 32)})
    monkeypatch.setattr(shapes, "SWEEP_INPUTS", {"cpu": shapes.INPUTS})
    monkeypatch.setattr(shapes, "SWEEP_HIDDEN", (8, 12))
    monkeypatch.setattr(shapes, "SWEEP_N_V", 300)
    monkeypatch.setattr(measure, "COPY_BYTES", 2**20)


def test_bench_prints_draws_and_writes(tiny, tmp_path, capsys):
    file, folder = tmp_path / "new.json", tmp_path / "plots"
    arguments = ["bench", "--device", "cpu", "--seconds", "0.05", "--output", str(folder), "--json", str(file)]
    assert main([*arguments, "--part", "models"]) == 0
    printed = capsys.readouterr().out
    assert "Small 1 from 2, from hidden states (linear_kd_loss): N = 16, V = 301, H = 24 / 40, float32" in printed
    assert "Liger fused linear CE" in printed.split("Skipped")[1]

    assert main([*arguments, "--part", "sweeps", "--compare", str(file)]) == 0
    assert "0 of 0 figures moved" in capsys.readouterr().out  # the sweeps are other shapes
    ends = (".png", "-from-hidden-states.png")
    assert {path.name for path in folder.iterdir()} == {f"growing-{size}{end}" for size in "VN" for end in ends}
    record = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert record["command"] == "fused-kd bench"
    assert {"python", "torch", "triton", "liger-kernel"} <= set(record["versions"])
    results = [suite.from_dict(entry) for entry in record["results"]]
    assert {(r.group, r.rows, r.vocab_size) for r in results if r.peer == "fused_kd"} == {
        ("V", 64, 64), ("V", 64, 256), ("N", 16, shapes.SWEEP_N_V), ("N", 32, shapes.SWEEP_N_V),
    }  # fmt: skip
    ours = next(r for r in results if r.peer == "fused_kd")
    assert ours.agrees
    assert 0 < ours.both.low <= ours.both.median <= ours.both.high
    assert ours.bandwidth == pytest.approx(3 * 4 * ours.rows * ours.vocab_size / ours.both.median)


def test_a_wrong_loss_of_ours_is_exit_code_1(tiny, tmp_path, monkeypatch, capsys):
    wrong = peers.Peer(peers.OURS, "logits", lambda: lambda i, T: peers.eager_loss(i, 1.0))
    monkeypatch.setattr(peers, "PEERS", (wrong,))
    assert main(["bench", "--device", "cpu", "--part", "sweeps", "--seconds", "0.01", "--output", str(tmp_path)]) == 1
    assert "WRONG: value off by" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "--device: expected cpu, cuda or cuda:N, got 'abacus'"),
        (["--pairs", "llama2", "gpt5"], "--pairs: expected some of llama2, smollm2"),
        (["--compare", "no-such-file"], "--compare: expected a file that --json wrote, got no-such-file"),
        (["--seconds", "0"], "expected a finite number above 0, got '0'"),
        (["--json", "no-such-folder/x.json"], "expected a file in a folder that exists, got 'no-such-folder/x.json'"),
    ],
)
def test_wrong_use_is_exit_code_2(arguments, message, tmp_path, capsys):
    try:
        code = main(["bench", "--output", str(tmp_path), *arguments])
    except SystemExit as end:  # argparse's own
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "{}", '{"results": [{"peer": "x"}]}', "nonsense"])
def test_a_file_that_is_no_record_is_refused(content, tmp_path, capsys):
    file = tmp_path / "old.json"
    file.write_text(content)
    assert main(["bench", "--output", str(tmp_path), "--compare", str(file)]) == 2
    assert "--compare: expected a file that --json wrote" in capsys.readouterr().err
