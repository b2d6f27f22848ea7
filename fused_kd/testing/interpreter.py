"""Repairs of Triton's interpreter: less repeated work, and an index that new releases of numpy refuse.

The interpreter replaces the functions of `triton.language` to run a kernel.  It looks through them all again at each call
of a device function, although they stay replaced until the launch ends.  It computes sums and products of integers once
more in 64 bits, for an assertion that only runs in debug mode.  It computes the shape and numpy type of every tensor anew,
and looks for a common type of two operands that have one.

Before Triton 3.7 it turns an array of one element into an index by `int(array)`, which numpy from 2.4 on refuses.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any


def hasten() -> None:
    """Repair the interpreter for this process.  A part of it that is not as expected is left as it is."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    _take_indices_from_arrays(interpreter)
    _call_device_functions_at_once(interpreter)
    _leave_out_overflow_checks(interpreter)
    _leave_equal_types_alone(interpreter)
    _remember_types(interpreter)
    _remember_shapes(interpreter)


def _call_device_functions_at_once(interpreter: Any) -> None:
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


def _leave_out_overflow_checks(interpreter: Any) -> None:
    """Leave out the overflow checks, whose assertions run only in debug mode."""
    builder: Any = getattr(interpreter, "interpreter_builder", None)
    options: Any = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and getattr(options, "debug", None) is False:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)


def _leave_equal_types_alone(interpreter: Any) -> None:
    """Hand on two operands of one type as they are.  The interpreter finds out at length that nothing is to convert."""
    semantic: Any = type(getattr(interpreter, "interpreter_semantic", None))
    convert = getattr(semantic, "binary_op_type_checking_impl", None)
    if convert is None or hasattr(convert, "__wrapped__"):
        return
    tensor, numbers = interpreter.tl.tensor, ("fp32", "int32")

    @functools.wraps(convert)
    def converted(self: Any, lhs: Any, rhs: Any, *args: Any, **kwargs: Any) -> Any:
        if type(lhs) is type(rhs) is tensor and lhs.dtype.name in numbers and lhs.type.name == rhs.type.name:
            return lhs, rhs
        return convert(self, lhs, rhs, *args, **kwargs)

    semantic.binary_op_type_checking_impl = converted


def _remember_types(interpreter: Any) -> None:
    """Remember types by their names, since types with one name are equal."""
    _remember(interpreter, "_get_np_dtype", lambda dtype: dtype.name)
    _remember(interpreter.tl.core.block_type, "with_element_ty", lambda block, scalar: (block.name, scalar.name))
    _remember(
        getattr(interpreter, "InterpreterBuilder", None),
        "get_block_ty",
        lambda builder, dtype, shape: (dtype.name, *shape),
    )


def _remember(owner: Any, name: str, key: Callable[..., Any]) -> None:
    """Make a function remember its results by `key(*arguments)`."""
    function = getattr(owner, name, None)
    if function is None or hasattr(function, "__wrapped__"):
        return
    known: dict[Any, Any] = {}

    @functools.wraps(function)
    def remembered(*arguments: Any) -> Any:
        found = known.get(key(*arguments))
        if found is None:
            found = known[key(*arguments)] = function(*arguments)
        return found

    setattr(owner, name, remembered)


def _remember_shapes(interpreter: Any) -> None:
    """Remember the shape and size that the constructor of a tensor computes from its type."""
    tensor, a_type = interpreter.tl.tensor, interpreter.tl.float32
    create = tensor.__init__
    expected = {"handle", "shape", "numel", "type", "dtype"}
    if hasattr(create, "__wrapped__") or set(vars(tensor(None, a_type))) != expected:
        return
    known: dict[str, tuple[Any, Any]] = {}

    @functools.wraps(create)
    def initialise(self: Any, handle: Any, type: Any) -> None:
        found = known.get(type.name)
        if found is None:
            create(self, handle, type)
            known[type.name] = self.shape, self.numel
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel = found

    tensor.__init__ = initialise


def _take_indices_from_arrays(interpreter: Any) -> None:
    patch_tensor = getattr(interpreter, "_patch_lang_tensor", None)
    if patch_tensor is None or hasattr(patch_tensor, "__wrapped__"):
        return

    @functools.wraps(patch_tensor)
    def patch(tensor: Any, *scope: Any) -> None:  # 3.6 restores what it replaces when the scope ends
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    interpreter._patch_lang_tensor = patch
