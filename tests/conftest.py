"""Tests run on sixteen virtual CPU devices, which must be asked for before jax starts."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator

import pytest

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
sys.path.insert(0, str(ROOT))
# In the background of a shell script Ctrl-C is ignored, by child processes as well: tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What these tests hold is about structure, within tolerances, and compiling it takes most of their
# time: XLA does it without most of its optimisations. All others see what a user's machine runs.
QUICKLY_COMPILED = {
    "test_execution",
    "test_gpu_kernels",
    "test_inspection",
    "test_meshes",
    "test_mixture",
    "test_modules",
    "test_train_demo",
}


@pytest.fixture(autouse=True, scope="module")
def optimisations(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile as the module's tests want it, and let no other module use what is compiled so."""
    quickly = request.module.__name__.rpartition(".")[2] in QUICKLY_COMPILED
    if quickly:
        import jax

        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    if quickly:
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()
