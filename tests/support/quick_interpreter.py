"""Triton's interpreter without the work that it throws away or repeats.

In a small kernel the interpreter of Triton 3.7 spends most of its time on types, not on numbers. `speed_up` replaces
the functions below by equivalents with the same results, errors and side effects:

- every integer sum and product is computed again in 64 bits to check for overflow, but the check itself is left out
  unless the interpreter's option `debug` is set, which it is not (`TritonSemantic.device_assert`);
- `inspect.getmembers` lists the functions of the language before each launch and before each call of `tl.sum`;
- each value gets a type object of its own, with its name, its number of elements and its shape written anew;
- each look-up of a numpy type builds the table of all of them;
- the source of a kernel is found in its file three times, by Python's tokenizer.

`test_quick_interpreter.py` compares outputs and gradients bit for bit with the interpreter as it is.
"""

from __future__ import annotations

import builtins
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, cached_property
from typing import Any

VERSION = "3.7."
"""Start of the Triton versions whose interpreter has been read; others run as they are."""

Undo = list[tuple[Any, str, Any]]
"""Objects, names of replaced attributes and their earlier values."""
_ABSENT = object()
_replaced: Undo = []


def speed_up() -> None:
    """Replace the interpreter's slow functions, if this is a version of Triton that is known."""
    import triton  # Triton is optional, and the caller chooses when it is imported

    if triton.__version__.startswith(VERSION) and not _replaced:
        _replace_options()
        _replace_patches()
        _replace_calls()
        _replace_rewriter()
        _replace_types()
        _replace_tensors()


def undo() -> None:
    """Put the interpreter's own functions back."""
    while _replaced:
        holder, name, earlier = _replaced.pop()
        if earlier is _ABSENT:
            delattr(holder, name)
        else:
            setattr(holder, name, earlier)


@contextmanager
def as_it_is() -> Iterator[None]:
    """Run the interpreter with its own functions."""
    undo()
    try:
        yield
    finally:
        speed_up()


def _set(holder: Any, name: str, value: Any) -> None:
    _replaced.append((holder, name, vars(holder).get(name, _ABSENT)))
    setattr(holder, name, value)


def _replace_options() -> None:
    """Leave out the arithmetic of overflow checks that are not made."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        _set(builder, "options", replace(builder.options, sanitize_overflow=False))


def _replace_patches() -> None:
    """Find the language's functions once, not before each launch and each call of a device function."""
    import triton.language as tl
    from triton.runtime import interpreter

    is_builtin = tl.core.is_builtin
    semantic = interpreter.interpreter_semantic

    @cache
    def builtin_names(holder: Any) -> tuple[str, ...]:
        return tuple(name for name, member in inspect.getmembers(holder) if is_builtin(member))

    for holder in (tl, tl.core, tl.tensor, tl.math, tl.core.tensor_descriptor_base):
        builtin_names(holder)  # before any of them is replaced

    def with_semantic(member: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)

        return call

    def patch_builtin(holder: Any, builder: Any, scope: Any) -> None:
        for name in builtin_names(holder):
            member = getattr(holder, name)
            if is_builtin(member):
                scope.set_attr(holder, name, with_semantic(member))

    _set(interpreter, "_patch_builtin", patch_builtin)


