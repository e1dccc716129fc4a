"""The cache of keys and values, which a model keeps between calls.

Dimension letters: `B` batch, or the sequences that a call reads and writes; `C` sequences of a
cache, `T` new positions, `S` positions of a cache, `K` key/value heads, `H` head width, `L` layers.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from grok1.ops.quantization import product

SOFT_CAP = 30.0  # of attention's scores
BLOCK = 128  # positions of the cache that are attended to at a time


class KVMemory(NamedTuple):
    """Keys and values of past positions, and which of them a call reads and writes.

    k, v: [L, C, S, K, H] for all layers, or [C, S, K, H] for one.
    step: int32 [B], how many positions each sequence has filled.
    length: int32 [B], during a call, how many of its T positions are written; None: all.
    sequence: int32 [B], during a call for B of the C sequences: which ones; None: B = C, in order.
    layer: int32 [], during a layer's call, its index among the L layers; None: only one layer.
    """

    k: jax.Array
    v: jax.Array
    step: jax.Array
    length: jax.Array | None = None
    sequence: jax.Array | None = None
    layer: jax.Array | None = None


class Memory(NamedTuple):
    """The state that a model keeps between calls.

    layers: one KVMemory for all layers.
    valid: bool [B, S], whether a position holds a visible key; pad tokens stay masked.
    """

    layers: KVMemory
    valid: jax.Array


class CacheIndex(NamedTuple):
    """Where one layer's call writes and reads in a stack of caches [L, C, S, K, H]; see KVMemory.

    start: int32 [B], the position of each sequence's first new row. Only `sequence` may
    be None.
    """

    layer: jax.Array
    start: jax.Array
    length: jax.Array
    sequence: jax.Array | None


def cache_index(memory: KVMemory, rows: int) -> CacheIndex:
    """Return the index of `rows` new positions."""
    layer = jnp.int32(0) if memory.layer is None else memory.layer
    length = memory.length
    if length is None:
        length = jnp.full(memory.step.shape, rows, jnp.int32)
    return CacheIndex(layer, memory.step, length, memory.sequence)


def check_room(memory: KVMemory, rows: int) -> None:
    """Raise ValueError if `rows` new positions do not fit the memory's length."""
    size = memory.k.shape[-3]
    if rows > size:
        raise ValueError(
            f"{rows} new positions do not fit a memory of {size}; prefill in smaller chunks"
        )


def caches(memory: KVMemory) -> tuple[jax.Array, jax.Array]:
    """Return keys and values as stacks [L, C, S, K, H], with L = 1 for a single layer."""
    k, v = memory.k, memory.v
    return (k[None], v[None]) if memory.layer is None else (k, v)


def with_caches(memory: KVMemory, k: jax.Array, v: jax.Array) -> KVMemory:
    """Undo `caches`: return the memory with these stacks."""
    return memory._replace(k=k[0], v=v[0]) if memory.layer is None else memory._replace(k=k, v=v)


def step_on(memory: KVMemory, rows: int) -> KVMemory:
    """Return the memory after `rows` new positions: `step` grows by the number written."""
    index = cache_index(memory, rows)
    return memory._replace(step=index.start + index.length)


# ------------------------------------------------------------------------- around a call of a model


class Context(NamedTuple):
    """What the new tokens of one call can see.

    layers: the memory of the sequences read, or None. start: int32 [B], the position of each
    sequence's first new token. valid: bool [B, S], which positions hold a key, including the new
    ones; without a memory S = T.
    """

    layers: KVMemory | None
    start: jax.Array
    valid: jax.Array


def prepare(
    memory: Memory | None, new: jax.Array, length: jax.Array, sequence: jax.Array | None
) -> Context:
    """Prepare a memory for new tokens; new: bool [B, T], which of them hold keys.

    length, sequence: as in KVMemory.
    """
    if memory is None:
        return Context(None, jnp.zeros_like(length), new)
    layers, valid = memory
    step = layers.step
    if sequence is not None:
        step, valid = step[sequence], valid[sequence]
    row = jnp.arange(valid.shape[1]) - step[:, None]  # [B, S], a position's index among the T
    at_row = jnp.take_along_axis(new, jnp.clip(row, 0, new.shape[1] - 1), axis=1)
    valid = jnp.where((row >= 0) & (row < length[:, None]), at_row, valid)
    layers = layers._replace(step=step, length=length, sequence=sequence)
    return Context(layers, step, valid)


def advance(memory: Memory | None, context: Context, written: KVMemory | None) -> Memory | None:
    """Return the memory after a call, with `step` advanced and the written caches.

    memory: of all sequences, as passed to `prepare`, which returned `context`.
    """
    if memory is None or context.layers is None or written is None:
        return None
    _, _, step, length, sequence, _ = context.layers
    assert length is not None  # `prepare` set it
    step, valid = step + length, context.valid
    if sequence is not None:
        step = memory.layers.step.at[sequence].set(step)
        valid = memory.valid.at[sequence].set(valid)
    return Memory(KVMemory(written.k, written.v, step), valid)


