"""The CPU's own product of int8 weights: what it computes, and what is there without it.

Dimension letters: `M` rows, `E` groups of them, `I` inputs, `O` outputs, `J` scale groups.
"""

import ctypes
import platform

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import golden
import reference
import runner
from grok1.kernels import cpu, shared_library, xla_cpu
from grok1.ops.quantization import QuantizedWeight8bit, matmul, product

LAYERS = 2
# E, I, O, J: a part of a panel of columns, less than a vector, more than one part holds even if
# sixteen threads share them, scale groups that no depth of a tile divides, panels only.
SIZES = [
    *[(1, 16, 16, 1), (3, 10, 7, 2), (9, 24, 4200, 8), (2, 515, 520, 5), (8, 256, 512, 1)],
    (2, 1024, 4096, 1),  # which few rows are multiplied with slab by slab, rows 4 KiB apart
]


def random_weight(groups, inputs, outputs, scale_groups):
    """Return an int8 weight [L, E, I, O]."""
    rng = np.random.default_rng(0)
    steps = rng.integers(-128, 128, (LAYERS, groups, inputs, outputs)).astype(np.int8)
    scales = rng.uniform(0.5, 2, (LAYERS, groups, scale_groups, outputs)) / 128
    return QuantizedWeight8bit(steps, scales.astype(ml_dtypes.bfloat16))


def random_rows(counts, inputs, spare=0):
    """Return x [M, I] and starts [E + 1]; `spare` rows come after the last group."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((sum(counts) + spare, inputs)).astype(np.float32)
    return x, np.cumsum([0, *counts]).astype(np.int32)


multiply = jax.jit(cpu.grouped_product)


FORMS = cpu.FASTEST, cpu.FLOATS, pytest.param(cpu.DOTS, marks=pytest.mark.exhaustive)


@pytest.fixture(params=FORMS, ids=["fastest", "floats", "dots"])
def form(request, monkeypatch):
    """Each way to multiply int8; a processor that does not know one takes the next."""
    monkeypatch.setattr(cpu, "form", request.param)
    multiply.clear_cache()
    yield
    multiply.clear_cache()


def exact_product(x, weight, starts, layer):
    """Return the product in float64, zero where there is no group."""
    values = reference.dequantize(weight.weight[layer], weight.scales[layer])
    y = np.zeros((len(x), values.shape[-1]))
    for e, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        y[begin:end] = x[begin:end].astype(np.float64) @ values[e]
    return y


def plain_product(x, weight, starts, layer):
    """Return the product as `matmul` has it, group by group."""
    y = np.zeros((len(x), weight.shape[-1]), np.float32)
    for e, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        own = jax.tree.map(lambda w, e=e: jnp.asarray(w[layer, e]), weight)
        y[begin:end] = matmul(jnp.asarray(x[begin:end]), own)
    return y


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_row_is_multiplied_with_the_matrix_of_its_group(sizes):
    groups, inputs, outputs, _ = sizes
    weight = random_weight(*sizes)
    # As many rows as a tile has, fewer, more, none; and more than are multiplied at a time.
    few, many = [(3 * e + 1) % 14 for e in range(groups)], [70 + e for e in range(groups)]
    for counts in (few, many, [0] * (groups - 1) + [9]):
        for layer in range(LAYERS):
            x, starts = random_rows(counts, inputs, spare=2)
            y = np.asarray(multiply(x, weight, starts, jnp.int32(layer)))
            exact = exact_product(x, weight, starts, layer)
            assert y.dtype == np.float32 and y.shape == (len(x), outputs)
            assert np.all(y[starts[-1] :] == 0)
            error = np.linalg.norm(y - exact)
            assert error <= 4e-7 * np.linalg.norm(exact)
            assert error <= 2 * np.linalg.norm(plain_product(x, weight, starts, layer) - exact)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_company(sizes):
    groups, inputs, _, _ = sizes
    weight = random_weight(*sizes)
    x, starts = random_rows([15] * groups, inputs)
    together = np.asarray(multiply(x, weight, starts, jnp.int32(1)))
    e = groups - 1
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 13):
        for first in (15 * e, 15 * (e + 1) - rows):
            alone = np.array([0] * groups + [rows], np.int32)
            y = np.asarray(multiply(x[first : first + rows], weight, alone, jnp.int32(1)))
            assert np.array_equal(y, together[first : first + rows])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_gated_product_is_that_of_two_products(sizes):
    groups, inputs, _, _ = sizes
    gate, value = random_weight(*sizes), random_weight(*sizes)
    value = QuantizedWeight8bit(value.weight[:, :, ::-1].copy(), value.scales)
    # One row alone goes slab by slab of the inputs.
    for counts in ([1] * groups, [(5 * e + 2) % 9 for e in range(groups)]):
        x, starts = random_rows(counts, inputs, spare=2)
        x *= 4 / np.sqrt(inputs)
        y = np.asarray(jax.jit(cpu.gated_product)(x, gate, value, starts, jnp.int32(1)))
        z, other = (exact_product(x, w, starts, 1) for w in (gate, value))
        exact = z / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) * other
        assert np.linalg.norm(y - exact) <= 1e-6 * np.linalg.norm(exact)
        assert np.all(y[starts[-1] :] == 0)
        single = (multiply(x, w, starts, jnp.int32(1)) for w in (gate, value))
        plain = jax.nn.gelu(next(single), approximate=True) * next(single)
        np.testing.assert_allclose(y, plain, rtol=1e-5, atol=1e-6 * np.abs(exact).max())


def assert_gates_of_any_size_are_as_the_plain_ones(width):
    """Each a row's product with a matrix of `width` equal columns, as is the value."""
    gates = [-3e38, -1e20, -1e3, -12, -9.9, -9.7, -6, -1e-30, 0, 1e-30, 9, 12, 1e20, 3e38, np.nan]
    gates = np.float32(gates)

    def weight(input_, scale):
        steps = np.zeros([1, 1, 2, width], np.int8)
        steps[:, :, input_] = 1
        return QuantizedWeight8bit(steps, jnp.full([1, 1, 1, width], scale, jnp.bfloat16))

    # Both numbers of a row are of one size: of others the smaller one would be lost in integers.
    x = np.stack([gates, np.abs(gates)], axis=1)
    starts = np.array([0, len(x)], np.int32)
    for scale in (1, 2):  # with which the largest gates are infinite
        product = jax.jit(lambda *inputs: cpu.gated_product(*inputs))
        y = product(x, weight(0, scale), weight(1, 1), starts, jnp.int32(0))
        exact = jax.nn.gelu(jnp.float32(scale) * gates, approximate=True) * x[:, 1]
        exact = np.repeat(exact[:, None], width, axis=1)
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-8)
        assert np.isnan(y[0]).all() == (scale == 2)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("width", [3, 40])  # less than a vector, and more
