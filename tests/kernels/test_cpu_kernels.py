"""The CPU kernels: exact, independent of other rows, and strict about shapes.

Dimension letters: `M` rows, `E` groups of them, `I` inputs, `O` outputs, `J` scale groups.
"""

import ctypes
import dataclasses
import itertools
import platform

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import reference
from grok1.kernels import cpu, shared_library, xla_cpu
from grok1.ops.quantization import (
    QuantizedWeight4bit,
    QuantizedWeight8bit,
    matmul,
    product,
)
from grok1.ops.quantize_4bit import pack
from grok1.ops.rounded_table import RoundedTable, round_table
from small import exact_attention

LAYERS = 2
# E, I, O, J, bits
SIZES = [
    (3, 10, 7, 2, 8),  # outputs of less than a vector
    (2, 515, 520, 5, 8),  # scale groups that no tile divides
    (9, 24, 4200, 8, 8),  # outputs of more than one task
    (2, 1024, 4096, 1, 8),  # complete tiles; few rows are multiplied slab by slab
    (3, 12, 6, 2, 4),
    (2, 510, 520, 5, 4),  # scale groups of a complete piece and an incomplete one
    (9, 48, 4200, 2, 4),
    (2, 1024, 4096, 16, 4),  # complete pieces
]


def random_weight(groups, inputs, outputs, scale_groups, bits):
    """Return a weight [L, E, I, O] of 8 or 4 bits."""
    rng = np.random.default_rng(0)
    rows = inputs * bits // 8
    steps = rng.integers(-128, 128, (LAYERS, groups, rows, outputs)).astype(np.int8)
    scales = rng.uniform(0.5, 2, (LAYERS, groups, scale_groups, outputs)) / 2 ** (bits - 1)
    kind = QuantizedWeight8bit if bits == 8 else QuantizedWeight4bit
    return kind(steps, scales.astype(ml_dtypes.bfloat16))


