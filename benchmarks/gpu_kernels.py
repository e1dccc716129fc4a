"""Every GPU kernel, and the plain form that it must equal, as cases for gpu.py.

Dimension letters: `M` tokens, `B` sequences, `D` model width, `F` width of an expert, `E` experts,
`A` experts of a token, `S` positions of a cache, `K` key/value heads, `H` head width, `V`
vocabulary, `L` layers.

The limits: kernel and plain form round the same values at the same places. A float32 result is a
sum of up to 6,144 exact products, or of a few other operations, in another order: some 1e-6, and
one rounding to bfloat16 would make it 1e-3. A value rounded to bfloat16 differs if its sum was near
the middle between two neighbours, which are up to 2^-7 apart; it does so for few values. In a layer
such differences go through five more roundings.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from grok1.execution import Execution
from grok1.kernels.gpu import attention, decode_attention, draw, products, router
from grok1.kernels.gpu import layer as gpu_layer
from grok1.kernels.sorted_experts import sorted_copies
from grok1.ops import cache, mixture
from grok1.ops.cache import CacheIndex, KVMemory
from grok1.ops.fused_layer import LAYER_NAMES, LayerStep, LayerWeights
from grok1.ops.numbers import uniform_numbers
from grok1.ops.quantization import Params, StackedWeight, matmul
from grok1.serving.sampling import TOP_K, SampleSettings
from model import DecoderLayer, LanguageModelConfig, RMSNorm

FLOAT32, BFLOAT16, LAYER = 1e-4, 2e-3, 1e-2  # the largest relative errors; see above
DRAWS = 2  # arrays of logits that a chain of draws uses in turn
NUCLEUS = 0.9
MOE = "linear", "linear_v", "linear_1"
Caches = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """A kernel and its plain form, for some number of tokens.

    kernel, plain: called with the index of a layer, int32 []; if `positions` > 0, the caches of
    keys and values; the inputs; and the weights. They return a result; with caches the kernel
    returns these as well, updated in place. weights: stacks of all layers. limit: the largest
    relative error. share: the part of the experts that is read. positions: of a layer's caches that
    are read. operations: other than with the weights. layers: how many there are, None for those of
    the model. seen: (result, *inputs) -> what is compared of it. by_token: take the median of the
    tokens' errors.
    """

    kernel: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: tuple[Any, ...]
    weights: Any
    limit: float
    share: float = 1.0
    positions: int = 0
    operations: float = 0.0
    layers: int | None = None
    seen: Callable[..., Any] = lambda result, *_: result
    by_token: bool = False


class Sizes(NamedTuple):
    """What the cases are made of.

    config, params: the model of one rank. sequences: of the caches. vocabulary: of the whole model,
    from which tokens are drawn.
    """

    config: LanguageModelConfig
    params: Params
    sequences: int
    vocabulary: int

    def stack(self, module: str, name: str = "w") -> Any:
        """Return a parameter of all layers."""
        return self.params[f"transformer/decoder_layer/{module}"][name]

    def experts(self, *names: str) -> list[Any]:
        """Return matrices of the experts, of all layers."""
        return [self.stack(f"moe/{name}") for name in names]

    def new_caches(self) -> Caches:
        """Return keys and values bfloat16 [L, C, S, K, H]; those of each layer are larger."""
        model = self.config.model
        shape = self.sequences, self.config.sequence_len, model.num_kv_heads, model.key_size

        def fill(key: jax.Array) -> jax.Array:
            factors = 1 + jnp.arange(model.num_layers) / model.num_layers
            numbers = jax.random.normal(key, shape) * factors[:, None, None, None, None]
            return numbers.astype(jnp.bfloat16)

        return tuple(map(jax.jit(fill), jax.random.split(jax.random.key(0))))

    def bytes(self, case: Case, result: Any) -> float:
        """Return the least bytes that a call reads and writes."""
        model = self.config.model
        found = sum(x.nbytes for x in jax.tree.leaves((case.inputs, result)))
        if case.layers:
            found -= case.inputs[0].nbytes * (1 - 1 / case.layers)
        for stack in jax.tree.leaves(case.weights):
            own = stack.size * stack.dtype.itemsize / model.num_layers
            found += own * (case.share if _of_experts(stack) else 1)
        return found + 4 * case.positions * model.num_kv_heads * model.key_size

    def operations(self, case: Case, tokens: int) -> float:
        """Return the operations of a call, of which products with weights are most."""
        found, chosen = case.operations, self.config.model.num_selected_experts
        for stack in jax.tree.leaves(case.weights):
            if stack.dtype == jnp.int8:
                rows = tokens * (chosen if _of_experts(stack) else 1)
                found += 2 * rows * math.prod(stack.shape[-2:])
        return found


def _of_experts(stack: jax.Array) -> bool:
    return stack.ndim == 4


def cases(own: Sizes, batches: tuple[int, ...], prompt: int) -> Iterator[tuple[str, int, Case]]:
    """Yield each kernel's name, number of tokens and case: of each batch, and of a prompt."""
    both = route, side_by_side, output_product, mix, fused_layer
    few = gated, expert_sum, write_and_attend, draw_token
    many = grouped_gated, grouped_product, attend_cached
    for tokens, others in (*((batch, few) for batch in batches), (prompt, many)):
        for make in (*both, *others):
            yield make.__name__, tokens, make(own, tokens)


