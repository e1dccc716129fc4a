"""Grok-1: configuration and Haiku modules.

Dimension letters, one meaning each in every file:

    B batch   T query positions   S cache positions   D model width (emb_size)   V vocabulary
    N query heads   K key/value heads   G = N / K queries per key/value head   H head width
    E experts   A experts used per token   F expert hidden width   L layers

The layers are stacked: parameters keep the released names with `transformer/decoder_layer` in place
of `transformer/decoder_layer_0` ... `_63`, and have a leading layer axis. One layer body is scanned
over them, so that 64 layers compile as fast as one.

Precision. float32 mode: everything is float32. bfloat16 mode: bfloat16 for the inputs of matrix
products, queries, keys, values, the cache, attention weights and the experts' hidden vector;
float32 for the residual stream, norms, rotary phases, router, scores, softmax, gates,
accumulation and logits. Weights may be float or int8 (`QuantizedWeight8bit`) in either mode.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from grok1.checks import require, require_integers, require_positive
from grok1.inspection import (
    CAPTURE_SITES,
    NO_PROBE,
    OUTSIDE_LAYERS,
    Captured,
    Hook,
    Probe,
    check_layers,
    check_sites,
)
from grok1.kernels import dispatch as kernels
from grok1.ops.attention import attend, attend_cached, attention_weights, weigh
from grok1.ops.cache import KVMemory, Memory, cache_dtype, from_bits, write_rows
from grok1.ops.mixture import (
    Params,
    all_experts,
    chosen_experts,
    combine_all,
    expert,
    kernel_experts,
)
from grok1.ops.projection import local_groups, output_logits, project
from grok1.ops.quantization import (
    QuantizedWeight8bit,
    StackedWeight,
    matmul,
    product,
    quantize,
    split_groups,
)
from grok1.parallel.sharding import (
    DATA_AXIS,
    MODEL_AXIS,
    REPLICA_AXIS,
    AnyMesh,
    Axes,
    Rules,
    all_model_axes,
    axis_size,
    constrain,
    match_rule,
)

__all__ = [
    "CAPTURE_SITES",
    "Captured",
    "DecoderLayer",
    "DenseBlock",
    "InOutEmbed",
    "KVMemory",
    "LanguageModel",
    "LanguageModelConfig",
    "LanguageModelOutput",
    "Linear",
    "MHABlock",
    "MHAOutput",
    "Memory",
    "MoELayer",
    "MultiHeadAttention",
    "QuantizedWeight8bit",
    "RMSNorm",
    "RotaryEmbedding",
    "Router",
    "RouterOutput",
    "Transformer",
    "TransformerConfig",
    "attend",
    "ffn_size",
    "grok_1",
    "rotate_half",
    "write_rows",
]

RELEASED_SCALE_GROUPS = 8  # of the matrices whose contracted axis the released mesh split


# ------------------------------------------------------------------------------- configuration


def ffn_size(emb_size: int, widening_factor: float) -> int:
    """Return F, the hidden width of an expert: 2/3 of the widened model width, up to 8s."""
    size = int(widening_factor * emb_size) * 2 // 3
    return size + -size % 8


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the decoder stack. Raises ValueError naming the field, expected and got.

    expert_dispatch: how the mixture computes the chosen experts. "dynamic" loops over as many
    blocks of tokens as exist (inference; no reverse-mode gradient); "static" over the largest
    possible number and skips the empty ones (training); "all" computes every expert for every
    token, as a reference.
    scan_unroll: layers per iteration of the compiled loop.
    kernels: compute by the device's own kernels, grok1/kernels, where they are faster (inference).
    router: what makes a layer's router, called with num_selected_experts; None: Router. The place
        to give a subclass of it.
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
    expert_dispatch: Literal["dynamic", "static", "all"] = "dynamic"
    scan_unroll: int = 1
    kernels: bool = False
    router: Callable[[int], Any] | None = None

    def __post_init__(self):
        sizes = ("emb_size", "key_size", "num_q_heads", "num_kv_heads", "num_layers")
        require_integers(self, 1, *sizes, "num_selected_experts", "scan_unroll")
        require_integers(self, 0, "num_experts")
        require_positive(self, "widening_factor", "attn_output_multiplier")
        for field in ("shard_activations", "kernels"):
            flag = getattr(self, field)
            require(isinstance(flag, bool), field, "true or false", flag)
        for field in ("data_axis", "model_axis"):
            axis = getattr(self, field)
            require(isinstance(axis, str), field, "the name of a mesh axis", axis)
        axis = self.model_axis
        require(axis != self.data_axis, "model_axis", "another name than data_axis", axis)
        require(self.key_size % 2 == 0, "key_size", "an even head width", self.key_size)
        require(
            self.num_q_heads % self.num_kv_heads == 0,
            "num_q_heads",
            f"a multiple of num_kv_heads = {self.num_kv_heads}",
            self.num_q_heads,
        )
        most = max(self.num_experts, 1)
        require(
            self.num_selected_experts <= most,
            "num_selected_experts",
            f"at most num_experts = {most}",
            self.num_selected_experts,
        )
        made = self.router is None or callable(self.router)
        require(made, "router", "a subclass of Router, or None", self.router)
        choices = ("dynamic", "static", "all")
        require(
            self.expert_dispatch in choices,
            "expert_dispatch",
            f"one of {choices}",
            self.expert_dispatch,
        )
        require(
            self.expert_dispatch == "dynamic" or not self.kernels,
            "kernels",
            'false unless expert_dispatch is "dynamic"',
            self.kernels,
        )

    @property
    def ffn_size(self) -> int:
        """F, the hidden width of one expert."""
        return ffn_size(self.emb_size, self.widening_factor)

    @property
    def whole_mixture(self) -> bool:
        """Whether the loop over layers gets the experts of all layers, with the layer's index.

        Slicing a layer first would copy its eight experts to use two. Training wants the slices:
        its gradients are theirs.
        """
        return self.expert_dispatch == "dynamic"

    def partition_rules(self, mesh: AnyMesh | None = None) -> Rules:
        """Return (pattern, spec) for the parameters of one layer, the first match holding.

        mesh: the mesh they are for, if it may have a replica axis.
        """
        model = all_model_axes(mesh, self.model_axis)
        return (
            (r"multi_head_attention/(key|value)/w$", P(None, self.model_axis)),
            (r"multi_head_attention/query/w$", P(None, model)),
            (r"multi_head_attention/linear/w$", P(model, None)),
            (r"moe/(linear|linear_v)/w$", P(None, None, model)),
            (r"moe/linear_1/w$", P(None, model, None)),
            (r"decoder_layer/(linear|linear_v)/w$", P(None, model)),
            (r"decoder_layer/linear_1/w$", P(model, None)),
            (r"router/\w+$", P()),
            (r"rms_norm(_\d)?/scale$", P()),
        )

    def check_mesh(self, mesh: AnyMesh, **others: int) -> None:
        """Raise ValueError unless the mesh has both axes and its model axis splits every width.

        others: further widths that it must divide, by name.
        """
        for axis in (self.data_axis, self.model_axis):
            require(axis in mesh.shape, "mesh", f"an axis named {axis!r}", mesh.axis_names)
        size = axis_size(mesh, all_model_axes(mesh, self.model_axis))
        for name, width in {**self._split_widths(size), **others}.items():
            if width % size:
                raise ValueError(
                    f"mesh: a model axis of {size} does not divide {name} = {width}; "
                    f"use one of {self.model_axis_sizes(**others)}"
                )
        heads = mesh.shape[self.model_axis]
        require(
            self.num_kv_heads % heads == 0 and (heads == size or heads == self.num_kv_heads),
            "mesh",
            f"a model axis of {min(size, self.num_kv_heads)}, one key/value head each, and the "
            "rest on a replica axis, as make_mesh(..., num_kv_heads=...) lays them",
            dict(mesh.shape),
        )

    def model_axis_sizes(self, **others: int) -> list[int]:
        """Return the sizes of a model axis (model times replica) that `check_mesh` takes."""
        return [
            size
            for size in range(1, self.num_q_heads + 1)
            if all(n % size == 0 for n in (*self._split_widths(size).values(), *others.values()))
        ]

    def _split_widths(self, size: int) -> dict[str, int]:
        """Return the widths that a model axis of this size must divide, by name."""
        # Beyond the key/value heads, several devices share one and divide its query heads.
        shared = size > self.num_kv_heads and size % self.num_kv_heads == 0
        heads = {"num_q_heads": self.num_q_heads} if shared else {"num_kv_heads": self.num_kv_heads}
        widths = {**heads, "the expert width": self.ffn_size}
        if self.shard_activations:
            widths["emb_size"] = self.emb_size
        return widths

    def init_memory(self, batch_size: int, seq_len: int, dtype: Any = jnp.bfloat16) -> "Memory":
        """Return an empty memory for `batch_size` sequences of up to `seq_len` positions.

        k, v: `dtype` [L, B, S, K, H], zero; see `cache_dtype`. step: int32 [B]. valid: bool [B, S].
        """
        shape = (self.num_layers, batch_size, seq_len, self.num_kv_heads, self.key_size)
        return Memory(
            layers=KVMemory(
                k=jnp.zeros(shape, dtype),
                v=jnp.zeros(shape, dtype),
                step=jnp.zeros([batch_size], jnp.int32),
            ),
            valid=jnp.zeros([batch_size, seq_len], bool),
        )

    def make(self, mesh: Mesh | None = None, dtype: Any = jnp.bfloat16) -> "Transformer":
        """Return the module; to be called inside `hk.transform`."""
        return Transformer(self, mesh, dtype)


@dataclasses.dataclass(frozen=True)
class LanguageModelConfig:
    """The whole model. Raises ValueError naming the field, expected and got.

    embedding_init_scale: the random initial embedding has standard deviation
    `embedding_init_scale / sqrt(emb_size)`.
    fprop_dtype: bfloat16 or float32; what is in which is at the top of this file.
    """

    model: TransformerConfig
    vocab_size: int = 128 * 1024
    pad_token: int = 0
    eos_token: int = 2
    sequence_len: int = 8192
    embedding_init_scale: float = 1.0
    output_multiplier_scale: float = 1.0
    embedding_multiplier_scale: float = 1.0
    fprop_dtype: Any = jnp.bfloat16

    def __post_init__(self):
        require(
            isinstance(self.model, TransformerConfig), "model", "a TransformerConfig", self.model
        )
        require_integers(self, 1, "vocab_size", "sequence_len")
        require_integers(self, 0, "pad_token", "eos_token")
        for field in ("pad_token", "eos_token"):
            value = getattr(self, field)
            expected = f"a token below vocab_size = {self.vocab_size}"
            require(value < self.vocab_size, field, expected, value)
        scales = ("embedding_init_scale", "output_multiplier_scale", "embedding_multiplier_scale")
        require_positive(self, *scales)
        dtypes = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32))
        require(
            any(dtype == self.fprop_dtype for dtype in dtypes),
            "fprop_dtype",
            "bfloat16 or float32",
            self.fprop_dtype,
        )

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "LanguageModelConfig":
        """Build a configuration from nested plain fields, as a checkpoint's config.json has them.

        Raises ValueError that names a missing, unknown or wrong field.
        """
        fields = dict(fields)
        inner = fields.pop("model", None)
        require(isinstance(inner, Mapping), "model", "an object of the transformer's fields", inner)
        return _build(cls, {**fields, "model": _build(TransformerConfig, inner)})

    def to_dict(self) -> dict[str, Any]:
        """Return the nested plain fields that describe the model, for config.json."""
        inner = dataclasses.asdict(self.model)
        # How to run it, or code: not what the checkpoint holds.
        for how in ("expert_dispatch", "scan_unroll", "kernels", "router"):
            del inner[how]
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["fprop_dtype"]
        return {**fields, "model": inner}

    def partition_rules(self, mesh: AnyMesh | None = None) -> Rules:
        """Return (pattern, spec) for every parameter, without the leading layer axis.

        mesh: the mesh they are for, if it may have a replica axis.
        """
        return (
            (r"in_out_embed/embeddings$", P(all_model_axes(mesh, self.model.model_axis), None)),
            *self.model.partition_rules(mesh),
        )

    def check_mesh(self, mesh: AnyMesh) -> None:
        """Raise ValueError unless the model can lie on the mesh."""
        self.model.check_mesh(mesh, vocab_size=self.vocab_size)

    def model_axis_sizes(self) -> list[int]:
        """Return the sizes of a model axis (model times replica) that `check_mesh` takes."""
        return self.model.model_axis_sizes(vocab_size=self.vocab_size)

    def make(self, mesh: Mesh | None = None) -> "LanguageModel":
        """Return the module; to be called inside `hk.transform`."""
        if mesh is not None:
            self.check_mesh(mesh)
        return LanguageModel(self.model.make(mesh, self.fprop_dtype), self, mesh)

    def init_params(self, seed: int = 0, *, quantized: bool = False) -> dict[str, dict[str, Any]]:
        """Return random parameters: float32, or int8 with the released scale groups.

        Matrices are normal with deviation 1 / sqrt(fan-in), cut at two of them; norms one.
        """
        return _random_params(jax.random.key(seed), config=self, quantized=quantized)

    def param_shapes(self, *, quantized: bool = True) -> dict[str, dict[str, Any]]:
        """Return the parameter tree with jax.ShapeDtypeStruct leaves; computes nothing."""
        return jax.eval_shape(
            lambda: _random_params(jax.random.key(0), config=self, quantized=quantized)
        )

    def quantize_params(self, params: Params) -> dict[str, dict[str, Any]]:
        """Round the weight matrices of a float parameter tree to int8.

        The embedding, norms and router stay float32, as released; matrices that are split along
        their contracted axis get `RELEASED_SCALE_GROUPS` groups, the others one.
        """

        def convert(name: str, leaf: jax.Array) -> Any:
            spec = match_rule(self.partition_rules(), name)
            if self.model.model_axis not in spec or name.endswith("embeddings"):
                return leaf
            row_parallel = spec[-2] == self.model.model_axis
            return quantize(leaf, RELEASED_SCALE_GROUPS if row_parallel else 1)

        return {
            module: {name: convert(f"{module}/{name}", leaf) for name, leaf in leaves.items()}
            for module, leaves in params.items()
        }


@functools.partial(jax.jit, static_argnames=("config", "quantized"))
def _random_params(
    key: jax.Array, *, config: LanguageModelConfig, quantized: bool
) -> dict[str, dict[str, Any]]:
    tokens = jnp.zeros([1, 1], jnp.int32)
    params = hk.transform(lambda: config.make()(tokens)).init(key)
    return config.quantize_params(params) if quantized else params


def _build(cls: type, fields: Mapping[str, Any]) -> Any:
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in fields:
        require(name in known, name, f"one of {sorted(known)}", name)
    for name, field in known.items():
        needed = field.default is dataclasses.MISSING
        require(name in fields or not needed, name, "a value in the configuration", None)
    return cls(**fields)


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


# ------------------------------------------------------------------------- memory between calls


class LanguageModelOutput(NamedTuple):
    """logits: float32 [B, T, V]; model_state: the new Memory, or None when none was given.

    captured: the arrays asked for by `capture`, None for the others.
    """

    logits: jax.Array
    model_state: Memory | None
    captured: Captured = Captured()


def _recast(memory: KVMemory, dtype: Any) -> KVMemory:
    """See a cache of bfloat16 as the uint16 of its bits, or the other way round."""
    if memory.k.dtype == dtype:
        return memory
    k, v = (lax.bitcast_convert_type(cache, dtype) for cache in (memory.k, memory.v))
    return memory._replace(k=k, v=v)


# --------------------------------------------------------------------------------- small modules


class Linear(hk.Module):
    """`x @ w + b`, w [I, O] float or int8, accumulated in float32.

    mesh, and where: x lies on it as `project` takes them.
    """

    def __init__(
        self,
        output_size: int,
        with_bias: bool = True,
        *,
        mesh: Mesh | None = None,
        name: str | None = None,
        **where: Axes,
    ):
        super().__init__(name=name)
        self.output_size = output_size
        self.with_bias = with_bias
        self.mesh = mesh
        self.where = where

    def weight(self, input_size: int) -> Any:
        """Return the parameter `w` [input_size, output_size]."""
        init = hk.initializers.TruncatedNormal(1 / math.sqrt(input_size))
        return hk.get_parameter("w", [input_size, self.output_size], jnp.float32, init=init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., I] in the activation dtype -> float32 [..., O]."""
        y = project(x, self.weight(x.shape[-1]), self.mesh, **self.where)
        if self.with_bias:
            y += hk.get_parameter("b", [self.output_size], jnp.float32, init=jnp.zeros)
        return y