def test_a_gate_of_any_size_is_as_the_plain_one(width):
    assert_gates_of_any_size_are_as_the_plain_ones(width)


TABLES = [(1, 5, 16), (3, 6, 40), (16, 203, 515), (17, 1, 9), (33, 600, 528)]  # M, V, D


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("sizes", TABLES, ids=str)
def test_rows_are_multiplied_with_a_table(sizes, dtype):
    rows, entries, width = sizes
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((rows, width)), dtype)
    table = jnp.asarray(rng.standard_normal((entries, width)), dtype)
    y = np.asarray(jax.jit(cpu.table_product)(x, table))
    exact = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    plain = jax.jit(lambda x, table: product("md,vd->mv", x, table))(x, table)
    error = np.linalg.norm(y - exact)
    assert y.dtype == np.float32 and y.shape == (rows, entries)
    assert error <= 2 * np.linalg.norm(plain - exact) + 1e-7 * np.linalg.norm(exact)
    # A row has the same bits in any company.
    alone = jax.jit(cpu.table_product)(x[-1:], table)
    assert np.array_equal(alone[0], y[-1])


# B, S, K, G, H, and how much of each sequence is filled.
CACHES = {
    "heads of whole vectors": (2, 40, 2, 3, 32, (40, 17)),
    "heads of parts of vectors": (3, 33, 1, 2, 20, (1, 33, 16)),
    "nothing filled": (2, 5, 2, 1, 6, (0, 5)),
    "full": (1, 70, 8, 6, 16, (70,)),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("case", CACHES.values(), ids=CACHES)
def test_a_query_attends_to_what_is_filled_and_seen(case, dtype):
    batch, positions, heads, queries, width, filled = case
    rng = np.random.default_rng(3)
    query = jnp.asarray(3 * rng.standard_normal((batch, 1, heads, queries, width)), dtype)
    caches = rng.standard_normal((2, LAYERS, batch, positions, heads, width))
    seen = rng.random((batch, 1, positions)) < 0.8
    for b, count in enumerate(filled):
        caches[:, :, b, count:] = np.nan  # never read
    keys, values = jnp.asarray(caches, dtype)
    if dtype == jnp.bfloat16:  # as a CPU keeps it
        keys, values = (lax.bitcast_convert_type(c, jnp.uint16) for c in (keys, values))
    arrays = query, keys, values, jnp.asarray(seen), 0.4, jnp.int32(1), jnp.array(filled)
    out = np.asarray(jax.jit(cpu.attend_one, static_argnums=4)(*arrays))
    clean = (jnp.nan_to_num(c) for c in jnp.asarray(caches, dtype))
    plain = xla_cpu.attend_cached(query, *clean, *arrays[3:])
    exact = exact_attention(query, caches[:, 1], seen, 0.4, filled, dtype)
    error, scale = np.linalg.norm(out - exact), np.linalg.norm(exact)
    assert out.dtype == np.float32 and out.shape == query.shape
    assert error <= 2 * np.linalg.norm(plain - exact) + 1e-7 * scale
    assert error <= (1e-2 if dtype == jnp.bfloat16 else 2e-6) * scale


def exact_attention(query, caches, seen, multiplier, filled, dtype):
    """Return attention [B, 1, K, G, H] in float64 to caches [2, B, S, K, H], rounded to dtype."""
    query = np.asarray(query, np.float64)
    keys, values = np.nan_to_num(np.asarray(jnp.asarray(caches, dtype), np.float64))
    scores = np.einsum("btkgh,bskh->bkgts", query, keys) * multiplier
    weights = np.exp(30 * np.tanh(scores / 30))
    there = np.arange(seen.shape[-1]) < np.array(filled)[:, None]
    weights *= (seen & there[:, None])[:, None, None]
    total = np.moveaxis(weights.sum(-1), -1, 1)[..., None]
    return np.einsum("bkgts,bskh->btkgh", weights, values) / np.where(total > 0, total, 1)


def test_large_scores_stay_within_the_soft_cap():
    """Its exponentials are computed by a series of our own."""
    scores = np.array([-1e30, -500, -30, -1, -1e-6, 0, 1e-30, 0.3, 5, 29, 100, 1e30], np.float32)
    for score in scores:
        # Two positions, one of score 0, whose values are 1 and 0.
        keys = jnp.array([score, 0], jnp.float32).reshape(1, 1, 2, 1, 1)
        values = jnp.array([1, 0], jnp.float32).reshape(1, 1, 2, 1, 1)
        query, mask = jnp.ones([1, 1, 1, 1, 1]), jnp.ones([1, 1, 1], bool)
        out = cpu.attend_one(query, keys, values, mask, 1.0, jnp.int32(0), jnp.array([2]))
        weight = np.exp(30 * np.tanh(np.float64(score) / 30))
        np.testing.assert_allclose(out.item(), weight / (1 + weight), rtol=4e-6)


def test_shapes_of_other_kernels_that_do_not_fit_are_refused():
    table, cache = jnp.ones([4, 8]), jnp.ones([1, 2, 6, 2, 4])
    query, mask = jnp.ones([2, 1, 2, 3, 4]), jnp.ones([2, 1, 6], bool)
    layer, filled = jnp.int32(0), jnp.array([1, 1])
    calls = [
        lambda: cpu.table_product(jnp.ones([2, 7]), table),
        lambda: cpu.table_product(jnp.ones([2, 8]), table.astype(jnp.float16)),
        lambda: cpu.attend_one(query[..., :3], cache, cache, mask, 1.0, layer, filled),
        lambda: cpu.attend_one(query, cache, cache[:, :, :5], mask, 1.0, layer, filled),
        lambda: cpu.attend_one(query, cache, cache, mask, 1.0, jnp.int32(1), filled),
        lambda: cpu.attend_one(query, cache, cache.astype(jnp.bfloat16), mask, 1.0, layer, filled),
    ]
    for call in calls:
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="INVALID_ARGUMENT"):
            jax.block_until_ready(call())


