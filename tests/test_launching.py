"""The context `fused_kd.testing.launching`: the launch that is taken, and the device that it is planned for."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from fused_kd.devices import DEVICES
from fused_kd.launch import SinglePass
from fused_kd.launching import AUTO, ONE, TWO, VARIABLE, device_of, requested, single_pass
from fused_kd.testing import launching

CPU = torch.device("cpu")


def test_a_launch_is_taken_instead_of_the_variables(monkeypatch):
    monkeypatch.setenv(VARIABLE, TWO)
    environment = dict(os.environ)
    with launching(ONE):
        assert requested() == ONE
        with launching(AUTO):
            assert requested() == AUTO
        with launching("programs=7,warps=4,columns=8"):
            launch = requested()
            assert isinstance(launch, SinglePass)
            assert (launch.splits, launch.num_warps, launch.columns) == (7, 4, 8)
        assert requested() == ONE
        assert os.environ == environment
    assert requested() == TWO


def test_a_device_is_planned_for_instead_of_the_tensors():
    logits = torch.empty(1, 8192, 262_144, dtype=torch.bfloat16, device="meta")
    assert device_of(CPU) is None
    with launching(device="H100"):
        assert device_of(CPU) == DEVICES["H100"]
        assert single_pass(logits, logits, in_place=False)
        with launching(device=DEVICES["A100"]._replace(l2_bytes=2**22)):
            assert not single_pass(logits, logits, in_place=False)
        with launching(TWO):  # the device stays
            assert device_of(CPU) == DEVICES["H100"]
            assert not single_pass(logits, logits, in_place=False)
            with launching(device="A100"):  # and so does the launch
                assert requested() == TWO
    assert device_of(CPU) is None


def test_it_ends_with_an_error_too():
    with pytest.raises(KeyError), launching(ONE, device="H100"):
        raise KeyError
    assert requested() == AUTO
    assert device_of(CPU) is None


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"launch": "both"}, "launch: expected auto, one-launch, two-launches, .* got 'both'"),
        ({"device": "H1000"}, "device: expected a Device, or one of A100, H100, .* got 'H1000'"),
    ],
)
def test_what_can_not_be_asked_for(asked, message):
    with pytest.raises(ValueError, match=message), launching(**asked):
        pass
    assert requested() == AUTO


def test_other_threads_launch_so_too_and_blocks_may_end_in_any_order():
    """A backward pass of CUDA tensors runs in a thread of PyTorch's."""
    opened, ended = threading.Event(), threading.Event()

    def other():
        with launching(ONE):
            opened.set()
            ended.wait()

    thread = threading.Thread(target=other)
    with launching(TWO):
        thread.start()
        opened.wait()
        assert requested() == ONE
    assert requested() == ONE
    ended.set()
    thread.join()
    assert requested() == AUTO


def test_a_compiled_function_may_open_it():
    def requests(x):
        with launching(ONE):
            return x + (1 if requested() == ONE else 0)

    assert torch.compile(requests, backend="eager")(torch.zeros(())) == 1
    assert requested() == AUTO


def test_it_imports_nothing_that_only_tests_need():
    code = "import sys, torch; before = set(sys.modules); import fused_kd.testing; print(*set(sys.modules) - before)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert "fused_kd.launch" in modules
    assert not {module.partition(".")[0] for module in modules} & {"rich", "numpy", "pytest", "hypothesis"}
