"""The library of CPU kernels: compiled from cpu.cc on first use, and cached."""

import contextlib
import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import jax
import jaxlib

from grok1.cache_directory import CacheError, cache_directory, private_directory, read
from grok1.kernels.error import KernelError
from grok1.kernels.open_library import LOADED, PROGRAM, open_library

SOURCE = Path(__file__).with_name("cpu.cc")
HEADERS = tuple(sorted(SOURCE.parent.glob("*.h")))
COMPILERS = "c++", "g++", "clang++"
FLAGS = "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w"
COMPILE_LIMIT, ANSWER_LIMIT = 300, 30  # seconds for a compilation, and for anything else
# A shell that runs a command. When the pipe at its standard input is closed, for example because
# the parent process has ended, all processes of its group are killed.
GUARD = 'exec 3<&0; (read -r _ <&3; kill -KILL 0) >/dev/null 2>&1 & "$@" </dev/null 3<&-'
MOST_BYTES = 2**28  # of a library
DIGEST_SIZE = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


def load(names: Collection[str]) -> ctypes.CDLL:
    """Return the library, which has functions of these names.

    Raises KernelError if none can be loaded.
    """
    compiler = _compiler()
    try:
        kept = _kept_file(compiler)
        return _load_kept(kept, names) or _load_new(compiler, kept, names)
    except OSError as error:
        raise KernelError(str(error)) from None


def _kept_file(compiler: list[str]) -> Path | None:
    """Return the path of the cached library; None, with a logged note, if it cannot be cached."""
    version = _call(compiler, ["--version"], ANSWER_LIMIT)
    sources = (path.read_text() for path in (SOURCE, *HEADERS))
    parts = "\0".join([*sources, *compiler, version, jaxlib.__version__, *FLAGS])
    name = hashlib.sha256(parts.encode(errors="surrogateescape")).hexdigest()[:16]
    try:
        return cache_directory("kernels") / f"cpu-{name}.so"
    except CacheError as error:
        _log.warning("note: the CPU kernels are compiled at every start (%s)", error)
        return None


def _load_kept(kept: Path | None, names: Collection[str]) -> ctypes.CDLL | None:
    """Return the cached library; None if there is none, or it cannot be used."""
    if kept is None:
        return None
    try:
        content = read(kept)
        if content[-DIGEST_SIZE:] != _digest(content[:-DIGEST_SIZE]):
            return None  # a damaged one would crash the process
        return open_library(content, kept, names)
    except (CacheError, OSError, AttributeError):
        return None


def _load_new(compiler: list[str], kept: Path | None, names: Collection[str]) -> ctypes.CDLL:
    """Compile a library, load it, cache it and return it."""
    with _scratch_directory(kept) as scratch:
        made = Path(scratch, "made.so")
        _compile(compiler, made)
        if not made.is_file() or made.stat().st_size > MOST_BYTES:
            raise KernelError(f"{_called(compiler)} made no library")
        content = made.read_bytes()
        try:
            # In a separate process, since loading a broken one may end the process.
            python = sys.executable or "python3"
            said = _run([python, "-I", "-S", PROGRAM, str(made), *names], ANSWER_LIMIT)
            if not said.endswith(LOADED):
                raise KernelError("it ends the process that loads it")
            library = open_library(content, made, names)
        except (KernelError, AttributeError) as error:
            wrong = f"{_called(compiler)} made a library that cannot be loaded: {error}"
            raise KernelError(wrong) from None
    if kept is not None:
        with contextlib.suppress(OSError):
            _replace(kept, content + _digest(content))
    return library


def _compile(compiler: list[str], library: Path) -> None:
    """Compile the kernels to `library`; the compiler's temporary files go to its directory."""
    arguments = [*FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(library)]
    _call(compiler, arguments, COMPILE_LIMIT, TMPDIR=str(library.parent))


def _scratch_directory(kept: Path | None) -> tempfile.TemporaryDirectory[str]:
    """Return a temporary directory that no other user can change.

    It is in the cache directory only if the system's is unsuitable: the system cleans up its own
    after an interruption.
    """
    try:
        place = private_directory(Path(tempfile.gettempdir()))
        return tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True)
    except (CacheError, OSError, RecursionError) as error:
        if kept is None:
            raise KernelError(f"there is no temporary directory to compile in: {error}") from None
        return tempfile.TemporaryDirectory(dir=kept.parent, ignore_cleanup_errors=True)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _replace(path: Path, content: bytes) -> None:
    """Write a file atomically."""
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
    """Return the command of the C++ compiler: CXX if set, otherwise the first one found."""
    value = os.environ.get("CXX", "")
    try:
        named = shlex.split(value)
    except ValueError as error:
        raise KernelError(f"CXX={value}: expected a command, got one with {error}") from None
    for command in [named] if named else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    wanted = f"CXX={value}" if named else ", ".join(COMPILERS)
    raise KernelError(f"no C++ compiler was found: {wanted}")


def _called(compiler: list[str]) -> str:
    """Return the name of a compiler in messages."""
    return f"CXX={compiler[0]}" if os.environ.get("CXX", "").strip() else compiler[0]


def _call(compiler: list[str], arguments: list[str], limit: float, **variables: str) -> str:
    """Return what the compiler prints. Raises KernelError if it fails."""
    try:
        return _run([*compiler, *arguments], limit, **variables)
    except KernelError as error:
        raise KernelError(f"{_called(compiler)} failed: {error}") from None


def _run(command: list[str], limit: float, **variables: str) -> str:
    """Return what a command prints. Raises KernelError if it fails or takes more than `limit` s.

    No process of its group outlives this call or the calling process.
    """
    reader, writer = os.pipe()
    with open(writer, "wb", buffering=0) as alive:
        with open(reader, "rb", buffering=0) as end:
            process = subprocess.Popen(
                ["sh", "-c", GUARD, "sh", *command], env=os.environ | variables, stdin=end,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
                start_new_session=True,
            )  # fmt: skip
        with process:
            try:
                out, err = process.communicate(timeout=limit)
            except subprocess.TimeoutExpired:
                raise KernelError(f"it has not ended within {limit:g} s") from None
            finally:
                alive.close()
    if process.returncode == 0:
        return out
    number, lines = process.returncode - 128, err.strip().splitlines()
    if number in signal.valid_signals():
        raise KernelError(f"it was ended by the signal {signal.Signals(number).name}")
    said = lines[-1] if lines else f"it ended with status {process.returncode}"
    wrong = next((line for line in lines if "error" in line), said)
    raise KernelError("".join(filter(str.isprintable, wrong))[:300])
