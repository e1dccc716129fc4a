"""Int8 weights: what they stand for, how near they come, and the product that takes them."""

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
SHAPES = [((), 8, 5, 1), ((), 24, 7, 8), ((3,), 10, 3, 5), ((2, 3), 16, 1, 8), ((), 1, 1, 1)]

quantize_jit = jax.jit(quantize, static_argnums=1)
dequantize_jit = jax.jit(dequantize, static_argnums=1)
matmul_jit = jax.jit(matmul)


# ------------------------------------------------------------------------------- the weight itself


def test_the_class_is_the_one_that_the_model_exports():
    assert model.QuantizedWeight8bit is QuantizedWeight8bit


def test_a_quantized_weight_is_a_pytree_of_weight_and_scales():
    """A transformation must reach both arrays, and give back the same class."""
    weight = QuantizedWeight8bit(weight=np.ones((4, 2), np.int8), scales=np.ones((1, 2), BFLOAT16))
    leaves, structure = jax.tree.flatten(weight)
    assert [leaf.shape for leaf in leaves] == [(4, 2), (1, 2)]
    back = jax.tree.unflatten(structure, leaves)
    assert isinstance(back, QuantizedWeight8bit)
    assert back.weight is weight.weight and back.scales is weight.scales
    assert jax.tree.map(lambda x: x.shape, weight) == QuantizedWeight8bit((4, 2), (1, 2))
    assert weight.shape == (4, 2)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(weight)]
    assert paths == [".weight", ".scales"]


