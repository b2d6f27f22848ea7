"""The bare products of a step from hidden states: what the time of the step is compared with."""

from collections.abc import Callable

import torch

from fused_kd.testing.problems import Inputs


def bare_products(inputs: Inputs, trained: bool, *, new_gradients: bool = False) -> Callable[[], None]:
    """Return the products that a step cannot do without, each in one call, of logits that are there as a whole.

    They write to memory that is there.  With `new_gradients` those of the gradients allocate their results, as a step must
    whose gradients are returned.
    """
    (hidden, weight), (teacher_hidden, teacher_weight) = (
        tuple(tensor.detach() for tensor in stream) for stream in (inputs.student, inputs.teacher)
    )
    student_logits, teacher_logits = (hidden.new_zeros(hidden.shape[0], weight.shape[0]) for _ in range(2))
    hidden_gradient = None if new_gradients else torch.empty_like(hidden)
    weight_gradient = None if new_gradients or not trained else torch.empty_like(weight)

    def run() -> None:
        torch.mm(hidden, weight.T, out=student_logits)
        torch.mm(teacher_hidden, teacher_weight.T, out=teacher_logits)
        first = torch.mm(student_logits, weight, out=hidden_gradient)
        second = torch.mm(student_logits.T, hidden, out=weight_gradient) if trained else None
        del first, second

    return run
