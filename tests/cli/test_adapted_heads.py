"""Heads of Hugging Face models that are no bare nn.Linear: adapters of PEFT, and quantised ones."""

import pytest
import torch
from torch import nn

from fused_kd import reference
from tests.oracle import relative_error

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
huggingface = pytest.importorskip("fused_kd.integrations.huggingface")

V = 256
KINDS = (
    "lora",
    "lora beside body",
    "modules_to_save",
    "merged",
    "disabled",
    "two, one active",
    "active elsewhere",
    "float32 beside bfloat16",
)
TOKENS = torch.arange(32).view(2, 16) * 7 % V


def llama(width=32, **options):
    torch.manual_seed(width)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, initializer_range=0.3, **options,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def adapted(kind="lora", model=None, **options):
    """A model with an adapter on its head that changes its logits."""
    model = model or llama()
    if kind == "float32 beside bfloat16":
        model.bfloat16()
    targets = ["lm_head", "q_proj"] if kind == "lora beside body" else ["lm_head"]
    if kind == "modules_to_save":
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **options)
    else:
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, **options)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=kind == "float32 beside bfloat16")
    if kind == "two, one active":
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=targets))
    if kind == "active elsewhere":
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    if kind in ("two, one active", "active elsewhere"):
        model.set_adapter("second")
    if kind == "merged":
        model.merge_adapter()
    if kind == "disabled":
        model.base_model.disable_adapter_layers()
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrapped", [True, False])
def test_the_loss_and_gradients_of_the_models_own_logits(kind, wrapped):
    model = adapted(kind)
    teacher = huggingface.split(adapted("lora beside body", llama(64)).get_base_model(), TOKENS)
    student = huggingface.split(model if wrapped else model.get_base_model(), TOKENS)
    assert None not in (student.head, teacher.head)
    with torch.no_grad():
        teacher_hidden = teacher.body(TOKENS)
        teacher_logits = teacher.model(TOKENS).logits
    options = {"temperature": 2.0, "shift": True}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ours = huggingface.linear_loss(student, teacher, student.body(TOKENS), teacher_hidden, TOKENS, **options).loss
    own = reference.kd_loss(model(TOKENS).logits, teacher_logits, TOKENS, **options)
    error = 1e-2 if kind == "float32 beside bfloat16" else 1e-5
    assert relative_error(ours, own.detach().double()) < error
    if kind in ("merged", "disabled"):
        return
    found, expected = (torch.autograd.grad(loss, trained) for loss in (ours, own))
    for a, b in zip(found, expected, strict=True):
        assert b.any()
        assert relative_error(a, b.double()) < (5e-2 if kind == "float32 beside bfloat16" else 1e-5)


def test_the_arguments_are_tensors_of_the_model():
    model = adapted()
    layer = model.get_base_model().lm_head
    found = huggingface.student_arguments(layer)
    A, B, scale = found["student_lora"]
    assert found["student_weight"] is layer.base_layer.weight
    assert (A is layer.lora_A["default"].weight, B is layer.lora_B["default"].weight, scale) == (True, True, 1.5)
    assert huggingface.teacher_arguments(layer) == {"teacher_weight": None, "teacher_head": layer}
    kept = adapted("modules_to_save").get_base_model().lm_head
    for side, arguments in (("student", huggingface.student_arguments), ("teacher", huggingface.teacher_arguments)):
        assert arguments(kept)[f"{side}_weight"] is kept.modules_to_save["default"].weight
    kept.enable_adapters(False)
    assert huggingface.student_arguments(kept)["student_weight"] is kept.original_module.weight


