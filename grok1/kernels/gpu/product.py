"""Products of int8 matrices with rows that are grouped by the matrix that each is multiplied with.

Dimension letters: `M` rows, `E` groups of rows, `I` inputs, `O` outputs, `J` scale groups, `L`
layers, `R` rows of a tile.

With few rows, as in a decode step, a product is bound by reading its matrices. So a kernel takes
the full stack of layers and the index of one, and reads only the matrices in use, as int8. The
programs that share the contracted axis of a matrix write partial sums, which are added outside the
kernel, in a fixed order, without atomics.
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
from grok1.kernels.sorted_experts import sorted_copies
from grok1.ops.derivatives import forward_only
from grok1.ops.quantization import QuantizedWeight8bit, product

DEPTH = 64  # inputs that a program multiplies at a time
SHORTEST_PIECE = 3 * DEPTH  # a shorter one would write nearly as much as it reads
FEW_ROWS = 64  # of all groups; a tile holds them all, so that they need not be sorted


class Groups(NamedTuple):
    """The group of each row: which matrix it is multiplied with.

    group: int32 [M], E for a row of no group. order: int32 [M], the rows by group. starts: int32
    [E + 1], the index in `order` of each group's first row, then the end of the last. The last two
    are None for at most FEW_ROWS rows.
    """

    group: jax.Array
    order: jax.Array | None = None
    starts: jax.Array | None = None

    @property
    def arrays(self) -> list[jax.Array]:
        """What the kernel reads."""
        if self.order is None or self.starts is None:
            return [self.group]
        return [self.order, self.starts]


def groups_of(group: jax.Array, count: int) -> Groups:
    """Return the `count` groups E of rows, for the group int32 [M] of each."""
    if len(group) <= FEW_ROWS:
        return Groups(group)
    return Groups(group, *sorted_copies(group, count))


@dataclasses.dataclass(frozen=True)
class ProductLaunch:
    """How a product is divided among programs.

    A program multiplies a tile of rows with a tile of a matrix's columns; which rows, see
    `_find_rows`. The contracted axis is divided into pieces of `piece` inputs, none of which
    crosses a scale group. With `split` each program processes one piece and writes a partial sum;
    without, all pieces, in the same order.

    rows, inputs, outputs, groups, scale_groups: M, I, O, E, J. matrices: how many are multiplied
    with each row, 1 or 2. copies: M divided by the number of rows of x. few: whether one tile holds
    all rows.
    """

    rows: int
    inputs: int
    outputs: int
    groups: int
    scale_groups: int
    matrices: int
    copies: int
    few: bool
    row_tile: int
    column_tile: int
    piece: int
    split: bool

    @property
    def visits(self) -> int:
        """The maximum number of row tiles over all groups."""
        if self.few:
            return self.groups
        wasted = self.groups * (self.row_tile - 1)
        return min(self.rows, (self.rows + wasted) // self.row_tile)

    @property
    def columns(self) -> int:
        """The number of output tiles."""
        return pl.cdiv(self.outputs, self.column_tile)

    @property
    def group_inputs(self) -> int:
        """Inputs that share a scale, I / J."""
        return self.inputs // self.scale_groups

    @property
    def group_pieces(self) -> int:
        """The number of pieces per scale group."""
        return pl.cdiv(self.group_inputs, self.piece)

    @property
    def pieces(self) -> int:
        """The number of pieces of the contracted axis."""
        return self.scale_groups * self.group_pieces

    @property
    def partials(self) -> int:
        """The number of partial sums of each output."""
        return self.pieces if self.split else 1

    @property
    def grid(self) -> tuple[int, int, int]:
        """The Pallas grid; visits first: programs of one group read its matrix from the cache."""
        return self.visits, self.columns, self.partials

    @property
    def compiler(self) -> plgpu.CompilerParams:
        """The compiler options; few rows are memory-bound, so more tiles are prefetched."""
        large = self.row_tile * self.column_tile * self.matrices > 8192
        stages = 4 if self.few or self.split else 3
        return plgpu.CompilerParams(num_warps=8 if large else 4, num_stages=stages)


def plan_product(x: jax.Array, weights: Sequence[QuantizedWeight8bit], rows: int) -> ProductLaunch:
    """Return the launch for M rows of x and one or two weights [L, E, I, O], from their shapes.

    Pieces depend only on the weight's shape, so a row's products are added in the same order for
    any M.
    """
    matrices, (_, groups, inputs, outputs) = len(weights), weights[0].shape
    scale_groups = weights[0].scales.shape[-2]
    wanted = max(1, 2 * PROCESSORS // (pl.cdiv(outputs, 128) * scale_groups))
    most = max(1, inputs // scale_groups // SHORTEST_PIECE)
    piece = pl.cdiv(inputs // scale_groups, min(wanted, most))
    exact = x.dtype == jnp.float32  # without tensor cores: larger tiles do not help
    few = rows <= FEW_ROWS
    share = rows if few else pl.cdiv(rows, groups)
    launch = ProductLaunch(
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        groups=groups,
        scale_groups=scale_groups,
        matrices=matrices,
        copies=rows // x.shape[0],
        few=few,
        row_tile=min(32 if exact and not few else 128, power_of_two(share, LEAST_TILE)),
        column_tile=min(64 if exact or matrices > 1 else 128, power_of_two(outputs, LEAST_TILE)),
        piece=pl.cdiv(piece, DEPTH) * DEPTH,
        split=False,
    )
    if launch.row_tile == 128 and launch.visits * launch.columns < PROCESSORS:
        launch = dataclasses.replace(launch, row_tile=64)
    # Many rows are compute-bound, and their partial sums would be as large as what they read.
    sparse = few or launch.row_tile <= 32 or launch.visits * launch.columns < PROCESSORS // 2
    split = sparse and launch.pieces > 1 and matrices == 1  # gates need complete sums
    launch = dataclasses.replace(launch, split=split)
    programs = launch.visits * launch.columns * launch.partials
    if launch.column_tile == 128 and programs < PROCESSORS:
        launch = dataclasses.replace(launch, column_tile=64)
    return launch


def grouped_product(
    x: jax.Array,
    weights: Sequence[QuantizedWeight8bit],
    layer: jax.Array,
    groups: Groups | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Multiply each row with the matrix of its group; the result is the sum over the first axis.

    weights: one, int8 [L, E, I, O], of which `layer` int32 [] is used, with bfloat16 scales
    [L, E, J, O] -> float32 [partial sums, M, O]. Or two of the same shape, a gate and a value ->
    `gelu(x @ gate) * (x @ value)`, [1, M, O] in the dtype of x.

    x: bfloat16 or float32 [M / A, I], M > 0; A consecutive rows of the result are from one of x.
    groups: of the M rows; None: all are multiplied with one matrix, E = 1. Rows of no group are not
    written.

    A row's result does not depend on other rows. Its products are added in the same order for any
    M, but larger tiles use other tensor core instructions, which may round differently.

    int8 is exact in the dtype of x, sums are float32, and the scales multiply the sums. float32 is
    multiplied without tensor cores: accurate, but slow. `layer` must be within the stack, which is
    not checked. interpret: run on any device, for tests.

    Raises ValueError if shapes or dtypes do not fit, or if the weight takes between 2 and 4 GiB.
    """
    rows = len(x) if groups is None else len(groups.group)
    _check_product(x, weights, rows, groups)
    launch = plan_product(x, weights, rows)
    dtype = jnp.float32 if launch.matrices == 1 else x.dtype
    call = pl.pallas_call(
        functools.partial(_product_kernel, launch),
        grid=launch.grid,
        out_shape=jax.ShapeDtypeStruct((launch.partials, rows, launch.outputs), dtype),
        compiler_params=launch.compiler,
        interpret=interpret,
        name="grouped_product",
    )
    indices = [] if groups is None else groups.arrays
    matrices = [array for weight in weights for array in (weight.weight, weight.scales)]
    return forward_only(call)(layer, *indices, x, *matrices)


