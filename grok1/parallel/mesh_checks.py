"""Checks of whether a model can be split over a mesh."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grok1.checks import require
from grok1.parallel.sharding import AnyMesh, all_model_axes, axis_size

if TYPE_CHECKING:
    from grok1.execution import Execution
    from model import LanguageModelConfig, TransformerConfig


def check_mesh(config: TransformerConfig, mesh: AnyMesh, **others: int) -> None:
    """Raise ValueError unless the mesh has both axes and its model axis divides every width.

    others: further widths that the model axis must divide, by name.
    """
    for axis in (config.data_axis, config.model_axis):
        require(axis in mesh.shape, "mesh", f"an axis named {axis!r}", mesh.axis_names)
    size = axis_size(mesh, all_model_axes(mesh, config.model_axis))
    for name, width in {**_split_widths(config, size), **others}.items():
        if width % size:
            raise ValueError(
                f"mesh: a model axis of {size} does not divide {name} = {width}; "
                f"use one of {model_axis_sizes(config, **others)}"
            )
    heads, kv_heads = mesh.shape[config.model_axis], config.num_kv_heads
    require(
        kv_heads % heads == 0 and heads in (size, kv_heads),
        "mesh",
        f"a model axis of {min(size, kv_heads)}, one key/value head each, and the "
        "rest on a replica axis, as from make_mesh(..., num_kv_heads=...)",
        dict(mesh.shape),
    )


def model_axis_sizes(config: TransformerConfig, **others: int) -> list[int]:
    """Return the sizes of a model axis (model times replica) that `check_mesh` accepts."""
    return [
        size
        for size in range(1, config.num_q_heads + 1)
        if all(n % size == 0 for n in (*_split_widths(config, size).values(), *others.values()))
    ]


def check_execution(config: LanguageModelConfig, execution: Execution) -> None:
    """Raise ValueError unless the mesh of `execution`, if any, divides the model's widths."""
    mesh, model = execution.mesh, config.model
    if mesh is None:
        return
    axes, own = (execution.data_axis, execution.model_axis), (model.data_axis, model.model_axis)
    require(axes == own, "execution", f"the configuration's axes {own}", axes)
    others = {"vocab_size": config.vocab_size}
    if execution.shard_activations:
        others["emb_size"] = model.emb_size
    check_mesh(model, mesh, **others)


def check_devices(model_axis_sizes: list[int], data: int, model: int, available: int) -> None:
    """Raise ValueError, with the meshes that fit the model, if a mesh needs too many devices.

    model_axis_sizes: those that the model allows. available: the number of devices here.
    """
    if data * model > available:
        sizes = (n for n in model_axis_sizes if available % n == 0)
        fitting = " ".join(f"{available // n},{n}" for n in sizes)
        raise ValueError(
            f"a mesh of {data},{model} needs {data * model} devices, but this machine has "
            f"{available}, on which the model can use the meshes {fitting}; on a CPU start "
            f"with XLA_FLAGS=--xla_force_host_platform_device_count={data * model}"
        )


def _split_widths(config: TransformerConfig, size: int) -> dict[str, int]:
    """Return the widths that a model axis of this size must divide, by name."""
    # With more devices than key/value heads, several share one and divide its query heads.
    shared = size > config.num_kv_heads and size % config.num_kv_heads == 0
    heads = "num_q_heads" if shared else "num_kv_heads"
    widths = {heads: getattr(config, heads), "the expert width": config.ffn_size}
    if config.shard_activations:
        widths["emb_size"] = config.emb_size
    return widths
