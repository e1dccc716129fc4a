"""The mixture of experts with tokens sorted by expert, for products of groups of rows.

Dimension letters as in grok1/ops/mixture.py.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from grok1.ops.mixture import expert_count, flat
from grok1.ops.quantization import (
    QuantizedWeight4bit,
    QuantizedWeight8bit,
    StackedWeight,
    Weights,
    stacked,
)


def sorted_copies(index: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Sort the token copies by expert; index int32 [M, A], `num_experts` for a masked copy.

    Returns the order of the copies, int32 [M * A], masked ones last; and int32 [E + 1], the index
    in it of each expert's first copy, then the end of the last expert's.
    """
    flat = index.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    starts = jnp.sum(flat < jnp.arange(num_experts + 1)[:, None], axis=1, dtype=jnp.int32)
    return order, starts


def combine_sorted(
    out: jax.Array, order: jax.Array, starts: jax.Array, gates: jax.Array
) -> jax.Array:
    """Sum the experts' outputs for `sorted_copies`, by gates [B, T, A]: [M * A, D] -> [B, T, D].

    The outputs of masked copies count as zero.
    """
    masked = jnp.arange(out.shape[0]) >= starts[-1]
    out = jnp.where(masked[:, None], 0, out)
    copies = jnp.zeros_like(out).at[order].set(out)
    # Tokens are the first axis: XLA divides that axis among a CPU's cores.
    copies = copies.reshape(-1, gates.shape[-1], out.shape[-1])  # [M, A, D]
    mixed = jnp.sum(copies * flat(gates)[..., None], axis=1)
    return mixed.reshape(*gates.shape[:2], -1)


def grouped_experts(
    experts: Callable[..., tuple[jax.Array, jax.Array]],
    params: Weights,
    x: jax.Array,
    gates: jax.Array,
    index: jax.Array,
) -> jax.Array:
    """`mixture.chosen_experts` by products of rows that are grouped by expert.

    params: of 8 or 4 bits. experts: as in `kernels.cpu`.
    """
    order, starts = sorted_copies(flat(index), expert_count(params))
    rows = flat(x)[order // index.shape[-1]]
    weights = [stacked(params[name]["w"]) for name in ("linear", "linear_v", "linear_1")]
    y, _ = experts(rows, [w.stack for w in weights], starts, weights[0].layer)
    return combine_sorted(y, order, starts, gates)


def is_quantized(params: Weights) -> bool:
    """Return whether all weights of a mixture have 8 bits, or all 4."""
    kinds = {type(stacked(leaves["w"]).stack) for leaves in params.values()}
    return kinds in ({QuantizedWeight8bit}, {QuantizedWeight4bit})


def one_group(
    grouped_product: Callable[..., jax.Array], x: jax.Array, weight: StackedWeight
) -> jax.Array:
    """`x [..., I] @ weight [I, O]` -> float32 [..., O], as a grouped product of one group."""
    rows = x.reshape(-1, x.shape[-1])
    starts = jnp.array([0, rows.shape[0]], jnp.int32)
    stack = jax.tree.map(lambda w: w[:, None], weight.stack)  # [L, 1, I, O]
    y = grouped_product(rows, stack, starts, weight.layer)
    return y.reshape(*x.shape[:-1], -1)
