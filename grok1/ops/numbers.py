"""Random numbers, and an order of numbers, that drawing a token needs."""

import jax
import jax.numpy as jnp
from jax import lax

SIGN = 1 << 31


def uniform_numbers(rngs: jax.Array) -> jax.Array:
    """Return a float64 number in [0, 1] for each key, [B] typed or uint32 [B, 2] raw -> [B, 1]."""
    bits = jax.vmap(lambda key: jax.random.bits(key, (2,), "uint32"))(rngs)
    with jax.enable_x64(True):
        high, low = jnp.split(bits.astype(jnp.float64), 2, axis=-1)
        return (high + low * 2.0**-32) * 2.0**-32


def ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 numbers above 0 in the same order as the float32 x, including -inf but not NaN."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    # The bits of negative numbers are in descending order, so they are inverted; the sign bit puts
    # the others above, including -0, which is not less than 0.
    return jnp.where(x < 0, ~bits, bits | jnp.uint32(SIGN))


def from_ordered_bits(order: jax.Array) -> jax.Array:
    """Undo `ordered_bits`; -0 becomes 0, and 0 NaN."""
    bits = jnp.where(order >= SIGN, order ^ jnp.uint32(SIGN), ~order)
    return lax.bitcast_convert_type(bits, jnp.float32)