# ------------------------------------------------------------------------------------ quantize


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize(("lead", "rows", "columns", "groups"), SHAPES)
def test_quantize_rounds_to_the_nearest_step_of_each_group(lead, rows, columns, groups, dtype):
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
    # No value is further off than half a step of the scale that is stored.
    step = np.repeat(scales, rows // groups, axis=-2)
    assert np.all(np.abs(exact(stored) - values.astype(np.float64)) <= 0.5001 * step)
    assert np.min(np.asarray(stored.weight, int)) >= -127


def test_quantize_rounds_against_the_scale_that_it_stores():
    """Dividing by the unrounded scale and storing the rounded one loses up to another 1/4 step."""
    values = np.linspace(0.1, 1.3, 4096, dtype=np.float32).reshape(64, 64)
    stored = quantize_jit(values, 1)
    error = np.abs(exact(stored) - values) / np.asarray(stored.scales, np.float64)
    assert error.max() <= 0.5001


def test_quantize_of_what_is_already_int8_changes_nothing():
    """Values that a group holds exactly come back exactly: the largest step must be 127."""
    weight = random_weight((2,), 16, 6, 8)
    weight.weight[:, ::2] = 127  # in each group of two rows
    again = quantize_jit(dequantize_jit(weight, jnp.float32), 8)
    assert np.array_equal(again.weight, weight.weight)
    assert np.array_equal(again.scales, weight.scales)


def test_zero_columns_stay_zero():
    """The scale of a group of zeros must not be 0 / 127: that would divide 0 by 0."""
    values = np.random.default_rng(2).standard_normal((8, 4)).astype(np.float32)
    values[:, 1] = 0
    values[:4, 2] = 0  # one of two groups
    stored = quantize_jit(values, 2)
    assert np.all(np.asarray(stored.scales, np.float32) > 0)
    assert np.array_equal(np.asarray(dequantize_jit(stored, jnp.float32)) == 0, values == 0)


@pytest.mark.parametrize("groups", [0, -1, 3, 16])
def test_quantize_refuses_groups_that_do_not_divide_the_rows(groups):
    with pytest.raises(
        ValueError, match=rf"groups must divide the 8 rows .*\(8, 4\), got {groups}"
    ):
        quantize(jnp.ones([8, 4]), groups)


# ---------------------------------------------------------------------------------- dequantize


@pytest.mark.parametrize(("lead", "rows", "columns", "groups"), SHAPES)
def test_dequantize_gives_each_group_of_rows_its_own_scale(lead, rows, columns, groups):
    """Exact in float32: 8 bits times 8 bits. The groups are consecutive rows, not interleaved."""
    weight = random_weight(lead, rows, columns, groups)
    values = np.asarray(dequantize_jit(weight, jnp.float32))
    assert values.dtype == np.float32
    assert np.array_equal(values, exact(weight))
    rounded = np.asarray(dequantize_jit(weight, jnp.bfloat16))
    assert np.array_equal(rounded, exact(weight).astype(np.float32).astype(BFLOAT16))


def test_dequantize_of_a_float_weight_is_a_cast():
    values = jnp.asarray([[1.0, 1 / 3]])
    assert np.array_equal(dequantize(values), values)
    assert dequantize(values, jnp.bfloat16).dtype == jnp.bfloat16


# ------------------------------------------------------------------------------------- matmul


@pytest.mark.parametrize("lead", [(), (3,), (2, 5)])
@pytest.mark.parametrize(
    ("rows", "columns", "groups"), [(24, 7, 1), (24, 7, 8), (9, 1, 3), (1, 4, 1)]
)
@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_int8_matmul_is_the_exact_product_up_to_float32_sums(rows, columns, groups, dtype, lead):
    """In bfloat16 too: int8 is exact in it, and neither scales nor sums are rounded to it."""
    weight = random_weight((), rows, columns, groups)
    x = np.random.default_rng(3).standard_normal((*lead, rows)).astype(dtype)
    y = matmul_jit(x, weight)
    assert y.dtype == jnp.float32 and y.shape == (*lead, columns)
    x = x.astype(np.float64)
    largest = np.abs(x) @ np.abs(exact(weight))
    assert np.all(np.abs(np.asarray(y) - x @ exact(weight)) <= 4e-7 * largest)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_float_matmul_rounds_the_weight_to_the_type_of_its_input_and_nothing_else(dtype):
    rng = np.random.default_rng(4)
    x = rng.standard_normal((3, 40)).astype(dtype)
    weight = rng.standard_normal((40, 6)).astype(np.float32)
    y = matmul_jit(x, weight)
    assert y.dtype == jnp.float32
    x, weight = (a.astype(dtype).astype(np.float64) for a in (x, weight))
    assert np.all(np.abs(np.asarray(y) - x @ weight) <= 4e-7 * (np.abs(x) @ np.abs(weight)))


def test_whole_numbers_multiply_exactly():
    """Every step from -127 to 127, in bfloat16: a weight must not be scaled before the product."""
    steps = np.arange(-127, 128, dtype=np.int8)[None]
    scales = np.full((1, 255), 1 / 3, BFLOAT16)
    y = matmul_jit(np.full((1, 1), 3, BFLOAT16), QuantizedWeight8bit(steps, scales))
    expected = 3 * steps.astype(np.float32) * np.float32(scales[0, 0])
    assert np.array_equal(y, expected)


def test_float32_products_ask_for_full_precision():
    """TF32, the default on a GPU, keeps ten bits: enough to choose other experts."""
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
        (48, 8, 1, 8), (48, 8, 2, 8), (48, 8, 4, 8), (48, 8, 8, 8), (48, 8, 16, 16),
        (48, 8, 3, 24), (48, 8, 6, 24), (48, 1, 1, 1), (48, 1, 8, 8), (48, 3, 2, 6),
        (48, 12, 8, 24),
    ],
)  # fmt: skip
def test_split_groups_gives_every_part_whole_groups_of_the_same_matrix(
    rows, groups, parts, expected
):
    weight = random_weight((2,), rows, 3, groups)
    split = split_groups(weight, parts)
    assert split.scales.shape == (2, expected, 3)
    assert split.weight is weight.weight
    assert np.array_equal(exact(split), exact(weight))
    # A part holds its own rows and scales, and stands for its own rows of the matrix.
    for part in range(parts):
        mine = (np.split(np.asarray(a), parts, axis=1)[part] for a in (split.weight, split.scales))
        slice_of_whole = np.split(exact(weight), parts, axis=1)[part]
        assert np.array_equal(exact(QuantizedWeight8bit(*mine)), slice_of_whole)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_released_groups_are_left_as_they_are(parts):
    """Repeating scales for nothing would copy them in every layer of every step."""
    weight = random_weight((), 16, 3, 8)
    assert split_groups(weight, parts) is weight


def test_a_float_weight_has_no_groups_to_split():
    weight = np.ones((5, 3), np.float32)
    assert split_groups(weight, 2) is weight


def test_split_groups_refuses_rows_that_no_groups_fit():
    weight = random_weight((), 8, 3, 8)
    with pytest.raises(ValueError, match="8 rows in 8 scale groups cannot be split in 3 parts"):
        split_groups(weight, 3)


def test_the_product_does_not_depend_on_how_the_groups_are_split():
    weight = random_weight((), 48, 5, 8)
    x = np.random.default_rng(5).standard_normal((4, 48)).astype(np.float32)
    y = np.asarray(matmul_jit(x, weight))
    for parts in (3, 16):
        split = np.asarray(matmul_jit(x, split_groups(weight, parts)))
        np.testing.assert_allclose(split, y, rtol=1e-5, atol=1e-5)
