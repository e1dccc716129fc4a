"""The mixture of experts as pure functions: the obvious form, and those that pay only their share.

Dimension letters: `M` tokens, `D` model width, `F` expert hidden width, `E` experts, `A` experts
used per token, `R` rows of a block, `L` layers.

An expert's parameters are `{"linear": {"w": [D, F]}, "linear_v": {"w": [D, F]}, "linear_1": {"w":
[F, D]}}`, float or int8; those of a mixture have a leading E axis.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from grok1.kernels import dispatch as kernels
from grok1.ops.quantization import QuantizedWeight8bit, StackedWeight, local_matmul, matmul

Params = Mapping[str, Mapping[str, Any]]
SMALL_EXPERT = 8 << 20  # bytes of an expert's matrices, as multiplied, of which two go at a time
SIZES = 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 128  # rows that are compiled for


def expert(
    params: Params,
    x: jax.Array,
    multiply: Callable[[jax.Array, Any], jax.Array] = matmul,
) -> jax.Array:
    """One expert: `linear_1(gelu(linear(x)) * linear_v(x))`, gelu in its tanh approximation.

    params: {"linear": {"w": [D, F]}, "linear_v": {"w": [D, F]}, "linear_1": {"w": [F, D]}};
    x [..., D] in the activation dtype -> float32 [..., D]. (Shazeer 2020, eq. 6, GEGLU.)
    multiply: `matmul` or one that equals it, which may take other kinds of weights.
    """
    gate = jax.nn.gelu(multiply(x, params["linear"]["w"]), approximate=True)
    hidden = gate * multiply(x, params["linear_v"]["w"])
    return multiply(hidden.astype(x.dtype), params["linear_1"]["w"])


def all_experts(
    params: Params,
    x: jax.Array,
    gates: jax.Array,
    index: jax.Array,
    num_experts: int,
    *,
    layer: jax.Array | None = None,
) -> jax.Array:
    """Compute every expert for every token, most times a zero gate: the obvious form.

    params as `expert` takes them with a leading E axis, or with [L, E] and the `layer` to use;
    x [M, D] in the activation dtype, gates float32 [M, A], index int32 [M, A] (E for a masked
    token) -> float32 [M, D].
    """
    if layer is not None:
        params = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, layer, 0, False), params)
    outputs = jax.vmap(expert, in_axes=(0, None))(params, x)  # [E, M, D]
    return combine_all(outputs, gates, index, num_experts)


def combine_all(
    outputs: jax.Array, gates: jax.Array, index: jax.Array, num_experts: int
) -> jax.Array:
    """Sum the experts' outputs [E, M, D] by gates and index [M, A] -> float32 [M, D]."""
    weights = jnp.sum(jax.nn.one_hot(index, num_experts) * gates[..., None], axis=-2)  # [M, E]
    return jnp.einsum("me,emd->md", weights, outputs, precision=lax.Precision.HIGHEST)


class Blocks(NamedTuple):
    """Token copies sorted by expert, each expert's run padded to whole blocks of R rows.

    row_token: int32 [blocks, R], the token in each row; M where the row is padding.
    block_expert: int32 [blocks]. used: int32, how many blocks exist.
    copy_row: int32 [M, A], the row of each token copy; blocks * R for a masked one.
    """

    row_token: jax.Array
    block_expert: jax.Array
    used: jax.Array
    copy_row: jax.Array


def block_rows(copies: int, num_experts: int) -> int:
    """Return R: what most experts have to do in one block, a multiple of 4, up to 128."""
    # At least 4 rows: XLA's CPU backend multiplies fewer bfloat16 rows an order slower. At most
    # 128: what lies between an expert's products then stays in a CPU's cache. In between, more than
    # the even share, by its spread: a second block reads and converts the weights again.
    share = copies / num_experts
    return min(128, 4 * math.ceil((share + 1.25 * math.sqrt(share)) / 4))


