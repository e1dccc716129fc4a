"""Products with int8 matrices, of which a layer has three kinds.

Dimension letters: `M` tokens, `E` experts, `A` experts used per token, `I` inputs, `O` outputs, `J`
scale groups, `L` layers, `R` rows and `C` columns of a tile, `P` pieces.

Weights are stacks of all layers, of which the kernels take the index of one. With few tokens, as in
a decode step, reading the matrices is what takes time. So a tile holds all tokens, and every
program multiplies them with its own columns, which are read once, as int8; a matrix that no token
needs is not read. With many tokens an expert multiplies its own ones, found by a list.
"""

import dataclasses
import functools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from grok1.kernels.gpu.tiles import (
    LEAST_TILE,
    PROCESSORS,
    Ref,
    ceil_div,
    check_addresses,
    load_tile,
    outer_mask,
    power_of_two,
)
from grok1.ops.derivatives import forward_only
from grok1.ops.quantization import QuantizedWeight8bit, product

FEW = 64  # tokens, which fit in one tile
Index = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of the product of rows with a matrix [I, O] that has J scale groups.

    height: R. columns: C. pieces: P, into which the inputs of each scale group are divided. rows:
    how many there are.
    """

    rows: int
    inputs: int
    outputs: int
    scale_groups: int
    height: int
    columns: int
    pieces: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [R, C]."""
        return self.height, self.columns

    @property
    def across(self) -> int:
        """The number of tiles, one beside the other."""
        return pl.cdiv(self.outputs, self.columns)

    @property
    def down(self) -> int:
        """The number of tiles, one below the other."""
        return pl.cdiv(self.rows, self.height)

    @property
    def depth(self) -> int:
        """Inputs that are multiplied at a time; large tiles leave registers for fewer."""
        return 64 if self.height <= 64 else 32

    @property
    def group_inputs(self) -> int:
        """Inputs that share a scale, I / J."""
        return self.inputs // self.scale_groups

    @property
    def piece(self) -> int:
        """Inputs in a piece, a multiple of `depth`; the last piece may have fewer."""
        return pl.cdiv(pl.cdiv(self.group_inputs, self.pieces), self.depth) * self.depth

    @property
    def compiler(self) -> plgpu.CompilerParams:
        """The compiler options; several blocks of inputs are loaded while one is multiplied."""
        return plgpu.CompilerParams(num_warps=8 if self.height > 64 else 4, num_stages=4)


def _tile(x: jax.Array, weight: QuantizedWeight8bit, shape: tuple[int, int]) -> Tile:
    """Return the tile, of at most this shape, for rows x [..., M, I] and a weight [..., I, O]."""
    (rows, inputs), outputs = x.shape[-2:], weight.shape[-1]
    if rows < 1 or inputs != weight.shape[-2]:
        raise ValueError(f"x must be [..., M, {weight.shape[-2]}] with M > 0, got {x.shape}")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x must be bfloat16 or float32, got {x.dtype}")
    check_addresses("a weight", weight.weight)
    exact = x.dtype == jnp.float32 and rows > FEW  # without tensor cores: large tiles do not help
    height = power_of_two(min(rows, 32 if exact else shape[0]), LEAST_TILE)
    columns = min(shape[1], power_of_two(outputs, LEAST_TILE))
    return Tile(rows, inputs, outputs, weight.scales.shape[-2], height, columns)


def _check_pair(gate: QuantizedWeight8bit, value: QuantizedWeight8bit) -> None:
    if (gate.shape, gate.scales.shape) != (value.shape, value.scales.shape):
        raise ValueError(
            f"gate and value must have the same shapes, got {gate.shape} and {value.shape} with "
            f"scales {gate.scales.shape} and {value.scales.shape}"
        )


# ------------------------------------------------------------------- matrices of the same inputs


