"""Repairs of Triton's interpreter: a search that it need not repeat, and an index that new releases of numpy refuse.

To run a kernel it replaces the functions of `triton.language`, and to call a device function it looks through them all
again, though they are replaced until the launch ends.  Without that it is 2.8 times as fast here.

Before Triton 3.7 it makes an index of `int(array)` for an array of one element, which numpy from 2.4 on refuses.
"""

import functools
from typing import Any


def hasten() -> None:
    """Repair the interpreter for this process.  Does nothing where it is not as expected."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    _take_indices_from_arrays(interpreter)
    function = getattr(interpreter, "InterpretedFunction", None)
    if not (hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "InterpreterError") and function):
        return
    patched: set[int] = set()  # ids of the modules of device functions, which last as long as the process

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    function.__call__ = call


def _take_indices_from_arrays(interpreter: Any) -> None:
    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)
    if patch_tensor is None or hasattr(patch_tensor, "__wrapped__"):
        return

    @functools.wraps(patch_tensor)
    def patch(tensor: Any, *scope: Any) -> None:  # 3.6 restores what it replaces when the scope ends
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch
