"""A matrix product, and a mixture of experts, by the kernels of products.py.

Dimension letters as there, with `D` for the model width and `F` for that of an expert.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from grok1.kernels.gpu.products import (
    FEW,
    Copies,
    added,
    expert_sum,
    gated,
    grouped_product,
    side_by_side,
)
from grok1.kernels.gpu.tiles import Ref, load_tile, power_of_two
from grok1.ops.derivatives import forward_only
from grok1.ops.quantization import QuantizedWeight8bit


def multiply(
    x: jax.Array, weight: QuantizedWeight8bit, layer: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Return `x [M, I] @ weight [L, I, O]`, of one layer -> float32 [M, O]."""
    if len(x) > FEW:
        return added(side_by_side(x, [weight], layer, interpret=interpret))
    one_expert = jax.tree.map(lambda w: w[:, None], weight)
    gates = jnp.ones([len(x), 1], jnp.float32)
    return expert_sum(x[None], one_expert, layer, gates, interpret=interpret)


def mix(
    x: jax.Array,
    weights: tuple[QuantizedWeight8bit, ...],
    layer: jax.Array,
    gates: jax.Array,
    count: int,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Return `sum_e gates[:, e] * expert_e(x)` for x [M, D], as `mixture.chosen_experts`.

    weights: int8 [L, E, D, F] twice, gate and value, and [L, E, F, D]. gates: float32 [M, E], zero
    where a token has not chosen an expert; of each token at most `count` are not. Returns float32
    [M, D].
    """
    run: Any = functools.partial(functools.partial, interpret=interpret)
    gate, value, out = weights
    if len(x) <= FEW:
        hidden = run(gated)(x, gate, value, layer, gates)
        return run(expert_sum)(hidden, out, layer, gates)
    copies = run(by_expert)(gates, count)
    hidden = run(grouped_product)(x, [gate, value], layer, copies)
    y = run(grouped_product)(hidden, [out], layer, copies).reshape(len(x), count, -1)
    own = _compact(gates, count)[..., None]
    return jnp.sum(jnp.where(own != 0, y, 0) * own, axis=1)  # what was not written does not count


def _compact(gates: jax.Array, count: int) -> jax.Array:
    """Return the gates [M, E] other than zero, by ascending expert: [M, count], then zeros."""
    chosen = gates != 0
    earlier = jnp.sum(chosen[:, None] & np.tri(gates.shape[1], k=-1, dtype=bool), axis=-1)  # [M, E]
    own = (earlier[:, None] == np.arange(count)[:, None]) & chosen[:, None]  # [M, count, E]
    return jnp.sum(jnp.where(own, gates[:, None], 0), axis=-1)


def by_expert(gates: jax.Array, count: int, *, interpret: bool = False) -> Copies:
    """Return the copies of tokens with gates [M, E], of up to `count` experts each, by expert."""
    tokens, experts = gates.shape
    call = pl.pallas_call(
        functools.partial(_by_expert_kernel, count),
        grid=(experts,),
        out_shape=(
            jax.ShapeDtypeStruct((tokens * count,), jnp.int32),
            jax.ShapeDtypeStruct((experts + 1,), jnp.int32),
        ),
        compiler_params=plgpu.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="by_expert",
    )
    return Copies(*forward_only(call)(gates))


def _by_expert_kernel(count: int, gates_ref: Ref, order_ref: Ref, starts_ref: Ref) -> None:
    """Write the copies of one expert, and where they start."""
    expert, (tokens, experts) = pl.program_id(0), gates_ref.shape
    token = jnp.arange(power_of_two(tokens))

    def chosen_by(e: jax.Array) -> jax.Array:
        return (load_tile(gates_ref.at[token, e], token < tokens) != 0).astype(jnp.int32)

    def add(e: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chosen = chosen_by(e)
        return sums[0] + jnp.sum(chosen), sums[1] + chosen

    # Copies of earlier experts, of all tokens and of each.
    start, copies = lax.fori_loop(0, expert, add, (jnp.int32(0), jnp.zeros_like(token)))
    chosen = chosen_by(expert)
    end = jnp.cumsum(chosen)
    # The interpreter stores what is masked as it was: where nothing else is stored.
    place = jnp.where(chosen > 0, start + end - 1, tokens * count)
    plgpu.store(order_ref.at[place], token * count + copies, mask=chosen > 0)
    plgpu.store(starts_ref.at[expert], start)

    @pl.when(expert == experts - 1)
    def _() -> None:
        plgpu.store(starts_ref.at[expert + 1], start + jnp.sum(chosen))
