"""The operations that can have processor-specific implementations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.typing import DTypeLike

from grok1.ops import cache, mixture, quantization


def table_product(x: jax.Array, table: jax.Array) -> jax.Array:
    """`x [M, D] @ table.T`, table [V, D] of x's dtype -> float32 [M, V]."""
    return quantization.product("md,vd->mv", x, table)


class Operations(NamedTuple):
    """One set of implementations; the defaults are plain JAX, which runs on any platform.

    Each function takes and returns the same as the default one, on one device.
    cache_dtype: a cache's dtype -> the best dtype of that size for storing it; view: a cache stored
    that way -> its values.
    takes_stacked: whether `matmul` reads a StackedWeight of int8 without slicing it.
    likely_logits: (x [M, D], table, RoundedTable, count) -> logits [M, V], which are those of
    `table_product` for the `count` largest of a row; or None, where the table is read instead.
    draw: a form of `sampling.draw_token`, or None.
    fused_layer: a decoder layer with quantized weights and a cache, see kernels/gpu/layer.py; or
    None: by the other operations.
    """

    matmul: Callable[..., jax.Array] = quantization.matmul
    table_product: Callable[..., jax.Array] = table_product
    mixture: Callable[..., jax.Array] = mixture.chosen_experts
    write_rows: Callable[..., jax.Array] = cache.write_rows
    attend_cached: Callable[..., jax.Array] = cache.attend_cached
    cache_dtype: Callable[[DTypeLike], DTypeLike] = lambda dtype: dtype
    view: Callable[[jax.Array], jax.Array] = lambda cache: cache
    takes_stacked: bool = False
    likely_logits: Callable[..., jax.Array] | None = None
    draw: Callable[..., tuple[jax.Array, jax.Array, jax.Array]] | None = None
    fused_layer: Callable[..., Any] | None = None
