"""Time and memory of a step at the heads of TinyLlama, Gemma 2 and Gemma 3, beside eager PyTorch.

    python examples/model_shapes.py
    python examples/model_shapes.py --rows 8192

On a GPU in bfloat16, on a CPU in float32 with hidden sizes of a 32nd.  MB is the peak beyond the inputs, with
the gradients.
"""

import argparse
import time

import torch
import torch.nn.functional as F

from fused_kd import kd_loss, linear_kd_loss
from fused_kd.testing.memory import peak_bytes

SHAPES = {  # V, H of the student, H of the teacher, softcap
    "TinyLlama 1.1B from Llama 2 7B": (32_000, 2048, 4096, None),
    "Gemma 2 2B from 9B": (256_000, 2304, 3584, 30.0),
    "Gemma 3 270M from 1B": (262_144, 640, 1152, None),
}
parser = argparse.ArgumentParser()
parser.add_argument("--rows", type=int, help="N, tokens (default: 4096 on a GPU, 32 on a CPU)")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
gpu = device.type == "cuda"
rows = parser.parse_args().rows or (4096 if gpu else 32)
dtype, divisor = (torch.bfloat16, 1) if gpu else (torch.float32, 32)


def eager(student_logits, teacher_logits, labels, alpha, temperature, logit_softcap):
    """Compute the loss as training code usually does."""
    if logit_softcap:
        capped = (logit_softcap * torch.tanh(z / logit_softcap) for z in (student_logits, teacher_logits))
        student_logits, teacher_logits = capped
    log_p, log_q = (F.log_softmax(z.float() / temperature, -1) for z in (student_logits, teacher_logits))
    kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
    return (1 - alpha) * F.cross_entropy(student_logits.float(), labels) + alpha * temperature**2 * kl


def of_logits(function):
    """Return the loss of hidden states and heads that computes whole logits first."""

    def loss(hidden, head, teacher_hidden, teacher_head, labels, **options):
        with torch.no_grad():
            teacher_logits = F.linear(teacher_hidden, teacher_head)
        return function(F.linear(hidden, head), teacher_logits, labels, **options)

    return loss


LOSSES = {"linear_kd_loss": linear_kd_loss, "heads, kd_loss": of_logits(kd_loss), "heads, eager": of_logits(eager)}
print(f"{'N = ' + str(rows):32}{'':16}{'loss':>9}{'ms':>10}{'MB':>10}")
for name, (V, H_s, H_t, softcap) in SHAPES.items():
    torch.manual_seed(0)
    made = [torch.randn(n, H // divisor, device=device, dtype=dtype) for H in (H_s, H_t) for n in (rows, V)]
    inputs = [x if len(x) == rows else x.mul_(3 / x.shape[1] ** 0.5) for x in made]
    leaves, labels = [x.requires_grad_() for x in inputs[:2]], torch.randint(V, (rows,), device=device)
    for subject, function in LOSSES.items():

        def step(function=function, softcap=softcap, inputs=inputs, labels=labels, leaves=leaves):
            loss = function(*inputs, labels, alpha=0.5, temperature=2.0, logit_softcap=softcap)
            torch.autograd.grad(loss, leaves)
            return loss.item()  # waits for the device

        try:
            peak, begin = peak_bytes(step, device), time.perf_counter()
            loss = step()
            seconds = time.perf_counter() - begin
            print(f"{name:32}{subject:16}{loss:9.4f}{1000 * seconds:10.1f}{peak / 1e6:10.1f}")
        except torch.OutOfMemoryError:
            print(f"{name:32}{subject:16} out of memory")
