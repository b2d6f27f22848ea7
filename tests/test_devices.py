"""The table of devices: a GPU added to it is planned for, compiled for and listed, without a change to any other file."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fused_kd import devices
from fused_kd.devices import DEVICES, Device, device_of_properties, device_of_target
from fused_kd.launch import best_single_pass, is_faster
from fused_kd.testing import launching
from fused_kd.testing.launches import fake_gpu

NEW = Device(160, 64 * 2**20, False, target="sm_103", shared_bytes=256 * 1024, memory_gb=(288,))


@pytest.fixture
def new(monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.setitem(devices.DEVICES, "X1000", NEW)
    return NEW


def properties(name: str, **other: Any) -> SimpleNamespace:
    return SimpleNamespace(name=name, multi_processor_count=160, L2_cache_size=64 * 2**20, **other)


def test_a_launch_is_planned_for_a_new_device(new: Device):
    assert device_of_properties(properties("NVIDIA X1000 PCIe")) == new
    assert best_single_pass(8192, 128_256, 4, 2, new).hits
    assert is_faster(new, 128_256, [2, 2])


def test_a_step_is_launched_as_on_a_new_device(new: Device):
    from fused_kd import kd_loss

    with fake_gpu() as launches, launching(device="X1000"):
        student = torch.randn(4096, 128_256, dtype=torch.bfloat16, requires_grad=True)
        labels = torch.randint(128_256, (4096,))
        with launches:
            kd_loss(student, student.detach(), labels).backward()
    assert launches.kernels["row_statistics_kernel"] == 0  # one launch


def test_plan_lists_a_new_device(new: Device, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("rich")
    from fused_kd.cli import main

    assert main(["plan", "--vocab-size", "32000", "--student-hidden", "64"]) == 0
    printed = capsys.readouterr().out
    assert "288 GB" in printed
    assert "X1000" in printed.split("288 GB")[1]


def test_kernels_are_profiled_for_a_new_target(new: Device):
    pytest.importorskip("rich")
    pytest.importorskip("triton")
    from benchmarks.compiled import variants, workers

    variant = variants.Variant("row_statistics", new.target, "bf16", "bf16", 2.0, "ce+kl", "dense")
    (figures,) = workers.in_workers(variants.measure, [variant], 1).values()
    assert isinstance(figures, variants.Profile), figures
    assert figures.bytes == 4
    assert variants.launch_shape(dataclasses.replace(variant, kernel="shared")) == new.shared


@pytest.mark.parametrize(("target", "warp_size"), [("sm_120", 32), ("gfx1100", 64)])
def test_a_target_that_is_not_known_has_usual_figures(target: str, warp_size: int):
    found = device_of_target(target)
    assert (found.target, found.warp_size) == (target, warp_size)
    assert found.shared_bytes > 0


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA L4", "L4"), ("NVIDIA L40S", "L40S"), ("NVIDIA GH200 480GB", "H200"), ("AMD Instinct MI300X", "MI300X")],
)
def test_a_device_is_known_by_its_name(name: str, known: str):
    found = device_of_properties(properties(name))
    assert found.target == devices.DEVICES[known].target
    assert found.memory_gb == devices.DEVICES[known].memory_gb


def test_the_memory_and_the_rates_are_those_of_the_card():
    card = device_of_properties(properties("NVIDIA A100-SXM4-40GB", total_memory=42_405_855_232))
    assert card.memory == 42_405_855_232
    assert DEVICES["A100"].memory == 40 * 10**9  # by its name alone: the smaller of its cards
    assert Device(1, 1, False).memory == 24 * 10**9
    assert card.bandwidth == DEVICES["A100"].bandwidth
    clocks = {"memory_clock_rate": 1_593_000, "memory_bus_width": 5120}  # those of an H100 PCIe
    pcie = device_of_properties(properties("NVIDIA H100 PCIe", **clocks))
    assert pcie.bandwidth == pytest.approx(2.04e12, rel=0.01)
    half = device_of_properties(SimpleNamespace(name="NVIDIA H200 MIG 3g.71gb", multi_processor_count=66))
    assert (half.bandwidth, half.flops_16) == (2.4e12, 3.48e14)


def test_the_rates_of_an_unknown_device_are_estimated():
    """An A6000: 768 GB/s and 155 Tflop/s in bfloat16, dense."""
    clocks = {"clock_rate": 1_800_000, "memory_clock_rate": 8_001_000, "memory_bus_width": 384}
    found = device_of_properties(SimpleNamespace(name="NVIDIA RTX A6000", multi_processor_count=84, major=8, **clocks))
    assert found.bandwidth == pytest.approx(768e9, rel=0.01)
    assert found.flops_16 == pytest.approx(0.72 * 155e12, rel=0.05)
    silent = device_of_properties(SimpleNamespace(name="NVIDIA RTX A6000", multi_processor_count=84, major=8))
    assert 0.5e12 < silent.bandwidth < 1.5e12
    assert silent.sharing
    amd = SimpleNamespace(name="AMD Instinct MI210", multi_processor_count=104, gcnArchName="gfx90a", major=9)
    assert device_of_properties(amd).rate(2) > 1e14


@pytest.mark.parametrize("name", devices.DEVICES)
def test_a_rate_has_the_order_of_its_dtype(name: str):
    device = DEVICES[name]
    assert device.rate(2) > device.rate(4) > device.rate(8)


def test_a_plan_takes_the_device_at_hand(new: Device):
    from fused_kd import plan_chunks

    assert plan_chunks(8192, 128_256, 2048, 4096, device="X1000").modelled_seconds > 0
    assert plan_chunks(8192, 128_256, 2048, 4096, device=new).workspace_bytes <= 288e9 / 8


def test_a_name_that_only_begins_like_a_known_one_is_another():
    assert device_of_properties(properties("NVIDIA L40", major=8)).memory_gb == ()
