"""How a model is run: on which devices, and with which implementations of its operations.

The modules in model.py define Grok-1 and call an Execution for the rest. Without a mesh, and with
plain kernels, each of its methods computes the function of the same name in grok1/ops: to follow
the mathematics of the model, read those functions.

Dimension letters as in model.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from grok1.checks import require, require_integers
from grok1.kernels import dispatch
from grok1.ops import mixture
from grok1.ops.cache import (
    CacheIndex,
    KVMemory,
    cache_index,
    caches,
    check_room,
    last_seen,
    read_rows,
    with_caches,
)
from grok1.ops.derivatives import no_reverse
from grok1.ops.fused_layer import LAYER_NAMES, LayerStep, LayerWeights, layer_weights
from grok1.ops.layers import FusedLayer, Layer, scan_layers
from grok1.ops.operations import Operations
from grok1.ops.quantization import (
    Parameter,
    Params,
    QuantizedWeight8bit,
    Weight,
    Weights,
    matmul,
    sliced,
    split_groups,
)
from grok1.parallel.sharding import (
    DATA_AXIS,
    MODEL_AXIS,
    REPLICA_AXIS,
    AnyMesh,
    Axes,
    all_model_axes,
    axis_size,
    constrain,
    local_groups,
    match_rule,
    on_shards,
    sum_over,
)

if TYPE_CHECKING:
    from model import LanguageModelConfig, Router, TransformerConfig

Split = Literal["inputs", "outputs", "kv_outputs"]
DISPATCH = "dynamic", "static", "all"


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a model is run. Raises ValueError that names an invalid field.

    mesh: the devices, or None for one. data_axis, model_axis: the names of the mesh axes. Batches
    are split over the data axis; heads, hidden widths and the vocabulary over the model axis.
    shard_activations: split the residual stream over the model axis as well. That takes less
    memory and more, smaller exchanges between devices.
    kernels: the implementation of the operations: "plain", for any platform; "xla_cpu", JAX that
    XLA compiles to fast code for a CPU; "cpu" and "gpu", compiled kernels, without gradients.
    expert_dispatch: how a mixture computes the chosen experts. "dynamic" loops over the non-empty
    blocks of tokens, without a reverse-mode gradient; "static", for training, loops over the
    largest possible number and skips empty ones; "all" computes every expert for every token.
    scan_unroll: layers per iteration of the compiled loop.
    router: called with num_selected_experts to make a layer's router, for example a subclass of
    `model.Router`; None: `model.Router`.
    """

    mesh: AnyMesh | None = None
    data_axis: str = DATA_AXIS
    model_axis: str = MODEL_AXIS
    shard_activations: bool = False
    kernels: str = "plain"
    expert_dispatch: str = "dynamic"
    scan_unroll: int = 1
    router: Callable[[int], Router] | None = None

    def __post_init__(self):
        mesh, names, how = self.mesh, dispatch.NAMES, self.expert_dispatch
        is_mesh = mesh is None or isinstance(mesh, Mesh | AbstractMesh)
        require(is_mesh, "mesh", "a jax.sharding.Mesh, or None", mesh)
        auto = mesh is None or set(mesh.axis_types) <= {AxisType.Auto}
        require(auto, "mesh", "axes of AxisType.Auto, as runner.make_mesh makes them", mesh)
        for field in ("data_axis", "model_axis"):
            axis = getattr(self, field)
            require(isinstance(axis, str), field, "the name of a mesh axis", axis)
        require(self.kernels in names, "kernels", f"one of {names}", self.kernels)
        require(how in DISPATCH, "expert_dispatch", f"one of {DISPATCH}", how)
        plain = self.kernels == "plain" or how == "dynamic"
        require(plain, "kernels", '"plain" unless expert_dispatch is "dynamic"', self.kernels)
        require_integers(self, 1, "scan_unroll")
        flag = self.shard_activations
        require(isinstance(flag, bool), "shard_activations", "true or false", flag)
        given = self.router is None or callable(self.router)
        require(given, "router", "a subclass of Router, or None", self.router)

    @property
    def operations(self) -> Operations:
        """The implementations of the operations on one device."""
        return dispatch.operations(self.kernels)

    @property
    def _all_model_axes(self) -> Axes:
        return all_model_axes(self.mesh, self.model_axis)

    @property
    def _shared_axis(self) -> str | None:
        """The mesh axis along which devices share a key/value head, if there is one."""
        return REPLICA_AXIS if self.mesh is not None and REPLICA_AXIS in self.mesh.shape else None

    @property
    def data_size(self) -> int:
        """The number of parts into which a batch is split."""
        return axis_size(self.mesh, self.data_axis)

    # ------------------------------------------------------------------------------ activations

    def residual(self, x: jax.Array) -> jax.Array:
        """Lay out [B, T, D] as it is between blocks: split over D if `shard_activations`."""
        last = self._all_model_axes if self.shard_activations else None
        return constrain(x, self.mesh, self.data_axis, None, last)

    def block_input(self, x: jax.Array) -> jax.Array:
        """Lay out [B, T, D] as a block reads it: all of D on every device of the model axis."""
        return constrain(x, self.mesh, self.data_axis, None, None)

    # --------------------------------------------------------------------------------- products

    def matmul(self, x: jax.Array, weight: Weight, split: Split | None = None) -> jax.Array:
        """`x [..., I] @ weight [I, O]` -> float32 [..., O].

        split: which axis of the weight, if any, is split over devices. x is then [B, T, I].
        """
        every = self._all_model_axes
        contracted = every if split == "inputs" else None
        produced = {"outputs": every, "kv_outputs": self.model_axis}.get(split or "")
        if self.mesh is not None and not self.operations.takes_stacked:
            # XLA splits plain products by itself; scale groups must allow it.
            if contracted is not None:
                x = constrain(x, self.mesh, self.data_axis, None, contracted)
            y = matmul(x, split_groups(sliced(weight), axis_size(self.mesh, contracted)))
            return self._laid_out(y, produced)
        weight, spec = local_groups(weight, P(contracted, produced), self.mesh)

        def local(x: jax.Array, weight: Weight) -> jax.Array:
            return sum_over(self.operations.matmul(x, weight), self.mesh, contracted)

        in_specs = P(self.data_axis, None, contracted), spec
        out_specs = P(self.data_axis, None, produced)
        return self._laid_out(on_shards(local, self.mesh, in_specs, out_specs)(x, weight), produced)

    def _laid_out(self, y: jax.Array, produced: Axes) -> jax.Array:
        """Lay out the result [B, T, O] of a product; an unsplit one is a block's output."""
        if produced is None:
            return self.residual(y)
        return constrain(y, self.mesh, self.data_axis, None, produced)

    def lookup(self, table: jax.Array, tokens: jax.Array) -> jax.Array:
        """Return the rows of table [V, D] for tokens [B, T] -> [B, T, D], in the table's dtype."""
        mesh, every = self.mesh, self._all_model_axes
        if mesh is None:
            return table[tokens]

        def local(table: jax.Array, tokens: jax.Array) -> jax.Array:
            # One device has a token's row, the others add zero. XLA would gather the table.
            own = tokens - lax.axis_index(every) * table.shape[0]
            rows = table.at[own].get(mode="fill", fill_value=0, wrap_negative_indices=False)
            return sum_over(rows, mesh, every)

        in_specs = P(every, None), P(self.data_axis, None)
        return on_shards(local, mesh, in_specs, P(self.data_axis, None, None))(table, tokens)

    def logits(self, x: jax.Array, table: jax.Array) -> jax.Array:
        """`x [B, T, D] @ table.T`, table [V, D] of x's dtype -> float32 [B, T, V]."""

        def local(x: jax.Array, table: jax.Array) -> jax.Array:
            y = self.operations.table_product(x.reshape(-1, x.shape[-1]), table)
            return y.reshape(*x.shape[:-1], -1)

        every = self._all_model_axes
        in_specs = P(self.data_axis, None, None), P(every, None)
        return on_shards(local, self.mesh, in_specs, P(self.data_axis, None, every))(x, table)

    # -------------------------------------------------------------------------------- attention

    def write(self, memory: KVMemory, k: jax.Array, v: jax.Array) -> KVMemory:
        """Write new rows k, v [B, T, K, H] at the memory's `step` -> the memory, `step` unchanged.

        Raises ValueError if they do not fit the memory's length.
        """
        check_room(memory, k.shape[1])

        def local(cache: jax.Array, new: jax.Array, index: CacheIndex) -> jax.Array:
            return self.operations.write_rows(cache, new, *self._local(index, cache))

        cache, rows = self._cache_specs
        write = on_shards(local, self.mesh, (cache, rows, self._index_specs), cache)
        index, (keys, values) = cache_index(memory, k.shape[1]), caches(memory)
        return with_caches(memory, write(keys, k, index), write(values, v, index))

    def attend_cached(
        self, query: jax.Array, memory: KVMemory, mask: jax.Array, multiplier: float
    ) -> jax.Array:
        """Attend from query [B, T, K, G, H] to what the memory holds, including the new rows.

        mask: bool [B or 1, T or 1, S or 1] -> float32 [B, T, K, G, H]. Equal to `model.attend`, but
        reads only filled positions.
        """

        def local(
            query: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, index: CacheIndex
        ) -> jax.Array:
            layer, start, length, sequence = self._local(index, k)
            where = layer, start + length, sequence
            return self.operations.attend_cached(query, k, v, mask, multiplier, *where)

        batch, rows = query.shape[:2]
        mask = jnp.broadcast_to(mask, (batch, *mask.shape[1:]))
        cache, _ = self._cache_specs
        queries = P(self.data_axis, None, self.model_axis, self._shared_axis, None)
        in_specs = queries, cache, cache, P(self.data_axis), self._index_specs
        attend = on_shards(local, self.mesh, in_specs, queries)
        return no_reverse(attend(query, *caches(memory), mask, cache_index(memory, rows)))

    def read(self, memory: KVMemory, rows: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the results of `cache.read_rows`, in the activation dtype."""
        k, v, filled = read_rows(memory, rows)
        return self.operations.view(k), self.operations.view(v), filled

    def _local(self, index: CacheIndex, cache: jax.Array) -> CacheIndex:
        """Make sequence indices relative to a device's own, within `on_shards`."""
        if self.mesh is None or index.sequence is None:
            return index
        first = lax.axis_index(self.data_axis) * cache.shape[1]
        return index._replace(sequence=index.sequence - first)

    @property
    def _index_specs(self) -> CacheIndex:
        one: Any = P()  # in place of an array, as in every tree of specs
        rows: Any = P(self.data_axis)
        return CacheIndex(one, rows, rows, rows)

    @property
    def _cache_specs(self) -> tuple[P, P]:
        """The specs of a cache [L, C, S, K, H] and of rows [B, T, K, H]."""
        rows = P(self.data_axis, None, self.model_axis, None)
        return P(None, *rows), rows

    # ------------------------------------------------------------------------------- the mixture

    def mixture(
        self, params: Weights, x: jax.Array, gates: jax.Array, index: jax.Array
    ) -> jax.Array:
        """Return `sum_a gates[a] * expert_{index[a]}(x)` for each token, float32 [B, T, D].

        params: of all experts, as in grok1/ops/mixture.py; x [B, T, D] in the activation dtype;
        gates, index [B, T, A], index being E for a masked token. Each part of the data axis sorts
        its own tokens; the result is summed once over the model axis.
        """
        forms: dict[str, Callable[..., jax.Array]] = {
            "dynamic": self.operations.mixture,
            "static": mixture.differentiable_experts,
            "all": mixture.all_experts,
        }
        every, scatter = self._all_model_axes, self.shard_activations and self.mesh is not None

        def local(params: Weights, x: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
            out = forms[self.expert_dispatch](params, x, gates, index)
            if scatter:
                return lax.psum_scatter(out, every, scatter_dimension=2, tiled=True)
            return sum_over(out, self.mesh, every)

        by_column, by_row = P(None, None, every), P(None, every, None)
        split = {"linear": by_column, "linear_v": by_column, "linear_1": by_row}
        pairs = {n: local_groups(params[n]["w"], spec, self.mesh) for n, spec in split.items()}
        params = {name: {"w": weight} for name, (weight, _) in pairs.items()}
        specs = {name: {"w": spec} for name, (_, spec) in pairs.items()}
        tokens = P(self.data_axis, None, None)
        out = P(self.data_axis, None, every if scatter else None)
        run = on_shards(local, self.mesh, (specs, tokens, tokens, tokens), out)
        y = run(params, x, gates, index)
        return no_reverse(y) if self.expert_dispatch == "dynamic" else y

    # -------------------------------------------------------------------------------- the layers

    def scan_layers(
        self,
        layer_fn: Layer,
        num_layers: int,
        h: jax.Array,
        memory: KVMemory | None,
        choose_fused: Callable[[Params], FusedLayer | None],
    ) -> tuple[jax.Array, KVMemory | None]:
        """Apply `layer_fn`, (h, memory) -> (h, memory), with each layer's parameters in turn.

        choose_fused: as returned by `fused_layer`.
        """

        def layer(h: jax.Array, memory: KVMemory | None) -> tuple[jax.Array, KVMemory | None]:
            h, memory = layer_fn(h, memory)
            return self.residual(h), memory

        if memory is not None:
            stored = memory.k.dtype
            memory = _recast(memory, self.operations.cache_dtype(stored))
        h, memory = scan_layers(
            layer, num_layers, self.block_input(h), memory,
            keep_stacked=self._keeps_stacked, unroll=self.scan_unroll, choose_fused=choose_fused,
        )  # fmt: skip
        return h, None if memory is None else _recast(memory, stored)

    def fused_layer(
        self, config: TransformerConfig, dtype: DTypeLike, mask: jax.Array, padding_mask: jax.Array
    ) -> Callable[[Params], FusedLayer | None]:
        """Return a function: a layer's parameters -> `Operations.fused_layer` for these, or None.

        mask bool [B, T, S], padding_mask bool [B, T] and dtype: of the layer. It is None if kernels
        have no such operation, or if the weights, the router or the layout are others than its own.
        """
        has_one = self.operations.fused_layer is not None
        usual = has_one and self.router is None and not self.shard_activations

        def choose(params: Params) -> FusedLayer | None:
            weights = layer_weights(params)
            if not (usual and weights is not None and weights.quantized):
                return None
            masks = mask, last_seen(mask), padding_mask  # once, not in each layer
            return functools.partial(self._fused_layer, config, dtype, masks)

        return choose

    def _fused_layer(
        self,
        config: TransformerConfig,
        dtype: DTypeLike,
        masks: tuple[jax.Array, ...],
        params: Weights,
        h: jax.Array,
        memory: KVMemory,
    ) -> tuple[jax.Array, KVMemory]:
        """Apply `Operations.fused_layer` on the mesh; masks: the last three fields of LayerStep."""
        check_room(memory, h.shape[1])
        compute, rules = self.operations.fused_layer, config.partition_rules(self.mesh)
        found = layer_weights(params)
        assert compute is not None and found is not None
        pairs = [
            local_groups(weight.stack, P(None, *match_rule(rules, f"/{name}")), self.mesh)
            for weight, name in zip(found, LAYER_NAMES, strict=True)
        ]
        weights, specs = (LayerWeights(*each) for each in zip(*pairs, strict=True))

        def local(
            weights: LayerWeights, h: jax.Array, caches: tuple[jax.Array, ...], step: LayerStep
        ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
            index = self._local(step.memory_index, caches[0])
            if index.sequence is None:
                index = index._replace(sequence=jnp.arange(len(h), dtype=jnp.int32))
            add = functools.partial(sum_over, mesh=self.mesh, axes=self._all_model_axes)
            step = step._replace(memory_index=index)
            return compute(weights, h, caches, step, config, dtype, add)

        rows: Any = P(self.data_axis)
        cache, _ = self._cache_specs
        in_specs = specs, rows, (cache, cache), LayerStep(self._index_specs, rows, rows, rows)
        run = on_shards(local, self.mesh, in_specs, (rows, (cache, cache)))
        step = LayerStep(cache_index(memory, h.shape[1]), *masks)
        h, (k, v) = run(weights, h, caches(memory), step)
        return no_reverse(h), with_caches(memory, k, v)

    def _keeps_stacked(self, module: str, weight: Parameter) -> bool:
        """Whether a layer reads a weight in its stack: slicing would copy eight experts to use two.

        Training uses slices, since its gradients are taken with respect to them.
        """
        if "/moe/" in module:
            return self.expert_dispatch == "dynamic"
        int8 = isinstance(weight, QuantizedWeight8bit)
        return self.operations.takes_stacked and int8 and "/multi_head_attention/" in module


ONE_DEVICE = Execution()


def _recast(memory: KVMemory, dtype: DTypeLike) -> KVMemory:
    """Return the memory with its caches reinterpreted as another dtype of the same size."""
    if memory.k.dtype == dtype:
        return memory
    k, v = (lax.bitcast_convert_type(cache, dtype) for cache in (memory.k, memory.v))
    return memory._replace(k=k, v=v)


# -------------------------------------------------------------------------------- the fastest one


class Executions(NamedTuple):
    """How prefill and decode are run."""

    prefill: Execution
    decode: Execution


def fastest(config: LanguageModelConfig, mesh: AnyMesh | None, *, compiled: bool) -> Executions:
    """Return the fastest executions for prefill and decode on this platform.

    compiled: use compiled kernels, which must have been loaded. Decoding exchanges so little data
    that the number of exchanges matters: a split residual stream needs eight per layer instead of
    two. GPUs exchange fast, and their kernels compute a layer whose residual stream is not split.
    """
    kernels = dispatch.fastest(compiled=compiled)
    prefill = dataclasses.replace(config.model.execution(mesh), kernels=kernels)
    decode = dataclasses.replace(prefill, shard_activations=False)
    return Executions(decode if kernels == "gpu" else prefill, decode)
