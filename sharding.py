"""Device meshes and where each parameter lies on them: a table of rules, and `constrain`.

Model code is written as for one device. It calls `constrain` at the few places where the layout is
a decision; without a mesh that does nothing. Only what a compiler cannot split by itself (the
mixture of experts and the cache write) runs inside `shard_map`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from quantization import QuantizedWeight8bit

DATA_AXIS = "data"
MODEL_AXIS = "model"

Rules = Sequence[tuple[str, P]]


def make_mesh(
    local_mesh_config: tuple[int, int] = (1, 1),
    between_hosts_config: tuple[int, int] = (1, 1),
) -> Mesh:
    """Return a (data, model) mesh.

    local_mesh_config: (data, model) sizes among the devices of one host.
    between_hosts_config: (data, model) sizes among hosts; the mesh's axes are the products.

    On one host a mesh smaller than the machine takes its first devices. Raises ValueError if an
    axis is not positive, if there are too few devices, or if the hosts do not fit.
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
    grid = blocks.reshape(*between_hosts_config, *local_mesh_config)  # [hosts_d, hosts_m, d, m]
    shape = [between_hosts_config[i] * local_mesh_config[i] for i in range(2)]
    return Mesh(grid.transpose(0, 2, 1, 3).reshape(shape), (DATA_AXIS, MODEL_AXIS))


def split_over_hosts(
    data: int, model: int, hosts: int, per_host: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return local_mesh_config and between_hosts_config, as in `make_mesh`, of a whole mesh.

    data, model: the mesh over all hosts. hosts, per_host: how many there are, and the devices of
    each, all of which are used. The model axis, along which every layer talks, stays within a host
    as far as it can. One host takes any mesh, as `make_mesh` does. Raises ValueError if the mesh
    is not as large as the hosts together.
    """
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


def axis_size(mesh: Mesh | None, axis: str) -> int:
    """Return the number of devices along a mesh axis: 1 without a mesh."""
    return 1 if mesh is None else mesh.shape[axis]


def constrain(x: jax.Array, mesh: Mesh | None, *spec: str | None) -> jax.Array:
    """Lay `x` out as `spec` says, one mesh axis or None a dimension; without a mesh do nothing."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))


def from_host(tree: Any, mesh: Mesh | None) -> Any:
    """Return numpy arrays as what a jitted step can take.

    They go to the device, unless there are several processes: an array on the device of one is not
    legal on the mesh of all, but a numpy array is, as long as each process has the same.
    """
    return tree if mesh is not None and mesh.is_multi_process else jax.device_put(tree)


def readable(tree: Any, mesh: Mesh | None) -> Any:
    """Lay results out so that every process can read them: whole on each, if there are several."""
    if mesh is None or not mesh.is_multi_process:
        return tree
    return jax.tree.map(lambda x: constrain(x, mesh), tree)


def match_rule(rules: Rules, name: str) -> P:
    """Return the spec of the first rule whose pattern is found in the parameter's name.

    Raises ValueError when no rule matches: a parameter is never replicated by oversight.
    """
    for pattern, spec in rules:
        if re.search(pattern, name):
            return spec
    raise ValueError(f"no partition rule matches the parameter {name!r}; add one to the table")


def parameter_specs(shapes: Mapping[str, Mapping[str, Any]], rules: Rules) -> dict[str, Any]:
    """Return the PartitionSpec of every array of a two-level parameter tree.

    The rules speak of one layer; stacked parameters get None for their leading layer axis. Scales
    take their weight's spec, with None where their axis has size 1.
    """

    def of(name: str, leaf: Any) -> Any:
        rule = match_rule(rules, name)
        spec = P(*(None,) * (len(leaf.shape) - len(rule)), *rule)
        if not isinstance(leaf, QuantizedWeight8bit):
            return spec
        scales = P(*(a if n > 1 else None for a, n in zip(spec, leaf.scales.shape, strict=True)))
        return QuantizedWeight8bit(spec, scales)

    return {
        module: {name: of(f"{module}/{name}", leaf) for name, leaf in leaves.items()}
        for module, leaves in shapes.items()
    }


def named_shardings(specs: Any, mesh: Mesh) -> Any:
    """Turn a tree of PartitionSpecs into the NamedShardings of a mesh."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
