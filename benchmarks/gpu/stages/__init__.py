"""The stages, in the order of what is worth most.

A stage is a module with `results(context)`, which yields a record for each thing that it finds.  A record with a key
"finding" says that something is wrong; one with a key "reason" says why a figure is missing.
"""

from typing import NamedTuple


class Stage(NamedTuple):
    name: str  # of its module
    seconds: float  # it is ended after so many
    title: str


STAGES = (
    Stage("machine", 30, "the machine: versions, copy bandwidth, matrix rate"),
    Stage("right", 120, "right: every result within the bounds of `fused-kd check`, and the same bits three times"),
    Stage("fast", 110, "fast: a step of kd_loss beside the floor and its peers"),
    Stage("l2", 60, "L2: bytes of memory that the kernels move, by ncu"),
    Stage("hidden", 120, "from hidden states: a step of linear_kd_loss beside its bare products and its peers"),
    Stage("models", 60, "models: a step at the heads of TinyLlama, Gemma 2 and Gemma 3, beside eager PyTorch"),
    Stage("plans", 70, "plans: other launches of the one-launch kernel"),
    Stage("safe", 120, "safe: compute-sanitizer, a CUDA graph, pytest -m gpu"),
    Stage("launches", 30, "launches: what a step launches, and how long each takes"),
)
TOTAL_SECONDS = 480.0
