"""The models that are measured without a checkpoint, and random parameters for them."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from grok1 import backend
from grok1.formats.loading import aligned_empty
from grok1.ops.quantization import (
    Parameter,
    ParameterShape,
    Params,
    QuantizedWeight4bit,
    QuantizedWeight8bit,
)
from grok1.parameters import shapes_with_4_bits
from grok1.serving.steps import stored_shapes
from model import LanguageModelConfig, TransformerConfig

RANKS = 8  # of the full model's mesh


def quarter() -> LanguageModelConfig:
    """Return a Grok-1 of a quarter of its width and 4 layers."""
    return LanguageModelConfig(
        vocab_size=32768,
        sequence_len=2048,
        output_multiplier_scale=0.5773502691896257,
        embedding_multiplier_scale=39.19183588453085,
        model=TransformerConfig(
            emb_size=1536,
            widening_factor=8,
            key_size=64,
            num_q_heads=24,
            num_kv_heads=8,
            num_layers=4,
            attn_output_multiplier=0.125,
            num_experts=8,
            num_selected_experts=2,
        ),
    )


def grok_1_rank(layers: int) -> LanguageModelConfig:
    """Return the part of Grok-1 on one of eight devices: its heads, columns and vocabulary."""
    return LanguageModelConfig(
        vocab_size=128 * 1024 // RANKS,
        sequence_len=8192,
        output_multiplier_scale=0.5773502691896257,
        embedding_multiplier_scale=78.38367176906169,
        model=TransformerConfig(
            emb_size=48 * 128,
            widening_factor=8 / RANKS,
            key_size=128,
            num_q_heads=48 // RANKS,
            num_kv_heads=8 // RANKS,
            num_layers=layers,
            attn_output_multiplier=0.08838834764831845,
            num_experts=8,
            num_selected_experts=2,
        ),
    )


def random_params(config: LanguageModelConfig, groups: int | None = None) -> Params:
    """Return random int8 parameters, generated on the device in their final layout.

    groups: scale groups of each matrix, if not as released: a rank of eight has one.
    """
    on_cpu = backend.on_cpu()
    draw = _draw_on_host if on_cpu else _draw_on_device

    def leaf(path: object, shape: ParameterShape) -> Parameter:
        if isinstance(shape, QuantizedWeight8bit):
            # The standard deviation of uniform int8 values is 74.
            scale = 1 / (74 * math.sqrt(shape.shape[-2]))
            own = groups or shape.scales.shape[-2]
            scales = (*shape.scales.shape[:-2], own, shape.scales.shape[-1])
            return QuantizedWeight8bit(
                draw(shape.weight.shape, shape.weight.dtype, path),
                jnp.full(scales, scale, jnp.bfloat16),
            )
        assert not isinstance(shape, QuantizedWeight4bit)
        if len(shape.shape) < 2 or "scale" in str(path):
            return jnp.ones(shape.shape, shape.dtype)
        # The router is contracted over its rows, the table over its columns.
        width = shape.shape[-1] if "embeddings" in str(path) else shape.shape[-2]
        steps = draw(shape.shape, jnp.dtype(jnp.int8), path)
        scaled = jax.jit(lambda x: (x / (74 * math.sqrt(width))).astype(shape.dtype))(steps)
        return as_loaded(scaled) if on_cpu else scaled

    return jax.tree_util.tree_map_with_path(
        leaf, stored_shapes(config), is_leaf=lambda x: isinstance(x, QuantizedWeight8bit)
    )


def with_random_4_bits(params: Params) -> Params:
    """Return parameters whose experts are random integers of 4 bits; the others are the same."""
    draw = _draw_on_host if backend.on_cpu() else _draw_on_device

    def leaf(path: object, shape: ParameterShape, old: Parameter) -> Parameter:
        if not isinstance(shape, QuantizedWeight4bit):
            return old
        # The standard deviation of uniform values from -8 to 7 is 4.6.
        scale = 1 / (4.6 * math.sqrt(shape.shape[-2]))
        return QuantizedWeight4bit(
            draw(shape.weight.shape, shape.weight.dtype, path),
            jnp.full(shape.scales.shape, scale, jnp.bfloat16),
        )

    shapes = jax.eval_shape(lambda: params)
    return jax.tree_util.tree_map_with_path(
        leaf, shapes_with_4_bits(shapes), params,
        is_leaf=lambda x: isinstance(x, QuantizedWeight4bit | QuantizedWeight8bit),
    )  # fmt: skip


def as_loaded(array: jax.Array | np.ndarray) -> jax.Array:
    """Copy an array to memory that is allocated as for a loaded checkpoint."""
    memory = aligned_empty(array.nbytes).view(array.dtype).reshape(array.shape)
    memory[...] = array
    return jax.device_put(memory)


def _draw_on_host(shape: tuple[int, ...], dtype: np.dtype, path: object) -> jax.Array:
    rng = np.random.default_rng(sum(str(path).encode()))
    memory = aligned_empty(math.prod(shape) * dtype.itemsize)
    piece = 1 << 24
    for begin in range(0, len(memory), piece):
        part = memory[begin : begin + piece]
        part[...] = np.frombuffer(rng.bytes(len(part)), np.uint8)
    return jax.device_put(memory.view(dtype).reshape(shape))


def _draw_on_device(shape: tuple[int, ...], dtype: np.dtype, path: object) -> jax.Array:
    """Draw int8 on the device, a part of the first axis at a time: in place, without a copy."""

    def fill(i: jax.Array, array: jax.Array) -> jax.Array:
        bits = jax.random.bits(jax.random.fold_in(key, i), shape[1:], jnp.uint8)
        part = jax.lax.bitcast_convert_type(bits, jnp.int8)
        return jax.lax.dynamic_update_index_in_dim(array, part, i, 0)

    key = jax.random.key(sum(str(path).encode()), impl="rbg")
    return jax.jit(lambda: jax.lax.fori_loop(0, shape[0], fill, jnp.zeros(shape, dtype)))()
