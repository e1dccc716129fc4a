"""Open a shared library; as a program, try in a process of its own whether that goes well.

As a program it is given the library's path and the names to look up. It imports nothing of ours, to
start fast. At its end it prints LOADED: a library may end the process, with any status.
"""

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

PROGRAM = __file__
LOADED = "loaded\n"


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


if __name__ == "__main__":
    library_path = Path(sys.argv[1])
    try:
        open_library(library_path.read_bytes(), library_path, sys.argv[2:])
    except (OSError, AttributeError) as error:
        sys.exit(str(error))
    print(LOADED, end="")