class Widened(nn.Linear):
    """A head of int8 numbers, like those of quantisation libraries: its `weight` is not what it multiplies by."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__(head.in_features, head.out_features, bias=False)
        self.scale = head.weight.detach().abs().amax() / 127
        stored = (head.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = nn.Parameter(stored, requires_grad=False)

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight * self.scale)


def quantised():
    model = llama()
    model.lm_head = Widened(model.lm_head)
    return huggingface.split(model, TOKENS)


@pytest.mark.parametrize("side", ["student", "teacher", "both", "alone"])
def test_a_quantised_head(side):
    student = huggingface.split(llama(), TOKENS) if side == "teacher" else quantised()
    teacher = huggingface.split(llama(64), TOKENS) if side == "student" else quantised()
    hidden, teacher_hidden = student.body(TOKENS), teacher.body(TOKENS).detach()
    options = {"alpha": 0.0, "vocab_size": V} if side == "alone" else {"vocab_size": V}
    given = (student, None, hidden, None) if side == "alone" else (student, teacher, hidden, teacher_hidden)
    losses = [huggingface.LOSSES[kind](*given, TOKENS, **options).loss for kind in ("linear", "eager")]
    assert relative_error(losses[0], losses[1].detach().double()) < 1e-5
    norm = student.model.model.norm.weight
    gradients = [torch.autograd.grad(loss, norm, retain_graph=True)[0] for loss in losses]
    assert relative_error(gradients[0], gradients[1].double()) < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "got DoRA or another variant"),
        ({"lora_bias": True}, r"got a bias \(lora_bias=True\)"),
        ({"lora_dropout": 0.1}, "got dropout of 0.1 in training mode; take lora_dropout=0 for the head"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_adapters_that_are_more_than_two_products(options, message):
    model = adapted(**options)
    student = huggingface.split(model, TOKENS)
    hidden = student.body(TOKENS)
    with pytest.raises(ValueError, match=f"the student's head: expected a single plain LoRA adapter, {message}"):
        huggingface.linear_loss(student.train(), None, hidden, None, TOKENS, alpha=0.0)
    student.eval()
    teacher = huggingface.linear_loss(
        huggingface.split(llama(), TOKENS), student, hidden, hidden, TOKENS
    )  # as a teacher
    logits = model(TOKENS).logits
    own = reference.kd_loss(llama().lm_head(hidden), logits, TOKENS)
    assert relative_error(teacher.loss, own.detach().double()) < 1e-5
    if "lora_dropout" in options:  # in evaluation there is none
        own = reference.kd_loss(logits, None, TOKENS, alpha=0.0)
        assert relative_error(huggingface.linear_loss(student, None, hidden, None, TOKENS, alpha=0.0).loss, own) < 1e-5


def test_several_adapters_and_other_kinds():
    model = adapted("two, one active")
    layer = model.get_base_model().lm_head
    layer.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="got several active ones, default, second; activate one"):
        huggingface.student_arguments(layer)
    merged = adapted("merged")
    merged.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match="got a merged adapter that is disabled; unmerge it"):
        huggingface.student_arguments(merged.get_base_model().lm_head)
    other = peft.get_peft_model(llama(), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(
        ValueError,
        match=r"expected nn.Linear, alone or with a LoRA adapter, .* got peft.tuners.ia3.layer.Linear; freeze it",
    ):
        huggingface.student_arguments(other.get_base_model().lm_head)
    other.requires_grad_(False)
    head = other.get_base_model().lm_head
    assert huggingface.student_arguments(head) == {"student_weight": None, "student_head": head}


def test_a_layer_with_a_forward_of_its_own_is_called():
    """A float8 layer is one, though its weight has a floating dtype."""

    class Doubled(nn.Linear):
        def forward(self, hidden):
            return 2 * super().forward(hidden)

    model = llama()
    head = Doubled(32, V, bias=False).requires_grad_(False)
    model.set_output_embeddings(head)
    student = huggingface.split(model, TOKENS)
    assert student.head is head
    assert huggingface.student_arguments(head) == {"student_weight": None, "student_head": head}
    assert huggingface.teacher_arguments(head) == {"teacher_weight": None, "teacher_head": head}
    hidden = student.body(TOKENS)
    ours = huggingface.linear_loss(student, None, hidden, None, TOKENS, alpha=0.0, vocab_size=V).loss
    own = reference.kd_loss(model(TOKENS).logits, None, TOKENS, alpha=0.0)
    assert relative_error(ours, own.detach().double()) < 1e-5
    with pytest.raises(ValueError, match="vocab_size: expected the number of columns, since no head has a weight"):
        huggingface.linear_loss(student, None, hidden, None, TOKENS, alpha=0.0)
