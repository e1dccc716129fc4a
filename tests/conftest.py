"""Tests run on sixteen virtual CPU devices, which must be asked for before jax starts."""

import gc
import os
import signal
import sys
import tempfile

import pytest

import compiling
from paths import ROOT

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=16"
).strip()
pytest_plugins = ["commands", "processes"]
# Programs are compiled, not kept, and no home directory is written to. Only the CPU's kernel, which
# the first process compiles for all, is kept: not in the clone, which others may be able to write.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["XDG_CACHE_HOME"] = f"{tempfile.gettempdir()}/grok-1-jax-tests-{os.geteuid()}"
os.environ["HF_HUB_OFFLINE"] = "1"  # of the evaluation harness
sys.path.insert(0, str(ROOT))
# In the background of a shell script Ctrl-C is ignored, by child processes as well: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Python would look for garbage among jax's many objects ten times as often.
gc.set_threshold(100_000, 50, 100)

# XLA's optimizations are disabled except in the modules that test numbers, memory or speed of the
# programs that a user's machine runs.
OPTIMIZED = {
    "test_benchmarks",
    "test_cpu_kernels",
    "test_demo",
    "test_full_size",
    "test_golden",
    "test_hlo",
    "test_memory",
    "test_mixture_rows",
    "test_sampling",
    "test_xla_cpu",
}


@pytest.fixture(autouse=True, scope="session")
def quick_options() -> None:
    """Let modules choose how programs are compiled."""
    compiling.install()


@pytest.fixture(autouse=True, scope="module")
def optimizations(request: pytest.FixtureRequest) -> None:
    """Compile as the module needs it, in this process and in those that it starts."""
    compiling.set_quick(request.module.__name__.rpartition(".")[2] not in OPTIMIZED)
