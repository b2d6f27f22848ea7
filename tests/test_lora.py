"""student_lora in linear_kd_loss: a low-rank adapter of the student's head, with gradients of its own."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fused_kd.heads.operator as operator
from fused_kd import LinearKDLoss, linear_kd_loss, plan_chunks, reference
from fused_kd.testing import memory

from .heads import CHUNKED, F_S, F_T, H_S, Given, N, V, make
from .oracle import EPSILON, relative_error
from .unread import unread

pytestmark = pytest.mark.usefixtures("one_thread")

R, SCALE = 4, 0.5
NAMES = "hidden", "weight", "bias", "A", "B"


def adapter(given: Given, dtype=None, rank=R) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B, whose part of the logits is about as large as the head's own."""
    dtype = dtype or given.hidden.dtype
    shapes = (rank, given.hidden.shape[-1]), (given.weight.shape[0], rank)
    A, B = (torch.randn(shape, device=given.hidden.device) for shape in shapes)
    return tuple((2 * tensor).to(dtype).requires_grad_() for tensor in (A, B))


def run(loss, given: Given, lora, scale=SCALE, upstream=1.0, trained=NAMES, **options) -> dict[str, torch.Tensor]:
    """The value and the gradients of what is trained, with the upstream gradients 1, 2, ... of reduction "none"."""
    leaves = dict(zip(NAMES, (given.hidden, given.weight, given.bias, *lora), strict=True))
    leaves = {name: leaf.detach().clone().requires_grad_(name in trained) for name, leaf in leaves.items()}
    hidden, weight, bias, A, B = leaves.values()
    value = loss(hidden, weight, *given[2:5], student_bias=bias, student_lora=(A, B, scale), **options)
    ramp = torch.arange(1, value.numel() + 1, device=value.device, dtype=value.dtype).reshape(value.shape)
    value.backward(upstream * ramp)
    assert all((leaf.grad is not None) == (name in trained) for name, leaf in leaves.items())
    gradients = {name: leaf.grad for name, leaf in leaves.items() if name in trained}
    assert all(gradients[name].dtype == leaves[name].dtype for name in gradients)
    return {"value": value.detach(), **gradients}


def in_float64(given: Given, lora) -> tuple[Given, tuple[torch.Tensor, ...]]:
    return given.to(torch.float64), tuple(tensor.detach().double() for tensor in lora)


def assert_matches_oracle(given: Given, lora, floor=4 * EPSILON, **options) -> None:
    """Every result within twice the error of eager in the same dtypes, or `floor`, of the float64 oracle.

    Rounding in the adapter's two products may cancel in eager's mean by chance.  In its row losses it cannot.
    """
    ours = run(linear_kd_loss, given, lora, **options)
    for name in ("workspace_bytes", "compact", "counted_rows"):
        options.pop(name, None)
    eager, rows = (run(reference.linear_kd_loss, given, lora, **options | own) for own in ({}, {"reduction": "none"}))
    double = in_float64(given, lora)
    exact_rows = run(reference.linear_kd_loss, *double, **options | {"reduction": "none"})["value"]
    for name, exact in run(reference.linear_kd_loss, *double, **options).items():
        assert exact.norm() > 0, name
        bound = max(2 * relative_error(eager[name], exact), floor)
        if name == "value":
            bound = max(bound, relative_error(rows[name], exact_rows))
        assert relative_error(ours[name], exact) <= bound, name


# --- values and gradients


@pytest.mark.parametrize(
    ("alpha", "reduction"), [(0.0, "mean"), (0.3, "sum"), (1.0, "mean"), (0.3, "none"), (1.0, "none")]
)
def test_matches_the_oracle(device, alpha, reduction):
    given = make(device)
    options = {"alpha": alpha, "temperature": 2.0, "reduction": reduction, "workspace_bytes": CHUNKED}
    assert_matches_oracle(given, adapter(given), upstream=3.0, **options)


