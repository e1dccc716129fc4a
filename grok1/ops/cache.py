"""The cache of keys and values: what a model remembers between calls, and how rows are written.

Dimension letters: `B` batch, or the sequences whose rows are written; `C` sequences of a cache, `T`
new positions, `S` positions of a cache, `K` key/value heads, `H` head width, `L` layers.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from grok1.backend import on_cpu


class KVMemory(NamedTuple):
    """Keys and values of past positions.

    k, v: [L, B, S, K, H] for all layers, or [B, S, K, H] for one.
    step: int32 [B], the positions that each sequence has filled.
    sequence: int32 [R], while R of the B sequences are read, one a row: which ones. `step` is then
        theirs, [R]. None: all, in order.
    """

    k: jax.Array
    v: jax.Array
    step: jax.Array
    sequence: jax.Array | None = None


class Memory(NamedTuple):
    """What a model must remember between calls.

    layers: one KVMemory for all layers.
    valid: bool [B, S], whether the slot holds a real key: a pad token is masked for good.
    """

    layers: KVMemory
    valid: jax.Array


def write_rows(
    cache: jax.Array,
    new: jax.Array,
    layer: jax.Array,
    start: jax.Array,
    length: jax.Array,
    sequence: jax.Array | None = None,
) -> jax.Array:
    """Write the first `length` of T new rows of each sequence at its own position.

    cache [L, C, S, K, H], new [B, T, K, H], layer scalar, start [B], length [B] -> the cache.
    Rows past a sequence's length, or past the end of the cache, are dropped. sequence: as in
    `attend_cached`.
    """
    rows, slots = new.shape[1], cache.shape[2]
    if cache.dtype == jnp.uint16:  # the bits of bfloat16
        new = lax.bitcast_convert_type(new.astype(jnp.bfloat16), jnp.uint16)
    else:
        new = new.astype(cache.dtype)

    # One update a sequence: a vmapped one copies the stacked cache in every layer.
    def write(b: jax.Array, cache: jax.Array) -> jax.Array:
        # dynamic_update_slice clamps its start, which would shift a chunk that runs past the end
        # over earlier slots. So the window is clamped here, and rows keep their own slots in it.
        window = jnp.clip(start[b], 0, slots - rows)
        row = jnp.arange(rows) - (start[b] - window)
        keep = (row >= 0) & (row < length[b])
        at = (layer, b if sequence is None else sequence[b], window, 0, 0)
        old = lax.dynamic_slice(cache, at, (1, 1, rows, *cache.shape[3:]))
        fresh = jnp.where(keep[:, None, None], new[b][jnp.maximum(row, 0)], old[0, 0])
        return lax.dynamic_update_slice(cache, fresh[None, None], at)

    return lax.fori_loop(0, new.shape[0], write, cache)


def cache_dtype(dtype: Any) -> Any:
    """Return the type in which a cache of `dtype` is best kept: on a CPU, bfloat16 as its bits.

    XLA's CPU backend has bfloat16 in products only: to write a row of a bfloat16 cache it would
    convert the whole cache to float32 and back, in every layer. So the loop over layers carries
    uint16 there. A cache of bfloat16 works as well, but is converted when a step begins and ends.
    """
    bits = dtype == jnp.bfloat16 and on_cpu()
    return jnp.uint16 if bits else dtype


def from_bits(x: jax.Array) -> jax.Array:
    """See the uint16 of `cache_dtype` as the bfloat16 that it is; anything else as it is."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x
