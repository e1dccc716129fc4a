"""Normalization, and the choice of experts, of each token in one program.

Dimension letters: `M` tokens, `D` model width, `E` experts, `A` experts used per token, `L` layers.

Parameters are stacks of all layers, of which the kernels take the index of one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jax.typing import DTypeLike

from grok1.kernels.gpu.tiles import Ref, load_tile, power_of_two
from grok1.ops.derivatives import forward_only

EPSILON = 1e-5  # as in model.RMSNorm
DEPTH = 512  # of the model width, which a program multiplies at a time
COMPILER = plgpu.CompilerParams(num_warps=16, num_stages=2)


def normalize(
    x: jax.Array,
    scale: jax.Array,
    layer: jax.Array,
    add_to: jax.Array | None = None,
    dtype: DTypeLike = jnp.float32,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`model.RMSNorm`, or its sum with `add_to`: x, add_to float32 [M, D] -> `dtype` [M, D].

    scale: float32 [L, D], of which `layer` int32 [] is used.
    """
    call = pl.pallas_call(
        _normalize_kernel,
        grid=(len(x),),
        out_shape=jax.ShapeDtypeStruct(x.shape, dtype),
        compiler_params=COMPILER,
        interpret=interpret,
        name="normalize",
    )
    return forward_only(call)(layer, x, scale, *([] if add_to is None else [add_to]))


def _normalize_kernel(layer_ref: Ref, x_ref: Ref, scale_ref: Ref, *refs: Ref) -> None:
    """Write the row of one token."""
    token, layer = pl.program_id(0), plgpu.load(layer_ref)
    row = _columns(x_ref.shape[1])
    x = _load(x_ref, token, row)
    out = x * _inverse_rms(x, x_ref.shape[1]) * _load(scale_ref, layer, row)
    if len(refs) > 1:
        out += _load(refs[0], token, row)
    _store(refs[-1], token, row, out)


def route(
    h: jax.Array,
    attended: jax.Array,
    scales: tuple[jax.Array, jax.Array],
    router: jax.Array,
    layer: jax.Array,
    valid: jax.Array,
    count: int,
    dtype: DTypeLike,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Add the normalized output of attention to the residual stream, and choose experts.

    h: the residual stream, float32 [M, D]. attended: float32 [M, D]. scales: of the norms after
    attention and before the experts, float32 [L, D]. router: float32 [L, D, E]. valid: bool [M],
    False for a masked token. count: A.

    Returns the new h; its norm, the experts' input, in `dtype`; and gates float32 [M, E], the
    router's probabilities of the chosen experts, zero for the others and for a masked token.
    """
    experts = router.shape[-1]
    call = pl.pallas_call(
        functools.partial(_route_kernel, count),
        grid=(len(h),),
        out_shape=(
            jax.ShapeDtypeStruct(h.shape, jnp.float32),
            jax.ShapeDtypeStruct(h.shape, dtype),
            jax.ShapeDtypeStruct((len(h), experts), jnp.float32),
        ),
        compiler_params=COMPILER,
        interpret=interpret,
        name="route",
    )
    return forward_only(call)(layer, h, attended, *scales, router, valid)


def _route_kernel(
    count: int,
    layer_ref: Ref,
    h_ref: Ref,
    attended_ref: Ref,
    after_ref: Ref,
    before_ref: Ref,
    router_ref: Ref,
    valid_ref: Ref,
    *out_refs: Ref,
) -> None:
    """Write the rows of one token."""
    token, layer = pl.program_id(0), plgpu.load(layer_ref)
    width, experts = router_ref.shape[1:]
    expert = jnp.arange(power_of_two(experts))
    h_out, x_out, gates_out = out_refs
    row = _columns(width)
    after = _inverse_rms(_load(attended_ref, token, row), width)

    def new_h(columns: Columns) -> jax.Array:
        attended = _load(attended_ref, token, columns) * after
        return _load(h_ref, token, columns) + attended * _load(after_ref, layer, columns)

    h = new_h(row)
    before = _inverse_rms(h, width)
    _store(h_out, token, row, h)
    _store(x_out, token, row, h * before * _load(before_ref, layer, row))

    def add(i: jax.Array, logits: jax.Array) -> jax.Array:
        columns = _columns(width, i * DEPTH, DEPTH)
        x = new_h(columns) * before * _load(before_ref, layer, columns)
        at = layer, columns.number[:, None], expert[None]
        weights = load_tile(router_ref.at[*at], columns.inside, expert < experts)  # [columns, E]
        return logits + jnp.sum(x[:, None] * weights, axis=0)

    logits = lax.fori_loop(0, pl.cdiv(width, DEPTH), add, jnp.zeros_like(expert, jnp.float32))
    gates = _chosen(logits, experts, count)
    gates = jnp.where(plgpu.load(valid_ref.at[token]), gates, 0)
    plgpu.store(gates_out.at[token, expert], gates, mask=expert < experts)


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


class Columns(NamedTuple):
    """Columns of a row, and which of them exist; None: all."""

    number: jax.Array
    inside: jax.Array | None


def _columns(width: int, start: jax.Array | int = 0, size: int | None = None) -> Columns:
    """Return `size` columns of a row of `width`; None: all, with padding to a power of two."""
    size = power_of_two(width) if size is None else size
    number = start + jnp.arange(size)
    return Columns(number, number < width if width % size else None)


def _load(ref: Ref, row: jax.Array, columns: Columns) -> jax.Array:
    return load_tile(ref.at[row, columns.number], columns.inside)


def _store(ref: Ref, row: jax.Array, columns: Columns, x: jax.Array) -> None:
    plgpu.store(ref.at[row, columns.number], x.astype(ref.dtype), mask=columns.inside)
