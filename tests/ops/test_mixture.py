"""The mixture of experts: every implementation equals the sum over the chosen experts.

Dimension letters as in mixture.py: `M` tokens, `D` model width, `F` expert hidden width, `E`
experts, `A` experts used per token, `L` layers.
"""

import functools
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax

import reference
from grok1.execution import Execution
from grok1.kernels import cpu, xla_cpu
from grok1.ops.mixture import (
    all_experts,
    block_rows,
    chosen_experts,
    differentiable_experts,
    sort_by_expert,
    top_k,
)
from grok1.ops.quantization import QuantizedWeight8bit, StackedWeight, sliced
from grok1.parallel.sharding import make_mesh
from model import DenseBlock, MoELayer, Router, RouterOutput
from small import exact_weight

LAYERS, WIDTH = 2, 16
WIDENING = 3
HIDDEN = 32  # ffn_size(16, 3)
BFLOAT16 = ml_dtypes.bfloat16


def expert_weights(lead, kind, seed=0):
    """Return experts' parameters with leading axes `lead`; kind: "float32" or "int8"."""
    rng = np.random.default_rng(seed)

    def matrix(rows, columns, groups):
        shape = (*lead, rows, columns)
        if kind == "float32":
            return (rng.standard_normal(shape) / np.sqrt(rows)).astype(np.float32)
        scales = rng.uniform(0.3, 1, (*lead, groups, columns)) / (64 * np.sqrt(rows))
        steps = rng.integers(-127, 128, shape).astype(np.int8)
        return QuantizedWeight8bit(steps, scales.astype(BFLOAT16))

    return {
        "linear": {"w": matrix(WIDTH, HIDDEN, 1)},
        "linear_v": {"w": matrix(WIDTH, HIDDEN, 1)},
        "linear_1": {"w": matrix(HIDDEN, WIDTH, 8)},
    }


def exact_mixture(params, x, gates, index):
    """Return sum_a gate_a * expert_a(x) in float64 for x [M, D], params [E, ...] -> [M, D]."""
    weights = [exact_weight(params[name]["w"]) for name in ("linear", "linear_v", "linear_1")]
    wide, gates, y = np.asarray(x, np.float64), np.asarray(gates, np.float64), np.zeros(x.shape)
    for e in range(len(weights[0])):
        own = np.sum(gates * (index == e), axis=1, keepdims=True)
        y += own * reference.expert(wide, *(w[e] for w in weights))
    return y


def of_layer(params, layer):
    return jax.tree.map(lambda w: w[layer], params)


class Tokens(NamedTuple):
    """x [M, D], gates [M, A], index [M, A]."""

    x: np.ndarray
    gates: np.ndarray
    index: np.ndarray


def random_tokens(tokens, experts, chosen, seed=0):
    """Return tokens that each choose `chosen` different experts at random."""
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((tokens, experts)), axis=1)[:, :chosen]
    gates = rng.uniform(0.05, 1, (tokens, chosen))
    x = rng.standard_normal((tokens, WIDTH))
    return Tokens(x.astype(np.float32), gates.astype(np.float32), order.astype(np.int32))


def masked(tokens, rows, experts):
    """Route some rows to no expert, as the router does for masked tokens."""
    gates, index = tokens.gates.copy(), tokens.index.copy()
    gates[rows], index[rows] = 0, experts
    return Tokens(tokens.x, gates, index)


def routings(tokens, experts, chosen):
    """Yield (name, Tokens) of random and extreme routings."""
    plain = random_tokens(tokens, experts, chosen, seed=1)
    yield "random", plain
    for name, first in (("all to the first experts", 0), ("all to the last", experts - chosen)):
        index = np.broadcast_to(np.arange(first, first + chosen, dtype=np.int32), (tokens, chosen))
        yield name, plain._replace(index=index)
    if chosen == 1:  # needs the most blocks: a single copy takes an entire one
        spread = np.minimum(np.arange(tokens, dtype=np.int32), experts - 1)[:, None]
        yield "one to each expert, the rest to the last", plain._replace(index=spread)
    else:  # no router does this, but the layout must not rely on it
        twice = np.repeat(plain.index[:, :1], chosen, axis=1)
        yield "one expert several times", plain._replace(index=twice)
    yield "the first token masked", masked(plain, slice(1), experts)
    yield "half masked", masked(plain, np.random.default_rng(2).random(tokens) < 0.5, experts)
    yield "all masked", masked(plain, slice(None), experts)


