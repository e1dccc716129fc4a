"""Check that weights, cache and captured arrays fit the free memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
from jax.sharding import AbstractMesh, Mesh

from grok1.execution import Execution
from grok1.host_memory import available_memory
from grok1.ops.quantization import Shapes
from grok1.parameters import embedding_table
from grok1.serving.likely_logits import rounded_bytes
from grok1.serving.steps import device_bytes, stored_shapes

if TYPE_CHECKING:
    from model import LanguageModelConfig


def local_device(mesh: Mesh | None) -> jax.Device:
    """Return a device of this process, from the mesh if there is one."""
    return jax.local_devices()[0] if mesh is None else mesh.local_devices[0]


def free_memory(device: jax.Device) -> int | None:
    """Return the bytes of a device's memory available to this process, or None.

    Virtual CPU devices share the memory of the host.
    """
    if device.platform == "cpu":
        return available_memory()
    limits = device.memory_stats() or {}
    limit = limits.get("bytes_limit")
    return None if limit is None else limit - limits.get("bytes_in_use", 0)


def _held_bytes(config: LanguageModelConfig, num_slots: int, stored: Shapes | None) -> int:
    """Return the bytes that are held if weights are used in place: the cache, and what is cast."""
    held = stored_shapes(config, stored)
    pairs = zip(jax.tree.leaves(stored), jax.tree.leaves(held), strict=True)
    used = sum(own.size * own.dtype.itemsize for file, own in pairs if file.dtype == own.dtype)
    return device_bytes(config, None, num_slots, stored) - used


def check_memory(
    config: LanguageModelConfig,
    execution: Execution,
    num_slots: int,
    stored: Shapes | None = None,
    in_place: bool = False,
) -> None:
    """Raise ValueError if a device has less memory than weights and cache take.

    execution: that of decode steps. stored: the types of the weights, as in `stored_shapes`.
    in_place: the files of the weights are used as memory, which can be less than they are.
    """
    mesh = execution.mesh
    assert not isinstance(mesh, AbstractMesh)
    device = local_device(mesh)
    free = free_memory(device)
    if device.platform == "cpu":
        # Virtual devices share the memory of the host, and replicated weights.
        needed, where, more = device_bytes(config, None, num_slots, stored), "here", ""
        needed += rounded_bytes(embedding_table(stored_shapes(config, stored)), execution)
        if in_place:
            needed = _held_bytes(config, num_slots, stored)
    else:
        needed, where = device_bytes(config, mesh, num_slots, stored), "on each device"
        more = ", or let jax take more of it with XLA_PYTHON_CLIENT_MEM_FRACTION"
    if free is not None and needed > free:
        raise ValueError(
            f"weights and cache take {needed / 2**30:.1f} GiB {where}, and {free / 2**30:.1f} "
            f"GiB are free; use a mesh with a longer model axis, or a shorter context{more}: "
            "python run.py --plan shows what fits"
        )
