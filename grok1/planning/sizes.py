"""Sizes and costs that follow from the shapes of a model's arrays, and how a mesh splits them.

Sizes are in bytes, and per device unless stated otherwise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import jax

from grok1.formats import layout
from grok1.formats.pickle_file import nbytes
from grok1.ops.quantization import QuantizedWeight, Shapes
from grok1.parallel.sharding import (
    AnyMesh,
    SpecTree,
    abstract_mesh,
    named_shardings,
    parameter_specs,
)
from grok1.serving.steps import device_bytes, memory_specs, new_memory, stored_shapes

if TYPE_CHECKING:
    from model import LanguageModelConfig

Tree = TypeVar("Tree")
Sizes = tuple[int, int]  # of the mesh: (data, model)

KINDS = ("attention", "experts", "embedding", "norms and router", "scales")


def mesh_of(config: LanguageModelConfig, sizes: Sizes) -> AnyMesh:
    """Return the mesh of these sizes, without devices."""
    return abstract_mesh(*sizes, num_kv_heads=config.model.num_kv_heads)


def kind_of(module: str) -> str:
    """Return the kind of a module's parameters, one of KINDS, except for their scales."""
    if "multi_head_attention" in module:
        return "attention"
    if "norm" in module or "router" in module:
        return "norms and router"
    return "embedding" if "embed" in module else "experts"


def by_kind(tree: Shapes, size: Callable[[jax.ShapeDtypeStruct], int]) -> dict[str, int]:
    """Add up `size(array)` over a parameter tree, by kind."""
    sizes = dict.fromkeys(KINDS, 0)
    for module, leaves in tree.items():
        for leaf in leaves.values():
            if isinstance(leaf, QuantizedWeight):
                sizes["scales"] += size(leaf.scales)
                leaf = leaf.weight
            sizes[kind_of(module)] += size(leaf)
    return sizes


def parameter_count(config: LanguageModelConfig) -> int:
    """Return the number of parameters, without scales."""
    count = by_kind(config.param_shapes(), lambda array: math.prod(array.shape))
    return sum(count.values()) - count["scales"]


def on_device(tree: Tree, specs: SpecTree, mesh: AnyMesh) -> Tree:
    """Return the shape of each array's shard on one device."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(s.shard_shape(x.shape), x.dtype),
        tree,
        named_shardings(specs, mesh),
    )


def weight_bytes(
    config: LanguageModelConfig, sizes: Sizes, stored: Shapes | None = None
) -> dict[str, int]:
    """Return the bytes of the parameters on one device, by kind."""
    return by_kind(_own_weights(config, sizes, stored), nbytes)


def _own_weights(config: LanguageModelConfig, sizes: Sizes, stored: Shapes | None) -> Shapes:
    mesh, shapes = mesh_of(config, sizes), stored_shapes(config, stored)
    return on_device(shapes, parameter_specs(shapes, config.partition_rules(mesh), mesh), mesh)


def cache_bytes(config: LanguageModelConfig, sizes: Sizes, batch: int) -> int:
    """Return the bytes of the memory of `batch` sequences on one device."""
    memory = jax.eval_shape(lambda: new_memory(config=config, batch=batch))
    own = on_device(memory, memory_specs(config), mesh_of(config, sizes))
    return sum(map(nbytes, jax.tree.leaves(own)))


def fixed_bytes(
    config: LanguageModelConfig, sizes: Sizes, batch: int, stored: Shapes | None = None
) -> int:
    """Return the bytes of parameters and cache on one device."""
    return device_bytes(config, mesh_of(config, sizes), batch, stored)


def loading_bytes(config: LanguageModelConfig, sizes: Sizes, stored: Shapes | None = None) -> int:
    """Return a bound on the host memory of loading, in addition to the parameters on devices.

    Four times the largest part of a file that a device holds, plus 256 MiB; see loading.py.
    """
    mesh, shapes = mesh_of(config, sizes), stored or config.param_shapes()
    own = on_device(shapes, parameter_specs(shapes, config.partition_rules(mesh), mesh), mesh)
    slices = [
        nbytes(array) // (array.shape[0] if module.startswith(layout.STACKED) else 1)
        for module, leaves in own.items()
        for array in jax.tree.leaves(leaves)
    ]
    return 4 * max(slices) + (256 << 20)


def token_cost(
    config: LanguageModelConfig,
    sizes: Sizes,
    batch: int,
    bandwidth: float,
    stored: Shapes | None = None,
) -> dict[str, float]:
    """Return the cost of a decode step when the context is full.

    flops: floating-point operations per token, on all devices together: two for each weight that
    the token uses, and for each product in its attention.
    bytes: what one device must read in a decode step: its part of the cache and of all weights, of
    experts only those that `batch` tokens are expected to use if all are equally likely. seconds:
    the minimum time to read them.
    """
    read = bytes_to_read(config, sizes, batch // sizes[0], batch, stored)
    return {
        "flops": token_flops(config),
        "bytes": read,
        "seconds": read / bandwidth,
        "bandwidth": bandwidth,
    }


def token_flops(config: LanguageModelConfig) -> float:
    """Return the floating-point operations of a token that attends to a full cache."""
    model = config.model
    weights = by_kind(config.param_shapes(), lambda array: math.prod(array.shape))
    met = weights["attention"] + weights["experts"] * experts_used(config, 1) + weights["embedding"]
    if model.num_experts > 1:
        met += model.num_layers * model.emb_size * model.num_experts  # the router
    scores = model.num_layers * model.num_q_heads * model.key_size * config.sequence_len
    return 2 * met + 2 * 2 * scores


def experts_used(config: LanguageModelConfig, tokens: int) -> float:
    """Return the share of the experts that so many tokens use, if all are equally likely."""
    model = config.model
    if model.num_experts <= 1:
        return 1.0
    return 1 - (1 - model.num_selected_experts / model.num_experts) ** tokens


def bytes_to_read(
    config: LanguageModelConfig, sizes: Sizes, tokens: int, batch: int, stored: Shapes | None
) -> float:
    """Return what one device must read in a step: its part of the weights, and full caches.

    tokens: that choose experts, on each part of the data axis. batch: sequences whose caches are
    read, over the entire mesh.
    """
    own = _own_weights(config, sizes, stored)
    experts = {module: leaves for module, leaves in own.items() if kind_of(module) == "experts"}
    whole, of_experts = (sum(map(nbytes, jax.tree.leaves(tree))) for tree in (own, experts))
    unused = of_experts * (1 - experts_used(config, tokens))
    return whole - unused + cache_bytes(config, sizes, batch)


@dataclasses.dataclass(frozen=True)
class Work:
    """The least that a device has to do in a step.

    bytes: that it must read. operations: floating-point operations. experts: the share of the
    experts that the step uses.
    """

    bytes: float
    operations: float
    experts: float


def least_work(
    config: LanguageModelConfig, sizes: Sizes, tokens: int, batch: int, stored: Shapes | None
) -> Work:
    """Return the least work of a step on one device; for the arguments, see `bytes_to_read`.

    Its operations are counted as those of a decode step: every token attends to a full cache and
    gets logits.
    """
    return Work(
        bytes=bytes_to_read(config, sizes, tokens, batch, stored),
        operations=token_flops(config) * tokens / sizes[1],
        experts=experts_used(config, tokens),
    )
