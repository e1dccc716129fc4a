"""Each module alone, as its published signature says, and the whole tiny model run in many ways.

Dimension letters as in model.py.
"""

import dataclasses
import functools
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import reference
from grok1.execution import Execution
from grok1.inspection import Probe, asking
from grok1.kernels import xla_cpu
from grok1.ops.mixture import top_k
from grok1.parallel.sharding import make_mesh
from grok1.reference import weights_of
from model import (
    InOutEmbed,
    KVMemory,
    LanguageModelConfig,
    MultiHeadAttention,
    QuantizedWeight8bit,
    RMSNorm,
    RotaryEmbedding,
    TransformerConfig,
    attend,
    rotate_half,
    write_rows,
)
from small import normal

BFLOAT16 = ml_dtypes.bfloat16
LAYER = "transformer/decoder_layer"


def pure(function):
    """Return apply(params, ...) of a function of Haiku modules, compiled."""
    transformed: Any = hk.without_apply_rng(hk.transform(function))
    return jax.jit(transformed.apply)


# --------------------------------------------------------------------------------- rotary positions


def rotary(dim=8, seq_dim=1, base_exponent=10000):
    """Return rotate(x, offset, const_position, t); what is not given is 0, None and None."""

    def run(x, offset=0, const_position=None, t=None):
        module = RotaryEmbedding(dim, base_exponent=base_exponent)
        return module(x, seq_dim, offset, const_position, t)

    return functools.partial(pure(run), {})


def rotated(x, positions, base=10000):
    """Turn x [B, T, heads, dim] as complex numbers by angles in float64; positions [B or 1, T]."""
    half = x.shape[-1] // 2
    z = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    frequency = float(base) ** (-np.arange(half) / half)
    z = z * np.exp(1j * np.asarray(positions)[..., None, None] * frequency)
    return np.concatenate([z.real, z.imag], axis=-1)


def test_rotate_half_turns_the_halves_of_the_last_axis_by_a_right_angle():
    x = normal(2, 3, 8)
    z = 1j * (x[..., :4] + 1j * x[..., 4:])
    assert np.array_equal(rotate_half(x), np.concatenate([z.real, z.imag], axis=-1))


@pytest.mark.parametrize("base", [10000, 100])
def test_rotary_embedding_turns_pairs_by_position_times_frequency(base):
    x = normal(2, 5, 3, 8)
    got = rotary(base_exponent=base)(x)
    np.testing.assert_allclose(got, rotated(x, [np.arange(5)], base), rtol=0, atol=2e-6)


def test_positions_start_at_the_offset_one_for_all_or_one_a_sequence():
    x = normal(2, 5, 3, 8)
    rotate = rotary()
    for offset in (7, np.array([7]), np.array([0, 30])):
        positions = np.arange(5) + np.reshape(offset, [-1, 1])
        np.testing.assert_allclose(rotate(x, offset), rotated(x, positions), rtol=0, atol=1e-5)


def test_explicit_positions_are_used_whatever_the_offset_is():
    x = normal(2, 5, 3, 8)
    t = np.random.default_rng(1).integers(0, 40, (2, 5))
    got = rotary()(x, 9, None, t)
    np.testing.assert_allclose(got, rotated(x, t), rtol=0, atol=1e-5)


@pytest.mark.parametrize("position", [0, 3])
def test_a_constant_position_holds_for_all(position):
    """Zero is a position too: the original ignored it, as it ignores every false value."""
    x = normal(2, 5, 3, 8)
    got = rotary()(x, 9, position, np.full((2, 5), 11))
    np.testing.assert_allclose(got, rotated(x, np.full((1, 5), position)), rtol=0, atol=2e-6)


def test_the_sequence_may_be_another_axis():
    x = normal(2, 5, 3, 8)
    offset = np.array([2, 6])
    got = rotary(seq_dim=2)(np.swapaxes(x, 1, 2), offset)
    np.testing.assert_allclose(np.swapaxes(got, 1, 2), rotary()(x, offset), rtol=0, atol=1e-6)
    for wrong in (0, 3, -1):
        with pytest.raises(ValueError, match=f"seq_dim: expected between 1 and 2, got {wrong}"):
            rotary(seq_dim=wrong)(x)