class RMSNorm(hk.Module):
    """`scale * x / sqrt(mean(x^2) + 1e-5)` over the last axis (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, name: str | None = None):
        super().__init__(name=name)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> float32 [..., D]; the caller casts it for the product that follows."""
        x = x.astype(jnp.float32)
        scale = hk.get_parameter("scale", [x.shape[-1]], jnp.float32, init=jnp.ones)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return scale * x * lax.rsqrt(mean_square + 1e-5)


def rotate_half(x: jax.Array) -> jax.Array:
    """[a, b] -> [-b, a], the halves of the last axis."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-b, a], axis=-1)


class RotaryEmbedding(hk.Module):
    """Rotary positions, `x cos + rotate_half(x) sin` (Su et al. 2021, section 3.4, "half" form)."""

    def __init__(self, dim: int, name: str | None = None, base_exponent: int = 10000):
        super().__init__(name=name)
        require(dim % 2 == 0, "dim", "an even width", dim)
        self.dim = dim
        self.base_exponent = base_exponent

    def __call__(
        self,
        x: jax.Array,
        seq_dim: int,
        offset: jax.Array | int,
        const_position: int | None = None,
        t: jax.Array | None = None,
    ) -> jax.Array:
        """Rotate x [B, T, heads, dim], or with T at another axis `seq_dim`; keeps its dtype.

        The positions are `const_position` for all, or `t` [B, T], or 0 ... T-1 plus `offset`, a
        scalar or [B].
        """
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
        spread = [a for a in range(1, x.ndim - 1) if a != seq_dim]
        phase = jnp.expand_dims(phase, spread)
        wide = x.astype(jnp.float32)
        return (wide * jnp.cos(phase) + rotate_half(wide) * jnp.sin(phase)).astype(x.dtype)


class InOutEmbed(hk.Module):
    """The embedding table [V, D], used for both input and output."""

    def __init__(
        self, vocab_size: int, embed_dim: int, init_scale: float = 1.0, name: str | None = None
    ):
        super().__init__(name=name)
        self.vocab_size = vocab_size
        self.embed_dim = embed_dim
        self.init_scale = init_scale

    @property
    def embeddings(self) -> jax.Array:
        """The table [V, D]."""
        init = hk.initializers.RandomNormal(self.init_scale / math.sqrt(self.embed_dim))
        shape = [self.vocab_size, self.embed_dim]
        return hk.get_parameter("embeddings", shape, jnp.float32, init=init)

    def __call__(self, tokens: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
        """Tokens int [...] -> float32 [..., D], the table rounded to `dtype`."""
        return self.embeddings[tokens].astype(dtype).astype(jnp.float32)

    def decode(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> float32 [..., V], `x @ embeddings.T`."""
        return product("...d,vd->...v", x, self.embeddings.astype(x.dtype))


