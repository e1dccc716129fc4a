"""The memory that this process can still use."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Return the bytes of memory available to this process (Linux), or None.

    That is what this host and the control groups of the process, such as a container's, leave.
    Memory that holds pages of files is available.
    """
    left = [*_left_on_host(), *_left_in_groups()]
    return max(0, min(left)) if left else None


def _left_on_host() -> Iterator[int]:
    with contextlib.suppress(OSError):
        text = (PROC / "meminfo").read_text()
        yield int(text.partition("MemAvailable:")[2].split()[0]) * 1024


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes that each control group with a limit leaves, in either version of Linux's."""
    with contextlib.suppress(OSError):
        for line in (PROC / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                root, limit, used = GROUPS, "memory.max", "memory.current"
                files, shared = "file", "shmem"
            elif "memory" in controllers.split(","):
                root, limit, used = (
                    GROUPS / "memory",
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                )
                files, shared = "total_cache", "total_shmem"
            else:
                continue
            own = root / path.lstrip("/")
            for group in (own, *own.parents[: len(own.parts) - len(root.parts)]):
                # There is no such group if the path is that of a container, as its host names it.
                with contextlib.suppress(OSError, ValueError):  # no limit is "max"
                    most, taken = (int((group / name).read_text()) for name in (limit, used))
                    lines = (group / "memory.stat").read_text().splitlines()
                    stat = dict(line.split(maxsplit=1) for line in lines)
                    yield most - taken + int(stat.get(files, 0)) - int(stat.get(shared, 0))
