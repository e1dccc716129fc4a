"""Attention to a cache in blocks: exact, and limited to the filled positions."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from grok1.kernels import dispatch, xla_cpu
from grok1.ops.cache import BLOCK, attend_cached
from small import exact_attention, normal

LAYERS, HEADS, GROUP, WIDTH, MULTIPLIER = 2, 2, 3, 4, 0.5
FORMS = {"plain": attend_cached, "xla_cpu": xla_cpu.attend_cached}


@functools.cache
def compiled(form="plain"):
    return jax.jit(functools.partial(FORMS[form], multiplier=MULTIPLIER))


def inputs(filled, rows, size, dtype=np.float32):
    """Return attend_cached's arguments for sequences of which `rows` positions are new."""
    batch = len(filled)
    query = normal(batch, rows, HEADS, GROUP, WIDTH, dtype=dtype)
    keys, values = (
        normal(LAYERS, batch, size, HEADS, WIDTH, seed=seed, dtype=dtype) for seed in (1, 2)
    )
    position = np.array(filled)[:, None] - rows + np.arange(rows)
    mask = np.arange(size) <= position[..., None]  # [B, T, S]
    mask &= np.random.default_rng(3).random((batch, 1, size)) < 0.8
    return query, keys, values, mask, np.array(filled, np.int32)


def attended(query, keys, values, mask, filled, form="plain"):
    return compiled(form)(query, keys, values, mask, layer=jnp.int32(1), filled=jnp.asarray(filled))


@pytest.mark.parametrize(("rows", "form"), [(3, "plain"), (1, "plain"), (1, "xla_cpu")])
@pytest.mark.parametrize("size", [5, BLOCK, 2 * BLOCK + 100])
def test_attention_in_blocks_equals_attention_at_once(size, rows, form):
    """A last block that is not full overlaps the one before it, and counts nothing twice."""
    filled = [rows, max(rows, size // 2), size - 1, size]
    query, keys, values, mask, filled = inputs(filled, rows, size)
    expected = exact_attention(query, keys[1], values[1], mask, MULTIPLIER)
    found = attended(query, keys, values, mask, filled, form)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


def test_bfloat16_cache_may_be_stored_as_uint16():
    size = BLOCK + 20
    query, keys, values, mask, filled = inputs([size, 9], 2, size, dtype=ml_dtypes.bfloat16)
    bits = [x.view(np.uint16) for x in (keys, values)]
    found = attended(query, *bits, mask, filled, "xla_cpu")
    assert np.array_equal(found, attended(query, keys, values, mask, filled, "xla_cpu"))
    expected = exact_attention(query, keys[1], values[1], mask, MULTIPLIER)
    assert np.linalg.norm(found - expected) < 0.005 * np.linalg.norm(expected)


@pytest.mark.parametrize("form", FORMS)
def test_longer_sequence_changes_no_bit_of_the_others(form):
    """A block that only the longest sequence needs adds exactly zero to the others."""
    size = 4 * BLOCK
    query, keys, values, mask, _ = inputs([40, BLOCK], 1, size)
    short = attended(query, keys, values, mask, np.int32([40, BLOCK]), form)
    for longer in (BLOCK + 1, size):
        found = attended(query, keys, values, mask, np.int32([40, longer]), form)
        assert np.array_equal(found[0], short[0])


def test_blocks_beyond_all_sequences_are_not_read():
    query, keys, values, mask, filled = inputs([40, BLOCK], 1, 3 * BLOCK)
    clean = attended(query, keys, values, mask, filled)
    keys[:, :, BLOCK:] = np.nan
    values[:, :, BLOCK:] = np.nan
    assert np.array_equal(attended(query, keys, values, mask, filled), clean)


def test_query_that_sees_no_key_gets_zero():
    query, keys, values, mask, _ = inputs([8, 8], 2, 16)
    mask[0, 1] = False
    found = attended(query, keys, values, mask, np.int32([8, 0]))
    assert np.all(found[0, 1] == 0) and np.all(found[1] == 0) and np.any(found[0, 0])


def test_nan_key_gives_nan():
    query, keys, values, mask, filled = inputs([8, 8], 2, 16)
    mask[0, :, 3] = True
    keys[1, 0, 3] = np.nan
    found = np.asarray(attended(query, keys, values, mask, filled))
    assert np.all(np.isnan(found[0])) and np.all(np.isfinite(found[1]))


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_at_cap_do_not_overflow_or_underflow(sign):
    """The maximum is not subtracted: 8,192 exponentials of 30 or of -30 are summed."""
    size = 8192
    query = np.full((1, 1, HEADS, GROUP, WIDTH), 100.0 * sign, np.float32)
    keys = np.full((LAYERS, 1, size, HEADS, WIDTH), 100.0, np.float32)
    values = normal(LAYERS, 1, size, HEADS, WIDTH)
    found = attended(query, keys, values, np.ones((1, 1, size), bool), [size])
    expected = np.broadcast_to(values[1].mean(axis=1)[:, None, :, None], found.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_temporary_memory_is_independent_of_cache_size():
    def temporaries(size):
        arguments = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs([size], 64, size)[:3]]
        mask = jax.ShapeDtypeStruct((1, 64, 1), bool)
        filled = jax.ShapeDtypeStruct((1,), jnp.int32)
        lowered = compiled().lower(
            *arguments, mask, layer=jax.ShapeDtypeStruct((), jnp.int32), filled=filled
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert temporaries(16 * BLOCK) < 1.5 * temporaries(2 * BLOCK)


def test_only_cpu_kernels_store_bfloat16_as_uint16():
    for name in dispatch.NAMES:
        operations = dispatch.operations(name)
        assert operations.cache_dtype(jnp.float32) == jnp.float32
        bits = name in ("xla_cpu", "cpu")
        assert operations.cache_dtype(jnp.bfloat16) == (jnp.uint16 if bits else jnp.bfloat16)