def side_by_side(
    x: jax.Array,
    weights: Sequence[QuantizedWeight8bit],
    layer: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Multiply rows with several matrices; the result is the sum over the first axis.

    x: bfloat16 or float32 [M, I]. weights: int8 [L, I, O], of which `layer` int32 [] is used; O may
    differ, I and the number of scale groups not. Returns float32 [J * P, M, sum of O]: if the tiles
    are too few for all processors, these share the inputs of each. A row's result does not depend
    on the others. `layer` must be within the stack, which is not checked.

    Raises ValueError if shapes or dtypes do not fit, or if a weight takes between 2 and 4 GiB.
    """
    shape = (FEW, 64) if len(x) <= 2 * FEW else (128, 128)
    tiles = [_tile(x, weight, shape) for weight in weights]
    if len({tile.scale_groups for tile in tiles}) > 1:
        raise ValueError("the matrices must have the same number of scale groups")
    first, across = tiles[0], sum(tile.across for tile in tiles)
    # Shorter pieces would write nearly as much as they read.
    pieces = min(pl.cdiv(PROCESSORS, across * first.down), pl.cdiv(first.group_inputs, 256))
    tiles = [dataclasses.replace(tile, pieces=pieces) for tile in tiles]
    partials, outputs = first.scale_groups * pieces, sum(tile.outputs for tile in tiles)
    call = pl.pallas_call(
        functools.partial(_side_by_side_kernel, tiles),
        grid=(across, first.down, partials),
        out_shape=jax.ShapeDtypeStruct((partials, len(x), outputs), jnp.float32),
        compiler_params=first.compiler,
        interpret=interpret,
        name="side_by_side",
    )
    arrays = [array for weight in weights for array in (weight.weight, weight.scales)]
    return forward_only(call)(layer, x, *arrays)


def added(partial: jax.Array) -> jax.Array:
    """Add partial sums, in their order: [partial sums, ...] -> [...]."""
    return functools.reduce(operator.add, partial)


def _side_by_side_kernel(tiles: Sequence[Tile], layer_ref: Ref, x_ref: Ref, *refs: Ref) -> None:
    """Write a piece's sums of one tile of one matrix: [R, C]."""
    place, down, partial = (pl.program_id(axis) for axis in range(3))
    layer, out_ref = plgpu.load(layer_ref), refs[-1]
    rows = _rows(tiles[0], down)
    first_tile, first_column = 0, 0
    for tile, *weight in zip(tiles, refs[:-1:2], refs[1:-1:2], strict=True):
        column = place - first_tile

        def multiply(
            tile: Tile = tile,
            weight: Sequence[Ref] = weight,
            column: jax.Array = column,
            first: int = first_column,
        ) -> None:
            at = (), (layer,)
            (sums,) = _scaled_sums(tile, (x_ref, *weight), at, rows, column, partial)
            _store(tile, out_ref, (partial,), rows, column, sums, first)

        pl.when((column >= 0) & (column < tile.across))(multiply)
        first_tile, first_column = first_tile + tile.across, first_column + tile.outputs


# --------------------------------------------------------------------------- experts, few tokens


def gated(
    x: jax.Array,
    gate: QuantizedWeight8bit,
    value: QuantizedWeight8bit,
    layer: jax.Array,
    gates: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`gelu(x @ gate) * (x @ value)` for each expert that a token has chosen.

    x: bfloat16 or float32 [M, I], M up to FEW. gate, value: int8 [L, E, I, O]. gates: float32
    [M, E], zero where a token has not chosen an expert. Returns [E, M, O] in the dtype of x; what
    belongs to an expert that no token has chosen is not written.
    """
    _check_pair(gate, value)
    tile, count = _tile(x, gate, (FEW, 64)), gate.shape[1]
    call = pl.pallas_call(
        functools.partial(_gated_kernel, tile),
        grid=(tile.across, count),
        out_shape=jax.ShapeDtypeStruct((count, len(x), tile.outputs), x.dtype),
        compiler_params=tile.compiler,
        interpret=interpret,
        name="gated",
    )
    arrays = gate.weight, gate.scales, value.weight, value.scales
    return forward_only(call)(layer, gates, x, *arrays)


def _gated_kernel(tile: Tile, layer_ref: Ref, gates_ref: Ref, x_ref: Ref, *refs: Ref) -> None:
    """Write one tile of one expert: [R, C]."""
    column, expert = pl.program_id(0), pl.program_id(1)
    at, rows = ((), (plgpu.load(layer_ref), expert)), _rows(tile, 0)

    @pl.when(_any(_gates_of(rows, gates_ref, expert)) > 0)
    def _() -> None:
        gate, value = _products(tile, (x_ref, *refs[:-1]), at, rows, column)
        _store(tile, refs[-1], (expert,), rows, column, _gelu(gate) * value)


def expert_sum(
    x: jax.Array,
    weight: QuantizedWeight8bit,
    layer: jax.Array,
    gates: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Return `sum_e gates[:, e] * (x[e] @ weight[e])`, float32 [M, O].

    x: bfloat16 or float32 [E, M, I]; not read where no token has chosen an expert. weight: int8
    [L, E, I, O]. gates: as in `gated`.
    """
    tile = _tile(x, weight, (FEW, 32))
    call = pl.pallas_call(
        functools.partial(_expert_sum_kernel, tile, len(x)),
        grid=(tile.across,),
        out_shape=jax.ShapeDtypeStruct((tile.rows, tile.outputs), jnp.float32),
        compiler_params=tile.compiler,
        interpret=interpret,
        name="expert_sum",
    )
    return forward_only(call)(layer, gates, x, weight.weight, weight.scales)


def _expert_sum_kernel(
    tile: Tile, count: int, layer_ref: Ref, gates_ref: Ref, x_ref: Ref, *refs: Ref
) -> None:
    """Write one tile of the sum over all experts: [R, C]."""
    column, layer, rows = pl.program_id(0), plgpu.load(layer_ref), _rows(tile, 0)

    def add(expert: jax.Array, total: jax.Array) -> jax.Array:
        gates = _gates_of(rows, gates_ref, expert)
        chosen = _any(gates)  # if none, no piece is read
        at = (expert,), (layer, expert)
        (out,) = _products(tile, (x_ref, *refs[:-1]), at, rows, column, chosen)
        return total + jnp.where(gates != 0, out, 0) * gates

    total = lax.fori_loop(0, count, add, jnp.zeros(tile.shape, jnp.float32))
    _store(tile, refs[-1], (), rows, column, total)


# -------------------------------------------------------------------------- experts, many tokens


class Copies(NamedTuple):
    """The copies of all tokens, A of each, by expert.

    order: int32 [M * A], the copies m * A + a of the first expert, then of the next ones; copies
    that no expert processes are missing, and the rest is meaningless. starts: int32 [E + 1], the
    index in `order` of each expert's first copy, then the end of the last.
    """

    order: jax.Array
    starts: jax.Array


def grouped_product(
    x: jax.Array,
    weights: Sequence[QuantizedWeight8bit],
    layer: jax.Array,
    copies: Copies,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Multiply each copy with the matrix of its expert.

    x: bfloat16 or float32 [M, I], a row for each token, or [M * A, I], for each copy. weights: one,
    int8 [L, E, I, O] -> float32 [M * A, O]; or two of the same shape, a gate and a value ->
    `gelu(x @ gate) * (x @ value)`, in the dtype of x. What belongs to no expert is not written.
    """
    _check_pair(weights[0], weights[-1])
    rows, (_, count, _, outputs) = len(copies.order), weights[0].shape
    share = power_of_two(pl.cdiv(rows, count), LEAST_TILE)
    tile = _tile(x, weights[0], (min(128, share), 64 if len(weights) > 1 else 128))
    visits = min(rows, (rows + count * (tile.height - 1)) // tile.height)  # tiles of all experts
    call = pl.pallas_call(
        functools.partial(_grouped_kernel, tile, count, rows // len(x)),
        grid=(visits, tile.across),
        out_shape=jax.ShapeDtypeStruct(
            (rows, outputs), jnp.float32 if len(weights) == 1 else x.dtype
        ),
        compiler_params=tile.compiler,
        interpret=interpret,
        name="grouped_product",
    )
    arrays = [array for weight in weights for array in (weight.weight, weight.scales)]
    return forward_only(call)(layer, *copies, x, *arrays)


def _grouped_kernel(
    tile: Tile,
    count: int,
    share: int,
    layer_ref: Ref,
    order_ref: Ref,
    starts_ref: Ref,
    x_ref: Ref,
    *refs: Ref,
) -> None:
    """Write one tile of one expert: [R, C]. share: how many copies are of one row of x."""
    visit, column = pl.program_id(0), pl.program_id(1)
    expert, first, end = _find_expert(tile, count, starts_ref, visit)
    number = first + jnp.arange(tile.height)
    copy = load_tile(order_ref.at[number], number < end)
    at = (), (plgpu.load(layer_ref), expert)
    rows = Rows(lax.div(copy, jnp.int32(share)), number < end)

    @pl.when(first < end)
    def _() -> None:
        out, *value = _products(tile, (x_ref, *refs[:-1]), at, rows, column)
        if value:
            out = _gelu(out) * value[0]
        _store(tile, refs[-1], (), Rows(copy, rows.exist), column, out)


def _find_expert(
    tile: Tile, count: int, starts_ref: Ref, visit: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the expert of a tile, and the range of its copies in the order; empty if none."""

    def step(e: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        before, *old = found
        begin, stop = plgpu.load(starts_ref.at[e]), plgpu.load(starts_ref.at[e + 1])
        after = before + ceil_div(stop - begin, tile.height)
        own = (visit >= before) & (visit < after)
        new = e, begin + (visit - before) * tile.height, stop
        return after, *(jnp.where(own, a, b) for a, b in zip(new, old, strict=True))

    zero = jnp.int32(0)
    _, expert, first, end = lax.fori_loop(0, count, step, (zero, zero, zero, zero))
    return expert, first, end


# ------------------------------------------------------------------------------- parts of kernels


class Rows(NamedTuple):
    """The rows of a tile [R], and which of them exist."""

    number: jax.Array
    exist: jax.Array


def _rows(tile: Tile, down: jax.Array | int) -> Rows:
    number = down * tile.height + jnp.arange(tile.height)
    return Rows(number, number < tile.rows)


def _gates_of(rows: Rows, gates_ref: Ref, expert: jax.Array) -> jax.Array:
    """Return one expert's gate for each row, float32 [R, 1]."""
    return load_tile(gates_ref.at[rows.number, expert], rows.exist)[:, None]


def _any(gates: jax.Array) -> jax.Array:
    """Return 1 if there is a gate other than zero, else 0."""
    return jnp.max((gates != 0).astype(jnp.int32))


def _gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _products(
    tile: Tile,
    refs: Sequence[Ref],
    at: tuple[Index, Index],
    rows: Rows,
    column: jax.Array,
    repeat: jax.Array | int = 1,
) -> list[jax.Array]:
    """Return the products of rows with a tile of each matrix, float32 [R, C].

    refs, at: as in `_scaled_sums`. repeat: 0 to read nothing and return zeros.
    """

    def add(piece: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        sums = _scaled_sums(tile, refs, at, rows, column, piece)
        return [total + y for total, y in zip(totals, sums, strict=True)]

    zeros = [jnp.zeros(tile.shape, jnp.float32) for _ in refs[1::2]]
    return lax.fori_loop(0, tile.scale_groups * tile.pieces * repeat, add, zeros)


def _scaled_sums(
    tile: Tile,
    refs: Sequence[Ref],
    at: tuple[Index, Index],
    rows: Rows,
    column: jax.Array,
    piece: jax.Array,
) -> list[jax.Array]:
    """Return the products of one piece of the inputs, scaled, float32 [R, C].

    refs: the rows x [..., M, I], and for each matrix a weight [..., I, O] and scales [..., J, O].
    at: the leading indices of the rows, and those of weights and scales. int8 is exact in the dtype
    of x, sums are float32, and the scales multiply the sums. float32 is multiplied without tensor
    cores: accurate, but slow.
    """
    (x_ref, *weight_refs), (own, matrix) = refs, at
    group = lax.div(piece, jnp.int32(tile.pieces))
    begin = group * tile.group_inputs + (piece - group * tile.pieces) * tile.piece
    stop = jnp.minimum(begin + tile.piece, (group + 1) * tile.group_inputs)
    columns = pl.ds(column * tile.columns, tile.columns)
    _, present = _columns(tile, column)

    def add(i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
        start = begin + i * tile.depth
        number = start + jnp.arange(tile.depth)
        left = number < stop if tile.group_inputs % tile.depth else None
        x = load_tile(x_ref.at[*own, rows.number[:, None], number[None]], rows.exist, left)
        place = *matrix, pl.ds(start, tile.depth), columns
        steps = [load_tile(ref.at[*place], left, present) for ref in weight_refs[::2]]
        return [
            total + product("ri,io->ro", x, w.astype(x.dtype))
            for total, w in zip(sums, steps, strict=True)
        ]

    blocks = ceil_div(jnp.maximum(stop - begin, 0), tile.depth)
    zeros = [jnp.zeros(tile.shape, jnp.float32) for _ in weight_refs[::2]]
    sums = lax.fori_loop(0, blocks, add, zeros)
    place = *matrix, group, columns
    scales = [load_tile(ref.at[*place], present) for ref in weight_refs[1::2]]
    return [y * scale.astype(jnp.float32)[None] for y, scale in zip(sums, scales, strict=True)]


def _columns(tile: Tile, column: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return the columns of a tile [C], and which of them exist; None: all."""
    number = column * tile.columns + jnp.arange(tile.columns)
    return number, number < tile.outputs if tile.outputs % tile.columns else None


def _store(
    tile: Tile,
    ref: Ref,
    at: Index,
    rows: Rows,
    column: jax.Array,
    out: jax.Array,
    first: int = 0,
) -> None:
    """Store a tile [R, C] in the result [..., M, O]; `first`: the first column of the product."""
    number, present = _columns(tile, column)
    mask = outer_mask(tile.shape, rows.exist, present)
    # The interpreter stores the old value where the mask is False: not in a row of this tile.
    row = jnp.where(rows.exist, rows.number, ref.shape[-2])
    where = *at, row[:, None], first + number[None]
    plgpu.store(ref.at[*where], out.astype(ref.dtype), mask=mask)
