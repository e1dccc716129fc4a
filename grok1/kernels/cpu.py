"""Kernels for a CPU: compiled from cpu.cc when they are first wanted, and kept."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

from grok1.cache_directory import default_directory
from grok1.kernels import xla_cpu
from grok1.kernels.error import KernelError
from grok1.kernels.sorted_experts import grouped_experts, is_int8, one_group
from grok1.ops.mixture import Params
from grok1.ops.operations import table_product as plain_table_product
from grok1.ops.quantization import QuantizedWeight8bit, StackedWeight, Weight

SOURCE = Path(__file__).with_name("cpu.cc")
HEADERS = tuple(SOURCE.with_name(name) for name in ("floats.h", "integers.h", "lanes.h"))
COMPILERS = "c++", "g++", "clang++"
FLAGS = "-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-w"
PRODUCT = "grok_1_grouped_product"
GATED_PRODUCT = "grok_1_gated_product"
TABLE_PRODUCT = "grok_1_table_product"
ATTEND = "grok_1_attend"
HANDLERS = {
    PRODUCT: "GroupedProduct",
    GATED_PRODUCT: "GatedProduct",
    TABLE_PRODUCT: "TableProduct",
    ATTEND: "Attend",
}
MOST_TABLE_ROWS = 16  # up to which `table_product` is faster than XLA's
FASTEST, DOTS, FLOATS = range(3)  # how int8 is multiplied, as cpu.cc numbers it
form = FASTEST  # the tests try the others


def grouped_product(
    x: jax.Array, weight: QuantizedWeight8bit, starts: jax.Array, layer: jax.Array
) -> jax.Array:
    """Multiply each row with the matrix of its group.

    x: float [M, I], sorted by group. weight: [L, E, I, O], of which `layer` int32 [] is used.
    starts: int32 [E + 1], where in x each group begins, and at last where all end.
    Returns float32 [M, O], zero in the rows after the last group. A processor with AMX multiplies
    integers of 27 bits, as `xla_cpu.matmul` does; another one accumulates in
    float32. A row's result depends on no other row. Only what is used of the weight is read, as
    int8, once for up to 64 rows.

    Raises KernelError as `load` does.
    """
    load()
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[-1]), jnp.float32)
    call = jax.ffi.ffi_call(PRODUCT, shape)
    arrays = x.astype(jnp.float32), weight.weight, weight.scales, starts, layer
    return call(*arrays, form=np.int32(form))


def gated_product(
    x: jax.Array,
    gate: QuantizedWeight8bit,
    value: QuantizedWeight8bit,
    starts: jax.Array,
    layer: jax.Array,
) -> jax.Array:
    """`gelu(x @ gate) * (x @ value)`, both as `grouped_product` multiplies -> float32 [M, O].

    gelu in its tanh approximation. Raises KernelError as `load` does.
    """
    load()
    shape = jax.ShapeDtypeStruct((x.shape[0], gate.shape[-1]), jnp.float32)
    weights = gate.weight, gate.scales, value.weight, value.scales
    call = jax.ffi.ffi_call(GATED_PRODUCT, shape)
    return call(x.astype(jnp.float32), *weights, starts, layer, form=np.int32(form))


def table_product(x: jax.Array, table: jax.Array) -> jax.Array:
    """`x [M, D] @ table.T`, table float32 or bfloat16 [V, D] -> float32 [M, V], accumulated so.

    The table is read once, as it is stored. Faster than XLA's product for a few rows.

    Raises KernelError as `load` does.
    """
    load()
    shape = jax.ShapeDtypeStruct((x.shape[0], table.shape[0]), jnp.float32)
    return jax.ffi.ffi_call(TABLE_PRODUCT, shape)(x.astype(jnp.float32), table)


def attend_one(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    multiplier: float,
    layer: jax.Array,
    filled: jax.Array,
) -> jax.Array:
    """`cache.attend_cached` for one position of each sequence, T = 1 and B = C.

    keys, values: float32, bfloat16 or its bits. What is not filled is not read.

    Raises KernelError as `load` does.
    """
    load()
    positions = jnp.broadcast_to(mask[:, 0], (query.shape[0], keys.shape[2]))
    rows = query[:, 0].astype(jnp.float32)
    call = jax.ffi.ffi_call(ATTEND, jax.ShapeDtypeStruct(rows.shape, jnp.float32))
    arrays = rows, keys, values, positions, layer, filled
    return call(*arrays, multiplier=np.float32(multiplier))[:, None]


@functools.cache
def load() -> None:
    """Compile the kernels, unless that has been done before, and let jax call them.

    Raises KernelError where that cannot be.
    """
    # Not among what is kept: the system clears away what an interruption leaves there.
    with tempfile.TemporaryDirectory() as scratch:
        path = _build(Path(scratch))
        try:
            library = ctypes.CDLL(str(path))  # stays there when its file has gone
        except OSError as error:
            raise KernelError(str(error)) from None
    for target, name in HANDLERS.items():
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")


def _build(scratch: Path) -> Path:
    """Return the compiled library: the one that is kept, if it is whole, or a new one.

    Where it cannot be kept it is left in `scratch`, and the next start compiles anew.
    """
    compiler = _compiler()
    try:
        version = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, errors="replace", check=True
        ).stdout
        sources = (path.read_text() for path in (SOURCE, *HEADERS))
        parts = *sources, *compiler, version, jaxlib.__version__, *FLAGS
        name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        kept = _directory(scratch) / f"cpu-{name}.so"
        if _is_whole(kept):
            return kept
        made = scratch / "made.so"
        _compile(compiler, made)
    except subprocess.CalledProcessError as error:
        lines = [*error.stderr.strip().splitlines(), f"it ended with status {error.returncode}"]
        wrong = next((line for line in lines if "error" in line), lines[-1])
        raise KernelError(f"{compiler[0]} failed: {wrong}") from None
    except OSError as error:
        raise KernelError(str(error)) from None
    if not made.exists():
        raise KernelError(f"{compiler[0]} made no library")
    try:
        # The library is whole when its digest is there, whoever else writes it.
        _replace(kept, made.read_bytes())
        _replace(_digest_file(kept), _digest(kept).encode())
    except OSError:
        return made
    return kept


def _compile(compiler: Sequence[str], library: Path) -> None:
    """Compile the kernels to `library`."""
    subprocess.run(
        [*compiler, *FLAGS, "-isystem", jax.ffi.include_dir(), str(SOURCE), "-o", str(library)],
        capture_output=True, text=True, errors="replace", check=True,
    )  # fmt: skip


def _directory(scratch: Path) -> Path:
    """Return where compiled kernels are kept, or `scratch` if they cannot be."""
    try:
        directory = default_directory() / "kernels"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)  # it holds code that is run
    except (OSError, RuntimeError):  # RuntimeError: there is no home directory
        return scratch
    return directory


def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _digest_file(library: Path) -> Path:
    return library.with_suffix(".sha256")


def _is_whole(library: Path) -> bool:
    """Whether a library is there as it was written: a damaged one would end the process."""
    try:
        return _digest_file(library).read_text() == _digest(library)
    except (OSError, UnicodeDecodeError):
        return False


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


def _compiler() -> tuple[str, ...]:
    """Return the command of the C++ compiler that CXX names, or of the first that is there."""
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [[name] for name in COMPILERS]:
        if path := shutil.which(command[0]):
            return path, *command[1:]
    raise KernelError(f"no C++ compiler was found: {' '.join(named) or ', '.join(COMPILERS)}")


# --------------------------------------------------------------------- which form is used for what


def _matmul(x: jax.Array, weight: Weight) -> jax.Array:
    if isinstance(weight, StackedWeight) and isinstance(weight.stack, QuantizedWeight8bit):
        return one_group(grouped_product, x, weight)
    return xla_cpu.matmul(x, weight)


def _table_product(x: jax.Array, table: jax.Array) -> jax.Array:
    few = x.shape[0] <= MOST_TABLE_ROWS
    return table_product(x, table) if few else plain_table_product(x, table)


def _mixture(params: Params, x: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
    if not is_int8(params):
        return xla_cpu.chosen_experts(params, x, gates, index)
    return grouped_experts(gated_product, grouped_product, params, x, gates, index)


def _attend_cached(query: jax.Array, *cached: Any) -> jax.Array:
    *arrays, sequence = cached
    if query.shape[1] == 1 and sequence is None:
        return attend_one(query, *arrays)
    return xla_cpu.attend_cached(query, *cached)


OPERATIONS = xla_cpu.OPERATIONS._replace(
    matmul=_matmul,
    table_product=_table_product,
    mixture=_mixture,
    attend_cached=_attend_cached,
    takes_stacked=True,
)
