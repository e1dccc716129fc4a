"""Tests run on sixteen virtual CPU devices, which must be asked for before jax starts."""

import os
import pathlib
import signal
import sys

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=16"
).strip()
# Nothing of a test is kept: programs are compiled, and no home directory is written to.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
# In the background of a shell script Ctrl-C is ignored, by child processes as well: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)
