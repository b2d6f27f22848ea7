"""Triton's interpreter without a search that it repeats at every call of a device function: 2.8 times as fast here.

To run a kernel it replaces the functions of `triton.language`, and to call a device function it looks through them all
again, though they are replaced until the launch ends.
"""

from typing import Any


def hasten() -> None:
    """For this process.  Does nothing where Triton's interpreter is not as expected."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
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
