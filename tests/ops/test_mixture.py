"""The mixture: the form that computes only the chosen experts is held to the obvious one.

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
from grok1.inspection import Probe, asking
from grok1.kernels import cpu, xla_cpu
from grok1.ops.mixture import (
    all_experts,
    block_rows,
    chosen_experts,
    differentiable_experts,
    expert,
    sort_by_expert,
)
from grok1.ops.quantization import QuantizedWeight8bit, StackedWeight
from grok1.parallel.sharding import make_mesh
from model import DenseBlock, MoELayer, Router, RouterOutput

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


def exact_values(weight):
    """Return a float or int8 weight in float64."""
    if isinstance(weight, QuantizedWeight8bit):
        return reference.dequantize(weight.weight, weight.scales)
    return np.asarray(weight, np.float64)


def exact_mixture(params, x, gates, index):
    """sum_a gate_a * expert_a(x), token by token, in float64; params [E, ...] -> [M, D]."""
    weights = [exact_values(params[name]["w"]) for name in ("linear", "linear_v", "linear_1")]
    experts = len(weights[0])
    y = np.zeros(x.shape)
    for m in range(len(x)):
        for gate, e in zip(gates[m], index[m], strict=True):
            if e < experts:
                row = np.asarray(x[m], np.float64)
                y[m] += np.float64(gate) * reference.expert(row, *(w[e] for w in weights))
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
    """Send some rows to no expert, as the router does."""
    gates, index = tokens.gates.copy(), tokens.index.copy()
    gates[rows], index[rows] = 0, experts
    return Tokens(tokens.x, gates, index)


def routings(tokens, experts, chosen):
    """Yield (name, Tokens) of the routings that a layout could get wrong."""
    plain = random_tokens(tokens, experts, chosen, seed=1)
    yield "random", plain
    for name, first in (("all to the first experts", 0), ("all to the last", experts - chosen)):
        index = np.broadcast_to(np.arange(first, first + chosen, dtype=np.int32), (tokens, chosen))
        yield name, plain._replace(index=index)
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


def mix(form, params, tokens):
    """Run a form on tokens [M, D], each a sequence of its own -> [M, D]."""
    return form(params, *(jnp.asarray(a)[:, None] for a in tokens))[:, 0]


def stack(params, layer):
    """Leave the weights of one layer among those of all, [L, E, ...]."""
    return {name: {"w": StackedWeight(leaf["w"], layer)} for name, leaf in params.items()}


@jax.jit
def every_form(params, layer, tokens):
    """Run each of FORMS on one layer of params [L, E, ...], sliced and stacked.

    Returns float32 [2 * len(FORMS), M, D], `all` first.
    """
    own = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, layer, 0, False), params)
    given = own, stack(params, layer)
    return jnp.stack([mix(form, p, tokens) for p in given for form in FORMS.values()])


SIZES = [(1, 8, 2), (2, 4, 1), (5, 3, 3), (33, 8, 2), (300, 4, 2)]  # M, E, A


# ------------------------------------------------------------------------------ the same function


@pytest.mark.parametrize(
    ("tokens", "experts", "chosen", "kind"),
    [*((*size, "int8") for size in SIZES), (1, 8, 2, "float32"), (33, 8, 2, "float32")],
)
def test_every_form_of_the_mixture_is_the_sum_over_the_chosen_experts(
    tokens, experts, chosen, kind
):
    params = expert_weights((LAYERS, experts), kind)
    for number, (name, inputs) in enumerate(routings(tokens, experts, chosen)):
        layer = number % LAYERS
        expected = exact_mixture(of_layer(params, layer), *inputs)
        got = np.asarray(every_form(params, jnp.int32(layer), inputs))
        for form, y in zip([*FORMS, *FORMS], got, strict=True):
            np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6, err_msg=f"{name}, {form}")
        off = inputs.index[:, 0] == experts
        assert np.all(got[:, off] == 0), f"{name}: a masked token's output is not zero"


def test_in_bfloat16_the_forms_agree_as_closely_as_their_sums_do():
    """Only the hidden vector is rounded, the same way in both: gates and sums are float32."""
    params = expert_weights((LAYERS, 8), "int8")
    plain = random_tokens(33, 8, 2)
    inputs = plain._replace(x=plain.x.astype(BFLOAT16))
    y = np.asarray(every_form(params, jnp.int32(1), inputs))
    exact = exact_mixture(of_layer(params, 1), *inputs)
    assert np.linalg.norm(y[0] - exact) < 4e-3 * np.linalg.norm(exact)
    for form in y[1:]:
        # A sum near the middle between two bfloat16 numbers may round the hidden vector apart.
        assert np.linalg.norm(form - y[0]) < 4e-4 * np.linalg.norm(exact)


def test_a_token_that_chooses_one_expert_twice_gets_it_twice():
    """No router does, but the layout must not rely on it."""
    params = expert_weights((LAYERS, 8), "float32")
    inputs = random_tokens(33, 8, 2)
    inputs.index[:] = inputs.index[:, :1]
    y = every_form(params, jnp.int32(0), inputs)
    expected = exact_mixture(of_layer(params, 0), *inputs)
    np.testing.assert_allclose(y, np.broadcast_to(expected, y.shape), rtol=0, atol=3e-6)


# ------------------------------------------------------------------------------------ the layout


@pytest.mark.parametrize(("copies", "experts"), [(1, 8), (16, 8), (66, 8), (256, 8), (10**6, 4)])
def test_blocks_hold_what_most_experts_have_to_do(copies, experts):
    """From 4, below which CPU products are slow, to 128, above which caches are too small."""
    rows = block_rows(copies, experts)
    assert rows % 4 == 0 and 4 <= rows <= 128
    counts = np.random.default_rng(0).binomial(copies, 1 / experts, 10_000)
    assert rows == 128 or np.mean(counts <= rows) > 0.85
    assert rows < 4 + copies / experts + 2 * np.sqrt(copies / experts)


@pytest.mark.parametrize(("tokens", "experts", "chosen"), [*SIZES, (64, 8, 2), (7, 1, 1)])
def test_each_token_copy_has_one_row_in_a_block_of_its_own_expert(tokens, experts, chosen):
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


def test_the_worst_routing_fits_the_blocks_that_are_allotted():
    """All experts but the last with a single copy, which takes a whole block: the most blocks."""
    sort = jax.jit(sort_by_expert, static_argnums=1)
    for tokens, experts in ((1, 8), (9, 8), (33, 8), (40, 3), (300, 4)):
        rows = block_rows(tokens, experts)
        index = np.full((tokens, 1), experts - 1, np.int32)
        alone = min(tokens, experts - 1)
        index[:alone, 0] = np.arange(alone)
        blocks = sort(index, experts)
        counts = np.bincount(index[:, 0], minlength=experts)
        assert blocks.used == np.sum(-(-counts // rows)) <= len(blocks.row_token)
        assert np.all(np.asarray(blocks.copy_row) < blocks.row_token.size)


# ------------------------------------------------------------------------------------- gradients


@functools.partial(jax.jit, static_argnames="form")
def gradients(params, x, gates, index, cotangent, *, form):
    """Return the gradients of sum(cotangent * mixture) with respect to params, x and gates."""

    def loss(params, x, gates):
        return jnp.sum(mix(FORMS[form], params, (x, gates, index)) * cotangent)

    return jax.grad(loss, argnums=(0, 1, 2))(params, x, gates)


def test_gradients_are_those_of_the_sum():
    """Both forms against differences of the float64 sum, along a random direction of each input."""
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
        # The all-experts form also knows what a gate of zero would have been worth.
        rows = slice(2, None) if leaf.shape == gates.shape else slice(None)
        np.testing.assert_allclose(leaf[rows], other[rows], rtol=1e-4, atol=1e-5)


def test_an_expert_that_nobody_chooses_gets_a_gradient_of_zero():
    """Blocks that do not exist are skipped, and must not add to the expert they name."""
    params = expert_weights((4,), "float32")
    x, gates, index = random_tokens(9, 4, 2)
    index[:] = [2, 0]
    d_params, _, _ = gradients(params, x, gates, index, np.ones_like(x), form="differentiable")
    for leaf in jax.tree.leaves(d_params):
        assert np.any(leaf, axis=(1, 2)).tolist() == [True, False, True, False]


def test_the_dynamic_loop_has_no_reverse_mode():
    """Why the differentiable form exists: were this to pass one day, that form could go."""
    params = expert_weights((4,), "float32")
    x, gates, index = random_tokens(9, 4, 2)
    with pytest.raises(ValueError, match="Reverse-mode differentiation does not work"):
        gradients(params, x, gates, index, np.ones_like(x), form="chosen")


# ----------------------------------------------------------------- one row and the other rows


@functools.partial(jax.jit, static_argnames="form")
def serve(params, tokens, *, form):
    return mix(FORMS[form], params, tokens)


@pytest.mark.parametrize(
    ("form", "kind"),
    [("chosen", "float32"), ("chosen", "int8"), ("xla_cpu", "int8"), ("cpu", "int8")],
)
@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(8, 8, 2), (37, 4, 1), (128, 8, 2)])
def test_a_row_does_not_depend_on_the_others(tokens, experts, chosen, form, kind):
    """A request's answer must not depend on which others are served beside it.

    The other rows decide which block a row falls in, at which place of it, and how many there are.
    """
    params = jax.device_put(expert_weights((experts,), kind))
    mine = random_tokens(1, experts, chosen, seed=9)
    rng = np.random.default_rng(4)
    seen, blocks = set(), set()
    for trial in range(24):
        others = random_tokens(tokens, experts, chosen, seed=100 + trial)
        others = others._replace(x=others.x * np.float32(10.0 ** rng.integers(-3, 4)))
        if trial % 3 == 1:  # all want what mine wants
            others.index[:] = mine.index
        if trial % 3 == 2:
            others = masked(others, rng.random(tokens) < rng.random(), experts)
        row = int(rng.integers(tokens))
        for theirs, own in zip(others, mine, strict=True):
            theirs[row] = own[0]
        seen.add(np.asarray(serve(params, others, form=form))[row].tobytes())
        blocks.add(int(np.sum(np.asarray(others.index)[:row] == mine.index[0, 0])))
    assert len(blocks) > 3  # it did stand at different places
    assert len(seen) == 1


def test_what_masked_tokens_hold_never_changes_the_others():
    """Even if it is not a number."""
    params = expert_weights((LAYERS, 8), "int8")
    rows = np.random.default_rng(5).random(33) < 0.4
    inputs = masked(random_tokens(33, 8, 2), rows, 8)
    results = []
    for content in (0.0, 1e30, np.inf, np.nan):
        x = inputs.x.copy()
        x[rows] = content
        y = every_form(params, jnp.int32(0), inputs._replace(x=x))
        chosen = [i for i, form in enumerate([*FORMS, *FORMS]) if form != "all"]
        results.append(np.asarray(y)[chosen])  # the obvious form multiplies a NaN by zero
    for y in results:
        assert np.all(y[:, rows] == 0)
        assert np.array_equal(y, results[0])


# ------------------------------------------------------------------------------------- the layer

EXPERTS = 4
GELU_BLOCK = DenseBlock(WIDENING)


def custom_expert(x):
    """Any Haiku function: biases, another width, another shape of network."""
    return hk.Linear(WIDTH, name="out")(jnp.tanh(hk.Linear(5, name="hidden")(x)))


def make_layer(layer_fn, **options):
    """Return MoELayer's (init, apply) for inputs [B, T, D] and padding_mask [B, T]."""

    def run(x, padding_mask):
        moe = MoELayer(EXPERTS, layer_fn, Router(2), **options)
        probe = Probe(("expert_gates", "expert_index"))
        with asking(probe):
            return moe(x, padding_mask), probe.found

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
    weights = {name: exact_values(leaf["w"]) for name, leaf in params.items()}
    sizes = {"num_selected_experts": 2, "num_experts": EXPERTS}
    return reference.mixture(x, weights, sizes, padding_mask)


