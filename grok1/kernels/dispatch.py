"""What a device computes faster by its own means than as XLA compiles it.

Each function equals a plain one, beside which it is tested: `matmul` group by group, `product` with
a table, `attention.attend_cached`. The platform that jax runs on decides whose kernels these are.
"""

import functools
import logging
from typing import Any

import jax

from grok1 import backend
from grok1.kernels import cpu
from grok1.ops import attention
from grok1.ops.quantization import QuantizedWeight8bit, product

_log = logging.getLogger(__name__)
MOST_TABLE_ROWS = 16  # up to which a CPU multiplies faster by `cpu.table_product` than XLA does


def _own() -> Any:
    """Return the module of this platform's kernels."""
    if backend.on_cpu():
        return cpu
    from grok1.kernels import gpu  # where it is wanted: Pallas takes long to import

    return gpu


def load() -> None:
    """Make sure that this platform's kernels are there. Raises cpu.KernelError if they are not."""
    _own().load()


@functools.cache
def available() -> bool:
    """Return whether this platform's kernels are there; logs, once, why they are not."""
    try:
        load()
    except cpu.KernelError as error:
        name = backend.platform().upper()
        _log.warning("note: running without the %s kernels, which is slower: %s", name, error)
        return False
    return True


def grouped_product(
    x: jax.Array, weight: QuantizedWeight8bit, starts: jax.Array, layer: jax.Array
) -> jax.Array:
    """Multiply each row with the matrix of its group; see `cpu.grouped_product`."""
    return _own().grouped_product(x, weight, starts, layer)


def gated_product(
    x: jax.Array,
    gate: QuantizedWeight8bit,
    value: QuantizedWeight8bit,
    starts: jax.Array,
    layer: jax.Array,
) -> jax.Array:
    """`gelu(x @ gate) * (x @ value)`, each row with the matrices of its group -> float32."""
    own = _own()
    if own is cpu:
        return cpu.gated_product(x, gate, value, starts, layer)
    gates = jax.nn.gelu(own.grouped_product(x, gate, starts, layer), approximate=True)
    return gates * own.grouped_product(x, value, starts, layer)


def table_product(x: jax.Array, table: jax.Array) -> jax.Array:
    """`x [M, D] @ table.T`, table [V, D] of x's dtype -> float32 [M, V]."""
    if _own() is cpu and x.shape[0] <= MOST_TABLE_ROWS:
        return cpu.table_product(x, table)
    return product("md,vd->mv", x, table)


def attend_cached(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    multiplier: float,
    layer: jax.Array,
    filled: jax.Array,
    sequence: jax.Array | None = None,
) -> jax.Array:
    """`attention.attend_cached`. A CPU has a kernel of its own for one query a sequence."""
    own = _own()
    if own is not cpu:
        attend = own.attend_cached
    elif query.shape[1] == 1 and sequence is None:
        return cpu.attend_one(query, keys, values, mask, multiplier, layer, filled)
    else:
        attend = attention.attend_cached
    return attend(query, keys, values, mask, multiplier, layer, filled, sequence)
