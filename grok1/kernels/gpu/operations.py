"""The operations on an NVIDIA GPU: which form is used for what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from grok1.kernels.error import KernelError
from grok1.kernels.gpu.attention import attend_cached
from grok1.kernels.gpu.decode_attention import write_and_attend
from grok1.kernels.gpu.draw import draw_token
from grok1.kernels.gpu.layer import fused_layer
from grok1.kernels.gpu.products import mix, side_by_side
from grok1.kernels.sorted_experts import is_quantized
from grok1.ops.cache import CacheIndex
from grok1.ops.mixture import chosen_experts, flat
from grok1.ops.operations import Operations
from grok1.ops.quantization import (
    QuantizedWeight8bit,
    StackedWeight,
    Weight,
    Weights,
    matmul,
    stacked,
)


@functools.cache
def load() -> None:
    """Test two of the kernels on this device. Raises KernelError if one fails or is wrong."""
    rng = np.random.default_rng(0)
    steps = rng.integers(-127, 128, [1, 64, 128]).astype(np.int8)
    weight = QuantizedWeight8bit(steps, jnp.full([1, 1, 128], 0.01, jnp.bfloat16))
    x = jnp.asarray(rng.standard_normal([2, 64]), jnp.bfloat16)
    zero, none = jnp.int32(0), jnp.zeros([1], jnp.int32)
    heads = jnp.asarray(rng.standard_normal([1, 3, 64]), jnp.bfloat16)  # a query, key and value
    heads = heads.at[0, 0].set(0)  # so that the weight of the only value, 1, is not rounded
    cache, mask = jnp.zeros([1, 1, 4, 1, 64], jnp.bfloat16), jnp.ones([1, 4], bool)
    index = CacheIndex(zero, none, none + 1, none)
    try:
        y = jax.jit(side_by_side)(x, [weight], zero)
        expected = matmul(x, jax.tree.map(lambda w: jnp.asarray(w[0]), weight))
        _check("a test product", y, expected)
        attend = jax.jit(write_and_attend, static_argnums=4)
        _check("test attention", attend(heads, cache, cache, mask, 1.0, index)[0][0], heads[0, 2:])
    except Exception as error:  # a compiler or driver may raise anything
        raise KernelError((str(error).strip() or repr(error)).splitlines()[0]) from error


def _check(name: str, found: jax.Array, expected: jax.Array) -> None:
    difference = np.asarray(found, np.float32) - np.asarray(expected, np.float32)
    error = np.linalg.norm(difference) / np.linalg.norm(np.asarray(expected, np.float32))
    if not error < 1e-3:
        raise ArithmeticError(f"{name} is wrong by {error:.1%}")


def _mixture(params: Weights, x: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
    if not is_quantized(params):
        return chosen_experts(params, x, gates, index)
    gate, value, out = (stacked(params[name]["w"]) for name in ("linear", "linear_v", "linear_1"))
    weights = gate.stack, value.stack, out.stack
    return mix(flat(x), weights, gate.layer, flat(gates), flat(index)).reshape(x.shape)


def _matmul(x: jax.Array, weight: Weight) -> jax.Array:
    if not (isinstance(weight, StackedWeight) and isinstance(weight.stack, QuantizedWeight8bit)):
        return matmul(x, weight)
    y = side_by_side(x.reshape(-1, x.shape[-1]), [weight.stack], weight.layer)
    return y.reshape(*x.shape[:-1], -1)


OPERATIONS = Operations(
    matmul=_matmul,
    mixture=_mixture,
    attend_cached=attend_cached,
    takes_stacked=True,
    draw=draw_token,
    fused_layer=fused_layer,
)