def normal(*shape: int, dtype: Any = jnp.bfloat16) -> np.ndarray:
    """Return normally distributed numbers, the same for each shape."""
    return np.random.default_rng(sum(shape)).standard_normal(shape, np.float32).astype(dtype)


def choices(own: Sizes, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return random gates float32 [M, A] and the index of their experts, int32 [M, A]."""
    model, rng = own.config.model, np.random.default_rng(tokens)
    order = np.argsort(rng.uniform(size=(tokens, model.num_experts)), axis=1)
    index = order[:, : model.num_selected_experts].astype(np.int32)
    return rng.uniform(0.1, 0.5, index.shape).astype(np.float32), index


def used(own: Sizes, index: np.ndarray) -> float:
    """Return the share of the experts that some token has chosen."""
    return len(np.unique(index)) / own.config.model.num_experts


def is_used(index: jax.Array, experts: int) -> jax.Array:
    """Return which tokens have chosen each expert: index [M, A] -> bool [E, M, 1]."""
    return jnp.any(index == jnp.arange(experts)[:, None, None], axis=2)[..., None]


# ------------------------------------------------------------------------------------- the router


def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Apply `model.RMSNorm` to x [M, D], with a scale [D]."""
    norm: Any = hk.without_apply_rng(hk.transform(lambda x: RMSNorm("norm")(x)))
    return norm.apply({"norm": {"scale": scale}}, x)


def route(own: Sizes, tokens: int) -> Case:
    """The norms around the residual, and the router; of several tokens the last one is masked."""
    chosen = own.config.model.num_selected_experts
    h = normal(2, tokens, own.config.model.emb_size, dtype=np.float32)
    scales = own.stack("rms_norm_1", "scale"), own.stack("rms_norm_2", "scale")

    def kernel(layer: Any, h: Any, valid: Any, weights: Any) -> Any:
        scales, matrix = weights
        return router.route(h[0], h[1], scales, matrix, layer, valid, chosen, jnp.bfloat16)

    def plain(layer: Any, h: Any, valid: Any, weights: Any) -> Any:
        scales, matrix = jax.tree.map(lambda w: w[layer], weights)
        new = h[0] + rms_norm(h[1], scales[0])
        x = rms_norm(new, scales[1])
        gates, index = mixture.top_k(jax.nn.softmax(matmul(x, matrix), axis=-1), chosen)
        index = jnp.where(valid[:, None], index, matrix.shape[1])
        return new, x.astype(jnp.bfloat16), gates, index

    return Case(
        kernel=kernel,
        plain=plain,
        inputs=(h, np.arange(tokens) < max(1, tokens - 1)),
        weights=(scales, own.stack("router")),
        limit=BFLOAT16,
    )


# --------------------------------------------------------------------------------- int8 products


def side_by_side(own: Sizes, tokens: int) -> Case:
    """The products of queries, keys and values."""

    def plain(layer: Any, x: Any, weights: Any) -> Any:
        return jnp.concatenate([matmul(x, StackedWeight(w, layer)) for w in weights], axis=1)

    return Case(
        kernel=lambda layer, x, weights: products.side_by_side(x, weights, layer),
        plain=plain,
        inputs=(normal(tokens, own.config.model.emb_size),),
        weights=[own.stack(f"multi_head_attention/{name}") for name in ("query", "key", "value")],
        limit=FLOAT32,
    )


def output_product(own: Sizes, tokens: int) -> Case:
    """The output product of attention."""
    weight = own.stack("multi_head_attention/linear")
    return Case(
        kernel=lambda layer, x, weight: products.side_by_side(x, [weight], layer),
        plain=lambda layer, x, weight: matmul(x, StackedWeight(weight, layer)),
        inputs=(normal(tokens, weight.shape[1]),),
        weights=weight,
        limit=FLOAT32,
    )


def mix(own: Sizes, tokens: int) -> Case:
    """The whole mixture."""
    gates, index = choices(own, tokens)

    def kernel(layer: Any, x: Any, gates: Any, index: Any, weights: Any) -> Any:
        return products.mix(x, weights, layer, gates, index)

    def plain(layer: Any, x: Any, gates: Any, index: Any, weights: Any) -> Any:
        params = {n: {"w": StackedWeight(w, layer)} for n, w in zip(MOE, weights, strict=True)}
        return mixture.chosen_experts(params, x[None], gates[None], index[None])[0]

    return Case(
        kernel=kernel,
        plain=plain,
        inputs=(normal(tokens, own.config.model.emb_size), gates, index),
        weights=own.experts(*MOE),
        limit=BFLOAT16,
        share=used(own, index),
    )


def every_expert(layer: jax.Array, x: jax.Array, *weights: Any) -> jax.Array:
    """Multiply x [M, I], or [E, M, I], with every expert's matrix -> float32 [E, M, O], or more.

    With two matrices, a gate and a value, return `gelu(x @ gate) * (x @ value)` in the dtype of x.
    """
    found = []
    for e in range(weights[0].shape[1]):
        rows, own = x if x.ndim == 2 else x[e], [_matrix(w, layer, e) for w in weights]
        y, *value = [matmul(rows, w) for w in own]
        found.append((jax.nn.gelu(y) * value[0]).astype(x.dtype) if value else y)
    return jnp.stack(found)


def _matrix(weight: Any, layer: jax.Array, expert: int) -> Any:
    return jax.tree.map(lambda w: w[layer, expert], weight)


def gated(own: Sizes, tokens: int) -> Case:
    """The first products of the experts of few tokens; those that nobody chose are not compared."""
    _, index = choices(own, tokens)
    return Case(
        kernel=lambda layer, x, index, w: products.gated(x, w[0], w[1], layer, index),
        plain=lambda layer, x, _, weights: every_expert(layer, x, *weights),
        inputs=(normal(tokens, own.config.model.emb_size), index),
        weights=own.experts(*MOE[:2]),
        limit=BFLOAT16,
        share=used(own, index),
        seen=lambda y, _, index: jnp.where(is_used(index, len(y)), y, 0),
    )


def expert_sum(own: Sizes, tokens: int) -> Case:
    """The last product of the experts of few tokens."""
    (gates, index), (weight,) = choices(own, tokens), own.experts(MOE[2])

    def kernel(layer: Any, x: Any, gates: Any, index: Any, weight: Any) -> Any:
        return products.expert_sum(x, weight, layer, gates, index)

    def plain(layer: Any, x: Any, gates: Any, index: Any, weight: Any) -> Any:
        return mixture.gated_sum(every_expert(layer, x, weight)[:, None], gates[None], index[None])

    return Case(
        kernel=kernel,
        plain=plain,
        inputs=(normal(weight.shape[1], tokens, weight.shape[2]), gates, index),
        weights=weight,
        limit=FLOAT32,
        share=used(own, index),
    )


def grouped_gated(own: Sizes, tokens: int) -> Case:
    """The first products of the experts of many tokens."""
    return _grouped(own, tokens, own.experts(*MOE[:2]), BFLOAT16)


def grouped_product(own: Sizes, tokens: int) -> Case:
    """The last product of the experts of many tokens."""
    return _grouped(own, tokens, own.experts(MOE[2]), FLOAT32)


def _grouped(own: Sizes, tokens: int, weights: list[Any], limit: float) -> Case:
    _, index = choices(own, tokens)
    copies = jax.device_get(sorted_copies(jnp.asarray(index), own.config.model.num_experts))
    rows = tokens if len(weights) > 1 else index.size  # the last product has a row for each copy

    def kernel(layer: Any, x: Any, _: Any, copies: Any, weights: Any) -> Any:
        return products.grouped_product(x, weights, layer, *copies)

    def plain(layer: Any, x: Any, index: Any, _: Any, weights: Any) -> Any:
        every = every_expert(layer, x, *weights)  # [E, M or M * A, O]
        row = np.arange(index.size) // (index.size // len(x))
        return every[index.ravel(), row]

    return Case(
        kernel=kernel,
        plain=plain,
        inputs=(normal(rows, weights[0].shape[2]), index, copies),
        weights=weights,
        limit=limit,
        share=used(own, index),
    )


# ------------------------------------------------------------------------------------- attention


def write_and_attend(own: Sizes, batch: int) -> Case:
    """Attention of one token each to a full cache, whose last position is new."""
    model, last = own.config.model, own.config.sequence_len - 1
    queries, scale = model.num_q_heads, model.attn_output_multiplier
    heads = queries + 2 * model.num_kv_heads
    where = np.full(batch, last, np.int32), np.ones(batch, np.int32), np.arange(batch)

    def kernel(layer: Any, caches: Caches, heads: Any, mask: Any, where: Any, _: Any) -> Any:
        index = CacheIndex(layer, *where)
        keys, values = caches
        out, *new = decode_attention.write_and_attend(heads, keys, values, mask, scale, index)
        return (out, *(each[layer, where[2], last] for each in new)), tuple(new)

    def plain(layer: Any, caches: Caches, heads: Any, mask: Any, where: Any, _: Any) -> Any:
        query, *new = jnp.split(heads, [queries, queries + model.num_kv_heads], axis=1)
        query = query.reshape(batch, 1, model.num_kv_heads, -1, model.key_size)
        keys, values = (
            each[layer][None, :batch].at[0, :, last].set(rows)
            for each, rows in zip(caches, new, strict=True)
        )
        filled, mask = sum(where[:2]), mask[:, None]
        out = cache.attend_cached(query, keys, values, mask, scale, jnp.int32(0), filled)
        return (out.reshape(batch, -1, model.key_size), *new)

    return Case(
        kernel=kernel,
        plain=plain,
        inputs=(normal(batch, heads, model.key_size), np.ones((batch, last + 1), bool), where),
        weights=(),
        limit=BFLOAT16,
        positions=batch * (last + 1),
    )


def attend_cached(own: Sizes, tokens: int) -> Case:
    """Attention of the last tokens of a full context."""
    model, size = own.config.model, own.config.sequence_len
    heads = model.num_kv_heads, model.num_q_heads // model.num_kv_heads, model.key_size
    mask = np.arange(size) <= size - tokens + np.arange(tokens)[:, None]
    scale = model.attn_output_multiplier

    def kernel(layer: Any, caches: Caches, query: Any, mask: Any, where: Any, _: Any) -> Any:
        (keys, values), (filled, sequence) = caches, where
        arrays = query, keys, values, mask, scale, layer, filled, sequence
        return attention.attend_cached(*arrays), caches

    def plain(layer: Any, caches: Caches, query: Any, mask: Any, where: Any, _: Any) -> Any:
        keys, values = caches
        return cache.attend_cached(query, keys, values, mask, scale, layer, *where)

    return Case(
        kernel=kernel,
        plain=plain,
        inputs=(normal(1, tokens, *heads), mask[None], (np.array([size]), np.array([0]))),
        weights=(),
        limit=BFLOAT16,
        positions=size,
        operations=4.0 * model.num_q_heads * model.key_size * int(mask.sum()),
    )


# ------------------------------------------------------------------------------- tokens and layers


def draw_token(own: Sizes, batch: int) -> Case:
    """The draw from the best 90 %; every second sequence takes the most probable token."""
    logits = 2 * normal(DRAWS, batch, own.vocabulary)
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(1), batch)))
    temperature = (1 - np.arange(batch) % 2).astype(np.float32)

    def kernel(layer: Any, logits: Any, keys: Any, temperature: Any, _: Any) -> Any:
        allowed, p = jnp.ones(logits.shape[1:], bool), jnp.full(batch, NUCLEUS, jnp.float32)
        settings = SampleSettings(temperature, p, allowed, jnp.ones(batch, bool))
        return draw.draw_token(keys, logits[layer], allowed, settings, temperature, TOP_K)

    return Case(
        kernel=kernel,
        plain=plain_draw,
        inputs=(logits.astype(np.float32), keys, temperature),
        weights=(),
        limit=1e-6,
        layers=DRAWS,
    )


