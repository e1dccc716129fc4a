"""Weights of 4 bits: their bytes, the search for scales, products, and a model on each mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
import reference
from grok1.execution import Execution
from grok1.ops.quantization import QuantizedWeight4bit, dequantize, matmul, split_groups, unpack
from grok1.ops.quantize_4bit import pack, quantize_4bit
from grok1.parallel.sharding import make_mesh, named_shardings, parameter_specs
from grok1.parameters import dequantize_params, quantize_experts
from grok1.reference import weights_of
from grok1.serving.steps import apply_model
from model import LanguageModelConfig, TransformerConfig
from small import normal

CONFIG = LanguageModelConfig(
    TransformerConfig(
        emb_size=128, widening_factor=12, key_size=16, num_q_heads=16, num_kv_heads=8, num_layers=2,
        num_experts=8, num_selected_experts=2, attn_output_multiplier=0.3,
    ),
    vocab_size=512, sequence_len=96, output_multiplier_scale=0.6, embedding_multiplier_scale=11.0,
    fprop_dtype=jnp.float32,
)  # fmt: skip


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


@pytest.fixture(scope="module")
def experts():
    """Parameters with experts of 4 bits, tokens, and the exact logits."""
    params = quantize_experts(CONFIG.init_params(0, quantized=True), 64)
    weights = jax.tree.map(np.asarray, weights_of(dequantize_params(params)))
    tokens = np.random.default_rng(2).integers(1, 512, (2, 24))
    fields = dataclasses.asdict(CONFIG) | {"model": dataclasses.asdict(CONFIG.model)}
    result = reference.run(weights, fields, tokens)
    margin = np.sort(result.router_probs, axis=-1)
    clear = np.min(margin[..., -2] - margin[..., -3], axis=0) > 1e-4
    return params, tokens, result.logits, clear


@pytest.mark.parametrize("kernels", ["plain", "xla_cpu", "cpu"])
@pytest.mark.parametrize("sizes", [None, (1, 8), (2, 4)], ids=str)
def test_logits_with_experts_of_4_bits_are_exact(sizes, kernels, experts):
    params, tokens, wanted, clear = experts
    mesh = None if sizes is None else make_mesh(sizes, num_kv_heads=8)
    if mesh is not None:
        shardings = named_shardings(
            parameter_specs(params, CONFIG.partition_rules(mesh), mesh), mesh
        )
        params = jax.device_put(params, shardings)
    how = Execution(mesh, kernels=kernels)
    logits = jax.jit(lambda p, t: apply_model(CONFIG, how, p, t).logits)(params, tokens)
    assert clear.sum() > 24
    assert golden.relative_error(logits, wanted)[clear].max() <= 1e-5