def test_an_odd_width_has_no_halves():
    with pytest.raises(ValueError, match="dim: expected an even width, got 7"):
        rotary(dim=7)(normal(1, 2, 1, 7))


def test_scores_know_only_how_far_apart_query_and_key_are():
    q, k = normal(1, 4, 2, 8), normal(1, 4, 2, 8, seed=1)
    rotate = rotary()

    def scores(at):
        return np.einsum("bthd,bshd->bhts", rotate(q, at), rotate(k, at))

    np.testing.assert_allclose(scores(50), scores(3), rtol=0, atol=5e-5)
    unequal = np.einsum("bthd,bshd->bhts", rotate(q, 50), rotate(k, 3))
    assert np.abs(unequal - scores(3)).max() > 0.1


def test_a_bfloat16_input_is_turned_by_float32_angles_and_rounded_once():
    """At position 8191 a bfloat16 angle would be wrong by several turns."""
    x = normal(2, 5, 3, 8, dtype=BFLOAT16)
    got = rotary()(x, 8186)
    assert got.dtype == jnp.bfloat16
    exact = rotated(x, [8186 + np.arange(5)])
    np.testing.assert_allclose(np.float64(got), exact, rtol=0.004, atol=0.004)


# ----------------------------------------------------------------------------- norm and embedding


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_rms_norm_is_its_formula_in_float32(dtype):
    """Small rows show the 1e-5; random scales show that one is not added to them."""
    x = (normal(3, 5, 16) * np.array([[[1e-3]], [[1]], [[1e3]]])).astype(dtype)
    scale = normal(16, seed=1)
    y = pure(lambda x: RMSNorm(name="rms_norm")(x))({"rms_norm": {"scale": scale}}, x)
    assert y.dtype == jnp.float32
    wide = x.astype(np.float64)
    exact = scale * wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_input_and_output_use_one_table_in_the_activation_type(dtype):
    def run(tokens, x):
        embed = InOutEmbed(10, 6, name="in_out_embed")
        return embed(tokens, dtype), embed.decode(x)

    tokens, x = np.array([[3, 0], [9, 3]]), normal(2, 2, 6, dtype=dtype)
    initial = hk.transform(run).init(jax.random.key(0), tokens, x)
    assert jax.tree.map(jnp.shape, initial) == {"in_out_embed": {"embeddings": (10, 6)}}
    table = normal(10, 6, seed=1)
    h, logits = pure(run)({"in_out_embed": {"embeddings": table}}, tokens, x)
    rounded = table.astype(dtype).astype(np.float64)
    assert h.dtype == logits.dtype == jnp.float32
    assert np.array_equal(h, rounded[tokens])
    np.testing.assert_allclose(logits, x.astype(np.float64) @ rounded.T, rtol=0, atol=2e-6)


def test_the_largest_are_those_of_top_k_and_of_equal_ones_the_lower():
    rng = np.random.default_rng(2)
    distinct = rng.standard_normal((4, 30, 8)).astype(np.float32)
    ties = rng.integers(0, 3, (4, 30, 8)).astype(np.float32)
    for x in (distinct, ties, np.zeros_like(ties)):
        for count in (1, 2, 8):
            got, expected = top_k(jnp.asarray(x), count), lax.top_k(x, count)
            assert got[1].dtype == jnp.int32
            assert np.array_equal(got[0], expected[0]) and np.array_equal(got[1], expected[1])


# -------------------------------------------------------------------------------------- attention

HEADS, KV_HEADS, WIDTH = 8, 4, 6  # N, K, H: query head n reads key/value head n // 2
MULTIPLIER = 3.0  # scores of tens: the soft cap matters


def attention(**options):
    """Return (init, apply) of an attention of query, key, value, mask and kv_memory."""
    options = {"attn_output_multiplier": MULTIPLIER} | options
    mesh = options.pop("mesh", None)

    def run(query, key, value, mask=None, kv_memory=None):
        module = MultiHeadAttention(HEADS, KV_HEADS, WIDTH, **options, name="attention")
        return module(query, key, value, mask, kv_memory, mesh)

    return jax.jit(hk.transform(run).init), pure(run)


