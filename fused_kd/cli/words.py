"""How the commands write numbers and dtypes."""

import torch


def spaced(number: int) -> str:
    """As in 128 256."""
    return f"{number:_}".replace("_", " ")


def dtype_name(dtype: torch.dtype) -> str:
    """As in bfloat16."""
    return str(dtype).removeprefix("torch.")
