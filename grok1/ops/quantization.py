"""Weights of 8 or 4 bits with group scales, and the one matrix product for weights of all types.

Dimension letters: `I` in (contracted) width, `O` out width, `J` scale groups along `I`.

A quantized matrix stands for `values[i, o] * scales[i // (I / J), o]`: one scale per output column,
and along the contracted axis one per group of `I / J` consecutive rows. Grok-1 has one group for
most matrices, and eight for the two whose contracted axis its mesh splits (the attention's output
projection and the experts' `linear_1`). The number of groups does not depend on the mesh in use.
Integers of 4 bits need more groups, one for 32 to 128 rows.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight8bit:
    """An int8 matrix and its scales: a pytree, and a Haiku parameter like any array.

    weight: int8 [..., I, O].
    scales: bfloat16 [..., J, O]; J divides I.
    """

    weight: Any  # arrays; or, in a tree of the same structure, their shapes, specs or places
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that it stands for, [..., I, O]."""
        return self.weight.shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedWeight4bit:
    """A matrix of integers from -8 to 7, two in a byte, and its scales, which may be negative.

    weight: int8 [..., I / 2, O]; byte [i, o] holds row 2 i in its low four bits and row 2 i + 1 in
    its high ones, both as two's complement. In NumPy, the values int8 [..., I, O] are

        np.stack([weight << 4 >> 4, weight >> 4], axis=-2).reshape(*lead, -1, columns)

    scales: bfloat16 [..., J, O]; J divides I.
    """

    weight: Any  # as in a QuantizedWeight8bit
    scales: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix that it stands for, [..., I, O]."""
        *lead, half, columns = self.weight.shape
        return (*lead, 2 * half, columns)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackedWeight:
    """The weight of one layer, stored in the stack of all layers; usable as a Haiku parameter.

    For loops and kernels that read a part of it: slicing a layer out first would copy it.

    stack: [L, ...], of any type. layer: int32 [], its index.
    """

    stack: Any  # or a spec, as in a QuantizedWeight8bit
    layer: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the one weight."""
        return self.stack.shape[1:]

    def sliced(self) -> Any:
        """Return the one weight, sliced out."""
        take = functools.partial(lax.dynamic_index_in_dim, index=self.layer, keepdims=False)
        return jax.tree.map(take, self.stack)


QuantizedWeight = QuantizedWeight8bit | QuantizedWeight4bit
Parameter = jax.Array | QuantizedWeight
ParameterShape = jax.ShapeDtypeStruct | QuantizedWeight
Weight = Parameter | StackedWeight  # as a layer uses it

# Trees {module: {name: leaf}}.
Params = Mapping[str, Mapping[str, Parameter]]
Weights = Mapping[str, Mapping[str, Weight]]
Shapes = Mapping[str, Mapping[str, ParameterShape]]


def stacked(weight: Weight) -> StackedWeight:
    """Return a weight as a stack of one layer, unless it is stacked already."""
    if isinstance(weight, StackedWeight):
        return weight
    return StackedWeight(jax.tree.map(lambda w: w[None], weight), jnp.int32(0))


def sliced(tree: Any) -> Any:
    """Return a tree of weights with every StackedWeight sliced out."""

    def is_stacked(weight: object) -> bool:
        return isinstance(weight, StackedWeight)

    return jax.tree.map(lambda w: w.sliced() if is_stacked(w) else w, tree, is_leaf=is_stacked)


def matrix(weight: Weight, index: jax.Array) -> StackedWeight:
    """Return one matrix [I, O] of a weight [E, I, O], without copying it."""
    if not isinstance(weight, StackedWeight):
        return StackedWeight(weight, index)
    flat = jax.tree.map(lambda w: w.reshape(-1, *w.shape[2:]), weight.stack)  # [L * E, I, O]
    return StackedWeight(flat, weight.layer * weight.shape[0] + index)


def quantize(weight: jax.Array, groups: int = 1) -> QuantizedWeight8bit:
    """Round a float matrix [..., I, O] to int8 with `groups` bfloat16 scales per column.

    Each group's largest magnitude maps to 127 (symmetric, no zero point). The scale is rounded to
    bfloat16 before the division, so that the int8 values are the closest ones for the stored scale.

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
    values = jnp.round(grouped / scales.astype(jnp.float32)[..., :, None, :])
    return QuantizedWeight8bit(
        weight=jnp.clip(values, -127, 127).astype(jnp.int8).reshape(weight.shape), scales=scales
    )


def unpack(weight: jax.Array) -> jax.Array:
    """Return the values of a QuantizedWeight4bit's bytes [..., I / 2, O], int8 [..., I, O]."""
    *lead, half, columns = weight.shape
    pair = jnp.stack([weight << 4 >> 4, weight >> 4], axis=-2)
    return pair.reshape(*lead, 2 * half, columns)


