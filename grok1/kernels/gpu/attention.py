"""Attention over the cache.

Dimension letters: `B` sequences, `C` sequences of a cache, `T` query positions, `S` positions of a
cache, `K` key/value heads, `G` queries per key/value head, `H` head width (`H'` of values), `L`
layers, `R` rows of a tile.

The kernel takes all layers and the index of one, and reads only what is filled.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from grok1.kernels.gpu.tiles import (
    LEAST_TILE,
    Axis,
    Ref,
    check_addresses,
    load,
    power_of_two,
    run_kernel,
    span,
    store,
    whole,
)
from grok1.ops.cache import SOFT_CAP, last_seen, mean
from grok1.ops.quantization import product


def block_of(keys: jax.Array) -> int:
    """Return how many positions of a cache [..., H] are attended to at a time.

    A few blocks of keys and values must fit the memory of a processor, 99 KiB on some GPUs.
    """
    row_bytes = power_of_two(keys.shape[-1], LEAST_TILE) * keys.dtype.itemsize
    return max(LEAST_TILE, min(64, 2**14 // row_bytes))


def attend_cached(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    multiplier: float,
    layer: jax.Array,
    filled: jax.Array,
    sequence: jax.Array | None = None,
    *,
    last: jax.Array | None = None,
) -> jax.Array:
    """`cache.attend_cached` in one kernel, which reads only the filled part of a cache.

    query [B, T, K, G, H]. keys, values: [L, C, S, K, H], of which `layer` int32 [] is read. All are
    bfloat16, or float32, which is multiplied without tensor cores. mask: bool [1 or B, 1 or T, S or
    1]. filled: int32 [B], how many positions of each sequence hold a key. sequence: int32
    [B], the index of each query's sequence among the C of the cache; None: B = C, in order. Returns
    float32 [B, T, K, G, H], zero where a query sees no key. `layer` and `sequence` must be within
    the cache, which is not checked. last: `cache.last_seen` of the mask for all S positions.

    Raises ValueError if shapes or dtypes do not fit, or if the mask takes between 2 and 4 GiB.
    """
    batch, queries, kv_heads, group, width = query.shape
    _check_attention(query, keys, values, mask)
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], keys.shape[2]))
    check_addresses("a mask", mask)
    if last is None:
        last = last_seen(mask)
    if sequence is None:
        sequence = jnp.arange(batch, dtype=jnp.int32)
    block = block_of(keys)
    height = min(64, power_of_two(queries * group, LEAST_TILE))
    rows = query.reshape(batch, -1, width)
    last = jnp.broadcast_to(last, (batch, queries))
    (y,) = run_kernel(
        functools.partial(_attention_kernel, group, height, block, multiplier),
        (pl.cdiv(queries * group, height), kv_heads, batch),
        [((*rows.shape[:2], values.shape[-1]), jnp.float32)],
        (layer, sequence, filled, last, rows, keys, values, mask),
        name="attend_cached",
        warps=4,
        stages=3 if block == 64 else 2,
    )
    return y.reshape(*query.shape[:-1], -1)


def _check_attention(query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array) -> None:
    """Raise ValueError if the arguments of `attend_cached` do not fit each other."""
    kv_heads, width = query.shape[2], query.shape[-1]
    if keys.shape[:-1] != values.shape[:-1] or keys.shape[-2:] != (kv_heads, width):
        raise ValueError(
            f"queries of shape {query.shape} do not fit caches of {keys.shape} and {values.shape}"
        )
    if mask.ndim != 3:
        raise ValueError(f"mask must be [1 or B, 1 or T, S or 1], got shape {mask.shape}")
    check_dtypes(query, keys, values)


def check_dtypes(query: jax.Array, keys: jax.Array, values: jax.Array) -> None:
    """Raise ValueError unless queries and cache have a dtype that the kernels take."""
    dtypes = {query.dtype, keys.dtype, values.dtype}
    if len(dtypes) > 1 or query.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"queries and cache must be all bfloat16 or all float32, got {dtypes}")


def _attention_kernel(
    group: int,
    height: int,
    block: int,
    multiplier: float,
    layer_ref: Ref,
    sequence_ref: Ref,
    filled_ref: Ref,
    last_ref: Ref,
    query_ref: Ref,
    keys_ref: Ref,
    values_ref: Ref,
    mask_ref: Ref,
    out_ref: Ref,
) -> None:
    """Write the results of a tile of the T x G queries of a sequence's key/value head: [R, H']."""
    tile, head, b = (pl.program_id(n) for n in range(3))
    layer, sequence = load(layer_ref), load(sequence_ref, b)
    own = span(height, last_ref.shape[1] * group, tile * height)
    token = own._replace(indices=lax.div(own.indices, group))
    in_group = lax.rem(own.indices, group)
    # A row is a token, a key/value head, and a query of its group.
    row = own._replace(indices=(token.indices * keys_ref.shape[3] + head) * group + in_group)
    column, out_column = (whole(ref.shape[-1], LEAST_TILE) for ref in (keys_ref, values_ref))
    query = load(query_ref, b, row, column)
    reach = jnp.minimum(jnp.max(load(last_ref, b, token)), load(filled_ref, b))
    # One mask may be for all sequences, or all queries.
    mask_row = jnp.minimum(b, mask_ref.shape[0] - 1)
    mask_token = token._replace(indices=jnp.minimum(token.indices, mask_ref.shape[1] - 1))

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        position = i * block + jnp.arange(block)
        present = Axis(position, position < reach)
        key = load(keys_ref, layer, sequence, present, head, column)
        value = load(values_ref, layer, sequence, present, head, out_column)
        seen = load(mask_ref, mask_row, mask_token, present)
        return attend_block(query, key, value, seen, multiplier, sums)

    sums = (
        jnp.zeros([height, out_column.indices.size], jnp.float32),
        jnp.zeros([height], jnp.float32),
    )
    out, total = lax.fori_loop(0, pl.cdiv(reach, block), add, sums)
    store(out_ref, mean(out, total[:, None]), b, row, out_column)


def attend_block(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    seen: jax.Array,
    multiplier: float,
    sums: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    """Add a block of positions to the sums [R, H'] of values and [R] of weights, in a kernel.

    query [R, H], key [block, H], value [block, H'], seen bool [R or 1, block]. The soft cap bounds
    the scores, so no maximum need be subtracted from them.
    """
    scores = product("rh,sh->rs", query, key) * multiplier
    scores = SOFT_CAP * jnp.tanh(scores / SOFT_CAP)
    weights = jnp.where(seen, jnp.exp(scores), 0.0)
    out = product("rs,sh->rh", weights.astype(value.dtype), value)
    return sums[0] + out, sums[1] + jnp.sum(weights, axis=1)
