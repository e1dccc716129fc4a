"""Grok-1: configuration and Haiku modules.

Dimension letters, one meaning each in every file:

    B batch   T query positions   S key positions   D model width (emb_size)   V vocabulary
    N query heads   K key/value heads   G = N / K queries per key/value head   H head width
    E experts   A experts used per token   F expert hidden width   L layers
    I, O widths of the input and output of a product

The layers are stacked: parameters keep the released names with `transformer/decoder_layer` in place
of `transformer/decoder_layer_0` ... `_63`, and have a leading layer axis. One layer body is scanned
over them, so that 64 layers compile as fast as one.

Precision. In bfloat16 mode the inputs of matrix products, except the router's, are rounded to
bfloat16. Products return float32, and everything else is float32: the residual stream, norms,
rotary phases, router, scores, softmax, gates and logits. In float32 mode everything is float32. The
key/value cache has the dtype passed to `init_memory`. Weights are float or int8
(`QuantizedWeight8bit`) in either mode.

An `Execution` defines how the model is run: on which devices, with which kernels. Its methods
compute (`matmul`, `mixture`, `attend_cached`), or only lay out an array over devices
(`block_input`). `tap(site, x)` returns x, unless a caller's hook changes it; see
grok1/inspection.py.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.typing import DTypeLike

from grok1 import config_checks, parameters
from grok1.checks import require
from grok1.execution import ONE_DEVICE, Execution, Split
from grok1.inspection import CAPTURE_SITES, Captured, Hook, Site, asking, make_probe, tap, tapped
from grok1.ops.cache import KVMemory, Memory, advance, prepare, step_on, write_rows
from grok1.ops.layers import transform_stacked
from grok1.ops.mixture import gated_sum, top_k
from grok1.ops.quantization import Params, QuantizedWeight8bit, Shapes, matmul, product, sliced
from grok1.parallel import mesh_checks
from grok1.parallel.sharding import DATA_AXIS, MODEL_AXIS, AnyMesh, Rules, partition_rules
from grok1.strict_json import Json

__all__ = [
    "CAPTURE_SITES", "Captured", "DecoderLayer", "DenseBlock", "Execution", "InOutEmbed",
    "KVMemory", "LanguageModel", "LanguageModelConfig", "LanguageModelOutput", "Linear", "MHABlock",
    "MHAOutput", "Memory", "MoELayer", "MultiHeadAttention", "QuantizedWeight8bit", "RMSNorm",
    "RotaryEmbedding", "Router", "RouterOutput", "Transformer", "TransformerConfig", "attend",
    "ffn_size", "grok_1", "rotate_half", "write_rows",
]  # fmt: skip

# ------------------------------------------------------------------------------- configuration


def ffn_size(emb_size: int, widening_factor: float) -> int:
    """Return F, the expert width: 2/3 of the widened width, rounded up to a multiple of 8."""
    size = int(widening_factor * emb_size) * 2 // 3
    return size + -size % 8


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the decoder stack. Raises ValueError that names an invalid field.

    shard_activations, data_axis, model_axis: as in Execution.
    """

    emb_size: int
    key_size: int
    num_q_heads: int
    num_kv_heads: int
    num_layers: int
    widening_factor: float = 4.0
    attn_output_multiplier: float = 1.0
    shard_activations: bool = False
    num_experts: int = 1
    num_selected_experts: int = 1
    data_axis: str = DATA_AXIS
    model_axis: str = MODEL_AXIS

    def __new__(cls, *_: object, **fields: object):
        """Reject fields that belong to Execution."""
        config_checks.reject_moved_field(fields)
        return super().__new__(cls)

    def __post_init__(self):
        config_checks.check_transformer(self)

    @property
    def ffn_size(self) -> int:
        """F, the hidden width of one expert."""
        return ffn_size(self.emb_size, self.widening_factor)

    def partition_rules(self, mesh: AnyMesh | None = None) -> Rules:
        """Return (pattern, spec) pairs for the parameters of one layer; the first match applies.

        mesh: the mesh they are for, if it may have a replica axis.
        """
        return partition_rules(self.model_axis, mesh)[1:]

    def check_mesh(self, mesh: AnyMesh, **others: int) -> None:
        """Raise ValueError unless the layers can be split over the mesh; see `mesh_checks`."""
        mesh_checks.check_mesh(self, mesh, **others)

    def model_axis_sizes(self, **others: int) -> list[int]:
        """Return the sizes of a model axis (model times replica) that `check_mesh` accepts."""
        return mesh_checks.model_axis_sizes(self, **others)

    def init_memory(self, batch_size: int, seq_len: int, dtype: DTypeLike = jnp.bfloat16) -> Memory:
        """Return an empty memory for `batch_size` sequences of up to `seq_len` positions.

        k, v: `dtype` [L, B, S, K, H], zero. step: int32 [B]. valid: bool [B, S].
        """
        shape = (self.num_layers, batch_size, seq_len, self.num_kv_heads, self.key_size)
        step = jnp.zeros([batch_size], jnp.int32)
        layers = KVMemory(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), step)
        return Memory(layers, valid=jnp.zeros([batch_size, seq_len], bool))

    def execution(self, mesh: AnyMesh | None = None) -> Execution:
        """Return the default execution on a mesh, or on one device."""
        return Execution(mesh, self.data_axis, self.model_axis, self.shard_activations)

    def make(
        self,
        mesh: Mesh | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        execution: Execution | None = None,
    ) -> "Transformer":
        """Return the module; call this inside `hk.transform`."""
        return Transformer(self, mesh, dtype, execution=execution)


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """Sizes of the language model. Raises ValueError that names an invalid field.

    embedding_init_scale: the random initial embedding has standard deviation
    `embedding_init_scale / sqrt(emb_size)`.
    fprop_dtype: the dtype of the activations, bfloat16 or float32.
    """

    model: TransformerConfig
    vocab_size: int = 128 * 1024
    pad_token: int = 0
    eos_token: int = 2
    sequence_len: int = 8192
    embedding_init_scale: float = 1.0
    output_multiplier_scale: float = 1.0
    embedding_multiplier_scale: float = 1.0
    fprop_dtype: DTypeLike = jnp.bfloat16

    def __post_init__(self):
        config_checks.check_language_model(self, TransformerConfig)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Json]) -> "LanguageModelConfig":
        """Build a configuration from nested plain fields, as in a checkpoint's config.json.

        Raises ValueError that names a missing, unknown or invalid field.
        """
        inner = fields.get("model")
        model = config_checks.from_fields(TransformerConfig, inner)
        return config_checks.from_fields(cls, {**fields, "model": model})

    def to_dict(self) -> dict[str, Json]:
        """Return the nested plain fields for config.json: all except `fprop_dtype`."""
        fields = dataclasses.asdict(self)
        del fields["fprop_dtype"]
        return fields

    def partition_rules(self, mesh: AnyMesh | None = None) -> Rules:
        """Return (pattern, spec) pairs for all parameters, without the leading layer axis.

        mesh: the mesh they are for, if it may have a replica axis.
        """
        return partition_rules(self.model.model_axis, mesh)

    def check_mesh(self, mesh: AnyMesh) -> None:
        """Raise ValueError unless the model can be split over the mesh; see `mesh_checks`."""
        self.model.check_mesh(mesh, vocab_size=self.vocab_size)

    def model_axis_sizes(self) -> list[int]:
        """Return the sizes of a model axis (model times replica) that `check_mesh` accepts."""
        return self.model.model_axis_sizes(vocab_size=self.vocab_size)

    def make(self, mesh: Mesh | None = None, execution: Execution | None = None) -> "LanguageModel":
        """Return the module; call this inside `hk.transform`.

        execution: how to run the module, including its mesh; None: the default on `mesh`.
        """
        execution = self.model.execution(mesh) if execution is None else execution
        given = isinstance(execution, Execution)
        require(given, "execution", "a grok1.execution.Execution, or None", execution)
        require(mesh in (None, execution.mesh), "mesh", "that of `execution`, or None", mesh)
        mesh_checks.check_execution(self, execution)
        model = self.model.make(dtype=self.fprop_dtype, execution=execution)
        return LanguageModel(model, self, execution=execution)

    def init_params(self, seed: int = 0, *, quantized: bool = False) -> Params:
        """Return random parameters: float32, or int8 with the released scale groups.

        Matrices are normal with deviation 1 / sqrt(fan-in), truncated at two deviations; norms one.
        """
        return parameters.random_params(jax.random.key(seed), config=self, quantized=quantized)

    def param_shapes(self, *, quantized: bool = True) -> Shapes:
        """Return the parameter tree with jax.ShapeDtypeStruct leaves; computes nothing."""
        return jax.eval_shape(lambda: self.init_params(quantized=quantized))

    def quantize_params(self, params: Params) -> Params:
        """Round the matrices of a float parameter tree to int8, with the released scale groups."""
        return parameters.quantize_params(self, params)

    def dequantize_params(self, params: Params, dtype: DTypeLike = jnp.float32) -> Params:
        """Return a parameter tree with float matrices in place of the int8 ones."""
        return parameters.dequantize_params(params, dtype)