def attention_params(inputs, *, with_bias=False, value_size=WIDTH, model_size=12, seed=3):
    """Return random parameters for query, key and value of the widths `inputs`."""
    rng = np.random.default_rng(seed)
    columns = {"query": HEADS * WIDTH, "key": KV_HEADS * WIDTH, "value": KV_HEADS * value_size}
    shapes = {name: (rows, columns[name]) for name, rows in zip(columns, inputs, strict=True)}
    shapes["linear"] = (HEADS * value_size, model_size)
    params = {}
    for name, shape in shapes.items():
        params[f"attention/{name}"] = {"w": rng.standard_normal(shape) / np.sqrt(shape[0])}
        if with_bias:
            params[f"attention/{name}"]["b"] = rng.standard_normal(shape[1])
    return jax.tree.map(np.float32, params)


def exact_attention(params, query, key, value, mask):
    """Attend head by head in float64; mask bool [B, T, S]."""

    def project(x, name):
        leaves = params[f"attention/{name}"]
        return x.astype(np.float64) @ leaves["w"] + leaves.get("b", 0)

    def heads(x, count):
        return x.reshape(*x.shape[:2], count, -1)

    q, k = heads(project(query, "query"), HEADS), heads(project(key, "key"), KV_HEADS)
    v = heads(project(value, "value"), KV_HEADS)
    q, k = (reference.rotate(x, np.arange(x.shape[1])) for x in (q, k))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = np.flatnonzero(mask[b, t])
        if len(seen):
            scores = k[b, seen, n // (HEADS // KV_HEADS)] @ q[b, t, n] * MULTIPLIER
            weights = reference.softmax(30 * np.tanh(scores / 30))
            out[b, t, n] = weights @ v[b, seen, n // (HEADS // KV_HEADS)]
    return project(out.reshape(*out.shape[:2], -1), "linear")


@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_attention_is_that_of_the_grouped_heads_one_by_one(with_bias):
    """Query, key and value of different lengths and widths; a random mask of every rank."""
    query, key, value = normal(2, 3, 10), normal(2, 5, 7, seed=1), normal(2, 5, 9, seed=2)
    sizes = {"with_bias": with_bias, "value_size": 2, "model_size": 5}
    params = attention_params((10, 7, 9), **sizes)
    _, apply = attention(**sizes)
    mask = np.random.default_rng(4).random((2, 3, 5)) < 0.6
    mask[..., 0] = True
    expected = exact_attention(params, query, key, value, mask)
    for given in (mask, mask[:, None]):
        out, memory = apply(params, query, key, value, given)
        assert out.dtype == jnp.float32 and memory is None
        np.testing.assert_allclose(out, expected, rtol=0, atol=5e-5)
    both = np.broadcast_to(mask[:1], mask.shape)
    expected = exact_attention(params, query, key, value, both)
    for given in (mask[:1], mask[0]):  # [T, S] was once taken for [B, S]
        shared, _ = apply(params, query, key, value, given)
        np.testing.assert_allclose(shared, expected, rtol=0, atol=5e-5)
    everywhere, _ = apply(params, query, key, value)
    expected = exact_attention(params, query, key, value, np.ones_like(mask))
    np.testing.assert_allclose(everywhere, expected, rtol=0, atol=5e-5)


def test_attention_has_biases_unless_told_otherwise_and_the_published_default_sizes():
    x = normal(1, 2, 10)
    sizes = {"query": (10, 48), "key": (10, 24), "value": (10, 24), "linear": (48, 48)}
    weights = {f"attention/{name}": {"w": shape} for name, shape in sizes.items()}
    for options in ({}, {"with_bias": True}, {"with_bias": False}):
        init, _ = attention(**options)
        shapes = jax.tree.map(jnp.shape, jax.eval_shape(init, jax.random.key(0), x, x, x))
        biased = {name: leaves | {"b": leaves["w"][1:]} for name, leaves in weights.items()}
        assert shapes == (biased if options.get("with_bias", True) else weights)


def test_a_mask_that_tells_the_heads_apart_is_refused():
    x = normal(1, 2, 10)
    with pytest.raises(ValueError, match="mask: expected one mask for all heads, got "):
        attention()[0](jax.random.key(0), x, x, x, np.ones((1, HEADS, 2, 2), bool))


def test_a_query_that_sees_no_key_gets_zero_and_the_others_are_as_without_it():
    x = normal(1, 4, 10)
    params = attention_params((10, 10, 10))
    _, apply = attention(with_bias=False, model_size=12)
    mask = np.tril(np.ones((1, 4, 4), bool))
    full, _ = apply(params, x, x, x, mask)
    mask[0, 2] = False
    out, _ = apply(params, x, x, x, mask)
    assert np.all(out[0, 2] == 0)
    assert np.array_equal(np.delete(out, 2, axis=1), np.delete(full, 2, axis=1))


def test_a_masked_key_takes_no_part_however_low_the_seen_scores_are():
    """Capped after the mask, masked scores would be -30 like the lowest seen ones."""
    q, k, v = np.full((1, 1, 1, 1, 4), 9.0), np.full((1, 3, 1, 4), -9.0), normal(1, 3, 1, 4)
    mask = np.array([[[False, True, False]]])
    out = jax.jit(attend, static_argnums=4)(*map(np.float32, (q, k, v)), mask, 1.0)
    np.testing.assert_allclose(out[0, 0, 0, 0], v[0, 1, 0], rtol=1e-6)


@pytest.mark.parametrize("mesh", [None, (2, 4)], ids=str)
def test_attention_in_pieces_equals_attention_at_once(mesh):
    """The two sequences are cut at other places, into a memory that they fill to the last slot."""
    batch, total, chunk = 2, 6, 3
    x = normal(batch, total, 10)
    params = attention_params((10, 10, 10), value_size=4)
    sizes = {"with_bias": False, "value_size": 4, "model_size": 12}
    _, apply = attention(**sizes, mesh=mesh and make_mesh(mesh))
    causal = np.tril(np.ones((batch, total, total), bool))
    expected = exact_attention(params, x, x, x, causal)
    memory = KVMemory(
        jnp.zeros((batch, total, KV_HEADS, WIDTH)),
        jnp.zeros((batch, total, KV_HEADS, 4)),
        jnp.zeros(batch, jnp.int32),
    )
    for length in ([3, 2], [1, 3], [2, 1]):
        step = np.asarray(memory.step)
        rows = step[:, None] + np.arange(chunk)
        real = np.arange(chunk) < np.array(length)[:, None]
        piece = np.where(real[..., None], x[np.arange(batch)[:, None], rows % total], 99.0)
        mask = np.arange(total) <= rows[..., None]
        memory = memory._replace(length=np.array(length, np.int32))
        out, memory = apply(params, *(piece.astype(np.float32),) * 3, mask, memory)
        assert np.array_equal(memory.step, step + length)
        for b, t in zip(*np.nonzero(real), strict=True):
            np.testing.assert_allclose(out[b, t], expected[b, rows[b, t]], rtol=0, atol=5e-5)


def test_capturing_weights_changes_no_cached_attention():
    """Of a cache that holds other numbers, only what is filled is seen, without a mask too."""
    x, params = normal(2, 3, 10), attention_params((10, 10, 10))
    cache = normal(2, 6, KV_HEADS, WIDTH, seed=1)
    memory = KVMemory(cache, cache[::-1].copy(), jnp.array([0, 2], jnp.int32))

    def run(capture):
        probe = Probe(capture)
        with asking(probe):
            module = MultiHeadAttention(
                HEADS, KV_HEADS, WIDTH, with_bias=False, model_size=12, name="attention"
            )
            return module(x, x, x, None, memory).embeddings, probe.found

    plain, _ = pure(lambda: run(()))(params)
    captured, found = pure(lambda: run(("attention_weights",)))(params)
    np.testing.assert_allclose(captured, plain, rtol=0, atol=1e-5)
    weights = np.asarray(found["attention_weights"])
    assert not weights[0, ..., 3:].any() and not weights[1, ..., 5:].any()
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)


def test_a_chunk_longer_than_the_memory_is_refused():
    x = normal(1, 4, 10)
    cache = jnp.zeros((1, 3, KV_HEADS, WIDTH))
    memory = KVMemory(cache, cache, jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="4 new positions do not fit a memory of 3; prefill in sm"):
        attention()[0](jax.random.key(0), x, x, x, None, memory)


# ---------------------------------------------------------------------------------- writing rows

SLOTS, ROWS = 7, 3


@pytest.mark.parametrize(
    ("stored", "given", "write"),
    [
        *(("float32", "float32", f) for f in (write_rows, xla_cpu.write_rows)),
        *(("bfloat16", "float32", f) for f in (write_rows, xla_cpu.write_rows)),
        *(("bits", given, xla_cpu.write_rows) for given in ("bfloat16", "float32")),
    ],
)
def test_new_rows_go_only_to_their_own_slots(stored, given, write):
    """dynamic_update_slice clamps: a chunk past the end would be shifted over earlier slots."""
    dtypes = {"float32": np.float32, "bfloat16": BFLOAT16, "bits": BFLOAT16}
    cases = [(s, n) for s in (0, 1, 3, 4, 5, 6, 7, 9) for n in range(ROWS + 1)]
    start, length = (np.array(a, np.int32) for a in zip(*cases, strict=True))
    cache = normal(2, len(cases), SLOTS, 2, 3, dtype=dtypes[stored])
    new = normal(len(cases), ROWS, 2, 3, seed=1, dtype=dtypes[given])
    expected = cache.copy()
    for b, t in np.ndindex(new.shape[:2]):
        if t < length[b] and start[b] + t < SLOTS:
            expected[1, b, start[b] + t] = new[b, t].astype(dtypes[stored])
    given_cache = cache.view(np.uint16) if stored == "bits" else cache
    got = np.asarray(jax.jit(write)(given_cache, new, np.int32(1), start, length))
    assert got.dtype == given_cache.dtype
    assert np.array_equal(got.view(expected.dtype), expected)


@pytest.mark.parametrize("write", [write_rows, xla_cpu.write_rows])
def test_a_chunk_as_long_as_the_memory_fills_it(write):
    cache, new = np.zeros((1, 2, 3, 2, 2), np.float32), normal(2, 3, 2, 2)
    start, length = np.array([0, 1], np.int32), np.array([3, 3], np.int32)
    got = jax.jit(write)(cache, new, np.int32(0), start, length)
    assert np.array_equal(got[0, 0], new[0])
    assert np.array_equal(got[0, 1], [np.zeros((2, 2)), *new[1, :2]])


# ----------------------------------------------------------------------------- the language model

TINY = LanguageModelConfig(
    vocab_size=64,
    sequence_len=16,
    output_multiplier_scale=0.7,
    embedding_multiplier_scale=5.0,
    fprop_dtype=jnp.float32,
    model=TransformerConfig(
        emb_size=16,
        widening_factor=3,
        key_size=4,
        num_q_heads=16,
        num_kv_heads=8,
        num_layers=2,
        attn_output_multiplier=0.6,
        num_experts=4,
        num_selected_experts=2,
    ),
)


def changed(config=TINY, **fields):
    """Return the configuration with other fields of its transformer."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **fields))


DENSE = changed(num_experts=1, num_selected_experts=1)
TOKENS = np.random.default_rng(5).integers(3, 64, (8, 6)).astype(np.int32)
TOKENS[1, 3:] = TOKENS[2, 5:] = TOKENS[4, 1:] = 0  # sequences that end in pads
TOKENS[3, 2] = TOKENS[5, 0] = 0  # and pads inside and at the start
LENGTH = np.array([6, 3, 5, 6, 1, 4, 2, 5], np.int32)


@functools.cache
def parameters(config=TINY, quantized=True):
    """Return random parameters on the host; the norms' scales are not one."""
    rng = np.random.default_rng(6)

    def draw(leaf):
        if isinstance(leaf, QuantizedWeight8bit):
            steps = rng.integers(-127, 128, leaf.shape).astype(np.int8)
            scales = rng.uniform(0.5, 1.5, leaf.scales.shape) / (80 * np.sqrt(leaf.shape[-2]))
            return QuantizedWeight8bit(steps, scales.astype(BFLOAT16))
        values = rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[-2])
        return values.astype(np.float32)

    params = {}
    for module, leaves in config.param_shapes(quantized=quantized).items():
        for name, leaf in leaves.items():
            scale = name == "scale"
            value = rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32) if scale else draw(leaf)
            params[module] = {name: value}
    return params


