"""A decoder layer in GPU kernels, interpreted on a CPU: results, and what is read.

Dimension letters as in `grok1/kernels/gpu`. No GPU is needed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gpu_kernels
from grok1.execution import Execution
from grok1.kernels.gpu import operations as gpu
from grok1.kernels.gpu.decode_attention import write_and_attend
from grok1.kernels.gpu.layer import fused_layer
from grok1.kernels.gpu.products import expert_sum, gated, side_by_side
from grok1.kernels.gpu.router import route
from grok1.kernels.gpu.tiles import interpreted_kernels
from grok1.ops import cache
from grok1.ops.cache import CacheIndex
from grok1.parallel.sharding import make_mesh
from grok1.serving import steps
from model import LanguageModelConfig, TransformerConfig
from random_models import grok_1_rank, random_params
from runner import with_settings
from small import choices, dense_gates, exact_attention, exact_weight, normal, random_weight

pytestmark = pytest.mark.filterwarnings(
    "ignore:The Pallas Triton backend is deprecated:DeprecationWarning"
)

LAYER = jnp.int32(1)
DTYPES = [jnp.bfloat16, jnp.float32]


def interpreted(kernel, *static):
    """Return a kernel, interpreted and compiled; `static`: the positions of what is no array."""
    return jax.jit(interpreted_kernels()(kernel), static_argnums=static)


def relative_error(found, exact):
    """The norm of the difference over the norm of the exact values."""
    difference = np.asarray(found, np.float64) - exact
    return np.linalg.norm(difference) / np.linalg.norm(exact)


def gelu(x):
    """The tanh approximation."""
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


# -------------------------------------------------------------------------------------- products


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "inputs", "groups"), [(1, 768, 1), (17, 154, 2)], ids=str)
def test_products_side_by_side_are_those_of_each_matrix(rows, inputs, groups, dtype):
    weights = [random_weight((2,), inputs, n, groups, seed=n) for n in (96, 32, 40)]
    x = normal(rows, inputs).astype(dtype)
    y = interpreted(side_by_side)(x, weights, LAYER)
    assert y.shape == (rows, 168) and y.dtype == jnp.float32
    exact = [np.asarray(x, np.float64) @ exact_weight(w)[1] for w in weights]
    assert relative_error(y, np.concatenate(exact, axis=1)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "inputs", "groups"), [(2, 64, 1), (19, 154, 7)], ids=str)
def test_gated_products_are_those_of_the_chosen_experts(rows, inputs, groups, dtype):
    gate, value = (random_weight((2, 4), inputs, 72, groups, seed=n) for n in range(2))
    x, chosen = normal(rows, inputs).astype(dtype), choices(rows, 4, masked=1)
    hidden = interpreted(gated)(x, gate, value, LAYER, chosen[1])
    assert hidden.shape == (4, rows, 72) and hidden.dtype == dtype
    a, b = (
        np.einsum("mi,eio->emo", x.astype(np.float64), exact_weight(w)[1]) for w in (gate, value)
    )
    chosen = dense_gates(*chosen, 4).T > 0
    error = relative_error(hidden[chosen], (gelu(a) * b)[chosen])
    assert error < (1e-6 if dtype == jnp.float32 else 3e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "inputs", "groups"), [(2, 64, 1), (19, 154, 7)], ids=str)
def test_sums_over_experts_have_their_gates(rows, inputs, groups, dtype):
    """An expert that no row has chosen is not read: its hidden rows were never written."""
    weight, chosen = random_weight((2, 4), inputs, 72, groups), choices(rows, 4, masked=1)
    x = normal(4, rows, inputs).astype(dtype)
    x[1] = np.nan
    y = interpreted(expert_sum)(x, weight, LAYER, *chosen)
    assert np.all(y[-1] == 0) and y.dtype == jnp.float32
    own = np.nan_to_num(x.astype(np.float64))
    gates = dense_gates(*chosen, 4)
    exact = np.einsum("me,emi,eio->mo", gates, own, exact_weight(weight)[1])
    assert relative_error(y, exact) < 1e-6


# -------------------------------------------------------------------------------- the router


def exact_norm(x, scale):
    """RMSNorm in float64."""
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * scale


@pytest.mark.parametrize(("width", "experts", "count"), [(1024, 8, 2), (600, 5, 3), (77, 2, 1)])
def test_route_normalizes_and_chooses_the_best_experts(width, experts, count):
    h, attended = normal(4, width), normal(4, width, seed=1)
    scales = normal(2, width, seed=2), normal(2, width, seed=3)
    router = normal(2, width, experts, seed=4) / width**0.5
    valid = np.array([True, True, False, True])
    found, x, gates, index = interpreted(route, 6, 7)(
        h, attended, scales, router, LAYER, valid, count, jnp.float32
    )
    exact_h = h + exact_norm(attended, scales[0][1])
    exact_x = exact_norm(exact_h, scales[1][1])
    assert relative_error(found, exact_h) < 1e-6 and relative_error(x, exact_x) < 1e-6
    powers = np.exp(exact_x @ router[1].astype(np.float64))
    probs = powers / powers.sum(axis=1, keepdims=True)
    best = np.argsort(-probs, axis=1)[:, :count]
    assert np.array_equal(index, np.where(valid[:, None], best, experts))
    assert relative_error(gates, np.take_along_axis(probs, best, axis=1)) < 2e-6


def test_ties_between_experts_go_to_the_lower_index():
    ones = np.ones([2, 64], np.float32)
    arrays = ones[:1], ones[:1], (ones, ones), np.zeros([2, 64, 4], np.float32)
    gates, index = interpreted(route, 6, 7)(*arrays, LAYER, np.ones(1, bool), 2, jnp.float32)[2:]
    assert gates.tolist() == [[0.25, 0.25]] and index.tolist() == [[0, 1]]


# ------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("dtype", DTYPES, ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("start", "length", "sequence"),
    [
        ((0,), (1,), (0,)),
        ((70, 63, 64), (1, 1, 1), (2, 0, 1)),
        ((5, 150, 149), (0, 1, 1), (0, 1, 2)),
    ],
    ids=["the first token", "some blocks, in another order", "nothing new, and a full cache"],
)
def test_new_rows_are_written_and_attended_to(start, length, sequence, dtype):
    """What is beyond a sequence's length may be NaN; a sequence at rest gets zeros."""
    batch, kv_heads, group, width, size = len(start), 2, 3, 24, 150
    start, length, sequence = (np.array(x, np.int32) for x in (start, length, sequence))
    keys, values = (normal(2, batch, size, kv_heads, width, seed=n).astype(dtype) for n in (1, 2))
    for b, own in enumerate(sequence):
        keys[:, own, start[b] :], values[:, own, start[b] :] = np.nan, np.nan
    heads = normal(batch, (group + 2) * kv_heads, width, seed=3).astype(dtype)
    mask = np.random.default_rng(4).uniform(size=(batch, size)) < 0.8
    mask[:, 0] = True
    index = CacheIndex(LAYER, start, length, sequence)
    out, *found = interpreted(write_and_attend, 4)(heads, keys, values, mask, 0.9, index)

    query, key, value = np.split(heads, [group * kv_heads, (group + 1) * kv_heads], axis=1)
    written = [
        np.asarray(cache.write_rows(old, new[:, None], *index))
        for old, new in ((keys, key), (values, value))
    ]
    for ours, theirs in zip(found, written, strict=True):
        assert np.array_equal(ours, theirs, equal_nan=True)
    there = np.arange(size) < np.where(length > 0, np.minimum(start + length, size), 0)[:, None]
    query = query.reshape(batch, 1, kv_heads, group, width)
    exact = exact_attention(
        query,
        *(np.nan_to_num(w[1, sequence].astype(float)) for w in written),
        (mask & there)[:, None],
        0.9,
    )
    exact = exact.reshape(batch, -1, width)
    assert relative_error(out, exact) < (1e-6 if dtype == jnp.float32 else 4e-3)


