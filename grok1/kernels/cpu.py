"""Kernels for a CPU; their functions are in cpu.cc."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grok1.kernels import mapped_files, shared_library, xla_cpu
from grok1.kernels.sorted_experts import grouped_experts, is_quantized, one_group
from grok1.ops.derivatives import forward_only
from grok1.ops.operations import table_product as plain_table_product
from grok1.ops.quantization import QuantizedWeight, StackedWeight, Weight, Weights
from grok1.ops.rounded_table import RoundedTable

PRODUCT = "grok_1_grouped_product"
EXPERTS = "grok_1_experts"
TABLE_PRODUCT = "grok_1_table_product"
LIKELY_LOGITS = "grok_1_likely_logits"
ATTEND = "grok_1_attend"
HANDLERS = {
    PRODUCT: "GroupedProduct",
    EXPERTS: "Experts",
    TABLE_PRODUCT: "TableProduct",
    LIKELY_LOGITS: "LikelyLogits",
    ATTEND: "Attend",
}
MOST_TABLE_ROWS = 16  # up to which `table_product` is faster than XLA's
FASTEST, DOTS, FLOATS = range(3)  # how integers are multiplied: the enum Form in cpu.cc
form = FASTEST  # the tests set the others


def grouped_product(
    x: jax.Array, weight: QuantizedWeight, starts: jax.Array, layer: jax.Array
) -> jax.Array:
    """Multiply each row with the matrix of its group.

    x: float [M, I], sorted by group. weight: [L, E, I, O], of which `layer` int32 [] is used.
    starts: int32 [E + 1], the first row of each group in x, then the end of the last group.
    Returns float32 [M, O], zero in the rows after the last group. int8 is multiplied in float32, by
    a processor with AMX in integers of 27 bits, as `xla_cpu.matmul` does. 4 bits are multiplied in
    such integers if M is small (and the processor has AVX2), in float32 otherwise. A row's result
    does not depend on other rows. Only the matrices in use are read, as stored, once for up to 64
    rows.

    Raises KernelError as `load` does.
    """
    load()
    shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[-1]), jnp.float32)
    arrays = x.astype(jnp.float32), weight.weight, weight.scales, starts, layer
    return _call(PRODUCT, shape, *arrays, **_how(weight))


def experts(
    x: jax.Array, weights: Sequence[QuantizedWeight], starts: jax.Array, layer: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The experts of rows x [M, D], sorted by expert; all products as by `grouped_product`.

    weights: gate and value [L, E, D, F], and out [L, E, F, D]. Returns `hidden @ out`, float32
    [M, D], and hidden, float32 [M, F]: `gelu(x @ gate) * (x @ value)`, rounded to the dtype of x;
    gelu in its tanh approximation. Raises KernelError as `load` does.
    """
    load()
    width, outputs = weights[-1].shape[-2:]
    shapes = [jax.ShapeDtypeStruct((x.shape[0], n), jnp.float32) for n in (outputs, width)]
    leaves = [leaf for weight in weights for leaf in (weight.weight, weight.scales)]
    rounded = np.bool_(x.dtype == jnp.bfloat16)
    arrays = x.astype(jnp.float32), *leaves, starts, layer
    y, hidden = _call(EXPERTS, shapes, *arrays, **_how(*weights), rounded=rounded)
    return y, hidden


def _how(*weights: QuantizedWeight) -> dict[str, np.int32]:
    """Return how weights are multiplied, and the inputs in a byte of them.

    int8 is multiplied in integers only if the sums of a scale group cannot overflow.
    """
    most = max(weight.shape[-2] // weight.scales.shape[-2] for weight in weights)
    in_byte = weights[0].shape[-2] // weights[0].weight.shape[-2]
    own_form = form if most <= xla_cpu.MOST_SUMMED else FLOATS
    return {"form": np.int32(own_form), "in_byte": np.int32(in_byte)}


def table_product(x: jax.Array, table: jax.Array) -> jax.Array:
    """`x [M, D] @ table.T`, table float32 or bfloat16 [V, D] -> float32 [M, V].

    Accumulates in float32. The table is read once, as stored. Faster than XLA for a few rows.

    Raises KernelError as `load` does.
    """
    load()
    shape = jax.ShapeDtypeStruct((x.shape[0], table.shape[0]), jnp.float32)
    return _call(TABLE_PRODUCT, shape, x.astype(jnp.float32), table)


def likely_logits(x: jax.Array, table: jax.Array, rounded: RoundedTable, count: int) -> jax.Array:
    """`table_product`, exact for the `count` largest of a row, for the others by the rounded table.

    x, table: float32 [M, D] and [V, D]. The exact ones have the bits of `table_product`.

    Raises KernelError as `load` does.
    """
    load()
    shape = jax.ShapeDtypeStruct((x.shape[0], table.shape[0]), jnp.float32)
    return _call(LIKELY_LOGITS, shape, x, table, *rounded, count=np.int32(count))


def attend_one(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    mask: jax.Array,
    multiplier: float,
    layer: jax.Array,
    filled: jax.Array,
) -> jax.Array:
    """`cache.attend_cached` for one position of each sequence, T = 1 and B = C.

    keys, values: float32, bfloat16 or its bits. Only filled positions are read.

    Raises KernelError as `load` does.
    """
    load()
    positions = jnp.broadcast_to(mask[:, 0], (query.shape[0], keys.shape[2]))
    rows = query[:, 0].astype(jnp.float32)
    shape = jax.ShapeDtypeStruct(rows.shape, jnp.float32)
    arrays = rows, keys, values, positions, layer, filled
    return _call(ATTEND, shape, *arrays, multiplier=np.float32(multiplier))[:, None]


def _call(name: str, shapes: Any, *arrays: jax.Array, **numbers: np.generic) -> Any:
    """Call a function of cpu.cc, which returns an array of a shape, or several of some shapes."""
    return forward_only(functools.partial(jax.ffi.ffi_call(name, shapes), **numbers))(*arrays)


@functools.cache
def load() -> None:
    """Compile the kernels, unless they are cached, and register them with jax.

    Raises KernelError if that fails.
    """
    library = shared_library.load([*HANDLERS.values(), *mapped_files.FUNCTIONS])
    mapped_files.use(library)
    for target, name in HANDLERS.items():
        handler = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")


# --------------------------------------------------------------------- which form is used for what


def _matmul(x: jax.Array, weight: Weight) -> jax.Array:
    if isinstance(weight, StackedWeight) and isinstance(weight.stack, QuantizedWeight):
        return one_group(grouped_product, x, weight)
    return xla_cpu.matmul(x, weight)


def _table_product(x: jax.Array, table: jax.Array) -> jax.Array:
    few = x.shape[0] <= MOST_TABLE_ROWS
    return table_product(x, table) if few else plain_table_product(x, table)


def _mixture(params: Weights, x: jax.Array, gates: jax.Array, index: jax.Array) -> jax.Array:
    if not is_quantized(params):
        return xla_cpu.chosen_experts(params, x, gates, index)
    return grouped_experts(experts, params, x, gates, index)


def _attend_cached(query: jax.Array, *cached: Any) -> jax.Array:
    *arrays, sequence = cached
    if query.shape[1] == 1 and sequence is None:
        return attend_one(query, *arrays)
    return xla_cpu.attend_cached(query, *cached)


OPERATIONS = xla_cpu.OPERATIONS._replace(
    matmul=_matmul,
    table_product=_table_product,
    mixture=_mixture,
    attend_cached=_attend_cached,
    takes_stacked=True,
    likely_logits=likely_logits,
)