# ------------------------------------------------------------------------------------- attention


class MHAOutput(NamedTuple):
    """embeddings: float32 [B, T, D]; memory: the KVMemory with the new rows, or None."""

    embeddings: jax.Array
    memory: KVMemory | None


class MultiHeadAttention(hk.Module):
    """Grouped-query attention (Ainslie et al. 2023): query head n reads key/value head n // G."""

    def __init__(
        self,
        num_q_heads: int,
        num_kv_heads: int,
        key_size: int,
        *,
        with_bias: bool = True,
        value_size: int | None = None,
        model_size: int | None = None,
        attn_output_multiplier: float = 1.0,
        data_axis: str = DATA_AXIS,
        model_axis: str = MODEL_AXIS,
        name: str | None = None,
        kernels: bool = False,
    ):
        super().__init__(name=name)
        self.kernels = kernels
        self.num_q_heads = num_q_heads
        self.num_kv_heads = num_kv_heads
        self.key_size = key_size
        self.with_bias = with_bias
        self.value_size = value_size or key_size
        self.model_size = model_size or key_size * num_q_heads
        self.attn_output_multiplier = attn_output_multiplier
        self.data_axis = data_axis
        self.model_axis = model_axis

    def __call__(
        self,
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        mask: jax.Array | None = None,
        kv_memory: KVMemory | None = None,
        mesh: Mesh | None = None,
        *,
        layer: jax.Array | None = None,
        length: jax.Array | None = None,
        probe: Probe = NO_PROBE,
    ) -> MHAOutput:
        """Attend from query [B, T, D] to key and value [B, T', D], in the activation dtype.

        mask: bool, broadcast to [B, T, S] or given as [B, 1, T, S]; True where a query may see a
        key; None: everywhere. With `kv_memory`, the new keys are written at its `step`, which is
        also their position, and S is the memory's length, of which only what has been filled is
        seen; else S = T' and positions start at 0.
        layer: the layer to use of a memory that holds all of them. length: int32 [B], how many of
        the new positions are real; default all. probe: sees attention_weights and head_outputs.

        Raises ValueError if the new keys do not fit the memory's length, or if a mask [B, N, T, S]
        tells the heads apart.
        """
        dtype = query.dtype
        heads = (self.num_kv_heads, self.num_q_heads // self.num_kv_heads)
        model, every = self.model_axis, all_model_axes(mesh, self.model_axis)
        q = self._heads(query, self.num_q_heads, self.key_size, "query", mesh, every)
        k = self._heads(key, self.num_kv_heads, self.key_size, "key", mesh, model)
        v = self._heads(value, self.num_kv_heads, self.value_size, "value", mesh, model)
        v = v.astype(dtype)
        offset = 0 if kv_memory is None else kv_memory.step
        rotary = RotaryEmbedding(self.key_size)
        q = rotary(q, 1, offset).astype(dtype)  # rounded once, after the rotation
        k = rotary(k, 1, offset).astype(dtype)
        if mask is None:
            mask = jnp.ones([1, 1, 1], bool)
        if mask.ndim == 4:
            require(mask.shape[1] == 1, "mask", "one mask for all heads", mask.shape)
            mask = mask[:, 0]
        q = q.reshape(*q.shape[:2], *heads, self.key_size)
        # Devices that share a key/value head have its query heads in turn.
        shared = REPLICA_AXIS if every != model else None
        q = constrain(q, mesh, self.data_axis, None, model, shared, None)
        if kv_memory is None and probe.wants("attention_weights"):
            out = self._attend_openly(q, k, v, mask, probe)
        elif kv_memory is None:
            # Training recomputes the [B, N, T, S] weights in the backward pass, and stores none.
            out = jax.checkpoint(attend, static_argnums=4)(
                q, k, v, mask, self.attn_output_multiplier
            )
        else:
            new = (k, v, mask, kv_memory, mesh, layer, length)
            out, kv_memory = self._attend_memory(q, *new, probe)
        out = probe("head_outputs", out.reshape(*out.shape[:2], self.num_q_heads, -1))
        out = out.astype(dtype).reshape(*out.shape[:2], -1)  # [B, T, N * H']
        out = constrain(out, mesh, self.data_axis, None, every)
        where = {"data": self.data_axis, "contracted": every}
        out = Linear(self.model_size, self.with_bias, mesh=mesh, name="linear", **where)(out)
        return MHAOutput(out, kv_memory)

    @hk.transparent
    def _heads(
        self, x: jax.Array, heads: int, width: int, name: str, mesh: Mesh | None, axes: Axes
    ) -> jax.Array:
        """x [B, T, D] -> float32 [B, T, heads, width], the heads over the mesh axes `axes`."""
        where = {"data": self.data_axis, "produced": axes}
        x = Linear(heads * width, self.with_bias, mesh=mesh, name=name, **where)(x)
        x = x.reshape(*x.shape[:-1], heads, width)
        return constrain(x, mesh, self.data_axis, None, axes, None)

    def _attend_openly(
        self, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, probe: Probe
    ) -> jax.Array:
        """`attend`, its weights as an array that the probe sees."""
        weights = attention_weights(q, k, mask, self.attn_output_multiplier)  # [B, K, G, T, S]
        by_head = weights.reshape(weights.shape[0], self.num_q_heads, *weights.shape[3:])
        by_head = probe("attention_weights", by_head)
        return weigh(by_head.reshape(weights.shape).astype(v.dtype), v)

    def _attend_memory(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        mask: jax.Array,
        memory: KVMemory,
        mesh: Mesh | None,
        layer: jax.Array | None,
        length: jax.Array | None,
        probe: Probe,
    ) -> tuple[jax.Array, KVMemory]:
        """Write new rows k, v [B, T, K, H], attend from q [B, T, K, G, H] to all that is there."""
        openly = probe.wants("attention_weights")
        batch, rows = k.shape[:2]
        one_layer = layer is None
        caches = [c[None] if one_layer else c for c in (memory.k, memory.v)]
        if rows > caches[0].shape[2]:
            raise ValueError(
                f"{rows} new positions do not fit a memory of {caches[0].shape[2]}; "
                "prefill in smaller chunks"
            )
        layer = jnp.int32(0) if layer is None else layer
        if length is None:
            length = jnp.full([batch], rows, jnp.int32)
        mask = jnp.broadcast_to(mask, (batch, *mask.shape[1:]))

        def local(*arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
            q, keys, values, k, v, mask, layer, start, length, sequence = arrays
            if sequence is not None and mesh is not None:
                sequence -= lax.axis_index(self.data_axis) * keys.shape[1]
            keys = write_rows(keys, k, layer, start, length, sequence)
            values = write_rows(values, v, layer, start, length, sequence)
            if openly:
                return q, keys, values
            multiplier, filled = self.attn_output_multiplier, start + length
            attend_all = kernels.attend_cached if self.kernels else attend_cached
            out = attend_all(q, keys, values, mask, multiplier, layer, filled, sequence)
            return out, keys, values

        if mesh is not None:
            # Each device writes and reads its own sequences and heads, as far as these have come.
            data, model = self.data_axis, self.model_axis
            shared = REPLICA_AXIS if REPLICA_AXIS in mesh.shape else None
            queries = P(data, None, model, shared, None)  # local [B/data, T, K/model, G/shared, H]
            cache = P(None, data, None, model, None)  # local [L, B/data, S, K/model, H]
            new = P(data, None, model, None)  # local [B/data, T, K/model, H]
            local = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(queries, cache, cache, new, new, P(data), P(), P(data), P(data), P(data)),
                out_specs=(queries, cache, cache),
                check_vma=False,
            )
        sequence = memory.sequence
        out, *caches = local(q, *caches, k, v, mask, layer, memory.step, length, sequence)
        if openly:
            whole = (lax.dynamic_index_in_dim(c, layer, 0, False) for c in caches)  # [C, S, K, H]
            own_k, own_v = (from_bits(c if sequence is None else c[sequence]) for c in whole)
            filled = (memory.step + length)[:, None, None]
            seen = mask & (jnp.arange(caches[0].shape[2]) < filled)
            out = self._attend_openly(q, own_k, own_v, seen, probe)
        keys, values = (c[0] for c in caches) if one_layer else caches
        return out, KVMemory(keys, values, memory.step + length, sequence)


@dataclasses.dataclass(frozen=True)
class MHABlock:
    """Attention sized by the configuration. Adds no name of its own, as in the released files."""

    config: TransformerConfig
    mesh: Mesh | None = None

    def __call__(
        self, x: jax.Array, mask: jax.Array, kv_memory: KVMemory | None, **where: Any
    ) -> MHAOutput:
        """x [B, T, D] in the activation dtype; the rest as MultiHeadAttention takes it."""
        config = self.config
        return MultiHeadAttention(
            config.num_q_heads,
            config.num_kv_heads,
            config.key_size,
            with_bias=False,
            model_size=config.emb_size,
            attn_output_multiplier=config.attn_output_multiplier,
            data_axis=config.data_axis,
            model_axis=config.model_axis,
            name="multi_head_attention",
            kernels=config.kernels,
        )(x, x, x, mask, kv_memory, self.mesh, **where)


# -------------------------------------------------------------------------- mixture of experts


@dataclasses.dataclass(frozen=True)
class DenseBlock:
    """The feed-forward block of one expert, or of a layer without a mixture.

    Adds no name of its own, as in the released files.
    """

    widening_factor: float
    dtype: Any = jnp.float32
    row_shards: int = 1

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D], cast to `dtype` for the products -> float32 [..., D]."""
        width = x.shape[-1]
        hidden = ffn_size(width, self.widening_factor)
        # In this order: Haiku numbers modules by the digits at the end of their names.
        linear = Linear(hidden, name="linear").weight(width)
        linear_v = Linear(hidden, name="linear_v").weight(width)
        linear_1 = Linear(width, name="linear_1").weight(hidden)
        params = {
            "linear": {"w": linear},
            "linear_v": {"w": linear_v},
            "linear_1": {"w": split_groups(linear_1, self.row_shards)},
        }
        return expert(params, x.astype(self.dtype))


class RouterOutput(NamedTuple):
    """The experts chosen for each token.

    gates: float32 [..., A], their probabilities as they are, zero for a masked token.
    expert_index: int32 [..., A], the experts, best first; E for a masked token, which goes to none.
    probs: float32 [..., E], the softmax over all experts.
    """

    gates: jax.Array
    expert_index: jax.Array
    probs: jax.Array


def largest(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the `count` largest of x [..., E] and their indices, of equal ones the lower first.

    As `lax.top_k`, for which a compiler gathers a batch that lies over several devices.
    """
    index: list[jax.Array] = []
    rest = x
    for _ in range(count):
        index.append(jnp.argmax(rest, axis=-1))
        taken = jax.nn.one_hot(index[-1], x.shape[-1], dtype=bool)
        rest = jnp.where(taken, -jnp.inf, rest)
    chosen = jnp.stack(index, axis=-1).astype(jnp.int32)
    return jnp.take_along_axis(x, chosen, axis=-1), chosen


