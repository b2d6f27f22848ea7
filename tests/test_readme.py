"""The examples of the README run as they are written."""

import doctest
import re
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def model(width: int):
    torch.manual_seed(width)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=300, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=width == 16,
        )
    )  # fmt: skip


def test_training_steps_run_and_agree(process_group):
    steps = [block for block in BLOCKS if "loss.backward()" in block]
    assert len(steps) == 3  # from hidden states, from logits, under DDP
    losses, gradients = [], []
    for step in steps:
        student, teacher = model(16), model(32)
        names = {
            "torch": torch, "student": student, "teacher": teacher, "input_ids": torch.randint(300, (2, 7)),
            "optimizer": torch.optim.SGD(student.parameters(), lr=0.0),
        }  # fmt: skip
        torch.manual_seed(0)
        names["input_ids"] = torch.randint(300, (2, 7))
        names["labels"] = names["input_ids"]
        exec(step, names)
        losses.append(names["loss"].item())
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in student.parameters()]))
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-6)
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-7)


def test_examples_print_what_they_show():
    examples = doctest.DocTestParser().get_doctest("\n".join(b for b in BLOCKS if ">>>" in b), {}, "README", None, 0)
    assert doctest.DocTestRunner().run(examples).failed == 0