def plain_draw(layer: Any, logits: Any, keys: Any, temperature: Any, _: Any) -> Any:
    """Invert the cumulative sum of the sorted weights, in float64."""
    logits, uniform = logits[layer], uniform_numbers(keys)
    ids = jnp.argsort(-logits, axis=1, stable=True).astype(jnp.int32)
    with jax.enable_x64(True):
        best = jnp.take_along_axis(logits, ids, axis=1).astype(jnp.float64)
        greedy = (temperature == 0)[:, None]
        weights = jnp.exp((best - best[:, :1]) / jnp.where(greedy, 1, temperature[:, None]))
        weights = jnp.where(greedy & (jnp.arange(best.shape[1]) > 0), 0, weights)
        before = jnp.cumsum(weights, axis=1) - weights
        mass = np.float64(np.float32(NUCLEUS)) * jnp.sum(weights, axis=1, keepdims=True)
        weights = jnp.where(before < mass, weights, 0)
        total = jnp.sum(weights, axis=1, keepdims=True)
        drawn = jnp.sum(jnp.cumsum(weights, axis=1) <= uniform * total, axis=1, keepdims=True)
        probs = jnp.take_along_axis(weights / total, drawn, axis=1), (weights / total)[:, :TOP_K]
        token = jnp.take_along_axis(ids, drawn, axis=1)
        return token, ids[:, :TOP_K], jnp.concatenate(probs, axis=1).astype(jnp.float32)


