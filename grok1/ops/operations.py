"""The operations that a processor may have its own forms of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from grok1.ops import cache, mixture, quantization


def table_product(x: jax.Array, table: jax.Array) -> jax.Array:
    """`x [M, D] @ table.T`, table [V, D] of x's dtype -> float32 [M, V]."""
    return quantization.product("md,vd->mv", x, table)


class Operations(NamedTuple):
    """One set of forms; the default ones are plain JAX, which any platform runs.

    Each function takes and returns what the default one does, on one device.
    cache_dtype: the dtype in which a cache of some dtype is best stored, of the same size; view: a
    cache so stored -> the values that it holds.
    takes_stacked: whether `matmul` reads a StackedWeight of int8 where it is.
    """

    matmul: Callable[..., jax.Array] = quantization.matmul
    table_product: Callable[..., jax.Array] = table_product
    mixture: Callable[..., jax.Array] = mixture.chosen_experts
    write_rows: Callable[..., jax.Array] = cache.write_rows
    attend_cached: Callable[..., jax.Array] = cache.attend_cached
    cache_dtype: Callable[[Any], Any] = lambda dtype: dtype
    view: Callable[[jax.Array], jax.Array] = lambda cache: cache
    takes_stacked: bool = False