class Router(hk.Module):
    """Chooses the experts of each token, in float32.

    A subclass with another `logits` or `choose` is given to the model as
    `TransformerConfig(..., router=Subclass)`. Its parameters may have any names and shapes.
    """

    def __init__(self, num_selected_experts: int, name: str = "router"):
        super().__init__(name=name)
        self.num_selected_experts = num_selected_experts

    def logits(self, x: jax.Array, num_experts: int) -> jax.Array:
        """Return the scores [..., E] of x float32 [..., D]."""
        init = hk.initializers.TruncatedNormal(1 / math.sqrt(x.shape[-1]))
        w = hk.get_parameter("w", [x.shape[-1], num_experts], jnp.float32, init=init)
        return matmul(x, w)

    def choose(self, probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return gates [..., A] and expert_index int32 [..., A] by probs float32 [..., E].

        As in Grok-1: the chosen probabilities are not renormalised to sum to one.
        """
        return largest(probs, self.num_selected_experts)

    def __call__(
        self,
        inputs: jax.Array,
        padding_mask: jax.Array | None,
        num_experts: int,
        probe: Probe = NO_PROBE,
    ) -> RouterOutput:
        """inputs [..., D], padding_mask bool [...] (False: masked) -> RouterOutput.

        probe: sees all four arrays.
        """
        logits = self.logits(inputs.astype(jnp.float32), num_experts)
        logits = probe("router_logits", logits)
        probs = probe("router_probs", jax.nn.softmax(logits, axis=-1))
        gates, index = self.choose(probs)
        if padding_mask is not None:
            gates = jnp.where(padding_mask[..., None], gates, 0.0)
            index = jnp.where(padding_mask[..., None], index, num_experts)
        return RouterOutput(probe("expert_gates", gates), probe("expert_index", index), probs)


class MoELayer(hk.Module):
    """A mixture of experts; each token's output is `sum_a gate_a * expert_a(x)`.

    layer_fn: one expert, x [..., D] -> [..., D], with Haiku parameters. A DenseBlock is computed
    only where it is chosen; any other function takes the all-experts form.
    """

    def __init__(
        self,
        num_experts: int,
        layer_fn: Callable[[jax.Array], jax.Array],
        router: Router,
        mesh: Mesh | None = None,
        shard_activations: bool = False,
        data_axis: str = DATA_AXIS,
        model_axis: str = MODEL_AXIS,
        name: str = "moe",
        *,
        expert_dispatch: str = "dynamic",
        kernels: bool = False,
    ):
        super().__init__(name=name)
        self.num_experts = num_experts
        self.layer_fn = layer_fn
        self.router = router
        self.mesh = mesh
        self.shard_activations = shard_activations
        self.data_axis = data_axis
        self.model_axis = model_axis
        self.expert_dispatch = expert_dispatch
        self.kernels = kernels

    def __call__(
        self,
        inputs: jax.Array,
        padding_mask: jax.Array | None,
        *,
        layer: jax.Array | None = None,
        probe: Probe = NO_PROBE,
    ) -> jax.Array:
        """inputs [B, T, D], padding_mask bool [B, T] (False: to no expert) -> float32 [B, T, D].

        layer: the parameters hold all layers; use this one. probe: sees what the router does.
        """
        routing = self.router(inputs, padding_mask, self.num_experts, probe)
        return self._mix(inputs, routing, layer)

    @hk.transparent
    def _mix(self, inputs: jax.Array, routing: RouterOutput, layer: jax.Array | None) -> jax.Array:
        """Apply the chosen experts to inputs [B, T, D] and sum them by their gates."""
        # One expert becomes a pure function of its parameters; the lift makes those of all experts,
        # with a leading axis, parameters of this module.
        init, apply = hk.transform(self.layer_fn)
        keys = None
        if hk.running_init():
            keys = jax.random.split(hk.next_rng_key(), self.num_experts)
        params = hk.transparent_lift(jax.vmap(init, in_axes=(0, None)))(keys, inputs[:1, :1])
        if hk.running_init():
            return inputs.astype(jnp.float32)
        if isinstance(self.layer_fn, DenseBlock):
            return self._mixture(params, inputs.astype(self.layer_fn.dtype), routing, layer)
        if layer is not None:
            params = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, layer, 0, False), params)
        outputs = jax.vmap(apply, in_axes=(0, None, None))(params, None, inputs)  # [E, B, T, D]
        flat = jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]), routing)
        mixed = combine_all(
            outputs.reshape(self.num_experts, -1, inputs.shape[-1]).astype(jnp.float32),
            flat.gates,
            flat.expert_index,
            self.num_experts,
        )
        return mixed.reshape(inputs.shape)

    def _mixture(
        self, params: Params, x: jax.Array, routing: RouterOutput, layer: jax.Array | None
    ) -> jax.Array:
        """Each data shard sorts its own tokens and loops locally; one sum over the model axis."""
        mesh, data = self.mesh, self.data_axis
        model = all_model_axes(mesh, self.model_axis)
        scatter = self.shard_activations and mesh is not None
        one_sequence = x.shape[0] == axis_size(mesh, data)  # on each device
        forms: dict[str, Callable[..., jax.Array]] = {
            "dynamic": functools.partial(chosen_experts, one_sequence=one_sequence),
            "static": functools.partial(chosen_experts, differentiable=True),
            "all": all_experts,
        }
        compute = kernel_experts if self.kernels else forms[self.expert_dispatch]

        def local(
            params: Params, x: jax.Array, gates: jax.Array, index: jax.Array, layer: jax.Array
        ) -> jax.Array:
            # Local shapes: x [B/data, T, D], w [L, E, D, F/model] or [L, E, F/model, D].
            x_rows, gate_rows, index_rows = (a.reshape(-1, a.shape[-1]) for a in (x, gates, index))
            out = compute(params, x_rows, gate_rows, index_rows, self.num_experts, layer=layer)
            out = out.reshape(x.shape)
            if scatter:
                return lax.psum_scatter(out, model, scatter_dimension=2, tiled=True)
            return out if mesh is None else lax.psum(out, model)

        if layer is None:
            params, layer = jax.tree.map(lambda w: w[None], params), jnp.int32(0)
        if mesh is not None:
            by_column, by_row = P(None, None, None, model), P(None, None, model, None)
            lies = {"linear": by_column, "linear_v": by_column, "linear_1": by_row}
            own = {name: local_groups(params[name]["w"], spec, mesh) for name, spec in lies.items()}
            params = {name: {"w": weight} for name, (weight, _) in own.items()}
            specs = {name: {"w": spec} for name, (_, spec) in own.items()}
            tokens = P(data, None, None)
            local = jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(specs, tokens, tokens, tokens, P()),
                out_specs=P(data, None, model if scatter else None),
                check_vma=False,
            )
        return local(params, x, routing.gates, routing.expert_index, layer)


# --------------------------------------------------------------------------------- the decoder


class DecoderLayer(hk.Module):
    """One layer, its four norms before and after each block ("sandwich")."""

    def __init__(
        self,
        config: TransformerConfig,
        mesh: Mesh | None = None,
        dtype: Any = jnp.float32,
        name: str = "decoder_layer",
    ):
        super().__init__(name=name)
        self.config = config
        self.mesh = mesh
        self.dtype = dtype

    def __call__(
        self,
        h: jax.Array,
        mask: jax.Array,
        padding_mask: jax.Array,
        kv_memory: KVMemory | None,
        layer: jax.Array | None = None,
        length: jax.Array | None = None,
        probe: Probe = NO_PROBE,
    ) -> tuple[jax.Array, KVMemory | None]:
        """h float32 [B, T, D], mask bool [B, T, S], padding_mask bool [B, T] -> h and the memory.

        `layer` and `length` as in MultiHeadAttention. probe: sees all sites of a layer.
        """
        config, mesh = self.config, self.mesh
        x = self._gathered(RMSNorm(name="rms_norm")(h).astype(self.dtype))
        where: dict[str, Any] = {"layer": layer, "length": length, "probe": probe}
        attention, memory = MHABlock(config, mesh)(x, mask, kv_memory, **where)
        h += probe("attention_output", RMSNorm(name="rms_norm_1")(self._spread(attention)))
        h = self._spread(h)
        x = self._gathered(RMSNorm(name="rms_norm_2")(h))  # float32, for the router
        y = self._feed_forward(x, padding_mask, layer, probe)
        h += probe("feed_forward_output", RMSNorm(name="rms_norm_3")(self._spread(y)))
        return self._spread(probe("hidden_states", h)), memory

    @hk.transparent
    def _feed_forward(
        self, x: jax.Array, padding_mask: jax.Array, layer: jax.Array | None, probe: Probe
    ) -> jax.Array:
        """The mixture, or one dense block where there are no experts to choose from."""
        config = self.config
        shards = axis_size(self.mesh, all_model_axes(self.mesh, config.model_axis))
        block = DenseBlock(config.widening_factor, self.dtype, shards)
        if config.num_experts <= 1:
            return block(x)
        make_router = config.router or Router
        moe = MoELayer(
            config.num_experts,
            block,
            make_router(config.num_selected_experts),
            self.mesh,
            config.shard_activations,
            config.data_axis,
            config.model_axis,
            expert_dispatch=config.expert_dispatch,
            kernels=config.kernels,
        )
        if not config.whole_mixture:
            layer = None
        return moe(x, padding_mask, layer=layer, probe=probe)

    def _spread(self, x: jax.Array) -> jax.Array:
        """[B, T, D] between blocks: over the model axis too if `shard_activations`."""
        model = all_model_axes(self.mesh, self.config.model_axis)
        last = model if self.config.shard_activations else None
        return constrain(x, self.mesh, self.config.data_axis, None, last)

    def _gathered(self, x: jax.Array) -> jax.Array:
        """[B, T, D] as a block's input: whole on every device of the model axis."""
        return constrain(x, self.mesh, self.config.data_axis, None, None)


class Transformer(hk.Module):
    """The stack of decoder layers: one layer body, scanned over stacked parameters."""

    def __init__(
        self,
        config: TransformerConfig,
        mesh: Mesh | None = None,
        dtype: Any = jnp.bfloat16,
        name: str = "transformer",
    ):
        super().__init__(name=name)
        self.config = config
        self.mesh = mesh
        self.dtype = dtype

    def __call__(
        self,
        h: jax.Array,
        mask: jax.Array,
        padding_mask: jax.Array,
        memory: KVMemory | None = None,
        *,
        length: jax.Array | None = None,
        capture: Collection[str] = (),
        capture_layers: Sequence[int] | None = None,
        hooks: Mapping[str, Hook] | None = None,
    ) -> tuple[jax.Array, KVMemory | None, dict[str, jax.Array]]:
        """h float32 [B, T, D], mask bool [B, T, S], padding_mask bool [B, T].

        capture, capture_layers, hooks: as in LanguageModel, of the sites within layers.
        Returns the new h, the memory with T (or `length`) more positions, and the captured arrays,
        each with a leading layer axis.
        """
        config = self.config

        def run(h: jax.Array, kv_memory: KVMemory | None, layer: jax.Array | None) -> Any:
            probe = NO_PROBE if layer is None else Probe(capture, hooks, layer)
            decoder_layer = DecoderLayer(config, self.mesh, self.dtype)
            h, kv_memory = decoder_layer(h, mask, padding_mask, kv_memory, layer, length, probe)
            return h, kv_memory, probe.found

        # One layer becomes a pure function of its parameters; the lift makes those of all layers,
        # with a leading axis, parameters of this module.
        init, apply = hk.transform(run)
        keys = None
        if hk.running_init():
            keys = jax.random.split(hk.next_rng_key(), config.num_layers)
        params: Any = hk.transparent_lift(jax.vmap(init, in_axes=(0, None, None, None)))(
            keys, h, None, None
        )
        if hk.running_init():
            return h, memory, {}
        whole = {}
        if config.whole_mixture:
            whole = {name: p for name, p in params.items() if "/moe/" in name}
        stacked = {}
        if config.kernels:
            stacked = {name: p for name, p in params.items() if _for_kernels(name, p)}
        sliced = {name: p for name, p in params.items() if name not in {*whole, *stacked}}

        def one_layer(own: Any, h: jax.Array, memory: KVMemory | None, layer: jax.Array) -> Any:
            named = {name: {"w": StackedWeight(p["w"], layer)} for name, p in stacked.items()}
            h, new, found = apply({**own, **whole, **named}, None, h, memory, layer)
            if memory is not None:
                # All layers write at the same positions: the step moves on after the last one.
                new = new._replace(step=memory.step)
            return h, new, found

        picked = None
        if capture_layers is not None:
            picked = check_layers(capture_layers, config.num_layers)
        if not capture:
            picked = None

        def body(carry: tuple[Any, ...], xs: tuple[jax.Array, Any]) -> Any:
            h, memory, kept = carry
            layer, own = xs
            h, memory, found = one_layer(own, h, memory, layer)
            if picked is None:
                return (h, memory, kept), found
            return (h, memory, _keep(kept, found, layer, picked)), {}

        carried, kept = memory, {}
        if memory is not None:
            stored = memory.k.dtype
            carried = _recast(memory, cache_dtype(stored))
        if picked is not None:
            first = jax.tree.map(lambda p: p[0], sliced)
            shapes = jax.eval_shape(one_layer, first, h, carried, jnp.int32(0))[2]
            kept = {n: jnp.zeros((len(picked), *x.shape), x.dtype) for n, x in shapes.items()}
        (h, memory, kept), captured = lax.scan(
            body,
            (h, carried, kept),
            (jnp.arange(config.num_layers), sliced),
            unroll=min(config.scan_unroll, config.num_layers),
        )
        if memory is not None:
            memory = _recast(memory, stored)
            memory = memory._replace(step=memory.step + (h.shape[1] if length is None else length))
        return h, memory, kept or captured


def _keep(
    kept: Mapping[str, jax.Array],
    found: Mapping[str, jax.Array],
    layer: jax.Array,
    picked: Sequence[int],
) -> dict[str, jax.Array]:
    """Put what was found in a layer at its place among the layers picked, if it is one."""
    places = jnp.array(picked) == layer
    place = jnp.argmax(places)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        before = lax.dynamic_index_in_dim(old, place, 0, False)
        new = jnp.where(jnp.any(places), new, before)
        return lax.dynamic_update_index_in_dim(old, new, place, 0)

    return {name: put(kept[name], array) for name, array in found.items()}


def _for_kernels(name: str, params: Mapping[str, Any]) -> bool:
    """Whether a module is a projection that a kernel can take from among those of all layers."""
    return "/multi_head_attention/" in name and isinstance(params.get("w"), QuantizedWeight8bit)


# --------------------------------------------------------------------------- the language model


class LanguageModel(hk.Module):
    """Tokens to logits. Made by `LanguageModelConfig.make`."""

    def __init__(
        self,
        model: Transformer,
        config: LanguageModelConfig,
        mesh: Mesh | None = None,
        name: str = "language_model",
    ):
        super().__init__(name=name)
        self.model = model
        self.config = config
        self.mesh = mesh

    def init_memory(self, batch_size: int, seq_len: int, dtype: Any = jnp.bfloat16) -> Memory:
        """Return an empty memory; see TransformerConfig.init_memory."""
        return self.config.model.init_memory(batch_size, seq_len, dtype)

    def __call__(
        self,
        tokens: jax.Array,
        memory: Memory | None = None,
        *,
        last_hid_only: bool = False,
        length: jax.Array | None = None,
        sequence: jax.Array | None = None,
        every_position: bool = False,
        capture: Collection[str] = (),
        capture_layers: Sequence[int] | None = None,
        hooks: Mapping[str, Hook] | None = None,
    ) -> LanguageModelOutput | jax.Array:
        """Tokens int32 [B, T] -> LanguageModelOutput with float32 logits [B, T, V].

        memory: past positions, which these tokens continue; None: they start at position 0 and
        nothing is remembered.
        length: int32 [B], how many of the T tokens are real. The others change nothing: they are
        not seen, not remembered and go to no expert; a sequence of length 0 keeps its memory. The
        logits are then [B, 1, V], at each sequence's last real position, unless `every_position`.
        sequence: int32 [B], which sequences of a larger memory these continue, no two the same;
        those of each part of the data axis in that part. The others stay as they are.
        last_hid_only: return only the hidden state [B, D], float32 and after the final norm, at
        the last real position of each sequence.
        capture: names from CAPTURE_SITES; `captured` then holds their arrays. capture_layers: of
        which layers, in this order, -1 being the last one; None: all. All of them are kept until
        the call ends: `inspection.captured_shapes` says how large they are.
        hooks: by site a pure function `(layer, array) -> array` of the same shape and dtype, whose
        result the model goes on with. `layer` is a traced int32, -1 for embeddings: to change some
        layers only, `jnp.where(layer == 3, new, array)`. Under `jit` each new function object
        compiles anew.

        Raises ValueError if the mesh's data axis does not divide B; for a site or layer that is not
        there, or a hook that returns another shape or dtype; for a `sequence` of another shape, or
        without a memory; or for a capture with last_hid_only.
        """
        config = self.config
        batch, steps = tokens.shape
        self._check(batch)
        capture = check_sites(capture, hooks, config.model.num_experts)
        require(not (capture and last_hid_only), "capture", "none with last_hid_only", capture)
        if sequence is not None:
            require(memory is not None, "sequence", "to be given with a memory", sequence.shape)
            require(sequence.shape == (batch,), "sequence", f"shape {(batch,)}", sequence.shape)
        written = jnp.full([batch], steps, jnp.int32) if length is None else length
        real = (tokens > config.pad_token) & (jnp.arange(steps) < written[:, None])
        start, valid, whole = jnp.zeros([batch], jnp.int32), real, memory
        if memory is not None:
            memory = _chosen(memory, sequence)
            start, valid = memory.layers.step, _remember_valid(memory, real, written)
        # A query sees the real keys up to its own position.
        position = start[:, None] + jnp.arange(steps)  # [B, T]
        causal = jnp.arange(valid.shape[1]) <= position[..., None]  # [B, T, S]
        mask = causal & valid[:, None, :]

        embed = InOutEmbed(
            config.vocab_size,
            config.model.emb_size,
            config.embedding_init_scale,
            name="in_out_embed",
        )
        outside = Probe(capture, hooks)
        h = embed(tokens, config.fprop_dtype) * config.embedding_multiplier_scale
        h = outside("embeddings", h)
        h = constrain(h, self.mesh, config.model.data_axis, None, None)
        layers = None if memory is None else memory.layers
        looked_at: dict[str, Any] = {
            "capture": tuple(site for site in capture if site not in OUTSIDE_LAYERS),
            "capture_layers": capture_layers,
            "hooks": hooks,
        }
        h, layers, captured = self.model(h, mask, real, layers, length=length, **looked_at)
        memory = None if layers is None else _put_back(Memory(layers, valid), whole)

        h = RMSNorm(name="rms_norm")(h)
        if (length is not None and not every_position) or last_hid_only:
            last = written - 1 if length is not None else _last_real(real)
            h = jnp.take_along_axis(h, jnp.maximum(last, 0)[:, None, None], axis=1)  # [B, 1, D]
        if last_hid_only:
            return h[:, 0]
        h = constrain(h, self.mesh, config.model.data_axis, None, None)
        h = h.astype(config.fprop_dtype)
        model = all_model_axes(self.mesh, config.model.model_axis)
        if config.model.kernels:
            where = {"data": config.model.data_axis, "vocabulary": model}
            table = embed.embeddings.astype(h.dtype)
            logits = output_logits(h, table, self.mesh, **where)
        else:
            logits = embed.decode(h)
        logits *= config.output_multiplier_scale
        logits = constrain(logits, self.mesh, config.model.data_axis, None, model)
        return LanguageModelOutput(logits, memory, Captured(**outside.found, **captured))

    def _check(self, batch: int) -> None:
        data = axis_size(self.mesh, self.config.model.data_axis)
        if batch % data:
            raise ValueError(
                f"the batch must be a multiple of the mesh's data axis {data}, got {batch}; pad it"
            )


def _chosen(memory: Memory, sequence: jax.Array | None) -> Memory:
    """Return a memory of which only some sequences are read: whole caches, the marks of these."""
    if sequence is None:
        return memory
    layers = memory.layers
    step = layers.step[sequence]
    return Memory(layers._replace(step=step, sequence=sequence), memory.valid[sequence])


def _put_back(memory: Memory, whole: Memory | None) -> Memory:
    """Undo `_chosen`: return all sequences of `whole`, those that have been read as in `memory`."""
    layers, sequence = memory.layers, memory.layers.sequence
    if sequence is None or whole is None:
        return memory
    step = whole.layers.step.at[sequence].set(layers.step)
    valid = whole.valid.at[sequence].set(memory.valid)
    return Memory(layers._replace(step=step, sequence=None), valid)


def _last_real(real: jax.Array) -> jax.Array:
    """real bool [B, T] -> int32 [B], the last True position of each row."""
    return jnp.max(jnp.where(real, jnp.arange(real.shape[1]), 0), axis=1)


def _remember_valid(memory: Memory, real: jax.Array, written: jax.Array) -> jax.Array:
    """Note which of the new positions, real bool [B, T], hold keys -> valid bool [B, S]."""
    row = jnp.arange(memory.valid.shape[1]) - memory.layers.step[:, None]  # [B, S]
    last = real.shape[1] - 1
    new = jnp.take_along_axis(real, jnp.clip(row, 0, last), axis=1)
    return jnp.where((row >= 0) & (row < written[:, None]), new, memory.valid)