def _replace_calls() -> None:
    """Replace the language's functions once in a launch, not at each call of a device function."""
    from triton.runtime import interpreter

    patch_language = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    patched: set[tuple[int, int]] = set()
    launches = 0

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal launches
        patched.clear()
        launches += 1
        try:
            return launch(self, *args, **kwargs)
        finally:
            launches -= 1
            patched.clear()

    def call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        names = self.fn.__globals__
        key = id(names), len(names)
        if key not in patched:
            patch_language(self.fn)
            if launches:
                patched.add(key)
        function = self.rewrite()
        try:
            return function(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    _set(interpreter.GridExecutor, "__call__", launch_once)
    _set(interpreter.InterpretedFunction, "__call__", call_device_function)


def _replace_rewriter() -> None:
    """Find the source of a kernel once."""
    from triton.runtime import interpreter

    def rewrite_ast(self: Any) -> Any:
        try:
            lines, first = inspect.getsourcelines(self.fn)
        except Exception:  # as the interpreter does where there is no source
            return self.fn
        self.filename = self.fn.__code__.co_filename
        starts = [i for i, line in enumerate(lines) if line.strip().startswith("def ")]
        self.def_file_lineno = first + starts[0] if starts else first
        self.def_lineno = self._find_def(lines)
        return self._compile_and_exec(self._transform_ast(self._prepare_source(lines)))

    _set(interpreter.FunctionRewriter, "rewrite_ast", rewrite_ast)


def _replace_types() -> None:
    """Look types up instead of writing their names and tables anew."""
    import numpy as np
    import triton.language as tl
    from triton.language import core
    from triton.runtime import interpreter

    scalar, pointer, block, constexpr = core.dtype, core.pointer_type, core.block_type, core.constexpr
    numpy_type, init_block = interpreter._get_np_dtype, block.__init__
    equal_scalars, equal_blocks, unwrap = scalar.__eq__, block.__eq__, core._unwrap_if_constexpr
    integers = frozenset(scalar.SINT_TYPES + scalar.UINT_TYPES)
    numbers = frozenset(scalar.FP_TYPES)
    plain = frozenset({int, float, bool, str, type(None), core.tensor, scalar, pointer, block})
    scalars = [value for value in vars(tl).values() if type(value) is scalar and value.name != "void"]
    tables = {value.name: numpy_type(value) for value in scalars}
    addresses = np.dtype(np.uint64)
    shapes: dict[tuple[int, ...], tuple[Any, int]] = {}

    def quick_numpy_type(kind: Any) -> Any:
        element = kind.element_ty if type(kind) is block else kind
        if type(element) is pointer:
            return addresses
        known = tables.get(element.name) if type(element) is scalar else None
        return numpy_type(kind) if known is None else known

    def quick_init_block(self: Any, element_ty: Any, shape: Any) -> None:
        values = shape.values if type(shape) is core.tuple else shape
        sizes = tuple([size.value if type(size) is constexpr else size for size in values])
        if type(shape) in (list, core.tuple) and {*map(type, sizes)} == {int}:
            known = shapes.get(sizes)
            if known is not None:
                self.element_ty = element_ty
                self.shape, self.numel = known
                return
            init_block(self, element_ty, shape)
            shapes[sizes] = self.shape, self.numel
            return
        init_block(self, element_ty, shape)

    def name_of_block(self: Any) -> str:
        return f"<{self.shape}, {self.element_ty}>"

    def quick_unwrap(value: Any) -> Any:
        kind = type(value)
        if kind in plain:
            return value
        return value.value if kind is constexpr else unwrap(value)

    lazy_name = cached_property(name_of_block)
    lazy_name.__set_name__(block, "name")
    _set(interpreter, "_get_np_dtype", quick_numpy_type)
    _set(core, "_unwrap_if_constexpr", quick_unwrap)
    _set(block, "__init__", quick_init_block)
    _set(block, "name", lazy_name)
    _set(block, "__eq__", lambda self, other: self is other or equal_blocks(self, other))
    _set(scalar, "__eq__", lambda self, other: self is other or equal_scalars(self, other))
    _set(scalar, "is_int", lambda self: self.name in integers)
    _set(scalar, "is_floating", lambda self: self.name in numbers)


def _replace_tensors() -> None:
    """Make the constants of a tensor's shape once for each shape."""
    from triton.language import core

    constexpr = core.constexpr
    one, nothing = constexpr(math.prod(())), core.tuple([])

    def quick_init(self: Any, handle: Any, type: Any) -> None:  # Triton passes the type by this name too
        self.handle = handle
        self.type = type
        self.dtype = type.scalar
        if not type.is_block():
            self.numel, self.shape = one, nothing
            return
        shape = type.shape
        known = shape.__dict__.get("constants")
        if known is None:
            known = constexpr(math.prod(shape)), core.tuple([constexpr(size) for size in shape])
            if builtins.type(shape) is core.tuple:
                shape.constants = known
        self.numel, self.shape = known

    _set(core.tensor, "__init__", quick_init)
