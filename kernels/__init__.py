"""What a device computes faster by its own means than as XLA compiles it.

Each function equals a plain one, beside which it is tested, and takes what that takes: `matmul` by
groups, `product` with a table, `attention.attend_cached`. The platform that jax runs on decides.
"""

import jax

from attention import attend_cached as plain_attend_cached
from kernels import cpu
from quantization import QuantizedWeight8bit, product

MOST_TABLE_ROWS = 16  # up to which a CPU multiplies faster by `cpu.table_product` than XLA does


def grouped_product(
    x: jax.Array, weight: QuantizedWeight8bit, starts: jax.Array, layer: jax.Array
) -> jax.Array:
    """Multiply each row with the matrix of its group; see `cpu.grouped_product`."""
    return cpu.grouped_product(x, weight, starts, layer)


def table_product(x: jax.Array, table: jax.Array) -> jax.Array:
    """`x [M, D] @ table.T`, table [V, D] of x's dtype -> float32 [M, V]."""
    if x.shape[0] <= MOST_TABLE_ROWS:
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
    """`attention.attend_cached`."""
    if query.shape[1] == 1 and sequence is None:
        return cpu.attend_one(query, keys, values, mask, multiplier, layer, filled)
    return plain_attend_cached(query, keys, values, mask, multiplier, layer, filled, sequence)