def test_sequence_alone_attends_as_in_a_batch():
    start, ones = np.array([150, 3, 77], np.int32), np.ones(3, np.int32)
    keys, values = (normal(2, 3, 160, 2, 16, seed=n).astype(jnp.bfloat16) for n in (1, 2))
    heads, mask = normal(3, 10, 16).astype(jnp.bfloat16), np.ones([3, 160], bool)
    index = CacheIndex(LAYER, start, ones, np.arange(3, dtype=np.int32))
    attend = interpreted(write_and_attend, 4)
    together = attend(heads, keys, values, mask, 1.0, index)[0]
    for b in range(3):
        own = slice(b, b + 1)
        index = CacheIndex(LAYER, start[own], ones[own], np.zeros(1, np.int32))
        alone = attend(heads[own], keys[:, own], values[:, own], mask[own], 1.0, index)[0]
        assert np.array_equal(alone, together[own])


# ------------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize(
    ("mesh", "kv_heads"),
    [
        ((2, 4), 2),
        *(pytest.param(mesh, 8, marks=pytest.mark.exhaustive) for mesh in (None, (1, 8), (2, 4))),
    ],
)
def test_a_layer_on_a_mesh_equals_the_modules(mesh, kv_heads, monkeypatch):
    """In a chunk of many tokens, and single ones: with a pad token, and a slot at rest.

    Rows belong to sequences in another order.
    """
    layer = interpreted_kernels()(fused_layer)
    monkeypatch.setattr(gpu, "OPERATIONS", gpu.OPERATIONS._replace(fused_layer=layer))
    model = TransformerConfig(
        emb_size=96, key_size=16, num_q_heads=16, num_kv_heads=kv_heads, num_layers=2,
        num_experts=5, num_selected_experts=2, attn_output_multiplier=0.3,
    )  # fmt: skip
    config = LanguageModelConfig(model, vocab_size=64, sequence_len=80, fprop_dtype=jnp.float32)
    params = config.init_params(0, quantized=True)
    devices = None if mesh is None else make_mesh(mesh, num_kv_heads=kv_heads)
    tokens = np.random.default_rng(0).integers(1, 64, (4, 42)).astype(np.int32)
    tokens[1, [4, 41]] = 0
    sequence = np.array([1, 0, 3, 2], np.int32)
    found = []
    for name in ("gpu", "plain"):
        execution = Execution(devices, kernels=name)
        step = jax.jit(functools.partial(steps.apply_model, config, execution, every_position=True))
        memory, logits = config.model.init_memory(4, 80, jnp.float32), []
        for chunk in np.split(tokens, [40, 41], axis=1):
            length = np.array([chunk.shape[1]] * 3 + [chunk.shape[1] // 2], np.int32)
            arguments = params, chunk, memory, length
            kernels = str(step.trace(*arguments, sequence=sequence).jaxpr).count("name=route")
            assert kernels == (name == "gpu")
            output = step(*arguments, sequence=sequence)
            memory = output.model_state
            logits.append(output.logits[:3])
        found.append((np.concatenate(logits, axis=1), memory))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        assert relative_error(a, np.asarray(b, np.float64)) < 3e-6


@pytest.mark.exhaustive
@pytest.mark.parametrize("tokens", [1, 3, 80])
def test_a_layer_in_the_widths_of_grok_1_equals_the_modules(tokens):
    """In those of one of eight devices; single tokens of sequences, or the first of a prompt."""
    config = with_settings(grok_1_rank(1), "bfloat16", 256)
    own = gpu_kernels.Sizes(config, random_params(config, groups=1), min(tokens, 3), 1)
    case, caches = gpu_kernels.fused_layer(own, tokens), own.new_caches()
    arguments = jnp.int32(0), caches, *case.inputs, case.weights
    plain = jax.jit(case.plain)(*arguments)
    found, _ = jax.jit(interpreted_kernels()(case.kernel))(*arguments)
    errors = np.linalg.norm(found - plain, axis=-1) / np.linalg.norm(plain, axis=-1)
    assert np.median(errors) < 2e-3  # one rounding to bfloat16; single sums may round otherwise
