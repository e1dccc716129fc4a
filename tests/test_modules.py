"""Each module of model.py alone, and a tiny language model in all executions.

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

import reference
import small
from grok1.execution import Execution
from grok1.inspection import Probe, asking
from grok1.kernels import xla_cpu
from grok1.parallel.sharding import make_mesh
from grok1.reference import weights_of
from model import (
    InOutEmbed,
    KVMemory,
    LanguageModelConfig,
    Memory,
    MultiHeadAttention,
    QuantizedWeight8bit,
    RMSNorm,
    RotaryEmbedding,
    TransformerConfig,
    attend,
    write_rows,
)
from small import normal

BFLOAT16 = ml_dtypes.bfloat16


def pure(function):
    """Return apply(params, ...) of a function of Haiku modules, compiled."""
    transformed: Any = hk.without_apply_rng(hk.transform(function))
    return jax.jit(transformed.apply)


# --------------------------------------------------------------------------------- rotary positions


def rotary(dim=8, seq_dim=1, base_exponent=10000):
    """Return rotate(x, offset=0, const_position=None, t=None)."""

    def run(x, offset=0, const_position=None, t=None):
        module = RotaryEmbedding(dim, base_exponent=base_exponent)
        return module(x, seq_dim, offset, const_position, t)

    return functools.partial(pure(run), {})


def rotated(x, positions, base=10000):
    """Rotate x [B, T, heads, dim] as complex numbers in float64; positions [B or 1, T]."""
    half = x.shape[-1] // 2
    z = x[..., :half].astype(np.float64) + 1j * x[..., half:]
    frequency = float(base) ** (-np.arange(half) / half)
    z = z * np.exp(1j * np.asarray(positions)[..., None, None] * frequency)
    return np.concatenate([z.real, z.imag], axis=-1)


T = np.random.default_rng(1).integers(0, 40, (2, 5))  # positions
ROTATIONS = {
    "from 0": ((), {}, [np.arange(5)]),
    "another base": ((), {"base_exponent": 100}, [np.arange(5)]),
    "an offset": ((7,), {}, [7 + np.arange(5)]),
    "an offset for each sequence": ((np.array([0, 30]),), {}, [np.arange(5), 30 + np.arange(5)]),
    "another axis": ((np.array([2, 6]),), {"seq_dim": 2}, [2 + np.arange(5), 6 + np.arange(5)]),
    "explicit positions": ((9, None, T), {}, T),
    "a constant position": ((9, 3, T), {}, [[3] * 5]),
    "a constant position of 0": ((9, 0, T), {}, [[0] * 5]),
}


@pytest.mark.parametrize(("arguments", "options", "positions"), ROTATIONS.values(), ids=ROTATIONS)
def test_rotary_rotates_by_position_times_frequency(arguments, options, positions):
    x, axis = normal(2, 5, 3, 8), options.get("seq_dim", 1)
    got = rotary(**options)(np.moveaxis(x, 1, axis), *arguments)
    exact = rotated(x, positions, options.get("base_exponent", 10000))
    atol = 2e-6 if np.max(positions) < 5 else 1e-5
    np.testing.assert_allclose(np.moveaxis(got, axis, 1), exact, rtol=0, atol=atol)


def test_rotary_rejects_wrong_axes_and_odd_widths():
    for wrong in (0, 3, -1):
        with pytest.raises(ValueError, match=f"seq_dim: expected between 1 and 2, got {wrong}"):
            rotary(seq_dim=wrong)(normal(2, 5, 3, 8))
    with pytest.raises(ValueError, match="dim: expected an even width, got 7"):
        rotary(dim=7)(normal(1, 2, 1, 7))


def test_bfloat16_rotary_embedding_uses_float32_angles():
    """At position 8191 a bfloat16 angle would be wrong by several turns."""
    x = normal(2, 5, 3, 8, dtype=BFLOAT16)
    got = rotary()(x, 8186)
    assert got.dtype == jnp.bfloat16
    exact = rotated(x, [8186 + np.arange(5)])
    np.testing.assert_allclose(np.float64(got), exact, rtol=0.004, atol=0.004)


# ----------------------------------------------------------------------------- norm and embedding


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_rms_norm_equals_its_formula_in_float32(dtype):
    """Small rows depend on the 1e-5; random scales would show a 1 added to them."""
    x = (normal(3, 5, 16) * np.array([[[1e-3]], [[1]], [[1e3]]])).astype(dtype)
    scale = normal(16, seed=1)
    y = pure(lambda x: RMSNorm(name="rms_norm")(x))({"rms_norm": {"scale": scale}}, x)
    assert y.dtype == jnp.float32
    wide = x.astype(np.float64)
    exact = scale * wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, exact, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_embedding_and_logits_share_one_rounded_table(dtype):
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
    """Attend in float64; mask bool [B, T, S]."""

    def project(x, name, heads=1):
        leaves = params[f"attention/{name}"]
        x = x.astype(np.float64) @ leaves["w"] + leaves.get("b", 0)
        return x.reshape(*x.shape[:2], heads, -1)

    q, k = project(query, "query", HEADS), project(key, "key", KV_HEADS)
    v = project(value, "value", KV_HEADS)
    q, k = (reference.rotate(x, np.arange(x.shape[1])) for x in (q, k))
    q = q.reshape(*q.shape[:2], KV_HEADS, -1, WIDTH)
    out = small.exact_attention(q, k, v, mask, MULTIPLIER)
    return project(out.reshape(*out.shape[:2], -1), "linear")[:, :, 0]


def test_attention_equals_attention_head_by_head():
    """Query, key and value differ in length and width; masks of every rank."""
    query, key, value = normal(2, 3, 10), normal(2, 5, 7, seed=1), normal(2, 5, 9, seed=2)
    sizes = {"with_bias": True, "value_size": 2, "model_size": 5}
    params = attention_params((10, 7, 9), **sizes)
    _, apply = attention(**sizes)
    mask = np.random.default_rng(4).random((2, 3, 5)) < 0.6
    mask[0, 1] = False  # a query that sees no key
    expected = exact_attention(params, query, key, value, mask)
    for given in (mask, mask[:, None]):
        out, memory = apply(params, query, key, value, given)
        assert out.dtype == jnp.float32 and memory is None
        np.testing.assert_allclose(out, expected, rtol=0, atol=5e-5)
    both = np.broadcast_to(mask[:1], mask.shape)
    expected = exact_attention(params, query, key, value, both)
    for given in (mask[:1], mask[0]):  # [T, S] is not [B, S]
        shared, _ = apply(params, query, key, value, given)
        np.testing.assert_allclose(shared, expected, rtol=0, atol=5e-5)
    everywhere, _ = apply(params, query, key, value)
    expected = exact_attention(params, query, key, value, np.ones_like(mask))
    np.testing.assert_allclose(everywhere, expected, rtol=0, atol=5e-5)


def test_attention_parameters_have_published_shapes():
    x = normal(1, 2, 10)
    sizes = {"query": (10, 48), "key": (10, 24), "value": (10, 24), "linear": (48, 48)}
    weights = {f"attention/{name}": {"w": shape} for name, shape in sizes.items()}
    for options in ({}, {"with_bias": True}, {"with_bias": False}):
        init, _ = attention(**options)
        shapes = jax.tree.map(jnp.shape, jax.eval_shape(init, jax.random.key(0), x, x, x))
        biased = {name: leaves | {"b": leaves["w"][1:]} for name, leaves in weights.items()}
        assert shapes == (biased if options.get("with_bias", True) else weights)


def test_soft_cap_is_applied_before_the_mask():
    """Otherwise masked scores would be -30, like the lowest visible ones."""
    q, k, v = np.full((1, 1, 1, 1, 4), 9.0), np.full((1, 3, 1, 4), -9.0), normal(1, 3, 1, 4)
    mask = np.array([[[False, True, False]]])
    out = jax.jit(attend, static_argnums=4)(*map(np.float32, (q, k, v)), mask, 1.0)
    np.testing.assert_allclose(out[0, 0, 0, 0], v[0, 1, 0], rtol=1e-6)


@pytest.mark.parametrize("mesh", [None, (2, 4)], ids=str)
def test_attention_in_chunks_equals_attention_at_once(mesh):
    """The two sequences have chunks of different lengths, and fill the memory completely."""
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


def test_capturing_weights_keeps_cached_attention():
    """Only filled positions are visible, without a mask too; the others hold random numbers."""
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


def test_attention_rejects_wrong_masks_and_long_chunks():
    x, init = normal(1, 4, 10), attention()[0]
    with pytest.raises(ValueError, match="mask: expected one mask for all heads, got "):
        init(jax.random.key(0), x, x, x, np.ones((1, HEADS, 4, 4), bool))
    cache = jnp.zeros((1, 3, KV_HEADS, WIDTH))
    memory = KVMemory(cache, cache, jnp.zeros(1, jnp.int32))
    with pytest.raises(ValueError, match="4 new positions do not fit a memory of 3; prefill in sm"):
        init(jax.random.key(0), x, x, x, None, memory)


# ---------------------------------------------------------------------------------- writing rows

SLOTS = 7


@pytest.mark.parametrize("rows", [3, SLOTS])
@pytest.mark.parametrize(
    ("stored", "write"),
    [("bfloat16", write_rows), ("bfloat16", xla_cpu.write_rows), ("uint16", xla_cpu.write_rows)],
)
def test_write_rows_changes_only_slots_of_new_rows(stored, write, rows):
    """dynamic_update_slice clamps: a chunk past the end would be shifted over earlier slots."""
    cases = [(s, n) for s in (0, 1, 3, 4, 5, 6, 7, 9) for n in range(rows + 1)]
    start, length = (np.array(a, np.int32) for a in zip(*cases, strict=True))
    cache = normal(2, len(cases), SLOTS, 2, 3, dtype=BFLOAT16)
    new = normal(len(cases), rows, 2, 3, seed=1)
    expected = cache.copy()
    for b, t in np.ndindex(new.shape[:2]):
        if t < length[b] and start[b] + t < SLOTS:
            expected[1, b, start[b] + t] = new[b, t].astype(BFLOAT16)
    given = cache.view(stored)
    got = np.asarray(jax.jit(write)(given, new, np.int32(1), start, length))
    assert got.dtype == given.dtype
    assert np.array_equal(got.view(BFLOAT16), expected)


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


DENSE = dataclasses.replace(
    TINY, model=dataclasses.replace(TINY.model, num_experts=1, num_selected_experts=1)
)
TOKENS = np.random.default_rng(5).integers(3, 64, (8, 6)).astype(np.int32)
TOKENS[1, 3:] = TOKENS[2, 5:] = TOKENS[4, 1:] = 0  # sequences that end in pads
TOKENS[3, 2] = TOKENS[5, 0] = 0  # pads inside and at the start
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
    """Return the default execution on a mesh, with other fields."""
    return dataclasses.replace(config.model.execution(mesh and make_mesh(mesh)), **how)


@functools.partial(jax.jit, static_argnames=("config", "how", "last_hid_only"))
def run(params, tokens, memory=None, length=None, *, config=TINY, how=None, last_hid_only=False):
    """Run the language model; each execution is compiled once for all tests."""

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


def exact_logits(config, params, tokens):
    """Return the logits in float64; params may be float64 too."""
    return reference.forward(weights_of(params), config.to_dict(), tokens)


@pytest.fixture(scope="module")
def logits():
    """Return the exact logits [B, T, V] of TOKENS."""
    return exact_logits(TINY, parameters(), TOKENS)


@pytest.mark.parametrize(
    ("mesh", "how"),
    [
        (None, {}),
        (None, {"expert_dispatch": "all", "scan_unroll": 2}),
        ((2, 4), {"shard_activations": False}),
        ((2, 4), {"shard_activations": True}),
    ],
    ids=str,
)
def test_logits_are_exact_in_every_execution(logits, mesh, how):
    got = run(parameters(), TOKENS, how=execution(TINY, mesh, **how)).logits
    assert_close(got, logits)


@pytest.mark.parametrize("with_length", [False, True], ids=["pads", "length"])
def test_last_hidden_state_gives_the_last_logits(logits, with_length):
    params = parameters()
    length = LENGTH if with_length else None
    last = LENGTH - 1 if with_length else np.array([5, 2, 4, 5, 0, 5, 5, 5])
    hidden = run(params, TOKENS, length=length, last_hid_only=True)
    assert hidden.shape == (8, 16) and hidden.dtype == jnp.float32
    table = params["language_model/in_out_embed"]["embeddings"]
    assert_close(hidden @ table.T * TINY.output_multiplier_scale, logits[np.arange(8), last])


def test_length_selects_logits_of_last_real_position(logits):
    rest = np.arange(6) >= LENGTH[:, None]
    tokens = np.where(rest, 1 + TOKENS[::-1] % 50, TOKENS)  # what follows must not matter
    got = run(parameters(), tokens, length=LENGTH).logits
    assert_close(got, logits[np.arange(8), LENGTH - 1][:, None])


def test_empty_memory_has_the_published_shapes():
    for args, dtype in (((3, 10), jnp.bfloat16), ((3, 10, jnp.float32), jnp.float32)):
        make = hk.transform(lambda args=args: TINY.make().init_memory(*args))
        memory = make.apply({}, None)
        described = jax.tree.map(lambda x: (x.shape, x.dtype), memory)
        cache = ((2, 3, 10, 8, 4), dtype)
        layers = KVMemory(cache, cache, ((3,), jnp.int32))
        assert described == Memory(layers, ((3, 10), bool))
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(memory))


def test_model_rejects_wrong_sequences_and_batches():
    memory = TINY.model.init_memory(3, 10)
    for chosen, given, message in (
        (jnp.zeros([8], jnp.int32), None, "to be given with a memory"),
        (jnp.zeros([3], jnp.int32), memory, r"shape \(8,\), got \(3,\)"),
    ):
        model = hk.transform(lambda m, s: TINY.make()(TOKENS, m, sequence=s))
        with pytest.raises(ValueError, match=f"sequence: expected .*{message}"):
            model.apply(parameters(), None, given, chosen)
    # A batch that is not divided would be replicated: each device would compute all of it.
    with pytest.raises(ValueError, match="a multiple of the mesh's data axis 4, got 6; pad it"):
        run(parameters(), TOKENS[:6], how=execution(TINY, (4, 2)))


def test_dense_model_is_exact_at_once_and_step_by_step():
    params = parameters(DENSE, quantized=False)
    expected = exact_logits(DENSE, params, TOKENS)
    assert_close(run(params, TOKENS, config=DENSE).logits, expected)
    memory = DENSE.model.init_memory(8, 6, jnp.float32)
    for t in range(6):
        output = run(params, TOKENS[:, t : t + 1], memory, config=DENSE)
        memory = output.model_state
        assert_close(output.logits[:, 0], expected[:, t])


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


def test_gradients_equal_differences_of_the_exact_loss(gradients):
    """Central differences in float64, by the steepest value and in a random direction."""
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
            steepest = np.zeros(leaf.shape)
            steepest.flat[np.argmax(np.abs(slope))] = 1
            for direction in (rng.standard_normal(leaf.shape), steepest):
                up, down = (exact(module, name, e * direction) for e in (1e-5, -1e-5))
                got = np.sum(slope * direction)
                assert got == pytest.approx((up - down) / 2e-5, rel=1e-3, abs=1e-5), module
    assert loss == pytest.approx(exact("language_model/rms_norm", "scale", 0), rel=1e-6)


@pytest.mark.parametrize(
    "sharded", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["split", "whole"]
)
def test_gradients_on_a_mesh_equal_those_without(gradients, sharded):
    """The transpose of a sum over a mesh axis must not be counted twice."""
    how = execution(TINY, (2, 4), shard_activations=sharded, expert_dispatch="static")
    got = loss_and_gradients(parameters(quantized=False), TOKENS, how=how)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()),
        got,
        gradients,
    )
