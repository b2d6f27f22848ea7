"""The command for a GPU: its process for each stage, what it makes of the tools' output, its stand-ins, its reports."""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
from rich.console import Console

from benchmarks import readme
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import model, report, run, subjects, tables
from benchmarks.gpu.context import REHEARSED, Context
from benchmarks.gpu.stages import STAGES, Stage, fast, hidden, l2, machine, models, plans, right, safe
from benchmarks.gpu.standins import cuda
from benchmarks.gpu.timing import timed
from benchmarks.simulated import launches
from fused_kd.devices import DEVICES
from fused_kd.launching import launching as launching_on
from fused_kd.testing import accuracy, peers, problems, shapes

ROOT = Path(__file__).parents[2]

# --- stages as processes

SCRIPTS = {
    "works": "write(1); write(2)",
    "hangs": "write(1); file.write('{\"half\": '); file.flush(); time.sleep(60)",
    "crashes": "write(1); print('what happened'); os.kill(os.getpid(), 11)",
    "raises": "write(1); raise ValueError('what is wrong')",
    "finds": "write(1); file.write(json.dumps({'case': 'the third', 'finding': 'other bits'}) + chr(10))",
}
PROLOGUE = """
import json, os, sys, time
file = open(sys.argv[1], "w")
def write(number):
    file.write(json.dumps({"figure": number}) + chr(10))
    file.flush()
"""


@pytest.fixture
def stages(monkeypatch):
    """Stages that are the scripts above; seconds enough for a machine that is busy."""
    monkeypatch.setattr(run, "STAGES", tuple(Stage(name, 4.0 if name == "hangs" else 60.0, name) for name in SCRIPTS))
    monkeypatch.setattr(tables, "STAGES", ())
    monkeypatch.setattr(
        run, "command", lambda name, lines, seconds: [sys.executable, "-c", PROLOGUE + SCRIPTS[name], str(lines)]
    )


def test_a_stage_that_hangs_or_crashes_costs_itself_alone(stages, tmp_path, capsys):
    file = tmp_path / "record.json"
    begin = time.monotonic()
    assert run.run(list(SCRIPTS), file, 100.0, None, None) == 1
    assert time.monotonic() - begin < 50
    outcomes = json.loads(file.read_text())["stages"]
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "works": "done", "hangs": "timed out", "crashes": "failed with exit code -11",
        "raises": "failed with exit code 1", "finds": "done",
    }  # fmt: skip
    assert [len(outcome["results"]) for outcome in outcomes.values()] == [2, 1, 1, 1, 2]
    out = capsys.readouterr().out
    assert "what happened" in out
    assert "ValueError: what is wrong" in out
    assert "WRONG finds: the third: other bits" in out
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_whose_stages_all_work_exits_with_0(stages, tmp_path):
    assert run.run(["works"], tmp_path / "record.json", 100.0, None, None) == 0


