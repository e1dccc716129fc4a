"""The library of the CPU's kernels: compiled from cpu.cc when it is first wanted, and kept."""

import contextlib
import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path

import jax
import jaxlib

from grok1.cache_directory import CacheError, cache_directory, private_directory, read
from grok1.kernels.error import KernelError
from grok1.kernels.open_library import open_library

SOURCE = Path(__file__).with_name("cpu.cc")
HEADERS = tuple(SOURCE.with_name(name) for name in ("floats.h", "integers.h", "lanes.h"))
COMPILERS = "c++", "g++", "clang++"
FLAGS = "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w"
DIGEST_SIZE = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


def load(names: Collection[str]) -> ctypes.CDLL:
    """Return the library, in which there are functions of these names.

    Raises KernelError where there is none that can be loaded.
    """
    compiler = _compiler()
    try:
        kept = _kept_file(compiler)
        return _load_kept(kept, names) or _load_new(compiler, kept, names)
    except OSError as error:
        raise KernelError(str(error)) from None


def _kept_file(compiler: list[str]) -> Path | None:
    """Return in which file the library is kept, or is to be; None, and a note, if it cannot be."""
    version = _call(compiler, ["--version"])
    sources = (path.read_text() for path in (SOURCE, *HEADERS))
    parts = "\0".join([*sources, *compiler, version, jaxlib.__version__, *FLAGS])
    name = hashlib.sha256(parts.encode(errors="surrogateescape")).hexdigest()[:16]
    try:
        return cache_directory("kernels") / f"cpu-{name}.so"
    except CacheError as error:
        _log.warning("note: the CPU kernels are compiled at every start (%s)", error)
        return None


def _load_kept(kept: Path | None, names: Collection[str]) -> ctypes.CDLL | None:
    """Return the library that is kept; None if none is, or none that can be used."""
    if kept is None:
        return None
    try:
        content = read(kept)
        if content[-DIGEST_SIZE:] != _digest(content[:-DIGEST_SIZE]):
            return None  # a damaged one would end the process
        return open_library(content, kept, names)
    except (CacheError, OSError, AttributeError):
        return None


def _load_new(compiler: list[str], kept: Path | None, names: Collection[str]) -> ctypes.CDLL:
    """Return a library that is compiled now, and keep it if it can be loaded."""
    with _scratch_directory(kept) as scratch:
        made = Path(scratch, "made.so")
        _compile(compiler, made)
        if not made.exists():
            raise KernelError(f"{compiler[0]} made no library")
        content = made.read_bytes()
        library = open_library(content, made, names)
    if kept is not None:
        with contextlib.suppress(OSError):
            _replace(kept, content + _digest(content))
    return library


def _compile(compiler: list[str], library: Path) -> None:
    """Compile the kernels to `library`, beside which the compiler's temporary files go."""
    arguments = [*FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(library)]
    _call(compiler, arguments, TMPDIR=str(library.parent))


def _scratch_directory(kept: Path | None) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary directory that no other user can change.

    Beside what is kept only where there is no other place: the system clears away what an
    interruption leaves in its own.
    """
    try:
        place = private_directory(Path(tempfile.gettempdir()))
        return tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True)
    except (CacheError, OSError) as error:
        if kept is None:
            raise KernelError(f"there is no temporary directory to compile in: {error}") from None
        return tempfile.TemporaryDirectory(dir=kept.parent, ignore_cleanup_errors=True)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _replace(path: Path, content: bytes) -> None:
    """Write a file that is whole, or not there at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


# ---------------------------------------------------------------------------------- the compiler


def _compiler() -> list[str]:
    """Return the command of the C++ compiler that CXX names, or of the first that is there."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    raise KernelError(f"no C++ compiler was found: {' '.join(named) or ', '.join(COMPILERS)}")


def _call(compiler: list[str], arguments: list[str], **variables: str) -> str:
    """Return what the compiler prints. Raises KernelError where it fails."""
    done = subprocess.run(
        [*compiler, *arguments], env=os.environ | variables, capture_output=True, text=True,
        errors="replace", check=False,
    )  # fmt: skip
    if done.returncode == 0:
        return done.stdout
    lines = [*done.stderr.strip().splitlines(), f"it ended with status {done.returncode}"]
    wrong = next((line for line in lines if "error" in line), lines[-1])
    raise KernelError(f"{compiler[0]} failed: {wrong}")
