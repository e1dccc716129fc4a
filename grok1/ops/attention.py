"""Attention and its cache as pure functions: the obvious form, and one that reads what is used.

Dimension letters: `B` sequences, `C` sequences of a cache, `T` query positions, `S` positions of a
cache, `K` key/value heads, `G` queries per key/value head, `H` head width, `L` layers.

Grok-1 caps its scores at 30, so their exponentials lie between 1e-13 and 1e13 and a softmax needs
no maximum to be subtracted: it is two sums, which can be taken block by block. A block that holds
no key of a sequence adds zero to both, exactly: how far the longest sequence of a batch has come
changes no bit of the others.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from grok1.ops.cache import from_bits
from grok1.ops.quantization import product

ATTENTION_SOFT_CAP = 30.0
BLOCK = 128  # positions of the cache that are attended to at a time


def _scores(query: jax.Array, key: jax.Array, multiplier: float) -> jax.Array:
    """query [B, T, K, G, H], key [B, S, K, H] -> float32 [B, K, G, T, S], within the soft cap."""
    scores = product("btkgh,bskh->bkgts", query, key) * multiplier
    return ATTENTION_SOFT_CAP * jnp.tanh(scores / ATTENTION_SOFT_CAP)


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array, multiplier: float
) -> jax.Array:
    """Grouped-query attention with Grok-1's soft cap: the obvious form.

    query [B, T, K, G, H], key [B, S, K, H], value [B, S, K, H'], mask bool [B, T, S] (True: may
    see) -> float32 [B, T, K, G, H']. A query that sees no key gets zero.
    """
    mask = mask[..., None, None, :, :]  # [B, 1, 1, T, S]
    weights = jnp.where(mask, jnp.exp(_scores(query, key, multiplier)), 0.0)
    out = product("bkgts,bskh->btkgh", weights.astype(value.dtype), value)
    return _normalise(out, jnp.sum(weights, axis=-1))


def attention_weights(
    query: jax.Array, key: jax.Array, mask: jax.Array, multiplier: float
) -> jax.Array:
    """Return what each query takes of each key, float32 [B, K, G, T, S]; arguments as `attend`.

    They sum to one over S, or are zero for a query that sees no key. `weigh` makes of them what
    `attend` returns.
    """
    weights = jnp.where(mask[..., None, None, :, :], jnp.exp(_scores(query, key, multiplier)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


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
    """`attend` to the first positions of a cache, in blocks, as many as the longest sequence needs.

    keys, values: [L, C, S, K, H], of which `layer` is read. mask: bool, broadcast to [B, T, S].
    filled: int32 [B], how many positions of each sequence hold a key. sequence: int32 [B], where
    among the C of the cache each query's sequence is; None: B = C, in order.
    """
    size = keys.shape[2]
    block = min(BLOCK, size)
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], size))
    batch, rows, *heads, _ = query.shape

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, total = sums
        start = jnp.minimum(i * block, size - block)  # the last block may overlap the one before it
        key, value = (_read_block(cache, layer, start, block, sequence) for cache in (keys, values))
        position = start + jnp.arange(block)
        seen = lax.dynamic_slice_in_dim(mask, start, block, axis=-1)  # [B, T, block]
        seen &= (position >= i * block) & (position < filled[:, None, None])
        scores = _scores(query, key, multiplier)
        weights = jnp.where(seen[:, None, None], jnp.exp(scores), 0.0)
        out += weigh(weights.astype(value.dtype), value)
        return out, total + jnp.sum(weights, axis=-1)

    out = jnp.zeros([batch, rows, *heads, values.shape[-1]], jnp.float32)
    total = jnp.zeros([batch, *heads, rows], jnp.float32)
    blocks = (jnp.max(filled) + block - 1) // block
    return _normalise(*lax.fori_loop(0, blocks, add, (out, total)))


def weigh(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Weights [B, K, G, T, S], value [B, S, K, H], of one dtype -> float32 [B, T, K, G, H]."""
    if weights.shape[3] > 1:
        return product("bkgts,bskh->btkgh", weights, value)
    # One query: a product would first transpose the values, which takes a CPU longer than to sum.
    by_position = jnp.moveaxis(weights[:, :, :, 0], -1, 1).astype(jnp.float32)  # [B, S, K, G]
    out = jnp.sum(by_position[..., None] * value[:, :, :, None].astype(jnp.float32), axis=1)
    return out[:, None]


def _normalise(out: jax.Array, total: jax.Array) -> jax.Array:
    """Divide out [B, T, K, G, H'] by total [B, K, G, T]; zero where there was nothing to see."""
    total = jnp.moveaxis(total, -1, 1)[..., None]
    return jnp.where(total > 0, out / jnp.where(total > 0, total, 1), 0)


def _read_block(
    cache: jax.Array, layer: jax.Array, start: jax.Array, block: int, sequence: jax.Array | None
) -> jax.Array:
    """Return positions start ... start + block of a cache [L, C, S, K, H] -> [B, block, K, H]."""

    def read(first: Any, count: int) -> jax.Array:
        shape = (1, count, block, *cache.shape[3:])
        return from_bits(lax.dynamic_slice(cache, (layer, first, start, 0, 0), shape)[0])

    if sequence is None:
        return read(0, cache.shape[1])
    return jnp.concatenate([read(sequence[b], 1) for b in range(sequence.shape[0])])