LAYER_FORMS = [
    *({"kernels": name} for name in ("xla_cpu", "cpu")),
    *({"expert_dispatch": name} for name in ("dynamic", "static", "all")),
]


@pytest.mark.parametrize("form", LAYER_FORMS, ids=str)
def test_the_layer_is_the_sum_over_the_chosen_experts(inputs, form):
    params = layer_params("int8")
    layer = make_layer(GELU_BLOCK, execution=Execution(**form))
    y, _ = jax.jit(layer.apply)(params, *inputs)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, exact_layer(params, *inputs), rtol=0, atol=3e-6)
    assert np.all(np.asarray(y)[~inputs[1]] == 0)


def test_the_layer_takes_stacked_weights(inputs):
    """Slicing a layer first would copy all its experts to use two."""
    params = layer_params("int8", (LAYERS,))
    apply = jax.jit(make_layer(GELU_BLOCK).apply)
    for layer in range(LAYERS):
        router = {"router": {"w": params["router"]["w"]}}
        y, _ = apply(in_layer(params, jnp.int32(layer)), *inputs)
        own = of_layer({k: v for k, v in params.items() if "moe" in k}, layer) | router
        np.testing.assert_allclose(y, exact_layer(own, *inputs), rtol=0, atol=3e-6)


@pytest.mark.parametrize("mesh", [None, (2, 4)], ids=str)
def test_experts_go_by_size_only_within_one_sequence(inputs, mesh, monkeypatch):
    """There rounding depends on the other tokens: a prompt that is read alone is read faster."""
    monkeypatch.setattr(xla_cpu, "SMALL_EXPERT", 0)
    by_size = xla_cpu.by_size
    used = []

    def recorded(*arguments):
        used.append(True)
        return by_size(*arguments)

    monkeypatch.setattr(xla_cpu, "by_size", recorded)
    execution = Execution(mesh and make_mesh(mesh), kernels="xla_cpu")
    layer = make_layer(GELU_BLOCK, execution=execution)
    params = layer_params("int8")
    shards = mesh[0] if mesh else 1
    x, padding_mask = (a[:shards] for a in inputs)
    y, _ = jax.jit(layer.apply)(params, x, padding_mask)
    assert used
    np.testing.assert_allclose(y, exact_layer(params, x, padding_mask), rtol=0, atol=3e-6)
    used.clear()
    jax.eval_shape(layer.apply, params, *inputs)
    assert not used


