"""Int8 weights with group scales, and the one matrix product that takes float or int8 weights.

Dimension letters: `I` in (contracted) width, `O` out width, `J` scale groups along `I`.

A quantised matrix stands for `weight[i, o] * scales[i // (I / J), o]`: one scale per output column,
and along the contracted axis one per group of `I / J` consecutive rows. Grok-1 has one group for
most matrices, and eight for the two whose contracted axis its mesh splits (the attention's output
projection and the experts' `linear_1`). The number of groups says nothing about the mesh in use.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from grok1.backend import on_cpu


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight8bit:
    """An int8 matrix and its scales: a pytree, and a Haiku parameter like any array.

    weight: int8 [..., I, O].
    scales: bfloat16 [..., J, O]; J divides I.
    """

    weight: Any
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that it stands for, [..., I, O]."""
        return self.weight.shape


Weight = jax.Array | QuantizedWeight8bit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedWeight:
    """One int8 matrix [I, O] where it lies, among those of all layers, or layers and experts.

    weight: QuantizedWeight8bit [L, I, O]. layer: int32 [], which one. For kernels and loops, to
    which a matrix that is sliced out first would be a copy.
    """

    weight: Any
    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the one matrix, [I, O]."""
        return self.weight.shape[1:]

    def picked(self) -> QuantizedWeight8bit:
        """Return the one matrix, sliced out."""
        pick = functools.partial(lax.dynamic_index_in_dim, index=self.layer, keepdims=False)
        return jax.tree.map(pick, self.weight)


def quantize(weight: jax.Array, groups: int = 1) -> QuantizedWeight8bit:
    """Round a float matrix [..., I, O] to int8 with `groups` bfloat16 scales per column.

    Each group's largest magnitude maps to 127 (symmetric, no zero point). The scale is rounded to
    bfloat16 before the division, so that the stored pair is as close as its own scale allows.

    Raises ValueError if `groups` does not divide I.
    """
    *lead, rows, columns = weight.shape
    if groups < 1 or rows % groups:
        raise ValueError(
            f"groups must divide the {rows} rows of a weight of shape {weight.shape}, got {groups}"
        )
    grouped = weight.astype(jnp.float32).reshape(*lead, groups, rows // groups, columns)
    largest = jnp.max(jnp.abs(grouped), axis=-2)  # [..., J, O]
    scales = jnp.where(largest == 0, 1.0, largest / 127).astype(jnp.bfloat16)
    steps = jnp.round(grouped / scales.astype(jnp.float32)[..., :, None, :])
    return QuantizedWeight8bit(
        weight=jnp.clip(steps, -127, 127).astype(jnp.int8).reshape(weight.shape), scales=scales
    )


def dequantize(weight: Weight, dtype: Any = jnp.float32) -> jax.Array:
    """Return the matrix [..., I, O] that a float or int8 weight stands for, in `dtype`."""
    if not isinstance(weight, QuantizedWeight8bit):
        return weight.astype(dtype)
    *lead, rows, columns = weight.shape
    groups = weight.scales.shape[-2]
    grouped = weight.weight.astype(jnp.float32).reshape(*lead, groups, rows // groups, columns)
    scaled = grouped * weight.scales.astype(jnp.float32)[..., :, None, :]
    return scaled.reshape(weight.shape).astype(dtype)


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum` of two arrays of one dtype, accumulated in and returned as float32.

    float32 inputs are multiplied at the highest precision: TF32's 10 bits flip expert choices.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """`x [..., I] @ weight [I, O]`, float32 [..., O], whatever kind the weight is.

    The weight is converted to the dtype of `x`, in which int8 is exact. The scales multiply the
    float32 partial sums of each group, not the inputs of the product, where that would round them:
    in float32 an int8 times its scale is exact, and one product is faster than one a group.
    """
    if not isinstance(weight, QuantizedWeight8bit):
        return product("...i,io->...o", x, weight.astype(x.dtype))
    rows, columns = weight.shape
    scales = weight.scales.astype(jnp.float32)  # [J, O]
    groups = scales.shape[0]
    if groups == 1:
        return product("...i,io->...o", x, weight.weight.astype(x.dtype)) * scales[0]
    if x.dtype == jnp.float32:
        return product("...i,io->...o", x, dequantize(weight))
    steps = weight.weight.astype(x.dtype)
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, rows // groups), -2, 0)  # [J, ..., I/J]
    steps = steps.reshape(groups, rows // groups, columns)
    partial = product("j...i,jio->j...o", x, steps)
    scales = scales.reshape(groups, *(1,) * (x.ndim - 2), columns)
    return jnp.sum(partial * scales, axis=0)


def local_matmul(x: jax.Array, weight: Weight | StackedWeight) -> jax.Array:
    """`matmul` where both lie on one device: the same to float32's rounding, faster on a CPU.

    XLA's CPU backend writes a matrix of int8 out as float32 before it multiplies, an order slower
    than it multiplies what is in its caches. So a large matrix is taken in blocks that are; or, on
    a processor that multiplies int8 by int8, as it is (`_integer_matmul`).
    """
    large = math.prod(weight.shape) >= LEAST_WEIGHTS and on_cpu()
    if isinstance(weight, QuantizedWeight8bit) and large:
        weight = StackedWeight(jax.tree.map(lambda w: w[None], weight), jnp.int32(0))
    if not isinstance(weight, StackedWeight):
        return matmul(x, weight)
    if not large:
        return matmul(x, weight.picked())
    y = _cpu_matmul(x.reshape(-1, x.shape[-1]), weight)
    return y.reshape(*x.shape[:-1], -1)


LEAST_WEIGHTS = 1 << 20  # fewer are converted within the caches, and compile faster in one product
BLOCK_WEIGHTS, BLOCK_COLUMNS = 1 << 21, 8192  # of a block at most: 8 MiB of float32, read in order
DIGITS, DIGIT_BITS = 4, 7
LEAST_ROWS = 8  # below which XLA's int8 product takes as long or longer


@functools.cache
def multiplies_int8() -> bool:
    """Return whether this processor has Intel's products of int8 (AMX), which XLA uses."""
    try:
        return "amx_int8" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@jax.custom_jvp