@pytest.mark.parametrize("form", [cpu.FASTEST, cpu.DOTS])
def test_sums_of_very_many_inputs_do_not_overflow(form, monkeypatch):
    monkeypatch.setattr(cpu, "form", form)
    inputs, units = 300_000, -64 - 64 * 2**7 - 64 * 2**14 + 32 * 2**21  # all digits are large
    x = jnp.full((1, inputs), units, jnp.float32)
    weight = QuantizedWeight8bit(
        jnp.full((1, 1, inputs, 16), -128, jnp.int8), jnp.ones((1, 1, 1, 16), jnp.bfloat16)
    )
    found = cpu.grouped_product(x, weight, jnp.array([0, 1]), jnp.int32(0))
    exact = float(np.float32(units)) * -128 * inputs
    np.testing.assert_allclose(found, exact, rtol=1e-3)
    monkeypatch.setattr(xla_cpu, "multiplies_int8", lambda: True)
    one = QuantizedWeight8bit(weight.weight[0, 0], weight.scales[0, 0])
    np.testing.assert_allclose(xla_cpu.matmul(x, one), exact, rtol=1e-3)


def test_shapes_that_do_not_fit_are_refused():
    weight = random_weight(3, 16, 16, 1)
    x, starts = random_rows([1, 1, 1], 16)
    for wrong in (
        (x[:, :8], weight, starts, jnp.int32(0)),
        (x, weight, starts[:-1], jnp.int32(0)),
        (x, weight, starts + 1, jnp.int32(0)),
        (x, weight, starts[::-1].copy(), jnp.int32(0)),
        (x, weight, starts, jnp.int32(LAYERS)),
        (x, weight, starts, jnp.int32(-1)),
        (x, QuantizedWeight8bit(weight.weight, weight.scales[:, :1]), starts, jnp.int32(0)),
    ):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="INVALID_ARGUMENT"):
            jax.block_until_ready(multiply(*wrong))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of this kind")
