"""Steps as CUDA graphs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Step = Callable[[], Sequence[Tensor]]
WARM_UPS = 3


def captured(step: Step) -> tuple[Any, Sequence[Tensor]]:
    """The graph of a step and the tensors that it writes at each `replay()`.

    Capture raises at the first synchronisation with the host.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        written = step()
    return graph, written
