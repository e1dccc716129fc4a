"""The grouped product and the attention for NVIDIA GPUs, in Pallas with its Triton backend.

Dimension letters: `M` rows, `E` groups of rows, `I` inputs, `O` outputs, `J` scale groups, `L`
layers; `B` sequences, `C` sequences of a cache, `T` query positions, `S` positions of a cache, `K`
key/value heads, `G` queries per key/value head, `H` head width, `R` rows of a tile.

A decode step is bound by reading its weights and its cache. So both kernels take the full stack of
layers and the index of one, read only what is used, and split each sum into pieces, so that a
single row keeps all processors busy. The float32 partial sums are added outside the kernel, in a
fixed order, without atomics.

Each kernel is launched from a frozen description of its tiles (`ProductLaunch`, `AttentionLaunch`),
which also computes how many bytes the launch moves.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from grok1.kernels.error import KernelError
from grok1.kernels.sorted_experts import grouped_experts, is_int8, one_group
from grok1.ops.cache import SOFT_CAP
from grok1.ops.derivatives import forward_only
from grok1.ops.mixture import chosen_experts
from grok1.ops.operations import Operations
from grok1.ops.quantization import (
    QuantizedWeight8bit,
    StackedWeight,
    Weight,
    Weights,
    matmul,
    product,
)

Ref = Any  # a reference that a kernel loads from and stores to; the type has no public name

PROCESSORS = 132  # of an H100
DEPTH = 64  # inputs that a product's tile processes at a time
SHORTEST_PIECE = 3 * DEPTH  # a shorter one would write nearly as much as it reads
LEAST_TILE = 16  # the smallest side of Triton's products
BLOCK = 64  # positions of the cache that are attended to at a time
PARTS = 16  # programs that share the blocks of a few queries


@functools.cache
def load() -> None:
    """Test the grouped product on this device. Raises KernelError if it fails or is wrong."""
    rng = np.random.default_rng(0)
    steps = rng.integers(-127, 128, [1, 1, DEPTH, 128]).astype(np.int8)
    weight = QuantizedWeight8bit(steps, jnp.full([1, 1, 1, 128], 0.01, jnp.bfloat16))
    x = jnp.asarray(rng.standard_normal([2, DEPTH]), jnp.bfloat16)
    try:
        y = jax.jit(grouped_product)(x, weight, jnp.array([0, 2], jnp.int32), jnp.int32(0))
        expected = np.asarray(matmul(x, jax.tree.map(lambda w: jnp.asarray(w[0, 0]), weight)))
        wrong = np.linalg.norm(np.asarray(y) - expected) / np.linalg.norm(expected)
    except Exception as error:  # a compiler or driver may raise anything
        raise KernelError(str(error).strip().splitlines()[0]) from error
    if not wrong < 1e-3:
        raise KernelError(f"a test product is wrong by {wrong:.0%}")


def _power_of_two(n: int) -> int:
    """Return the smallest power of two >= n, for n >= 1."""
    return 1 << (n - 1).bit_length()


def _ceil_div(n: jax.Array, divisor: int) -> jax.Array:
    """Divide n >= 0 in a kernel, rounding up; `//` would be several operations there."""
    return lax.div(n + (divisor - 1), jnp.int32(divisor))


def _check_addresses(name: str, array: jax.Array) -> None:
    """Raise ValueError if Pallas would compute wrong addresses.

    It uses 32-bit offsets up to 4 GiB, which Triton reads as signed. This is wrong only for
    elements of one byte.
    """
    if array.dtype.itemsize == 1 and 2**31 < array.size <= 2**32:
        raise ValueError(
            f"{name} of shape {array.shape}: the GPU kernels take arrays of bytes up to 2 GiB or "
            "above 4 GiB, not between; use the plain form"
        )


# --------------------------------------------------------------------------- the grouped product


@dataclasses.dataclass(frozen=True)
class ProductLaunch:
    """How a grouped product is divided among programs.

    A group's rows are divided into tiles of `row_tile`, from its first row on: a group of at most
    `row_tile` rows reads its matrix once. Each tile is a visit. The grid has as many visits as the
    rows can need; the programs of unused ones do nothing. The contracted axis is divided into
    pieces of `piece` inputs, none of which crosses a scale group. With `split` each program
    processes one piece and writes a partial sum; without, all pieces, in the same order.

    rows, inputs, outputs, groups, scale_groups: M, I, O, E, J. itemsize: bytes of an element of x.
    """

    rows: int
    inputs: int
    outputs: int
    groups: int
    scale_groups: int
    itemsize: int
    row_tile: int
    column_tile: int
    piece: int
    split: bool

    @property
    def visits(self) -> int:
        """The maximum number of row tiles over all groups."""
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
        large = self.row_tile * self.column_tile > 8192
        return plgpu.CompilerParams(num_warps=8 if large else 4, num_stages=4 if self.split else 3)

    def bytes_moved(self, counts: Sequence[int]) -> dict[str, int]:
        """Return the bytes that programs read and write, by kind, with `counts` rows in the groups.

        What several programs read is counted for each; most of it is x, which stays in the
        level-two cache.
        """
        tiles = sum(pl.cdiv(count, self.row_tile) for count in counts)
        used = sum(counts)
        result = 4 * self.outputs
        return {
            "weight": tiles * self.inputs * self.outputs,
            "scales": tiles * self.pieces * self.outputs * 2,
            "x": self.columns * used * self.inputs * self.itemsize,
            "index": math.prod(self.grid) * 4 * (1 + 2 * self.groups),
            "written": self.partials * used * result,
            "added": (self.partials + 1) * self.rows * result if self.split else 0,
        }


def plan_product(x: jax.Array, weight: QuantizedWeight8bit) -> ProductLaunch:
    """Return the launch for x [M, I] and a weight [L, E, I, O], from their shapes and dtypes.

    Pieces depend only on the weight's shape, so a row's products are added in the same order for
    any M.
    """
    (rows, inputs), (_, groups, _, outputs) = x.shape, weight.shape
    scale_groups = weight.scales.shape[-2]
    wanted = max(1, 2 * PROCESSORS // (pl.cdiv(outputs, 128) * scale_groups))
    most = max(1, inputs // scale_groups // SHORTEST_PIECE)
    piece = pl.cdiv(inputs // scale_groups, min(wanted, most))
    exact = x.dtype == jnp.float32  # without tensor cores: larger tiles do not help
    launch = ProductLaunch(
        rows=rows,
        inputs=inputs,
        outputs=outputs,
        groups=groups,
        scale_groups=scale_groups,
        itemsize=x.dtype.itemsize,
        row_tile=min(32 if exact else 128, max(LEAST_TILE, _power_of_two(pl.cdiv(rows, groups)))),
        column_tile=min(64 if exact else 128, max(LEAST_TILE, _power_of_two(outputs))),
        piece=pl.cdiv(piece, DEPTH) * DEPTH,
        split=False,
    )
    if launch.row_tile == 128 and launch.visits * launch.columns < PROCESSORS:
        launch = dataclasses.replace(launch, row_tile=64)
    # Many rows are compute-bound, and their partial sums would be as large as what they read.
    few = launch.row_tile <= 32 or launch.visits * launch.columns < PROCESSORS // 2
    launch = dataclasses.replace(launch, split=few and launch.pieces > 1)
    programs = launch.visits * launch.columns * launch.partials
    if launch.column_tile == 128 and programs < PROCESSORS:
        launch = dataclasses.replace(launch, column_tile=64)
    return launch


def grouped_product(
    x: jax.Array,
    weight: QuantizedWeight8bit,
    starts: jax.Array,
    layer: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Multiply each row with the matrix of its group.

    x: bfloat16 or float32 [M, I], M > 0, sorted by group. weight: int8 [L, E, I, O], of which
    `layer` int32 [] is used, with bfloat16 scales [L, E, J, O]. starts: int32 [E + 1], the first
    row of each group in x, then the end of the last group. Returns float32 [M, O], zero in the rows
    before the first group and after the last. Only the matrices in use are read, as int8, once for
    each tile of a group's rows; see `ProductLaunch`.

    A row's result does not depend on other rows. Its products are added in the same order for any
    M, but larger tiles use other tensor core instructions, which may round differently.

    int8 is exact in the dtype of x, sums are float32, and the scales multiply the sums. float32 is
    multiplied without tensor cores: accurate, but slow. A group's rows and `layer` must be within x
    and the stack, which is not checked. interpret: run on any device, for tests.

    Raises ValueError if shapes or dtypes do not fit, or if the weight takes between 2 and 4 GiB.
    """
    _check_product(x, weight, starts)
    launch = plan_product(x, weight)
    call = pl.pallas_call(
        functools.partial(_product_kernel, launch),
        grid=launch.grid,
        out_shape=jax.ShapeDtypeStruct((launch.partials, launch.rows, launch.outputs), jnp.float32),
        compiler_params=launch.compiler,
        interpret=interpret,
        name="grouped_product",
    )
    arrays = layer, starts, x, weight.weight, weight.scales
    partial = forward_only(call)(*arrays)  # [partials, M, O]
    row = jnp.arange(launch.rows)
    used = (row >= starts[0]) & (row < starts[-1])  # no program writes the other rows
    return jnp.where(used[:, None], functools.reduce(operator.add, partial), 0)


