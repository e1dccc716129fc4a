"""Grok-1 in plain JAX: the forward pass as written in its equations, without optimizations.

The model is tested against it in float64, and benchmarks/ compares the model's speed with it. All
experts are computed for every token, and attention reads the entire cache.

Dimension letters as in model.py. Weights are

    {"embeddings": [V, D], "rms_norm": [D], "layers": {name: [L, ...]}}

where `name` is that of the parameter within a decoder layer: `multi_head_attention/query` and
`/key`, `/value` and `/linear`; `rms_norm`, `rms_norm_1`, `rms_norm_2`, `rms_norm_3`; `router`;
`moe/linear`, `moe/linear_v` and `moe/linear_1`, or, without a mixture, `linear` and so on.

The inputs of matrix products have the dtype of the cache: float64 (with `jax.enable_x64`), float32
or bfloat16; everything else is float64 or float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from grok1.ops.quantization import (
    Parameter,
    Params,
    QuantizedWeight,
    QuantizedWeight4bit,
    unpack,
)

if TYPE_CHECKING:
    from model import LanguageModelConfig, TransformerConfig

Weights = Mapping[str, Any]  # by name; under "layers" those of the layers
LAYER = "transformer/decoder_layer/"


class Cache(NamedTuple):
    """Past positions: keys, values [L, B, S, K, H]; valid bool [B, S], True at tokens but not pads.

    filled: int32 [B], how many positions each sequence has filled.
    """

    keys: jax.Array
    values: jax.Array
    valid: jax.Array
    filled: jax.Array


def weights_of(params: Params) -> Weights:
    """Return the model's parameters under the names that the functions here take."""
    layers = {
        module.removeprefix(LAYER): next(iter(leaves.values()))
        for module, leaves in params.items()
        if module.startswith(LAYER)
    }
    return {
        "embeddings": params["language_model/in_out_embed"]["embeddings"],
        "rms_norm": params["language_model/rms_norm"]["scale"],
        "layers": layers,
    }


