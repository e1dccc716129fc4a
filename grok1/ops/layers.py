"""The loop over layers: one function, scanned over parameters that have a leading layer axis."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax

from grok1.inspection import Probe, asked, asking
from grok1.ops.cache import KVMemory
from grok1.ops.quantization import Parameter, Params, StackedWeight, Weights

Result = TypeVar("Result")
Arrays = dict[str, jax.Array]
Carry = tuple[jax.Array, Arrays, Arrays]  # h, the caches, and what is captured
Layer = Callable[[jax.Array, KVMemory | None], tuple[jax.Array, KVMemory | None]]
FusedLayer = Callable[[Weights, jax.Array, KVMemory], tuple[jax.Array, KVMemory]]


def transform_stacked(
    function: Callable[..., Result], count: int, *example: jax.Array | None
) -> tuple[Params, Callable[..., Result]]:
    """Transform a function of Haiku modules to a pure one, with `count` sets of parameters.

    example: arguments of the function, for initialization.
    Returns the parameters, which belong to the calling module, each with a leading axis of `count`;
    and `apply(params, *arguments)`, which takes one set.
    """
    transformed: Any = hk.without_apply_rng(hk.transform(function))
    init, apply = transformed
    keys = jax.random.split(hk.next_rng_key(), count) if hk.running_init() else None
    axes = (0, *(None for _ in example))
    with asking(None):
        params: Params = hk.transparent_lift(jax.vmap(init, in_axes=axes))(keys, *example)
    return params, apply


def scan_layers(
    layer_fn: Layer,
    num_layers: int,
    h: jax.Array,
    memory: KVMemory | None,
    *,
    keep_stacked: Callable[[str, Parameter], bool],
    unroll: int = 1,
    choose_fused: Callable[[Params], FusedLayer | None] = lambda _: None,
) -> tuple[jax.Array, KVMemory | None]:
    """Apply `layer_fn`, a function of Haiku modules, `num_layers` times to h and the memory.

    layer_fn: (h, memory) -> (h, memory), where the memory's `layer` says which layer this is.
    memory: of all layers; its caches are updated in place, and its `step` is unchanged.
    keep_stacked: (module name, weight) -> whether a layer gets a weight as a StackedWeight of all
    layers instead of its own slice. unroll: layers per iteration. choose_fused: parameters -> a
    function that computes the same as `layer_fn` of weights that are all kept stacked, or None. It
    is not asked with hooks, for a capture or without a memory.

    Captured arrays are stacked over all layers, or over those that the call selects.
    """
    params, apply = transform_stacked(layer_fn, num_layers, h, None)
    if hk.running_init():
        return h, memory
    probe = asked() or Probe()
    fused = None if memory is None or probe.capture or probe.hooks else choose_fused(params)
    if fused is not None and memory is not None:
        return _fused_layers(fused, params, num_layers, h, memory, unroll)
    kept, own = _split(params, keep_stacked)

    def one_layer(index: jax.Array, own: Params, h: jax.Array, caches: Arrays) -> Carry:
        within = probe.within(index)
        given = None if memory is None else memory._replace(**caches, layer=index)
        with asking(within):
            h, new = apply(_join(own, kept, index), h, given)
        caches = {} if new is None else {"k": new.k, "v": new.v}
        return h, caches, within.found

    selected = probe.layers if probe.capture else None

    def body(carry: Carry, xs: tuple[jax.Array, Params]) -> tuple[Carry, Arrays]:
        h, caches, chosen = carry
        index, own = xs
        h, caches, found = one_layer(index, own, h, caches)
        if selected is None:
            return (h, caches, chosen), found
        return (h, caches, _put(chosen, found, index, selected)), {}

    caches = {} if memory is None else {"k": memory.k, "v": memory.v}
    chosen: dict[str, jax.Array] = {}
    if selected is not None:
        first = jax.tree.map(lambda w: w[0], own)
        shapes = jax.eval_shape(one_layer, jnp.int32(0), first, h, caches)[2]
        chosen = {n: jnp.zeros((len(selected), *x.shape), x.dtype) for n, x in shapes.items()}
    (h, caches, chosen), found = lax.scan(
        body, (h, caches, chosen), (jnp.arange(num_layers), own), unroll=min(unroll, num_layers)
    )
    probe.found.update(chosen or found)
    return h, None if memory is None else memory._replace(**caches)


def _fused_layers(
    fused: FusedLayer,
    params: Params,
    num_layers: int,
    h: jax.Array,
    memory: KVMemory,
    unroll: int,
) -> tuple[jax.Array, KVMemory]:
    """Apply a fused layer `num_layers` times to h and the memory.

    On a GPU this is quicker than a scan, whose first operation in each layer reads its index.
    """

    def layer(index: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        h, k, v = carry
        h, new = fused(_join({}, params, index), h, memory._replace(k=k, v=v, layer=index))
        return h, new.k, new.v

    h, k, v = lax.fori_loop(0, num_layers, layer, (h, memory.k, memory.v), unroll=unroll)
    return h, memory._replace(k=k, v=v)


def _split(params: Params, keep_stacked: Callable[[str, Parameter], bool]) -> tuple[Params, Params]:
    """Split a parameter tree into the weights kept stacked and those sliced per layer."""
    kept: dict[str, dict[str, Parameter]] = {}
    own: dict[str, dict[str, Parameter]] = {}
    for module, leaves in params.items():
        for name, leaf in leaves.items():
            part = kept if keep_stacked(module, leaf) else own
            part.setdefault(module, {})[name] = leaf
    return kept, own


def _join(own: Params, kept: Params, layer: jax.Array) -> Weights:
    """Undo `_split` for one layer."""
    return {
        module: {
            **own.get(module, {}),
            **{name: StackedWeight(w, layer) for name, w in kept.get(module, {}).items()},
        }
        for module in {**own, **kept}
    }


def _put(
    chosen: Mapping[str, jax.Array],
    found: Mapping[str, jax.Array],
    layer: jax.Array,
    selected: Sequence[int],
) -> dict[str, jax.Array]:
    """Store a layer's captured arrays at its index in the selected layers, if it is selected."""
    matches = jnp.array(selected) == layer
    index = jnp.argmax(matches)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        before = lax.dynamic_index_in_dim(old, index, 0, False)
        new = jnp.where(jnp.any(matches), new, before)
        return lax.dynamic_update_index_in_dim(old, new, index, 0)

    return {name: put(chosen[name], array) for name, array in found.items()}