def test_the_layer_initialises_one_set_of_parameters_an_expert(inputs):
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


@pytest.mark.parametrize("mesh", [None, (2, 4)], ids=str)
def test_an_expert_can_be_any_haiku_function(inputs, mesh):
    x, padding_mask = inputs
    rng = np.random.default_rng(8)
    shapes = {"hidden": (WIDTH, 5), "out": (5, WIDTH)}
    params = {
        f"moe/{name}": {
            "w": rng.standard_normal((EXPERTS, *shape)).astype(np.float32),
            "b": rng.standard_normal((EXPERTS, shape[1])).astype(np.float32),
        }
        for name, shape in shapes.items()
    } | {"router": layer_params("float32")["router"]}
    layer = make_layer(custom_expert, mesh=mesh and make_mesh(mesh))
    y, routing = jax.jit(layer.apply)(params, x, padding_mask)
    expected = np.zeros(x.shape)
    for where in np.ndindex(padding_mask.shape):
        if not padding_mask[where]:
            continue
        pairs = zip(
            routing["expert_gates"][where], np.asarray(routing["expert_index"][where]), strict=True
        )
        for gate, e in pairs:
            hidden, out = ({k: v[e] for k, v in params[f"moe/{n}"].items()} for n in shapes)
            middle = np.tanh(x[where] @ hidden["w"] + hidden["b"])
            expected[where] += float(gate) * (middle @ out["w"] + out["b"])
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)
    assert np.all(np.asarray(y)[~padding_mask] == 0)