def dequantize(weight: Parameter, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Return the matrix [..., I, O] that a weight stands for, in `dtype`."""
    if not isinstance(weight, QuantizedWeight):
        return weight.astype(dtype)
    *lead, rows, columns = weight.shape
    groups = weight.scales.shape[-2]
    four = isinstance(weight, QuantizedWeight4bit)
    values = unpack(weight.weight) if four else weight.weight
    grouped = values.astype(jnp.float32).reshape(*lead, groups, rows // groups, columns)
    scaled = grouped * weight.scales.astype(jnp.float32)[..., :, None, :]
    return scaled.reshape(weight.shape).astype(dtype)


def product(subscripts: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """`einsum` of two arrays of one dtype, accumulated in and returned as float32.

    float32 inputs are multiplied at the highest precision: TF32's 10 bits flip expert choices.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jnp.einsum(subscripts, x, y, precision=precision, preferred_element_type=jnp.float32)


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """`x [..., I] @ weight [I, O]`, float32 [..., O], for a weight of any type.

    The weight is converted to the dtype of `x`, in which int8 is exact. In bfloat16 the scales
    multiply the float32 partial sums of each group, since scaled inputs would be rounded. In
    float32 an integer times its scale is exact, and one product of scaled weights is faster than
    one per group; 4 bits have so many groups that they are always multiplied in float32.
    """
    if isinstance(weight, StackedWeight):
        return matmul(x, weight.sliced())
    if isinstance(weight, QuantizedWeight4bit):
        return _matmul_4bit(x.astype(jnp.float32), weight)
    if not isinstance(weight, QuantizedWeight8bit):
        return product("...i,io->...o", x, weight.astype(x.dtype))
    rows, columns = weight.shape
    scales = weight.scales.astype(jnp.float32)  # [J, O]
    groups = scales.shape[0]
    if groups == 1:
        return product("...i,io->...o", x, weight.weight.astype(x.dtype)) * scales[0]
    if x.dtype == jnp.float32:
        return product("...i,io->...o", x, dequantize(weight))
    values = weight.weight.astype(x.dtype)
    x = jnp.moveaxis(x.reshape(*x.shape[:-1], groups, rows // groups), -2, 0)  # [J, ..., I/J]
    values = values.reshape(groups, rows // groups, columns)
    partial = product("j...i,jio->j...o", x, values)
    scales = scales.reshape(groups, *(1,) * (x.ndim - 2), columns)
    return jnp.sum(partial * scales, axis=0)


def _matmul_4bit(x: jax.Array, weight: QuantizedWeight4bit) -> jax.Array:
    """Add the products of even and odd rows: to interleave them first would take much longer."""
    groups, columns = weight.scales.shape
    scales = weight.scales.astype(jnp.float32)[:, None]  # [J, 1, O]

    def half(values: jax.Array, first: int) -> jax.Array:
        grouped = values.astype(jnp.float32).reshape(groups, -1, columns)  # [J, I / J / 2, O]
        matrix = (grouped * scales).reshape(-1, columns)
        return product("...i,io->...o", x[..., first::2], matrix)

    return half(weight.weight << 4 >> 4, 0) + half(weight.weight >> 4, 1)


def split_groups(weight: Parameter, parts: int) -> Parameter:
    """Repeat scales until their groups divide evenly into `parts` slices along the rows.

    The values of the matrix are unchanged. A slice along I then holds complete groups, so that each
    device scales its own partial sums. Released weights (8 groups) on 1, 2, 4 or 8 parts are
    returned unchanged.
    """
    if not isinstance(weight, QuantizedWeight) or weight.scales.shape[-2] % parts == 0:
        return weight
    rows, groups = weight.shape[-2], weight.scales.shape[-2]
    wanted = groups * parts // math.gcd(groups, parts)
    # Two rows that share a byte stay together.
    together = 2 if isinstance(weight, QuantizedWeight4bit) else 1
    if rows % (wanted * together):
        raise ValueError(f"{rows} rows in {groups} scale groups cannot be split in {parts} parts")
    scales = jnp.repeat(weight.scales, wanted // groups, axis=-2)
    return dataclasses.replace(weight, scales=scales)
