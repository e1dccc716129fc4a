"""Products of a decode step's rows with int8 matrices: few rows, which fit in one tile.

Dimension letters: `M` rows, `E` experts, `I` inputs, `O` outputs, `J` scale groups, `L` layers, `R`
rows of the tile, `C` columns of a tile, `P` pieces.

Reading the matrices is what takes time. So every program multiplies all rows with its own columns
of a matrix, which is read once, as int8; a matrix that no row needs is not read. Weights are stacks
of all layers, of which the kernels take the index of one.
"""

import dataclasses
import functools
from collections.abc import Sequence

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

MOST_ROWS = 64
Index = tuple[jax.Array, ...]
DEPTH = 64  # inputs that a program multiplies at a time


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of the product of M rows with a matrix [I, O] that has J scale groups.

    columns: C. pieces: P, into which the inputs of each scale group are divided.
    """

    rows: int
    inputs: int
    outputs: int
    scale_groups: int
    columns: int
    pieces: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """The shape [R, C]."""
        return power_of_two(self.rows, LEAST_TILE), self.columns

    @property
    def count(self) -> int:
        """The number of tiles, one beside the other."""
        return pl.cdiv(self.outputs, self.columns)

    @property
    def group_inputs(self) -> int:
        """Inputs that share a scale, I / J."""
        return self.inputs // self.scale_groups

    @property
    def piece(self) -> int:
        """Inputs in a piece, a multiple of DEPTH; the last piece may have fewer."""
        return pl.cdiv(pl.cdiv(self.group_inputs, self.pieces), DEPTH) * DEPTH

    @property
    def compiler(self) -> plgpu.CompilerParams:
        """The compiler options; several blocks of inputs are loaded while one is multiplied."""
        return plgpu.CompilerParams(num_warps=4, num_stages=4)


def _tile(x: jax.Array, weight: QuantizedWeight8bit, columns: int, pieces: int = 1) -> Tile:
    """Return the tile for rows x [..., M, I] and a weight [..., I, O]."""
    inputs, outputs = weight.shape[-2:]
    if x.shape[-1] != inputs or not 0 < x.shape[-2] <= MOST_ROWS:
        raise ValueError(
            f"x must be [..., M, {inputs}] with M from 1 to {MOST_ROWS}, got {x.shape}"
        )
    check_addresses("a weight", weight.weight)
    columns = min(columns, power_of_two(outputs, LEAST_TILE))
    return Tile(x.shape[-2], inputs, outputs, weight.scales.shape[-2], columns, pieces)


def side_by_side(
    x: jax.Array,
    weights: Sequence[QuantizedWeight8bit],
    layer: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Multiply rows with several matrices; the result is the sum over the first axis.

    x: bfloat16 or float32 [M, I]. weights: int8 [L, I, O], of which `layer` int32 [] is used; O may
    differ, I and the number of scale groups not. Returns float32 [J * P, M, sum of O]: the columns
    are too few for all processors, so that they share the inputs of each.
    """
    outputs = sum(weight.shape[-1] for weight in weights)
    pieces = pl.cdiv(PROCESSORS, pl.cdiv(outputs, 64))
    tiles = [_tile(x, weight, 64, pieces) for weight in weights]
    partials = tiles[0].scale_groups * pieces
    call = pl.pallas_call(
        functools.partial(_side_by_side_kernel, tiles),
        grid=(sum(tile.count for tile in tiles), partials),
        out_shape=jax.ShapeDtypeStruct((partials, len(x), outputs), jnp.float32),
        compiler_params=tiles[0].compiler,
        interpret=interpret,
        name="side_by_side",
    )
    arrays = [array for weight in weights for array in (weight.weight, weight.scales)]
    return forward_only(call)(layer, x, *arrays)


def _side_by_side_kernel(tiles: Sequence[Tile], layer_ref: Ref, x_ref: Ref, *refs: Ref) -> None:
    """Write a piece's sums of one tile of one matrix: [R, C]."""
    place, partial = pl.program_id(0), pl.program_id(1)
    layer, out_ref = plgpu.load(layer_ref), refs[-1]
    first_tile, first_column = 0, 0
    for tile, weight_ref, scales_ref in zip(tiles, refs[:-1:2], refs[1:-1:2], strict=True):
        column = place - first_tile

        def multiply(
            tile: Tile = tile,
            refs: tuple[Ref, Ref] = (weight_ref, scales_ref),
            column: jax.Array = column,
            first: int = first_column,
        ) -> None:
            sums = _scaled_sums(tile, (x_ref, *refs), ((), (layer,)), column, partial)
            _store(tile, out_ref, (partial,), column, sums, first)

        pl.when((column >= 0) & (column < tile.count))(multiply)
        first_tile, first_column = first_tile + tile.count, first_column + tile.outputs


