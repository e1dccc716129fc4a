"""The int8 products that XLA compiles to fast CPU code equal the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grok1.kernels import xla_cpu
from grok1.ops.quantization import matmul
from grok1.ops.quantize_4bit import quantize_4bit
from small import exact_weight as exact
from small import normal, random_weight

matmul_jit = jax.jit(matmul)
xla_cpu_matmul = jax.jit(xla_cpu.matmul)


@pytest.fixture(params=["blocks", "int8 digits"])
def form(request, monkeypatch):
    """Let xla_cpu.matmul use one form for matrices of any size, on any processor."""
    monkeypatch.setattr(xla_cpu, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(xla_cpu, "BLOCK_COLUMNS", 128)
    monkeypatch.setattr(xla_cpu, "BLOCK_WEIGHTS", 128 * 16)  # 16 rows
    monkeypatch.setattr(xla_cpu, "multiplies_int8", lambda: request.param == "int8 digits")
    xla_cpu_matmul.clear_cache()
    yield request.param
    xla_cpu_matmul.clear_cache()


@pytest.fixture
def integers(monkeypatch):
    """Let xla_cpu.matmul multiply int8 by int8."""
    monkeypatch.setattr(xla_cpu, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(xla_cpu, "multiplies_int8", lambda: True)
    xla_cpu_matmul.clear_cache()
    yield
    xla_cpu_matmul.clear_cache()


def assert_as_near_as_float32(x, weight):
    """The error of xla_cpu.matmul is at most twice that of `matmul`, or rounding to float32."""
    values = exact(weight)
    true = np.asarray(x, np.float64) @ values
    got, plain = (np.asarray(f(x, weight)) for f in (xla_cpu_matmul, matmul_jit))
    assert got.dtype == np.float32 and got.shape == true.shape
    for error, other, size in zip(
        *(np.linalg.norm(a, axis=-1).reshape(-1) for a in (got - true, plain - true, true)),
        strict=True,
    ):
        assert error <= 2 * other + 1.2e-7 * size


@pytest.mark.parametrize(
    ("lead", "groups", "columns", "dtype"),
    [
        ((1,), 1, 24, "float32"),  # columns of less than a block
        ((2, 3), 8, 300, "float32"),  # several blocks, which overlap
        ((2, 3), 8, 300, "bfloat16"),
    ],
)
@pytest.mark.usefixtures("form")
def test_both_forms_equal_the_product(lead, groups, columns, dtype):
    x = np.random.default_rng(1).standard_normal((*lead, 512)).astype(dtype)
    assert_as_near_as_float32(x, random_weight((), 512, columns, groups))


@pytest.mark.parametrize("group", [2, 32])
@pytest.mark.usefixtures("form")
def test_blocks_of_4_bits_equal_the_product(group):
    """In blocks of several groups, and of one group."""
    x = np.random.default_rng(1).standard_normal((2, 3, 512)).astype(np.float32)
    assert_as_near_as_float32(x, quantize_4bit(normal(512, 300), group))


@pytest.mark.usefixtures("form")
def test_both_forms_are_exact_for_any_magnitude():
    """One outlier; equal values; all magnitudes; just below a power of two; tiny; huge."""
    rows = [
        np.r_[1e4, np.full(511, 1e-3)],
        np.full(512, 127.0),
        np.exp2(np.arange(512) % 40 - 20.0),
        np.r_[np.float32(1) - 2.0**-24, -1.0, np.zeros(510)],
        np.full(512, 2e-30),
        np.full(512, -2e35),
    ]
    assert_as_near_as_float32(np.float32(rows), random_weight((), 512, 9, 8))


@pytest.mark.usefixtures("integers")
def test_int8_digits_keep_zero_nan_and_infinity():
    weight = random_weight((), 16, 3, 1)
    x = np.zeros((3, 16), np.float32)
    x[1, 2], x[2, 3] = np.nan, np.inf
    y = np.asarray(xla_cpu_matmul(x, weight))
    assert np.all(y[0] == 0) and np.all(np.isnan(y[1:]))


@pytest.mark.usefixtures("integers")
def test_int8_digits_of_a_tiny_row_are_not_zero():
    """The last digit's unit would be subnormal, which XLA takes for zero."""
    weight = random_weight((), 16, 3, 1)
    x = np.full((1, 16), 1e-35, np.float32)
    expected = x.astype(float) @ exact(weight)
    np.testing.assert_allclose(xla_cpu_matmul(x, weight), expected, rtol=0.02)


@pytest.mark.usefixtures("integers")
def test_int8_digits_do_not_depend_on_other_rows():
    x = np.random.default_rng(2).standard_normal((70, 64)).astype(np.float32)
    weight = random_weight((), 64, 10, 8)
    together = np.asarray(xla_cpu_matmul(x, weight))
    for row in (0, 33, 69):
        assert np.array_equal(xla_cpu_matmul(x[row : row + 1], weight)[0], together[row])


@pytest.mark.usefixtures("integers")
def test_gradient_is_that_of_the_exact_product():
    """Rounding to integers has a zero derivative: the gradient would silently be zero."""
    weight = random_weight((), 16, 5, 8)
    x = np.random.default_rng(3).standard_normal((2, 16)).astype(np.float32)
    got = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(xla_cpu.matmul(x, weight)))))(x)
    expected = np.cos(x.astype(np.float64) @ exact(weight)) @ exact(weight).T
    np.testing.assert_allclose(got, expected, rtol=2e-5, atol=1e-6)


def test_int8_matrix_is_not_converted_to_float32_whole(form):
    """Writing it to memory as float32 takes much longer than the product."""
    weight = random_weight((), 64, 320, 1)
    text = xla_cpu_matmul.lower(np.ones((4, 64), np.float32), weight).as_text()
    assert "tensor<64x320xf32>" not in text
    assert ("xi8>, tensor<64x320xi8>" in text) == (form == "int8 digits")