def added(partial: jax.Array) -> jax.Array:
    """Add partial sums, in their order: [partial sums, ...] -> [...]."""
    return functools.reduce(operator.add, partial)


def _check_product(
    x: jax.Array,
    weights: Sequence[QuantizedWeight8bit],
    rows: int,
    groups: Groups | None,
) -> None:
    """Raise ValueError if the arguments of `grouped_product` do not fit each other."""
    layers, count, inputs, outputs = weights[0].shape
    if x.ndim != 2 or x.shape[1] != inputs or x.shape[0] == 0:
        raise ValueError(f"x must be [M, {inputs}] with M > 0, got {x.shape}")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x must be bfloat16 or float32, got {x.dtype}")
    if groups is None and count != 1:
        raise ValueError(f"the groups of rows must be given for {count} matrices")
    if rows % len(x):
        raise ValueError(f"the number of groups' rows must be a multiple of {len(x)}, got {rows}")
    for weight in weights:
        scales = weight.scales.shape
        if scales != (layers, count, scales[-2], outputs) or inputs % scales[-2]:
            raise ValueError(f"scales of shape {scales} do not fit a weight of {weight.shape}")
        check_addresses("a weight", weight.weight)


def _product_kernel(launch: ProductLaunch, layer_ref: Ref, *refs: Ref) -> None:
    """Write one tile of outputs [R, columns]; only for one piece, if the launch is split."""
    *index_refs, x_ref = refs[: -2 * launch.matrices - 1]
    weight_refs, out_ref = refs[-2 * launch.matrices - 1 : -1], refs[-1]
    visit, column, part = (pl.program_id(axis) for axis in range(3))
    layer = plgpu.load(layer_ref)
    group, row, inside = _find_rows(launch, index_refs, visit)
    x_row = lax.div(row, jnp.int32(launch.copies))
    columns = pl.ds(column * launch.column_tile, launch.column_tile)
    number = column * launch.column_tile + jnp.arange(launch.column_tile)
    present = number < launch.outputs if launch.outputs % launch.column_tile else None  # None: all

    def add_piece(piece: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
        scale_group = lax.div(piece, jnp.int32(launch.group_pieces))
        within = piece - scale_group * launch.group_pieces
        begin = scale_group * launch.group_inputs + within * launch.piece
        stop = jnp.minimum(begin + launch.piece, (scale_group + 1) * launch.group_inputs)

        def add(i: jax.Array, sums: list[jax.Array]) -> list[jax.Array]:
            at = begin + i * DEPTH
            number = at + jnp.arange(DEPTH)
            left = number < stop if launch.group_inputs % DEPTH else None
            x = load_tile(x_ref.at[x_row[:, None], number[None]], inside, left)  # [R, depth]
            tile = layer, group, pl.ds(at, DEPTH), columns
            steps = [load_tile(ref.at[*tile], left, present) for ref in weight_refs[::2]]
            return [
                total + product("ri,io->ro", x, w.astype(x.dtype))
                for total, w in zip(sums, steps, strict=True)
            ]

        zeros = [jnp.zeros_like(total) for total in totals]
        sums = lax.fori_loop(0, ceil_div(stop - begin, DEPTH), add, zeros)
        tile = layer, group, scale_group, columns
        scales = [load_tile(ref.at[*tile], present) for ref in weight_refs[1::2]]
        return [
            total + y * scale.astype(jnp.float32)[None]
            for total, y, scale in zip(totals, sums, scales, strict=True)
        ]

    @pl.when(jnp.sum(inside.astype(jnp.int32)) > 0)
    def _() -> None:
        tile = launch.row_tile, launch.column_tile
        totals = [jnp.zeros(tile, jnp.float32) for _ in range(launch.matrices)]
        if launch.split:
            totals = add_piece(part, totals)
        else:
            totals = lax.fori_loop(0, launch.pieces, add_piece, totals)
        out = totals[0]
        if launch.matrices == 2:
            out = jax.nn.gelu(out, approximate=True) * totals[1]
        mask = outer_mask(tile, inside, present)
        where = out_ref.at[part, row[:, None], number[None]]
        plgpu.store(where, out.astype(out_ref.dtype), mask=mask)


def _find_rows(
    launch: ProductLaunch, index_refs: Sequence[Ref], visit: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the group of a visit, the rows of its tile [R], and which of them are the group's."""
    tile = jnp.arange(launch.row_tile)
    if not index_refs:  # one group
        row = visit * launch.row_tile + tile
        return jnp.zeros_like(visit), row, row < launch.rows
    if launch.few:
        exists = tile < launch.rows
        group = load_tile(index_refs[0].at[tile], exists)
        return visit, tile, exists & (group == visit)
    order, starts = index_refs

    def step(g: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        before, group, first, end = found
        begin, stop = plgpu.load(starts.at[g]), plgpu.load(starts.at[g + 1])
        after = before + ceil_div(stop - begin, launch.row_tile)
        own = (visit >= before) & (visit < after)
        return (
            after,
            jnp.where(own, g, group),
            jnp.where(own, begin + (visit - before) * launch.row_tile, first),
            jnp.where(own, stop, end),
        )

    zero = jnp.int32(0)
    _, group, first, end = lax.fori_loop(0, launch.groups, step, (zero, zero, zero, zero))
    inside = first + tile < end
    row = load_tile(order.at[first + tile], inside)
    # The interpreter stores a masked row as it was: not in row 0, which may be one of the others.
    return group, jnp.where(inside, row, launch.rows), inside
