"""The grouped product for a CPU: compiled from cpu.cc when it is first wanted, and kept."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxlib

import compile_cache
from quantization import QuantizedWeight8bit

SOURCE = Path(__file__).with_name("cpu.cc")
COMPILERS = "c++", "g++", "clang++"
FLAGS = "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w"
TARGET = "grok_1_grouped_product"


class KernelError(Exception):
    """Why there is no kernel on this machine, in a few words."""


def grouped_product(
    x: jax.Array, weight: QuantizedWeight8bit, starts: jax.Array, layer: jax.Array
) -> jax.Array:
    """Multiply each row with the matrix of its group.

    x: float [M, I], sorted by group. weight: [L, E, I, O], of which `layer` int32 [] is used.
    starts: int32 [E + 1], where in x each group begins, and at last where all end.
    Returns float32 [M, O], zero in the rows after the last group, accumulated in float32. A row's
    result depends on no other row. Only what is used of the weight is read, as int8, once for up to
    64 rows.

    Raises KernelError as `load` does.
    """
    load()
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call(TARGET, shape)
    return call(x.astype(jnp.float32), weight.weight, weight.scales, starts, layer)


@functools.cache
def load() -> None:
    """Compile the kernel, unless that has been done before, and let jax call it.

    Raises KernelError where that cannot be.
    """
    path = _build()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        path.unlink(missing_ok=True)  # the next start compiles it anew
        raise KernelError(str(error)) from None
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.GroupedProduct), platform="cpu")


def _build() -> Path:
    """Return the compiled kernel."""
    compiler = _compiler()
    try:
        version = subprocess.run(
            [compiler, "--version"], capture_output=True, text=True, errors="replace", check=True
        ).stdout
        parts = SOURCE.read_text(), compiler, version, jaxlib.__version__, *FLAGS
        name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        directory = compile_cache.default_directory() / "kernels"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds code that is run
        library = directory / f"cpu-{name}.so"
        if not library.exists():
            _compile(compiler, library)
    except subprocess.CalledProcessError as error:
        lines = [*error.stderr.strip().splitlines(), f"it ended with status {error.returncode}"]
        wrong = next((line for line in lines if "error" in line), lines[-1])
        raise KernelError(f"{compiler} failed: {wrong}") from None
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        raise KernelError(str(error)) from None
    return library


def _compiler() -> str:
    """Return the C++ compiler that CXX names, or the first that is there."""
    named = os.environ.get("CXX")
    for name in (named,) if named else COMPILERS:
        if path := shutil.which(name):
            return path
    raise KernelError(f"no C++ compiler was found: {named or ', '.join(COMPILERS)}")


def _compile(compiler: str, library: Path) -> None:
    """Compile to `library`, which is whole or not there, whoever else compiles it."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        subprocess.run(
            [compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(made)],
            capture_output=True, text=True, errors="replace", check=True,
        )  # fmt: skip
        os.replace(made, library)