FORMS = {
    "all": all_experts,
    "chosen": chosen_experts,
    "differentiable": differentiable_experts,
    "xla_cpu": xla_cpu.chosen_experts,
    "by size": xla_cpu.by_size,
    "cpu": cpu.OPERATIONS.mixture,
}


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    """Compile `by_size` for few sizes, so that an expert may have more rows than the largest."""
    monkeypatch.setattr(xla_cpu, "SIZES", (4, 8))


def mix(form, params, tokens):
    """Run a form on tokens [M, D], each a sequence of its own -> [M, D]."""
    return form(params, *(jnp.asarray(a)[:, None] for a in tokens))[:, 0]


@functools.partial(jax.jit, static_argnames="stack")
def every_form(params, layer, tokens, *, stack=True):
    """Run each of FORMS on one layer of params [L, E, ...] -> float32 [len(FORMS), M, D].

    stack: whether the layer's weights are given as StackedWeight, as in inference, or as slices.
    """
    weights = {name: {"w": StackedWeight(leaf["w"], layer)} for name, leaf in params.items()}
    given = weights if stack else sliced(weights)
    return jnp.stack([mix(form, given, tokens) for form in FORMS.values()])


# ------------------------------------------------------------------------------ the same function


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen", "kind", "stack"),
    [
        (1, 8, 2, "int8", True),
        (5, 3, 3, "int8", False),
        (16, 4, 2, "float32", True),
        (16, 4, 2, "int8", True),
    ],
)
def test_every_form_sums_over_the_chosen_experts(tokens, experts, chosen, kind, stack):
    params = expert_weights((LAYERS, experts), kind)
    for number, (name, inputs) in enumerate(routings(tokens, experts, chosen)):
        layer = number % LAYERS
        expected = exact_mixture(of_layer(params, layer), *inputs)
        got = np.asarray(every_form(params, jnp.int32(layer), inputs, stack=stack))
        for form, y in zip(FORMS, got, strict=True):
            np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6, err_msg=f"{name}, {form}")
        off = inputs.index[:, 0] == experts
        assert np.all(got[:, off] == 0), f"{name}: a masked token's output is not zero"


def test_forms_agree_in_bfloat16():
    """Only the hidden vector is rounded, the same way in all forms: gates and sums are float32."""
    params = expert_weights((LAYERS, 4), "int8")
    plain = random_tokens(16, 4, 2)
    inputs = plain._replace(x=plain.x.astype(BFLOAT16))
    y = np.asarray(every_form(params, jnp.int32(1), inputs))
    exact = exact_mixture(of_layer(params, 1), *inputs)
    assert np.linalg.norm(y[0] - exact) < 4e-3 * np.linalg.norm(exact)
    for form in y[1:]:
        # A value halfway between two bfloat16 numbers may be rounded differently.
        assert np.linalg.norm(form - y[0]) < 4e-4 * np.linalg.norm(exact)


def test_content_of_masked_tokens_changes_nothing():
    """Not even if it is NaN."""
    params = expert_weights((LAYERS, 4), "int8")
    rows = np.random.default_rng(5).random(16) < 0.4
    inputs = masked(random_tokens(16, 4, 2), rows, 4)
    results = []
    for content in (0.0, 1e30, np.inf, np.nan):
        x = inputs.x.copy()
        x[rows] = content
        y = every_form(params, jnp.int32(0), inputs._replace(x=x))
        chosen = [i for i, form in enumerate(FORMS) if form != "all"]
        results.append(np.asarray(y)[chosen])  # the form `all` multiplies a NaN by zero
    for y in results:
        assert np.all(y[:, rows] == 0)
        assert np.array_equal(y, results[0])