def test_a_rehearsal_leaves_no_record(stages, monkeypatch):
    called = []
    monkeypatch.setattr(command, "run", lambda *arguments: called.append(arguments) or 0)
    command.main(["--rehearse"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    command.main([])
    assert [arguments[1] for arguments in called] == [Path(os.devnull), run.RESULTS]
    assert run.run(["works"], Path(os.devnull), 100.0, None, None) == 0
    assert Path(os.devnull).is_char_device()


def test_without_a_gpu_nothing_is_run_or_written(stages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    file = tmp_path / "record.json"
    assert command.main(["--json", str(file)]) == 2
    assert not file.exists()
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert "--rehearse" in error


def test_without_time_a_stage_is_not_begun(stages, tmp_path):
    file = tmp_path / "record.json"
    assert run.run(["works"], file, 0.5, None, None) == 1
    assert json.loads(file.read_text())["stages"]["works"]["status"] == "no time was left"


def test_processes_of_a_stage_end_with_it(stages, tmp_path, monkeypatch):
    child = tmp_path / "pid"
    sleeper = f"import os, time; open({str(child)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {sleeper!r}]); time.sleep(60)"
    monkeypatch.setitem(SCRIPTS, "hangs", script)
    run.run(["hangs"], tmp_path / "record.json", 100.0, None, None)
    time.sleep(0.2)
    status = Path(f"/proc/{child.read_text()}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_peers_in_a_folder_of_wheels_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda command, check: Path(command[-2]).mkdir())
    (tmp_path / "a-1-py3-none-any.whl").touch()
    environment = run._environment(tmp_path, tmp_path, None)
    assert environment["PYTHONPATH"].split(os.pathsep)[0] == str(ROOT)
    assert (tmp_path / "site").is_dir()
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == str(tmp_path / "site")


@pytest.mark.parametrize("arguments", [["--stages", "none"], ["--wheels", "no/such/folder"], ["--seconds", "long"]])
def test_wrong_arguments_exit_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit_:
        command.main(arguments)
    assert exit_.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_every_stage_has_a_module_and_a_table():
    for stage in STAGES:
        assert stage.name in tables.TABLES
        assert (Path(right.__file__).parent / f"{stage.name}.py").exists()


# --- a rehearsal


@pytest.mark.slow
def test_a_wrong_kernel_fails_the_second_stage(tmp_path):
    file = tmp_path / "record.json"
    arguments = ["--rehearse-wrong", "--stages", "right", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads(file.read_text())["stages"]["right"]["results"]
    assert len(found) == 8
    wrong = {result["suite"] for result in found if result.get("finding")}
    assert wrong == {"kd_loss", "linear_kd_loss", "kernels"}
    assert "of the gradient is not the oracle's, rounded" in done.stdout


def test_equal_bits():
    a = torch.tensor([1.0, torch.nan, -0.0])
    assert right.same_bits([[a], [a.clone()], [a.clone()]])
    assert not right.same_bits([[a], [a.clone()], [a.nan_to_num()]])
    assert not right.same_bits([[a], [a + 0.0]])  # another sign of 0


def test_equal_bits_of_one_column():
    column = torch.randn(8, 6).bfloat16()[:1].T  # contiguous, with a last stride of 6
    assert right.same_bits([[column], [column.clone()]])
    assert not right.same_bits([[column], [column + 1]])


def test_a_captured_step_repeats_operators_alone():
    source, read = torch.ones(3), []

    def step():
        read.append(float(source.sum()))
        return source * 2, source * read[-1]

    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        doubled, constant = step()
    source.fill_(5.0)
    graph.replay()
    assert doubled.tolist() == [10.0] * 3
    assert constant.tolist() == [15.0] * 3  # the number that the host has read is that of the capture
    assert read == [3.0]


def test_times_are_those_between_events(monkeypatch):
    now, slept, calls = [0.0], [], []

    class Event(cuda.Event):
        def record(self):
            self.seconds = now[0]

    def run():
        calls.append(now[0])
        now[0] += len(calls)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    timing = timed({"step": run}, batches=2, rounds=3)["step"]
    assert len(calls) == 2 + 2 * 3
    assert (timing.seconds, timing.samples) == (5.5, 6)  # of 3, 4, 5, 6, 7, 8 seconds; the first two do not count
    assert timing.low < timing.seconds < timing.high
    assert len(slept) == 2
    assert min(slept) > 3 * timing.host_seconds * 2e9


# --- what the tools print

NCU = """\
==PROF== Connected to process 41 (/usr/bin/python3.12)
==PROF== Profiling "shared_kernel": 0%....50%....100% - 1 pass
"ID","Process ID","Process Name","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","41","python3.12","shared_kernel","dram__bytes_read.sum","byte","4,210,000,000"
"0","41","python3.12","shared_kernel","dram__bytes_write.sum","byte","2,100,000,000"
"0","41","python3.12","shared_kernel","gpu__time_duration.sum","ns","2,300,512"
"1","41","python3.12","row_statistics_kernel","dram__bytes_read.sum","byte","4,202,692,608"
"1","41","python3.12","row_statistics_kernel","dram__bytes_write.sum","byte","1,000"
"1","41","python3.12","row_statistics_kernel","gpu__time_duration.sum","ns","1,500,000"
"""


def test_kernels_of_a_log_of_ncu():
    one, statistics = l2.kernels(NCU)
    assert one == {"kernel": "shared_kernel", l2.READ: 4.21e9, l2.WRITTEN: 2.1e9, l2.TIME: 2300512.0}
    assert statistics["kernel"] == "row_statistics_kernel"
    assert list(l2.kernels("==ERROR== no permission")) == []


def test_kernels_go_to_the_steps_that_launched_them():
    steps = [{"rows": 8192, "vocabulary": 128_256, "plan": plan, "kernels": n} for plan, n in (("auto", 1), ("two", 2))]
    (first,) = l2.matched(steps, list(l2.kernels(NCU)))  # the second kernel of the second step is missing
    assert first["bytes_per_pair"] == pytest.approx(6.31e9 / (8192 * 128_256))
    assert (first["plan"], first["kernels"], first["seconds"]) == ("auto", ["shared_kernel"], 2300512e-9)


@pytest.mark.parametrize(
    ("printed", "code", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, 0),
        ("========= Invalid __global__ write of size 2 bytes\n========= ERROR SUMMARY: 3 errors", 0, 3),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, 0),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 0, 2),
        ("========= Error: Target application terminated before first instrumented API call", 255, None),
    ],
)
def test_summary_of_compute_sanitizer(monkeypatch, printed, code, errors):
    monkeypatch.setattr(safe.shutil, "which", lambda name: name)
    done = subprocess.CompletedProcess([], code, printed, "")
    monkeypatch.setattr(safe, "_run", lambda *_: done)
    result = safe.checked(run.here(Path(), 10.0), "memcheck")
    assert result["errors"] == errors
    assert ("finding" in result) == (errors != 0)
    assert errors == 0 or printed.splitlines()[0] in result["finding"]


def test_a_program_that_fails_under_compute_sanitizer_says_why(monkeypatch):
    monkeypatch.setattr(safe.shutil, "which", lambda name: name)
    done = subprocess.CompletedProcess(
        [], 1, "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors", "no module"
    )
    monkeypatch.setattr(safe, "_run", lambda *_: done)
    assert safe.checked(run.here(Path(), 10.0), "memcheck")["finding"].endswith("0 errors\nno module")


def test_a_tool_that_is_not_there_or_too_slow_is_named(monkeypatch):
    context = run.here(Path(), 10.0)
    monkeypatch.setattr(safe.shutil, "which", lambda name: None)
    assert "not installed" in safe.checked(context, "memcheck")["reason"]
    (result,) = l2.results(context)
    assert "not installed" in result["reason"]
    monkeypatch.setattr(safe.shutil, "which", lambda name: name)
    monkeypatch.setattr(safe, "_run", lambda *_: None)
    assert "in time" in safe.checked(context, "memcheck")["reason"]
    assert "in time" in safe.tested(context)["reason"]
    monkeypatch.setattr(safe, "TEST_PACKAGES", ("pytest", "no_such_package"))
    assert safe.tested(context)["reason"] == "not installed: no_such_package"
    monkeypatch.undo()
    assert safe._run([sys.executable, "-c", "import time; time.sleep(20)"], dict(os.environ), 0.2) is None


def test_tests_that_fail_are_told(monkeypatch):
    printed = "FAILED tests/a.py::test_b - AssertionError\nE   assert 1 == 2\n2 failed, 30 passed in 9.1s"
    monkeypatch.setattr(safe, "_run", lambda *_: subprocess.CompletedProcess([], 1, printed, ""))
    result = safe.tested(run.here(Path(), 10.0))
    assert (result["failed"], result["passed"]) == (2, 30)
    assert result["finding"].splitlines() == printed.splitlines()[:2]


def test_a_driver_that_does_not_answer_is_told(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "FileNotFoundError" in machine.nvidia_smi()


def test_ncu_that_does_not_end(tmp_path, monkeypatch):
    def too_slow(command, **_):
        raise subprocess.TimeoutExpired(command, 1.0)

    monkeypatch.setattr(l2.shutil, "which", lambda name: name)
    monkeypatch.setattr(l2.subprocess, "run", too_slow)
    (result,) = l2.results(run.here(tmp_path, 10.0))
    assert result["reason"] == "ncu: exit code None, 0 kernels counted: it did not come to its end in time"


# --- what goes wrong in a subject


@pytest.fixture
def rehearsed(monkeypatch, tmp_path):
    """A context on a CPU, for functions of the stages in this process."""
    for name, function in cuda.REPLACEMENTS.items():
        monkeypatch.setattr(torch.cuda, name, function)
    sizes = REHEARSED._replace(dtype=torch.float32)
    return Context(torch.device("cpu"), sizes, tmp_path, time.monotonic() + 100)


def fails(message):
    def build():
        def loss(inputs, temperature):
            raise RuntimeError(message)

        return loss

    return build


@pytest.mark.parametrize(("name", "key"), [("fused_kd, otherwise", "finding"), ("another", "reason")])
def test_a_peer_that_raises_costs_its_figure(rehearsed, name, key):
    shape = shapes.Shape("", "", "logits", 2, 40, 0, 0, torch.float32)
    buffers = [problems.make(shape, rehearsed.device)]
    eager = next(peer for peer in peers.of(shape) if peer.name == "eager PyTorch")
    wanted = [(peers.Peer(name, "logits", fails("no such\n kernel")), 2.0), (eager, 2.0)]
    wrong, right_ = subjects.measured(rehearsed, shape, buffers, wanted, 1.0)
    assert wrong[key] == "RuntimeError: no such kernel"
    assert "seconds" not in wrong
    assert right_["seconds"] > 0
    assert right_["peak_bytes"] > 4 * 2 * 40
    assert right_["gradient_error"] < 1e-6
    (late,) = subjects.measured(rehearsed._replace(end=time.monotonic()), shape, buffers, [(eager, 2.0)], 1.0)
    assert late["reason"] == "no time was left"


@pytest.mark.parametrize(("name", "key"), [("fused_kd, twice", "finding"), ("another, twice", "reason")])
def test_another_loss_than_it_says_is_told(rehearsed, name, key):
    shape = shapes.Shape("", "", "logits", 2, 40, 0, 0, torch.float32)
    twice = peers.Peer(name, "logits", lambda: lambda inputs, T: 2 * peers.eager_loss(inputs, T))
    (result,) = subjects.measured(rehearsed, shape, [problems.make(shape, rehearsed.device)], [(twice, 2.0)], 1)
    assert result[key] == "not the loss that it says it is"


def test_from_hidden_states_every_plan_has_its_modelled_time(rehearsed):
    with launching_on(device=DEVICES["H200"]):
        found = [r for r in hidden.results(rehearsed) if r["subject"].startswith("fused_kd")]
    assert [r for r in found if r.get("finding")] == []
    by_name = {(r["head"], r["subject"]): r for r in found}
    assert by_name.keys() >= {
        ("trained", "fused_kd, weight_grad_out"), ("frozen", "fused_kd, 16-bit logits"), ("frozen", "fused_kd, lean"),
        ("trained", "fused_kd, half ignored, compact"), ("trained", "fused_kd, half ignored, not compact"),
    }  # fmt: skip
    assert all(0 < r["modelled_seconds"] == pytest.approx(sum(r["modelled_parts"].values())) for r in found)
    assert all(r["seconds"] > 0 and r["times_the_products"] > 0 and r["times_the_default"] > 0 for r in found)
    ours, half = by_name["trained", "fused_kd"], by_name["trained", "fused_kd, half ignored, counted_rows"]
    assert (ours["judged"], ours["target"]) == ("times_the_products", 1.2)
    assert (half["judged"], half["target"]) == ("times_the_default", 0.56)
    assert (ours["chunk_rows"], half["chunk_rows"]) == (4, 2)
    assert "target" not in by_name["trained", "fused_kd, half ignored, not compact"]
    grouped = by_name["trained", "fused_kd, chunks of 2, groups of 4"]
    assert (grouped["chunk_rows"], grouped["gradient_rows"]) == (2, 4)


def test_a_missed_target_is_of_the_figure_that_it_judges():
    half = {"subject": "half", "times_the_products": 0.7, "times_the_default": 0.6, "target": 0.56}
    record = {"rehearsal": None, "stages": {"hidden": {"results": [half | {"judged": "times_the_default"}]}}}
    assert list(tables.missed(record)) == ["hidden: half: 0.60, target 0.56"]


def at_models(context):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, dynamic: function)
        return list(models.results(context))


def test_losses_at_the_heads_of_models_are_the_same_loss(rehearsed):
    found = at_models(rehearsed)
    assert [r["subject"] for r in found] == 2 * [models.FROM_HIDDEN, models.FROM_LOGITS, models.EAGER] + 2 * [
        models.COMPILED
    ]
    assert {r["softcap"] for r in found} == {None, 30.0}
    assert all(r["seconds"] > 0 and "finding" not in r for r in found)
    compared = [r for r in found if r["subject"] != models.FROM_HIDDEN]
    assert max(r["loss_difference"] for r in compared) < 1e-6
    assert max(r["gradient_difference"] for r in compared) < 1e-5


def test_another_loss_at_the_heads_of_models_is_found(rehearsed, monkeypatch):
    monkeypatch.setitem(models.SOFTCAPS, "TinyLlama 1.1B from Llama 2 7B", 3.0)
    monkeypatch.setattr(models, "eager", lambda inputs, softcap, eager=models.eager: eager(inputs, None))
    wrong = {(r["models"], r["subject"]) for r in at_models(rehearsed) if "finding" in r}
    assert ("TinyLlama 1.1B from Llama 2 7B", models.EAGER) in wrong
    assert models.FROM_LOGITS not in {subject for _, subject in wrong}


def test_without_memory_for_eager_at_the_heads_of_models_fewer_tokens_are_taken(rehearsed, monkeypatch):
    def eager(inputs, softcap, eager=models.eager):
        if len(inputs.labels) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return eager(inputs, softcap)

    monkeypatch.setattr(models, "eager", eager)
    monkeypatch.setattr(models, "COMPILING", 1000.0)
    first, second = ([r for r in at_models(rehearsed) if r["models"] == pair.name] for pair in rehearsed.sizes.models)
    for found in (first, second):
        assert [r["rows"] for r in found] == [4, 4, 4, 2, 2, 2]
        assert ["seconds" in r for r in found] == [True, True, False, True, True, True]
        assert "out of memory" in found[2]["reason"]
        assert found[5]["loss_difference"] < 1e-6


def test_ours_that_fails_at_the_heads_of_models_is_a_finding(rehearsed, monkeypatch):
    monkeypatch.setattr(models, "linear_kd_loss", fails("no such kernel")())
    monkeypatch.setattr(models, "COMPILING", 1000.0)
    found = at_models(rehearsed)
    assert {r["subject"] for r in found if "finding" in r} == {models.FROM_HIDDEN}


def test_a_step_that_cannot_be_captured_is_told(rehearsed, monkeypatch):
    monkeypatch.setattr(fast, "captured", lambda step: (_ for _ in ()).throw(RuntimeError("operation not permitted")))
    shape = shapes.Shape("", "", "logits", 2, 40, 0, 0, torch.float32)
    result = fast.of_graph(rehearsed, problems.make(shape, rehearsed.device), floor=1.0)
    assert result["finding"] == "RuntimeError: operation not permitted"


def test_a_replayed_step_that_differs_is_told(rehearsed, monkeypatch):
    monkeypatch.setattr(cuda.CUDAGraph, "replay", lambda graph: None)
    assert "has not the results" in safe.replayed(rehearsed, 40)["finding"]


def test_a_launch_that_does_not_compile_is_told(rehearsed, monkeypatch):
    errors = {"auto": None, "programs=2,warps=4,columns=8": "RuntimeError: PassManager::run failed"}
    monkeypatch.setattr(plans, "launched", lambda *_: lambda: None)
    monkeypatch.setattr(plans, "launch", lambda *_: {})
    worked, failed = plans.at(rehearsed, 40, errors)
    assert worked["seconds"] >= 0
    assert failed["reason"] == "RuntimeError: PassManager::run failed"
    monkeypatch.undo()
    assert "expected auto, one-launch" in plans.compile_launch("no plan", "cpu", torch.float32, 40)


def test_what_a_worker_raises_is_a_finding_of_its_case(rehearsed, monkeypatch):
    class Pool:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def shutdown(self, **_):
            pass

        def submit(self, function, *arguments):
            future = Future()
            if "late" not in arguments:
                future.set_exception(ValueError("what is wrong"))
            return future

    monkeypatch.setattr(right, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(right, "cases", lambda: [("kd_loss", "a case")])
    monkeypatch.setattr(right, "launches", lambda: [])
    (result,) = right.results(rehearsed)
    assert result == {"suite": "kd_loss", "case": "a case", "finding": "ValueError: what is wrong"}
    monkeypatch.setattr(right, "cases", lambda: [("kd_loss", "late")])
    (result,) = right.results(rehearsed._replace(end=time.monotonic()))
    assert result == {"suite": "kd_loss", "case": "late", "reason": "no time was left"}


def test_other_bits_in_another_run_are_a_finding(monkeypatch):
    monkeypatch.setattr(right, "same_bits", lambda runs: False)
    case = accuracy.Case(512, 512, torch.float32, torch.float32, 2.0, 0.3, "flat", "all", "mean", 0)
    assert right.measure("kd_loss", case, "cpu")["finding"].endswith("other bits in another run")
    outcome = SimpleNamespace(findings=(), differences=())
    monkeypatch.setattr(launches, "on_device", lambda case, device: (outcome, {}))
    assert right.measure("kernels", case, "cpu")["finding"] == "other bits in another run"


# --- reports


def recorded(name: str = "NVIDIA H100 80GB HBM3", rehearsal: str | None = None) -> dict[str, Any]:
    """A record as a run writes it, of figures that are easy to count with."""
    timing = {"seconds": 0.003, "low": 0.0029, "high": 0.0031, "host_seconds": 0.0005, "samples": 15}
    of_size = {"vocabulary": 128_256, "rows": 8192}
    gemma = {
        "models": "Gemma 2", "rows": 8192, "vocabulary": 256_000, "hidden": 2304, "teacher_hidden": 3584, "softcap": 30.0,
        "temperature": 2.0,
    }  # fmt: skip
    step = {**of_size, **timing, "computes": "CE + KL", "floor_seconds": 0.0024, "gradient_error": 1e-3}
    stages = {
        "machine": [
            {"figure": "device", "name": name},
            {"figure": "installed", "torch": "2.11.0", "triton": "3.6.0", "cuda": "13.0", "tools": {}},
            {"figure": "copy", "bytes_per_second": 2.63e12},
            {"figure": "matrix product", "flops_per_second": 7.9e14},
        ],
        "right": [{"suite": "kd_loss", "case": "one"}, {"suite": "kernels", "case": "two", "finding": "other bits"}],
        "fast": [
            {"figure": "copy", "bytes_per_second": 2.63e12},
            {**step, "subject": "fused_kd", "temperature": 2.0, "times_the_floor": 1.3, "target": 1.25},
            {**step, "subject": "fused_kd", "temperature": 3.0, "times_the_floor": 1.2, "target": 1.25},
            {**step, "subject": "fused_kd, one launch", "temperature": 2.0, "times_the_floor": 1.4},
            {**step, "subject": "Liger CE + TVD", "temperature": 2.0, "times_the_floor": 3.0},
            {**step, "subject": "fla KL kernel", "computes": "KL", "seconds": 0.0029, "temperature": 1.0,
             "times_the_floor": 2.9},
            {**of_size, "subject": "eager PyTorch", "temperature": 2.0, "reason": "OutOfMemoryError: CUDA out of memory"},
        ],
        "l2": [
            {**of_size, "plan": "one-launch", "kernels": ["shared_kernel"], "bytes_per_pair": 6.9, "read_per_pair": 4.8}
        ],
        "hidden": [
            {**of_size, "hidden": 4096, "head": "trained", "subject": "fused_kd", "computes": "CE + KL", **timing,
             "times_the_products": 1.1, "peak_bytes": 2e9, "planned_bytes": 1.9e9},
        ],
        "models": [
            {**gemma, "subject": "linear_kd_loss", **timing, "loss": 9.5, "peak_bytes": 4e8},
            {**gemma, "subject": "eager PyTorch", "reason": "OutOfMemoryError: CUDA out of memory"},
            {**gemma, "models": "TinyLlama", "softcap": None, "subject": "eager PyTorch", **timing, "loss": 9.5,
             "peak_bytes": 4e9, "loss_difference": 1.23e-5, "gradient_difference": 0.00234},
        ],
        "plans": [{**of_size, **timing, "plan": "auto", "seconds": 0.0025}],
        "safe": [
            {"check": "CUDA graph", "vocabulary": 32_000, "same": True},
            {"check": "pytest -m gpu", "passed": 860, "failed": 2},
            {"check": "memcheck", "errors": 0}, {"check": "racecheck", "reason": "no time was left"},
        ],
        "launches": [{**of_size, "from": "logits", "count": 2, "microseconds": 9.5, "events": [
            {"name": "shared_kernel", "microseconds": 8.0}, {"name": "fill", "microseconds": 1.5}]}],
    }  # fmt: skip
    outcomes = {stage: {"status": "done", "seconds": 1.0, "results": results} for stage, results in stages.items()}
    return {"rehearsal": rehearsal, "seconds": 9.0, "stages": outcomes}


MODELLED = {"results": [{"chip": "h100", "vocab_size": 128_256, "peer": "Liger CE + TVD", "computes": "CE + TVD",
                         "times_the_floor": 2.7, "bytes_a_pair": 14.0}]}  # fmt: skip
ONE_LAUNCH = {"results": [{"chip": "h100", "vocab_size": 128_256, "rows": 8192, "temperature": T, "times_the_floor": 1.0,
                           "bytes_a_pair": 6.0} for T in (2.0, 3.0)]}  # fmt: skip


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_measured_figures_stand_beside_modelled_ones(name):
    found = {(c.figure, c.temperature): c for c in model.comparisons(recorded(name), MODELLED, ONE_LAUNCH)}
    assert {key: round(c.error, 3) for key, c in found.items()} == {
        (model.KERNEL, 2.0): round(1 / (0.0025 / 0.0024) - 1, 3),
        ("a step of fused_kd, one launch, times the floor", 2.0): round(1 / 1.4 - 1, 3),
        ("a step of Liger CE + TVD, times the floor", 2.0): round(2.7 / 3 - 1, 3),
        ("one launch, bytes of memory per pair", 2.0): round(6 / 6.9 - 1, 3),
    }


def test_a_device_that_is_not_modelled_has_no_comparison():
    assert model.comparisons(recorded("NVIDIA L4"), MODELLED, ONE_LAUNCH) == []


def test_documentation_of_a_run():
    run_ = recorded()
    text = "\n".join(report.everything(run_, model.comparisons(run_, MODELLED, ONE_LAUNCH)))
    assert "one NVIDIA H100 80GB HBM3 (torch 2.11.0, triton 3.6.0, cuda 13.0; a copy moves 2.63 TB/s" in text
    assert "1 of `kd_loss`, 1 of `kernels`; 1 are wrong" in text
    assert "| fused_kd | CE + KL | 2 | **3.00 (1.30)** |" in text
    assert "| eager PyTorch |  | 2 | out of memory |" in text
    assert "| fused_kd | CE + KL | trained | 128 256 | 3.0 | 1.10 | 2000 | 1900 |" in text
    sizes = "8 192 | 256 000 | 2 304 from 3 584"
    assert f"| Gemma 2 | 30 | {sizes} | linear_kd_loss | 3.0 | 400 |  |  |" in text
    assert f"| Gemma 2 | 30 | {sizes} | eager PyTorch | out of memory |  |  |  |" in text
    assert f"| TinyLlama |  | {sizes} | eager PyTorch | 3.0 | 4000 | 1e-05 | 2e-03 |" in text
    assert "| 128 256 | 6.90 | - |" in text
    assert "| logits | 128 256 | 2 | 10 | 8 |" in text
    assert "| a step of Liger CE + TVD, times the floor | 128 256 | 2 | 3.00 | 2.70 | -10% |" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(row.endswith(" |") for row in rows)
    assert (
        "V = 32 000: the bits of a step; `pytest -m gpu`: 860 passed, 2 failed; compute-sanitizer's memcheck: 0" in text
    )
    assert "errors; racecheck: no time was left." in text


def test_the_readmes_table_of_a_run():
    text = "\n".join(report.summary(recorded()))
    assert "| from logits, V = 128 256 | 3.00 |  |  |  | 2.90: fla KL kernel (KL, T = 1) |" in text
    assert "| heads and loss, Gemma 2, V = 256 000 |  | 3.00; 0.4 GB |  |  | |" in text
    assert "| heads and loss, TinyLlama, V = 256 000 |  |  | 3.00; 4 GB |  | |" in text
    assert "| 3 |" not in text


def test_on_screen_what_is_wrong_and_what_missed_its_target(capsys):
    tables.show(Console(width=200), recorded())
    out = capsys.readouterr().out
    assert "WRONG right: kernels, two: other bits" in out
    assert "MISSED fast: fused_kd, vocabulary 128256, temperature 2.0: 1.30, target 1.25" in out
    assert out.count("MISSED") == 1
    assert list(tables.missed(recorded(rehearsal="right"))) == []


def test_the_record_of_a_run_is_written_into_readme_and_documentation(tmp_path, monkeypatch):
    for name in ("cpu", "compiled", "modelled", "one_launch", "one_launch-divergences", "regression", "whole_step"):
        (tmp_path / f"{name}.json").write_text((readme.RESULTS / f"{name}.json").read_text())
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    monkeypatch.setitem(readme.__dict__, "_one_launch", lambda _: ONE_LAUNCH)
    assert "No run on a GPU" in readme.performance()
    (tmp_path / "gpu.json").write_text(json.dumps(recorded()))
    assert "NVIDIA H100" in readme.section()
    assert "| error |" in readme.performance()
    (tmp_path / "gpu.json").write_text(json.dumps(recorded(rehearsal="right")))
    assert "NVIDIA H100" not in readme.section() + readme.performance()


def test_at_a_further_vocabulary_only_telling_subjects_run(rehearsed, monkeypatch):
    ran = []

    def at(context, inputs, head, variants, others, seconds):
        ran.append((inputs.student[1].shape[0], head, {variant.telling for variant in variants}))
        return iter(())

    monkeypatch.setattr(hidden, "at", at)
    context = rehearsed._replace(sizes=rehearsed.sizes._replace(hidden_vocabularies=(304, 48)))
    assert list(hidden.results(context)) == []
    assert [(head, telling) for vocabulary, head, telling in ran if vocabulary == 48] == [
        ("trained", {True}), ("frozen", {True})
    ]  # fmt: skip


def test_a_record_with_modelled_times_shows_them():
    ran = {
        "rows": 8, "hidden": 16, "head": "trained", "vocabulary": 304, "subject": "fused_kd", "computes": "CE + KL",
        "seconds": 0.0125, "chunk_rows": 2, "gradient_rows": 4, "modelled_seconds": 0.011, "times_the_default": 1.0,
    }  # fmt: skip
    text = "\n".join(report.from_hidden_states({"stages": {"hidden": {"results": [ran]}}}))
    assert "C / M | modelled ms | times `fused_kd`" in text
    assert "| 12.5 |" in text
    assert "| 2 / 4 | 11.0 | 1.00 |" in text
