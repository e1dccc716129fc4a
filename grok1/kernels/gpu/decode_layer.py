"""A decoder layer for one token of each sequence, in few kernels.

It computes the same as `model.DecoderLayer`, which is easier to read. Dimension letters as in
model.py, with `M` = B tokens; on a mesh, all sizes are those of one device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from grok1.kernels.gpu.decode_attention import write_and_attend
from grok1.kernels.gpu.few_rows import expert_sum, gated, side_by_side
from grok1.kernels.gpu.norms import normalize, route
from grok1.ops.decode_step import DecodeStep, LayerWeights

if TYPE_CHECKING:
    from model import TransformerConfig


def decode_layer(
    weights: LayerWeights,
    h: jax.Array,
    caches: tuple[jax.Array, ...],
    step: DecodeStep,
    config: TransformerConfig,
    dtype: DTypeLike,
    add: Callable[[jax.Array], jax.Array],
    *,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Apply one layer to the residual stream h, float32 [B, D] -> h and the caches [L, C, S, K, H].

    dtype: of activations and caches. add: sums the partial results [B, D] of the devices that share
    the layer.
    """
    layer, start = step.memory_index.layer, step.memory_index.start
    width, multiplier = config.key_size, config.attn_output_multiplier
    run: Any = functools.partial(functools.partial, interpret=interpret)
    norm, multiply = run(normalize), run(expert_sum)

    x = norm(h, weights.rms_norm, layer, dtype=dtype)
    parts = run(side_by_side)(x, [weights.query, weights.key, weights.value], layer)
    heads = _rotate(sum(parts), start, width, weights.value.shape[-1] // width).astype(dtype)
    attended, *caches = run(write_and_attend)(
        heads, *caches, step.mask, multiplier, step.memory_index
    )
    attended = attended.reshape(1, len(h), -1).astype(dtype)
    one = jnp.ones([len(h), 1], jnp.float32)
    attended = add(multiply(attended, _one_expert(weights.linear), layer, one))

    norms = weights.rms_norm_1, weights.rms_norm_2
    h, x, gates = run(route)(
        h, attended, norms, weights.router, layer, step.valid, config.num_selected_experts, dtype
    )
    hidden = run(gated)(x, weights.expert_gate, weights.expert_value, layer, gates)
    mixed = add(multiply(hidden, weights.expert_out, layer, gates))
    return norm(mixed, weights.rms_norm_3, layer, h), tuple(caches)


def _one_expert(weight: Any) -> Any:
    """[L, I, O] -> [L, 1, I, O], also of scales."""
    return jax.tree.map(lambda w: w[:, None], weight)


def _rotate(x: jax.Array, position: jax.Array, width: int, values: int) -> jax.Array:
    """Apply `model.RotaryEmbedding` to all heads but the last ones, which are values.

    x: float32 [B, (N + 2 K) * H], position: int32 [B] -> [B, N + 2 K, H].
    """
    exponents = np.arange(0, width, 2) / width
    frequencies = np.tile(10000**-exponents, 2).astype(np.float32)  # [H]
    phase = position.astype(jnp.float32)[:, None] * frequencies
    x = x.reshape(len(x), -1, 2, width // 2)
    phase = phase.reshape(len(x), 1, 2, width // 2)
    other = x[:, :, ::-1] * np.array([[-1], [1]], np.float32)  # [a, b] -> [-b, a]
    turned = x * jnp.cos(phase) + other * jnp.sin(phase)
    is_value = jnp.arange(x.shape[1]) >= x.shape[1] - values
    out = jnp.where(is_value[:, None, None], x, turned)
    return out.reshape(*out.shape[:2], width)
