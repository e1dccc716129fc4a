"""Drawing a token by sorting the vocabulary, which a GPU does fast.

Dimension letters: `B` sequences, `V` vocabulary, `N` blocks of it, `S` tokens of a block.

In the sorted vocabulary every filter keeps the first tokens, up to some number. XLA sorts, and sums
the weights of each block; a kernel then finds the last token kept, and the token drawn: first their
blocks, then their places in these.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from grok1.kernels.gpu.tiles import Axis, Ref, load, run_kernel, span, store, whole
from grok1.ops.numbers import from_ordered_bits, ordered_bits, uniform_numbers

if TYPE_CHECKING:
    from grok1.serving.sampling import SampleSettings


def draw_token(
    rngs: jax.Array,
    logits: jax.Array,
    allowed: jax.Array,
    settings: SampleSettings,
    temperature: jax.Array,
    reported: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`sampling.draw_token` by sorting: the same probabilities, but not always the same token."""
    batch = len(logits)
    uniform = uniform_numbers(rngs)
    # In descending order; a token that is not allowed comes last, and becomes NaN.
    order = jnp.where(allowed, ordered_bits(logits), 0)
    inverted, ids = lax.sort((~order, lax.broadcasted_iota(jnp.int32, order.shape, 1)), num_keys=1)
    min_p = jnp.zeros_like(temperature) if settings.min_p is None else settings.min_p
    shape = batch, 1 + reported
    with jax.enable_x64(True):
        weights = _weights(from_ordered_bits(~inverted), settings.top_k, temperature)
        blocks = _blocks(weights)
        chosen, probs = run_kernel(
            functools.partial(_draw_kernel, blocks.shape[2]),
            (batch,),
            [(shape, jnp.int32), (shape, jnp.float32)],
            [
                jnp.sum(blocks, axis=-1),
                blocks.reshape(batch, -1),
                ids,
                uniform[:, 0],
                settings.nucleus_p,
                min_p,
            ],
            name="draw_token",
            warps=4,
            stages=1,
        )
    return chosen[:, :1], chosen[:, 1:], probs


def _weights(logits: jax.Array, top_k: jax.Array | None, temperature: jax.Array) -> jax.Array:
    """Return the probabilities of sorted logits [B, V] after top-k, not normalized.

    They are float64 and descending; the first is 1, unless no token is allowed.
    """
    vocabulary = logits.shape[-1]
    limit = jnp.full_like(temperature, vocabulary, jnp.int32)
    if top_k is not None:
        limit = jnp.where(top_k > 0, top_k, limit)
    limit = jnp.where(temperature == 0, 1, limit)[:, None]
    best = logits[:, :1].astype(jnp.float64)
    scaled = (logits - best) / jnp.where(temperature == 0, 1, temperature)[:, None]
    weights = jnp.where(logits == best, 1, jnp.exp(scaled))  # also if all are -inf
    return jnp.where((jnp.arange(vocabulary) < limit) & ~jnp.isnan(logits), weights, 0)


def _blocks(weights: jax.Array) -> jax.Array:
    """Pad weights [B, V] with zeros -> [B, N, S], with about as many blocks as tokens in each."""
    length = weights.shape[-1]
    size = 1 << (length.bit_length() + 1) // 2
    padded = jnp.pad(weights, ((0, 0), (0, -length % size)))
    return padded.reshape(len(weights), -1, size)


def _draw_kernel(
    size: int,
    sums_ref: Ref,
    weights_ref: Ref,
    ids_ref: Ref,
    uniform_ref: Ref,
    nucleus_ref: Ref,
    min_p_ref: Ref,
    chosen_ref: Ref,
    probs_ref: Ref,
) -> None:
    """Write the tokens of one row, the drawn one first, and their probabilities."""
    row, blocks = pl.program_id(0), sums_ref.shape[1]
    block, result = whole(blocks), whole(chosen_ref.shape[1])
    nucleus, min_p = load(nucleus_ref, row), load(min_p_ref, row)
    sums = load(sums_ref, row, block)
    before, everything = jnp.cumsum(sums) - sums, jnp.sum(sums)
    mass = jnp.where(nucleus < 1, nucleus.astype(everything.dtype) * everything, jnp.inf)

    def kept(before: jax.Array, weights: jax.Array) -> jax.Array:
        """Which tokens are kept, by the sum of the weights before each: at least the first."""
        return ((before < mass) | (before == 0)) & (weights >= min_p) & (weights > 0)

    def tokens_of(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return the weights of a block's tokens, and the sums of all weights up to each."""
        weights = load(weights_ref, row, span(size, weights_ref.shape[1], number * size))
        return weights, jnp.sum(jnp.where(block.indices == number, before, 0)) + jnp.cumsum(weights)

    firsts = load(weights_ref, row, block._replace(indices=block.indices * size))
    last_block = _last(kept(before, firsts))  # with a token that is kept
    weights, ends = tokens_of(last_block)
    in_last = kept(ends - weights, weights)
    count = last_block * size + _count(in_last)  # of tokens kept
    # Rounding may leave none in this block: then those before it are kept.
    total = jnp.max(jnp.where(in_last, ends, jnp.min(ends - weights)))

    # A token is drawn if the sum of the weights passes this point with it.
    point = load(uniform_ref, row) * total
    drawn_block = jnp.minimum(_last(before <= point), blocks - 1)
    drawn = drawn_block * size + _count(tokens_of(drawn_block)[1] <= point)
    # Rounding may put the point beyond the total.
    drawn = jnp.maximum(jnp.minimum(drawn, count - 1), 0)

    chosen = jnp.where(result.indices == 0, drawn, result.indices - 1)
    store(chosen_ref, load(ids_ref, row, Axis(chosen, result.exist)), row, result)
    probs = load(weights_ref, row, Axis(chosen, chosen < count)) / total
    store(probs_ref, probs, row, result)


def _last(x: jax.Array) -> jax.Array:
    """Return the index of the last True value, where all come first; 0 if there is none (NaN)."""
    return jnp.maximum(_count(x) - 1, 0)


def _count(x: jax.Array) -> jax.Array:
    """Return the number of True values."""
    return jnp.sum(x.astype(jnp.int32), dtype=jnp.int32)
