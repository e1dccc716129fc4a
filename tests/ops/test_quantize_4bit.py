"""Weights of 4 bits: their bytes, the search for scales, products, and a model on each mesh."""

import jax.numpy as jnp
import numpy as np
import pytest

import four_bits
import golden
import reference
from grok1.ops.quantization import QuantizedWeight4bit, dequantize, matmul, split_groups, unpack
from grok1.ops.quantize_4bit import pack, quantize_4bit
from small import normal


def exact(weight):
    """Return the matrix that a weight of 4 bits stands for, in float64, as its docstring says."""
    packed, scales = np.asarray(weight.weight), np.asarray(weight.scales)
    *lead, _, columns = packed.shape
    values = np.stack([packed << 4 >> 4, packed >> 4], axis=-2).reshape(*lead, -1, columns)
    return reference.dequantize(values, scales)


def test_bytes_hold_two_rows_of_a_column():
    values = np.random.default_rng(0).integers(-8, 8, (3, 10, 4)).astype(np.int8)
    packed = pack(values)
    assert packed.shape == (3, 5, 4) and packed.dtype == jnp.int8
    assert np.array_equal(packed & 15, values[:, ::2] & 15)
    assert np.array_equal(packed >> 4, values[:, 1::2])
    assert np.array_equal(unpack(packed), values)


@pytest.mark.parametrize("group", [2, 32, 64])
def test_scales_are_never_worse_than_the_largest_magnitude(group):
    """In the squared error of each group of each column, at any size of numbers."""
    rng = np.random.default_rng(1)
    x = normal(2, 128, 40) * np.exp2(rng.uniform(-20, 20, 40)).astype(np.float32)
    x[:, :, 0] = 0
    x[:, :, 1] = abs(x[:, :, 1])
    stored = quantize_4bit(x, group)
    assert stored.shape == x.shape and stored.scales.shape == (2, 128 // group, 40)
    assert stored.weight.dtype == jnp.int8 and stored.scales.dtype == jnp.bfloat16
    grouped = x.reshape(2, -1, group, 40).astype(np.float64)
    scale = (abs(grouped).max(axis=2, keepdims=True) / 7).astype(jnp.bfloat16).astype(np.float64)
    usual = np.clip(np.round(grouped / np.where(scale == 0, 1, scale)), -8, 7) * scale
    worst = np.sum((usual - grouped) ** 2, axis=2)
    found = np.sum((exact(stored).reshape(grouped.shape) - grouped) ** 2, axis=2)
    rounding = 1e-13 * np.sum(grouped**2, axis=2)  # of float32
    assert np.all(found <= worst * (1 + 1e-5) + rounding)
    assert found[..., 2:].sum() < 0.8 * worst[..., 2:].sum() or group == 2
    assert np.array_equal(exact(stored)[:, :, 0], x[:, :, 0])
    np.testing.assert_array_equal(dequantize(stored), exact(stored))


def test_quantizing_again_changes_nothing():
    stored = quantize_4bit(normal(128, 24))
    again = quantize_4bit(dequantize(stored))
    np.testing.assert_allclose(dequantize(again), dequantize(stored), rtol=1e-2, atol=1e-2)
    assert abs(exact(again) - exact(stored)).max() < 1e-6


@pytest.mark.parametrize("group", [0, 1, 3, 50, 200])
def test_groups_that_do_not_fit_are_refused(group):
    message = rf"group: expected an even divisor of the 192 .*such as \[32, 64\], got {group}"
    with pytest.raises(ValueError, match=message):
        quantize_4bit(np.ones([192, 4]), group)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_exact(dtype):
    x, weight = jnp.asarray(normal(5, 128), dtype), quantize_4bit(normal(128, 24, seed=1))
    wanted = np.asarray(x, np.float64) @ exact(weight)
    assert golden.relative_error(matmul(x, weight), wanted).max() < 1e-6


def test_scales_of_groups_that_a_mesh_cuts_are_repeated():
    weight = quantize_4bit(normal(128, 4), 128)
    split = split_groups(weight, 4)
    assert isinstance(split, QuantizedWeight4bit) and split.scales.shape == (4, 4)
    assert np.array_equal(exact(split), exact(weight))
    for part in range(4):  # a quarter of the bytes is a quarter of the rows
        own = QuantizedWeight4bit(split.weight[16 * part :][:16], split.scales[part:][:1])
        assert np.array_equal(exact(own), exact(weight)[32 * part :][:32])
    with pytest.raises(ValueError, match="12 rows in 1 scale groups cannot be split in 4 parts"):
        split_groups(quantize_4bit(normal(12, 4), 12), 4)


@pytest.mark.parametrize("kernels", ["plain", "xla_cpu", "cpu"])
@pytest.mark.parametrize("sizes", [None, (1, 8), (2, 4)], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.exhaustive if rank else ())
        for rank, name in enumerate(four_bits.NAMES)
    ],
)
def test_logits_with_experts_of_4_bits_are_exact(name, sizes, kernels):
    cuts = [20, 23] if kernels == "cpu" else []  # those have others for few tokens
    four_bits.model(name).check(sizes, kernels, cuts)
