"""Products with matrices of 8 or 4 bits, and the mixture of experts made of them.

Dimension letters: `M` tokens, `D` model width, `F` width of an expert, `E` experts, `A` experts
used per token, `I` inputs, `O` outputs, `J` scale groups, `L` layers, `R` rows and `C` columns of a
tile, `P` pieces.

Weights are stacks of all layers; the kernels take a layer's index. With few tokens, as in a decode
step, reading the matrices is what takes time. So a tile holds up to 64 tokens, and every program
multiplies them with its own columns, which are read once, as stored; a matrix that no token needs
is not read. With many tokens each expert multiplies only its own, which a sorted list gives.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from grok1.kernels.gpu.tiles import (
    LEAST_TILE,
    PROCESSORS,
    Axis,
    Ref,
    check_addresses,
    load,
    power_of_two,
    run_kernel,
    span,
    store,
    sum_in_order,
)
from grok1.kernels.sorted_experts import sorted_copies
from grok1.ops.quantization import (
    QuantizedWeight,
    QuantizedWeight4bit,
    QuantizedWeight8bit,
    product,
)

FEW = 64  # the most tokens that fit in one tile


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile [height, width] of a product of rows with a matrix.

    inputs, outputs, scale_groups: I, O and J of the matrix. in_byte: inputs in a byte of a column,
    two for 4 bits. pieces: P, into which the inputs of each scale group are divided.
    """

    height: int
    width: int
    inputs: int
    outputs: int
    scale_groups: int
    in_byte: int = 1
    pieces: int = 1

    @property
    def across(self) -> int:
        """The number of tiles, one beside the other."""
        return pl.cdiv(self.outputs, self.width)

    @property
    def depth(self) -> int:
        """Inputs that are multiplied at a time: fewer for large tiles, which need the registers."""
        return 64 if self.height <= 64 else 32

    def columns(self, number: jax.Array) -> Axis:
        """Return the columns of a tile."""
        return span(self.width, self.outputs, number * self.width)


def _tile(x: jax.Array, weight: QuantizedWeight, height: int, width: int) -> Tile:
    """Return a tile, of at most this size, for rows x [..., M, I] and a weight [..., I, O]."""
    (rows, inputs), outputs = x.shape[-2:], weight.shape[-1]
    if rows < 1 or inputs != weight.shape[-2]:
        raise ValueError(f"x must be [..., M, {weight.shape[-2]}] with M > 0, got {x.shape}")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x must be bfloat16 or float32, got {x.dtype}")
    check_addresses("a weight", weight.weight)
    if x.dtype == jnp.float32 and rows > FEW:  # without tensor cores: large tiles do not help
        height = min(height, 32)
    height = power_of_two(min(rows, height), LEAST_TILE)
    width = min(width, power_of_two(outputs, LEAST_TILE))
    in_byte = 2 if isinstance(weight, QuantizedWeight4bit) else 1
    groups = weight.scales.shape[-2]
    if inputs % (groups * in_byte):
        raise ValueError(f"{groups} scale groups must be of whole bytes of {inputs} inputs")
    return Tile(height, width, inputs, outputs, groups, in_byte)


def _run(
    kernel: Callable[..., None],
    tile: Tile,
    grid: tuple[int, ...],
    out: tuple[tuple[int, ...], Any],
    arrays: Sequence[jax.Array],
    weights: Sequence[QuantizedWeight],
    name: str,
) -> jax.Array:
    """Run a kernel on arrays, and on weights, each a matrix and its scales."""
    arrays = [*arrays, *(array for weight in weights for array in (weight.weight, weight.scales))]
    warps = 8 if tile.height > 64 else 4
    return run_kernel(kernel, grid, [out], arrays, name=name, warps=warps, stages=4)[0]


def _check_pair(gate: QuantizedWeight, value: QuantizedWeight) -> None:
    if jax.tree.map(jnp.shape, gate) != jax.tree.map(jnp.shape, value):
        raise ValueError(
            f"gate and value must have the same shapes, got {gate.shape} and {value.shape} with "
            f"scales {gate.scales.shape} and {value.scales.shape}"
        )


# ------------------------------------------------------------------- matrices of the same inputs


