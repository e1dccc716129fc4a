"""Keep compiled programs, so that the next start does not compile them again."""

import contextlib
import warnings
from pathlib import Path

import jax

from grok1.backend import on_cpu
from grok1.cache_directory import CacheError, cache_directory
from grok1.formats import atomic

# A file whose modification time is that of the last check of the entries.
CHECKED = "checked"
# Older versions print an error for each entry that a CPU with AVX-512 reads, even its own.
FIRST_QUIET = (0, 10, 2)
_ours: str | None = None  # the directory that `enable` has chosen


def enable() -> str | None:
    """Make jax keep what it compiles from now on; return why it cannot, or None.

    The user's jax_compilation_cache_dir and jax_enable_compilation_cache take precedence.
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
    # The cache is optional: the run continues if an entry cannot be read or written.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
    _ours = str(directory)
    jax.config.update("jax_compilation_cache_dir", _ours)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return None


def remove_cut_entries(directory: Path) -> None:
    """Remove the entries that a killed run has left incomplete; raises OSError.

    jax writes entries in place. It would compile the program of an incomplete entry at every start,
    and never replace the entry. Only entries written since the last check are read.
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
    # Private, since there is no public function for this.
    from jax._src.compilation_cache import decompress_executable

    try:
        decompress_executable(entry)
    except Exception:  # depends on the compression library
        return False
    return True
