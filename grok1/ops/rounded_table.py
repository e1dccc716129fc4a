"""The output table rounded to int16, of which a decode step reads half as many bytes.

Dimension letters: `M` rows, `D` model width, `V` vocabulary.

A decode step needs a few logits exactly: those of the tokens that may be the most probable ones,
and of the token that it draws. The rounded table gives all logits approximately, with a bound of
their errors, which tells which rows of the float32 table still have to be read. In a random draw
every token counts, but an error of 1e-4 in one of many small probabilities does not show: errors of
different tokens have different signs.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

LARGEST = 2**15 - 1
LEAST_BYTES = 1 << 24  # of a table that is worth rounding: others stay in the caches
BLOCK = 4096  # rows that are rounded at a time, so that little memory is needed
LEAST_SUMMED = 4  # in how many partial sums the kernels add products, at least


class RoundedTable(NamedTuple):
    """A table float32 [V, D] rounded to int16, a scale for each row.

    values: int16 [V, D]. scales: float32 [V]. errors: float32 [V]; for any x [D], the products
    `x @ table[v]` and `x @ values[v] * scales[v]`, summed in float32 in any way that has at least
    LEAST_SUMMED partial sums, differ by at most `errors[v]` times the length of x.
    """

    values: jax.Array
    scales: jax.Array
    errors: jax.Array


@jax.jit
def round_table(table: jax.Array) -> RoundedTable:
    """Round a table float32 [V, D]."""
    return RoundedTable(*lax.map(_round_row, table, batch_size=BLOCK))


def _round_row(row: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Round one row [D] -> [D], [], []."""
    largest = jnp.max(jnp.abs(row))
    scale = jnp.where(largest > 0, largest / LARGEST, 1)
    values = jnp.clip(jnp.round(row / scale), -LARGEST, LARGEST)
    rounding = jnp.linalg.norm(row - values * scale)
    # Of a sum of n float32 products, at most n / 2^24 of the sum of their magnitudes; twice.
    summed = row.size / LEAST_SUMMED + 32
    error = rounding + 2 * summed * 2.0**-24 * jnp.linalg.norm(row)
    return values.astype(jnp.int16), scale, 1.001 * error  # which is rounded, too
