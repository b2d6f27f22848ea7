"""CPU times of reverse KL and JSD, forward and backward in float32, beside eager PyTorch, torch.compile and TRL's function.

    python -m benchmarks.divergences --json benchmarks/results/divergences.json

`kd_loss`, N = 256, V = 128 256, with as many threads as PyTorch takes, beside the eager formula of `fused_kd.testing.peers`
and torch.compile of it.  `linear_kd_loss`, N = 512, V = 49 152, H = 576, one thread, beside TRL's
ChunkedDivergenceFunction, if TRL is installed.  Each is the divergence alone, without CE, at T = 1.  All take turns, and
times are medians.

The machine must be idle: a step of ours is some hundreds of short operations, whose threads wait for one another, and so
loses more to another process than a step of few long ones.

Exit code: 0; with --check 1 if a target is missed.
"""

import argparse
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_kd import kd_loss, linear_kd_loss
from fused_kd.testing import record
from fused_kd.testing.peers import EAGER

BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}  # of TRL
TARGETS = {  # how many times faster ours is at least
    ("kd_loss", "reverse_kl", "eager"): 3.5,
    ("kd_loss", "reverse_kl", "compiled"): 1.4,
    ("kd_loss", "jsd", "eager"): 5.0,
    ("kd_loss", "jsd", "compiled"): 2.5,
    ("linear_kd_loss", "reverse_kl", "TRL"): 2.2,
    ("linear_kd_loss", "jsd", "TRL"): 3.0,
}
Loss = Callable[[], Tensor]


def eager(student: Tensor, teacher: Tensor, divergence: str) -> Tensor:
    return EAGER[divergence](F.log_softmax(student, -1), F.log_softmax(teacher, -1))


def from_logits(rows: int, vocabulary: int, divergence: str) -> tuple[list[Tensor], dict[str, Loss]]:
    """Return the leaves and the losses."""
    student, teacher = (3 * torch.randn(rows, vocabulary)).requires_grad_(), 3 * torch.randn(rows, vocabulary)
    torch._dynamo.reset()
    compiled = torch.compile(eager, dynamic=False)
    return [student], {
        "ours": lambda: kd_loss(student, teacher, alpha=1.0, temperature=1.0, divergence=divergence),
        "eager": lambda: eager(student, teacher, divergence),
        "compiled": lambda: compiled(student, teacher, divergence),
    }


def from_hidden_states(rows: int, vocabulary: int, width: int, divergence: str) -> tuple[list[Tensor], dict[str, Loss]]:
    """Return the leaves and the losses."""
    hidden = [torch.randn(rows, width) for _ in range(2)]
    weights = [torch.randn(vocabulary, width) * (3 / width**0.5) for _ in range(2)]
    student, teacher = (hidden[0].requires_grad_(), weights[0].requires_grad_()), (hidden[1], weights[1])
    losses: dict[str, Loss] = {
        "ours": lambda: linear_kd_loss(*student, *teacher, alpha=1.0, temperature=1.0, divergence=divergence),
    }
    if importlib.util.find_spec("trl") is not None:
        function: Any = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
        given = *student, None, *teacher, None, BETAS[divergence], 1.0
        losses["TRL"] = lambda: function.apply(*given)[0].mean()
    return list(student), losses


def times(leaves: list[Tensor], losses: dict[str, Loss], rounds: int) -> dict[str, float]:
    """Return the median seconds of a step of each loss, after one that is not counted and whose value is compared."""
    found: dict[str, list[float]] = {name: [] for name in losses}
    values = {}
    for turn in range(rounds + 1):
        for name, loss in losses.items():
            for leaf in leaves:
                leaf.grad = None
            begin = time.perf_counter()
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            if turn:
                found[name].append(time.perf_counter() - begin)
            values[name] = value.item()
    for name, number in values.items():
        if abs(number - values["ours"]) > 1e-4 * abs(values["ours"]):
            raise ValueError(f"{name}: expected the value {values['ours']}, got {number}")
    return {name: median(seconds) for name, seconds in found.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each loss that are timed (default: 9)")
    parser.add_argument("--divergence", nargs="+", choices=BETAS, default=["reverse_kl", "jsd"])
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a target is missed")
    options = parser.parse_args()
    threads, figures, missed = torch.get_num_threads(), [], False
    cases: list[tuple[str, int, Any]] = [
        ("kd_loss", threads, functools.partial(from_logits, 256, 128_256)),
        ("linear_kd_loss", 1, functools.partial(from_hidden_states, 512, 49_152, 576)),
    ]
    for function, number, make in cases:
        torch.set_num_threads(number)
        for divergence in options.divergence:
            seconds = times(*make(divergence), options.rounds)
            figures.append({"function": function, "divergence": divergence, "threads": number, "seconds": seconds})
            for name, value in seconds.items():
                ratio, target = value / seconds["ours"], TARGETS.get((function, divergence, name))
                verdict = "" if target is None else f", target {target:g}" + (" MISSED" if ratio < target else "")
                missed |= target is not None and ratio < target
                print(f"{function}, {divergence}, {number} threads, {name}: {1e3 * value:.0f} ms, {ratio:.2f}{verdict}")
    if options.json:
        machine = record.machine(torch.device("cpu"))
        found = {"versions": record.versions("trl"), "machine": machine, "results": figures}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return int(options.check and missed)


if __name__ == "__main__":
    sys.exit(main())
