"""A matrix product, and a mixture of experts, by the kernels of products.py.

Dimension letters as there, with `D` for the model width and `F` for that of an expert.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from grok1.kernels.gpu.products import (
    FEW,
    Copies,
    added,
    expert_sum,
    gated,
    grouped_product,
    side_by_side,
)
from grok1.kernels.gpu.tiles import Axis, Ref, axis, load, power_of_two, run_kernel, store
from grok1.ops.quantization import QuantizedWeight8bit

TOKENS = 4096  # that a program orders at a time


def multiply(x: jax.Array, weight: QuantizedWeight8bit, layer: jax.Array) -> jax.Array:
    """Return `x [M, I] @ weight [L, I, O]`, of one layer -> float32 [M, O]."""
    if len(x) > FEW:
        return added(side_by_side(x, [weight], layer))
    one_expert = jax.tree.map(lambda w: w[:, None], weight)
    gates = jnp.ones([len(x), 1], jnp.float32)
    return expert_sum(x[None], one_expert, layer, gates)


def mix(
    x: jax.Array,
    weights: tuple[QuantizedWeight8bit, ...],
    layer: jax.Array,
    gates: jax.Array,
    count: int,
) -> jax.Array:
    """Return `sum_e gates[:, e] * expert_e(x)` for x [M, D], as `mixture.chosen_experts`.

    weights: int8 [L, E, D, F] twice, gate and value, and [L, E, F, D]. gates: float32 [M, E], zero
    where a token has not chosen an expert; of each token at most `count` are not. Returns float32
    [M, D].
    """
    gate, value, out = weights
    if len(x) <= FEW:
        hidden = gated(x, gate, value, layer, gates)
        return expert_sum(hidden, out, layer, gates)
    copies = by_expert(gates, count)
    hidden = grouped_product(x, [gate, value], layer, copies)
    y = grouped_product(hidden, [out], layer, copies).reshape(len(x), count, -1)
    own = _compact(gates, count)[..., None]
    return jnp.sum(jnp.where(own != 0, y, 0) * own, axis=1)  # what was not written does not count


def _compact(gates: jax.Array, count: int) -> jax.Array:
    """Return the gates [M, E] other than zero, by ascending expert: [M, count], then zeros."""
    chosen = gates != 0
    earlier = jnp.sum(chosen[:, None] & np.tri(gates.shape[1], k=-1, dtype=bool), axis=-1)  # [M, E]
    own = (earlier[:, None] == np.arange(count)[:, None]) & chosen[:, None]  # [M, count, E]
    return jnp.sum(jnp.where(own, gates[:, None], 0), axis=-1)


def by_expert(gates: jax.Array, count: int) -> Copies:
    """Return the copies of tokens with gates [M, E], of up to `count` experts each, by expert."""
    tokens, experts = gates.shape
    order, starts = run_kernel(
        functools.partial(_by_expert_kernel, count),
        (experts,),
        [((tokens * count,), jnp.int32), ((experts + 1,), jnp.int32)],
        [gates],
        name="by_expert",
        warps=8,
        stages=1,
    )
    return Copies(order, starts)


def _by_expert_kernel(count: int, gates_ref: Ref, order_ref: Ref, starts_ref: Ref) -> None:
    """Write the copies of one expert, and where they start."""
    expert, (tokens, experts) = pl.program_id(0), gates_ref.shape
    size = min(TOKENS, power_of_two(tokens))
    blocks = pl.cdiv(tokens, size)

    def chosen_by(e: jax.Array, block: jax.Array) -> jax.Array:
        return (load(gates_ref, axis(size, tokens, block * size), e) != 0).astype(jnp.int32)

    def earlier(block: jax.Array) -> jax.Array:
        """Return how many copies of each token belong to earlier experts."""
        zeros = jnp.zeros([size], jnp.int32)
        return lax.fori_loop(0, expert, lambda e, sums: sums + chosen_by(e, block), zeros)

    def write(block: jax.Array, first: jax.Array) -> jax.Array:
        chosen = chosen_by(expert, block)
        place = jnp.where(chosen > 0, first + jnp.cumsum(chosen) - 1, tokens * count)
        copy = (block * size + jnp.arange(size)) * count + earlier(block)
        store(order_ref, copy, Axis(place, chosen > 0))
        return first + jnp.sum(chosen)

    start = lax.fori_loop(0, blocks, lambda i, n: n + jnp.sum(earlier(i)), jnp.int32(0))
    end = lax.fori_loop(0, blocks, write, start)
    store(starts_ref, start, expert)

    @pl.when(expert == experts - 1)
    def _() -> None:
        store(starts_ref, end, expert + 1)