def gated(
    x: jax.Array,
    gate: QuantizedWeight8bit,
    value: QuantizedWeight8bit,
    layer: jax.Array,
    gates: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`gelu(x @ gate) * (x @ value)` for each expert that a row has chosen.

    x: bfloat16 or float32 [M, I]. gate, value: int8 [L, E, I, O]. gates: float32 [M, E], zero where
    a row has not chosen an expert. Returns [E, M, O] in the dtype of x; what belongs to an expert
    that no row has chosen is not written.
    """
    tile = _tile(x, gate, 64)
    count = gate.shape[1]
    call = pl.pallas_call(
        functools.partial(_gated_kernel, tile),
        grid=(tile.count, count),
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
    at = (), (plgpu.load(layer_ref), expert)

    @pl.when(jnp.max(_gates_of(tile, gates_ref, expert)) > 0)
    def _() -> None:
        gate = _all_pieces(tile, (x_ref, *refs[0:2]), at, column)
        value = _all_pieces(tile, (x_ref, *refs[2:4]), at, column)
        out = jax.nn.gelu(gate, approximate=True) * value
        _store(tile, refs[-1], (expert,), column, out)


def expert_sum(
    x: jax.Array,
    weight: QuantizedWeight8bit,
    layer: jax.Array,
    gates: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Return `sum_e gates[:, e] * (x[e] @ weight[e])`, float32 [M, O].

    x: bfloat16 or float32 [E, M, I]; not read where no row has chosen an expert. weight: int8
    [L, E, I, O]. gates: as in `gated`.
    """
    tile = _tile(x, weight, 32)
    call = pl.pallas_call(
        functools.partial(_expert_sum_kernel, tile, len(x)),
        grid=(tile.count,),
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
    column, layer = pl.program_id(0), plgpu.load(layer_ref)

    def add(expert: jax.Array, total: jax.Array) -> jax.Array:
        gates = _gates_of(tile, gates_ref, expert)
        chosen = (jnp.max(gates) > 0).astype(jnp.int32)  # without a row, no piece is read
        at = (expert,), (layer, expert)
        out = _all_pieces(tile, (x_ref, *refs[:2]), at, column, chosen)
        return total + jnp.where(gates > 0, out, 0) * gates

    total = lax.fori_loop(0, count, add, jnp.zeros(tile.shape, jnp.float32))
    _store(tile, refs[-1], (), column, total)


def _gates_of(tile: Tile, gates_ref: Ref, expert: jax.Array) -> jax.Array:
    """Return one expert's gate for each row, float32 [R, 1]."""
    row = jnp.arange(tile.shape[0])
    return load_tile(gates_ref.at[row, expert], row < tile.rows)[:, None]


def _all_pieces(
    tile: Tile,
    refs: Sequence[Ref],
    at: tuple[Index, Index],
    column: jax.Array,
    repeat: jax.Array | int = 1,
) -> jax.Array:
    """Return the product of all rows with one tile of a matrix, float32 [R, C].

    repeat: 0 to read nothing and return zeros.
    """

    def add(piece: jax.Array, total: jax.Array) -> jax.Array:
        return total + _scaled_sums(tile, refs, at, column, piece)

    pieces = tile.scale_groups * tile.pieces * repeat
    return lax.fori_loop(0, pieces, add, jnp.zeros(tile.shape, jnp.float32))


def _scaled_sums(
    tile: Tile,
    refs: Sequence[Ref],
    at: tuple[Index, Index],
    column: jax.Array,
    piece: jax.Array,
) -> jax.Array:
    """Return the product of one piece of the inputs, scaled, float32 [R, C].

    refs: the rows x [..., M, I], a weight [..., I, O] and its scales [..., J, O]. at: the leading
    indices of the rows, and those of weight and scales.
    """
    x_ref, weight_ref, scales_ref = refs
    own, matrix = at
    group = lax.div(piece, jnp.int32(tile.pieces))
    begin = group * tile.group_inputs + (piece - group * tile.pieces) * tile.piece
    stop = jnp.minimum(begin + tile.piece, (group + 1) * tile.group_inputs)
    columns = pl.ds(column * tile.columns, tile.columns)
    _, present = _columns(tile, column)
    row = jnp.arange(tile.shape[0])

    def add(i: jax.Array, sums: jax.Array) -> jax.Array:
        start = begin + i * DEPTH
        number = start + jnp.arange(DEPTH)
        left = number < stop if tile.group_inputs % DEPTH else None
        x = load_tile(x_ref.at[*own, row[:, None], number[None]], row < tile.rows, left)
        steps = load_tile(weight_ref.at[*matrix, pl.ds(start, DEPTH), columns], left, present)
        return sums + product("ri,io->ro", x, steps.astype(x.dtype))

    blocks = ceil_div(jnp.maximum(stop - begin, 0), DEPTH)
    sums = lax.fori_loop(0, blocks, add, jnp.zeros(tile.shape, jnp.float32))
    scale = load_tile(scales_ref.at[*matrix, group, columns], present)
    return sums * scale.astype(jnp.float32)[None]


def _columns(tile: Tile, column: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Return the columns of a tile [C], and which of them exist; None: all."""
    number = column * tile.columns + jnp.arange(tile.columns)
    return number, number < tile.outputs if tile.outputs % tile.columns else None


def _store(
    tile: Tile, ref: Ref, at: Index, column: jax.Array, out: jax.Array, first: int = 0
) -> None:
    """Store a tile [R, C] in the result [..., M, O]; `first`: the first column of the product."""
    row = jnp.arange(tile.shape[0])
    number, present = _columns(tile, column)
    mask = outer_mask(tile.shape, row < tile.rows, present)
    # The interpreter stores what is masked as it was: where nothing else is stored.
    row = jnp.where(row < tile.rows, row, tile.rows)
    where = *at, row[:, None], first + number[None]
    plgpu.store(ref.at[*where], out.astype(ref.dtype), mask=mask)