def side_by_side(
    x: jax.Array, weights: Sequence[QuantizedWeight8bit], layer: jax.Array
) -> jax.Array:
    """Return the products of rows with several matrices, float32 [M, sum of O].

    x: bfloat16 or float32 [M, I]. weights: int8 [L, I, O], of which `layer` int32 [] is used; they
    may differ in O, but not in I or J. A program multiplies one scale group, or one of P pieces of
    it if there are fewer tiles than processors: the kernel returns J x P partial sums. A row's
    result does not depend on the other rows, though it may on how many there are. `layer` must be
    within the stack, which is not checked.

    Raises ValueError if shapes or dtypes do not fit, or if a weight takes between 2 and 4 GiB.
    """
    size = (FEW, 64) if len(x) <= 2 * FEW else (128, 128)
    tiles = [_tile(x, weight, *size) for weight in weights]
    if len({tile.scale_groups for tile in tiles}) > 1:
        raise ValueError("the matrices must have the same number of scale groups")
    first, across = tiles[0], sum(tile.across for tile in tiles)
    down = pl.cdiv(len(x), first.height)
    groups = first.scale_groups
    # Shorter pieces would write nearly as much as they read.
    most = pl.cdiv(first.inputs // groups, 256)
    pieces = min(max(1, PROCESSORS // (across * down * groups)), most)
    tiles = [dataclasses.replace(tile, pieces=pieces) for tile in tiles]
    partials = groups * pieces
    out = (partials, len(x), sum(tile.outputs for tile in tiles)), jnp.float32
    kernel = functools.partial(_side_by_side_kernel, tiles)
    grid = across, down, partials
    return sum_in_order(_run(kernel, first, grid, out, [layer, x], weights, "side_by_side"))


def _side_by_side_kernel(tiles: Sequence[Tile], layer_ref: Ref, x_ref: Ref, *refs: Ref) -> None:
    """Write a piece's sums of one tile of one matrix: [R, C]."""
    number, down, piece = (pl.program_id(n) for n in range(3))
    layer, height = load(layer_ref), tiles[0].height
    rows = span(height, x_ref.shape[0], down * height)

    def write(tile: Tile, weight: Sequence[Ref], number: jax.Array, first_column: int) -> None:
        columns = tile.columns(number)
        factors = Factors((x_ref, *weight), (rows,), (layer,))
        (sums,) = _scaled_sums(tile, factors, columns, piece)
        place = columns._replace(indices=first_column + columns.indices)
        store(refs[-1], sums, piece, rows, place)

    first_column = 0
    for tile, *weight in zip(tiles, refs[:-1:2], refs[1:-1:2], strict=True):
        own = functools.partial(write, tile, weight, number, first_column)
        pl.when((number >= 0) & (number < tile.across))(own)
        number, first_column = number - tile.across, first_column + tile.outputs


# ---------------------------------------------------------------------------------------- experts


def mix(
    x: jax.Array,
    weights: tuple[QuantizedWeight, ...],
    layer: jax.Array,
    gates: jax.Array,
    index: jax.Array,
) -> jax.Array:
    """Return `sum_a gates[:, a] * expert_{index[:, a]}(x)` for x [M, D], float32 [M, D].

    weights: [L, E, D, F] twice, gate and value, and [L, E, F, D]; all have 8 bits, or all 4. gates:
    float32 [M, A]. index: int32 [M, A], E for a masked token.
    """
    (gate, value, out), (tokens, chosen) = weights, index.shape
    if tokens <= FEW:
        hidden = gated(x, gate, value, layer, index)
        return expert_sum(hidden, out, layer, gates, index)
    copies = sorted_copies(index, gate.shape[1])
    hidden = grouped_product(x, [gate, value], layer, *copies)
    y = grouped_product(hidden, [out], layer, *copies).reshape(tokens, chosen, -1)
    processed = index < gate.shape[1]  # others were not written
    return jnp.sum(jnp.where(processed[..., None], y * gates[..., None], 0), axis=1)


# ---------------------------------------------------------------------------- of few tokens


def gated(
    x: jax.Array,
    gate: QuantizedWeight,
    value: QuantizedWeight,
    layer: jax.Array,
    index: jax.Array,
) -> jax.Array:
    """`gelu(x @ gate) * (x @ value)` for each expert that a token has chosen.

    x: bfloat16 or float32 [M, I], M up to FEW. gate, value: [L, E, I, O]. index: int32 [M, A], the
    experts that a token has chosen, E for none. Returns [E, M, O] in the dtype of x; what
    belongs to an expert that no token has chosen is not written.
    """
    _check_pair(gate, value)
    tile, count = _tile(x, gate, FEW, 64), gate.shape[1]
    out = (count, len(x), tile.outputs), x.dtype
    kernel = functools.partial(_gated_kernel, tile)
    arrays = layer, index, x
    return _run(kernel, tile, (tile.across, count), out, arrays, (gate, value), "gated")


def _gated_kernel(tile: Tile, layer_ref: Ref, index_ref: Ref, x_ref: Ref, *refs: Ref) -> None:
    """Write one tile of one expert: [R, C]."""
    columns, expert = tile.columns(pl.program_id(0)), pl.program_id(1)
    rows = span(tile.height, x_ref.shape[0])
    factors = Factors((x_ref, *refs[:-1]), (rows,), (load(layer_ref), expert))

    @pl.when(_any(_chosen(index_ref, rows, expert)) > 0)
    def _() -> None:
        gate, value = _products(tile, factors, columns)
        store(refs[-1], jax.nn.gelu(gate) * value, expert, rows, columns)


def expert_sum(
    x: jax.Array,
    weight: QuantizedWeight,
    layer: jax.Array,
    gates: jax.Array,
    index: jax.Array,
) -> jax.Array:
    """Return `sum_a gates[:, a] * (x[index[:, a]] @ weight[index[:, a]])`, float32 [M, O].

    x: bfloat16 or float32 [E, M, I]; not read where no token has chosen an expert. weight:
    [L, E, I, O]. gates: float32 [M, A]. index: as in `gated`.
    """
    tile = _tile(x, weight, FEW, 32)
    out = (x.shape[1], tile.outputs), jnp.float32
    kernel = functools.partial(_expert_sum_kernel, tile)
    return _run(kernel, tile, (tile.across,), out, (layer, gates, index, x), [weight], "expert_sum")


def _expert_sum_kernel(
    tile: Tile, layer_ref: Ref, gates_ref: Ref, index_ref: Ref, x_ref: Ref, *refs: Ref
) -> None:
    """Write one tile of the sum over all experts: [R, C]."""
    columns, layer = tile.columns(pl.program_id(0)), load(layer_ref)
    rows = span(tile.height, x_ref.shape[1])

    def add(expert: jax.Array, total: jax.Array) -> jax.Array:
        chosen = _chosen(index_ref, rows, expert)
        factors = Factors((x_ref, *refs[:-1]), (expert, rows), (layer, expert))
        (out,) = _products(tile, factors, columns, _any(chosen))
        for a, own in enumerate(chosen):
            gates = load(gates_ref, rows, a)[:, None]
            total += jnp.where(own[:, None], out * gates, 0)
        return total

    total = jnp.zeros([tile.height, tile.width], jnp.float32)
    total = lax.fori_loop(0, x_ref.shape[0], add, total)
    store(refs[-1], total, rows, columns)


# --------------------------------------------------------------------------- of many tokens


def grouped_product(
    x: jax.Array,
    weights: Sequence[QuantizedWeight],
    layer: jax.Array,
    order: jax.Array,
    starts: jax.Array,
) -> jax.Array:
    """Multiply each copy of a token with the matrix of its expert.

    x: bfloat16 or float32 [M, I], a row for each token, or [M * A, I], for each copy m * A + a.
    weights: one, [L, E, I, O] -> float32 [M * A, O]; or two of the same shape, a gate and a
    value -> `gelu(x @ gate) * (x @ value)`, in the dtype of x. order, starts: the copies by expert,
    as returned by `sorted_copies`. What belongs to no expert is not written.
    """
    _check_pair(weights[0], weights[-1])  # the same one, if it is alone
    rows, (_, count, _, outputs) = len(order), weights[0].shape
    height = min(128, power_of_two(pl.cdiv(rows, count), LEAST_TILE))
    tile = _tile(x, weights[0], height, 64 if len(weights) > 1 else 128)
    # At most: each expert may have one tile that is partly empty.
    tiles = min(rows, (rows + count * (tile.height - 1)) // tile.height)
    out = (rows, outputs), jnp.float32 if len(weights) == 1 else x.dtype
    kernel = functools.partial(_grouped_kernel, tile, rows // len(x))
    arrays = layer, order, starts, x
    return _run(kernel, tile, (tiles, tile.across), out, arrays, weights, "grouped_product")


def _grouped_kernel(
    tile: Tile,
    repeats: int,
    layer_ref: Ref,
    order_ref: Ref,
    starts_ref: Ref,
    x_ref: Ref,
    *refs: Ref,
) -> None:
    """Write one tile of one expert: [R, C]. repeats: how many copies are of one row of x."""
    number, columns = pl.program_id(0), tile.columns(pl.program_id(1))
    expert, first, end = _find_expert(tile, starts_ref, number)
    place = first + jnp.arange(tile.height)
    exists = place < end
    # Beyond the array if it does not exist, for `store`.
    copy = jnp.where(exists, load(order_ref, Axis(place, exists)), order_ref.shape[0])
    rows = Axis(lax.div(copy, repeats), exists)
    factors = Factors((x_ref, *refs[:-1]), (rows,), (load(layer_ref), expert))

    @pl.when(first < end)
    def _() -> None:
        out, *value = _products(tile, factors, columns)
        if value:
            out = jax.nn.gelu(out) * value[0]
        store(refs[-1], out, Axis(copy, exists), columns)


def _find_expert(
    tile: Tile, starts_ref: Ref, number: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the expert of a tile, and the range of its copies in the order; empty if none."""

    def step(e: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        before, *old = found  # tiles of the experts before e
        begin, stop = load(starts_ref, e), load(starts_ref, e + 1)
        after = before + pl.cdiv(stop - begin, tile.height)
        own = (number >= before) & (number < after)
        new = e, begin + (number - before) * tile.height, stop
        return after, *(jnp.where(own, a, b) for a, b in zip(new, old, strict=True))

    experts = starts_ref.shape[0] - 1
    _, expert, first, end = lax.fori_loop(0, experts, step, (jnp.int32(0),) * 4)
    return expert, first, end


# ------------------------------------------------------------------------------- parts of kernels


class Factors(NamedTuple):
    """Rows of x and one or two matrices, to be multiplied.

    refs: x [..., M, I]; for each matrix, a weight [..., I, O] and scales [..., J, O]. rows: the
    index of the rows in x, without the inputs. matrix: the index of the matrices in their stacks.
    """

    refs: Sequence[Ref]
    rows: tuple[jax.Array | Axis, ...]
    matrix: tuple[jax.Array, ...]


def _products(
    tile: Tile, factors: Factors, columns: Axis, wanted: jax.Array | int = 1
) -> list[jax.Array]:
    """Return the product of rows and each matrix, float32 [R, C].

    wanted: 0 to read nothing and return zeros.
    """

    def add(group: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        sums = _scaled_sums(tile, factors, columns, group)  # a group is one piece here
        return [total + y for total, y in zip(totals, sums, strict=True)]

    zeros = [jnp.zeros([tile.height, tile.width], jnp.float32) for _ in factors.refs[1::2]]
    return lax.fori_loop(0, tile.scale_groups * wanted, add, zeros)


def _scaled_sums(tile: Tile, factors: Factors, columns: Axis, piece: jax.Array) -> list[jax.Array]:
    """Return the product of one piece of the inputs and each matrix, scaled, float32 [R, C].

    Integers are exact in the dtype of x, sums are float32, and the scales multiply the sums.
    float32 is multiplied without tensor cores: accurate, but slow.
    """
    (x_ref, *refs), rows, matrix = factors
    group = lax.div(piece, tile.pieces)
    inputs = tile.inputs // tile.scale_groups
    length = pl.cdiv(pl.cdiv(inputs, tile.pieces), tile.depth) * tile.depth  # the last may be empty
    begin = group * inputs + (piece - group * tile.pieces) * length
    stop = jnp.minimum(begin + length, (group + 1) * inputs)

    def add(i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        first = lax.div(begin + i * tile.depth, tile.in_byte)
        number = first + jnp.arange(tile.depth // tile.in_byte)  # of a row of bytes
        exist = number * tile.in_byte < stop if inputs % tile.depth else None
        weights = [load(ref, *matrix, Axis(number, exist), columns) for ref in refs[::2]]
        for part in range(tile.in_byte):
            x = load(x_ref, *rows, Axis(number * tile.in_byte + part, exist))
            own = [_take(tile, weight, part).astype(x.dtype) for weight in weights]
            sums = [y + product("ri,io->ro", x, w) for y, w in zip(sums, own, strict=True)]
        return sums

    blocks = pl.cdiv(jnp.maximum(stop - begin, 0), tile.depth)
    zeros = [jnp.zeros([tile.height, tile.width], jnp.float32) for _ in refs[::2]]
    sums = lax.fori_loop(0, blocks, add, zeros)
    scales = [load(ref, *matrix, group, columns) for ref in refs[1::2]]
    return [y * scale.astype(jnp.float32)[None] for y, scale in zip(sums, scales, strict=True)]


def _take(tile: Tile, weight: jax.Array, part: int) -> jax.Array:
    """Return the values of a byte's lower or higher half, as in a QuantizedWeight4bit; or all."""
    if tile.in_byte == 1:
        return weight
    return weight >> 4 if part else weight << 4 >> 4


def _chosen(index_ref: Ref, rows: Axis, expert: jax.Array) -> list[jax.Array]:
    """Return for each of the A choices which rows chose this expert, bool [R]."""
    tokens, count = index_ref.shape
    # A row that does not exist repeats the last one: loaded as 0, it would have chosen an expert.
    rows = Axis(jnp.minimum(rows.indices, tokens - 1))
    return [load(index_ref, rows, a) == expert for a in range(count)]


def _any(chosen: Sequence[jax.Array]) -> jax.Array:
    """Return 1 if a value is True, else 0; Triton has no reduction of bool."""
    return jnp.max(functools.reduce(operator.or_, chosen).astype(jnp.int32))
