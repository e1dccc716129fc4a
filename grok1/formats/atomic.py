"""Atomic and durable file writes: a file is complete or absent, even after a power cut.

Links are not followed when writing or removing: their target may belong to someone else.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple

# Of a file's contents: bytes, or an array. The types of Python 3.11 do not know that an array is a
# buffer.
Piece = Any


class FileVersion(NamedTuple):
    """What identifies a file and its contents: if it is equal, the file is unchanged.

    changed: the time of the last modification in ns.
    """

    device: int
    inode: int
    size: int
    changed: int


def stamp(file: str | int) -> FileVersion:
    """Return the stamp of a file, given its path or descriptor. Raises OSError."""
    status = os.stat(file)
    return FileVersion(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def open_regular(path: str) -> BinaryIO:
    """Open a regular file for reading. Raises OSError for anything else."""
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    # Checked after opening, when it can no longer be replaced. O_NONBLOCK: a pipe must not block.
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return descriptor


def require_plain(path: str, *, folder: bool = False) -> None:
    """Raise OSError if the path exists but is not a regular file (or folder), e.g. is a link."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "it is a link, which is not followed", path)
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(mode):
        raise OSError(errno.EINVAL, f"it is not a {'directory' if folder else 'file'}", path)


def make_folder(path: str) -> None:
    """Make a directory if it does not exist, in one that does. Raises OSError, even for a link."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    require_plain(path, folder=True)


def partial(path: str) -> str:
    """Return the name, in the same directory, that a file has until it is complete."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.partial")


def write(path: str, contents: Iterable[Piece], temporary: str | None = None) -> None:
    """Write a file atomically.

    temporary: the name until it is complete, on the same disk; by default in the same directory.
    Raises OSError; then the temporary file is removed and an older file at `path` is unchanged.
    """
    temporary = temporary or partial(path)
    require_plain(temporary)
    try:
        fill(temporary, contents)
        place(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


def fill(path: str, contents: Iterable[Piece]) -> None:
    """Write a new file, to be finished with `place`; an older one at `path` is removed."""
    require_plain(path)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    with open(path, "xb") as file:
        for piece in contents:
            file.write(piece)


def place(temporary: str, path: str) -> None:
    """Flush a finished file to disk, rename it, and flush its directory."""
    require_plain(path)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(os.path.dirname(path) or ".")


def remove(path: str) -> None:
    """Remove a file if it exists, and sync the directory, so that it stays removed."""
    if os.path.lexists(path):
        os.remove(path)
        _sync(os.path.dirname(path) or ".")


def lock(descriptor: int) -> bool:
    """Lock an open file or directory for this process; return False if another process holds it.

    The lock is released when the descriptor is closed, at the latest when the process ends. It has
    no effect if the file system does not support locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # This file system has no locks.
    return True


def _sync(path: str) -> None:
    """Wait until a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
