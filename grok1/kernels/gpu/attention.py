"""Attention over the cache.

Dimension letters: `B` sequences, `C` sequences of a cache, `T` query positions, `S` positions of a
cache, `K` key/value heads, `G` queries per key/value head, `H` head width, `L` layers, `R` rows of
a tile.

A decode step is bound by reading its cache. So the kernel takes the full stack of layers and the
index of one, reads only what is filled, and splits each sum into parts, so that a single query
keeps all processors busy. The float32 partial sums are added outside the kernel, in a fixed order.
"""

import dataclasses
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from grok1.kernels.gpu.tiles import (
    LEAST_TILE,
    Ref,
    ceil_div,
    check_addresses,
    load_tile,
    outer_mask,
    power_of_two,
)
from grok1.ops.cache import SOFT_CAP
from grok1.ops.derivatives import forward_only
from grok1.ops.quantization import product

BLOCK = 64  # positions of the cache that are attended to at a time
PARTS = 16  # programs that share the blocks of a few queries


@dataclasses.dataclass(frozen=True)
class AttentionLaunch:
    """How attention over a cache is divided among programs.

    The T x G queries of a sequence's key/value head are rows, in tiles of `row_tile`. A tile's
    blocks of `block` positions are distributed round-robin to `parts` programs, so that their
    shares are equal for any length of the sequence; each writes the sums of its share.

    batch, queries, kv_heads, group, width, value_width, positions: B, T, K, G, H, H', S.
    mask_queries: T, or 1 if the mask is the same for all.
    """

    batch: int
    queries: int
    kv_heads: int
    group: int
    width: int
    value_width: int
    positions: int
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
        mask_queries=mask.shape[1],
        row_tile=min(64, power_of_two(rows, LEAST_TILE)),
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
    check_addresses("a mask", mask)
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
    check_dtypes(query, keys, values)


def check_dtypes(query: jax.Array, keys: jax.Array, values: jax.Array) -> None:
    """Raise ValueError unless queries and cache have a dtype that the kernels take."""
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
    query = load_tile(query_ref.at[b, head, rows, whole_key], inside, key_column)

    def add(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, total = sums
        start = (part + i * launch.parts) * launch.block
        positions = pl.ds(start, launch.block)
        position = start + jnp.arange(launch.block)
        present = position < reach
        where = layer, sequence, positions, head
        key = load_tile(keys_ref.at[*where, whole_key], present, key_column)
        value = load_tile(values_ref.at[*where, whole_value], present, value_column)
        own = jnp.minimum(b, mask_ref.shape[0] - 1)  # one mask may be for all sequences
        if launch.mask_queries > 1:
            at = own, token[:, None], position[None, :]
            seen = load_tile(mask_ref.at[*at], inside, present)  # [R, block]
        else:
            seen = load_tile(mask_ref.at[own, pl.ds(0, 1), positions], None, present)  # [1, block]
        scores = product("rh,sh->rs", query, key) * multiplier  # [R, block]
        scores = SOFT_CAP * jnp.tanh(scores / SOFT_CAP)
        weights = jnp.where(seen, jnp.exp(scores), 0.0)
        out += product("rs,sh->rh", weights.astype(value.dtype), value)
        return out, total + jnp.sum(weights, axis=1)

    blocks = ceil_div(reach, launch.block)
    own_blocks = ceil_div(blocks - part + (launch.parts - 1), launch.parts)
    zeros = jnp.zeros([launch.row_tile, whole_value.size], jnp.float32)
    out, total = lax.fori_loop(0, own_blocks, add, (zeros, jnp.zeros_like(row, jnp.float32)))
    mask = outer_mask(out.shape, inside, value_column)
    plgpu.store(out_ref.at[part, b, head, rows, whole_value], out, mask=mask)
    plgpu.store(total_ref.at[part, b, head, rows], total, mask=inside)


def _columns(width: int) -> tuple[Any, jax.Array | None]:
    """Return a slice of a size that Triton takes, and a mask of its valid columns; None: all."""
    size = power_of_two(width, LEAST_TILE)
    start = jnp.int32(0) if size > width else 0  # with an int, jax would refuse to exceed `width`
    return pl.ds(start, size), None if size == width else jnp.arange(size) < width
