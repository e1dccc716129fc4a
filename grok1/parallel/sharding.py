"""Device meshes, and how parameters are split over them: a table of rules, and `constrain`.

`constrain` is called at the few places where the layout is a decision; without a mesh it does
nothing. Only what the compiler cannot split by itself (the mixture of experts, the cache and
kernels) runs inside `shard_map`, through `on_shards`.

The model axis can be larger than the number of key/value heads. The mesh then splits it in two:
model (one key/value head each) and replica (the devices that share a head). Keys, values, their
cache and scale groups that cannot be divided further are split over model, the rest over both.
"""

import functools
import itertools
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from grok1.ops.quantization import (
    ParameterShape,
    QuantizedWeight,
    Shapes,
    StackedWeight,
    split_groups,
)

Function = TypeVar("Function", bound=Callable[..., Any])
Tree = TypeVar("Tree")

DATA_AXIS = "data"
MODEL_AXIS = "model"
REPLICA_AXIS = "replica"

# One dimension of a PartitionSpec: a mesh axis, several of them, or None.
Axes = str | tuple[str, ...] | None
AnyMesh = Mesh | AbstractMesh
Rules = Sequence[tuple[str, P]]
SpecTree = Any  # PartitionSpecs in the structure of what they are for
# Of a parameter tree; for a quantized weight, those of its two arrays.
Specs = Mapping[str, Mapping[str, P | QuantizedWeight]]
Shardings = Mapping[str, Mapping[str, jax.sharding.Sharding | QuantizedWeight]]


def make_mesh(
    local_mesh_config: tuple[int, int] = (1, 1),
    between_hosts_config: tuple[int, int] = (1, 1),
    *,
    num_kv_heads: int | None = None,
) -> Mesh:
    """Return a (data, model) mesh, or a (data, model, replica) one.

    local_mesh_config: (data, model) sizes among the devices of one host.
    between_hosts_config: (data, model) sizes among hosts; the mesh's axes are the products.
    num_kv_heads: of the model. A model axis that is a larger multiple of it is split in two: model,
        of this size, and replica. Devices along replica share a key/value head.

    On one host, a mesh with fewer devices than the machine uses the first ones. Raises ValueError
    if an axis is not positive, if there are too few devices, or if the number of hosts differs.
    """
    sizes = (*local_mesh_config, *between_hosts_config)
    if len(sizes) != 4 or any(size < 1 for size in sizes):
        raise ValueError(
            "a mesh has two positive axes (data, model), got "
            f"{local_mesh_config} on a host and {between_hosts_config} between hosts"
        )
    hosts: dict[int, list[jax.Device]] = {}
    for device in jax.devices():
        hosts.setdefault(device.process_index, []).append(device)
    per_host, num_hosts = int(np.prod(local_mesh_config)), int(np.prod(between_hosts_config))
    if num_hosts != len(hosts):
        raise ValueError(
            f"between_hosts_config {between_hosts_config} means {num_hosts} hosts, but "
            f"{len(hosts)} are running"
        )
    available = min(len(devices) for devices in hosts.values())
    if per_host > available or (num_hosts > 1 and per_host != available):
        raise ValueError(
            f"a mesh of {local_mesh_config[0]},{local_mesh_config[1]} needs {per_host} devices, "
            f"but this machine has {available}; use data x model = {available}, or on a CPU start "
            f"with XLA_FLAGS=--xla_force_host_platform_device_count={per_host}"
        )
    blocks = np.array([devices[:per_host] for _, devices in sorted(hosts.items())])
    blocks = blocks.reshape(*between_hosts_config, *local_mesh_config)  # [hosts_d, hosts_m, d, m]
    data, model = (between_hosts_config[i] * local_mesh_config[i] for i in range(2))
    grid = blocks.transpose(0, 2, 1, 3).reshape(data, model)
    axes = mesh_axes(data, model, num_kv_heads)
    return Mesh(grid.reshape(*axes.values()), tuple(axes), axis_types=auto(axes))


