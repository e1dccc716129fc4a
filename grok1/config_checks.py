"""Check the fields of a configuration, and build one from plain fields.

Every check raises ValueError that names the field, the expected values and the given one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import haiku as hk
import jax
import jax.numpy as jnp

from grok1.checks import require, require_integers, require_positive
from grok1.parallel.sharding import REPLICA_AXIS

if TYPE_CHECKING:
    from model import LanguageModelConfig, Router, RouterOutput, TransformerConfig

Config = TypeVar("Config", "LanguageModelConfig", "TransformerConfig")

# Limits far above any known model. They bound the time and memory that an untrusted configuration
# can take, and keep whatever is computed from several fields below 2**63.
MOST_LAYERS = 1 << 9  # their tensors fit the largest index that is read
MOST_COUNT = 1 << 12  # heads, experts; also the head width
MOST_CHOSEN = 64  # experts per token, which are found one after another
MOST_WIDTH = 1 << 24  # other axes, and positions: exact in float32 up to this
MOST_LETTERS = 64  # in the name of a mesh axis, which errors show
MOST_VALUES = 1 << 50  # in a parameter
MOST_CACHED = 1 << 40  # keys in a sequence's cache
FACTORS = 1e-6, 1e6

MOVED = "expert_dispatch", "scan_unroll", "kernels", "router"


def reject_moved_field(fields: Iterable[str]) -> None:
    """Raise ValueError for a field that has moved from the configuration to Execution."""
    for name in fields:
        if name in MOVED:
            raise ValueError(
                f"{name}: expected a field of the model, got one that says how it is run; give it "
                f"to grok1.execution.Execution({name}=...), and that to config.make(execution=...)"
            )


def check_transformer(config: TransformerConfig) -> None:
    """Check the sizes of the decoder stack."""
    require_integers(config, 1, "num_layers", most=MOST_LAYERS)
    require_integers(config, 1, "key_size", "num_q_heads", "num_kv_heads", most=MOST_COUNT)
    require_integers(config, 0, "num_experts", most=MOST_COUNT)
    require_integers(config, 1, "num_selected_experts", most=MOST_CHOSEN)
    require_integers(config, 1, "emb_size", most=MOST_WIDTH)
    require_positive(config, *FACTORS, "widening_factor", "attn_output_multiplier")
    width, expected = config.ffn_size, f"one that makes an expert 8 to {MOST_WIDTH} numbers wide"
    require(8 <= width <= MOST_WIDTH, "widening_factor", expected, config.widening_factor)
    flag = config.shard_activations
    require(isinstance(flag, bool), "shard_activations", "true or false", flag)
    for field in ("data_axis", "model_axis"):
        axis = getattr(config, field)
        named = isinstance(axis, str) and axis not in ("", REPLICA_AXIS)
        require(named, field, f"the name of a mesh axis, not {REPLICA_AXIS!r}", axis)
        require(len(axis) <= MOST_LETTERS, field, f"at most {MOST_LETTERS} letters", axis)
    axis = config.model_axis
    require(axis != config.data_axis, "model_axis", "a name other than data_axis", axis)
    require(config.key_size % 2 == 0, "key_size", "an even head width", config.key_size)
    multiple = f"a multiple of num_kv_heads = {config.num_kv_heads}"
    divides = config.num_q_heads % config.num_kv_heads == 0
    require(divides, "num_q_heads", multiple, config.num_q_heads)
    most, chosen = max(config.num_experts, 1), config.num_selected_experts
    require(chosen <= most, "num_selected_experts", f"at most num_experts = {most}", chosen)
    widest = max(most * width, config.num_q_heads * config.key_size)
    values = math.prod((int(config.num_layers), int(config.emb_size), int(widest)))
    expected = f"a model with at most {MOST_VALUES} values in a parameter"
    require(values <= MOST_VALUES, "emb_size", expected, values)


def check_language_model(config: LanguageModelConfig, transformer: type) -> None:
    """Check the sizes of the language model; `transformer` is the type of its `model`."""
    model = config.model
    require(isinstance(model, transformer), "model", f"a {transformer.__name__}", model)
    require_integers(config, 1, "vocab_size", "sequence_len", most=MOST_WIDTH)
    require_integers(config, 0, "pad_token", "eos_token")
    for field in ("pad_token", "eos_token"):
        value, expected = getattr(config, field), f"a token below vocab_size = {config.vocab_size}"
        require(value < config.vocab_size, field, expected, value)
    cached = math.prod(
        map(int, (model.num_layers, config.sequence_len, model.num_kv_heads, model.key_size))
    )
    expected = f"one that makes at most {MOST_CACHED} numbers of keys in a sequence's cache"
    require(cached <= MOST_CACHED, "sequence_len", expected, config.sequence_len)
    scales = ("embedding_init_scale", "output_multiplier_scale", "embedding_multiplier_scale")
    require_positive(config, *FACTORS, *scales)
    dtypes, given = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)), config.fprop_dtype
    require(any(d == given for d in dtypes), "fprop_dtype", "bfloat16 or float32", given)


def check_router(config: TransformerConfig, router: Callable[[int], Router] | None) -> None:
    """Check that a router has the parameters that a checkpoint holds: those of `model.Router`."""
    if router is None or config.num_experts < 2:
        return
    experts = config.num_experts

    def route(x: jax.Array) -> RouterOutput:
        return router(config.num_selected_experts)(x, None, experts)

    x = jax.ShapeDtypeStruct((1, 1, config.emb_size), jnp.float32)
    found = jax.eval_shape(hk.transform(route).init, jax.random.key(0), x)
    held = {"router": {"w": [config.emb_size, experts]}}
    got = {name: {k: [*v.shape] for k, v in own.items()} for name, own in found.items()}
    expected = f"one with the parameters {held}, which a checkpoint holds"
    require(got == held, "router", expected, got)


def from_fields(cls: type[Config], fields: Any) -> Config:
    """Build a configuration from a mapping of plain fields."""
    require(isinstance(fields, Mapping), "model", "an object of the transformer's fields", fields)
    reject_moved_field(fields)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in fields:
        field = name if str(name).isidentifier() and len(name) <= 60 else "a field"
        require(name in known, field, f"one of {sorted(known)}", name)
    for name, field in known.items():
        needed = field.default is dataclasses.MISSING
        require(name in fields or not needed, name, "a value in the configuration", None)
    return cls(**fields)
