"""Rounding of matrices to integers of 4 bits, in NumPy, in blocks that stay in a cache.

Dimension letters as in quantization.py, with `R` the rows of a group.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import ArrayLike

from grok1.ops.quantization import QuantizedWeight4bit

GROUP = 64  # rows that share a scale
LEAST, LARGEST = -8, 7
# Scales from which the search starts, as fractions of a group's largest magnitude. With a negative
# one, the largest value becomes the integer -8 if it is positive. Ten of them would give an error
# that is 1.5 % smaller.
DIVISORS = 8, 8.75, -8, -8.75
BLOCK = 1 << 17  # values that are rounded at a time


def pack(values: np.ndarray) -> np.ndarray:
    """Return the bytes [..., I / 2, O] of values int8 [..., I, O]; see QuantizedWeight4bit."""
    return values[..., ::2, :] & 15 | values[..., 1::2, :] << 4


def quantize_4bit(weight: ArrayLike, group: int = GROUP) -> QuantizedWeight4bit:
    """Round a float matrix [..., I, O] to 4 bits, with a bfloat16 scale for `group` rows.

    Each scale is the one with the least squared error of a small search: from a start, values are
    rounded, the scale that is best for these is computed, and values are rounded again. 1/7 of the
    largest magnitude, which is usual, is also tried, so that the error is never larger than with
    that. Computes in float32; returns arrays of NumPy.

    Raises ValueError if `group` is odd or does not divide I.
    """
    values = np.asarray(weight)
    *lead, rows, columns = values.shape
    if group < 2 or group % 2 or rows % group:
        fitting = [size for size in (32, 64, 128) if rows % size == 0]
        raise ValueError(
            f"group: expected an even divisor of the {rows} rows of a weight of shape "
            f"{values.shape}, such as {fitting}, got {group}"
        )
    grouped = values.reshape(-1, group, columns)
    packed = np.empty((len(grouped), group // 2, columns), np.int8)
    scales = np.empty((len(grouped), columns), ml_dtypes.bfloat16)
    width = min(columns, 2048)
    count = max(1, BLOCK // (group * width))
    for first in range(0, len(grouped), count):
        for column in range(0, columns, width):
            own = slice(first, first + count), slice(column, column + width)
            block = np.array(grouped[own[0], :, own[1]], np.float32, order="C")
            best = _search(block)
            packed[own[0], :, own[1]] = pack(_round(block, best).astype(np.int8))
            scales[own] = best
    return QuantizedWeight4bit(
        packed.reshape(*lead, rows // 2, columns), scales.reshape(*lead, rows // group, columns)
    )


def shape_in_4_bits(shape: Sequence[int], groups: int) -> QuantizedWeight4bit | None:
    """Return the shapes of a matrix [..., I, O] in 4 bits, or None if it has no such groups."""
    *lead, rows, columns = shape
    if groups < 1 or rows % (2 * groups):
        return None
    weight = jax.ShapeDtypeStruct((*lead, rows // 2, columns), jnp.int8)
    return QuantizedWeight4bit(weight, jax.ShapeDtypeStruct((*lead, groups, columns), jnp.bfloat16))


def _search(x: np.ndarray) -> np.ndarray:
    """Return the best scales [J, O] of x [J, R, O]; all float32."""
    largest = np.max(np.abs(x), axis=1)
    best = _stored(largest / LARGEST)
    least = _error(x, best)
    for divisor in DIVISORS:
        values = _round(x, _stored(largest / np.float32(divisor)))
        scale = _stored(_sum(x, values) / np.maximum(_sum(values, values), 1))
        error = _error(x, scale)
        best = np.where(error < least, scale, best)
        least = np.minimum(error, least)
    return best


def _stored(scale: np.ndarray) -> np.ndarray:
    """Return a scale as it is stored, with the precision of bfloat16; 1 in place of 0."""
    scale = scale.astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.where(scale == 0, np.float32(1), scale)


def _round(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    values = x / scale[:, None]
    return np.clip(np.rint(values, out=values), LEAST, LARGEST, out=values)


def _error(x: np.ndarray, scale: np.ndarray) -> Any:
    """Return the squared error of each group's values, rounded with a scale."""
    values = _round(x, scale)
    values *= scale[:, None]
    values -= x
    return _sum(values, values)


def _sum(x: np.ndarray, y: np.ndarray) -> Any:
    """Return the sums of x y over the rows of each group."""
    return np.einsum("jro,jro->jo", x, y)
