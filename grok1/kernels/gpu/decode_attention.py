"""Attention of one new token of each sequence, which also writes its key and value to the cache.

Dimension letters: `B` sequences, `C` sequences of a cache, `S` positions of a cache, `N` query
heads, `K` key/value heads, `G` queries per key/value head, `H` head width, `L` layers, `R` rows of
a tile.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from grok1.kernels.gpu.attention import attend_block, block_of, check_dtypes
from grok1.kernels.gpu.tiles import (
    LEAST_TILE,
    Axis,
    Ref,
    load,
    run_kernel,
    store,
    sum_in_order,
    whole,
)
from grok1.ops.cache import CacheIndex, mean

PARTS = 16  # programs that share the blocks of a sequence's key/value head


def write_and_attend(
    heads: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    multiplier: float,
    index: CacheIndex,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cache.write_rows` of a key and a value, and `cache.attend_cached`, in one kernel.

    heads: [B, N + 2 K, H], each sequence's queries, keys and values, after the rotary embedding.
    keys, values: [L, C, S, K, H] of the same dtype, bfloat16 or float32; updated in place. mask:
    bool [B, S]. index: no field may be None; of each sequence one row is written, or none, if its
    length is 0 or the cache is full. Layer and sequences must be within the cache, which is not
    checked.

    Returns float32 [B, N, H], zero for a query that sees no key or, unlike `attend_cached`, has
    length 0; keys; and values. Sequences must differ.
    The blocks of a sequence are distributed to PARTS programs, whose sums are added in the same
    order in any batch.
    Raises ValueError if the dtypes do not fit.
    """
    check_dtypes(heads, keys, values)
    batch, kv_heads, width = len(heads), *keys.shape[3:]
    group = heads.shape[1] // kv_heads - 2
    sums = PARTS, batch, kv_heads, group
    arrays: tuple[Any, ...] = (*index, heads, mask, keys, values)
    out, total, keys, values = run_kernel(
        functools.partial(_decode_kernel, block_of(keys), multiplier),
        (PARTS, kv_heads, batch),
        [
            ((*sums, width), jnp.float32),
            (sums, jnp.float32),
            (keys.shape, keys.dtype),
            (values.shape, values.dtype),
        ],
        arrays,
        aliases={6: 2, 7: 3},  # the caches
        name="write_and_attend",
        warps=4,
        stages=2,
    )
    out = mean(sum_in_order(out), sum_in_order(total)[..., None])
    return out.reshape(batch, -1, width), keys, values


def _decode_kernel(
    block: int,
    multiplier: float,
    layer_ref: Ref,
    start_ref: Ref,
    length_ref: Ref,
    sequence_ref: Ref,
    heads_ref: Ref,
    mask_ref: Ref,
    keys_ref: Ref,
    values_ref: Ref,
    out_ref: Ref,
    total_ref: Ref,
    new_keys_ref: Ref,
    new_values_ref: Ref,
) -> None:
    """Write the sums of a part of the positions: [R, H] and [R]; and the new rows [H]."""
    part, head, b = (pl.program_id(n) for n in range(3))
    layer, sequence = load(layer_ref), load(sequence_ref, b)
    start, length = load(start_ref, b), load(length_ref, b)
    size, kv_heads, width = keys_ref.shape[2:]
    group = out_ref.shape[3]
    row, column = whole(group, LEAST_TILE), whole(width, LEAST_TILE)
    query = load(heads_ref, b, row._replace(indices=head * group + row.indices), column)
    first = kv_heads * group + head
    new_key, new_value = (load(heads_ref, b, n, column) for n in (first, first + kv_heads))
    filled = jnp.where(length > 0, jnp.minimum(start + length, size), 0)

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        position = (part + i * PARTS) * block + jnp.arange(block)
        # The new row is taken from `heads`: another program writes it to the cache meanwhile.
        old, new = Axis(position, position < jnp.minimum(start, size)), (position == start)[:, None]
        at = layer, sequence, old, head, column
        key = jnp.where(new, new_key[None], load(keys_ref, *at))
        value = jnp.where(new, new_value[None], load(values_ref, *at))
        seen = load(mask_ref, b, Axis(position, position < filled))[None]  # [1, block]
        return attend_block(query, key, value, seen, multiplier, sums)

    own_blocks = pl.cdiv(jnp.maximum(pl.cdiv(filled, block) - part, 0), PARTS)
    sums = jnp.zeros(query.shape, jnp.float32), jnp.zeros_like(row.indices, jnp.float32)
    out, total = lax.fori_loop(0, own_blocks, add, sums)
    store(out_ref, out, part, b, head, row, column)
    store(total_ref, total, part, b, head, row)

    @pl.when((part == 0) & (length > 0) & (start < size))
    def _() -> None:
        store(new_keys_ref, new_key, layer, sequence, start, head, column)
        store(new_values_ref, new_value, layer, sequence, start, head, column)
