"""linear_kd_loss beside its peers: forward, backward and both, at the shapes of models; and its memory.

    pytest benchmarks/test_linear_kd_loss.py --benchmark-columns=median,iqr --benchmark-group-by=group

A peer that cannot run here is skipped with the reason; one that is not what it says it is fails.
"""

import pytest
import torch

from fused_kd import linear_kd_loss
from fused_kd.testing import problems, shapes
from fused_kd.testing.memory import peak_bytes

from .conftest import DEVICE, DTYPE, cases


@cases([shape for shape in shapes.model_shapes(DEVICE, DTYPE) if shape.inputs == "hidden"])
def test_pass(time_case, case):
    time_case(case)


@pytest.mark.parametrize(("trained", "bound"), [(True, 1.1e9), (False, 0.3e9)])
def test_memory(trained, bound):
    """Beyond inputs and gradients, 2 048 tokens of Gemma 3, bfloat16; about a minute each on a CPU."""
    shape = shapes.Shape(
        "models", *shapes.PAIRS["gemma3"][:1], "hidden", 2048, *shapes.PAIRS["gemma3"][1:], torch.bfloat16
    )
    inputs = problems.make(shape, DEVICE)
    inputs.student[1].requires_grad_(trained)

    def step():
        linear_kd_loss(*inputs.student, *inputs.teacher, inputs.labels, temperature=2.0).backward()

    peak = peak_bytes(step, DEVICE)
    beyond = peak - sum(leaf.grad.nbytes for leaf in inputs.student if leaf.grad is not None)
    print(f"{'trained' if trained else 'frozen'} head: {beyond / 1e6:.0f} MB beyond inputs and gradients")
    assert beyond <= bound