@pytest.mark.parametrize(
    "trained",
    [("A", "B"), ("A",), ("B",), ("hidden",), ("hidden", "A"), ("hidden", "B"), ("weight", "A"), ("bias", "B")],
    ids="-".join,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_requires_grad_gets_a_gradient(trained, reduction):
    given = make("cpu")
    options = {"workspace_bytes": CHUNKED, "reduction": reduction}
    assert_matches_oracle(given, adapter(given), trained=trained, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("own", "trained"),  # None: A and B in the dtype of the head
    [(torch.float32, ("hidden", "A", "B")), (None, NAMES)],
    ids=["float32-frozen", "16-bit-trained"],
)
def test_a_16_bit_head(device, dtype, own, trained):
    given = make(device, dtype)
    assert_matches_oracle(given, adapter(given, own), trained=trained, workspace_bytes=CHUNKED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_float32_head_beside_a_16_bit_adapter(device, dtype):
    """A float16 adapter must not lose its gradient below 6e-8 before the loss scale comes."""
    given = make(device)
    options = {"num_items": 2**24, "upstream": 2.0**24, "trained": ("A", "B")}
    assert_matches_oracle(given, adapter(given, dtype), **options)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_under_autocast(device, reduction):
    given = make(device)
    lora = adapter(given)
    with torch.autocast(device.type, torch.bfloat16):
        assert_matches_oracle(given, lora, temperature=2.0, reduction=reduction, workspace_bytes=CHUNKED)


@pytest.mark.parametrize("scale", [0, -1.5, 2])
def test_any_scale(device, scale):
    given = make(device)
    lora = adapter(given)
    ours = run(linear_kd_loss, given, lora, scale=scale)
    exact = run(reference.linear_kd_loss, *in_float64(given, lora), scale=scale)
    for name in exact:
        if scale == 0 and name in ("A", "B"):
            assert not ours[name].any()
        else:
            assert relative_error(ours[name], exact[name]) < 1e-6, name


def test_of_rank_0_or_scale_0_nothing_is_added(device):
    given = make(device)
    own = linear_kd_loss(*given[:5], student_bias=given.bias)
    for rank, scale in ((0, 1.0), (R, 0.0)):
        lora = (*adapter(given, rank=rank), scale)
        assert torch.equal(own, linear_kd_loss(*given[:5], student_bias=given.bias, student_lora=lora))


# --- plans


def plans(monkeypatch, chunk: int, group: int) -> list:
    """Chunks and groups of these lengths, whatever is planned; the plans that were asked for."""
    asked = []
    own = operator.planned

    def planned(*arguments):
        asked.append(own(*arguments))
        count = arguments[0].shape[0]
        chunks = sum(-(-min(group, count - first) // chunk) for first in range(0, count, group))
        return dataclasses.replace(asked[-1], chunk_rows=chunk, gradient_rows=group, chunks=chunks)

    monkeypatch.setattr(operator, "planned", planned)
    return asked


@pytest.mark.parametrize(("chunk", "group"), [(4, 8), (4, 4), (7, N), (N, N)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_chunks_and_groups(monkeypatch, chunk, group, dtype):
    asked = plans(monkeypatch, chunk, group)
    given = make("cpu", dtype)
    for reduction in ("mean", "none"):
        assert_matches_oracle(given, adapter(given, torch.float32), temperature=2.0, reduction=reduction)
    assert asked


def test_groups_of_chunks_on_every_device(device, monkeypatch):
    plans(monkeypatch, 4, 8)
    given = make(device, torch.bfloat16)
    assert_matches_oracle(given, adapter(given, torch.float32), temperature=2.0)


# --- rows and columns


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("way", ["gathered", "projected", "unread", "bounded"])
def test_an_ignored_row_may_hold_anything(device, reduction, way):
    given = make(device, shape=(2, 5))
    given.labels[0, 1] = given.labels[1, 4] = -100
    lora, options = adapter(given), {"reduction": reduction, "workspace_bytes": CHUNKED}
    clean = run(linear_kd_loss, given, lora, **options)
    with torch.no_grad():
        given.hidden[0, 1] = given.teacher_hidden[0, 1] = torch.nan
        given.hidden[1, 4] = torch.inf
    if way in ("unread", "bounded"):
        given = given._replace(labels=unread(given.labels))
    options |= {"projected": {"compact": False}, "bounded": {"counted_rows": 9}}.get(way, {})
    dirty = run(linear_kd_loss, given, lora, **options)
    assert not dirty["hidden"][0, 1].any()
    assert not dirty["hidden"][1, 4].any()
    for name in clean:
        assert relative_error(dirty[name], clean[name].double()) < 1e-6, name


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vocab_size_leaves_out_the_padding(device, reduction):
    given = make(device)
    given.labels.remainder_(1000)
    A, B = adapter(given)
    with torch.no_grad():
        given.weight[1000:], given.bias[1000:], given.teacher_weight[1000:], B[1000:] = (
            1e3,
            torch.nan,
            torch.inf,
            torch.nan,
        )
    ours = run(linear_kd_loss, given, (A, B), vocab_size=1000, reduction=reduction, workspace_bytes=CHUNKED)
    clean = Given(given.hidden, given.weight[:1000], given.teacher_hidden, given.teacher_weight[:1000], given.labels,
                  given.bias[:1000])  # fmt: skip
    exact = run(reference.linear_kd_loss, *in_float64(clean, (A, B[:1000])), reduction=reduction)
    for name, expected in exact.items():
        found = ours[name][:1000] if name in ("weight", "bias", "B") else ours[name]
        assert relative_error(found, expected) < 1e-6, name
    assert not ours["B"][1000:].any()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_row_counts(device, reduction):
    given = make(device)
    given.labels.fill_(-100)
    for name, result in run(linear_kd_loss, given, adapter(given), reduction=reduction).items():
        assert not result.any(), name


def test_a_label_that_cannot_be_raised_gives_nan():
    given = make("cpu")
    lora = adapter(given)
    given.labels[1] = V
    found = run(linear_kd_loss, given._replace(labels=unread(given.labels)), lora)
    assert found["value"].isnan()
    assert all(found[name].isnan().any() for name in ("A", "B"))


def test_shift_and_token_weights(device):
    given = make(device, shape=(2, 7))
    options = {"shift": True, "token_weights": torch.linspace(0, 1, 14, device=device).view(2, 7), "logit_softcap": 8.0}
    assert_matches_oracle(given, adapter(given), workspace_bytes=CHUNKED, **options)


# --- what it costs


def test_products_are_those_of_the_head_and_of_the_adapter():
    """Three for the student's head and one for the teacher's; for the adapter three with B and three with A."""
    given = make("cpu")
    lora = adapter(given)
    with FlopCounterMode(display=False) as counter:
        run(linear_kd_loss, given, lora)
    of_adapter = 3 * 2 * N * R * (V + H_S)
    assert counter.get_total_flops() == 3 * F_S + F_T + of_adapter
    with FlopCounterMode(display=False) as counter:
        run(linear_kd_loss, given, lora, trained=("A", "B"))  # neither the hidden states nor the head get a gradient
    assert counter.get_total_flops() == F_S + F_T + of_adapter - 2 * N * R * H_S


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_the_size_of_the_weight_is_made(small_blocks, dtype):
    """A frozen head with an adapter takes no [V, H] array, which `weight + scale B A` takes twice."""
    vocabulary, width, rows, rank = 2048, 512, 8, 2
    weight, hidden = (
        torch.randn(vocabulary, width, dtype=dtype),
        torch.randn(rows, width, dtype=dtype, requires_grad=True),
    )
    A, B = (torch.randn(shape, requires_grad=True) for shape in ((rank, width), (vocabulary, rank)))
    labels = torch.randint(vocabulary, (rows,))

    def step() -> None:
        linear_kd_loss(hidden, weight, hidden.detach(), weight, labels, student_lora=(A, B, 0.5)).backward()

    taken = memory.peak_bytes(step, torch.device("cpu"))
    plan = plan_chunks(rows, vocabulary, width, width, dtype=dtype, weight_grad=False, lora_rank=rank)
    assert taken < weight.nbytes / 2
    assert taken <= 1.1 * plan.peak_bytes + small_blocks + 4 * (A.nbytes + hidden.numel() * 4)


# --- around PyTorch


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_to_one_graph(reduction):
    given = make("cpu")
    lora = adapter(given, torch.float32)
    compiled = torch.compile(linear_kd_loss, fullgraph=True, backend="aot_eager")
    plain, traced = (run(loss, given, lora, reduction=reduction) for loss in (linear_kd_loss, compiled))
    for name in plain:
        assert relative_error(traced[name], plain[name].double()) < 1e-6, name


def test_the_module_takes_it():
    given = make("cpu")
    lora = (*adapter(given), SCALE)
    module = LinearKDLoss(temperature=2.0)
    assert torch.equal(
        module(*given[:5], student_lora=lora), linear_kd_loss(*given[:5], student_lora=lora, temperature=2.0)
    )
    assert not list(module.parameters())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transforms(reduction):
    given = make("cpu")
    A, B = adapter(given)

    def loss(A, B):
        return linear_kd_loss(*given[:5], student_lora=(A, B, SCALE), reduction=reduction).sum()

    found = torch.func.grad(loss, argnums=(0, 1))(A.detach(), B.detach())
    expected = torch.autograd.grad(loss(A, B), (A, B))
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b.double()) < 1e-6


def test_repeated_and_second_backward():
    given = make("cpu")
    A, B = adapter(given)
    loss = linear_kd_loss(*given[:5], student_lora=(A, B, SCALE))
    once, again = (torch.autograd.grad(2 * loss, (A, B), retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, once, again))
    (gradient,) = torch.autograd.grad(loss, A, create_graph=True)
    with pytest.raises(RuntimeError, match=r"second|derivative"):
        gradient.sum().backward()


def test_beside_the_sum_of_the_weights_gradient_and_a_teacher_that_learns():
    given = make("cpu")
    lora = adapter(given)
    total = torch.ones(V, H_S)
    expected = run(linear_kd_loss, given, lora)
    found = run(linear_kd_loss, given, lora, trained=("hidden", "A", "B"), weight_grad_out=total)
    assert relative_error(total - 1, expected["weight"].double()) < 1e-5
    teacher = given.teacher_hidden.clone().requires_grad_()
    learning = run(linear_kd_loss, given._replace(teacher_hidden=teacher), lora, teacher_grad=True)
    for name in ("hidden", "A", "B"):
        assert relative_error(found[name], expected[name].double()) < 1e-6, name
        assert relative_error(learning[name], expected[name].double()) < 4e-6, name
    others = []
    for own, own_lora in ((given, lora), in_float64(given, lora)):
        hidden = own.teacher_hidden.detach().clone().requires_grad_()
        run(reference.linear_kd_loss, own._replace(teacher_hidden=hidden), own_lora, teacher_grad=True)
        others.append(hidden.grad)
    eager, exact = others
    assert relative_error(teacher.grad, exact) <= max(2 * relative_error(eager, exact), 4 * EPSILON)


# --- errors


@pytest.mark.parametrize(
    ("error", "given_lora", "message"),
    [
        (TypeError, lambda A, B: A, r"student_lora: expected \(A, B, scale\), got a tensor"),
        (TypeError, lambda A, B: (A, B), r"student_lora: expected \(A, B, scale\), got \("),
        (TypeError, lambda A, B: (A, None, 1.0), "student_lora: B: expected a tensor, got None"),
        (TypeError, lambda A, B: (A.long(), B, 1.0), "student_lora: A: expected dtype float32, .*got torch.int64"),
        (ValueError, lambda A, B: (B, A, 1.0), rf"expected A of shape \(r, {H_S}\) and B of shape \({V}, r\), got"),
        (ValueError, lambda A, B: (A.T, B, 1.0), "student_lora: expected A of shape"),
        (ValueError, lambda A, B: (A, B[:-1], 1.0), "student_lora: expected A of shape"),
        (ValueError, lambda A, B: (A[:1], B, 1.0), "student_lora: expected A of shape"),
        (ValueError, lambda A, B: (A[0], B, 1.0), "student_lora: expected A of shape"),
        (
            TypeError,
            lambda A, B: (A, B, torch.ones(())),
            "student_lora: expected a finite number as the scale, got a ten",
        ),
        (TypeError, lambda A, B: (A, B, True), "student_lora: expected a finite number as the scale, got True"),
        (TypeError, lambda A, B: (A, B, float("nan")), "student_lora: expected a finite number as the scale, got nan"),
        (ValueError, lambda A, B: (A.to("meta"), B, 1.0), "student_lora: A: expected a tensor on the student's device"),
    ],
)
def test_errors(error, given_lora, message):
    given = make("cpu")
    with pytest.raises(error, match=message):
        linear_kd_loss(*given[:5], student_lora=given_lora(*adapter(given)))


def test_it_is_an_adapter_of_a_weight():
    given = make("cpu")
    lora = (*adapter(given), 1.0)
    with pytest.raises(ValueError, match="student_lora: expected None with student_head"):
        linear_kd_loss(given.hidden, None, *given[2:5], student_head=lambda hidden: hidden, student_lora=lora)


def test_the_formula_is_that_of_peft():
    """PEFT's Linear with its adapter, in training and in evaluation, and the names that it has for the three parts."""
    peft = pytest.importorskip("peft")
    given = make("cpu")
    head = torch.nn.Linear(H_S, V)
    model = peft.get_peft_model(torch.nn.Sequential(head), peft.LoraConfig(r=R, lora_alpha=6, target_modules=["0"]))
    layer = model.base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(B)
    lora = A, B, layer.scaling["default"]
    ours = linear_kd_loss(
        given.hidden, head.weight, *given[2:5], student_bias=head.bias, student_lora=lora, temperature=2.0
    )
    theirs = reference.linear_kd_loss(
        given.hidden, None, *given[2:5], student_head=layer, vocab_size=V, temperature=2.0
    )
    found, expected = (torch.autograd.grad(loss, (given.hidden, A, B)) for loss in (ours, theirs))
    assert relative_error(ours, theirs.detach().double()) < 1e-6
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b.double()) < 2e-6