def _cpu_matmul(x: jax.Array, weight: StackedWeight) -> jax.Array:
    """`matmul` of x [M, I] by int8 [I, O] -> float32 [M, O], fast on a CPU."""
    if x.dtype == jnp.float32 and multiplies_int8():
        one = weight.picked()
        return _integer_matmul(x, one.weight, one.scales)
    return _blocked_matmul(x, weight)


@_cpu_matmul.defjvp
def _cpu_matmul_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    """Differentiate the product that is meant, by x: the rounding of whole numbers has no slope."""
    x, weight = primals
    return _cpu_matmul(x, weight), matmul(tangents[0], weight.picked())


def _blocked_matmul(x: jax.Array, weight: StackedWeight) -> jax.Array:
    """`_cpu_matmul`, block by block, each of which is converted to float32 within the caches.

    In float32 whatever the dtype of x: products of bfloat16 are exact in it.
    """
    rows, columns = weight.shape
    steps, scales = weight.weight.weight, weight.weight.scales
    of_group = rows // scales.shape[1]
    width = min(columns, BLOCK_COLUMNS)
    most = BLOCK_WEIGHTS // width
    even = [n for n in range(max(1, most // 8), most + 1) if of_group % n == 0]
    depth = max(even, default=of_group)  # rows without such divisors are taken together
    deep = rows // depth
    x = x.astype(jnp.float32)

    def add(i: jax.Array, out: jax.Array) -> jax.Array:
        row, column = i % deep * depth, i // deep * width
        # The last columns may overlap the ones before: a slice ends where the matrix does.
        block = lax.dynamic_slice(steps, (weight.layer, row, column), (1, depth, width))[0]
        scale = lax.dynamic_slice(scales, (weight.layer, row // of_group, column), (1, 1, width))[0]
        part = lax.dynamic_slice(x, (0, row), (x.shape[0], depth))
        y = product("mi,io->mo", part, block.astype(jnp.float32)) * scale.astype(jnp.float32)
        before = lax.dynamic_slice(out, (0, column), y.shape)
        return lax.dynamic_update_slice(out, jnp.where(row > 0, before + y, y), (0, column))

    out = jnp.zeros([x.shape[0], columns], jnp.float32)
    return lax.fori_loop(0, deep * -(-columns // width), add, out)


def _integer_matmul(x: jax.Array, weight: jax.Array, scales: jax.Array) -> jax.Array:
    """`_cpu_matmul` of float32 x in whole numbers.

    Each row of x is a power of two times whole numbers of 27 bits, and these are four digits of
    seven bits, each an int8. Their products with the weights are summed exactly: a row's result
    depends neither on other rows nor on an order.
    """
    (rows, inputs), groups = x.shape, scales.shape[0]
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    bits = DIGITS * DIGIT_BITS - 2  # the highest digit must not be full: digits have signs
    _, exponent = jnp.frexp(largest)
    exponent = jnp.maximum(exponent, bits - 124)  # a unit below float32's normal ones would be zero
    number = jnp.round(jnp.ldexp(x, bits - exponent)).astype(jnp.int32)
    digits = []  # of [M, I], the lowest first
    for _ in range(DIGITS - 1):
        half = 1 << (DIGIT_BITS - 1)
        digits.append(((number + half) & (2 * half - 1)) - half)
        number = (number - digits[-1]) >> DIGIT_BITS
    stacked = jnp.concatenate([*digits, number]).astype(jnp.int8)  # [DIGITS * M, I]
    stacked = jnp.pad(stacked, ((0, max(0, LEAST_ROWS - DIGITS * rows)), (0, 0)))
    total = jnp.zeros([], jnp.float32)
    for group in range(groups):  # one product for all, with an axis of groups, is slow
        own = slice(group * inputs // groups, (group + 1) * inputs // groups)
        sums = jnp.matmul(stacked[:, own], weight[own], preferred_element_type=jnp.int32)
        sums = sums[: DIGITS * rows].reshape(DIGITS, rows, -1).astype(jnp.float32)
        y = sums[-1]
        for digit in range(DIGITS - 2, -1, -1):
            y = y * 2.0**DIGIT_BITS + sums[digit]
        total += y * scales[group].astype(jnp.float32)
    unit = jnp.ldexp(jnp.ones_like(largest), exponent - bits)
    return total * jnp.where(jnp.isfinite(largest), unit, jnp.nan)


def split_groups(weight: Weight, parts: int) -> Weight:
    """Repeat scales until their groups divide evenly into `parts` slices along the rows.

    The matrix stands for the same values; a slice along I then holds whole groups, so that each
    device scales its own partial sums. Released weights (8 groups) on 1, 2, 4 or 8 parts are
    returned as they are.
    """
    if not isinstance(weight, QuantizedWeight8bit) or weight.scales.shape[-2] % parts == 0:
        return weight
    rows, groups = weight.shape[-2], weight.scales.shape[-2]
    wanted = groups * parts // math.gcd(groups, parts)
    if rows % wanted:
        raise ValueError(f"{rows} rows in {groups} scale groups cannot be split in {parts} parts")
    scales = jnp.repeat(weight.scales, wanted // groups, axis=-2)
    return QuantizedWeight8bit(weight.weight, scales)