@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3"])  # without AVX, and with AVX2
def test_older_processors_compute_the_same(processor, tmp_path, monkeypatch):
    cpu.load()  # under its own name
    flags = [flag for flag in shared_library.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(shared_library, "FLAGS", [*flags, f"-march={processor}"])
    shared_library._compile(shared_library._compiler(), tmp_path / "cpu.so")
    library = ctypes.CDLL(str(tmp_path / "cpu.so"))
    monkeypatch.setattr(cpu, "PRODUCT", f"test-{processor}")
    monkeypatch.setattr(cpu, "GATED_PRODUCT", f"test-gated-{processor}")
    targets = {cpu.PRODUCT: library.GroupedProduct, cpu.GATED_PRODUCT: library.GatedProduct}
    for target, handler in targets.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    assert_gates_of_any_size_are_as_the_plain_ones(17)
    for sizes in SIZES:
        weight = random_weight(*sizes)
        x, starts = random_rows([5, *[11] * (sizes[0] - 1)], sizes[1])
        call = jax.jit(lambda *inputs: cpu.grouped_product(*inputs))
        y = np.asarray(call(x, weight, starts, jnp.int32(1)))
        exact = exact_product(x, weight, starts, 1)
        assert np.linalg.norm(y - exact) <= 4e-7 * np.linalg.norm(exact)


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of this kind")
@pytest.mark.parametrize("processor", ["skylake-avx512", "icelake-server", "sapphirerapids"])
def test_newer_processors_have_forms_that_compile(processor, tmp_path, monkeypatch):
    """With AVX-512, with its products of int8, and with AMX: whatever runs the tests."""
    flags = [flag for flag in shared_library.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(shared_library, "FLAGS", [*flags, f"-march={processor}"])
    shared_library._compile(shared_library._compiler(), tmp_path / "cpu.so")
    assert (tmp_path / "cpu.so").stat().st_size > 0


def test_a_server_on_a_cpu_uses_it_unless_told_otherwise():
    for kernels in (True, False):
        server = runner.load_server(golden.DIRECTORY / "three-layers", kernels=kernels)
        name = "cpu" if kernels else "xla_cpu"
        assert [execution.kernels for execution in server.executions] == [name, name]