def _check_product(x: jax.Array, weight: QuantizedWeight8bit, starts: jax.Array) -> None:
    """Raise ValueError if the arguments of `grouped_product` do not fit each other."""
    layers, groups, inputs, outputs = weight.shape
    if x.ndim != 2 or x.shape[1] != inputs or x.shape[0] == 0:
        raise ValueError(f"x must be [M, {inputs}] with M > 0, got {x.shape}")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"x must be bfloat16 or float32, got {x.dtype}")
    if starts.shape != (groups + 1,):
        raise ValueError(f"starts must be [{groups + 1}] for {groups} groups, got {starts.shape}")
    scales = weight.scales.shape
    if scales != (layers, groups, scales[-2], outputs) or inputs % scales[-2]:
        raise ValueError(f"scales of shape {scales} do not fit a weight of shape {weight.shape}")
    _check_addresses("a weight", weight.weight)


def _product_kernel(
    launch: ProductLaunch,
    layer_ref: Ref,
    starts_ref: Ref,
    x_ref: Ref,
    weight_ref: Ref,
    scales_ref: Ref,
    out_ref: Ref,
) -> None:
    """Write one tile of outputs [R, columns]; only for one piece, if the launch is split."""
    visit, column, part = (pl.program_id(axis) for axis in range(3))
    layer = plgpu.load(layer_ref)
    group, first, end = _find_visit(launch, starts_ref, visit)
    rows = pl.ds(first, launch.row_tile)
    inside = (first + jnp.arange(launch.row_tile) < end)[:, None]
    columns = pl.ds(column * launch.column_tile, launch.column_tile)
    present = None  # whether an output exists; None: all do
    if launch.outputs % launch.column_tile:
        number = column * launch.column_tile + jnp.arange(launch.column_tile)
        present = (number < launch.outputs)[None, :]

    def add_piece(piece: jax.Array, total: jax.Array) -> jax.Array:
        scale_group = lax.div(piece, jnp.int32(launch.group_pieces))
        within = piece - scale_group * launch.group_pieces
        begin = scale_group * launch.group_inputs + within * launch.piece
        stop = jnp.minimum(begin + launch.piece, (scale_group + 1) * launch.group_inputs)

        def add(i: jax.Array, sums: jax.Array) -> jax.Array:
            at = begin + i * DEPTH
            depth = pl.ds(at, DEPTH)
            mask, weight_mask = inside, present
            if launch.group_inputs % DEPTH:
                left = at + jnp.arange(DEPTH) < stop
                mask = inside & left[None, :]
                weight_mask = left[:, None] if present is None else left[:, None] & present
            mask = jnp.broadcast_to(mask, (launch.row_tile, DEPTH))
            x = plgpu.load(x_ref.at[rows, depth], mask=mask, other=0)  # [R, depth]
            steps = _load(weight_ref.at[layer, group, depth, columns], weight_mask)
            return sums + product("ri,io->ro", x, steps.astype(x.dtype))

        zeros = jnp.zeros_like(total)
        sums = lax.fori_loop(0, _ceil_div(stop - begin, DEPTH), add, zeros)
        row_mask = None if present is None else present[0]
        scales = _load(scales_ref.at[layer, group, scale_group, columns], row_mask)
        return total + sums * scales.astype(jnp.float32)[None, :]

    @pl.when(first < end)
    def _() -> None:
        total = jnp.zeros([launch.row_tile, launch.column_tile], jnp.float32)
        if launch.split:
            total = add_piece(part, total)
        else:
            total = lax.fori_loop(0, launch.pieces, add_piece, total)
        mask = inside if present is None else inside & present
        mask = jnp.broadcast_to(mask, total.shape)
        plgpu.store(out_ref.at[part, rows, columns], total, mask=mask)