def fused_layer(own: Sizes, tokens: int) -> Case:
    """A whole layer: of single tokens after half a context, or the first tokens of a prompt.

    A token whose second and third expert are nearly as probable may get the other one.
    """
    model, size = own.config.model, own.config.sequence_len
    batch, chunk = (1, tokens) if tokens > products.FEW else (tokens, 1)
    start = np.full(batch, size // 2 if chunk == 1 else 0, np.int32)
    where = start, np.full(batch, chunk, np.int32), np.arange(batch, dtype=np.int32)
    mask = np.arange(size) <= start[:, None, None] + np.arange(chunk)[:, None]

    def kernel(layer: Any, caches: Caches, h: Any, mask: Any, where: Any, weights: Any) -> Any:
        valid = jnp.ones(h.shape[:2], bool)
        step = LayerStep(CacheIndex(layer, *where), mask, cache.last_seen(mask), valid)
        weights = LayerWeights(*weights)
        return gpu_layer.fused_layer(weights, h, caches, step, model, jnp.bfloat16, lambda x: x)

    def plain(layer: Any, caches: Caches, h: Any, mask: Any, where: Any, weights: Any) -> Any:
        def module(*arrays: Any) -> Any:
            return DecoderLayer(model, dtype=jnp.bfloat16, execution=Execution())(*arrays)

        params: dict[str, Any] = {}
        for path, weight in zip(LAYER_NAMES, weights, strict=True):
            name, _, leaf = f"decoder_layer/{path}".rpartition("/")
            params[name] = {leaf: jax.tree.map(lambda w: w[layer], weight)}
        (keys, values), (start, length, sequence) = (each[layer][None] for each in caches), where
        memory = KVMemory(keys, values, start, length, sequence, jnp.int32(0))
        transformed: Any = hk.without_apply_rng(hk.transform(module))
        return transformed.apply(params, h, mask, jnp.ones(h.shape[:2], bool), memory)[0]

    share = 1 - (1 - model.num_selected_experts / model.num_experts) ** tokens
    weights = [own.stack(*path.rsplit("/", 1)) for path in LAYER_NAMES]
    return Case(
        kernel=kernel,
        plain=plain,
        inputs=(normal(batch, chunk, model.emb_size, dtype=np.float32), mask, where),
        weights=weights,
        limit=LAYER,
        share=share,
        positions=batch * (int(start[0]) + chunk),
        by_token=True,
    )