def execution(config, mesh=None, **how):
    """Return the obvious execution on a mesh, with other fields."""
    return dataclasses.replace(config.model.execution(mesh and make_mesh(mesh)), **how)


@functools.partial(jax.jit, static_argnames=("config", "how", "last_hid_only"))
def run(params, tokens, memory=None, length=None, *, config=TINY, how=None, last_hid_only=False):
    """Run the language model; each way to run it compiles once for all tests."""

    def call(tokens, memory, length):
        model = config.make(execution=how)
        return model(tokens, memory, last_hid_only=last_hid_only, length=length)

    return hk.transform(call).apply(params, None, tokens, memory, length)


def assert_close(got, expected, tolerance=1e-5):
    """Compare rows by norm(got - expected) / norm(expected) over the last axis."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert got.shape == expected.shape
    error = np.linalg.norm(got - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert error.max() <= tolerance


@pytest.fixture(scope="module")
def logits():
    """Return the logits [B, T, V] of TOKENS on one device without a mesh."""
    return np.asarray(run(parameters(), TOKENS).logits)


def exact_logits(config, params, tokens):
    """Return the logits in float64; params may be float64 too."""
    return reference.forward(weights_of(params), config.to_dict(), tokens)


@pytest.mark.parametrize("with_length", [False, True], ids=["pads", "length"])
def test_the_last_hidden_state_is_the_one_behind_the_last_logits(logits, with_length):
    params = parameters()
    length = LENGTH if with_length else None
    last = LENGTH - 1 if with_length else np.array([5, 2, 4, 5, 0, 5, 5, 5])
    hidden = run(params, TOKENS, length=length, last_hid_only=True)
    assert hidden.shape == (8, 16) and hidden.dtype == jnp.float32
    table = params["language_model/in_out_embed"]["embeddings"]
    assert_close(hidden @ table.T * TINY.output_multiplier_scale, logits[np.arange(8), last])


def test_with_a_length_only_the_logits_of_the_last_real_position_are_given(logits):
    rest = np.arange(6) >= LENGTH[:, None]
    tokens = np.where(rest, 1 + TOKENS[::-1] % 50, TOKENS)  # what lies behind must not matter
    got = run(parameters(), tokens, length=LENGTH).logits
    assert_close(got, logits[np.arange(8), LENGTH - 1][:, None])


def test_an_empty_memory_has_the_published_shapes():
    def make(*args):
        return hk.transform(lambda: TINY.make().init_memory(*args)).apply({}, None)

    for args, dtype in (((3, 10), jnp.bfloat16), ((3, 10, jnp.float32), jnp.float32)):
        memory = make(*args)
        described = jax.tree.map(lambda x: (x.shape, x.dtype), tuple(memory.layers[:3]))
        cache = ((2, 3, 10, 8, 4), dtype)
        assert described == (cache, cache, ((3,), jnp.int32))
        assert memory.layers.sequence is None  # of all, none is chosen
        assert memory.valid.shape == (3, 10) and memory.valid.dtype == bool
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(memory))


def test_sequences_of_a_memory_are_chosen_one_a_row_and_only_of_a_memory():
    memory = TINY.model.init_memory(3, 10)
    for chosen, given, message in (
        (jnp.zeros([8], jnp.int32), None, "to be given with a memory"),
        (jnp.zeros([3], jnp.int32), memory, r"shape \(8,\), got \(3,\)"),
    ):
        model = hk.transform(lambda m, s: TINY.make()(TOKENS, m, sequence=s))
        with pytest.raises(ValueError, match=f"sequence: expected .*{message}"):
            model.apply(parameters(), None, given, chosen)


def test_a_batch_that_the_data_axis_does_not_divide_is_refused():
    """It would be replicated without a word, and every device would compute all of it."""
    with pytest.raises(ValueError, match="a multiple of the mesh's data axis 4, got 6; pad it"):
        run(parameters(), TOKENS[:6], how=execution(TINY, (4, 2)))


# ---------------------------------------------------------------------- one function in many ways


def test_a_dense_model_is_exact_and_remembers():
    params = parameters(DENSE, quantized=False)
    expected = exact_logits(DENSE, params, TOKENS)
    assert_close(run(params, TOKENS, config=DENSE).logits, expected)
    memory = DENSE.model.init_memory(8, 6, jnp.float32)
    for t in range(6):
        output = run(params, TOKENS[:, t : t + 1], memory, config=DENSE)
        memory = output.model_state
        assert_close(output.logits[:, 0], expected[:, t])


@pytest.mark.parametrize(
    "how",
    [
        *({"expert_dispatch": name} for name in ("all", "static")),
        *({"kernels": name} for name in ("xla_cpu", "cpu")),
        {"scan_unroll": 2},
    ],
    ids=str,
)
def test_how_the_layers_are_run_does_not_change_the_logits(logits, how):
    assert_close(run(parameters(), TOKENS, how=execution(TINY, **how)).logits, logits)


WHOLE = [(1, 1), (1, 2), (1, 8), (2, 4), (4, 2), (8, 1)]
SPREAD = [(1, 2), (2, 4)]


@pytest.mark.parametrize(
    ("mesh", "sharded"),
    [*((mesh, False) for mesh in WHOLE), *((mesh, True) for mesh in SPREAD)],
    ids=lambda value: {False: "whole", True: "spread"}.get(value, str(value)),
)
def test_every_mesh_gives_the_same_logits(logits, mesh, sharded):
    """With shard_activations the residual stream lies over the model axis too."""
    how = execution(TINY, mesh, shard_activations=sharded)
    assert_close(run(parameters(), TOKENS, how=how).logits, logits)


# ------------------------------------------------------------------------------------- gradients


def cross_entropy(logits, tokens, xp):
    """Nats per token of logits [B, T, V] for the tokens that follow; xp: numpy or jax.numpy."""
    logits = logits[:, :-1] - xp.max(logits, axis=-1, keepdims=True)[:, :-1]
    chosen = xp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return xp.mean(xp.log(xp.sum(xp.exp(logits), axis=-1)) - chosen)


TRAINING = Execution(expert_dispatch="static")


@functools.partial(jax.jit, static_argnames="how")
def loss_and_gradients(params, tokens, *, how=TRAINING):
    def loss(params):
        return cross_entropy(run(params, tokens, how=how).logits, tokens, jnp)

    return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def gradients():
    """Return the loss and the gradients of the float model without a mesh."""
    return jax.device_get(loss_and_gradients(parameters(quantized=False), TOKENS))


def test_gradients_are_the_slopes_of_the_exact_loss(gradients):
    """Against central differences in float64: the steepest values, and a random direction."""
    loss, slopes = gradients
    params = jax.tree.map(np.float64, parameters(quantized=False))

    def exact(module, name, move):
        moved = {**params, module: {name: params[module][name] + move}}
        return cross_entropy(exact_logits(TINY, moved, TOKENS), TOKENS, np)

    rng = np.random.default_rng(7)
    for module, leaves in params.items():
        for name, leaf in leaves.items():
            slope = slopes[module][name]
            assert np.all(np.isfinite(slope)) and np.any(slope)
            directions = [rng.standard_normal(leaf.shape)]
            for at in np.argsort(-np.abs(slope), axis=None)[:3]:
                directions.append(np.zeros(leaf.shape))
                directions[-1].flat[at] = 1
            for direction in directions:
                up, down = (exact(module, name, e * direction) for e in (1e-5, -1e-5))
                got = np.sum(slope * direction)
                assert got == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-5), module
    assert loss == pytest.approx(exact("language_model/rms_norm", "scale", 0), rel=1e-6)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "spread"])
def test_gradients_are_the_same_on_a_mesh(gradients, sharded):
    """Sums over a mesh axis have transposes that are easily counted twice."""
    how = execution(TINY, (2, 4), shard_activations=sharded, expert_dispatch="static")
    got = loss_and_gradients(parameters(quantized=False), TOKENS, how=how)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()),
        got,
        gradients,
    )


def test_gradient_descent_learns_to_count():
    params = parameters(quantized=False)
    counting = (3 + (7 * np.arange(8)[:, None] + np.arange(6)) % 20).astype(np.int32)
    losses = []
    for _ in range(20):
        loss, slopes = jax.device_get(loss_and_gradients(params, counting))
        params = jax.tree.map(lambda p, g: p - np.float32(0.5) * g, params, slopes)
        losses.append(float(loss))
    assert losses[-1] < 0.25 * losses[0]  # measured: from 4.3 to 0.4
