"""Compiled programs are kept, so that the next start does not compile them again."""

import contextlib
import warnings
from pathlib import Path

import jax

from grok1.backend import on_cpu
from grok1.cache_directory import CacheError, cache_directory
from grok1.formats import atomic

# A file whose time says up to when the entries have been looked at.
CHECKED = "checked"
# Before it XLA printed an error for each entry that a CPU with AVX-512 read, its own ones too.
FIRST_QUIET = (0, 10, 2)
_ours: str | None = None  # the directory that `enable` has chosen


def enable() -> str | None:
    """Let jax keep what it compiles from now on; returns why it cannot, or None.

    What the person has set of jax_compilation_cache_dir or jax_enable_compilation_cache holds.
    """
    global _ours
    enabled = jax.config.values["jax_enable_compilation_cache"]
    if not enabled or jax.config.values["jax_compilation_cache_dir"] not in (None, "", _ours):
        return None
    if jax.__version_info__ < FIRST_QUIET and on_cpu():
        return None
    try:
        directory = cache_directory("programs")
        remove_cut_entries(directory)
        str(directory).encode()  # as XLA must
    except (OSError, CacheError) as error:
        return f"compiled programs cannot be kept ({error})"
    except UnicodeEncodeError:
        return f"compiled programs cannot be kept ({directory} is not a path in UTF-8)"
    # The run does not need the cache: it goes on where an entry cannot be read or written.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    _ours = str(directory)
    jax.config.update("jax_compilation_cache_dir", _ours)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return None


def remove_cut_entries(directory: Path) -> None:
    """Remove the entries that a killed run has left half written; raises OSError.

    jax writes them in place. It would compile such a program anew at every start, and never
    replace the entry. Only what was written since the last time is looked at.
    """
    checked = directory / CHECKED
    since = checked.stat().st_mtime_ns if checked.exists() else 0
    checked.touch()
    for entry in directory.glob("*-cache"):
        with contextlib.suppress(FileNotFoundError):  # another start has just removed it
            if entry.stat().st_mtime_ns < since:
                continue
            with atomic.open_regular(str(entry)) as file:
                whole = is_whole(file.read())
            if not whole:
                entry.unlink()


def is_whole(entry: bytes) -> bool:
    """Whether an entry can be unpacked."""
    # Private: nothing public says so.
    from jax._src.compilation_cache import decompress_executable

    try:
        decompress_executable(entry)
    except Exception:  # of whatever library it was packed by
        return False
    return True
