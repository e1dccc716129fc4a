"""Checks before importing jax and dm-haiku. Imports only the standard library."""

import tempfile
from pathlib import Path


def check_surroundings(program: Path) -> None:
    """Raise ValueError if jax or dm-haiku cannot be imported or cannot work here.

    program: the directory of this program.
    """
    if not __debug__:
        raise ValueError("python -O removes code that dm-haiku needs; start without it")
    try:
        str(program).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{program}: expected a path in UTF-8; move this program") from None
    try:
        tempfile.gettempdir()  # as an import of dm-haiku does
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.strerror}; free space there, or set TMPDIR to a writable directory"
        ) from None
