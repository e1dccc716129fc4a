"""Parameter trees of a model: random ones, and their conversion between types of weights."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from grok1.checks import require
from grok1.ops.quantization import (
    Parameter,
    ParameterShape,
    Params,
    QuantizedWeight,
    QuantizedWeight4bit,
    Shapes,
    dequantize,
    quantize,
)
from grok1.ops.quantize_4bit import GROUP, quantize_4bit, shape_in_4_bits
from grok1.parallel.sharding import match_rule

if TYPE_CHECKING:
    from model import LanguageModelConfig

EMBEDDINGS = "language_model/in_out_embed", "embeddings"
RELEASED_SCALE_GROUPS = 8  # of the matrices whose contracted axis the released mesh split


def embedding_table(params: Any) -> Any:
    """Return the table [V, D] of input and output, or its shape from a tree of shapes."""
    module, name = EMBEDDINGS
    return params[module][name]


@functools.partial(jax.jit, static_argnames=("config", "quantized"))
def random_params(key: jax.Array, *, config: LanguageModelConfig, quantized: bool) -> Params:
    """Return random parameters: float32, or int8 with the released scale groups."""
    tokens = jnp.zeros([1, 1], jnp.int32)
    params: Params = hk.transform(lambda: config.make()(tokens)).init(key)
    return quantize_params(config, params) if quantized else params


def quantize_params(config: LanguageModelConfig, params: Params) -> Params:
    """Round the weight matrices of a float parameter tree to int8.

    The embedding, norms and router stay float32, as released; matrices that are split along their
    contracted axis get `RELEASED_SCALE_GROUPS` groups, other matrices one. Raises ValueError if the
    groups do not divide the rows of the attention's output projection.
    """
    rules, model = config.partition_rules(), config.model.model_axis

    def convert(name: str, leaf: Parameter) -> Parameter:
        spec = match_rule(rules, name)
        if model not in spec or name.endswith("embeddings"):
            return leaf
        if isinstance(leaf, QuantizedWeight):
            raise ValueError(
                f"{name}: expected floats, got integers; dequantize_params converts it"
            )
        groups, rows = RELEASED_SCALE_GROUPS if spec[-2] == model else 1, leaf.shape[-2]
        require(rows % groups == 0, "num_q_heads * key_size", f"a multiple of {groups}", rows)
        return quantize(leaf, groups)

    return {
        module: {name: convert(f"{module}/{name}", leaf) for name, leaf in leaves.items()}
        for module, leaves in params.items()
    }


def quantize_experts(params: Params, group: int = GROUP) -> Params:
    """Round the matrices of the experts to 4 bits, with a scale for `group` rows of a column.

    All other parameters stay as they are. Raises ValueError if the group is odd, or does not divide
    the rows of a matrix.
    """

    def convert(name: str, leaf: Parameter) -> Parameter:
        expert = "/moe/" in name and not isinstance(leaf, QuantizedWeight4bit)
        return quantize_4bit(dequantize(leaf), group) if expert else leaf

    return {
        module: {name: convert(f"{module}/{name}", leaf) for name, leaf in leaves.items()}
        for module, leaves in params.items()
    }


def shapes_with_4_bits(shapes: Shapes, group: int = GROUP) -> Shapes:
    """Return shapes in which the experts have 4 bits, as `quantize_experts` makes them."""

    def convert(module: str, leaf: ParameterShape) -> ParameterShape:
        if "/moe/" not in f"{module}/" or isinstance(leaf, QuantizedWeight4bit):
            return leaf
        rows = leaf.shape[-2]
        found = None if rows % group else shape_in_4_bits(leaf.shape, rows // group)
        if found is None:
            raise ValueError(
                f"experts: expected rows in groups of {group} for 4 bits, got {rows} rows"
            )
        return found

    return {
        module: {name: convert(module, leaf) for name, leaf in leaves.items()}
        for module, leaves in shapes.items()
    }


def dequantize_params(params: Params, dtype: DTypeLike = jnp.float32) -> Params:
    """Return a parameter tree with float matrices in place of the quantized ones."""

    def is_quantized(leaf: object) -> bool:
        return isinstance(leaf, QuantizedWeight)

    return jax.tree.map(
        lambda leaf: dequantize(leaf, dtype) if is_quantized(leaf) else leaf,
        params,
        is_leaf=is_quantized,
    )
