"""The platform and the settings of jax."""

import jax
import pytest

from grok1 import backend


def test_processes_with_another_jax_are_refused() -> None:
    other = backend.numerics() | {"version": "0.0.1"}
    with pytest.raises(ValueError, match=r"^expected jax 0.0.1, which process 0 has, got \d"):
        backend.use_numerics(other)


def test_the_numerics_of_another_process_are_taken_over() -> None:
    before = backend.numerics()
    drawn = jax.random.bits(jax.random.key(0))
    try:
        backend.use_numerics(before | {"jax_default_prng_impl": "rbg"})
        assert jax.random.bits(jax.random.key(0)) != drawn
    finally:
        backend.use_numerics(before)
    assert jax.random.bits(jax.random.key(0)) == drawn
