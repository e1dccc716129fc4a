"""Open a shared library from what has been read of its file."""

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path


def open_library(content: bytes, path: Path, names: Iterable[str]) -> ctypes.CDLL:
    """Return the library with this content, which has been read from `path`.

    Raises OSError if it cannot be loaded, AttributeError if it has no function of one of the names.
    """
    try:
        library = ctypes.CDLL(_in_memory(content))
    except (AttributeError, OSError):  # not every system can, or lets code run from there
        library = ctypes.CDLL(str(path))
    for name in names:
        library[name]
    return library


def _in_memory(content: bytes) -> str:
    """Return the path of a file in memory: what is loaded from it is what has been read."""
    # Never closed: the loader takes a second library of the same path for the first.
    memory = os.memfd_create("grok-1-kernels")
    with open(memory, "wb", closefd=False) as file:
        file.write(content)
    return f"/proc/self/fd/{memory}"