def grok_1() -> LanguageModelConfig:
    """Return the published configuration: 314 billion parameters."""
    return LanguageModelConfig(
        vocab_size=128 * 1024,
        pad_token=0,
        eos_token=2,
        sequence_len=8192,
        embedding_init_scale=1.0,
        output_multiplier_scale=0.5773502691896257,
        embedding_multiplier_scale=78.38367176906169,
        model=TransformerConfig(
            emb_size=48 * 128,
            widening_factor=8,
            key_size=128,
            num_q_heads=48,
            num_kv_heads=8,
            num_layers=64,
            attn_output_multiplier=0.08838834764831845,
            shard_activations=True,
            num_experts=8,
            num_selected_experts=2,
            data_axis="data",
            model_axis="model",
        ),
    )


# ---------------------------------------------------------------------------------- basic modules


@dataclasses.dataclass(eq=False)
class Linear(hk.Module):
    """`x @ w + b`, w [I, O] float or int8.

    split: which axis of w, if any, is split over the devices of `execution`.
    """

    output_size: int
    with_bias: bool = True
    _: dataclasses.KW_ONLY
    split: Split | None = None
    execution: Execution = ONE_DEVICE
    name: str | None = None

    def __call__(self, x: Array) -> Array:
        """x [..., I] in the activation dtype -> float32 [..., O]."""
        init = hk.initializers.TruncatedNormal(1 / math.sqrt(x.shape[-1]))
        w = hk.get_parameter("w", [x.shape[-1], self.output_size], jnp.float32, init=init)
        y = self.execution.matmul(x, w, self.split)
        if self.with_bias:
            y += hk.get_parameter("b", [self.output_size], jnp.float32, init=jnp.zeros)
        return y


