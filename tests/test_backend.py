"""The version and settings of jax that all processes of a run must share."""

import jax
import pytest

from grok1 import backend


def test_another_version_of_jax_is_refused():
    other = backend.numerics() | {"version": "0.0.1"}
    with pytest.raises(ValueError, match=r"^expected jax 0.0.1, which process 0 has, got \d"):
        backend.use_numerics(other)


def test_settings_of_another_process_are_applied():
    before = backend.numerics()
    drawn = jax.random.bits(jax.random.key(0))
    try:
        backend.use_numerics(before | {"jax_default_prng_impl": "rbg"})
        assert jax.random.bits(jax.random.key(0)) != drawn
    finally:
        backend.use_numerics(before)
    assert jax.random.bits(jax.random.key(0)) == drawn
