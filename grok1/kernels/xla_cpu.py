"""Forms of the operations for which XLA generates fast CPU code: in JAX, no C++ compiler needed.

Dimension letters as in grok1/ops. Each function equals the one of that name in grok1/ops, up to
float32 rounding.
"""

import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from grok1.kernels.sorted_experts import combine_sorted, sorted_copies
from grok1.ops import cache, mixture
from grok1.ops.mixture import expert, expert_count, flat
from grok1.ops.operations import Operations
from grok1.ops.quantization import (
    QuantizedWeight,
    QuantizedWeight8bit,
    StackedWeight,
    Weight,
    Weights,
    matrix,
    stacked,
)
from grok1.ops.quantization import matmul as plain_matmul

LEAST_WEIGHTS = 1 << 20  # smaller ones are converted in the caches; one product compiles faster
BLOCK_WEIGHTS, BLOCK_COLUMNS = 1 << 21, 8192  # of a block at most: 8 MiB of float32, read in order
DIGITS, DIGIT_BITS = 4, 7
MOST_SUMMED = 1 << 16  # inputs of a scale group, so that the sum of their products fits an int32
LEAST_ROWS = 8  # with fewer, XLA's int8 product takes as long or longer
SMALL_EXPERT = 8 << 20  # bytes of an expert's matrices, as multiplied; two such run at a time
SIZES = 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128  # row counts to compile for


# --------------------------------------------------------------------------------- int8 products


def matmul(x: jax.Array, weight: Weight) -> jax.Array:
    """`quantization.matmul`; a large quantized matrix is multiplied in blocks, or int8 by int8.

    XLA's CPU backend writes an int8 matrix to memory as float32 before it multiplies, which is an
    order of magnitude slower than multiplying in the caches. So a large matrix is converted in
    blocks that fit the caches, or used as stored if the processor multiplies int8 by int8
    (`_integer_matmul`).
    """
    one, large = stacked(weight), math.prod(weight.shape) >= LEAST_WEIGHTS
    if not large or not isinstance(one.stack, QuantizedWeight):
        return plain_matmul(x, weight)
    y = _large_matmul(x.reshape(-1, x.shape[-1]), one)
    return y.reshape(*x.shape[:-1], -1)


@functools.cache
def multiplies_int8() -> bool:
    """Return whether this processor has Intel's int8 products (AMX), which XLA uses."""
    try:
        return "amx_int8" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


@jax.custom_jvp
def _large_matmul(x: jax.Array, weight: StackedWeight) -> jax.Array:
    """`matmul` of x [M, I] by a quantized matrix [I, O] -> float32 [M, O], fast on a CPU."""
    inputs = weight.shape[-2] // weight.stack.scales.shape[-2]  # of a group
    int8 = isinstance(weight.stack, QuantizedWeight8bit) and multiplies_int8()
    if int8 and x.dtype == jnp.float32 and inputs <= MOST_SUMMED:
        one = weight.sliced()
        return _integer_matmul(x, one.weight, one.scales)
    return _blocked_matmul(x, weight)


@_large_matmul.defjvp
def _large_matmul_jvp(
    primals: tuple[jax.Array, StackedWeight], tangents: tuple[jax.Array, StackedWeight]
) -> tuple[jax.Array, jax.Array]:
    """Differentiate the exact product with respect to x: rounding has a zero derivative."""
    x, weight = primals
    return _large_matmul(x, weight), plain_matmul(tangents[0], weight.sliced())


