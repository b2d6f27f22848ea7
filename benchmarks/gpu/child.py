"""Programs that run under a profiler or a checker, in a process of their own: `python -m benchmarks.gpu.child`."""

import argparse
import json
import sys
from pathlib import Path

import torch

from fused_kd.launching import ONE, TWO
from fused_kd.testing import launching

from .context import Context, here
from .subjects import TEMPERATURE


def steps(context: Context, file: Path, rows: int, vocabularies: list[int]) -> None:
    """Run a step of kd_loss at each vocabulary, in one launch and in two, and write to the file what was launched."""
    from fused_kd import kd_loss

    with file.open("w") as lines:
        for vocabulary in vocabularies:
            size = rows, vocabulary
            student, teacher = (
                torch.empty(size, dtype=context.sizes.dtype, device=context.device).normal_(0, 3) for _ in range(2)
            )
            labels = torch.randint(vocabulary, (rows,), device=context.device)
            student.requires_grad_()
            for plan, count in ((ONE, 1), (TWO, 2)):
                with launching(plan):
                    loss = kd_loss(student, teacher, labels, temperature=TEMPERATURE)
                    torch.autograd.grad(loss, student)
                    torch.cuda.synchronize()
                line = {"vocabulary": vocabulary, "rows": rows, "plan": plan, "kernels": count}
                lines.write(json.dumps(line) + "\n")
                lines.flush()


def launches(context: Context) -> None:
    """Launch every kernel, with each option at least once."""
    from fused_kd.backends import triton as kernels

    from ..simulated.cases import covering_cases
    from ..simulated.launches import on_device

    merging = next(case for case in covering_cases(2) if (case.form, case.splits) == ("programs", 3))
    for case in (merging, *covering_cases(1))[: context.sizes.checked]:
        outcome, _ = on_device(case, context.device)
        print(case.name, *outcome.findings, flush=True)
    for dtype in (torch.float32, torch.bfloat16):
        gradient = torch.randn(2, 3, 1500, device=context.device).to(dtype)
        scaled = gradient[:, :-1, 3:]
        kernels.scale_(scaled, [torch.tensor(0.3, device=context.device)], scaled)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    programs = parser.add_subparsers(dest="program", required=True)
    of_steps = programs.add_parser("steps")
    of_steps.add_argument("file", type=Path)
    of_steps.add_argument("--rows", type=int, required=True)
    of_steps.add_argument("--vocabularies", type=int, nargs="+", required=True)
    programs.add_parser("launches")
    options = parser.parse_args(arguments)
    context = here(Path.cwd(), seconds=600)
    if options.program == "steps":
        steps(context, options.file, options.rows, options.vocabularies)
    else:
        launches(context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