class RMSNorm(hk.Module):
    """`scale * x / sqrt(mean(x^2) + 1e-5)` over the last axis (Zhang and Sennrich 2019, eq. 4)."""

    def __call__(self, x: Array) -> Array:
        """x [..., D] -> float32 [..., D]."""
        x = x.astype(jnp.float32)
        scale = hk.get_parameter("scale", [x.shape[-1]], jnp.float32, init=jnp.ones)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return scale * x * lax.rsqrt(mean_square + 1e-5)


def rotate_half(x: Array) -> Array:
    """[a, b] -> [-b, a], the halves of the last axis."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-b, a], axis=-1)


@dataclasses.dataclass(eq=False)
class RotaryEmbedding(hk.Module):
    """Rotary positions, `x cos + rotate_half(x) sin` (Su et al. 2021, section 3.4, "half" form)."""

    dim: int
    name: str | None = None
    base_exponent: int = 10000

    def __call__(
        self,
        x: Array,
        seq_dim: int,
        offset: Array | int,
        const_position: int | None = None,
        t: Array | None = None,
    ) -> Array:
        """Rotate x [B, T, heads, dim], or with T at another axis `seq_dim`; keeps its dtype.

        The positions are `const_position` for all, or `t` [B, T], or 0 ... T-1 plus `offset`, a
        scalar or [B].
        """
        require(self.dim % 2 == 0, "dim", "an even width", self.dim)
        require(0 < seq_dim < x.ndim - 1, "seq_dim", f"between 1 and {x.ndim - 2}", seq_dim)
        if const_position is not None:
            positions = jnp.full([1, x.shape[seq_dim]], const_position)
        elif t is not None:
            positions = t
        else:
            positions = jnp.arange(x.shape[seq_dim]) + jnp.reshape(jnp.asarray(offset), [-1, 1])
        exponents = np.arange(0, self.dim, 2) / self.dim
        frequencies = np.tile(self.base_exponent**-exponents, 2).astype(np.float32)  # [dim]
        phase = positions.astype(jnp.float32)[..., None] * frequencies  # [B or 1, T, dim]
        phase = jnp.expand_dims(phase, [a for a in range(1, x.ndim - 1) if a != seq_dim])
        wide = x.astype(jnp.float32)
        return (wide * jnp.cos(phase) + rotate_half(wide) * jnp.sin(phase)).astype(x.dtype)


@dataclasses.dataclass(eq=False)
class InOutEmbed(hk.Module):
    """The embedding table [V, D], used for both input and output."""

    vocab_size: int
    embed_dim: int
    init_scale: float = 1.0
    name: str | None = None
    _: dataclasses.KW_ONLY
    execution: Execution = ONE_DEVICE

    @property
    def embeddings(self) -> Array:
        """The table [V, D]."""
        init = hk.initializers.RandomNormal(self.init_scale / math.sqrt(self.embed_dim))
        shape = [self.vocab_size, self.embed_dim]
        return hk.get_parameter("embeddings", shape, jnp.float32, init=init)

    def __call__(self, tokens: Array, dtype: DTypeLike = jnp.float32) -> Array:
        """Tokens int [...] -> float32 [..., D], the table rounded to `dtype`."""
        rows = self.execution.lookup(self.embeddings, tokens)
        return rows.astype(dtype).astype(jnp.float32)

    def decode(self, x: Array) -> Array:
        """x [B, T, D] -> float32 [B, T, V], `x @ embeddings.T`."""
        return self.execution.logits(x, self.embeddings.astype(x.dtype))


# ------------------------------------------------------------------------------------- attention


class MHAOutput(NamedTuple):
    """embeddings: float32 [B, T, D]; memory: the KVMemory after the new rows, or None."""

    embeddings: Array
    memory: KVMemory | None


def attend(query: Array, key: Array, value: Array, mask: Array, multiplier: float) -> Array:
    """Grouped-query attention, `softmax(cap(q k^T * multiplier)) v`, cap(s) = 30 tanh(s / 30).

    query [B, T, K, G, H], key [B, S, K, H], value [B, S, K, H'], mask bool [B, T, S] (True: may
    see) -> float32 [B, T, K, G, H']. A query that sees no key gets zero.
    """
    scores = product("btkgh,bskh->bkgts", query, key) * multiplier
    scores = 30.0 * jnp.tanh(scores / 30.0)  # the soft cap
    # No maximum is subtracted: the scores are capped.
    weights = jnp.where(mask[:, None, None], jnp.exp(scores), 0.0)  # [B, K, G, T, S]
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)
    if tapped("attention_weights"):  # captured weights sum to one; else the product is divided
        weights, total = _tap_weights(weights / total), jnp.ones_like(total)
    out = product("bkgts,bskh->btkgh", weights.astype(value.dtype), value)
    return out / jnp.moveaxis(total, 3, 1)


def _tap_weights(weights: Array) -> Array:
    """Tap weights [B, K, G, T, S] in the shape [B, N, T, S]."""
    by_head = weights.reshape(weights.shape[0], -1, *weights.shape[3:])
    return tap("attention_weights", by_head).reshape(weights.shape)


@dataclasses.dataclass(eq=False)
class MultiHeadAttention(hk.Module):
    """Grouped-query attention (Ainslie et al. 2023): query head n reads key/value head n // G."""

    num_q_heads: int
    num_kv_heads: int
    key_size: int
    _: dataclasses.KW_ONLY
    with_bias: bool = True
    value_size: int | None = None
    model_size: int | None = None
    attn_output_multiplier: float = 1.0
    data_axis: str = DATA_AXIS
    model_axis: str = MODEL_AXIS
    name: str | None = None
    execution: Execution | None = None

    def __call__(
        self,
        query: Array,
        key: Array,
        value: Array,
        mask: Array | None = None,
        kv_memory: KVMemory | None = None,
        mesh: Mesh | None = None,
    ) -> MHAOutput:
        """Attend from query [B, T, D] to key and value [B, T', D], in the activation dtype.

        mask: bool, broadcast to [B, T, S] or given as [B, 1, T, S]; True where a query may see a
        key; None: everywhere. Without `kv_memory`, S = T' and positions start at 0. With it, the
        new keys are written at its `step`, which is also their position; S is the memory's length,
        and only filled positions are visible.

        Raises ValueError if the new keys do not fit the memory's length, or if a mask [B, N, T, S]
        has N > 1.
        """
        execution = self.execution or Execution(mesh, self.data_axis, self.model_axis)
        value_size = self.value_size or self.key_size
        model_size = self.model_size or self.key_size * self.num_q_heads
        linear = functools.partial(Linear, with_bias=self.with_bias, execution=execution)

        def heads(x: Array, count: int, width: int, name: str, split: Split) -> Array:
            x = linear(count * width, split=split, name=name)(x)
            return x.reshape(*x.shape[:2], count, width)  # float32 [B, T, heads, width]

        q = heads(query, self.num_q_heads, self.key_size, "query", "outputs")
        k = heads(key, self.num_kv_heads, self.key_size, "key", "kv_outputs")
        v = heads(value, self.num_kv_heads, value_size, "value", "kv_outputs")
        start = 0 if kv_memory is None else kv_memory.step
        rotary = RotaryEmbedding(self.key_size)
        q, k = tap("queries", rotary(q, 1, start)), tap("keys", rotary(k, 1, start))
        q, k, v = (x.astype(query.dtype) for x in (q, k, tap("values", v)))
        q = q.reshape(*q.shape[:2], self.num_kv_heads, -1, self.key_size)  # [B, T, K, G, H]
        out, kv_memory = self._attend(execution, q, k, v, _one_mask(mask), kv_memory)
        out = tap("head_outputs", out.reshape(*q.shape[:2], self.num_q_heads, value_size))
        out = out.astype(query.dtype).reshape(*q.shape[:2], -1)
        return MHAOutput(linear(model_size, split="inputs", name="linear")(out), kv_memory)

    def _attend(
        self,
        execution: Execution,
        q: Array,
        k: Array,
        v: Array,
        mask: Array,
        memory: KVMemory | None,
    ) -> tuple[Array, KVMemory | None]:
        """Attend from q to the new k, v [B, T', K, H] and, with a memory, to earlier ones."""
        multiplier = self.attn_output_multiplier
        if memory is None:
            # The backward pass recomputes the weights instead of storing them.
            recomputed = jax.checkpoint(attend, static_argnums=4)
            form = attend if tapped("attention_weights") else recomputed
            return form(q, k, v, mask, multiplier), None
        memory, rows = execution.write(memory, k, v), k.shape[1]
        if not tapped("attention_weights"):
            out = execution.attend_cached(q, memory, mask, multiplier)
        else:
            k, v, filled = execution.read(memory, rows)  # [B, S, K, H] twice, [B, S]
            out = attend(q, k, v, mask & filled[:, None], multiplier)
        return out, step_on(memory, rows)


def _one_mask(mask: Array | None) -> Array:
    """Return a mask with three axes that broadcasts to [B, T, S]."""
    if mask is None:
        return jnp.ones([1, 1, 1], bool)
    if mask.ndim == 4:
        require(mask.shape[1] == 1, "mask", "one mask for all heads", mask.shape)
        return mask[:, 0]
    return mask.reshape((1,) * (3 - mask.ndim) + mask.shape)


@dataclasses.dataclass(frozen=True)
class MHABlock:
    """Attention sized by the configuration.

    It is no Haiku module: the released files have no name for it.
    """

    config: TransformerConfig
    mesh: Mesh | None = None
    execution: Execution | None = None

    def __call__(self, x: Array, mask: Array, kv_memory: KVMemory | None) -> MHAOutput:
        """x [B, T, D] in the activation dtype; the rest as in MultiHeadAttention."""
        config, execution = self.config, self.execution or self.config.execution(self.mesh)
        attention = MultiHeadAttention(
            config.num_q_heads,
            config.num_kv_heads,
            config.key_size,
            with_bias=False,
            model_size=config.emb_size,
            attn_output_multiplier=config.attn_output_multiplier,
            name="multi_head_attention",
            execution=execution,
        )
        x = execution.block_input(x)
        return attention(x, x, x, mask, kv_memory)


# ----------------------------------------------------------------------------- mixture of experts


@dataclasses.dataclass(frozen=True)
class DenseBlock:
    """The feed-forward block of one expert, or of a layer without a mixture.

    `linear_1(gelu(linear(x)) * linear_v(x))`, gelu in its tanh approximation (Shazeer 2020, eq. 6).
    Adds no module name, as in the released files.
    """

    widening_factor: float
    dtype: DTypeLike = jnp.float32
    execution: Execution = ONE_DEVICE

    def __call__(self, x: Array) -> Array:
        """x [..., D], cast to `dtype` for the products -> float32 [..., D]."""
        width, hidden_width = x.shape[-1], ffn_size(x.shape[-1], self.widening_factor)
        linear = functools.partial(Linear, with_bias=False, execution=self.execution)
        x = self.execution.block_input(x).astype(self.dtype)
        gate = jax.nn.gelu(linear(hidden_width, split="outputs", name="linear")(x))
        hidden = gate * linear(hidden_width, split="outputs", name="linear_v")(x)
        return linear(width, split="inputs", name="linear_1")(hidden.astype(self.dtype))


class RouterOutput(NamedTuple):
    """The experts chosen for each token.

    gates: float32 [..., A], their probabilities, not renormalized, zero for a masked token.
    expert_index: int32 [..., A], the experts, best first; E, no expert, for a masked token.
    probs: float32 [..., E], the softmax over all experts.
    """

    gates: Array
    expert_index: Array
    probs: Array


@dataclasses.dataclass(eq=False)
class Router(hk.Module):
    """Chooses the experts of each token, in float32.

    To use a subclass with another `logits` or `choose`, pass `Execution(..., router=Subclass)`. In
    training it may have other parameters; a checkpoint holds only `w`.
    """

    num_selected_experts: int
    name: str = "router"

    def logits(self, x: Array, num_experts: int) -> Array:
        """Return the scores [..., E] of x float32 [..., D]."""
        init = hk.initializers.TruncatedNormal(1 / math.sqrt(x.shape[-1]))
        w = hk.get_parameter("w", [x.shape[-1], num_experts], jnp.float32, init=init)
        return matmul(x, w)

    def choose(self, probs: Array) -> tuple[Array, Array]:
        """Return gates [..., A] and expert_index int32 [..., A] for probs float32 [..., E].

        As in Grok-1: the chosen probabilities are not renormalized to sum to one.
        """
        return top_k(probs, self.num_selected_experts)

    def __call__(self, inputs: Array, padding_mask: Array | None, num_experts: int) -> RouterOutput:
        """inputs [..., D], padding_mask bool [...] (False: masked) -> RouterOutput."""
        logits = tap("router_logits", self.logits(inputs.astype(jnp.float32), num_experts))
        probs = tap("router_probs", jax.nn.softmax(logits, axis=-1))
        gates, index = self.choose(probs)
        if padding_mask is not None:
            gates = jnp.where(padding_mask[..., None], gates, 0.0)
            index = jnp.where(padding_mask[..., None], index, num_experts)
        return RouterOutput(tap("expert_gates", gates), tap("expert_index", index), probs)


@dataclasses.dataclass(eq=False)
class MoELayer(hk.Module):
    """A mixture of experts; each token's output is `sum_a gate_a * expert_a(x)`.

    layer_fn: one expert, x [..., D] -> [..., D], with Haiku parameters. A DenseBlock is computed
    only for the tokens routed to it, any other function for all tokens.
    """

    num_experts: int
    layer_fn: Callable[[Array], Array]
    router: Router
    mesh: Mesh | None = None
    shard_activations: bool = False
    data_axis: str = DATA_AXIS
    model_axis: str = MODEL_AXIS
    name: str = "moe"
    _: dataclasses.KW_ONLY
    execution: Execution | None = None

    def __call__(self, inputs: Array, padding_mask: Array | None) -> Array:
        """inputs [B, T, D], padding_mask bool [B, T] (False: no expert) -> float32 [B, T, D]."""
        execution = self.execution or Execution(
            self.mesh, self.data_axis, self.model_axis, self.shard_activations
        )
        inputs = execution.block_input(inputs)
        gates, index, _ = self.router(inputs, padding_mask, self.num_experts)
        params, expert = transform_stacked(self.layer_fn, self.num_experts, inputs[:1, :1])
        if hk.running_init():
            return inputs.astype(jnp.float32)
        if isinstance(self.layer_fn, DenseBlock):
            return execution.mixture(params, inputs.astype(self.layer_fn.dtype), gates, index)
        outputs = jax.vmap(expert, in_axes=(0, None))(sliced(params), inputs)  # [E, B, T, D]
        return gated_sum(outputs.astype(jnp.float32), gates, index)


# -------------------------------------------------------------------------------------- the decoder


@dataclasses.dataclass(eq=False)
class DecoderLayer(hk.Module):
    """One layer: attention and mixture, each between two norms ("sandwich")."""

    config: TransformerConfig
    mesh: Mesh | None = None
    dtype: DTypeLike = jnp.float32
    name: str = "decoder_layer"
    _: dataclasses.KW_ONLY
    execution: Execution | None = None

    def __call__(
        self, h: Array, mask: Array, padding_mask: Array, kv_memory: KVMemory | None
    ) -> tuple[Array, KVMemory | None]:
        """h float32 [B, T, D], mask bool [B, T, S], padding_mask bool [B, T] -> h, memory."""
        execution = self.execution or self.config.execution(self.mesh)
        attention = MHABlock(self.config, execution=execution)
        feed_forward = self._feed_forward(execution)

        x = RMSNorm("rms_norm")(h).astype(self.dtype)
        attended, kv_memory = attention(x, mask, kv_memory)
        h += tap("attention_output", RMSNorm("rms_norm_1")(attended))
        x = RMSNorm("rms_norm_2")(h)  # float32, for the router
        h += tap("feed_forward_output", RMSNorm("rms_norm_3")(feed_forward(x, padding_mask)))
        return tap("hidden_states", h), kv_memory

    @hk.transparent
    def _feed_forward(self, execution: Execution) -> Callable[[Array, Array], Array]:
        """Return the mixture, or one dense block if there is only one expert."""
        config = self.config
        if config.num_experts <= 1:
            block = DenseBlock(config.widening_factor, self.dtype, execution)
            return lambda x, _: block(x)
        expert = DenseBlock(config.widening_factor, self.dtype)  # the mixture splits its weights
        router = (execution.router or Router)(config.num_selected_experts)
        return MoELayer(config.num_experts, expert, router, execution=execution)


@dataclasses.dataclass(eq=False)
class Transformer(hk.Module):
    """The stack of decoder layers: one layer body, scanned over stacked parameters."""

    config: TransformerConfig
    mesh: Mesh | None = None
    dtype: DTypeLike = jnp.bfloat16
    name: str = "transformer"
    _: dataclasses.KW_ONLY
    execution: Execution | None = None

    def __call__(
        self, h: Array, mask: Array, padding_mask: Array, memory: KVMemory | None = None
    ) -> tuple[Array, KVMemory | None]:
        """h float32 [B, T, D], mask bool [B, T, S], padding_mask bool [B, T] -> h, memory.

        The returned memory has the new rows of all layers; its `step` is unchanged.
        """
        execution = self.execution or self.config.execution(self.mesh)

        def layer(h: Array, memory: KVMemory | None) -> tuple[Array, KVMemory | None]:
            decoder_layer = DecoderLayer(self.config, dtype=self.dtype, execution=execution)
            return decoder_layer(h, mask, padding_mask, memory)

        fused = execution.fused_layer(self.config, self.dtype, mask, padding_mask)
        return execution.scan_layers(layer, self.config.num_layers, h, memory, fused)


# --------------------------------------------------------------------------- the language model


class LanguageModelOutput(NamedTuple):
    """logits: float32 [B, T, V]; model_state: the new Memory, or None when none was given.

    captured: the arrays named by `capture`, None for the others. last_hidden: [B, T, D], the output
    of the final norm in the activation dtype, which the table multiplies.
    """

    logits: Array
    model_state: Memory | None
    captured: Captured = Captured()
    last_hidden: Array | None = None


@dataclasses.dataclass(eq=False)
class LanguageModel(hk.Module):
    """Tokens to logits. Made by `LanguageModelConfig.make`."""

    model: Transformer
    config: LanguageModelConfig
    mesh: Mesh | None = None
    name: str = "language_model"
    _: dataclasses.KW_ONLY
    execution: Execution | None = None

    def init_memory(self, batch_size: int, seq_len: int, dtype: DTypeLike = jnp.bfloat16) -> Memory:
        """Return an empty memory; see TransformerConfig.init_memory."""
        return self.config.model.init_memory(batch_size, seq_len, dtype)

    def __call__(
        self,
        tokens: Array,
        memory: Memory | None = None,
        *,
        last_hid_only: bool = False,
        length: Array | None = None,
        sequence: Array | None = None,
        every_position: bool = False,
        capture: Collection[str] = (),
        capture_layers: Sequence[int] | None = None,
        hooks: Mapping[Site, Hook] | None = None,
    ) -> LanguageModelOutput | Array:
        """Tokens int32 [B, T] -> LanguageModelOutput with float32 logits [B, T, V].

        Pads (tokens <= `pad_token`) have positions, but go to no expert and are not visible as
        keys, in this call or later ones.
        memory: of the past positions that these tokens continue; None: they start at position 0,
        and no memory is returned.
        length: int32 [B], how many of the T tokens to read. The rest are ignored: they are not
        visible, not stored and go to no expert; a sequence of length 0 keeps its memory. With
        `length` the logits are [B, 1, V], at the last position read, unless `every_position`.
        sequence: int32 [B], distinct indices of the sequences that these rows continue in a larger
        memory. Its other sequences are unchanged. On a mesh, a row and its sequence must be in the
        same part of the data axis.
        last_hid_only: return only the hidden state [B, D], float32 and after the final norm, at
        the last position read; without `length`, at the last token that is not a pad.
        capture: names from CAPTURE_SITES; `captured` then holds their arrays. capture_layers: the
        layers to capture, in this order, -1 being the last one; None: all. All these arrays are
        kept until the call ends: `inspection.captured_shapes` returns their shapes.
        hooks: a dict from a site, or from (site, layer) for one layer, to a pure function
        `(layer, array) -> array` of the same shape and dtype, with whose result the model
        continues. `layer` is a traced int32, -1 for embeddings. Under `jit` each new function
        object is compiled again.

        Raises ValueError if the mesh's data axis does not divide B; for an unknown site or layer,
        or a hook that returns another shape or dtype; for a `sequence` of the wrong shape, or
        without a memory; or for a `capture` with last_hid_only.
        """
        config = self.config
        execution = self.execution or config.model.execution(self.mesh)
        _check_batch(execution, tokens, memory, sequence)
        probe = make_probe(config.model, capture, capture_layers, hooks)
        both = bool(probe.capture) and last_hid_only
        require(not both, "capture", "none with last_hid_only", probe.capture)

        index = jnp.arange(tokens.shape[1])  # [T]
        count = jnp.full(len(tokens), len(index), jnp.int32) if length is None else length  # [B]
        valid = (tokens > config.pad_token) & (index < count[:, None])  # [B, T]
        context = prepare(memory, valid, count, sequence)
        position = context.start[:, None] + index  # [B, T]
        probe.positions = position, valid
        # A query sees the valid keys up to its own position, including those in the memory.
        causal = jnp.arange(context.valid.shape[1]) <= position[..., None]  # [B, T, S]
        mask = causal & context.valid[:, None]

        embed = InOutEmbed(
            config.vocab_size,
            config.model.emb_size,
            config.embedding_init_scale,
            name="in_out_embed",
            execution=execution,
        )
        with asking(probe):
            h = embed(tokens, config.fprop_dtype) * config.embedding_multiplier_scale
            h, layers = self.model(tap("embeddings", h), mask, valid, context.layers)
        h = RMSNorm("rms_norm")(h)
        if last_hid_only or (length is not None and not every_position):
            last = _last_valid(valid) if length is None else jnp.maximum(length - 1, 0)
            h = jnp.take_along_axis(h, last[:, None, None], axis=1)  # [B, 1, D]
        if last_hid_only:
            return h[:, 0]
        h = h.astype(config.fprop_dtype)
        logits = embed.decode(h) * config.output_multiplier_scale
        state = advance(memory, context, layers)
        return LanguageModelOutput(logits, state, Captured(**probe.found), h)


def _last_valid(valid: Array) -> Array:
    """Valid bool [B, T] -> int32 [B], the last True position of each row."""
    return jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)


def _check_batch(
    execution: Execution, tokens: Array, memory: Memory | None, sequence: Array | None
) -> None:
    batch, data = tokens.shape[0], execution.data_size
    if batch % data:
        raise ValueError(
            f"the batch must be a multiple of the mesh's data axis {data}, got {batch}; pad it"
        )
    if sequence is not None:
        require(memory is not None, "sequence", "to be given with a memory", sequence.shape)
        require(sequence.shape == (batch,), "sequence", f"shape {(batch,)}", sequence.shape)
