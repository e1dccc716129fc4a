"""Rounding of matrices to integers of 4 bits.

Dimension letters as in quantization.py.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from grok1.ops.quantization import QuantizedWeight4bit

GROUP = 64  # rows that share a scale
LEAST, LARGEST = -8, 7
# Scales that are tried, as fractions of a group's largest magnitude. A negative one gives the
# largest value the integer -8, if it is positive.
DIVISORS = 7, 7.5, 8, 8.5, 9, -7, -7.5, -8, -8.5, -9


def pack(values: jax.Array) -> jax.Array:
    """Return the bytes [..., I / 2, O] of values int8 [..., I, O]; see QuantizedWeight4bit."""
    return values[..., ::2, :] & 15 | values[..., 1::2, :] << 4


@functools.partial(jax.jit, static_argnames="group")
def quantize_4bit(weight: jax.Array, group: int = GROUP) -> QuantizedWeight4bit:
    """Round a float matrix [..., I, O] to 4 bits, with a bfloat16 scale for `group` rows.

    Each scale is the one with the least squared error of a small search: from a start, values are
    rounded, the scale that is best for these is computed, and values are rounded again. The first
    start is 1/7 of the largest magnitude, without the second part, so that the error is never
    larger than with that.

    Raises ValueError if `group` is odd or does not divide I.
    """
    *lead, rows, columns = weight.shape
    if group < 2 or group % 2 or rows % group:
        fitting = [size for size in (32, 64, 128) if rows % size == 0]
        raise ValueError(
            f"group: expected an even divisor of the {rows} rows of a weight of shape "
            f"{weight.shape}, such as {fitting}, got {group}"
        )
    grouped = weight.astype(jnp.float32).reshape(*lead, rows // group, group, columns)
    scales = _search(grouped)
    values = _round(grouped, scales).astype(jnp.int8).reshape(weight.shape)
    return QuantizedWeight4bit(pack(values), scales[..., 0, :].astype(jnp.bfloat16))


def shape_in_4_bits(shape: Sequence[int], groups: int) -> QuantizedWeight4bit | None:
    """Return the shapes of a matrix [..., I, O] in 4 bits, or None if it has no such groups."""
    *lead, rows, columns = shape
    if groups < 1 or rows % (2 * groups):
        return None
    weight = jax.ShapeDtypeStruct((*lead, rows // 2, columns), jnp.int8)
    return QuantizedWeight4bit(weight, jax.ShapeDtypeStruct((*lead, groups, columns), jnp.bfloat16))


def _search(x: jax.Array) -> jax.Array:
    """Return the best scales, float32 [..., J, 1, O], of x float32 [..., J, I / J, O]."""
    largest = jnp.max(jnp.abs(x), axis=-2, keepdims=True)
    best = _stored(largest / DIVISORS[0])
    least = _error(x, best)
    for divisor in DIVISORS:
        values = _round(x, _stored(largest / divisor))
        squares = jnp.sum(values * values, axis=-2, keepdims=True)
        scale = _stored(jnp.sum(x * values, axis=-2, keepdims=True) / jnp.maximum(squares, 1))
        error = _error(x, scale)
        best, least = jnp.where(error < least, scale, best), jnp.minimum(error, least)
    return best


def _stored(scale: jax.Array) -> jax.Array:
    """Return a scale float32 with the precision of bfloat16, as it is stored; 1 in place of 0.

    XLA may leave out a conversion to bfloat16 and back.
    """
    scale = lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)
    return jnp.where(scale == 0, 1, scale)


def _round(x: jax.Array, scale: jax.Array) -> jax.Array:
    return jnp.clip(jnp.round(x / scale), LEAST, LARGEST)


def _error(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Return the squared error of a group's values, rounded with a scale."""
    return jnp.sum((x - _round(x, scale) * scale) ** 2, axis=-2, keepdims=True)
