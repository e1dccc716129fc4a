"""Arrays in files that are used as memory, for the library of CPU kernels.

With the library, pages are read before they are needed, and a file that becomes shorter ends the
process with a sentence. Without it, Linux reads pages when they are used, and ends the process.
"""

import ctypes
import mmap
import os
import weakref
from typing import NamedTuple

import numpy as np

FUNCTIONS = "WatchFile", "ForgetFile"


class MappedArray(NamedTuple):
    """An array that is a file's bytes from `offset` on; `file` is a descriptor of it.

    layers: into which its bytes are divided, one after the other, or 0. kept: how many of them,
    from the first on, stay in memory after use, as far as it has room. always: whether each step of
    the model needs all of a layer.
    """

    address: int
    nbytes: int
    layers: int
    kept: int
    offset: int
    always: bool
    file: int
    path: bytes


_arrays: dict[int, MappedArray] = {}  # by address: those in use
_libraries: list[ctypes.CDLL] = []


def map_array(
    path: str, file: int, offset: int, shape: tuple[int, ...], dtype: np.dtype, layers: int,
    kept: int, always: bool,
) -> np.ndarray:  # fmt: skip
    """Return an array that is a file: read-only memory, whose pages are read when used.

    The library knows it as long as it is used. path: of the file, for messages. file: a descriptor
    of it. layers, kept, always: as in a MappedArray. Raises OSError.
    """
    memory = mmap.mmap(file, 0, access=mmap.ACCESS_READ)
    values = np.ndarray(shape, dtype, memory, offset)
    place = values.ctypes.data, values.nbytes, layers, kept, offset, always
    array = MappedArray(*place, os.dup(file), os.fsencode(path))
    _arrays[array.address] = array
    weakref.finalize(memory, _forget, array).atexit = False
    for library in _libraries:
        library.WatchFile(*array)
    return values


def use(library: ctypes.CDLL) -> None:
    """Make all arrays known to a library."""
    library.WatchFile.argtypes = [
        ctypes.c_void_p, *[ctypes.c_int64] * 4, ctypes.c_bool, ctypes.c_int, ctypes.c_char_p,
    ]  # fmt: skip
    library.ForgetFile.argtypes = [ctypes.c_void_p]
    _libraries.append(library)
    for array in _arrays.values():
        library.WatchFile(*array)


def _forget(array: MappedArray) -> None:
    for library in _libraries:
        library.ForgetFile(array.address)
    os.close(array.file)
    del _arrays[array.address]
