"""The mixture of experts as pure functions: all experts, or only the chosen ones.

Dimension letters: `B` batch, `T` positions, `M` = B * T tokens, `D` model width, `F` expert hidden
width, `E` experts, `A` experts used per token, `R` rows of a block.

A mixture's parameters are `{"linear": {"w": [E, D, F]}, "linear_v": {"w": [E, D, F]}, "linear_1":
{"w": [E, F, D]}}`, each weight float, of 8 or 4 bits, or a StackedWeight.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from grok1.ops.quantization import Weight, Weights, matmul, matrix, sliced


def top_k(x: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Return the `count` largest of x [..., E] and their indices; ties go to the lower index.

    Replaces `lax.top_k`, for which XLA gathers a batch that is split over several devices.
    """
    index: list[jax.Array] = []
    rest = x
    for _ in range(count):
        index.append(jnp.argmax(rest, axis=-1))
        taken = jax.nn.one_hot(index[-1], x.shape[-1], dtype=bool)
        rest = jnp.where(taken, -jnp.inf, rest)
    chosen = jnp.stack(index, axis=-1).astype(jnp.int32)
    return jnp.take_along_axis(x, chosen, axis=-1), chosen


def expert(
    params: Weights, x: jax.Array, multiply: Callable[[jax.Array, Weight], jax.Array] = matmul
) -> jax.Array:
    """One expert: `linear_1(gelu(linear(x)) * linear_v(x))`, gelu in its tanh approximation.

    params: {"linear": {"w": [D, F]}, "linear_v": {"w": [D, F]}, "linear_1": {"w": [F, D]}};
    x [..., D] in the activation dtype -> float32 [..., D]. (Shazeer 2020, eq. 6, GEGLU.)
    multiply: `matmul`, or a processor's implementation of it.
    """
    gate = jax.nn.gelu(multiply(x, params["linear"]["w"]), approximate=True)
    hidden = gate * multiply(x, params["linear_v"]["w"])
    return multiply(hidden.astype(x.dtype), params["linear_1"]["w"])


