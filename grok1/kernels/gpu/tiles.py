"""What the kernels for NVIDIA GPUs share, in Pallas with its Triton backend."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

Ref = Any  # a reference that a kernel loads from and stores to; the type has no public name

PROCESSORS = 132  # of an H100
LEAST_TILE = 16  # the smallest side of Triton's products


def power_of_two(n: int, least: int = 1) -> int:
    """Return the smallest power of two >= n and >= `least`, which is one."""
    return max(least, 1 << (n - 1).bit_length())


def ceil_div(n: jax.Array, divisor: int) -> jax.Array:
    """Divide n >= 0 in a kernel, rounding up; `//` would be several operations there."""
    return lax.div(n + (divisor - 1), jnp.int32(divisor))


def check_addresses(name: str, array: jax.Array) -> None:
    """Raise ValueError if Pallas would compute wrong addresses.

    It uses 32-bit offsets up to 4 GiB, which Triton reads as signed. This is wrong only for
    elements of one byte.
    """
    if array.dtype.itemsize == 1 and 2**31 < array.size <= 2**32:
        raise ValueError(
            f"{name} of shape {array.shape}: the GPU kernels take arrays of bytes up to 2 GiB or "
            "above 4 GiB, not between; use the plain form"
        )


def outer_mask(shape: tuple[int, ...], *axes: jax.Array | None) -> jax.Array | None:
    """Combine masks of a tile's axes, each [n] or None for all of it; None: all of the tile."""
    whole = None
    for axis, mask in enumerate(axes):
        if mask is not None:
            own = jnp.expand_dims(mask, [a for a in range(len(shape)) if a != axis])
            whole = own if whole is None else whole & own
    return None if whole is None else jnp.broadcast_to(whole, shape)


def load_tile(ref: Ref, *axes: jax.Array | None) -> jax.Array:
    """Load a tile, zero where the mask of one of its axes is False; None masks nothing."""
    mask = outer_mask(ref.shape, *axes)
    if mask is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=mask, other=jnp.zeros((), ref.dtype))
