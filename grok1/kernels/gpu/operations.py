"""The operations on an NVIDIA GPU: which form is used for what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from grok1.kernels.error import KernelError
from grok1.kernels.gpu.attention import attend_cached
from grok1.kernels.gpu.draw import draw_token
from grok1.kernels.gpu.experts import mix, multiply
from grok1.kernels.gpu.layer import fused_layer
from grok1.kernels.sorted_experts import is_int8
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
    """Test a product on this device. Raises KernelError if it fails or is wrong."""
    rng = np.random.default_rng(0)
    steps = rng.integers(-127, 128, [1, 64, 128]).astype(np.int8)
    weight = QuantizedWeight8bit(steps, jnp.full([1, 1, 128], 0.01, jnp.bfloat16))
    x = jnp.asarray(rng.standard_normal([2, 64]), jnp.bfloat16)
    try:
        y = jax.jit(multiply)(x, weight, jnp.int32(0))
        expected = np.asarray(matmul(x, jax.tree.map(lambda w: jnp.asarray(w[0]), weight)))
        wrong = np.linalg.norm(np.asarray(y) - expected) / np.linalg.norm(expected)
    except Exception as error:  # a compiler or driver may raise anything
        raise KernelError(str(error).strip().splitlines()[0]) from error
    if not wrong < 1e-3:
        raise KernelError(f"a test product is wrong by {wrong:.0%}")


def experts(params: Weights, x: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
    """`mixture.chosen_experts` for int8 weights."""
    gate, value, out = (stacked(params[name]["w"]) for name in ("linear", "linear_v", "linear_1"))
    weights = gate.stack, value.stack, out.stack
    return mix(flat(x), weights, gate.layer, flat(gates), flat(index)).reshape(x.shape)


def _matmul(x: jax.Array, weight: Weight) -> jax.Array:
    if not (isinstance(weight, StackedWeight) and isinstance(weight.stack, QuantizedWeight8bit)):
        return matmul(x, weight)
    y = multiply(x.reshape(-1, x.shape[-1]), weight.stack, weight.layer)
    return y.reshape(*x.shape[:-1], -1)


def _mixture(params: Weights, x: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
    return (experts if is_int8(params) else chosen_experts)(params, x, gates, index)


OPERATIONS = Operations(
    matmul=_matmul,
    mixture=_mixture,
    attend_cached=attend_cached,
    takes_stacked=True,
    draw=draw_token,
    fused_layer=fused_layer,
)
