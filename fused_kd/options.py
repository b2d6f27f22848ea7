"""What the losses return with `return_parts=True`."""

from typing import NamedTuple

from torch import Tensor


class KDLossOutput(NamedTuple):
    """The loss and its two parts, all reduced in the same way: loss = (1 - alpha) ce + alpha T^2 kl.

    The parts are detached, for logging.  A part that cannot be computed (ce without labels, kl without a teacher) is
    None.
    """

    loss: Tensor
    kl: Tensor | None
    ce: Tensor | None
