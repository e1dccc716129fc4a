"""Attention of one new token of each sequence, which also writes its key and value to the cache.

Dimension letters: `B` sequences, `C` sequences of a cache, `S` positions of a cache, `N` query
heads, `K` key/value heads, `G` queries per key/value head, `H` head width, `L` layers, `R` rows of
a tile.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from grok1.kernels.gpu.attention import attend_block, block_of, check_dtypes, columns
from grok1.kernels.gpu.tiles import LEAST_TILE, Ref, ceil_div, load_tile, outer_mask, power_of_two
from grok1.ops.cache import CacheIndex
from grok1.ops.derivatives import forward_only

PARTS = 16  # programs that share the blocks of a sequence's key/value head


def write_and_attend(
    heads: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    multiplier: float,
    index: CacheIndex,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`cache.write_rows` of a key and a value, and `cache.attend_cached`, in one kernel.

    heads: [B, N + 2 K, H], each sequence's queries, keys and values, after the rotary embedding.
    keys, values: [L, C, S, K, H] of the same dtype, bfloat16 or float32; updated in place. mask:
    bool [B, S]. index: without None; must be within the cache, which is not checked.

    Returns float32 [B, N, H], zero for a query that sees no key; keys; and values. The blocks of a
    sequence are distributed to PARTS programs, whose sums are added in the same order in any batch.
    Raises ValueError if the dtypes do not fit.
    """
    check_dtypes(heads, keys, values)
    batch, kv_heads, width = len(heads), *keys.shape[3:]
    group = heads.shape[1] // kv_heads - 2
    sums = PARTS, batch, kv_heads, group
    kept = jax.ShapeDtypeStruct(keys.shape, keys.dtype)
    call = pl.pallas_call(
        functools.partial(_decode_kernel, block_of(keys), multiplier),
        grid=(PARTS, kv_heads, batch),
        out_shape=(
            jax.ShapeDtypeStruct((*sums, width), jnp.float32),
            jax.ShapeDtypeStruct(sums, jnp.float32),
            kept,
            kept,
        ),
        input_output_aliases={6: 2, 7: 3},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="write_and_attend",
    )
    out, total, keys, values = forward_only(call)(*index, heads, mask, keys, values)
    out, total = (functools.reduce(operator.add, each) for each in (out, total[..., None]))
    out = jnp.where(total == 0, 0, out / jnp.where(total == 0, 1, total))
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
    part, head, b = (pl.program_id(axis) for axis in range(3))
    layer, sequence = plgpu.load(layer_ref), plgpu.load(sequence_ref.at[b])
    start, length = plgpu.load(start_ref.at[b]), plgpu.load(length_ref.at[b])
    size, kv_heads, width = keys_ref.shape[2:]
    group = out_ref.shape[3]
    row, (column, present) = jnp.arange(power_of_two(group, LEAST_TILE)), columns(width)
    own = row < group
    query = load_tile(heads_ref.at[b, (head * group + row)[:, None], column[None]], own, present)
    first = kv_heads * group + head
    new_key = load_tile(heads_ref.at[b, first, column], present)
    new_value = load_tile(heads_ref.at[b, first + kv_heads, column], present)
    # The result of a sequence at rest, with length 0, is not used.
    filled = jnp.where(length > 0, jnp.minimum(start + length, size), 0)

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        position = (part + i * PARTS) * block + jnp.arange(block)
        # Another program writes the new row to the cache, at any time.
        old, new = position < jnp.minimum(start, size), (position == start)[:, None]
        at = layer, sequence, position[:, None], head, column[None]
        key = jnp.where(new, new_key[None], load_tile(keys_ref.at[*at], old, present))
        value = jnp.where(new, new_value[None], load_tile(values_ref.at[*at], old, present))
        seen = load_tile(mask_ref.at[b, position], position < filled)[None]  # [1, block]
        return attend_block(query, key, value, seen, multiplier, sums)

    blocks = ceil_div(filled, block)
    zeros = jnp.zeros([row.size, column.size], jnp.float32)
    own_blocks = ceil_div(jnp.maximum(blocks - part, 0), PARTS)
    out, total = lax.fori_loop(0, own_blocks, add, (zeros, jnp.zeros_like(row, jnp.float32)))
    at = part, b, head, row[:, None], column[None]
    plgpu.store(out_ref.at[*at], out, mask=outer_mask(out.shape, own, present))
    plgpu.store(total_ref.at[part, b, head, row], total, mask=own)

    @pl.when((part == 0) & (length > 0) & (start < size))
    def _() -> None:
        at = layer, sequence, start, head, column
        plgpu.store(new_keys_ref.at[*at], new_key, mask=present)
        plgpu.store(new_values_ref.at[*at], new_value, mask=present)
