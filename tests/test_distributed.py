"""DDP and FSDP2: a step on two processes has the gradients of one process with the whole batch."""

import re
import time
from contextlib import nullcontext
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_kd import kd_loss, linear_kd_loss
from fused_kd.heads.products import RELEASE

from .oracle import relative_error

if not dist.is_available() or not dist.is_gloo_available():
    pytest.skip("PyTorch without gloo", allow_module_level=True)

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

WORLD, V, IGNORED = 2, 97, -100
TOLERANCE = 1e-5  # norm-relative, float32
TIME_LIMIT = 120  # seconds for all cases; a rank that waits for another one waits for ever


class LanguageModel(nn.Module):
    def __init__(self, width: int, tied: bool = False) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(V, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True)
        self.head = nn.Linear(width, V)
        if tied:
            self.head.weight = self.embeddings.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.layer(self.embeddings(ids))

    # The page's step speaks to a Hugging Face model.

    def model(self, ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=self(ids))

    def get_output_embeddings(self) -> nn.Linear:
        return self.head


class Distillation(nn.Module):
    """Student and teacher, the same on every rank."""

    def __init__(self, tied: bool = False, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = LanguageModel(16, tied)
        self.student.head.requires_grad_(not frozen)
        self.teacher = LanguageModel(24).requires_grad_(False)

    def forward(self, ids: Tensor, labels: Tensor, num_items: Tensor | None = None, reduction: str = "mean") -> Tensor:
        return self.loss(self.student(ids), ids, labels, num_items, reduction)

    def loss(
        self, hidden: Tensor, ids: Tensor, labels: Tensor, num_items: Tensor | None = None, reduction: str = "mean"
    ) -> Tensor:
        student, teacher = self.student.head, self.teacher.head
        with torch.no_grad():
            teacher_hidden = self.teacher(ids)
        return linear_kd_loss(
            hidden, student.weight, teacher_hidden, teacher.weight, labels,
            student_bias=student.bias, teacher_bias=teacher.bias, temperature=2.0,
            num_items=num_items, reduction=reduction, ignore_index=IGNORED,
        )  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    """Four sequences, of which 9, 2, 6 and 9 tokens count: other numbers on each rank and in each micro batch."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (4, 10), generator=generator)
    labels = ids.roll(-1, dims=1)
    labels[:, -1] = labels[1, 2:] = labels[2, :3] = IGNORED
    return ids, labels


class Case(NamedTuple):
    wrapper: str
    tied: bool = False
    frozen: bool = False
    reduction: str = "mean"
    micro_batches: int = 1
    own_mean: bool = False  # the mean over the rank's tokens: not the recipe


CASES = {
    "DDP": Case("DDP"),
    "DDP, tied": Case("DDP", tied=True),
    "DDP, frozen head": Case("DDP", frozen=True),
    "DDP, reduction none": Case("DDP", reduction="none"),
    "DDP, accumulation": Case("DDP", micro_batches=2),
    "DDP, loss outside": Case("DDP of the student"),
    "DDP, loss outside, tied": Case("DDP of the student", tied=True),
    "DDP, loss outside, frozen head": Case("DDP of the student", frozen=True),
    "DDP, loss outside, accumulation": Case("DDP of the student", micro_batches=2),
    "FSDP2": Case("FSDP2"),
    "FSDP2, tied": Case("FSDP2", tied=True),
    "FSDP2, frozen head": Case("FSDP2", frozen=True),
    "FSDP2, accumulation": Case("FSDP2", tied=True, micro_batches=2),
    # The weight that backward projects with once more has been freed after forward, and gathered again.
    "FSDP2, reduction none": Case("FSDP2 that reshards", reduction="none"),
    "FSDP2, reduction none, tied": Case("FSDP2 that reshards", tied=True, reduction="none"),
}
WRAPPERS = "DistributedDataParallel", "fully_shard"
OWN_MEANS = {name: Case(name, own_mean=True) for name in ("DDP", "FSDP2")}


def wrapped(model: Distillation, wrapper: str) -> nn.Module:
    if wrapper == "DDP":
        return DistributedDataParallel(model)
    if wrapper == "DDP of the student":
        return DistributedDataParallel(model.student)
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in (model.student, model.teacher):
        fully_shard(part.layer, mesh=mesh)
    return fully_shard(model, mesh=mesh, reshard_after_forward=wrapper == "FSDP2 that reshards")


def step(case: Case, rank: int) -> dict[str, Tensor | None]:
    """The loss and the student's gradients after a step on this rank's half of the batch."""
    ids, labels = (tensor.chunk(WORLD)[rank] for tensor in batch())
    count = (labels != IGNORED).sum()
    dist.all_reduce(count)
    num_items = None if case.own_mean else count / WORLD
    options = {"reduction": "none"} if case.reduction == "none" else {"num_items": num_items}
    model = Distillation(case.tied, case.frozen)
    outer = wrapped(model, case.wrapper)
    losses = []
    for i, micro_batch in enumerate(zip(*(x.chunk(case.micro_batches) for x in (ids, labels)), strict=True), start=1):
        last = i == case.micro_batches
        if isinstance(outer, FSDPModule):
            outer.set_requires_gradient_sync(last)
        with nullcontext() if last or isinstance(outer, FSDPModule) else outer.no_sync():
            if case.wrapper == "DDP of the student":
                loss = model.loss(outer(micro_batch[0]), *micro_batch, **options)
            else:
                loss = outer(*micro_batch, **options)
            if case.reduction == "none":
                loss = loss.sum() / num_items
            loss.backward()
        losses.append(loss.detach())
    return {"loss": torch.stack(losses).sum(), **gradients(model.student)}


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: gradient.full_tensor() if hasattr(gradient := parameter.grad, "full_tensor") else gradient
        for name, parameter in module.named_parameters()
    }


@cache
def one_process(tied: bool = False, frozen: bool = False) -> dict[str, Tensor | None]:
    """The loss and the gradients of the mean over the whole batch."""
    model = Distillation(tied, frozen)
    loss = model(*batch())
    loss.backward()
    return {"loss": loss.detach(), **gradients(model.student)}


def page_step(wrapper: str, ids: Tensor, labels: Tensor) -> dict[str, Tensor | None]:
    """Run the step that docs/several-gpus.md shows, as it stands there or with the wrapper that it names beside DDP."""
    page = (Path(__file__).parents[1] / "docs" / "several-gpus.md").read_text()
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "DistributedDataParallel(" in b)
    model = Distillation()
    model.student.head.bias = model.teacher.head.bias = None
    names = {
        "torch": torch, "student": model.student, "teacher": model.teacher, "input_ids": ids, "labels": labels,
        "optimizer": torch.optim.SGD(model.student.parameters(), lr=0.0),
        "fully_shard": partial(fully_shard, mesh=init_device_mesh("cpu", (dist.get_world_size(),))),
    }  # fmt: skip
    exec(block.replace("DistributedDataParallel(", f"{wrapper}("), names)
    return gradients(model.student)


def logits_sharded_over_the_vocabulary() -> dict[str, Tensor]:
    """The whole batch on both ranks, each with half of the head (tensor parallelism)."""
    model, (ids, labels) = Distillation(), batch()
    mesh = init_device_mesh("cpu", (WORLD,))
    hidden = distribute_tensor(model.student(ids).detach(), mesh, [Replicate()])
    weight, bias = (
        distribute_tensor(p.detach(), mesh, [Shard(0)]).requires_grad_() for p in model.student.head.parameters()
    )
    logits = hidden @ weight.T + bias
    assert logits.placements == (Shard(2),)
    teacher_logits = model.teacher.head(model.teacher(ids))
    kd_loss(logits.full_tensor(), teacher_logits, labels, temperature=2.0).backward()
    return {"head.weight": weight.grad.full_tensor(), "head.bias": bias.grad.full_tensor()}


def head_that_ddp_believes_unused(rank: int) -> str:
    model, (ids, labels) = Distillation(), (tensor.chunk(WORLD)[rank] for tensor in batch())
    outer = DistributedDataParallel(model.student, find_unused_parameters=True)
    with pytest.raises(RuntimeError) as error:
        model.loss(outer(ids), ids, labels).backward()
    return str(error.value)


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=WORLD,
        timeout=timedelta(seconds=TIME_LIMIT // 2),
    )  # fmt: skip
    results = {name: step(case, rank) for name, case in CASES.items()}
    results["own means"] = {name: step(case, rank) for name, case in OWN_MEANS.items()}
    half = [tensor.chunk(WORLD)[rank] for tensor in batch()]
    results["page"] = {wrapper: page_step(wrapper, *half) for wrapper in WRAPPERS}
    results["sharded logits"] = logits_sharded_over_the_vocabulary()
    results["unused head"] = head_that_ddp_believes_unused(rank)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    """Every case's results on each rank; one launch for all of them, since a process takes seconds to start."""
    folder = tmp_path_factory.mktemp("ranks")
    deadline = time.monotonic() + TIME_LIMIT
    processes = torch.multiprocessing.spawn(work, (folder,), nprocs=WORLD, join=False)
    try:
        while not processes.join(timeout=max(0.0, deadline - time.monotonic())):
            assert time.monotonic() < deadline, f"the ranks have not ended within {TIME_LIMIT} s"
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def skip_sums_of_fsdp(name: str) -> None:
    if RELEASE < (2, 9) and ("FSDP2" in name or "fully_shard" in name):
        pytest.skip(
            "FSDP2 of PyTorch 2.7 adds the gradients of CPU tensors over ranks, of any model, and takes no mean"
        )


def assert_same_gradients(ours: dict[str, Tensor | None], exact: dict[str, Tensor | None]) -> None:
    for name in exact.keys() - {"loss"}:
        if exact[name] is None:
            assert ours[name] is None, name
        else:
            assert relative_error(ours[name], exact[name].double()) < TOLERANCE, name


@pytest.mark.parametrize("name", CASES)
def test_step_is_that_of_one_process(ranks, name):
    skip_sums_of_fsdp(name)
    case = CASES[name]
    exact = one_process(case.tied, case.frozen)
    without = {name for name, gradient in exact.items() if gradient is None}
    assert without == ({"head.weight", "head.bias"} if case.frozen else set())
    for results in ranks:
        assert results[name].keys() == exact.keys()
        assert_same_gradients(results[name], exact)
    losses = torch.stack([results[name]["loss"] for results in ranks])
    assert relative_error(losses.mean(), exact["loss"].double()) < TOLERANCE


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_pages_step_on_two_processes_is_that_on_one(ranks, process_group, wrapper):
    skip_sums_of_fsdp(wrapper)
    exact = page_step(wrapper, *batch())
    for results in ranks:
        assert_same_gradients(results["page"][wrapper], exact)


@pytest.mark.parametrize("wrapper", OWN_MEANS)
def test_each_rank_s_own_mean_is_another_step(ranks, wrapper):
    """Without num_items a token of a rank with few of them weighs more; so the cases above can tell."""
    exact = one_process()
    own = ranks[0]["own means"][wrapper]
    assert all(relative_error(own[name], exact[name].double()) > 0.02 for name in exact.keys() - {"loss"})


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_of_one_process_add_up(tied, micro_batches):
    model, (ids, labels) = Distillation(tied), batch()
    num_items = (labels != IGNORED).sum()
    for micro_batch in zip(ids.chunk(micro_batches), labels.chunk(micro_batches), strict=True):
        model(*micro_batch, num_items).backward()
    assert_same_gradients(gradients(model.student), one_process(tied))


def test_full_tensor_of_sharded_logits_is_right(ranks):
    """Follow the advice that the error about a DTensor gives for logits."""
    exact = one_process()
    for results in ranks:
        for name, gradient in results["sharded logits"].items():
            assert relative_error(gradient, exact[name].double()) < TOLERANCE, name


def test_ddp_refuses_a_head_that_its_forward_has_not_used(ranks):
    """find_unused_parameters=True, the loss outside and a head of its own: an error, not a wrong gradient."""
    for results in ranks:
        assert "Use of a module parameter outside the `forward` function" in results["unused head"]


# --- a DTensor, sharded or not, is refused

H, W, Y = torch.randn(2, 3, 4), torch.randn(10, 4), torch.zeros(2, 3, dtype=torch.int64)
ROWS = {"labels": Y, "token_weights": torch.ones(2, 3), "alpha": torch.full((2, 3), 0.5)}
LOGITS = {"student_logits": H @ W.T, "teacher_logits": H @ W.T, **ROWS}
HEADS = {
    "student_hidden": H, "student_weight": W, "student_bias": W[:, 0],
    "teacher_hidden": H, "teacher_weight": W, "teacher_bias": W[:, 0], **ROWS,
}  # fmt: skip
FULL = r"pass its full_tensor\(\)"
INSIDE = "compute the loss inside the forward of the module that fully_shard wraps, where its parameters are whole"


def refused(name: str, remedy: str, placement: str = r"Shard\(dim=0\)"):
    message = rf"{name}: expected a plain tensor, got a DTensor with placements \({placement},\); {remedy}"
    return pytest.raises(TypeError, match=message)


@pytest.mark.parametrize(
    ("loss", "name"),
    [*((kd_loss, name) for name in LOGITS), *((linear_kd_loss, name) for name in HEADS)],
)
@pytest.mark.parametrize(("placement", "text"), [(Shard(0), r"Shard\(dim=0\)"), (Replicate(), r"Replicate\(\)")])
def test_dtensor_is_refused(process_group, loss, name, placement, text):
    arguments = LOGITS if loss is kd_loss else HEADS
    given = distribute_tensor(arguments[name], init_device_mesh("cpu", (1,)), [placement])
    with refused(name, INSIDE if name in ("student_weight", "student_bias") else FULL, text):
        loss(**arguments | {name: given})


def test_dtensor_is_refused_under_the_compiler(process_group):
    torch._dynamo.reset()
    given = distribute_tensor(LOGITS["student_logits"], init_device_mesh("cpu", (1,)), [Shard(0)])
    with refused("student_logits", FULL):
        torch.compile(kd_loss, backend="eager")(**LOGITS | {"student_logits": given})


def test_head_that_fully_shard_has_sharded_again_is_refused(process_group):
    if RELEASE < (2, 9):
        pytest.skip(
            "FSDP2 of PyTorch 2.7 leaves the outermost module whole after its forward, whatever it is asked for"
        )
    model, (ids, labels) = Distillation(), batch()
    sharded = fully_shard(model.student, mesh=init_device_mesh("cpu", (1,)), reshard_after_forward=True)
    hidden = sharded(ids)
    with refused("student_weight", INSIDE):
        model.loss(hidden, ids, labels)


def test_head_with_a_fully_shard_of_its_own_is_refused(process_group):
    model, mesh = Distillation(), init_device_mesh("cpu", (1,))
    fully_shard(model.student.head, mesh=mesh)
    sharded = fully_shard(model, mesh=mesh)
    with refused("student_weight", INSIDE):
        sharded(*batch())