def _find_visit(
    launch: ProductLaunch, starts_ref: Ref, visit: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the group of a visit, its first row and the group's end; no rows if unused."""

    def step(g: jax.Array, found: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        before, group, first, end = found
        begin, stop = plgpu.load(starts_ref.at[g]), plgpu.load(starts_ref.at[g + 1])
        after = before + _ceil_div(stop - begin, launch.row_tile)
        own = (visit >= before) & (visit < after)
        return (
            after,
            jnp.where(own, g, group),
            jnp.where(own, begin + (visit - before) * launch.row_tile, first),
            jnp.where(own, stop, end),
        )

    zero = jnp.int32(0)
    _, group, first, end = lax.fori_loop(0, launch.groups, step, (zero, zero, zero, zero))
    return group, first, end


def _load(ref: Ref, mask: jax.Array | None) -> jax.Array:
    """Load a tile, zero where the mask is False; without a mask, all of it."""
    if mask is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=jnp.broadcast_to(mask, ref.shape), other=jnp.zeros((), ref.dtype))


# ------------------------------------------------------------------------------------ attention


@dataclasses.dataclass(frozen=True)
class AttentionLaunch:
    """How attention over a cache is divided among programs.

    The T x G queries of a sequence's key/value head are rows, in tiles of `row_tile`. A tile's
    blocks of `block` positions are distributed round-robin to `parts` programs, so that their
    shares are equal for any length of the sequence; each writes the sums of its share.

    batch, queries, kv_heads, group, width, value_width, positions: B, T, K, G, H, H', S.
    itemsize: bytes of an element of queries and cache. mask_queries: T, or 1 if the mask is the
    same for all.
    """

    batch: int
    queries: int
    kv_heads: int
    group: int
    width: int
    value_width: int
    positions: int
    itemsize: int
    mask_queries: int
    row_tile: int
    block: int
    parts: int

    @property
    def rows(self) -> int:
        """The queries of a sequence's key/value head, T x G."""
        return self.queries * self.group

    @property
    def tiles(self) -> int:
        """The number of row tiles."""
        return pl.cdiv(self.rows, self.row_tile)

    @property
    def grid(self) -> tuple[int, int, int, int]:
        """The programs."""
        return self.parts, self.tiles, self.kv_heads, self.batch

    @property
    def compiler(self) -> plgpu.CompilerParams:
        """The compiler options; two blocks are loaded while one is used."""
        return plgpu.CompilerParams(num_warps=4, num_stages=3)

    def bytes_moved(self, reach: Sequence[Sequence[int]]) -> dict[str, int]:
        """Return the bytes that programs read and write, by kind.

        reach: [B][tiles], how many positions each tile of rows reads.
        """
        seen = sum(map(sum, reach))  # positions, over sequences and tiles
        if self.mask_queries > 1:
            sizes = [min(self.row_tile, self.rows - t * self.row_tile) for t in range(self.tiles)]
            mask = sum(n * size for own in reach for n, size in zip(own, sizes, strict=True))
        else:
            mask = seen
        rows = self.batch * self.kv_heads * self.rows
        sums = rows * self.parts * (self.value_width + 1) * 4
        return {
            "query": rows * self.parts * self.width * self.itemsize,
            "keys": seen * self.kv_heads * self.width * self.itemsize,
            "values": seen * self.kv_heads * self.value_width * self.itemsize,
            "mask": mask * self.kv_heads,
            "index": math.prod(self.grid) * 3 * 4,
            "written": sums,
            "added": sums + rows * self.value_width * 4,
        }


def plan_attention(
    query: jax.Array, keys: jax.Array, values: jax.Array, mask: jax.Array
) -> AttentionLaunch:
    """Return the launch for the arguments of `attend_cached`, from their shapes and dtypes.

    The blocks and their distribution depend only on T x G: a sequence's sums are added in the same
    order in any batch.
    """
    batch, queries, kv_heads, group, width = query.shape
    rows = queries * group
    return AttentionLaunch(
        batch=batch,
        queries=queries,
        kv_heads=kv_heads,
        group=group,
        width=width,
        value_width=values.shape[-1],
        positions=keys.shape[2],
        itemsize=query.dtype.itemsize,
        mask_queries=mask.shape[1],
        row_tile=min(64, max(LEAST_TILE, _power_of_two(rows))),
        block=BLOCK,
        # Many rows occupy the processors without parts, and their sums take much memory.
        parts=PARTS if rows <= 512 else 1,
    )


def attend_cached(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    multiplier: float,
    layer: jax.Array,
    filled: jax.Array,
    sequence: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """`cache.attend_cached` in one kernel, which reads only the filled part of a cache.

    query [B, T, K, G, H]. keys, values: [L, C, S, K, H], of which `layer` int32 [] is read. All are
    bfloat16, or float32, which is multiplied without tensor cores. mask: bool, broadcast to
    [B, T, S]. filled: int32 [B], how many positions of each sequence hold a key. sequence: int32
    [B], the index of each query's sequence among the C of the cache; None: B = C, in order. Returns
    float32 [B, T, K, G, H], zero where a query sees no key. `layer` and `sequence` must be within
    the cache, which is not checked. interpret: run on any device, for tests.

    With several queries, each tile reads up to the last position that one of its queries sees. In
    addition to the arguments and the result, it needs memory for `parts` partial sums, for any S.

    Raises ValueError if shapes or dtypes do not fit, or if the mask takes between 2 and 4 GiB.
    """
    _check_attention(query, keys, values)
    size = keys.shape[2]
    mask = jnp.broadcast_to(mask, (*mask.shape[:-1], size))
    _check_addresses("a mask", mask)
    launch = plan_attention(query, keys, values, mask)
    if sequence is None:
        sequence = jnp.arange(launch.batch, dtype=jnp.int32)
    heads = launch.batch, launch.kv_heads
    rows = jnp.moveaxis(query, 1, 2).reshape(*heads, launch.rows, launch.width)
    sums = (launch.parts, *heads, launch.rows)
    call = pl.pallas_call(
        functools.partial(_attention_kernel, launch, multiplier),
        grid=launch.grid,
        out_shape=(
            jax.ShapeDtypeStruct((*sums, launch.value_width), jnp.float32),
            jax.ShapeDtypeStruct(sums, jnp.float32),
        ),
        compiler_params=launch.compiler,
        interpret=interpret,
        name="attend_cached",
    )
    reach = _visible_lengths(launch, mask, jnp.minimum(filled, size))
    parts = forward_only(call)(layer, sequence, reach, rows, keys, values, mask)
    out, total = (functools.reduce(operator.add, each) for each in parts)
    total = total[..., None]  # [B, K, T * G, 1]
    out = jnp.where(total == 0, 0, out / jnp.where(total == 0, 1, total))
    out = out.reshape(*heads, launch.queries, launch.group, launch.value_width)
    return jnp.moveaxis(out, 2, 1)


def _check_attention(query: jax.Array, keys: jax.Array, values: jax.Array) -> None:
    """Raise ValueError if the arguments of `attend_cached` do not fit each other."""
    kv_heads, width = query.shape[2], query.shape[-1]
    if keys.shape[:-1] != values.shape[:-1] or keys.shape[-2:] != (kv_heads, width):
        raise ValueError(
            f"queries of shape {query.shape} do not fit caches of {keys.shape} and {values.shape}"
        )
    dtypes = {query.dtype, keys.dtype, values.dtype}
    if len(dtypes) > 1 or query.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"queries and cache must be all bfloat16 or all float32, got {dtypes}")


def _visible_lengths(launch: AttentionLaunch, mask: jax.Array, filled: jax.Array) -> jax.Array:
    """Return how many positions each tile of rows has to read, int32 [B, tiles]."""
    if launch.queries == 1 or launch.mask_queries == 1:
        return jnp.broadcast_to(filled[:, None], (launch.batch, launch.tiles))
    position = jnp.arange(launch.positions)
    last = jnp.max(jnp.where(mask, position + 1, 0), axis=-1)  # [B or 1, T]
    last = jnp.repeat(last, launch.group, axis=1)  # [B or 1, T * G]
    spare = launch.tiles * launch.row_tile - launch.rows
    last = jnp.pad(last, ((0, 0), (0, spare))).reshape(-1, launch.tiles, launch.row_tile)
    return jnp.minimum(jnp.max(last, axis=-1), filled[:, None])


def _attention_kernel(
    launch: AttentionLaunch,
    multiplier: float,
    layer_ref: Ref,
    sequence_ref: Ref,
    reach_ref: Ref,
    query_ref: Ref,
    keys_ref: Ref,
    values_ref: Ref,
    mask_ref: Ref,
    out_ref: Ref,
    total_ref: Ref,
) -> None:
    """Write the sums of a part of the positions for a tile of rows: [R, H'] and [R]."""
    part, tile, head, b = (pl.program_id(axis) for axis in range(4))
    layer, sequence = plgpu.load(layer_ref), plgpu.load(sequence_ref.at[b])
    reach = plgpu.load(reach_ref.at[b, tile])
    rows = pl.ds(tile * launch.row_tile, launch.row_tile)
    row = tile * launch.row_tile + jnp.arange(launch.row_tile)
    inside = row < launch.rows
    token = lax.div(jnp.minimum(row, launch.rows - 1), jnp.int32(launch.group))
    (whole_key, key_column), (whole_value, value_column) = map(
        _columns, (launch.width, launch.value_width)
    )
    query = _load(query_ref.at[b, head, rows, whole_key], _and(inside[:, None], key_column))

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, total = sums
        start = (part + i * launch.parts) * launch.block
        positions = pl.ds(start, launch.block)
        position = start + jnp.arange(launch.block)
        present = position < reach
        where = layer, sequence, positions, head
        key = _load(keys_ref.at[*where, whole_key], _and(present[:, None], key_column))
        value = _load(values_ref.at[*where, whole_value], _and(present[:, None], value_column))
        own = jnp.minimum(b, mask_ref.shape[0] - 1)  # one mask may be for all sequences
        if launch.mask_queries > 1:
            at = own, token[:, None], position[None, :]
            seen = _load(mask_ref.at[*at], inside[:, None] & present[None, :])  # [R, block]
        else:
            seen = _load(mask_ref.at[own, pl.ds(0, 1), positions], present[None, :])  # [1, block]
        scores = product("rh,sh->rs", query, key) * multiplier  # [R, block]
        scores = SOFT_CAP * jnp.tanh(scores / SOFT_CAP)
        weights = jnp.where(seen, jnp.exp(scores), 0.0)
        out += product("rs,sh->rh", weights.astype(value.dtype), value)
        return out, total + jnp.sum(weights, axis=1)

    blocks = _ceil_div(reach, launch.block)
    own_blocks = _ceil_div(blocks - part + (launch.parts - 1), launch.parts)
    zeros = jnp.zeros([launch.row_tile, whole_value.size], jnp.float32)
    out, total = lax.fori_loop(0, own_blocks, add, (zeros, jnp.zeros_like(row, jnp.float32)))
    mask = jnp.broadcast_to(_and(inside[:, None], value_column), out.shape)
    plgpu.store(out_ref.at[part, b, head, rows, whole_value], out, mask=mask)
    plgpu.store(total_ref.at[part, b, head, rows], total, mask=inside)


def _columns(width: int) -> tuple[Any, jax.Array | None]:
    """Return a slice of a size that Triton takes, and a mask of its valid columns; None: all."""
    size = max(LEAST_TILE, _power_of_two(width))
    start = jnp.int32(0) if size > width else 0  # with an int, jax would refuse to exceed `width`
    return pl.ds(start, size), None if size == width else (jnp.arange(size) < width)[None, :]


def _and(mask: jax.Array, other: jax.Array | None) -> jax.Array:
    """Combine two masks; None as the second one masks nothing."""
    return mask if other is None else mask & other


# --------------------------------------------------------------------- which form is used for what


def gated_product(
    x: jax.Array,
    gate: QuantizedWeight8bit,
    value: QuantizedWeight8bit,
    starts: jax.Array,
    layer: jax.Array,
) -> jax.Array:
    """`gelu(x @ gate) * (x @ value)`, both by `grouped_product` -> float32 [M, O]."""
    gates = jax.nn.gelu(grouped_product(x, gate, starts, layer), approximate=True)
    return gates * grouped_product(x, value, starts, layer)


def _matmul(x: jax.Array, weight: Weight) -> jax.Array:
    if isinstance(weight, StackedWeight) and isinstance(weight.stack, QuantizedWeight8bit):
        return one_group(grouped_product, x, weight)
    return matmul(x, weight)


def _mixture(params: Weights, x: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
    if not is_int8(params):
        return chosen_experts(params, x, gates, index)
    return grouped_experts(gated_product, grouped_product, params, x, gates, index)


OPERATIONS = Operations(
    matmul=_matmul,
    mixture=_mixture,
    attend_cached=attend_cached,
    takes_stacked=True,
)
