"""Files that appear whole or not at all, and stay so through a power cut.

No link is followed where something is written or removed: what it points to may be anybody's.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Iterable
from typing import Any, BinaryIO, NamedTuple


class Stamp(NamedTuple):
    """What tells whether a file is still the same one with the same contents.

    changed: the time of its last change in ns.
    """

    device: int
    inode: int
    size: int
    changed: int


def stamp(file: str | int) -> Stamp:
    """Return the stamp of a file, by its path or its descriptor. Raises OSError."""
    status = os.stat(file)
    return Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def open_regular(path: str) -> BinaryIO:
    """Open a regular file to read it. Anything else is an OSError."""
    return open(path, "rb", opener=_open_regular)


def _open_regular(path: str, flags: int) -> int:
    # Looked at once it is open, when nobody can replace it; to open a pipe must wait for no writer.
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", path)
    return descriptor


def require_plain(path: str, *, folder: bool = False) -> None:
    """Raise OSError if there is something else than a file, or than a folder: a link, too."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "it is a link, which is not followed", path)
    if not (stat.S_ISDIR if folder else stat.S_ISREG)(mode):
        raise OSError(errno.EINVAL, f"it is not a {'directory' if folder else 'file'}", path)


def make_folder(path: str) -> None:
    """Make a directory, if it is not there, in one that is. Raises OSError, also for a link."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    require_plain(path, folder=True)


def partial(path: str) -> str:
    """Return the name beside it that a file has until it is whole."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.partial")


def write(path: str, contents: Iterable[Any], temporary: str | None = None) -> None:
    """Write a file so that it appears whole or not at all.

    temporary: the name until it is whole, on the same disk; by default one beside it. Raises
    OSError, with the temporary file gone and an older file of that name as it was.
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


def fill(path: str, contents: Iterable[Any]) -> None:
    """Write a new file, of which `place` can then make a lasting one; an older one is removed."""
    require_plain(path)
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)
    with open(path, "xb") as file:
        for piece in contents:
            file.write(piece)


def place(temporary: str, path: str) -> None:
    """Rename a finished file, once it is safely stored; then its name is, too."""
    require_plain(path)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(os.path.dirname(path) or ".")


def remove(path: str) -> None:
    """Remove a file, if it is there, so that it stays removed."""
    if os.path.lexists(path):
        os.remove(path)
        _sync(os.path.dirname(path) or ".")


def lock(descriptor: int) -> bool:
    """Lock an open file or directory for this process; returns False if another one has locked it.

    The lock ends with the descriptor, and so with the process, however that ends. It has no effect
    where the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # This file system has none.
    return True


def _sync(path: str) -> None:
    """Wait until a file, or the names in a directory, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