def _blocked_matmul(x: jax.Array, weight: StackedWeight) -> jax.Array:
    """`_large_matmul` in blocks, each of which is converted to float32 in the caches.

    Computes in float32 for any dtype of x: products of bfloat16 are exact in it.
    """
    rows, columns = weight.shape
    values, scales = weight.stack.weight, weight.stack.scales
    of_group, in_byte = rows // scales.shape[1], rows // values.shape[1]
    width = min(columns, BLOCK_COLUMNS)
    depth = _depth(rows, of_group, BLOCK_WEIGHTS // width, several=in_byte > 1)
    deep = rows // depth
    x = x.astype(jnp.float32)

    def add(i: jax.Array, out: jax.Array) -> jax.Array:
        row, column = i % deep * depth, i // deep * width

        def cut(stack: jax.Array, each: int) -> jax.Array:
            """Return the block of an array that has one row for `each` rows of the matrix."""
            # The last block may overlap the previous one: a slice cannot exceed the matrix.
            start = weight.layer, row // each, column
            return lax.dynamic_slice(stack, start, (1, max(1, depth // each), width))[0]

        own = type(weight.stack)(cut(values, in_byte), cut(scales, of_group))
        y = plain_matmul(lax.dynamic_slice(x, (0, row), (x.shape[0], depth)), own)
        before = lax.dynamic_slice(out, (0, column), y.shape)
        return lax.dynamic_update_slice(out, jnp.where(row > 0, before + y, y), (0, column))

    out = jnp.zeros([x.shape[0], columns], jnp.float32)
    return lax.fori_loop(0, deep * -(-columns // width), add, out)


def _depth(rows: int, of_group: int, most: int, *, several: bool) -> int:
    """Return the rows of a block: a part of a scale group, or several complete groups."""
    if several:
        fitting = [n for n in range(of_group, most + 1, of_group) if rows % n == 0]
    else:
        fitting = [n for n in range(max(1, most // 8), most + 1) if of_group % n == 0]
    return max(fitting, default=of_group)  # without such a number, a block is an entire group


def _integer_matmul(x: jax.Array, weight: jax.Array, scales: jax.Array) -> jax.Array:
    """`_large_matmul` of float32 x in integers.

    Each row of x is a power of two times integers of 27 bits, each of which is four digits of seven
    bits, stored as int8. Their products with the weights are summed exactly, so a row's result
    depends neither on other rows nor on the order of summation.
    """
    (rows, inputs), groups = x.shape, scales.shape[0]
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    bits = DIGITS * DIGIT_BITS - 2  # the highest digit must not be full: digits have signs
    _, exponent = jnp.frexp(largest)
    exponent = jnp.maximum(exponent, bits - 124)  # a subnormal float32 unit would become zero
    number = jnp.round(jnp.ldexp(x, bits - exponent)).astype(jnp.int32)
    digits = []  # of [M, I], the lowest first
    for _ in range(DIGITS - 1):
        half = 1 << (DIGIT_BITS - 1)
        digits.append(((number + half) & (2 * half - 1)) - half)
        number = (number - digits[-1]) >> DIGIT_BITS
    lines = jnp.concatenate([*digits, number]).astype(jnp.int8)  # [DIGITS * M, I]
    lines = jnp.pad(lines, ((0, max(0, LEAST_ROWS - DIGITS * rows)), (0, 0)))
    total = jnp.zeros([], jnp.float32)
    for group in range(groups):  # one product with an axis of groups is slow
        own = slice(group * inputs // groups, (group + 1) * inputs // groups)
        sums = jnp.matmul(lines[:, own], weight[own], preferred_element_type=jnp.int32)
        sums = sums[: DIGITS * rows].reshape(DIGITS, rows, -1).astype(jnp.float32)
        y = sums[-1]
        for digit in range(DIGITS - 2, -1, -1):
            y = y * 2.0**DIGIT_BITS + sums[digit]
        total += y * scales[group].astype(jnp.float32)
    unit = jnp.ldexp(jnp.ones_like(largest), exponent - bits)
    return total * jnp.where(jnp.isfinite(largest), unit, jnp.nan)


# ----------------------------------------------------------------------------- mixture of experts


def chosen_experts(params: Weights, x: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
    """`mixture.chosen_experts`: two blocks at a time, or `by_size` for large experts in one prompt.

    Two blocks of small experts keep two cores busy; one matrix would not.
    """
    elements = sum(math.prod(leaves["w"].shape[-2:]) for leaves in params.values())
    small = elements * x.dtype.itemsize <= SMALL_EXPERT
    if x.shape[0] == 1 and not small:
        return by_size(params, x, gates, index)
    together = 2 if small else 1
    return mixture.chosen_experts(params, x, gates, index, multiply=matmul, together=together)


State = tuple[jax.Array, jax.Array, jax.Array]  # of a loop: expert, first row, output


def by_size(params: Weights, x: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
    """`chosen_experts`, with each expert's rows padded to the next compiled size.

    So each expert's matrices are read and converted once, with little padding. Rounding may depend
    on the size; with several sequences, one's result would depend on the others.
    """
    experts, tokens, chosen = expert_count(params), *flat(index).shape
    order, starts = sorted_copies(flat(index), experts)
    # The smallest size that holds all, and those below it.
    fitting = [size for size in SIZES if size < tokens * chosen]
    sizes = (0, *SIZES[: len(fitting) + 1])
    rows = jnp.pad(flat(x)[order // chosen], ((0, sizes[-1]), (0, 0)))

    def multiply(size: int) -> Callable[..., jax.Array]:
        def write(e: jax.Array, row: jax.Array, out: jax.Array) -> jax.Array:
            own = {name: {"w": matrix(leaves["w"], e)} for name, leaves in params.items()}
            y = expert(own, lax.dynamic_slice_in_dim(rows, row, size), matmul)
            # Rows beyond the expert's are overwritten by the experts that they belong to.
            return lax.dynamic_update_slice_in_dim(out, y, row, 0)

        return write if size else lambda _e, _row, out: out

    branches = [multiply(size) for size in sizes]

    def body(state: State) -> State:
        e, row, out = state
        which = jnp.searchsorted(jnp.array(sizes[:-1]), starts[e + 1] - row)
        out = lax.switch(which, branches, e, row, out)
        row = jnp.minimum(row + jnp.array(sizes)[which], starts[e + 1])
        return e + (row == starts[e + 1]), row, out

    state = jnp.int32(0), jnp.int32(0), jnp.zeros(rows.shape, jnp.float32)
    _, _, out = lax.while_loop(lambda state: state[0] < experts, body, state)
    return combine_sorted(out[: tokens * chosen], order, starts, gates)


# --------------------------------------------------------------------------------------- the cache


def cache_dtype(dtype: DTypeLike) -> DTypeLike:
    """Return the best dtype to store a cache of `dtype` in: for bfloat16, its bits as uint16.

    XLA's CPU backend supports bfloat16 only in products: to write a row of a bfloat16 cache it
    would convert the entire cache to float32 and back, in every layer. So the loop over layers
    carries uint16. A bfloat16 cache works as well, but is converted at a step's beginning and end.
    """
    return jnp.uint16 if dtype == jnp.bfloat16 else dtype


def from_bits(x: jax.Array) -> jax.Array:
    """Reinterpret the uint16 of `cache_dtype` as bfloat16; return anything else unchanged."""
    return lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x


def write_rows(
    cache: jax.Array,
    new: jax.Array,
    layer: jax.Array,
    start: jax.Array,
    length: jax.Array,
    sequence: jax.Array | None = None,
) -> jax.Array:
    """`cache.write_rows`, one sequence at a time; all at once would copy the stacked cache."""
    rows, slots = new.shape[1], cache.shape[2]
    if cache.dtype == jnp.uint16:  # the bits of bfloat16
        new = lax.bitcast_convert_type(new.astype(jnp.bfloat16), jnp.uint16)
    else:
        new = new.astype(cache.dtype)

    def write(b: jax.Array, cache: jax.Array) -> jax.Array:
        # dynamic_update_slice clamps its start, which would write a chunk that runs past the end to
        # earlier positions. So the window is clamped here, and rows keep their positions in it.
        window = jnp.clip(start[b], 0, slots - rows)
        row = jnp.arange(rows) - (start[b] - window)
        keep = (row >= 0) & (row < length[b])
        at = (layer, b if sequence is None else sequence[b], window, 0, 0)
        old = lax.dynamic_slice(cache, at, (1, 1, rows, *cache.shape[3:]))
        fresh = jnp.where(keep[:, None, None], new[b][jnp.maximum(row, 0)], old[0, 0])
        return lax.dynamic_update_slice(cache, fresh[None, None], at)

    return lax.fori_loop(0, new.shape[0], write, cache)


def _weigh(weights: jax.Array, value: jax.Array) -> jax.Array:
    """`cache.weigh`; for one query, without a product, which would first transpose the values."""
    if weights.shape[3] > 1:
        return cache.weigh(weights, value)
    by_position = jnp.moveaxis(weights[:, :, :, 0], -1, 1).astype(jnp.float32)  # [B, S, K, G]
    out = jnp.sum(by_position[..., None] * value[:, :, :, None].astype(jnp.float32), axis=1)
    return out[:, None]


attend_cached = functools.partial(cache.attend_cached, view=from_bits, weigh=_weigh)

OPERATIONS = Operations(
    matmul=matmul,
    mixture=chosen_experts,
    write_rows=write_rows,
    attend_cached=attend_cached,
    cache_dtype=cache_dtype,
    view=from_bits,
)
