"""`fused-kd bench`: peers that cannot run, the stopwatch, energy, comparison with an earlier run, the command."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from fused_kd.cli import main
from fused_kd.cli.benchmarking import comparison, finding, measure, suite, tables
from fused_kd.testing import peers, problems, shapes, steps

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
LOGITS = shapes.Shape("models", "small", "logits", 16, 301, 24, 40, torch.float32)
PLAIN = [peer for peer in peers.PEERS if peer.package is None and peer.name != "torch.compile"]
OTHERS = [peer for peer in peers.PEERS if peer.package is not None]


def test_what_cannot_run_says_why():
    peer = peers.Peer("another", "logits", lambda: peers.eager_loss, package="no_such_package", distribution="no-such")
    assert peer.missing(CPU) == "no-such is not installed"
    assert dataclasses.replace(peer, package=None, needs_gpu=True).missing(CPU) == "its Triton kernels need a GPU"

    def broken():
        raise ImportError("cannot import name 'x'\nand more")

    with peers.offering(*PLAIN, peer, peers.Peer("broken", "logits", broken)):
        results = {result.peer: result for result in suite.measured(LOGITS, CPU, 0.01)}
    assert results["another"].reason == "no-such is not installed"
    assert results["broken"].reason == "ImportError: cannot import name 'x'"
    assert results["fused_kd"].agrees
    assert tables.skipped(results.values())["no-such is not installed"] == ["another"]


def test_a_failure_of_our_own_loss_is_not_hidden():
    def broken():
        raise ImportError("ours")

    with peers.offering(peers.Peer(peers.OURS, "logits", broken)), pytest.raises(ImportError, match="ours"):
        suite.measured(LOGITS, CPU, 0.01)


def test_only_the_pass_is_timed(monkeypatch):
    clock = SimpleNamespace(now=0.0)

    class Slow(steps.Step):
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

    class Noted(steps.Step):
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

        def record(self, stream):
            log.append("record")

        def elapsed_time(self, end):
            return 250.0  # milliseconds

    class Logged(steps.Step):
        def run(self, which):
            log.append("run")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    both = {name: Logged(peers.eager_loss, [problems.make(LOGITS, CPU)], 2.0) for name in "ab"}
    found = measure.times(both, "both", torch.device("cuda"), 0.0)
    assert log == ["run"] * 2 + (["record", "run", "record"] * 2 + ["wait"]) * measure.MIN_ROUNDS
    assert found["b"].median == 0.25


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
    step = steps.Step(peers.eager_loss, [problems.make(LOGITS, CPU)], 2.0)
    assert measure.joules(step, torch.device("cuda"), seconds=0.25) == 2.0 / 4
    assert measure.joules(step, CPU, seconds=0.25) is None


def test_energy_is_left_out_where_the_gpu_does_not_count_it(nvml):
    def refuse(handle):
        raise nvml.NVMLError("not supported")

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    step = steps.Step(peers.eager_loss, [problems.make(LOGITS, CPU)], 2.0)
    assert measure.joules(step, torch.device("cuda"), seconds=0.25) is None


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
        (result(1.0, 0.01), result(9.0, 0.01, divergence="jsd"), []),
    ],
)
def test_what_moved_beyond_noise(before, after, moved):
    found, compared = comparison.changes([before], [after])
    assert [change.figure for change in found] == moved
    assert compared == (2 if before.key == after.key else 0)


@pytest.fixture
def tiny(monkeypatch):
    """A measurement of a second or two: the peers that need no package, small shapes."""
    monkeypatch.setattr(measure, "COPY_BYTES", 2**20)
    last = next(peer for peer in OTHERS if peer.name == "Liger fused linear CE")
    with peers.offering(*PLAIN, last), shapes.tiny():
        yield


def test_bench_prints_draws_and_writes(tiny, tmp_path, capsys):
    file, folder = tmp_path / "new.json", tmp_path / "plots"
    arguments = ["bench", "--device", "cpu", "--seconds", "0.05", "--output", str(folder), "--json", str(file)]
    assert main([*arguments, "--part", "models"]) == 0
    printed = capsys.readouterr().out
    assert "Small 1 from 2, from hidden states (linear_kd_loss): N = 16, V = 301, H = 24 / 40, float32" in printed
    assert "Liger fused linear CE" in printed.split("Left out")[1]

    assert main([*arguments, "--part", "sweeps", "--compare", str(file)]) == 0
    assert "0 of 0 figures moved" in capsys.readouterr().out  # the sweeps are other shapes
    assert re.fullmatch(  # of the models
        r"kd_loss is .* times as fast as .*, linear_kd_loss is .* (of|in) 2 configurations\.", last_of(printed)
    )
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


def test_divergences_have_tables_and_pictures_of_their_own(tiny, tmp_path, capsys):
    file, folder = tmp_path / "new.json", tmp_path / "plots"
    arguments = ["bench", "--device", "cpu", "--seconds", "0.01", "--output", str(folder), "--json", str(file)]
    assert main([*arguments, "--divergence", "reverse_kl", "jsd", "jsd"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for divergence, word in (("reverse_kl", "reverse KL"), ("jsd", "JSD")):
        assert f"from logits (kd_loss), {divergence}: N = 16, V = 301, float32" in printed
        assert f"eager PyTorch │ CE + {word}" in printed
    results = [suite.from_dict(entry) for entry in json.loads(file.read_text())["results"]]
    assert {(r.divergence, r.computes) for r in results} == {("reverse_kl", "CE + reverse KL"), ("jsd", "CE + JSD")}
    assert all(r.agrees for r in results)
    assert f"{len(results) // 2} configurations" in printed.rsplit("kd_loss is", 1)[1]  # ours and eager
    assert {path.name for path in folder.iterdir()} == {
        f"growing-{size}{source}-{divergence}.png"
        for size in "VN" for source in ("", "-from-hidden-states") for divergence in ("reverse_kl", "jsd")
    }  # fmt: skip


def test_a_wrong_loss_of_ours_is_exit_code_1(tiny, tmp_path, capsys):
    wrong = peers.Peer(peers.OURS, "logits", lambda: lambda i, T: peers.eager_loss(i, 1.0))
    arguments = ["bench", "--device", "cpu", "--part", "sweeps", "--seconds", "0.01", "--output", str(tmp_path)]
    with peers.offering(wrong):
        assert main(arguments) == 1
    out = capsys.readouterr().out
    assert "WRONG: value off by" in " ".join(out.split())
    assert last_of(out) == "kd_loss is WRONG in 4 of 4 configurations, marked above."


def last_of(printed):
    return printed.splitlines()[-1]


def figures(inputs, peer, seconds, peak=1000, quartile=0.01, **other):
    """A result at the shape of these inputs."""
    shape = LOGITS._replace(inputs=inputs, name=other.pop("name", "small"))
    spread = measure.Spread(seconds, seconds - quartile, seconds + quartile, 9)
    base = suite.Result.of(shape, peers.Peer(peer, inputs, lambda: None, other.pop("part", "CE + KL")))
    return dataclasses.replace(base, both=spread, peak_bytes=peak, agrees=True, **other)


OURS, EAGER, COMPILED = peers.OURS, "eager PyTorch", "torch.compile"


@pytest.mark.parametrize(
    ("results", "done", "sentence"),
    [
        (
            [figures("logits", OURS, 1.0, 20), figures("logits", EAGER, 5.5), figures("logits", COMPILED, 2.0)], 1,
            "kd_loss is 5.5 times as fast as eager PyTorch with 2% of its memory; nothing is clearly faster than ours "
            "in 1 configuration.",
        ),
        (
            [figures("logits", OURS, 1.0, 20, name="a"), figures("logits", EAGER, 5.5, name="a"),
             figures("logits", OURS, 1.0, 1500, name="b"), figures("logits", EAGER, 0.5, name="b"),
             figures("logits", COMPILED, 0.4, name="b"), figures("logits", COMPILED, 0.4, name="a"),
             figures("logits", "Liger CE", 0.1, name="a", part="CE"),  # less than the loss
             figures("hidden", OURS, 1.0), figures("hidden", EAGER, 0.9, quartile=0.2)], 3,
            "kd_loss is 0.5 to 5.5 times as fast as eager PyTorch with 2% to 150% of its memory, linear_kd_loss is 0.9 "
            "times as fast as eager PyTorch with 100% of its memory; clearly faster than ours: torch.compile in 2, eager "
            "PyTorch in 1 of 3 configurations.",
        ),
        (
            [figures("logits", OURS, 1.0), dataclasses.replace(figures("logits", EAGER, 0.1), agrees=False)], 1,
            "eager PyTorch did not run; nothing is clearly faster than ours in 1 configuration.",
        ),
        (
            [dataclasses.replace(figures("hidden", OURS, 1.0), agrees=False), figures("hidden", EAGER, 5.0)], 1,
            "linear_kd_loss is WRONG in 1 of 1 configurations, marked above.",
        ),
        ([], 0, "Nothing was measured: the command was interrupted in the first of 3 configurations."),
    ],
)  # fmt: skip
def test_the_last_sentence_says_what_was_found(results, done, sentence):
    assert finding.finding(results, done, done or 3) == sentence
    if done:
        assert finding.finding(results, done, 9) == f"Interrupted after {done} of 9 configurations: {sentence}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "--device: expected cpu, cuda or cuda:N, got 'abacus'"),
        (["--pairs", "llama2", "gpt5"], "--pairs: expected some of llama2, smollm2"),
        (["--divergence", "kl"], "--divergence: expected some of forward_kl, reverse_kl, mixed_kl, jsd"),
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


def test_the_page_has_the_sentence_of_the_recorded_run():
    root = Path(__file__).parents[2]
    results = json.loads((root / "benchmarks" / "results" / "cpu.json").read_text())["results"]
    sentence = finding.finding([suite.from_dict(result) for result in results], 1, 1)
    assert sentence in " ".join((root / "docs" / "commands.md").read_text().split())