def random_rows(counts, inputs, spare=0):
    """Return x [M, I] and starts [E + 1]; `spare` rows follow the last group."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((sum(counts) + spare, inputs)).astype(np.float32)
    return x, np.cumsum([0, *counts]).astype(np.int32)


multiply = jax.jit(cpu.grouped_product)
ELSEWHERE = () if xla_cpu.multiplies_int8() else pytest.mark.exhaustive  # FASTEST does the same
FORMS = (
    cpu.FASTEST,
    pytest.param(cpu.FLOATS, marks=ELSEWHERE),
    pytest.param(cpu.DOTS, marks=pytest.mark.exhaustive),
)


@pytest.fixture(params=FORMS, ids=["fastest", "floats", "dots"])
def form(request, monkeypatch):
    """Multiply int8 in each form; a processor without one uses the next."""
    monkeypatch.setattr(cpu, "form", request.param)
    multiply.clear_cache()
    yield
    multiply.clear_cache()


def exact_product(x, weight, starts, layer):
    """Return the product in float64, zero in rows of no group."""
    steps = weight.weight[layer]
    if isinstance(weight, QuantizedWeight4bit):
        halves = np.stack([steps << 4 >> 4, steps >> 4], axis=2)
        steps = halves.reshape(len(steps), -1, weight.shape[-1])
    values = reference.dequantize(steps, weight.scales[layer])
    y = np.zeros((len(x), values.shape[-1]))
    for e, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        y[begin:end] = x[begin:end].astype(np.float64) @ values[e]
    return y


def plain_product(x, weight, starts, layer):
    """Return the product by `matmul`, group by group."""
    y = np.zeros((len(x), weight.shape[-1]), np.float32)
    for e, (begin, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        if begin < end:  # all rows at once, so that one shape is compiled
            own = jax.tree.map(lambda w, e=e: jnp.asarray(w[layer, e]), weight)
            y[begin:end] = plain_matmul(jnp.asarray(x), own)[begin:end]
    return y


plain_matmul = jax.jit(matmul)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_each_row_is_multiplied_by_matrix_of_its_group(sizes):
    groups, inputs, outputs, *_ = sizes
    weight = random_weight(*sizes)
    # Groups of fewer and more rows than a tile, without rows, and of more than one chunk.
    few, many = [(3 * e + 1) % 14 for e in range(groups)], [70 + e for e in range(groups)]
    for counts in (few, many, [0] * (groups - 1) + [9], [1] * groups):
        x, starts = random_rows(counts, inputs, spare=2)
        y = np.asarray(multiply(x, weight, starts, jnp.int32(1)))
        exact = exact_product(x, weight, starts, 1)
        assert y.dtype == np.float32 and y.shape == (len(x), outputs)
        assert np.all(y[starts[-1] :] == 0)
        error = np.linalg.norm(y - exact)
        assert error <= 4e-7 * np.linalg.norm(exact)
        plain = np.linalg.norm(plain_product(x, weight, starts, 1) - exact)
        assert error <= 2 * plain + 2e-8 * np.linalg.norm(exact)  # a few results, rounded


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_row_is_bitwise_independent_of_other_rows(sizes):
    groups, inputs, _, _, bits = sizes
    weight = random_weight(*sizes)
    x, starts = random_rows([15] * groups, inputs)
    together = np.asarray(multiply(x, weight, starts, jnp.int32(1)))
    e = groups - 1
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 13):
        for first in (15 * e, 15 * (e + 1) - rows):
            alone = np.array([0] * groups + [rows], np.int32)
            own = x[first : first + rows]
            if bits == 4:  # how they are multiplied depends on how many x has
                own = np.concatenate([own, x])[: len(x)]
            y = np.asarray(multiply(own, weight, alone, jnp.int32(1)))
            assert np.array_equal(y[:rows], together[first : first + rows])


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_experts_are_products_and_a_gate(sizes):
    groups, inputs, outputs, _, bits = sizes
    gate, value = random_weight(*sizes), random_weight(*sizes)
    value = dataclasses.replace(value, weight=value.weight[:, :, ::-1].copy())
    out = random_weight(groups, outputs, inputs, 1, bits)
    # Single rows are multiplied slab by slab.
    for counts in ([1] * groups, [(5 * e + 2) % 9 for e in range(groups)]):
        x, starts = random_rows(counts, inputs, spare=2)
        x *= 4 / np.sqrt(inputs)
        y, hidden = jax.jit(cpu.experts)(x, (gate, value, out), starts, jnp.int32(1))
        hidden = np.asarray(hidden)
        z, other = (exact_product(x, w, starts, 1) for w in (gate, value))
        exact = z / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (z + 0.044715 * z**3))) * other
        assert np.linalg.norm(hidden - exact) <= 1e-6 * np.linalg.norm(exact)
        assert np.all(hidden[starts[-1] :] == 0)
        single = (multiply(x, w, starts, jnp.int32(1)) for w in (gate, value))
        plain = jax.nn.gelu(next(single), approximate=True) * next(single)
        np.testing.assert_allclose(hidden, plain, rtol=1e-5, atol=1e-6 * np.abs(exact).max())
        assert np.array_equal(y, multiply(hidden, out, starts, jnp.int32(1)))
        rounded = x.astype(jnp.bfloat16)
        y, hidden = jax.jit(cpu.experts)(rounded, (gate, value, out), starts, jnp.int32(1))
        _, whole = jax.jit(cpu.experts)(
            rounded.astype(np.float32), (gate, value, out), starts, jnp.int32(1)
        )
        assert np.array_equal(hidden, whole.astype(jnp.bfloat16).astype(jnp.float32))
        assert np.array_equal(y, multiply(hidden, out, starts, jnp.int32(1)))


def assert_extreme_gates_equal_plain_ones(width, bits):
    """Gates and values are products of a row and a matrix of `width` equal columns."""
    gates = [-3e38, -1e20, -1e3, -12, -9.9, -9.7, -6, -1e-30, 0, 1e-30, 9, 12, 1e20, 3e38, np.nan]
    gates = np.float32(gates)

    def weight(input_, scale):
        steps = np.zeros([1, 1, 2, width], np.int8)
        steps[:, :, input_] = 1
        scales = jnp.full([1, 1, 1, width], scale, jnp.bfloat16)
        if bits == 4:
            return QuantizedWeight4bit(pack(steps), scales)
        return QuantizedWeight8bit(steps, scales)

    # Both numbers of a row have one magnitude: in integers a smaller one would be lost.
    x = np.stack([gates, np.abs(gates)], axis=1)
    starts = np.array([0, len(x)], np.int32)
    out = random_weight(1, width, 2, 1, bits)
    for scale in (1, 2):  # with 2 the largest gates are infinite
        calculate = jax.jit(lambda *inputs: cpu.experts(*inputs))
        weights = weight(0, scale), weight(1, 1), out
        _, y = calculate(x, weights, starts, jnp.int32(0))
        exact = jax.nn.gelu(jnp.float32(scale) * gates, approximate=True) * x[:, 1]
        exact = np.repeat(exact[:, None], width, axis=1)
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-8)
        assert np.isnan(y[0]).all() == (scale == 2)


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("width", [6, 40])  # less and more than a vector
@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_gates_equal_plain_ones(width, bits):
    assert_extreme_gates_equal_plain_ones(width, bits)


@pytest.mark.parametrize(
    ("rows", "entries", "width", "dtype"),
    [
        (1, 5, 16, jnp.bfloat16),
        (3, 6, 40, jnp.float32),
        (16, 203, 515, jnp.bfloat16),
        (17, 1, 9, jnp.float32),
        (33, 600, 528, jnp.float32),
    ],
)
def test_table_product_is_exact(rows, entries, width, dtype):
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((rows, width)), dtype)
    table = jnp.asarray(rng.standard_normal((entries, width)), dtype)
    y = np.asarray(jax.jit(cpu.table_product)(x, table))
    exact = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    plain = jax.jit(lambda x, table: product("md,vd->mv", x, table))(x, table)
    error = np.linalg.norm(y - exact)
    assert y.dtype == np.float32 and y.shape == (rows, entries)
    assert error <= 2 * np.linalg.norm(plain - exact) + 1e-7 * np.linalg.norm(exact)
    # Bitwise independent of other rows.
    alone = jax.jit(cpu.table_product)(x[-1:], table)
    assert np.array_equal(alone[0], y[-1])


@pytest.mark.parametrize(("rows", "entries", "width"), [(1, 9000, 40), (3, 21, 17), (16, 9001, 8)])
def test_likely_logits_are_exact_for_the_largest(rows, entries, width):
    """Also if the rounded table has them in another order: half of the rows are nearly the same."""
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((rows, width)), jnp.float32)
    numbers = rng.standard_normal((entries, width))
    numbers[::2] = 3 * x[0] + 1e-5 * numbers[::2]
    numbers[-1] = 0
    table = jnp.asarray(numbers, jnp.float32)
    rounded = round_table(table)
    exact = np.asarray(jax.jit(cpu.table_product)(x, table))
    found = np.asarray(jax.jit(cpu.likely_logits, static_argnums=3)(x, table, rounded, 20))
    for one, other in zip(exact, found, strict=True):
        largest = np.argsort(-one, kind="stable")[:20]
        assert np.array_equal(np.argsort(-other, kind="stable")[:20], largest)
        assert np.array_equal(one[largest], other[largest])
    lengths = np.linalg.norm(x, axis=-1, keepdims=True)
    assert np.all(abs(exact - found) <= lengths * rounded.errors)
    assert np.any(exact != found) == (entries > 9000 // 2)
    alone = jax.jit(cpu.likely_logits, static_argnums=3)(x[-1:], table, rounded, 20)
    assert np.array_equal(alone[0], found[-1])


def test_likely_logits_allow_for_the_largest_errors():
    """Of logits 0.1 apart, rounded ones are 5 too large or too small."""
    rng = np.random.default_rng(5)
    exact = rng.permutation(9000)
    errors = np.array([5, *rng.choice([-50, 50], 8999)])
    errors[exact >= 8990] = -50
    first = np.arange(16) == 0
    values = ((exact + errors)[:, None] * first).astype(np.int16)
    rounded = RoundedTable(values, np.full(9000, 0.1, np.float32), np.full(9000, 5.01, np.float32))
    table = (0.1 * exact[:, None] * first).astype(np.float32)
    found = np.asarray(cpu.likely_logits(jnp.eye(1, 16), table, rounded, 20))[0]
    assert exact[np.argsort(-found)[:20]].tolist() == [*range(8999, 8979, -1)]


def test_errors_of_a_rounded_table_are_bounds():
    """For x along the errors of a row, for which they are largest."""
    table = np.random.default_rng(4).standard_normal((50, 30)).astype(np.float32)
    values, scales, errors = map(np.asarray, round_table(table))
    differences = table - values * scales[:, None].astype(np.float64)
    largest = np.linalg.norm(differences, axis=-1)
    assert values.dtype == np.int16 and np.all(abs(values).max(axis=-1) == 2**15 - 1)
    assert np.all(largest <= errors) and np.all(errors <= 1.4 * largest)


# B, S, K, G, H, filled positions of each sequence, dtype
CACHES = {
    "heads of complete vectors": (2, 40, 2, 3, 32, (40, 17), jnp.bfloat16),
    "heads of incomplete vectors": (3, 33, 1, 2, 20, (1, 33, 16), jnp.bfloat16),
    "in float32": (3, 33, 1, 2, 20, (1, 33, 16), jnp.float32),
    "nothing filled": (2, 5, 2, 1, 6, (0, 5), jnp.float32),
    "everything filled": (1, 70, 8, 6, 16, (70,), jnp.float32),
}


@pytest.mark.parametrize("case", CACHES.values(), ids=CACHES)
def test_attention_is_exact_on_filled_positions_only(case):
    batch, positions, heads, queries, width, filled, dtype = case
    rng = np.random.default_rng(3)
    query = jnp.asarray(3 * rng.standard_normal((batch, 1, heads, queries, width)), dtype)
    caches = rng.standard_normal((2, LAYERS, batch, positions, heads, width))
    seen = rng.random((batch, 1, positions)) < 0.8
    for b, count in enumerate(filled):
        caches[:, :, b, count:] = np.nan  # never read
    keys, values = jnp.asarray(caches, dtype)
    if dtype == jnp.bfloat16:  # as a CPU stores it
        keys, values = (lax.bitcast_convert_type(c, jnp.uint16) for c in (keys, values))
    arrays = query, keys, values, jnp.asarray(seen), 0.4, jnp.int32(1), jnp.array(filled)
    out = np.asarray(jax.jit(cpu.attend_one, static_argnums=4)(*arrays))
    clean = [jnp.nan_to_num(c) for c in jnp.asarray(caches, dtype)]
    plain = xla_cpu.attend_cached(query, *clean, *arrays[3:])
    visible = seen & (np.arange(positions) < np.array(filled)[:, None, None])
    exact = exact_attention(query, clean[0][1], clean[1][1], visible, 0.4)
    error, scale = np.linalg.norm(out - exact), np.linalg.norm(exact)
    assert out.dtype == np.float32 and out.shape == query.shape
    assert error <= 2 * np.linalg.norm(plain - exact) + 1e-7 * scale
    assert error <= (1e-2 if dtype == jnp.bfloat16 else 2e-6) * scale


def test_soft_cap_of_extreme_scores_is_exact():
    """The exponential and tanh are computed by series of our own."""
    scores = np.array([-1e30, -500, -30, -1, -1e-6, 0, 1e-30, 0.3, 5, 29, 100, 1e30], np.float32)
    # Two positions in each sequence: of this score and value 1, of score 0 and value 0.
    keys, values = (np.zeros((1, len(scores), 2, 1, 1), np.float32) for _ in range(2))
    keys[0, :, 0, 0, 0], values[0, :, 0] = scores, 1
    query, mask = np.ones([len(scores), 1, 1, 1, 1]), np.ones([len(scores), 1, 2], bool)
    filled = jnp.full(len(scores), 2)
    out = cpu.attend_one(jnp.array(query), keys, values, mask, 1.0, jnp.int32(0), filled)
    weight = np.exp(30 * np.tanh(np.float64(scores) / 30))
    np.testing.assert_allclose(np.ravel(out), weight / (1 + weight), rtol=4e-6)


def test_shapes_that_do_not_fit_are_rejected():
    weight, half = random_weight(3, 16, 16, 1, 8), random_weight(3, 16, 16, 4, 4)
    x, starts = random_rows([1, 1, 1], 16)
    table, cache = jnp.ones([4, 8]), jnp.ones([1, 2, 6, 2, 4])
    query, mask = jnp.ones([2, 1, 2, 3, 4]), jnp.ones([2, 1, 6], bool)
    first, filled = jnp.int32(0), jnp.array([1, 1])
    wrong_scales = QuantizedWeight8bit(weight.weight, weight.scales[:, :1])
    for function, *wrong in (
        (multiply, x[:, :8], weight, starts, first),
        (multiply, x[:, :8], half, starts, first),
        (multiply, x, dataclasses.replace(half, scales=half.scales[:, :, :3]), starts, first),
        (multiply, x, weight, starts[:-1], first),
        (multiply, x, weight, starts + 1, first),
        (multiply, x, weight, starts[::-1].copy(), first),
        (multiply, x, weight, starts, jnp.int32(LAYERS)),
        (multiply, x, weight, starts, jnp.int32(-1)),
        (multiply, x, wrong_scales, starts, first),
        (cpu.table_product, jnp.ones([2, 7]), table),
        (cpu.table_product, jnp.ones([2, 8]), table.astype(jnp.float16)),
        (cpu.attend_one, query[..., :3], cache, cache, mask, 1.0, first, filled),
        (cpu.attend_one, query, cache, cache[:, :, :5], mask, 1.0, first, filled),
        (cpu.attend_one, query, cache, cache, mask, 1.0, jnp.int32(1), filled),
        (cpu.attend_one, query, cache, cache.astype(jnp.bfloat16), mask, 1.0, first, filled),
    ):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="INVALID_ARGUMENT"):
            jax.block_until_ready(function(*wrong))


def test_integer_sums_of_many_inputs_do_not_overflow(monkeypatch):
    inputs, units = 300_000, -64 - 64 * 2**7 - 64 * 2**14 + 32 * 2**21  # all digits are large
    x = jnp.full((1, inputs), units, jnp.float32)
    weight = QuantizedWeight8bit(
        jnp.full((1, 1, inputs, 16), -128, jnp.int8), jnp.ones((1, 1, 1, 16), jnp.bfloat16)
    )
    exact = float(np.float32(units)) * -128 * inputs
    for form in (cpu.FASTEST, cpu.DOTS):
        monkeypatch.setattr(cpu, "form", form)
        found = cpu.grouped_product(x, weight, jnp.array([0, 1]), jnp.int32(0))
        np.testing.assert_allclose(found, exact, rtol=1e-3)
    monkeypatch.setattr(xla_cpu, "multiplies_int8", lambda: True)
    one = QuantizedWeight8bit(weight.weight[0, 0], weight.scales[0, 0])
    np.testing.assert_allclose(xla_cpu.matmul(x, one), exact, rtol=1e-3)


def for_processors(*names):
    """Call a test with x86 processors, the first of them in the gate."""
    values = [pytest.param(name, marks=pytest.mark.exhaustive) for name in names[1:]]
    first = pytest.param(names[0], marks=pytest.mark.slow)
    return pytest.mark.parametrize("processor", [first, *values])


def compile_for(processor, path, monkeypatch, *flags):
    """Compile the kernels for another processor, with other flags added."""
    kept = [flag for flag in shared_library.FLAGS if not flag.startswith("-march")]
    monkeypatch.setattr(shared_library, "FLAGS", [*kept, f"-march={processor}", *flags])
    shared_library._compile(shared_library._compiler(), path)


on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="compiles for x86")


@on_x86
@for_processors("x86-64-v3", "x86-64")  # with AVX2, without AVX
def test_kernels_for_older_processors_are_exact(processor, tmp_path, monkeypatch):
    cpu.load()  # under its own name
    compile_for(processor, tmp_path / "cpu.so", monkeypatch)
    library = ctypes.CDLL(str(tmp_path / "cpu.so"))
    monkeypatch.setattr(cpu, "PRODUCT", f"test-{processor}")
    monkeypatch.setattr(cpu, "EXPERTS", f"test-experts-{processor}")
    targets = {cpu.PRODUCT: library.GroupedProduct, cpu.EXPERTS: library.Experts}
    for target, handler in targets.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    assert_extreme_gates_equal_plain_ones(18, 8)
    assert_extreme_gates_equal_plain_ones(18, 4)
    for sizes, first in itertools.product(SIZES, (1, 5)):
        weight = random_weight(*sizes)
        x, starts = random_rows([first, *[11] * (sizes[0] - 1)], sizes[1])
        call = jax.jit(lambda *inputs: cpu.grouped_product(*inputs))
        y = np.asarray(call(x, weight, starts, jnp.int32(1)))
        exact = exact_product(x, weight, starts, 1)
        assert np.linalg.norm(y - exact) <= 4e-7 * np.linalg.norm(exact)


@on_x86
@for_processors("sapphirerapids", "icelake-server", "skylake-avx512")
def test_kernels_for_newer_processors_compile(processor, tmp_path, monkeypatch):
    """With AMX, with AVX-512 and its int8 products, with AVX-512 only."""
    compile_for(processor, tmp_path / "cpu.so", monkeypatch, "-O1")  # not run: quickly
    assert (tmp_path / "cpu.so").stat().st_size > 0
