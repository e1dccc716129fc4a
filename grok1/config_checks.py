"""Checks of the fields of a configuration, and reading one from plain fields.

Every function that checks raises ValueError that names the field, what it may hold and what it
holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from grok1.checks import require, require_integers, require_positive

if TYPE_CHECKING:
    from model import LanguageModelConfig, TransformerConfig

MOVED = "expert_dispatch", "scan_unroll", "kernels", "router"


def refuse_moved(fields: Iterable[str]) -> None:
    """Raise ValueError for a field that was once the configuration's and is now Execution's."""
    for name in fields:
        if name in MOVED:
            raise ValueError(
                f"{name}: expected a field of the model, got one that says how it is run; give it "
                f"to grok1.execution.Execution({name}=...), and that to config.make(execution=...)"
            )


def check_transformer(config: TransformerConfig) -> None:
    """Check the sizes of the decoder stack."""
    sizes = ("emb_size", "key_size", "num_q_heads", "num_kv_heads", "num_layers")
    require_integers(config, 1, *sizes, "num_selected_experts")
    require_integers(config, 0, "num_experts")
    require_positive(config, "widening_factor", "attn_output_multiplier")
    flag = config.shard_activations
    require(isinstance(flag, bool), "shard_activations", "true or false", flag)
    for field in ("data_axis", "model_axis"):
        axis = getattr(config, field)
        require(isinstance(axis, str), field, "the name of a mesh axis", axis)
    axis = config.model_axis
    require(axis != config.data_axis, "model_axis", "another name than data_axis", axis)
    require(config.key_size % 2 == 0, "key_size", "an even head width", config.key_size)
    multiple = f"a multiple of num_kv_heads = {config.num_kv_heads}"
    divides = config.num_q_heads % config.num_kv_heads == 0
    require(divides, "num_q_heads", multiple, config.num_q_heads)
    most, chosen = max(config.num_experts, 1), config.num_selected_experts
    require(chosen <= most, "num_selected_experts", f"at most num_experts = {most}", chosen)


def check_language_model(config: LanguageModelConfig, transformer: type) -> None:
    """Check the sizes of the language model; `transformer` is the type of its `model`."""
    model = config.model
    require(isinstance(model, transformer), "model", f"a {transformer.__name__}", model)
    require_integers(config, 1, "vocab_size", "sequence_len")
    require_integers(config, 0, "pad_token", "eos_token")
    for field in ("pad_token", "eos_token"):
        value, expected = getattr(config, field), f"a token below vocab_size = {config.vocab_size}"
        require(value < config.vocab_size, field, expected, value)
    scales = ("embedding_init_scale", "output_multiplier_scale", "embedding_multiplier_scale")
    require_positive(config, *scales)
    dtypes, given = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)), config.fprop_dtype
    require(any(d == given for d in dtypes), "fprop_dtype", "bfloat16 or float32", given)


def from_fields(cls: type, fields: Any) -> Any:
    """Build a configuration from a mapping of plain fields."""
    require(isinstance(fields, Mapping), "model", "an object of the transformer's fields", fields)
    refuse_moved(fields)
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name in fields:
        require(name in known, name, f"one of {sorted(known)}", name)
    for name, field in known.items():
        needed = field.default is dataclasses.MISSING
        require(name in fields or not needed, name, "a value in the configuration", None)
    return cls(**fields)
