"""Measure the largest single array that numpy allocates, temporaries included, with a counting allocator.

tracemalloc knows live memory, not arrays that a step made and dropped. numpy accepts an allocator for array data
(`PyDataMem_SetHandler`, NEP 49; the number of a function in its C interface never changes).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy._core._multiarray_umath as umath  # type: ignore[import-not-found]  # numpy has no stubs for it

_SET_HANDLER, _GET_HANDLER = 304, 305

_MALLOC = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_CALLOC = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)
_REALLOC = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


class _Handler(ctypes.Structure):
    """`PyDataMem_Handler`."""

    _fields_ = (
        ("name", ctypes.c_char * 127),
        ("version", ctypes.c_uint8),
        ("ctx", ctypes.c_void_p),
        ("malloc", _MALLOC),
        ("calloc", _CALLOC),
        ("realloc", _REALLOC),
        ("free", ctypes.c_void_p),
    )


@dataclass
class Largest:
    """The bytes of the largest array, and the number of arrays made."""

    size: int = 0
    count: int = 0

    def saw(self, size: int) -> None:
        """Count one more array."""
        self.size = max(self.size, size)
        self.count += 1


_seen = Largest()


def _api(number: int, argument: object = None) -> object:
    """Return a function of numpy's C interface that takes an object or nothing and returns an object."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = ctypes.cast(pointer(umath._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))
    if argument is None:
        return ctypes.PYFUNCTYPE(ctypes.py_object)(table[number])()
    return ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[number])(argument)


def _default() -> _Handler:
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return _Handler.from_address(pointer(_api(_GET_HANDLER), b"mem_handler"))


_numpys = _default()


def _malloc(ctx: int | None, size: int) -> int | None:
    _seen.saw(size)
    pointer: int | None = _numpys.malloc(ctx, size)
    return pointer


def _calloc(ctx: int | None, count: int, size: int) -> int | None:
    _seen.saw(count * size)
    pointer: int | None = _numpys.calloc(ctx, count, size)
    return pointer


def _realloc(ctx: int | None, block: int | None, size: int) -> int | None:
    _seen.saw(size)
    pointer: int | None = _numpys.realloc(ctx, block, size)
    return pointer


# arrays keep the allocator they came from, so it lives as long as the process. numpy's own function frees memory,
# since a Python callback could meet a pending exception there
_handler = _Handler(b"counting", 1, _numpys.ctx, _MALLOC(_malloc), _CALLOC(_calloc), _REALLOC(_realloc), _numpys.free)


def _capsule() -> object:
    make = ctypes.pythonapi.PyCapsule_New
    make.restype, make.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
    return make(ctypes.addressof(_handler), b"mem_handler", None)


@contextmanager
def counted() -> Iterator[Largest]:
    """Count every array that is made inside the context."""
    _seen.size = _seen.count = 0
    before = _api(_SET_HANDLER, _capsule())
    try:
        yield _seen
    finally:
        _api(_SET_HANDLER, before)