# ------------------------------------------------------------------------------------ the layout


@pytest.mark.parametrize(("copies", "experts"), [(1, 8), (16, 8), (66, 8), (256, 8), (10**6, 4)])
def test_one_block_is_enough_for_most_experts(copies, experts):
    """Between 4 rows, since fewer cost as much, and 128, since more may be mostly padding."""
    rows = block_rows(copies, experts)
    assert rows % 4 == 0 and 4 <= rows <= 128
    counts = np.random.default_rng(0).binomial(copies, 1 / experts, 10_000)
    assert rows == 128 or np.mean(counts <= rows) > 0.85
    assert rows < 4 + copies / experts + 2 * np.sqrt(copies / experts)


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen"),
    [(1, 8, 2), (5, 3, 3), (7, 1, 1), (9, 8, 1), (140, 4, 2)],
)
def test_token_copy_has_one_row_in_block_of_its_expert(tokens, experts, chosen):
    sort = jax.jit(sort_by_expert, static_argnums=1)
    for name, inputs in routings(tokens, experts, chosen):
        row_token, block_expert, used, copy_row = map(np.asarray, sort(inputs.index, experts))
        most, rows = row_token.shape
        assert rows == block_rows(tokens * chosen, experts)
        assert block_expert.shape == (most,) and copy_row.shape == (tokens, chosen)
        real = inputs.index < experts
        # Each copy has a row of its own, which holds its token, in a block of its expert.
        assert len(set(copy_row[real])) == real.sum(), name
        token = np.broadcast_to(np.arange(tokens)[:, None], real.shape)[real]
        assert np.array_equal(row_token.reshape(-1)[copy_row[real]], token), name
        assert np.array_equal(block_expert[copy_row[real] // rows], inputs.index[real]), name
        # All other rows are padding, and a masked copy has no row.
        assert np.sum(row_token < tokens) == real.sum(), name
        assert np.all(row_token[row_token >= tokens] == tokens), name
        assert np.all(copy_row[~real] == most * rows), name
        # As few blocks as hold each expert's copies; only these are computed.
        counts = np.bincount(inputs.index[real], minlength=experts)
        assert used == np.sum(-(-counts // rows)), name
        assert np.all(row_token[used:] == tokens), name
        assert np.all((block_expert >= 0) & (block_expert < experts)), name


# ------------------------------------------------------------------------------------- gradients


@functools.partial(jax.jit, static_argnames="form")
def gradients(params, x, gates, index, cotangent, *, form):
    """Return the gradients of sum(cotangent * mixture) with respect to params, x and gates."""

    def loss(params, x, gates):
        return jnp.sum(mix(FORMS[form], params, (x, gates, index)) * cotangent)

    return jax.grad(loss, argnums=(0, 1, 2))(params, x, gates)


def test_gradients_equal_those_of_the_sum():
    """Compared with differences of the float64 sum in a random direction of each input."""
    experts, tokens = 4, 9
    params = expert_weights((experts,), "float32")
    x, gates, index = masked(random_tokens(tokens, experts, 2), slice(2), experts)
    rng = np.random.default_rng(3)
    cotangent = rng.standard_normal(x.shape).astype(np.float32)
    inputs = (params, x, gates)
    found = {
        form: gradients(*inputs, index, cotangent, form=form) for form in ("all", "differentiable")
    }
    leaves, structure = jax.tree.flatten(inputs)
    for number, leaf in enumerate(leaves):
        direction = rng.standard_normal(leaf.shape)
        values = []
        for sign in (1, -1):
            moved = [np.asarray(a, np.float64) for a in leaves]
            moved[number] = moved[number] + sign * 1e-5 * direction
            p, x_, g = jax.tree.unflatten(structure, moved)
            values.append(np.sum(exact_mixture(p, x_, g, index) * cotangent))
        expected = (values[0] - values[1]) / 2e-5
        for form, gradient in found.items():
            got = np.sum(np.asarray(jax.tree.leaves(gradient)[number], np.float64) * direction)
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-4), (number, form)
    for leaf, other in zip(*(jax.tree.leaves(g) for g in found.values()), strict=True):
        # The form `all` has gradients for the gates of masked tokens, too.
        rows = slice(2, None) if leaf.shape == gates.shape else slice(None)
        np.testing.assert_allclose(leaf[rows], other[rows], rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------- the layer

EXPERTS = 4
GELU_BLOCK = DenseBlock(WIDENING)


def custom_expert(x):
    """A two-layer network with biases, of another width."""
    linear = functools.partial(hk.Linear, w_init=hk.initializers.RandomUniform())
    return linear(WIDTH, name="out")(jnp.tanh(linear(5, name="hidden")(x)))


def make_layer(layer_fn, **options):
    """Return MoELayer's (init, apply) for inputs [B, T, D] and padding_mask [B, T]."""

    def run(x, padding_mask):
        return MoELayer(EXPERTS, layer_fn, Router(2), **options)(x, padding_mask)

    return hk.without_apply_rng(hk.transform(run))


@pytest.fixture(scope="module")
def inputs():
    """x [8, 6, D], padding_mask [8, 6]."""
    rng = np.random.default_rng(6)
    x = rng.standard_normal((8, 6, WIDTH)).astype(np.float32)
    return x, rng.random((8, 6)) < 0.7


def layer_params(kind, lead=()):
    """Return the parameters of a MoELayer of DenseBlocks, with leading axes `lead` if asked for."""
    router = np.random.default_rng(7).standard_normal((WIDTH, EXPERTS)) / 4
    params = {f"moe/{k}": v for k, v in expert_weights((*lead, EXPERTS), kind).items()}
    return params | {"router": {"w": router.astype(np.float32)}}


def in_layer(params, layer):
    """Leave the experts' weights among those of all layers."""
    return {
        name: {"w": StackedWeight(leaf["w"], layer)} if "moe" in name else leaf
        for name, leaf in params.items()
    }


def exact_layer(params, x, padding_mask):
    """MoELayer in float64, [B, T, D]."""
    weights = {name: exact_weight(leaf["w"]) for name, leaf in params.items()}
    sizes = {"num_selected_experts": 2, "num_experts": EXPERTS}
    return reference.mixture(x, weights, sizes, padding_mask)


@pytest.mark.parametrize(
    ("mesh", "sharded"), [(None, False), ((2, 4), False), ((2, 4), True)], ids=str
)
def test_layer_is_exact_on_one_device_and_on_a_mesh(inputs, mesh, sharded):
    """Each data shard sorts its own tokens; the experts' parts are summed over `model`."""
    params = layer_params("int8", (LAYERS,))
    layer = make_layer(GELU_BLOCK, mesh=mesh and make_mesh(mesh), shard_activations=sharded)
    y = jax.jit(layer.apply)(in_layer(params, jnp.int32(1)), *inputs)
    own = of_layer({k: v for k, v in params.items() if "moe" in k}, 1)
    expected = exact_layer(own | {"router": params["router"]}, *inputs)
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6)
    assert y.dtype == jnp.float32 and np.all(np.asarray(y)[~inputs[1]] == 0)
    assert y.sharding.shard_shape(y.shape)[2] == WIDTH // (mesh[1] if sharded else 1)


@pytest.mark.parametrize("mesh", [None, (2, 4)], ids=str)
def test_by_size_is_only_for_one_sequence_per_device(inputs, mesh, monkeypatch):
    """Its rounding depends on the other tokens: those of other sequences must not matter."""
    used = []
    by_size = xla_cpu.by_size
    monkeypatch.setattr(xla_cpu, "SMALL_EXPERT", 0)
    monkeypatch.setattr(xla_cpu, "by_size", lambda *args: (used.append(True), by_size(*args))[1])
    execution = Execution(mesh and make_mesh(mesh), kernels="xla_cpu")
    layer = make_layer(GELU_BLOCK, execution=execution)
    shards = mesh[0] if mesh else 1
    for sequences in (shards, 2 * shards):
        used.clear()
        jax.eval_shape(layer.apply, layer_params("int8"), *(a[:sequences] for a in inputs))
        assert bool(used) == (sequences == shards)


def test_layer_initializes_each_expert_separately(inputs):
    init = jax.jit(make_layer(custom_expert).init)
    params = init(jax.random.key(0), *inputs)
    assert {f"{m}/{n}": w.shape for m, leaves in params.items() for n, w in leaves.items()} == {
        "moe/hidden/w": (EXPERTS, WIDTH, 5),
        "moe/hidden/b": (EXPERTS, 5),
        "moe/out/w": (EXPERTS, 5, WIDTH),
        "moe/out/b": (EXPERTS, WIDTH),
        "router/w": (WIDTH, EXPERTS),
    }
    assert len(np.unique(params["moe/out"]["w"][:, 0, 0])) == EXPERTS


def test_function_around_dense_block_equals_the_block(inputs):
    """The two paths through the layer take the same parameters and compute the same."""
    params = layer_params("int8", (LAYERS,))

    @jax.jit
    def both(params, layer):
        args = (in_layer(params, layer), *inputs)
        return [make_layer(fn).apply(*args) for fn in (GELU_BLOCK, lambda x: GELU_BLOCK(x))]

    for layer in range(LAYERS):
        block, function = both(params, jnp.int32(layer))
        np.testing.assert_allclose(block, function, rtol=0, atol=3e-6)


# ------------------------------------------------------------------------------------ the router


def route(x, padding_mask, w, chosen=2):
    apply = hk.without_apply_rng(
        hk.transform(lambda x, mask: Router(chosen)(x, mask, w.shape[1]))
    ).apply
    return RouterOutput(*map(np.asarray, apply({"router": {"w": w}}, x, padding_mask)))


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
def test_gates_are_the_largest_probabilities(inputs, dtype):
    """Not renormalized; float32 also for bfloat16 inputs, or near-ties would be decided wrongly."""
    x = inputs[0].astype(dtype)
    w = layer_params("float32")["router"]["w"]
    gates, index, probs = route(x, None, w)
    assert gates.dtype == probs.dtype == np.float32
    exact = reference.softmax(x.astype(np.float64) @ w)
    np.testing.assert_allclose(probs, exact, rtol=1e-5)
    order = np.argsort(-exact, axis=-1, kind="stable")[..., :2]
    assert np.array_equal(index, order)
    np.testing.assert_allclose(gates, np.take_along_axis(exact, order, axis=-1), rtol=1e-5)
    assert np.all(gates.sum(axis=-1) < 1)


def test_top_k_equals_lax_top_k():
    """Of equal values the one with the lower index comes first."""
    rng = np.random.default_rng(2)
    distinct = rng.standard_normal((4, 30, 8)).astype(np.float32)
    ties = rng.integers(0, 3, (4, 30, 8)).astype(np.float32)
    for x in (distinct, ties, np.zeros_like(ties)):
        for count in (1, 2, 8):
            got, expected = top_k(jnp.asarray(x), count), lax.top_k(x, count)
            assert got[1].dtype == jnp.int32
            assert np.array_equal(got[0], expected[0]) and np.array_equal(got[1], expected[1])


def test_masked_token_has_no_expert_and_gates_of_zero(inputs):
    x, padding_mask = inputs
    w = layer_params("float32")["router"]["w"]
    gates, index, probs = route(x, padding_mask, w)
    assert np.all(index[~padding_mask] == EXPERTS) and np.all(gates[~padding_mask] == 0)
    free = route(x, None, w)
    assert np.array_equal(index[padding_mask], free.expert_index[padding_mask])
    assert np.array_equal(gates[padding_mask], free.gates[padding_mask])
    assert np.array_equal(probs, free.probs)