def empty_cache(
    config: LanguageModelConfig, batch: int, size: int, dtype: DTypeLike = jnp.float32
) -> Cache:
    """Return a cache for `batch` sequences of up to `size` positions."""
    model = config.model
    shape = (model.num_layers, batch, size, model.num_kv_heads, model.key_size)
    keys, values = jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)
    return Cache(keys, values, jnp.zeros([batch, size], bool), jnp.zeros([batch], jnp.int32))


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum`, accumulated in float32 or, for float64 inputs, in float64."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum(
        subscripts, x, y, precision=lax.Precision.HIGHEST, preferred_element_type=wide
    )


def dense(x: jax.Array, weight: Parameter, dtype: DTypeLike) -> jax.Array:
    """`x [..., I] @ weight [I, O]`, x rounded to `dtype`, the weight of any type."""
    x = x.astype(dtype)
    if not isinstance(weight, QuantizedWeight):
        return product("...i,io->...o", x, weight.astype(dtype))
    # An int8 is exact in any dtype. The sums of each group of rows are multiplied by its scales.
    values = unpack(weight.weight) if isinstance(weight, QuantizedWeight4bit) else weight.weight
    groups = len(weight.scales)
    parts = zip(jnp.split(x, groups, -1), jnp.split(values, groups), strict=True)
    sums = [product("...i,io->...o", part, rows.astype(dtype)) for part, rows in parts]
    return sum(total * scale for total, scale in zip(sums, weight.scales, strict=True))


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`scale * x / sqrt(mean(x^2) + 1e-5)`: no offset, not `1 + scale`."""
    return scale * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-5)


def rotate(x: jax.Array, position: jax.Array) -> jax.Array:
    """Rotary embedding of x [B, T, heads, H] at position [B, T] or [T].

    The numbers i and i + H/2 are rotated together.
    """
    width = x.shape[-1]
    frequency = 10000.0 ** (-np.arange(0, width, 2) / width)  # [H / 2]
    phase = position[..., None] * np.tile(frequency, 2).astype(x.dtype)  # [B, T, H]
    phase = phase[..., None, :]
    a, b = x[..., : width // 2], x[..., width // 2 :]
    return x * jnp.cos(phase) + jnp.concatenate([-b, a], axis=-1) * jnp.sin(phase)


def expert(
    x: jax.Array, matrices: tuple[Parameter, Parameter, Parameter], dtype: DTypeLike
) -> jax.Array:
    """`linear_1(gelu(linear(x)) * linear_v(x))`, x [..., D], gelu in its tanh approximation."""
    linear, linear_v, linear_1 = matrices
    gate = jax.nn.gelu(dense(x, linear, dtype), approximate=True)
    return dense(gate * dense(x, linear_v, dtype), linear_1, dtype)


def unchanged(_site: str, array: jax.Array) -> jax.Array:
    """Return the array unchanged."""
    return array


class Call(NamedTuple):
    """What the layers of one forward pass share.

    position: int [B, T] of each token. mask: bool [B, T, S], True where it may see a key. real:
    bool [B, T], False for a pad. at: called with the name of a site and its array; returns the
    array to continue with.
    """

    config: TransformerConfig
    position: jax.Array
    mask: jax.Array
    real: jax.Array
    dtype: DTypeLike
    at: Callable[[str, jax.Array], jax.Array]


def attention(
    x: jax.Array, layer: Weights, cache: tuple[jax.Array, jax.Array], call: Call
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Attend from x [B, T, D] to a layer's keys and values [B, S, K, H], including those of x."""
    config, position, dtype = call.config, call.position, call.dtype
    rows = jnp.arange(x.shape[0])[:, None]

    def heads(name: str, count: int) -> jax.Array:
        y = dense(x, layer[f"multi_head_attention/{name}"], dtype)
        return y.reshape(*x.shape[:2], count, config.key_size)

    query = call.at("queries", rotate(heads("query", config.num_q_heads), position)).astype(dtype)
    key = call.at("keys", rotate(heads("key", config.num_kv_heads), position)).astype(dtype)
    value = call.at("values", heads("value", config.num_kv_heads)).astype(dtype)
    keys, values = cache[0].at[rows, position].set(key), cache[1].at[rows, position].set(value)
    # Query head n reads key/value head n // G.
    shared = config.num_q_heads // config.num_kv_heads
    scores = product("btnh,bsnh->bnts", query, jnp.repeat(keys, shared, axis=2))
    scores = 30 * jnp.tanh(scores * config.attn_output_multiplier / 30)
    seen = call.mask[:, None]  # [B, 1, T, S]
    weights = jax.nn.softmax(jnp.where(seen, scores, -1e30), axis=-1)
    # A query that sees no key attends to nothing.
    weights = jnp.where(seen.any(axis=-1, keepdims=True), weights, 0)
    weights = call.at("attention_weights", weights).astype(dtype)  # [B, N, T, S]
    out = product("bnts,bsnh->btnh", weights, jnp.repeat(values, shared, axis=2))
    out = call.at("head_outputs", out).reshape(*x.shape[:2], -1)
    return dense(out, layer["multi_head_attention/linear"], dtype), (keys, values)


def mixture(x: jax.Array, layer: Weights, call: Call) -> jax.Array:
    """`sum_a gate_a * expert_a(x)` of x [B, T, D]; pads go to no expert."""
    experts, real = call.config.num_experts, call.real[..., None]
    scores = call.at("router_logits", product("btd,de->bte", x, layer["router"]))
    probs = call.at("router_probs", jax.nn.softmax(scores, axis=-1))
    # Largest first; ties go to the lower index. Not renormalized.
    gates, index = lax.top_k(probs, call.config.num_selected_experts)  # [B, T, A]
    gates = call.at("expert_gates", jnp.where(real, gates, 0))
    index = call.at("expert_index", jnp.where(real, index, experts))
    matrices = tuple(layer[f"moe/{name}"] for name in ("linear", "linear_v", "linear_1"))
    outputs = lax.map(lambda own: expert(x, own, call.dtype), matrices)  # [E, B, T, D]
    of_expert = index[..., None] == jnp.arange(experts)  # [B, T, A, E]
    share = jnp.sum(jnp.where(of_expert, gates[..., None], 0), axis=2)  # [B, T, E]
    return product("bte,ebtd->btd", share, outputs)


def decoder_layer(
    h: jax.Array, layer: Weights, cache: tuple[jax.Array, jax.Array], call: Call
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One layer: attention and experts, a norm before and after each."""
    x, cache = attention(rms_norm(h, layer["rms_norm"]), layer, cache, call)
    h = h + call.at("attention_output", rms_norm(x, layer["rms_norm_1"]))
    x = rms_norm(h, layer["rms_norm_2"])
    if call.config.num_experts > 1:
        x = mixture(x, layer, call)
    else:
        x = expert(x, (layer["linear"], layer["linear_v"], layer["linear_1"]), call.dtype)
    h = h + call.at("feed_forward_output", rms_norm(x, layer["rms_norm_3"]))
    return call.at("hidden_states", h), cache


def forward(
    weights: Weights,
    config: LanguageModelConfig,
    tokens: jax.Array,
    cache: Cache,
    at: Callable[[str, jax.Array], jax.Array] = unchanged,
) -> tuple[jax.Array, Cache]:
    """Tokens int32 [B, T] after those in the cache -> logits [B, T, V], and the updated cache."""
    h, cache = hidden_states(weights, config, tokens, cache, at)
    return logits(weights, config, h, cache.keys.dtype), cache


def hidden_states(
    weights: Weights,
    config: LanguageModelConfig,
    tokens: jax.Array,
    cache: Cache,
    at: Callable[[str, jax.Array], jax.Array] = unchanged,
) -> tuple[jax.Array, Cache]:
    """Tokens int32 [B, T] after those in the cache -> h [B, T, D], and the updated cache."""
    rows, length = jnp.arange(tokens.shape[0])[:, None], tokens.shape[1]
    position = cache.filled[:, None] + jnp.arange(length)  # [B, T]
    real = tokens > config.pad_token
    valid = cache.valid.at[rows, position].set(real)  # [B, S]
    mask = (jnp.arange(valid.shape[1]) <= position[..., None]) & valid[:, None]
    dtype = cache.keys.dtype
    call = Call(config.model, position, mask, real, dtype, at)
    table = weights["embeddings"].astype(dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    h = at("embeddings", table[tokens].astype(wide) * config.embedding_multiplier_scale)
    kept = []
    for index in range(config.model.num_layers):
        layer = jax.tree.map(lambda w, index=index: w[index], weights["layers"])
        h, own = decoder_layer(h, layer, (cache.keys[index], cache.values[index]), call)
        kept.append(own)
    keys, values = (jnp.stack(arrays) for arrays in zip(*kept, strict=True))
    return h, Cache(keys, values, valid, cache.filled + length)


def logits(
    weights: Weights, config: LanguageModelConfig, h: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """h [B, T, D] after the last layer -> logits [B, T, V], with the same embedding table."""
    h = rms_norm(h, weights["rms_norm"]).astype(dtype)
    table = weights["embeddings"].astype(dtype)
    return product("btd,vd->btv", h, table) * config.output_multiplier_scale
