"""The choice of experts, and what comes before it: the residual stream and its norm.

Dimension letters: `M` tokens, `D` model width, `E` experts, `A` experts used per token, `L` layers.

Parameters are stacks of all layers, of which the kernels take the index of one.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from grok1.kernels.gpu.tiles import Axis, Ref, axis, load, power_of_two, run_kernel, store

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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Add the normalized output of attention to the residual stream, and choose experts.

    h: the residual stream, float32 [M, D]. attended: float32 [M, D]. scales: of the norms after
    attention and before the experts, float32 [L, D]. router: float32 [L, D, E]. valid: bool [M],
    False for a masked token. count: A.

    Returns the new h; its norm, the experts' input, in `dtype`; and gates float32 [M, E], the
    router's probabilities of the chosen experts, zero for the others and for a masked token.
    """
    out = (h.shape, jnp.float32), (h.shape, dtype), ((len(h), router.shape[-1]), jnp.float32)
    h, x, gates = run_kernel(
        functools.partial(_route_kernel, count),
        (len(h),),
        out,
        [layer, h, attended, *scales, router, valid],
        name="route",
        warps=16,
        stages=2,
    )
    return h, x, gates


def _route_kernel(
    count: int,
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
) -> None:
    """Write the rows of one token."""
    token, layer = pl.program_id(0), load(layer_ref)
    width, experts = router_ref.shape[1:]
    columns, expert = (axis(power_of_two(n), n) for n in (width, experts))
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
        # A part of a row cannot be taken out of the whole, which is spread over the threads: it is
        # computed again.
        part = axis(DEPTH, width, i * DEPTH)
        x = new_h(part) * h_rms * load(experts_scale_ref, layer, part)
        return logits + jnp.sum(x[:, None] * load(router_ref, layer, part, expert), axis=0)

    logits = jnp.zeros_like(expert.indices, jnp.float32)
    logits = lax.fori_loop(0, pl.cdiv(width, DEPTH), add, logits)
    gates = _chosen(logits, experts, count)
    store(gates_out, jnp.where(load(valid_ref, token), gates, 0), token, expert)


def _chosen(logits: jax.Array, experts: int, count: int) -> jax.Array:
    """Return the softmax of the `count` largest logits, zero for the others.

    Ties go to the lower index, as in `mixture.top_k`.
    """
    expert = jnp.arange(logits.size)
    logits = jnp.where(expert < experts, logits, -jnp.inf)
    powers = jnp.exp(logits - jnp.max(logits))
    probs = powers / jnp.sum(powers)
    gates, rest = jnp.zeros_like(probs), jnp.where(expert < experts, probs, -1)
    for _ in range(count):
        first = jnp.min(jnp.where(rest == jnp.max(rest), expert, logits.size))
        gates = jnp.where(expert == first, probs, gates)
        rest = jnp.where(expert == first, -1, rest)
    return gates


def _inverse_rms(x: jax.Array, width: int) -> jax.Array:
    """Return `1 / sqrt(mean(x^2) + 1e-5)` of a row, which is padded with zeros."""
    return lax.rsqrt(jnp.sum(x * x) / width + EPSILON)