# --------------------------------------------------------------------------------- within a layer


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
    Rows past a sequence's length, or past the end of the cache, are dropped. sequence: int32 [B],
    as in KVMemory.
    """
    batch, rows = new.shape[:2]
    row = jnp.arange(rows)
    position = start[:, None] + row  # [B, T]
    position = jnp.where(row < length[:, None], position, cache.shape[2])  # past the end: dropped
    sequence = jnp.arange(batch) if sequence is None else sequence
    at = jnp.asarray(cache).at[layer, sequence[:, None], position]
    return at.set(new.astype(cache.dtype), mode="drop")


def weigh(weights: jax.Array, value: jax.Array) -> jax.Array:
    """Weights [B, K, G, T, S], value [B, S, K, H], of one dtype -> float32 [B, T, K, G, H]."""
    return product("bkgts,bskh->btkgh", weights, value)


def read_rows(memory: KVMemory, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return keys and values [B, S, K, H] of all positions, and which are filled, bool [B, S].

    rows: T of the call, whose new positions have been written.
    """
    index = cache_index(memory, rows)
    k, v = (lax.dynamic_index_in_dim(c, index.layer, 0, False) for c in caches(memory))
    if index.sequence is not None:
        k, v = k[index.sequence], v[index.sequence]
    filled = index.start + index.length
    return k, v, jnp.arange(k.shape[1]) < filled[:, None]


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
    view: Callable[[jax.Array], jax.Array] = lambda cache: cache,
    weigh: Callable[[jax.Array, jax.Array], jax.Array] = weigh,
) -> jax.Array:
    """Attend to the first positions of a cache, in as many blocks as the longest sequence needs.

    query [B, T, K, G, H]; keys, values [L, C, S, K, H], of which `layer` is read; mask bool,
    broadcast to [B, T, S] (True: may see) -> float32 [B, T, K, G, H], zero for a query that sees no
    key. Equal to `model.attend`. filled: int32 [B], how many positions of each sequence hold a key.
    sequence: int32 [B], as in KVMemory. view, weigh: replacements for a processor that stores keys
    or sums values in another way.

    Scores are capped at 30, so their exponentials are between 1e-13 and 1e13, and the softmax is
    computed without subtracting the maximum, as two sums over blocks. A block that holds no key of
    a sequence adds exactly zero to both sums: the length of the longest sequence in a batch does
    not change any bit of the other sequences' results.
    """
    size = keys.shape[2]
    block = min(BLOCK, size)
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], size))
    batch, rows, *heads, _ = query.shape

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, total = sums
        start = jnp.minimum(i * block, size - block)  # the last block may overlap the one before it
        key, value = (view(_read_block(c, layer, start, block, sequence)) for c in (keys, values))
        position = start + jnp.arange(block)
        seen = lax.dynamic_slice_in_dim(mask, start, block, axis=-1)  # [B, T, block]
        seen &= (position >= i * block) & (position < filled[:, None, None])
        scores = product("btkgh,bskh->bkgts", query, key) * multiplier
        scores = SOFT_CAP * jnp.tanh(scores / SOFT_CAP)
        weights = jnp.where(seen[:, None, None], jnp.exp(scores), 0.0)
        out += weigh(weights.astype(value.dtype), value)
        return out, total + jnp.sum(weights, axis=-1)

    out = jnp.zeros([batch, rows, *heads, values.shape[-1]], jnp.float32)
    total = jnp.zeros([batch, *heads, rows], jnp.float32)
    blocks = (jnp.max(filled) + block - 1) // block
    out, total = lax.fori_loop(0, blocks, add, (out, total))
    return mean(out, jnp.moveaxis(total, -1, 1)[..., None])


def mean(sums: jax.Array, total: jax.Array) -> jax.Array:
    """Divide weighted sums by the total of the weights; zero if that is zero. NaN is kept."""
    return jnp.where(total == 0, 0, sums / jnp.where(total == 0, 1, total))


def last_seen(mask: jax.Array) -> jax.Array:
    """Return how many positions there are up to the last that a query sees: [B, T, S] -> [B, T]."""
    return jnp.max(jnp.where(mask, jnp.arange(1, mask.shape[-1] + 1), 0), axis=-1)


def _read_block(
    cache: jax.Array, layer: jax.Array, start: jax.Array, block: int, sequence: jax.Array | None
) -> jax.Array:
    """Return positions start ... start + block of a cache [L, C, S, K, H] -> [B, block, K, H]."""

    def read(first: jax.Array | int, count: int) -> jax.Array:
        shape = (1, count, block, *cache.shape[3:])
        return lax.dynamic_slice(cache, (layer, first, start, 0, 0), shape)[0]

    if sequence is None:
        return read(0, cache.shape[1])
    return jnp.concatenate([read(sequence[b], 1) for b in range(sequence.shape[0])])
