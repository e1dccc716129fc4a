"""Open a shared library; as a program, test in a separate process whether it can be loaded.

The program's arguments are the library's path and the names to look up. It imports nothing of this
project, to start fast. It prints LOADED on success, as a library may exit with any status.
"""

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

PROGRAM = __file__
LOADED = "loaded\n"


def open_library(content: bytes, path: Path, names: Iterable[str]) -> ctypes.CDLL:
    """Return the library with this content, which was read from `path`.

    Raises OSError if it cannot be loaded, AttributeError if one of the names is missing.
    """
    try:
        library = ctypes.CDLL(_in_memory(content))
    except (AttributeError, OSError):  # not supported, or executing code from memory is denied
        library = ctypes.CDLL(str(path))
    for name in names:
        library[name]
    return library


def _in_memory(content: bytes) -> str:
    """Return the path of a file in memory, so that exactly `content` is loaded."""
    # Never closed: the loader would take another library with the same path for this one.
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
