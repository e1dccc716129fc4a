"""Where what is compiled on one machine is kept for the next start."""

import hashlib
import os
import platform
from pathlib import Path


def default_directory() -> Path:
    """Return the directory for programs compiled on this kind of machine."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():  # others are not valid
        base = Path.home() / ".cache"
    return base / "grok-1-jax" / machine()


def machine() -> str:
    """Return a name for this kind of processor: code for another one might not run here.

    jax's own keys do not tell them apart, and a home directory may be that of many machines.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # As x86 and ARM call what a processor can do.
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    found = f"{platform.system()} {platform.processor()} {features}"
    return f"{platform.machine()}-{hashlib.sha256(found.encode()).hexdigest()[:8]}"
