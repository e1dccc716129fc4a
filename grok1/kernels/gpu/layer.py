"""A decoder layer in few kernels.

It computes the same as `model.DecoderLayer`, which is easier to read. Dimension letters as in
model.py, with `M` = B * T tokens; on a mesh, all sizes are those of one device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from grok1.kernels.gpu.attention import attend_cached
from grok1.kernels.gpu.decode_attention import write_and_attend
from grok1.kernels.gpu.products import mix, side_by_side
from grok1.kernels.gpu.router import EPSILON, route
from grok1.ops.cache import write_rows
from grok1.ops.fused_layer import LayerStep, LayerWeights

if TYPE_CHECKING:
    from model import TransformerConfig

Caches = tuple[jax.Array, ...]


def fused_layer(
    weights: LayerWeights,
    h: jax.Array,
    caches: Caches,
    step: LayerStep,
    config: TransformerConfig,
    dtype: DTypeLike,
    add: Callable[[jax.Array], jax.Array],
) -> tuple[jax.Array, Caches]:
    """Apply a layer to the residual stream h, float32 [B, T, D] -> h and the caches.

    caches: of keys and values, [L, C, S, K, H] of `dtype`, that of the activations. add: sums the
    partial results [M, D] of the devices that share the layer.
    """
    layer, shape = step.memory_index.layer, h.shape
    h = h.reshape(-1, shape[-1])
    x = _normalize(h, weights.rms_norm[layer]).astype(dtype)
    heads = side_by_side(x, [weights.query, weights.key, weights.value], layer)
    heads = heads.reshape(*shape[:2], -1, config.key_size)
    heads = _rotate(heads, step.memory_index.start, caches[0].shape[-2]).astype(dtype)
    attended, caches = _attend(heads, caches, step, config.attn_output_multiplier)
    attended = attended.astype(dtype).reshape(len(h), -1)
    attended = add(side_by_side(attended, [weights.linear], layer))

    norms = weights.rms_norm_1, weights.rms_norm_2
    chosen, valid = config.num_selected_experts, step.valid.reshape(-1)
    h, x, gates, index = route(h, attended, norms, weights.router, layer, valid, chosen, dtype)
    experts = weights.expert_gate, weights.expert_value, weights.expert_out
    mixed = add(mix(x, experts, layer, gates, index))
    return (h + _normalize(mixed, weights.rms_norm_3[layer])).reshape(shape), caches


def _normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`model.RMSNorm` of x [M, D]."""
    return x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPSILON) * scale


def _rotate(x: jax.Array, start: jax.Array, kv_heads: int) -> jax.Array:
    """Apply `model.RotaryEmbedding` to all heads but the last ones, which are values.

    x: float32 [B, T, N + 2 K, H]. start: int32 [B], the position of each sequence's first token.
    """
    batch, rows, count, width = x.shape
    frequencies = (10000 ** -(np.arange(0, width, 2) / width)).astype(np.float32)  # [H / 2]
    position = start[:, None] + jnp.arange(rows)
    phase = position.astype(jnp.float32)[..., None, None, None] * frequencies
    halves = x.reshape(batch, rows, count, 2, width // 2)
    other = halves[..., ::-1, :] * np.array([[-1], [1]], np.float32)  # [a, b] -> [-b, a]
    turned = halves * jnp.cos(phase) + other * jnp.sin(phase)
    is_value = jnp.arange(count) >= count - kv_heads
    return jnp.where(is_value[:, None, None], halves, turned).reshape(x.shape)


def _attend(
    heads: jax.Array, caches: Caches, step: LayerStep, multiplier: float
) -> tuple[jax.Array, Caches]:
    """Write the keys and values of heads [B, T, N + 2 K, H], and attend.

    Returns [B, N, H] if T is 1, otherwise [B, T, K, G, H]; and the caches.
    """
    index, (keys, values), kv_heads = step.memory_index, caches, caches[0].shape[-2]
    if heads.shape[1] == 1:
        new, mask = heads[:, 0], step.mask[:, 0]
        out, keys, values = write_and_attend(new, keys, values, mask, multiplier, index)
        return out, (keys, values)
    queries = heads.shape[2] - 2 * kv_heads
    query, key, value = jnp.split(heads, [queries, queries + kv_heads], axis=2)
    keys, values = write_rows(keys, key, *index), write_rows(values, value, *index)
    query = query.reshape(*query.shape[:2], kv_heads, -1, query.shape[-1])
    filled = index.start + index.length
    where = index.layer, filled, index.sequence
    out = attend_cached(query, keys, values, step.mask, multiplier, *where, last=step.last)
    return out, (keys, values)
