"""The choice of experts, and what comes before it: the residual stream and its norm.

Dimension letters: `M` tokens, `D` model width, `E` experts, `A` experts used per token, `L` layers.

Parameters are stacks of all layers; the kernel takes a layer's index.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from grok1.kernels.gpu.tiles import Axis, Ref, load, run_kernel, span, store, whole

EPSILON = 1e-5  # as in model.RMSNorm
DEPTH = 512  # of the model width, which a program multiplies at a time


def route(
    h: jax.Array,
    attended: jax.Array,
    scales: tuple[jax.Array, jax.Array],
    router: jax.Array,
    layer: jax.Array,
    valid: jax.Array,
    count: int,
    dtype: DTypeLike,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Add the normalized output of attention to the residual stream, and choose experts.

    h: the residual stream, float32 [M, D]. attended: float32 [M, D]. scales: of the norms after
    attention and before the experts, float32 [L, D]. router: float32 [L, D, E]. valid: bool [M],
    False for a masked token. count: A.

    Returns the new h; its norm, the experts' input, in `dtype`; gates float32 [M, A], the router's
    largest probabilities; and their experts int32 [M, A], E for a masked token, whose gates are not
    zero.
    """
    shape = len(h), count
    h, x, gates, index = run_kernel(
        _route_kernel,
        (len(h),),
        [(h.shape, jnp.float32), (h.shape, dtype), (shape, jnp.float32), (shape, jnp.int32)],
        [layer, h, attended, *scales, router, valid],
        name="route",
        warps=16,
        stages=2,
    )
    return h, x, gates, index


def _route_kernel(
    layer_ref: Ref,
    h_ref: Ref,
    attended_ref: Ref,
    attended_scale_ref: Ref,
    experts_scale_ref: Ref,
    router_ref: Ref,
    valid_ref: Ref,
    h_out: Ref,
    x_out: Ref,
    gates_out: Ref,
    index_out: Ref,
) -> None:
    """Write the rows of one token."""
    token, layer = pl.program_id(0), load(layer_ref)
    width, experts = router_ref.shape[1:]
    columns, expert, choice = (whole(n) for n in (width, experts, gates_out.shape[1]))
    attended_rms = _inverse_rms(load(attended_ref, token, columns), width)

    def new_h(columns: Axis) -> jax.Array:
        normalized = load(attended_ref, token, columns) * attended_rms
        normalized *= load(attended_scale_ref, layer, columns)
        return load(h_ref, token, columns) + normalized

    h = new_h(columns)
    h_rms = _inverse_rms(h, width)
    store(h_out, h, token, columns)
    store(x_out, h * h_rms * load(experts_scale_ref, layer, columns), token, columns)

    def add(i: jax.Array, logits: jax.Array) -> jax.Array:
        # Triton cannot slice a tile, which is spread over the threads: the part is computed again.
        part = span(DEPTH, width, i * DEPTH)
        x = new_h(part) * h_rms * load(experts_scale_ref, layer, part)
        return logits + jnp.sum(x[:, None] * load(router_ref, layer, part, expert), axis=0)

    logits = jnp.zeros_like(expert.indices, jnp.float32)
    logits = lax.fori_loop(0, pl.cdiv(width, DEPTH), add, logits)
    probs = jax.nn.softmax(jnp.where(expert.indices < experts, logits, -jnp.inf))
    gates, index = _largest(probs, choice.indices)
    store(gates_out, gates, token, choice)
    store(index_out, jnp.where(load(valid_ref, token), index, experts), token, choice)


def _largest(probs: jax.Array, choice: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the largest probabilities, as many as choices, and their indices, in this order.

    Ties go to the lower index, as in `mixture.top_k`.
    """
    number, rest = jnp.arange(probs.size), probs
    values, indices = jnp.zeros_like(choice, jnp.float32), jnp.zeros_like(choice)
    for n in range(choice.size):
        value = jnp.max(rest)
        index = jnp.min(jnp.where(rest < value, probs.size, number))  # a valid one, also if NaN
        values = jnp.where(choice == n, value, values)
        indices = jnp.where(choice == n, index, indices)
        rest = jnp.where(number == index, -1, rest)
    return values, indices


def _inverse_rms(x: jax.Array, width: int) -> jax.Array:
    """Return `1 / sqrt(mean(x^2) + 1e-5)` of a row, which is padded with zeros."""
    return lax.rsqrt(jnp.sum(x * x) / width + EPSILON)
