"""The backends of the tests: CPU operators and Triton kernels, which are interpreted, or compiled on a CUDA device.

Triton decides at import whether its kernels are interpreted, and the operators decide at each call.  So the kernels are
imported here under TRITON_INTERPRET=1, and each test chooses its backend.
"""

import os
from collections.abc import Iterator

# Workers that each take every core wait for one another; the processes that they start too.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

HAS_CUDA = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
import fused_kd.backends.triton  # noqa: E402, F401
from fused_kd.divergences import base  # noqa: E402
from fused_kd.launching import ONE, TWO  # noqa: E402
from fused_kd.testing import interpreter, launching  # noqa: E402
from fused_kd.testing.blocks import blocks_of  # noqa: E402

from . import custom  # noqa: E402, F401  # a divergence with kernels of its own

interpreter.hasten()

os.environ.pop("TRITON_INTERPRET", None)

# Drawn cases are the same in every run; --hypothesis-profile=thorough draws others, and many more.
_PATIENT = {
    "deadline": None,  # a test that takes `device` runs all its cases on that one device
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("ci", max_examples=100, derandomize=True, **_PATIENT)
settings.register_profile("thorough", max_examples=3000, **_PATIENT)
settings.load_profile("ci")

KERNELS = "cuda" if HAS_CUDA else "interpreter"


@pytest.fixture(autouse=True)
def _forgotten_divergences() -> Iterator[None]:
    """Forget the divergences that a test defines, which would take the place of others of their name."""
    tables = [(table, dict(table)) for table in (base.DIVERGENCES, base._instances)]
    yield
    for table, before in tables:
        table.clear()
        table.update(before)


# Coverage doubles the time of a test.  It is not measured where others run the same lines: in these, and in interpreted
# kernels but for those of tests/kernels.
UNMEASURED = (
    "test_compile", "test_determinism", "test_examples", "test_extreme_values", "test_fuzz", "test_model_shapes",
    "test_setups",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests of which coverage is not measured, and those whose tensors are on a GPU here (`pytest -m gpu`)."""
    for item in items:
        given = getattr(item, "callspec", None)
        device = str(given.params.get("device", "cpu")) if given else "cpu"
        of_kernels = "kernel_device" in getattr(item, "fixturenames", ()) or device != "cpu"
        if item.path.stem in UNMEASURED or (of_kernels and item.path.parent.name != "kernels"):
            item.add_marker("no_cover")
        if of_kernels and HAS_CUDA:
            item.add_marker("gpu")


@pytest.fixture(params=["cpu", f"{KERNELS}-{TWO}", f"{KERNELS}-{ONE}"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The device of the tensors; the CPU operators and the kernels, both ways, get every test that takes it."""
    backend, *plan = request.param.split("-", 1)
    if backend == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    with launching(*plan):
        yield torch.device("cuda" if backend == "cuda" else "cpu")


@pytest.fixture
def kernel_device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of the tensors where only the kernels are meant."""
    if KERNELS == "interpreter":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return torch.device("cuda" if HAS_CUDA else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """A group of this process alone.  One for many tests: with PyTorch 2.7 its end may wait for ever."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("PyTorch without gloo")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from threads, and wait for them where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """For measured memory: what a CPU alone takes, in blocks of 128 KB, here a few rows; gives the bytes of five.

    PyTorch's own products take none.  Those of oneDNN take, on a CPU without instructions for bfloat16, float32 copies,
    twice a bfloat16 result's size.
    """
    elements = 2**15
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    with blocks_of(elements):
        yield 5 * elements * 4
