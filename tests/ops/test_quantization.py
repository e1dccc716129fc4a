"""Int8 weights: quantization, dequantization, products and the splitting of scale groups."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import model
from grok1.ops.quantization import (
    QuantizedWeight8bit,
    dequantize,
    matmul,
    quantize,
    split_groups,
)
from small import exact_weight as exact
from small import random_weight

BFLOAT16 = ml_dtypes.bfloat16
# (leading axes, rows, columns, groups)
SHAPES = [((), 24, 7, 8), ((2, 3), 10, 3, 5), ((), 1, 1, 1)]

quantize_jit = jax.jit(quantize, static_argnums=1)
dequantize_jit = jax.jit(dequantize, static_argnums=1)
matmul_jit = jax.jit(matmul)


# ------------------------------------------------------------------------------- the weight itself


def test_quantized_weight_pytree_has_weight_and_scales():
    """A transformation must reach both arrays and return the class that the model exports."""
    weight = QuantizedWeight8bit(weight=np.ones((4, 2), np.int8), scales=np.ones((1, 2), BFLOAT16))
    shapes = jax.tree.map(lambda x: x.shape, weight)
    assert shapes == model.QuantizedWeight8bit(weight=(4, 2), scales=(1, 2))
    assert weight.shape == (4, 2)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(weight)]
    assert paths == [".weight", ".scales"]


# ------------------------------------------------------------------------------------ quantize


@pytest.mark.parametrize(
    ("lead", "rows", "columns", "groups", "dtype"),
    [*((*shape, np.float32) for shape in SHAPES), (*SHAPES[0], BFLOAT16)],
)
def test_quantize_rounds_to_the_nearest_step(lead, rows, columns, groups, dtype):
    rng = np.random.default_rng(1)
    magnitude = np.exp2(rng.uniform(-20, 20, (*lead, 1, columns)))
    values = (rng.standard_normal((*lead, rows, columns)) * magnitude).astype(dtype)
    stored = quantize_jit(values, groups)
    assert stored.weight.dtype == jnp.int8 and stored.scales.dtype == jnp.bfloat16
    assert stored.shape == values.shape
    assert stored.scales.shape == (*lead, groups, columns)
    # The scale is the largest magnitude / 127, to bfloat16's precision.
    grouped = values.astype(np.float64).reshape(*lead, groups, rows // groups, columns)
    wanted = np.abs(grouped).max(axis=-2) / 127
    scales = np.asarray(stored.scales, np.float64)
    assert np.all(np.abs(scales / wanted - 1) <= 2.0**-8)
    # Half a step of the stored scale at most: dividing by the scale before it is rounded to
    # bfloat16 would add up to a quarter.
    step = np.repeat(scales, rows // groups, axis=-2)
    assert np.all(np.abs(exact(stored) - values.astype(np.float64)) <= 0.5001 * step)
    assert np.min(np.asarray(stored.weight, int)) >= -127


def test_quantize_inverts_dequantize():
    """If each group contains 127, its scale and its values are restored exactly."""
    weight = random_weight((2,), 16, 6, 8)
    weight.weight[:, ::2] = 127  # in each group of two rows
    again = quantize_jit(dequantize_jit(weight, jnp.float32), 8)
    assert np.array_equal(again.weight, weight.weight)
    assert np.array_equal(again.scales, weight.scales)


def test_quantize_keeps_groups_of_zeros():
    """The scale of a group of zeros must not be 0 / 127: that would divide 0 by 0."""
    values = np.random.default_rng(2).standard_normal((8, 4)).astype(np.float32)
    values[:, 1] = 0
    values[:4, 2] = 0  # one of two groups
    stored = quantize_jit(values, 2)
    assert np.all(np.asarray(stored.scales, np.float32) > 0)
    assert np.array_equal(np.asarray(dequantize_jit(stored, jnp.float32)) == 0, values == 0)


@pytest.mark.parametrize("groups", [0, 3, 16])
def test_quantize_rejects_groups_not_dividing_rows(groups):
    with pytest.raises(
        ValueError, match=rf"groups must divide the 8 rows .*\(8, 4\), got {groups}"
    ):
        quantize(jnp.ones([8, 4]), groups)


# ---------------------------------------------------------------------------------- dequantize


@pytest.mark.parametrize(("lead", "rows", "columns", "groups"), SHAPES)
def test_dequantize_multiplies_each_group_by_its_scale(lead, rows, columns, groups):
    """Exact in float32: 8 bits times 8 bits. A group is consecutive rows."""
    weight = random_weight(lead, rows, columns, groups)
    values = np.asarray(dequantize_jit(weight, jnp.float32))
    assert values.dtype == np.float32
    assert np.array_equal(values, exact(weight))
    rounded = np.asarray(dequantize_jit(weight, jnp.bfloat16))
    assert np.array_equal(rounded, exact(weight).astype(np.float32).astype(BFLOAT16))


def test_dequantize_casts_a_float_weight():
    values = jnp.asarray([[1.0, 1 / 3]])
    assert np.array_equal(dequantize(values), values)
    assert dequantize(values, jnp.bfloat16).dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------- matmul


@pytest.mark.parametrize(
    ("lead", "rows", "columns", "groups", "dtype"),
    [
        ((3,), 24, 7, 1, BFLOAT16),
        ((2, 5), 24, 7, 8, BFLOAT16),
        ((), 24, 7, 8, np.float32),
        ((2, 5), 9, 1, 3, np.float32),
    ],
)
def test_int8_matmul_is_exact_up_to_float32_sums(lead, rows, columns, groups, dtype):
    """In bfloat16 too: int8 is exact in it, and neither scales nor sums are rounded to it."""
    weight = random_weight((), rows, columns, groups)
    x = np.random.default_rng(3).standard_normal((*lead, rows)).astype(dtype)
    y = matmul_jit(x, weight)
    assert y.dtype == jnp.float32 and y.shape == (*lead, columns)
    x = x.astype(np.float64)
    largest = np.abs(x) @ np.abs(exact(weight))
    assert np.all(np.abs(np.asarray(y) - x @ exact(weight)) <= 4e-7 * largest)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_float_matmul_rounds_only_weight_to_x_dtype(dtype):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 40)).astype(dtype)
    weight = rng.standard_normal((40, 6)).astype(np.float32)
    y = matmul_jit(x, weight)
    assert y.dtype == jnp.float32
    x, weight = (a.astype(dtype).astype(np.float64) for a in (x, weight))
    assert np.all(np.abs(np.asarray(y) - x @ weight) <= 4e-7 * (np.abs(x) @ np.abs(weight)))


def test_float32_products_use_the_highest_precision():
    """TF32, the default on a GPU, keeps ten bits, which changes the choice of experts."""
    weight = random_weight((), 8, 4, 2)
    for dtype, expected in ((jnp.float32, lax.Precision.HIGHEST), (jnp.bfloat16, None)):
        for one in (weight, weight.weight):
            program = jax.make_jaxpr(matmul)(jnp.ones([2, 8], dtype), one)
            (dot,) = [e for e in program.eqns if e.primitive is lax.dot_general_p]
            assert dot.params["precision"] in (expected, (expected, expected))
            assert dot.params["preferred_element_type"] == jnp.float32


# -------------------------------------------------------------------------------- split_groups


@pytest.mark.parametrize(
    ("rows", "groups", "parts", "expected"),
    [
        (48, 8, 1, 8), (48, 8, 8, 8), (48, 8, 16, 16), (48, 8, 3, 24), (48, 1, 8, 8),
        (48, 12, 8, 24),
    ],
)  # fmt: skip
def test_split_groups_gives_each_part_complete_groups(rows, groups, parts, expected):
    weight = random_weight((2,), rows, 3, groups)
    split = split_groups(weight, parts)
    assert split.scales.shape == (2, expected, 3)
    # Scales that fit, as the released ones do, must not be copied in each layer of each step.
    assert split.weight is weight.weight and (split is weight) == (expected == groups)
    assert np.array_equal(exact(split), exact(weight))
    for part in range(parts):
        mine = (np.split(np.asarray(a), parts, axis=1)[part] for a in (split.weight, split.scales))
        slice_of_whole = np.split(exact(weight), parts, axis=1)[part]
        assert np.array_equal(exact(QuantizedWeight8bit(*mine)), slice_of_whole)


def test_split_groups_leaves_a_float_weight_unchanged():
    weight = np.ones((5, 3), np.float32)
    assert split_groups(weight, 2) is weight


def test_split_groups_rejects_rows_that_do_not_divide():
    weight = random_weight((), 8, 3, 8)
    with pytest.raises(ValueError, match="8 rows in 8 scale groups cannot be split in 3 parts"):
        split_groups(weight, 3)
