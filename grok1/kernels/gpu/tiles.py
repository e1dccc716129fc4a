"""What the kernels for NVIDIA GPUs share, in Pallas with its Triton backend."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from grok1.ops.derivatives import forward_only

Ref = Any  # a reference that a kernel loads from and stores to; the type has no public name

PROCESSORS = 132  # of an H100
LEAST_TILE = 16  # the smallest side of Triton's products
_interpret = False


@contextlib.contextmanager
def interpreted_kernels() -> Iterator[None]:
    """Interpret the kernels that are traced within, on any device, for tests."""
    global _interpret
    before, _interpret = _interpret, True
    try:
        yield
    finally:
        _interpret = before


def run_kernel(
    kernel: Callable[..., None],
    grid: tuple[int, ...],
    out: Sequence[tuple[tuple[int, ...], Any]],
    arrays: Sequence[jax.Array],
    *,
    name: str,
    warps: int,
    stages: int,
    aliases: dict[int, int] | None = None,
) -> list[jax.Array]:
    """Run a kernel, once for each place of the grid, on references to arrays and results.

    out: the shape and dtype of each result. warps: of 32 threads, that run a program. stages:
    blocks of a loop that are loaded at the same time. aliases: the results that take the place of
    an array, by the number of that array. The results have no derivatives.
    """
    call = pl.pallas_call(
        kernel,
        grid=grid,
        out_shape=[jax.ShapeDtypeStruct(*each) for each in out],
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=_interpret,
        name=name,
    )
    return forward_only(call)(*arrays)


class Axis(NamedTuple):
    """An axis of a tile: indices into an array, int32 [n], and which of them exist; None: all."""

    indices: jax.Array
    exist: jax.Array | None = None


def axis(size: int, end: int, start: jax.Array | int = 0) -> Axis:
    """Return `size` indices from `start`, a multiple of `size`; those below `end` exist."""
    indices = start + jnp.arange(size, dtype=jnp.int32)
    return Axis(indices, indices < end if end % size else None)


def load(ref: Ref, *at: jax.Array | Axis) -> jax.Array:
    """Load a tile, of the axes among `at`; zero where an index does not exist."""
    if not at:
        return plgpu.load(ref)
    index, mask = _index(at)
    if mask is None:
        return plgpu.load(ref.at[index])
    return plgpu.load(ref.at[index], mask=mask, other=jnp.zeros((), ref.dtype))


def store(ref: Ref, tile: jax.Array, *at: jax.Array | Axis) -> None:
    """Store a tile of the axes among `at`, where all indices exist, in the dtype of the array.

    The interpreter stores the old value where an index does not exist: it must be beyond the array.
    """
    index, mask = _index(at)
    plgpu.store(ref.at[index], tile.astype(ref.dtype), mask=mask)


def _index(at: Sequence[jax.Array | Axis]) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """Return an index whose axes are those among `at`, and its mask; None: all exist."""
    axes = [each for each in at if isinstance(each, Axis)]

    def aligned(x: jax.Array, own: Axis) -> jax.Array:
        return jnp.expand_dims(x, [n for n, each in enumerate(axes) if each is not own])

    index = tuple(aligned(each.indices, each) if isinstance(each, Axis) else each for each in at)
    masks = [aligned(each.exist, each) for each in axes if each.exist is not None]
    if not masks:
        return index, None
    mask = masks[0]
    for other in masks[1:]:
        mask = mask & other
    return index, jnp.broadcast_to(mask, [each.indices.size for each in axes])


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
