"""What the kernels for NVIDIA GPUs share, in Pallas with its Triton backend."""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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

    out: the shape and dtype of each result. warps: of 32 threads each, per program. stages: how
    many iterations of a loop have their loads in flight at once. aliases: an array's position among
    `arrays` -> that of the result which reuses its memory. The results have no derivatives.
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


Place = Axis | jax.Array | int  # along one axis of an array


def span(size: int, end: int, start: jax.Array | int = 0) -> Axis:
    """Return `size` indices from `start`; those below `end` exist.

    start: a multiple of `size`, and below `end`.
    """
    indices = start + jnp.arange(size, dtype=jnp.int32)
    return Axis(indices, indices < end if end % size else None)


def whole(n: int, least: int = 1) -> Axis:
    """Return the indices below n, and masked ones up to `least` and a power of two, for Triton."""
    return span(power_of_two(n, least), n)


def load(ref: Ref, *at: Place) -> jax.Array:
    """Load a tile, of the axes among `at`; zero where an index does not exist."""
    index, mask = _index(at)
    other = None if mask is None else jnp.zeros((), ref.dtype)
    return plgpu.load(ref.at[index], mask=mask, other=other)


def store(ref: Ref, tile: jax.Array, *at: Place) -> None:
    """Store a tile of the axes among `at`, where all indices exist, in the dtype of the array.

    The interpreter stores the old value at an index that does not exist, so this must not coincide
    with one that does.
    """
    index, mask = _index(at)
    plgpu.store(ref.at[index], tile.astype(ref.dtype), mask=mask)


def _index(at: Sequence[Place]) -> tuple[tuple[Place, ...], jax.Array | None]:
    """Return an index whose axes are those among `at`, and its mask; None: all exist."""
    axes = {n: each for n, each in enumerate(at) if isinstance(each, Axis)}

    def along(x: jax.Array, own: int) -> jax.Array:
        return jnp.expand_dims(x, [place for place, n in enumerate(axes) if n != own])

    index = tuple(along(axes[n].indices, n) if n in axes else at[n] for n in range(len(at)))
    masks = [along(each.exist, n) for n, each in axes.items() if each.exist is not None]
    if not masks:
        return index, None
    shape = [each.indices.size for each in axes.values()]
    return index, jnp.broadcast_to(functools.reduce(operator.and_, masks), shape)


def power_of_two(n: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least n and `least`, itself a power of two."""
    return max(least, pl.next_power_of_2(n))


def sum_in_order(partial: jax.Array) -> jax.Array:
    """Add partial sums [P, ...] in the same order for any shape, so that a batch changes no bit."""
    return functools.reduce(operator.add, partial)


def check_addresses(name: str, array: jax.Array) -> None:
    """Raise ValueError if Pallas would compute wrong addresses.

    For arrays up to 4 GiB it counts elements in 32 bits, which Triton reads as signed. Only arrays
    of bytes can have more than 2^31 elements in them.
    """
    if array.dtype.itemsize == 1 and 2**31 < array.size <= 2**32:
        raise ValueError(
            f"{name} of shape {array.shape}: the GPU kernels take arrays of bytes up to 2 GiB or "
            "above 4 GiB, not between; use the plain form"
        )