def sort_by_expert(index: jax.Array, num_experts: int, multiple: int = 1) -> Blocks:
    """Lay the token copies out in blocks; index int32 [M, A], `num_experts` for a masked copy.

    There is room for a multiple of so many blocks, the unused ones of padding only.
    """
    tokens, chosen = index.shape
    copies = tokens * chosen
    rows = block_rows(copies, num_experts)
    # Each expert wastes less than one block, and no more blocks exist than copies.
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
    params: Params,
    x: jax.Array,
    gates: jax.Array,
    index: jax.Array,
    num_experts: int,
    *,
    layer: jax.Array | None = None,
    one_sequence: bool = False,
    differentiable: bool = False,
) -> jax.Array:
    """The mixture, computing only the chosen experts; equal to `all_experts`.

    Arguments as there. The loop is over blocks of rows of one expert, whose matrices are sliced out
    inside it. Two blocks go at a time if experts are small: a CPU's cores then take one each, where
    one matrix would not keep them busy.

    one_sequence: no token is another sequence's. Then large experts go by `by_size`, where rounding
    depends on how many tokens choose an expert. differentiable: loop over a static number of
    blocks, each with its own copy of its expert's matrices, and skip the empty ones: a loop with a
    dynamic bound has no reverse mode.
    """
    elements = sum(math.prod(module["w"].shape[-2:]) for module in params.values())
    small = elements * x.dtype.itemsize <= SMALL_EXPERT
    if one_sequence and not small and not differentiable:
        return by_size(params, x, gates, index, num_experts, layer)
    together = 2 if small and not differentiable else 1
    blocks = sort_by_expert(index, num_experts, together)
    most, rows = blocks.row_token.shape
    padded = jnp.concatenate([x, jnp.zeros_like(x[:1])])
    x_blocks = padded[blocks.row_token]  # [blocks, R, D]
    if differentiable:

        def block(used: jax.Array, inputs: tuple[jax.Array, jax.Array, Params]) -> Any:
            b, x_block, own = inputs
            zeros = jnp.zeros(x_block.shape, jnp.float32)
            return used, lax.cond(b < used, expert, lambda *_: zeros, own, x_block)

        own = jax.vmap(lambda e: _sliced(params, e, layer))(blocks.block_expert)
        # Recomputed in the backward pass: what `cond` would store includes each block's weights.
        _, out = lax.scan(jax.checkpoint(block), blocks.used, (jnp.arange(most), x_blocks, own))
    else:

        def body(i: jax.Array, out: jax.Array) -> jax.Array:
            first = i * together
            y = [
                _one_expert(params, blocks.block_expert[b], layer, x_blocks[b])
                for b in (first + j for j in range(together))
            ]
            return lax.dynamic_update_slice_in_dim(out, jnp.stack(y), first, 0)

        zeros = jnp.zeros(x_blocks.shape, jnp.float32)
        out = lax.fori_loop(0, (blocks.used + together - 1) // together, body, zeros)
    out = out.reshape(most * rows, -1)
    copies = out.at[blocks.copy_row].get(mode="fill", fill_value=0)  # [M, A, D]
    return jnp.sum(copies * gates[..., None], axis=1)


def by_size(
    params: Params,
    x: jax.Array,
    gates: jax.Array,
    index: jax.Array,
    num_experts: int,
    layer: jax.Array | None = None,
) -> jax.Array:
    """`chosen_experts`, each expert's rows together, up to the next of the sizes that are compiled.

    So its matrices are read and converted once, and few rows are multiplied that nobody asked for.
    Rounding may depend on the size: with several sequences, one's would on the others.
    """
    tokens, chosen = index.shape
    order, starts = sorted_copies(index, num_experts)
    # The smallest size that holds all, and those below it.
    fitting = [size for size in SIZES if size < tokens * chosen]
    sizes = (0, *SIZES[: len(fitting) + 1])
    rows = jnp.pad(x[order // chosen], ((0, sizes[-1]), (0, 0)))

    def multiply(size: int) -> Callable[..., jax.Array]:
        def write(e: jax.Array, row: jax.Array, out: jax.Array) -> jax.Array:
            own = lax.dynamic_slice_in_dim(rows, row, size)
            y = _one_expert(params, e, layer, own)
            # What is more than the expert's is written anew by those to whom it belongs.
            return lax.dynamic_update_slice_in_dim(out, y, row, 0)

        return write if size else lambda _e, _row, out: out

    branches = [multiply(size) for size in sizes]

    def body(state: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        e, row, out = state
        which = jnp.searchsorted(jnp.array(sizes[:-1]), starts[e + 1] - row)
        out = lax.switch(which, branches, e, row, out)
        row = jnp.minimum(row + jnp.array(sizes)[which], starts[e + 1])
        return e + (row == starts[e + 1]), row, out

    state = jnp.int32(0), jnp.int32(0), jnp.zeros(rows.shape, jnp.float32)
    _, _, out = lax.while_loop(lambda state: state[0] < num_experts, body, state)
    return unsorted(out[: tokens * chosen], order, starts, gates)


def sorted_copies(index: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Sort the token copies by expert; index int32 [M, A], `num_experts` for a masked copy.

    Returns the copies' order, int32 [M * A], masked ones last, and where in it each expert's begin,
    and at last where all end, int32 [E + 1].
    """
    flat = index.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    counts = jnp.sum(jax.nn.one_hot(flat, num_experts, dtype=jnp.int32), axis=0)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(counts, dtype=jnp.int32)])
    return order, starts


def unsorted(out: jax.Array, order: jax.Array, starts: jax.Array, gates: jax.Array) -> jax.Array:
    """Sum by gates [M, A] what the experts made of `sorted_copies`, [M * A, D] -> [M, D].

    What they made of masked copies counts as zero.
    """
    masked = jnp.arange(out.shape[0]) >= starts[-1]
    out = jnp.where(masked[:, None], 0, out)
    copies = jnp.zeros_like(out).at[order].set(out)
    return jnp.sum(copies.reshape(*gates.shape, -1) * gates[..., None], axis=1)


def _sliced(params: Any, e: jax.Array, layer: jax.Array | None) -> Any:
    """Return what [E, ...] or, with a layer, [L, E, ...] arrays hold of one expert."""
    where = (e,) if layer is None else (layer, e)

    def pick(w: jax.Array) -> jax.Array:
        start = (*where, *(0,) * (w.ndim - len(where)))
        size = (*(1,) * len(where), *w.shape[len(where) :])
        return lax.dynamic_slice(w, start, size).reshape(w.shape[len(where) :])

    return jax.tree.map(pick, params)


def _one_expert(params: Params, e: jax.Array, layer: jax.Array | None, x: jax.Array) -> jax.Array:
    """`expert` e of a layer, of its matrices where they lie."""

    def where_it_lies(module: Mapping[str, Any]) -> Mapping[str, Any]:
        stack = module["w"]
        if not isinstance(stack, QuantizedWeight8bit):
            return _sliced(module, e, layer)
        index = e if layer is None else layer * stack.shape[1] + e
        flat = jax.tree.map(lambda w: w.reshape(-1, *w.shape[-2:]), stack)
        return {"w": StackedWeight(flat, index)}

    own = {name: where_it_lies(module) for name, module in params.items()}
    return expert(own, x, local_matmul)


def kernel_experts(
    params: Params,
    x: jax.Array,
    gates: jax.Array,
    index: jax.Array,
    num_experts: int,
    *,
    layer: jax.Array | None = None,
) -> jax.Array:
    """`chosen_experts` by a CPU's own product of int8 weights.

    Arguments as there; accumulates in float32 whatever the dtype of x. Float weights, which that
    product does not take, are left to `chosen_experts`. Raises KernelError if there is no kernel.
    """
    weights = [params[name]["w"] for name in ("linear", "linear_v", "linear_1")]
    if not all(isinstance(w, QuantizedWeight8bit) for w in weights):
        return chosen_experts(params, x, gates, index, num_experts, layer=layer)
    if layer is None:
        weights, layer = jax.tree.map(lambda w: w[None], weights), jnp.int32(0)
    order, starts = sorted_copies(index, num_experts)
    gate_weight, value_weight, out_weight = weights
    rows = x[order // index.shape[1]]
    hidden = kernels.gated_product(rows, gate_weight, value_weight, starts, layer)
    out = kernels.grouped_product(hidden.astype(x.dtype), out_weight, starts, layer)
    return unsorted(out, order, starts, gates)
