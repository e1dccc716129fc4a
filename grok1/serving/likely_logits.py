"""Logits of a decode step that reads little of the output table; see grok1/ops/rounded_table.py.

Dimension letters: `B` sequences, `D` model width, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from grok1.execution import Execution
from grok1.formats.loading import on_large_pages
from grok1.ops.quantization import product
from grok1.ops.rounded_table import LEAST_BYTES, RoundedTable, round_table
from grok1.serving.sampling import TOP_LOGPROBS

if TYPE_CHECKING:
    from grok1.serving.steps import Slots
    from model import LanguageModelConfig


def rounded_table(
    table: jax.Array, execution: Execution, stored: RoundedTable | None = None
) -> RoundedTable | None:
    """Return the output table [V, D] rounded, if decode steps are faster with it.

    stored: the table that is stored rounded, if the checkpoint has it.
    """
    if not rounded_bytes(table, execution):
        return None
    return stored or RoundedTable(*map(on_large_pages, round_table(table)))


def rounded_bytes(table: jax.Array | jax.ShapeDtypeStruct, execution: Execution) -> int:
    """Return the bytes of `rounded_table`, 0 if it is None."""
    size = math.prod(table.shape)
    useful = table.dtype == jnp.float32 and size * table.dtype.itemsize >= LEAST_BYTES
    usable = execution.mesh is None and execution.operations.likely_logits is not None
    return 2 * size if useful and usable else 0


def likely_logits(
    config: LanguageModelConfig,
    execution: Execution,
    x: jax.Array,
    table: jax.Array,
    rounded: RoundedTable,
    slots: Slots,
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Return logits [B, V], exact for the TOP_LOGPROBS largest of a row, and a function.

    x: the model's `last_hidden`, float32 [B, D]. The function returns the exact logits [B] of
    tokens int32 [B]. All logits of a slot are exact if it excludes tokens or adds to their logits:
    others may be the most probable ones then. A slot's logits do not depend on the other slots.
    """
    form, scale = execution.operations.likely_logits, config.output_multiplier_scale
    assert form is not None
    few, reorders = form(x, table, rounded, min(TOP_LOGPROBS, len(table))), _reorders(slots)
    logits = lax.cond(
        jnp.any(reorders),
        lambda: jnp.where(reorders[:, None], execution.operations.table_product(x, table), few),
        lambda: few,
    )
    return logits * scale, lambda token: product("bd,bd->b", x, table[token]) * scale


def _reorders(slots: Slots) -> jax.Array:
    """Return which slots draw from another order of tokens than the model's, bool [B]."""
    settings, early = slots.settings, slots.drawn < slots.min_len
    assert settings.bias is not None
    changed = early | jnp.any(~settings.mask | (settings.bias != 0), axis=1)
    changed |= settings.repetition_penalty != 1
    for penalty in (settings.presence_penalty, settings.frequency_penalty):
        assert penalty is not None
        changed |= penalty != 0
    return settings.active & changed
