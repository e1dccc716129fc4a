"""A matrix product, and a mixture of experts, by the kernels of products.py.

Dimension letters as there, with `D` for the model width and `F` for that of an expert.
"""

import jax
import jax.numpy as jnp

from grok1.kernels.gpu.products import (
    FEW,
    added,
    expert_sum,
    gated,
    grouped_product,
    side_by_side,
)
from grok1.kernels.sorted_experts import sorted_copies
from grok1.ops.quantization import QuantizedWeight8bit


def multiply(x: jax.Array, weight: QuantizedWeight8bit, layer: jax.Array) -> jax.Array:
    """Return `x [M, I] @ weight [L, I, O]`, of one layer -> float32 [M, O]."""
    return added(side_by_side(x, [weight], layer))


def mix(
    x: jax.Array,
    weights: tuple[QuantizedWeight8bit, ...],
    layer: jax.Array,
    gates: jax.Array,
    index: jax.Array,
) -> jax.Array:
    """Return `sum_a gates[:, a] * expert_{index[:, a]}(x)` for x [M, D], float32 [M, D].

    weights: int8 [L, E, D, F] twice, gate and value, and [L, E, F, D]. gates: float32 [M, A].
    index: int32 [M, A], E for a masked token.
    """
    (gate, value, out), (tokens, chosen) = weights, index.shape
    if tokens <= FEW:
        hidden = gated(x, gate, value, layer, index)
        return expert_sum(hidden, out, layer, gates, index)
    copies = sorted_copies(index, gate.shape[1])
    hidden = grouped_product(x, [gate, value], layer, *copies)
    y = grouped_product(hidden, [out], layer, *copies).reshape(tokens, chosen, -1)
    processed = index < gate.shape[1]  # others were not written
    return jnp.sum(jnp.where(processed[..., None], y * gates[..., None], 0), axis=1)