def all_experts(params: Weights, x: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
    """Compute every expert for every token, mostly with a gate of zero: the definition.

    x [B, T, D] in the activation dtype, gates float32 [B, T, A], index int32 [B, T, A] (E for a
    masked token) -> float32 [B, T, D], `sum_a gates[a] * expert_{index[a]}(x)`.
    """
    outputs = jax.vmap(expert, in_axes=(0, None))(sliced(params), x)  # [E, B, T, D]
    return gated_sum(outputs, gates, index)


def gated_sum(outputs: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
    """Sum all experts' outputs [E, B, T, D] by gates and index [B, T, A] -> float32 [B, T, D]."""
    chosen = jax.nn.one_hot(index, outputs.shape[0])  # [B, T, A, E]
    weights = jnp.sum(chosen * gates[..., None], axis=-2)  # [B, T, E]
    return jnp.einsum("bte,ebtd->btd", weights, outputs, precision=lax.Precision.HIGHEST)


class Blocks(NamedTuple):
    """Token copies sorted by expert, the rows of each expert padded to a multiple of R.

    row_token: int32 [blocks, R], the token in each row; M where the row is padding.
    block_expert: int32 [blocks]. used: int32, how many blocks exist.
    copy_row: int32 [M, A], the row of each token copy; blocks * R for a masked one.
    """

    row_token: jax.Array
    block_expert: jax.Array
    used: jax.Array
    copy_row: jax.Array


def block_rows(copies: int, num_experts: int) -> int:
    """Return R, a multiple of 4 up to 128: one block is enough for most experts."""
    # The even share plus its spread, since a second block reads an expert's weights again. Fewer
    # than 4 rows cost as much as 4; with more than 128, too many may be padding.
    share = copies / num_experts
    return min(128, 4 * math.ceil((share + 1.25 * math.sqrt(share)) / 4))


def sort_by_expert(index: jax.Array, num_experts: int, multiple: int = 1) -> Blocks:
    """Lay out the token copies in blocks; index int32 [M, A], `num_experts` for a masked copy.

    The number of blocks is a multiple of `multiple`; unused ones hold only padding.
    """
    tokens, chosen = index.shape
    copies = tokens * chosen
    rows = block_rows(copies, num_experts)
    # Each expert wastes less than one block, and there are no more blocks than copies.
    most = min(copies, (copies + num_experts * (rows - 1)) // rows)
    most = -(-most // multiple) * multiple
    flat = index.reshape(-1)
    counts = jnp.sum(jax.nn.one_hot(flat, num_experts, dtype=jnp.int32), axis=0)  # [E]
    blocks = (counts + rows - 1) // rows
    ends = jnp.cumsum(blocks)
    order = jnp.argsort(flat, stable=True)  # [copies], grouped by expert, masked ones last
    sorted_expert = flat[order]
    # A copy's row: its expert's first block, plus its rank within the expert.
    rank = jnp.arange(copies) - jnp.take(jnp.cumsum(counts) - counts, sorted_expert, mode="clip")
    row = jnp.take(ends - blocks, sorted_expert, mode="clip") * rows + rank
    row = jnp.where(sorted_expert < num_experts, row, most * rows)
    row_token = jnp.full([most * rows], tokens).at[row].set(order // chosen, mode="drop")
    copy_row = jnp.zeros([copies], row.dtype).at[order].set(row)
    block_expert = jnp.searchsorted(ends, jnp.arange(most), side="right")
    return Blocks(
        row_token.reshape(most, rows),
        jnp.minimum(block_expert, num_experts - 1),
        ends[-1],
        copy_row.reshape(tokens, chosen),
    )


def chosen_experts(
    params: Weights,
    x: jax.Array,
    gates: jax.Array,
    index: jax.Array,
    *,
    multiply: Callable[[jax.Array, Weight], jax.Array] = matmul,
    together: int = 1,
) -> jax.Array:
    """Compute only the chosen experts of a mixture; arguments and result as in `all_experts`.

    The loop runs over blocks of rows, `together` blocks at a time, and reads the matrices of each
    block's expert. multiply: `matmul`, or a processor's implementation of it.
    """
    blocks = sort_by_expert(flat(index), expert_count(params), together)
    x_blocks = gather_rows(x, blocks)

    def one(b: jax.Array) -> jax.Array:
        e = blocks.block_expert[b]
        own = {name: {"w": matrix(leaves["w"], e)} for name, leaves in params.items()}
        return expert(own, x_blocks[b], multiply)

    def body(i: jax.Array, out: jax.Array) -> jax.Array:
        first = i * together
        y = jnp.stack([one(first + j) for j in range(together)])
        return lax.dynamic_update_slice_in_dim(out, y, first, 0)

    zeros = jnp.zeros(x_blocks.shape, jnp.float32)
    out = lax.fori_loop(0, (blocks.used + together - 1) // together, body, zeros)
    return scatter_rows(out, blocks, gates)


def differentiable_experts(
    params: Weights, x: jax.Array, gates: jax.Array, index: jax.Array
) -> jax.Array:
    """`chosen_experts` for training: a loop with a dynamic bound has no reverse-mode gradient.

    The loop runs over the largest possible number of blocks, each with a copy of its expert's
    matrices, and skips empty ones.
    """
    params = sliced(params)
    blocks = sort_by_expert(flat(index), expert_count(params))
    x_blocks = gather_rows(x, blocks)
    own = jax.vmap(lambda e: jax.tree.map(lambda w: w[e], params))(blocks.block_expert)

    def block(
        used: jax.Array, inputs: tuple[jax.Array, jax.Array, Weights]
    ) -> tuple[jax.Array, jax.Array]:
        b, x_block, own = inputs
        zeros = jnp.zeros(x_block.shape, jnp.float32)
        return used, lax.cond(b < used, expert, lambda *_: zeros, own, x_block)

    # Recomputed in the backward pass: what `cond` would store includes each block's weights.
    numbers = jnp.arange(x_blocks.shape[0])
    _, out = lax.scan(jax.checkpoint(block), blocks.used, (numbers, x_blocks, own))
    return scatter_rows(out, blocks, gates)


def expert_count(params: Weights) -> int:
    """Return E."""
    return params["linear"]["w"].shape[0]


def flat(x: jax.Array) -> jax.Array:
    """[B, T, ...] -> [M, ...]."""
    return x.reshape(-1, *x.shape[2:])


def gather_rows(x: jax.Array, blocks: Blocks) -> jax.Array:
    """Lay out tokens x [B, T, D] in blocks [blocks, R, D], zero where a row is padding."""
    x = flat(x)
    return jnp.concatenate([x, jnp.zeros_like(x[:1])])[blocks.row_token]


def scatter_rows(out: jax.Array, blocks: Blocks, gates: jax.Array) -> jax.Array:
    """Sum the blocks' rows [blocks, R, D] of each token by gates [B, T, A] -> [B, T, D]."""
    out = out.reshape(-1, out.shape[-1])
    copies = out.at[blocks.copy_row].get(mode="fill", fill_value=0)  # [M, A, D]
    mixed = jnp.sum(copies * flat(gates)[..., None], axis=1)
    return mixed.reshape(*gates.shape[:2], -1)
