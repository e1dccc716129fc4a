"""Products of activations with a layer's weights or the output table, on one device or a mesh.

Dimension letters: `B` batch, `T` positions, `I` in (contracted) width, `O` out width, `J` scale
groups, `L` layers, `D` model width, `V` vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from grok1.kernels import dispatch as kernels
from grok1.ops.quantization import (
    QuantizedWeight8bit,
    StackedWeight,
    Weight,
    local_matmul,
    matmul,
    split_groups,
)
from grok1.parallel.sharding import Axes, axis_size, scales_spec


def project(
    x: jax.Array,
    weight: Weight | StackedWeight,
    mesh: Mesh | None = None,
    *,
    data: Axes = None,
    contracted: Axes = None,
    produced: Axes = None,
) -> jax.Array:
    """`x [B, T, I] @ weight [I, O]` -> float32 [B, T, O].

    x: in the activation dtype. data, contracted, produced: the mesh axes over which B, I and O lie;
    of the last two at most one is given. A StackedWeight is multiplied by a kernel.
    """
    if not isinstance(weight, StackedWeight):
        if mesh is None:
            return local_matmul(x, weight)
        return matmul(x, split_groups(weight, axis_size(mesh, contracted)))

    def local(x: jax.Array, weight: QuantizedWeight8bit, layer: jax.Array) -> jax.Array:
        # Local shapes: x [B/data, T, I/contracted], weight [L, I/contracted, O/produced].
        rows = x.reshape(-1, x.shape[-1])
        starts = jnp.array([0, rows.shape[0]], jnp.int32)  # one group
        one_group = jax.tree.map(lambda w: w[:, None], weight)
        y = kernels.grouped_product(rows, one_group, starts, layer)
        y = y.reshape(*x.shape[:-1], -1)
        return y if contracted is None else lax.psum(y, contracted)

    if mesh is None:
        contracted = None
        return local(x, weight.weight, weight.layer)
    stacked, spec = local_groups(weight.weight, P(None, contracted, produced), mesh)
    multiply = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(data, None, contracted), spec, P()),
        out_specs=P(data, None, produced),
        check_vma=False,
    )
    return multiply(x, stacked, weight.layer)


def output_logits(
    x: jax.Array,
    table: jax.Array,
    mesh: Mesh | None = None,
    *,
    data: Axes = None,
    vocabulary: Axes = None,
) -> jax.Array:
    """`x [B, T, D] @ table.T`, table [V, D] of x's dtype -> float32 [B, T, V], by a kernel.

    data, vocabulary: the mesh axes over which B and V lie.
    """

    def local(x: jax.Array, table: jax.Array) -> jax.Array:
        # Local shapes: x [B/data, T, D], table [V/vocabulary, D].
        logits = kernels.table_product(x.reshape(-1, x.shape[-1]), table)
        return logits.reshape(*x.shape[:-1], -1)

    if mesh is None:
        return local(x, table)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P(data, None, None), P(vocabulary, None)),
        out_specs=P(data, None, vocabulary),
        check_vma=False,
    )(x, table)


def local_groups(weight: Any, spec: P, mesh: Mesh) -> tuple[Any, Any]:
    """Return a weight of any kind, and its specs for shard_map, so that a shard has its own scales.

    spec: that of the matrix [..., I, O]. Scales that do not divide as their rows do are repeated.
    """
    if not isinstance(weight, QuantizedWeight8bit):
        return weight, spec
    rows = spec[-2]
    # As released, on eight key/value heads and several devices for each: one group for these, whole
    # on each. To repeat it in all layers would cost more than it is.
    first = rows[0] if isinstance(rows, tuple) else rows
    if weight.scales.shape[-2] != axis_size(mesh, first):
        weight = split_groups(weight, axis_size(mesh, rows))
    return weight, QuantizedWeight8bit(spec, scales_spec(spec, weight.scales.shape, mesh))
