"""The sizes that are measured: heads of models that are distilled into one another in practice, and sweeps over N and V."""

from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from .replacing import replaced_in
from .words import dtype_name


class Pair(NamedTuple):
    """A student and a teacher with one vocabulary.  The sizes are those of the models' published configurations."""

    name: str
    vocab_size: int  # V
    student_hidden: int  # H_s
    teacher_hidden: int  # H_t


PAIRS = {
    "llama2": Pair("TinyLlama 1.1B from Llama 2 7B", 32_000, 2048, 4096),
    "smollm2": Pair("SmolLM2 135M from 1.7B", 49_152, 576, 2048),
    "llama3": Pair("Llama 3.2 1B from Llama 3.1 8B", 128_256, 2048, 4096),
    "qwen2.5": Pair("Qwen 2.5 0.5B from 3B", 151_936, 896, 2048),
    "gemma2": Pair("Gemma 2 2B from 9B", 256_000, 2304, 3584),
    "gemma3": Pair("Gemma 3 270M from 1B", 262_144, 640, 1152),
}
INPUTS = ("logits", "hidden")  # the inputs of `kd_loss` and of `linear_kd_loss`


class Shape(NamedTuple):
    """One problem to measure."""

    group: str  # the table or plot that it belongs to: "models", "V" or "N"
    name: str
    inputs: str  # one of INPUTS
    rows: int  # N, tokens
    vocab_size: int
    student_hidden: int
    teacher_hidden: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        heads = f", H = {self.student_hidden} / {self.teacher_hidden}" if self.inputs == "hidden" else ""
        return f"{self.name}: N = {self.rows}, V = {self.vocab_size}{heads}, {dtype_name(self.dtype)}"

    @property
    def logits(self) -> int:
        """Return N V, the elements of one model's logits."""
        return self.rows * self.vocab_size

    @property
    def flops(self) -> int:
        """Return the flops of the products of a step with a trained head: the student has three, the teacher one."""
        return 2 * self.logits * (3 * self.student_hidden + self.teacher_hidden)


# A CPU with a few cores computes these in a tenth of a second to a second.  On a GPU memory decides.
CPU_LOGITS = 2**25
CPU_FLOPS = 1.25e11
CPU_HEADS = ("smollm2", "gemma3")  # the others would take minutes on a CPU
GPU_ROWS = 8192
GPU_BYTES_PER_LOGIT = 40  # memory of the peer that takes most: inputs, gradient, and eager PyTorch's float32 arrays
SWEEP_V = (4096, 16_384, 65_536, 262_144)
SWEEP_N = {"cpu": (32, 128, 512), "cuda": (128, 512, 2048, 8192)}
SWEEP_N_V = 49_152
SWEEP_V_N = {"cpu": 64, "cuda": 4096}
SWEEP_HIDDEN = (576, 2048)  # the hidden sizes of SmolLM2
SWEEP_INPUTS = {"cpu": ("logits",), "cuda": INPUTS}  # on a CPU the products would take minutes


def model_shapes(device: torch.device, dtype: torch.dtype, pairs: tuple[str, ...] = ()) -> list[Shape]:
    """Return shapes of the named pairs, or of those that suit the device, with as many tokens as suit it."""
    found = []
    for inputs in INPUTS:
        usual = CPU_HEADS if inputs == "hidden" and device.type == "cpu" else tuple(PAIRS)
        for key in pairs or usual:
            name, V, H_s, H_t = PAIRS[key]
            shape = Shape("models", name, inputs, 1, V, H_s, H_t, dtype)
            found.append(shape._replace(rows=_rows(shape, device)))
    return found


def sweep_shapes(device: torch.device, dtype: torch.dtype) -> list[Shape]:
    """Return shapes with growing V at one N, and with growing N at one V."""
    rows = SWEEP_V_N[device.type]
    sizes = [("V", rows, V) for V in SWEEP_V] + [("N", N, SWEEP_N_V) for N in SWEEP_N[device.type]]
    return [
        Shape(group, f"growing {group}", inputs, N, V, *SWEEP_HIDDEN, dtype)
        for inputs in SWEEP_INPUTS[device.type]
        for group, N, V in sizes
    ]


def _rows(shape: Shape, device: torch.device) -> int:
    """Return the number of tokens, a power of two."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        limit = min(GPU_ROWS, 0.8 * memory / (GPU_BYTES_PER_LOGIT * shape.vocab_size))
    elif shape.inputs == "logits":
        limit = CPU_LOGITS / shape.vocab_size
    else:
        limit = CPU_FLOPS / shape.flops
    return 1 << max(4, int(limit).bit_length() - 1)


def tiny() -> AbstractContextManager[None]:
    """Measure only shapes that take a CPU a second, from logits and from hidden states, while the context lasts."""
    return replaced_in(
        __name__,
        PAIRS={"small": Pair("Small 1 from 2", 301, 24, 40)}, CPU_HEADS=("small",), CPU_LOGITS=4096, CPU_FLOPS=1e6,
        SWEEP_V=(64, 256), SWEEP_N={"cpu": (16, 32)}, SWEEP_N_V=300, SWEEP_HIDDEN=(8, 12), SWEEP_INPUTS={"cpu": INPUTS},
    )  # fmt: skip