@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_a_function_around_a_dense_block_equals_the_dense_block(inputs, kind):
    """The two paths through the layer take the same parameters and compute the same."""
    params = layer_params(kind, (LAYERS,))

    @jax.jit
    def both(params, layer):
        args = (in_layer(params, layer), *inputs)
        return [make_layer(fn).apply(*args)[0] for fn in (GELU_BLOCK, lambda x: GELU_BLOCK(x))]

    for layer in range(LAYERS):
        block, function = both(params, jnp.int32(layer))
        np.testing.assert_allclose(block, function, rtol=0, atol=3e-6)


@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("mesh", [(1, 8), (2, 4), (8, 1)], ids=str)
def test_the_layer_is_the_same_on_every_mesh(inputs, mesh, sharded):
    """Each data shard lays out its own tokens; the experts' halves are summed over `model`."""
    params = layer_params("int8", (LAYERS,))
    layer = make_layer(GELU_BLOCK, mesh=make_mesh(mesh), shard_activations=sharded)
    y, _ = jax.jit(layer.apply)(in_layer(params, jnp.int32(1)), *inputs)
    own = of_layer({k: v for k, v in params.items() if "moe" in k}, 1)
    expected = exact_layer(own | {"router": params["router"]}, *inputs)
    np.testing.assert_allclose(y, expected, rtol=0, atol=3e-6)
    assert y.sharding.shard_shape(y.shape)[2] == WIDTH // (mesh[1] if sharded else 1)


