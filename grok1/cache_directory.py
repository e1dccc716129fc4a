"""The directory that keeps compiled code for the next start on the same machine.

Its files are run as code, so they must come from this user. A path is safe if at every level only
this user and root can replace what is there: then it names the same directory after the check.
"""

import contextlib
import hashlib
import os
import platform
import stat
from pathlib import Path


class CacheError(Exception):
    """Why a directory or a file cannot be used, in one sentence."""


def cache_directory(kind: str) -> Path:
    """Make and return the directory for one kind of code compiled on this kind of machine.

    Raises CacheError if there is none that is safe to use.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not base.is_absolute():  # relative paths are invalid
            base = Path.home() / ".cache"
        directory = private_directory(base / "grok-1-jax" / machine() / kind)
        # Its files may have any mode, since other users cannot enter the directory.
        _check(directory, directory.stat(), forbidden=0o077)
        for path in directory.rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                _check(path, path.lstat(), forbidden=0)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        raise CacheError(str(error)) from None
    return directory


def private_directory(path: Path) -> Path:
    """Make a directory and its parents with mode 0700; return its path without symbolic links.

    Raises CacheError if another user could replace anything along the path. A symbolic link is
    followed if no other user could have made it. Raises OSError.
    """
    path = path.absolute()
    if path == path.parent:
        _check(path, path.stat())
        return path
    parent = private_directory(path.parent)
    if path.name == "..":
        return parent.parent
    level = parent / path.name
    if not os.path.lexists(level):
        with contextlib.suppress(FileExistsError):  # another process was faster
            level.mkdir(mode=0o700)
            level.chmod(0o700)  # the umask may have cleared some bits
    info = level.lstat()
    if not level.is_dir():
        level.stat()  # raises OSError for a dangling or circular link
        raise CacheError(f"{level} is not a directory")
    _check(level, info)
    if stat.S_ISLNK(info.st_mode):
        return private_directory(parent / os.readlink(level))
    return level


def read(path: Path) -> bytes:
    """Return the content of a file that only this user and root can have written.

    Raises CacheError, or OSError if it cannot be read.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # opening a pipe must not wait for a writer
    with open(path, "rb", opener=lambda name, mode: os.open(name, mode | flags)) as file:
        _check(path, os.fstat(file.fileno()))
        return file.read()


def _check(path: Path, info: os.stat_result, forbidden: int = 0o022) -> None:
    """Raise CacheError if another user owns this path, or if its mode has a forbidden bit."""
    user = os.geteuid()
    if info.st_uid not in (0, user):
        raise CacheError(
            f"{path} belongs to user {info.st_uid}, expected {user} or root; set XDG_CACHE_HOME to "
            "a directory of your own"
        )
    # In a sticky directory, such as /tmp, users can only replace what they own.
    sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX and forbidden == 0o022
    if info.st_mode & forbidden and not sticky and not stat.S_ISLNK(info.st_mode):
        mode = stat.S_IMODE(info.st_mode)
        raise CacheError(
            f"{path} has mode {mode:04o}, which lets other users in; run: "
            f"chmod {mode & ~forbidden:04o} {path}"
        )


def machine() -> str:
    """Return a name for this kind of processor: code for another one might not run here.

    jax's own keys do not distinguish processors, and machines may share a home directory.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # The names of a processor's features on x86 and ARM.
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    found = f"{platform.system()} {platform.processor()} {features}"
    return f"{platform.machine()}-{hashlib.sha256(found.encode()).hexdigest()[:8]}"
