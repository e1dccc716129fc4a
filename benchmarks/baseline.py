"""The obvious form that `speed.py` compares with: all experts, dequantised, for every token.

A copy of its own, so that it stays as it is when the model's own products become faster.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

from grok1.ops.quantization import QuantizedWeight8bit
from model import Linear, MoELayer


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum` of two arrays of one dtype, accumulated in and returned as float32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def matmul(x: jax.Array, weight: QuantizedWeight8bit) -> jax.Array:
    """`x [..., I] @ weight [I, O]` -> float32: the matrix converted, a product for each group."""
    rows, columns = weight.shape
    scales = weight.scales.astype(jnp.float32)  # [J, O]
    groups = scales.shape[0]
    steps = weight.weight.astype(x.dtype)
    if groups == 1:
        return product("...i,io->...o", x, steps) * scales[0]
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, rows // groups), -2, 0)  # [J, ..., I/J]
    steps = steps.reshape(groups, rows // groups, columns)
    partial = product("j...i,jio->j...o", x, steps)
    scales = scales.reshape(groups, *(1,) * (x.ndim - 2), columns)
    return jnp.sum(partial * scales, axis=0)


def expert(params: Mapping[str, Mapping[str, Any]], x: jax.Array) -> jax.Array:
    """`linear_1(gelu(linear(x)) * linear_v(x))`, x [M, D] -> float32 [M, D]."""
    gate = jax.nn.gelu(matmul(x, params["linear"]["w"]), approximate=True)
    hidden = gate * matmul(x, params["linear_v"]["w"])
    return matmul(hidden.astype(x.dtype), params["linear_1"]["w"])


def all_experts(
    params: Mapping[str, Mapping[str, Any]], x: jax.Array, gates: jax.Array, index: jax.Array
) -> jax.Array:
    """All experts of x [M, D], most times a zero gate; gates and index [M, A] -> [M, D]."""
    outputs = jax.vmap(expert, in_axes=(0, None))(params, x)  # [E, M, D]
    chosen = jax.nn.one_hot(index, outputs.shape[0])
    weights = jnp.sum(chosen * gates[..., None], axis=-2)  # [M, E]
    return jnp.einsum("me,emd->md", weights, outputs, precision=lax.Precision.HIGHEST)


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """Within this, a model with `expert_dispatch="all"` is traced with the products above."""

    def intercept(
        method: Callable[..., Any], args: Any, kwargs: Any, context: hk.MethodContext
    ) -> Any:
        module = context.module
        if isinstance(module, Linear) and context.method_name == "__call__":
            (x,) = args
            return matmul(x, module.weight(x.shape[-1]))
        if isinstance(module, MoELayer) and context.method_name == "_mixture":
            params, x, routing, layer = args
            assert layer is None, "the layer is sliced out first"
            rows, gates, index = (
                a.reshape(-1, a.shape[-1]) for a in (x, routing.gates, routing.expert_index)
            )
            return all_experts(params, rows, gates, index).reshape(x.shape)
        return method(*args, **kwargs)

    with hk.intercept_methods(intercept):
        yield