def auto(axes: Collection[str]) -> tuple[AxisType, ...]:
    """Return the type of these mesh axes: XLA chooses shardings, as constraints on arrays ask.

    jax 0.12 makes another type by default, with which each operation would have to name them.
    """
    return (AxisType.Auto,) * len(axes)


def split_over_hosts(
    data: int, model: int, hosts: int, per_host: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return local_mesh_config and between_hosts_config of a mesh over all hosts; see `make_mesh`.

    data, model: the mesh over all hosts. hosts, per_host: the number of hosts, and of devices per
    host, all of which are used. The model axis, along which every layer communicates, stays within
    a host as far as possible. On one host any mesh is allowed, as in `make_mesh`. Raises ValueError
    if an axis is not positive, or the mesh does not have all devices of all hosts.
    """
    if min(data, model) < 1:
        raise ValueError(f"a mesh needs at least one device along each axis, got {data},{model}")
    if hosts == 1:
        return (data, model), (1, 1)
    if data * model != hosts * per_host:
        raise ValueError(
            f"a mesh of {data},{model} has {data * model} devices, but {hosts} processes of "
            f"{per_host} have {hosts * per_host}; choose --mesh DATA,MODEL so that "
            f"DATA x MODEL = {hosts * per_host}"
        )
    local_model = math.gcd(model, per_host)
    local_data = per_host // local_model
    return (local_data, local_model), (data // local_data, model // local_model)


def mesh_axes(data: int, model: int, num_kv_heads: int | None = None) -> dict[str, int]:
    """Return the names and sizes of the axes of a mesh; see `make_mesh`."""
    if num_kv_heads is not None and model > num_kv_heads and model % num_kv_heads == 0:
        return {DATA_AXIS: data, MODEL_AXIS: num_kv_heads, REPLICA_AXIS: model // num_kv_heads}
    return {DATA_AXIS: data, MODEL_AXIS: model}


def abstract_mesh(data: int, model: int, num_kv_heads: int | None = None) -> AbstractMesh:
    """Return the mesh of `make_mesh` without devices: for shapes and shardings, not for data."""
    axes = mesh_axes(data, model, num_kv_heads)
    return AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=auto(axes))


def axis_size(mesh: AnyMesh | None, axes: Axes) -> int:
    """Return the number of devices along one or more mesh axes; 1 without a mesh."""
    if mesh is None or axes is None:
        return 1
    return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))


def all_model_axes(mesh: AnyMesh | None, model_axis: str) -> str | tuple[str, str]:
    """Return the axes that split all widths except keys and values, with replica if present."""
    replicated = mesh is not None and REPLICA_AXIS in mesh.shape
    return (model_axis, REPLICA_AXIS) if replicated else model_axis


def constrain(x: jax.Array, mesh: AnyMesh | None, *spec: Axes) -> jax.Array:
    """Constrain the sharding of `x` to `spec`, one entry per dimension; no-op without a mesh."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


def on_shards(
    function: Function, mesh: AnyMesh | None, in_specs: SpecTree, out_specs: SpecTree
) -> Function:
    """Return `function` under `shard_map`; without a mesh, `function` itself."""
    if mesh is None:
        return function
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def connect(mesh: Mesh) -> None:
    """Run a collective over each combination of mesh axes, which connects the processes.

    With gloo, the processes must connect within 30 seconds of each other; later, for a step, they
    may be further apart.
    """
    names = mesh.axis_names
    for count in range(1, len(names) + 1):
        for axes in itertools.combinations(names, count):
            total = on_shards(functools.partial(jax.lax.psum, axis_name=axes), mesh, P(), P())
            jax.block_until_ready(jax.jit(total)(np.zeros([], np.float32)))


def sum_over(x: jax.Array, mesh: AnyMesh | None, axes: Axes) -> jax.Array:
    """Sum over the devices along mesh axes, within `on_shards`; without a mesh, x."""
    return x if mesh is None or axes is None else jax.lax.psum(x, axes)


def readable(tree: Tree, mesh: AnyMesh | None) -> Tree:
    """Replicate results if there are several processes, so that each can read them."""
    if mesh is None or not mesh.is_multi_process:
        return tree
    return jax.tree.map(lambda x: constrain(x, mesh), tree)


def partition_rules(model_axis: str, mesh: AnyMesh | None = None) -> Rules:
    """Return (pattern, spec) pairs, without the layer axis; the first match applies.

    mesh: the mesh of the specs, if it may have a replica axis.
    """
    model = all_model_axes(mesh, model_axis)
    return (
        (r"in_out_embed/embeddings$", P(model, None)),
        (r"multi_head_attention/(key|value)/w$", P(None, model_axis)),
        (r"multi_head_attention/query/w$", P(None, model)),
        (r"multi_head_attention/linear/w$", P(model, None)),
        (r"moe/(linear|linear_v)/w$", P(None, None, model)),
        (r"moe/linear_1/w$", P(None, model, None)),
        (r"decoder_layer/(linear|linear_v)/w$", P(None, model)),
        (r"decoder_layer/linear_1/w$", P(model, None)),
        (r"router/\w+$", P()),
        (r"rms_norm(_\d)?/scale$", P()),
    )


def match_rule(rules: Rules, name: str) -> P:
    """Return the spec of the first rule whose pattern is found in the parameter's name.

    Raises ValueError if no rule matches, so that no parameter is replicated by mistake.
    """
    for pattern, spec in rules:
        if re.search(pattern, name):
            return spec
    raise ValueError(f"no partition rule matches the parameter {name!r}; add one to the table")


def scales_spec(spec: P, shape: Sequence[int], mesh: AnyMesh | None = None) -> P:
    """Return the spec of the scales, of this shape, of a weight with `spec`.

    It is the weight's spec, except that dimensions of size 1 get None, and others only the leading
    mesh axes that divide the size.
    """

    def of(axes: Axes, size: int) -> Axes:
        if size == 1 or axes is None:
            return None
        fitting = (axes,) if isinstance(axes, str) else axes
        while size % axis_size(mesh, fitting):
            fitting = fitting[:-1]
        return fitting if len(fitting) > 1 else next(iter(fitting), None)

    return P(*(of(axes, size) for axes, size in zip(spec, shape, strict=True)))


def local_groups(weight: Any, spec: P, mesh: AnyMesh | None) -> tuple[Any, SpecTree]:
    """Return a weight of any type and its specs for `on_shards`, so that each shard has its scales.

    spec: of the matrix [..., I, O]. Scales that cannot be split like the rows are repeated.
    """
    if mesh is None:
        return weight, None
    if isinstance(weight, StackedWeight):
        stack, specs = local_groups(weight.stack, P(None, *spec), mesh)
        return StackedWeight(stack, weight.layer), StackedWeight(specs, P())
    if not isinstance(weight, QuantizedWeight):
        return weight, spec
    rows = spec[-2]
    # The released scale groups, with several devices per key/value head: these devices share one
    # group, replicated. Repeating it in all layers would cost more memory.
    first = rows[0] if isinstance(rows, tuple) else rows
    if weight.scales.shape[-2] != axis_size(mesh, first):
        weight = split_groups(weight, axis_size(mesh, rows))
    return weight, type(weight)(spec, scales_spec(spec, weight.scales.shape, mesh))


def parameter_specs(shapes: Shapes, rules: Rules, mesh: AnyMesh | None = None) -> Specs:
    """Return the PartitionSpec of every array of a two-level parameter tree.

    The rules are for one layer; stacked parameters get None for their leading layer axis. Scales
    are split as in `scales_spec`; without a mesh, as if their groups could be split like the rows.
    """

    def of(name: str, leaf: ParameterShape) -> P | QuantizedWeight:
        rule = match_rule(rules, name)
        spec = P(*(None,) * (len(leaf.shape) - len(rule)), *rule)
        if not isinstance(leaf, QuantizedWeight):
            return spec
        return type(leaf)(spec, scales_spec(spec, leaf.scales.shape, mesh))

    return {
        module: {name: of(f"{module}/{name}", leaf) for name, leaf in leaves.items()}
        for module, leaves in shapes.items()
    }


def named_shardings(specs: SpecTree, mesh: AnyMesh) -> Any:
    """Convert a tree of PartitionSpecs to NamedShardings of a mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