# ------------------------------------------------------------------------------------ the router


def route(x, padding_mask, w, chosen=2):
    apply = hk.without_apply_rng(
        hk.transform(lambda x, mask: Router(chosen)(x, mask, w.shape[1]))
    ).apply
    return RouterOutput(*map(np.asarray, apply({"router": {"w": w}}, x, padding_mask)))


def test_gates_are_the_largest_probabilities_and_are_not_renormalised(inputs):
    x, _ = inputs
    w = layer_params("float32")["router"]["w"]
    gates, index, probs = route(x, None, w)
    exact = reference.softmax(x.astype(np.float64) @ w)
    np.testing.assert_allclose(probs, exact, rtol=1e-5)
    order = np.argsort(-exact, axis=-1, kind="stable")[..., :2]
    assert np.array_equal(index, order)
    np.testing.assert_allclose(gates, np.take_along_axis(exact, order, axis=-1), rtol=1e-5)
    assert np.all(gates.sum(axis=-1) < 1)


def test_a_tie_goes_to_the_lower_expert():
    w = np.zeros((WIDTH, 4), np.float32)
    _, index, _ = route(np.ones((1, 1, WIDTH), np.float32), None, w)
    assert index.tolist() == [[[0, 1]]]


def test_a_masked_token_goes_to_no_expert_and_has_gate_zero(inputs):
    x, padding_mask = inputs
    w = layer_params("float32")["router"]["w"]
    gates, index, probs = route(x, padding_mask, w)
    assert np.all(index[~padding_mask] == EXPERTS) and np.all(gates[~padding_mask] == 0)
    free = route(x, None, w)
    assert np.array_equal(index[padding_mask], free.expert_index[padding_mask])
    assert np.array_equal(gates[padding_mask], free.gates[padding_mask])
    assert np.array_equal(probs, free.probs)


def test_the_router_is_float32_whatever_the_activations_are(inputs):
    """Rounded to bfloat16, weights or logits would choose other experts at every near-tie."""
    x = inputs[0].astype(BFLOAT16)
    w = layer_params("float32")["router"]["w"]
    gates, _, probs = route(x, None, w)
    assert gates.dtype == probs.dtype == np.float32
    exact = reference.softmax(x.astype(np.float64) @ w)
    np.testing.assert_allclose(probs, exact, rtol=1e-5)


def test_one_expert_is_a_gated_linear_unit():
    params = expert_weights((), "float32")
    x = np.random.default_rng(10).standard_normal((3, 2, WIDTH)).astype(np.float32)
    weights = (params[name]["w"].astype(np.float64) for name in ("linear", "linear_v", "linear_1"))
    np.testing.assert_allclose(expert(params, x), reference.expert(x, *weights), atol=3e-6, rtol=0)
