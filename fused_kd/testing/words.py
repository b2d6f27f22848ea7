"""The text of numbers and dtypes in tables and messages."""

import torch


def spaced(number: int) -> str:
    """Return a number with spaces between its thousands, such as 128 256."""
    return f"{number:_}".replace("_", " ")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without its module, such as bfloat16."""
    return str(dtype).removeprefix("torch.")
