"""What is captured and changed inside the model, against the float64 reference doing the same."""

import dataclasses
import functools
import gc
import json
import signal
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
import reference
from grok1 import inspection
from grok1.execution import ONE_DEVICE, Execution
from grok1.inspection import CAPTURE_SITES, Captured, captured_shapes, nbytes
from grok1.serving import memory_budget
from grok1.serving.hooked import MOST_KEPT
from grok1.serving.steps import apply_model, new_memory
from model import LanguageModelConfig, Router, TransformerConfig, grok_1

SITES = tuple(site for site in CAPTURE_SITES if site != "embeddings")
STATIC = ("config", "how", "capture", "capture_layers", "hooks")


@functools.partial(jax.jit, static_argnames=STATIC)
def look(
    params,
    tokens,
    memory=None,
    *,
    config,
    how=ONE_DEVICE,
    capture=(),
    capture_layers=None,
    hooks=(),
):
    """Run a model; hooks: ((site, function), ...)."""
    options = {"capture": capture, "capture_layers": capture_layers, "hooks": dict(hooks)}
    return apply_model(config, how, params, tokens, memory, **options)


@functools.cache
def weights(name):
    """Return a golden model's fields and weights as the reference takes them."""
    fields = json.loads((golden.DIRECTORY / name / "config.json").read_text())
    return reference.load_weights(golden.DIRECTORY / name / "ckpt-0"), fields


def exact(name, tokens, memory=None, hooks=None):
    """Return the reference's Result, and per position [B, T] whether no expert was a near tie."""
    own, fields = weights(name)
    result = reference.run(own, fields, tokens, memory, hooks)
    chosen = fields["model"]["num_selected_experts"]
    ranked = np.sort(result.router_probs, axis=-1)[..., ::-1]
    gap = (1 - ranked[..., chosen] / ranked[..., chosen - 1]).min(axis=0)  # [B, T]
    sure = (np.minimum.accumulate(gap, axis=1) > 1e-3) & (np.asarray(tokens) > 0)
    return result, sure


def errors(got, wanted):
    """norm(got - wanted) / norm(wanted) over the last axis, zero where both are zero."""
    got = np.asarray(got, np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.where(got == wanted, 0, got - wanted)  # infinities too
    norm = np.linalg.norm(np.where(np.isfinite(wanted), wanted, 0), axis=-1)
    return np.linalg.norm(difference, axis=-1) / np.maximum(norm, 1e-30)


def assert_sites(captured, wanted, sure, most):
    """Each captured site is the reference's wherever `sure` [B, T] holds."""
    assert set(wanted) == {site for site, x in captured._asdict().items() if x is not None}
    for site, array in wanted.items():
        got = getattr(captured, site)
        assert got.shape == array.shape, site
        assert got.dtype == (jnp.int32 if site == "expert_index" else jnp.float32), site
        error = errors(got, array)
        if site == "attention_weights":
            error = error.max(axis=2)  # of all heads, [L, B, T]
        if site in ("queries", "keys", "values", "head_outputs"):
            error = error.max(axis=-1)
        assert error[..., sure].max() <= (0 if site == "expert_index" else most), site


def server_and_tokens(name, **options):
    return golden.runner(name, "float32", **options), golden.recorded(name).tokens


@pytest.mark.parametrize("name", golden.NAMES)
@pytest.mark.parametrize(
    ("mesh", "kernel"),
    [
        (None, False),
        pytest.param(None, True, marks=pytest.mark.slow),
        pytest.param((1, 8), False, marks=pytest.mark.slow),
        pytest.param((2, 4), False, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_all_sites_hold_what_the_reference_computes(name, mesh, kernel):
    server, tokens = server_and_tokens(name, mesh=mesh, kernel=kernel)
    tokens = np.concatenate([tokens, tokens[:1]])  # for a data axis of two
    got = look(server.params, tokens, **where(server), capture=CAPTURE_SITES)
    result, sure = exact(name, tokens)
    assert sure.mean() > 0.5
    assert_sites(got.captured, result.sites, sure, 1e-4)
    assert errors(got.logits, result.logits)[sure].max() <= 1e-4
    if mesh is not None:  # a device holds its own sequences and heads, as a runner counts on
        for site in inspection.HEAD_SITES:
            heads_axis = 2 if site == "attention_weights" else 3
            array = getattr(got.captured, site)
            own = list(array.shape)
            own[1] //= mesh[0]
            own[heads_axis] //= mesh[1]
            assert list(array.sharding.shard_shape(array.shape)) == own, site


def where(server):
    """Return the configuration of a runner, and how it reads prompts."""
    return {"config": server.config, "how": server.executions.prefill}


def read_and_draw(server, tokens, split, **options):
    """Read `split` tokens into a memory, then the others one by one -> what each call returns."""
    execution = server.executions.prefill
    memory = new_memory(config=server.config, batch=len(tokens), execution=execution)
    options |= where(server)
    outputs = [look(server.params, tokens[:, :split], memory, **options)]
    for place in range(split, tokens.shape[1]):
        memory = outputs[-1].model_state
        outputs.append(look(server.params, tokens[:, place : place + 1], memory, **options))
    return outputs


@pytest.mark.parametrize(
    ("mesh", "kernel"),
    [
        (None, False),
        *(pytest.param(*c, marks=pytest.mark.slow) for c in ((None, True), ((2, 4), 0))),
    ],
    ids=str,
)
def test_prefill_and_decode_capture_against_a_memory(mesh, kernel):
    server, tokens = server_and_tokens("three-layers", mesh=mesh, kernel=bool(kernel))
    tokens, split = tokens[:2, :20], 17
    memory, size = None, server.config.sequence_len
    for i, output in enumerate(read_and_draw(server, tokens, split, capture=CAPTURE_SITES)):
        part = tokens[:, :split] if i == 0 else tokens[:, split + i - 1 : split + i]
        result, _ = exact("three-layers", part, memory)
        whole, sure = exact("three-layers", tokens)
        sure = sure[:, :split] if i == 0 else sure[:, split + i - 1 : split + i]
        memory, wanted = result.memory, dict(result.sites)
        seen = wanted["attention_weights"]
        unseen = ((0, 0),) * 4 + ((0, size - seen.shape[-1]),)
        wanted["attention_weights"] = np.pad(seen, unseen)  # S is the memory's length
        assert sure.any()
        assert_sites(output.captured, wanted, sure, 1e-4)


def test_bfloat16_captures_float32_arrays_near_the_exact_ones():
    server = golden.runner("three-layers", "bfloat16")
    tokens = golden.recorded("three-layers").tokens[:, :16]
    got = look(server.params, tokens, config=server.config, capture=CAPTURE_SITES).captured
    result, sure = exact("three-layers", tokens)
    for site in ("embeddings", "attention_weights", "router_probs", "hidden_states"):
        assert getattr(got, site).dtype == jnp.float32
        error = errors(getattr(got, site), result.sites[site])
        first = error if site == "embeddings" else error[0]  # before errors choose other experts
        first = first.max(axis=1) if site == "attention_weights" else first
        assert 1e-5 < first[sure].max() < 0.05, site


# -------------------------------------------------------------------------------- what it costs

TINY = LanguageModelConfig(
    model=TransformerConfig(
        emb_size=16, key_size=4, num_q_heads=4, num_kv_heads=2, num_layers=3, num_experts=4,
        num_selected_experts=2,
    ),
    vocab_size=64,
    sequence_len=12,
    fprop_dtype=jnp.float32,
)  # fmt: skip
DENSE = dataclasses.replace(
    TINY, model=dataclasses.replace(TINY.model, num_experts=1, num_selected_experts=1)
)
TOKENS = np.random.default_rng(5).integers(1, 64, (2, 6)).astype(np.int32)


@functools.cache
def params():
    """Parameters so large that layers, experts and heads matter."""
    return jax.tree.map(lambda x: x * 1.5, TINY.init_params(1))


def test_what_is_not_asked_for_is_not_in_the_program():
    def program(**options):
        def call(params, tokens):
            return apply_model(TINY, ONE_DEVICE, params, tokens, **options)

        lowered = jax.jit(call).lower(params(), TOKENS)
        return lowered.as_text(), lowered.out_info

    plain, made = program()
    assert [x.shape for x in jax.tree.leaves(made)] == [(2, 6, 64)]  # the logits, and nothing else
    for options in ({"capture": ()}, {"capture": []}, {"hooks": {}}, {"capture_layers": (1,)}):
        assert program(**options) == (plain, made)
    assert program(capture=("router_probs",))[0] != plain
    assert program(hooks={"router_probs": lambda _, x: x * 2})[0] != plain


def test_layers_are_picked_in_the_order_asked_for():
    where = {"config": TINY, "capture": CAPTURE_SITES}
    every = look(params(), TOKENS, **where).captured
    for picked, wanted in (((2, 0), (2, 0)), ((-1,), (2,)), ((1,), (1,))):
        got = look(params(), TOKENS, **where, capture_layers=picked).captured
        assert np.array_equal(got.embeddings, every.embeddings)
        for site in SITES:
            assert np.array_equal(getattr(got, site), getattr(every, site)[jnp.array(wanted)]), site


def test_sizes_are_those_of_the_arrays():
    got = look(params(), TOKENS, config=TINY, capture=CAPTURE_SITES, capture_layers=(0, 2)).captured
    shapes = captured_shapes(TINY.model, CAPTURE_SITES, batch=2, steps=6, positions=6, layers=2)
    assert shapes == {site: x.shape for site, x in got._asdict().items()}
    assert nbytes(shapes) == sum(x.nbytes for x in jax.tree.leaves(got))
    weights_of_all = captured_shapes(
        grok_1().model, ["attention_weights"], batch=1, steps=1024, positions=8192
    )
    assert round(nbytes(weights_of_all) / 1e9) == 103


# ------------------------------------------------------------------------------------ hooks


def only_in(layer, change):
    """Return a hook, for jax and for the reference, that changes one layer."""
    return lambda at, array: jnp.where(at == layer, change(array), array)


HOOKS = {
    "an expert is forbidden": {"router_logits": lambda _, x: _with(x, (..., 5), -jnp.inf)},
    "an expert is forced in one layer": {
        "router_logits": only_in(1, lambda x: _with(x, (..., 3), 50.0))
    },
    "a head is ablated": {"head_outputs": only_in(0, lambda x: _with(x, (..., 2, slice(None)), 0))},
    "all heads attend evenly": {"attention_weights": lambda _, x: _even(x)},
    "attention does nothing": {"attention_output": lambda _, x: x * 0},
    "the second expert is left out": {"expert_gates": lambda _, x: _with(x, (..., 1), 0)},
    "probabilities are sharpened": {"router_probs": lambda _, x: x**2},
    "experts are swapped": {"expert_index": lambda _, x: jnp.where(x < 8, 7 - x, x)},
    "a layer is skipped": {
        "attention_output": only_in(1, lambda x: x * 0),
        "feed_forward_output": only_in(1, lambda x: x * 0),
    },
    "the stream is scaled": {"hidden_states": only_in(0, lambda x: x * 0.5)},
    "a head asks for nothing": {"queries": lambda _, x: _with(x, (..., 2, slice(None)), 0)},
    "keys are turned round": {"keys": only_in(1, lambda x: x[..., ::-1])},
    "values are swapped": {"values": lambda _, x: x[..., ::-1, :]},
    "embeddings are shifted": {"embeddings": lambda at, x: x + (at == -1) * x[..., ::-1]},
}  # fmt: skip


def _with(array, where, value):
    return jnp.asarray(array).at[where].set(value)


def _even(weights):
    """Spread attention [..., S] evenly over the keys that are seen."""
    seen = (weights > 0).astype(weights.dtype)
    return seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)


@pytest.mark.parametrize("what", HOOKS)
def test_what_a_hook_changes_is_what_the_reference_makes_of_the_same_change(what):
    server, tokens = server_and_tokens("three-layers")
    tokens, hooks = tokens[:, :12], HOOKS[what]
    capture = ("hidden_states", *(site for site in hooks if site != "hidden_states"))
    plain, _ = exact("three-layers", tokens)
    result, sure = exact("three-layers", tokens, hooks=hooks)
    where = {"config": server.config, "capture": capture, "hooks": tuple(hooks.items())}
    got = look(server.params, tokens, **where)
    assert sure.mean() > 0.3
    assert_sites(got.captured, {site: result.sites[site] for site in capture}, sure, 1e-4)
    assert errors(got.logits, result.logits)[sure].max() <= 1e-4
    assert errors(plain.logits, result.logits)[sure].max() > 1e-3  # it does change something


@pytest.mark.parametrize("mesh", [None, pytest.param((2, 4), marks=pytest.mark.slow)], ids=str)
def test_hooks_act_in_decoding_as_in_one_pass(mesh):
    server, tokens = server_and_tokens("three-layers", mesh=mesh)
    tokens = tokens[:2, :16]
    hooks = tuple(HOOKS["all heads attend evenly"].items())
    whole = look(server.params, tokens, **where(server), hooks=hooks).logits
    parts = [output.logits for output in read_and_draw(server, tokens, 13, hooks=hooks)]
    assert errors(np.concatenate(parts, axis=1), whole).max() < 1e-4


def test_a_run_patched_with_itself_is_the_same_run():
    got = look(params(), TOKENS, config=TINY, capture=CAPTURE_SITES)

    @jax.jit
    def patched(params, tokens, captured):
        def hook(array):
            return lambda at, x: array if array.ndim == x.ndim else array[at]

        hooks = {site: hook(x) for site, x in captured._asdict().items()}
        return apply_model(TINY, ONE_DEVICE, params, tokens, hooks=hooks).logits

    assert errors(patched(params(), TOKENS, got.captured), got.logits).max() <= 1e-6
    other = look(params(), TOKENS[::-1], config=TINY, capture=CAPTURE_SITES)
    again = patched(params(), TOKENS, other.captured)  # nothing is left of this run
    assert errors(again, other.logits).max() <= 1e-6


class Forbidding(Router):
    """A router without its first expert."""

    def logits(self, x, num_experts):
        return super().logits(x, num_experts).at[..., 0].set(-jnp.inf)


class Renormalising(Router):
    """A router whose chosen probabilities sum to one."""

    def choose(self, probs):
        gates, index = super().choose(probs)
        return gates / jnp.sum(gates, axis=-1, keepdims=True), index


def test_forbidding_an_expert_by_hook_is_minus_infinity_in_its_logit():
    hooks = (("router_logits", lambda _, x: x.at[..., 0].set(-jnp.inf)),)
    where = {"capture": ("router_probs", "expert_index")}
    hooked = look(params(), TOKENS, config=TINY, hooks=hooks, **where)
    subclass = look(params(), TOKENS, config=TINY, how=Execution(router=Forbidding), **where)
    assert np.array_equal(hooked.logits, subclass.logits)
    for output in (hooked, subclass):
        assert np.all(output.captured.router_probs[..., 0] == 0)
        assert np.all(output.captured.expert_index != 0)


def test_another_router_is_given_to_the_execution():
    how = Execution(router=Renormalising)
    got = look(params(), TOKENS, config=TINY, how=how, capture=("expert_gates",)).captured
    np.testing.assert_allclose(np.sum(got.expert_gates, axis=-1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="router: expected a subclass of Router, or None, got 'x'"):
        Execution(router="x")


def test_gradients_flow_through_hooks():
    """The slope of the logits' sum along a shift of the stream, against a finite difference."""
    how = Execution(expert_dispatch="static")
    direction = np.random.default_rng(2).standard_normal((2, 6, 16)).astype(np.float32)
    own = params()

    @jax.jit
    def total(size):
        shift = lambda at, x: x + jnp.where(at == 0, size, 0) * direction  # noqa: E731
        output = apply_model(TINY, how, own, TOKENS, hooks={"hidden_states": shift})
        return jnp.sum(jnp.sin(output.logits))

    slope = jax.jit(jax.grad(total))(0.0)
    step = 1e-3  # within which no token takes another expert
    difference = float(total(step) - total(-step)) / (2 * step)
    assert float(slope) == pytest.approx(difference, rel=0.01)
    assert abs(slope) > 0.01


# ----------------------------------------------------------------------------------- mistakes


def given(array):
    return lambda _, __: array


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture": ("scores",)}, r"capture: expected names from \('embeddings', .*got 'scores'"),
        ({"capture": "embeddings"}, "capture: expected a collection of .*got 'embeddings'"),
        ({"hooks": {"x": abs}}, r"hooks: expected names from \('embeddings', .*got 'x'"),
        ({"capture": None}, "capture: expected a collection of sites, .*got None"),
        ({"hooks": abs}, r"hooks: expected a dict \{site: function\}, got <built-in function abs>"),
        ({"hooks": "head_outputs"}, "hooks: expected a dict .*, got 'head_outputs'"),
        ({"hooks": ["head_outputs"]}, r"hooks: expected a dict .*, got \['head_outputs'\]"),
        ({"hooks": {"embeddings": lambda x: x}}, r"'embeddings' failed \(.*positional arg.*pure"),
        (
            {"hooks": {"hidden_states": lambda layer, x: 2 * x if layer == 1 else x}},
            r"'hidden_states' failed \(\w+: Attempted boolean .*jnp.where\(layer ==.* of if",
        ),
        ({"hooks": {"embeddings": lambda _, x: np.sin(x)}}, "'embeddings' failed.*jax.numpy"),
        ({"hooks": {"embeddings": lambda _, x: x[x > 0]}}, "'embeddings' failed.*jnp.where"),
        (
            {"hooks": {"router_probs": 3}},
            "hooks: 'router_probs' must be a hashable function .*got 3",
        ),
        (
            {"hooks": {"router_probs": given(np.zeros((2, 6), np.float32))}},
            r"'router_probs' must return float32 \[2, 6, 4\], as it was .*, got float32 \[2, 6\]",
        ),
        (
            {"hooks": {"expert_index": given(np.zeros((2, 6, 2), np.float32))}},
            r"'expert_index' must return int32 \[2, 6, 2\].*got float32 \[2, 6, 2\]",
        ),
        ({"hooks": {"embeddings": given(None)}}, "'embeddings' must return .*got NoneType"),
        ({"capture": (), "capture_layers": (9,)}, r"integers from -3 to 2, .*, got \(9,\)"),
        ({"capture_layers": (3,)}, r"capture_layers: expected one or more integers .*, got \(3,\)"),
        ({"capture_layers": (-4,)}, r"from -3 to 2, each layer once, got \(-4,\)"),
        ({"capture_layers": (1.5,)}, r"each layer once, got \(1.5,\)"),
        ({"capture_layers": (1, -2)}, r"each layer once, got \(1, -2\)"),
        ({"capture_layers": ()}, r"expected one or more integers .* got \(\)"),
        ({"capture_layers": 2}, "each layer once, got 2"),
        ({"capture_layers": "0"}, "each layer once, got '0'"),
        ({"last_hid_only": True}, "capture: expected none with last_hid_only"),
    ],
)
def test_what_cannot_be_looked_at_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        options = {"capture": ("hidden_states",), **options}
        jax.eval_shape(lambda p: apply_model(TINY, ONE_DEVICE, p, TOKENS, **options), params())


def test_a_dense_model_has_no_router_to_look_at():
    shapes = DENSE.param_shapes()
    run = lambda name: jax.eval_shape(  # noqa: E731
        lambda p: apply_model(DENSE, ONE_DEVICE, p, TOKENS, capture=(name,)).captured, shapes
    )
    assert run("feed_forward_output").feed_forward_output.shape == (3, 2, 6, 16)
    for name in inspection.ROUTER_SITES:
        with pytest.raises(ValueError, match=f"capture: expected names .*got '{name}'"):
            run(name)


# ------------------------------------------------------------------------------- a runner's prompt


@pytest.mark.parametrize("mesh", [None, pytest.param((2, 4), marks=pytest.mark.slow)], ids=str)
def test_a_runner_inspects_one_prompt(mesh):
    server, tokens = server_and_tokens("three-layers", mesh=mesh)
    prompt = [int(token) for token in tokens[0, :9]]
    found = server.inspect(prompt, CAPTURE_SITES, capture_layers=(2, 0))
    result, sure = exact("three-layers", [prompt])
    assert found.token_ids.tolist() == prompt and found.pieces is None
    wanted = {
        site: x if site == "embeddings" else x[np.array([2, 0])] for site, x in result.sites.items()
    }
    batched = (
        x[None] if site == "embeddings" else x[:, None]
        for site, x in found.captured._asdict().items()
    )
    assert sure.any()
    assert_sites(Captured(*batched), wanted, sure, 1e-4)
    assert errors(found.logits, result.logits[0])[sure[0]].max() <= 1e-4
    hooked = server.inspect(prompt, (), hooks=HOOKS["attention does nothing"])
    assert errors(hooked.logits, result.logits[0]).max() > 1e-3
    assert all(x is None for x in hooked.captured)
    shapes = []  # that a hook sees: the prompt's own tokens, and no pads behind them

    def look(_, x):
        shapes.append(x.shape)
        return x

    sites = (site for site in ("embeddings",))  # an iterator is read once
    own = server.inspect(prompt, sites, hooks={"embeddings": look}).captured.embeddings.shape
    assert own[0] == 9 and {*shapes} == {(1 if mesh is None else mesh[0], *own)}


def test_a_bound_method_is_a_new_hook_each_time():
    """Two of one object are equal, and its attributes may have changed in between."""

    class Ablate:
        expert = 0

        def hook(self, _, x):
            return x.at[..., self.expert].set(-jnp.inf)

    runner, ablate = golden.runner("three-layers"), Ablate()
    found = []
    for expert in (0, 1):
        ablate.expert = expert
        captured = runner.inspect([5, 6, 7], hooks={"router_logits": ablate.hook}).captured
        assert expert not in captured.expert_index
        found.append(captured.router_probs)
    assert not np.array_equal(*found)


def test_programs_of_old_hooks_are_forgotten():
    """One that is kept takes megabytes."""
    runner, alive = golden.runner("three-layers"), []
    for shift in range(MOST_KEPT + 3):
        hook = lambda _, x, shift=shift: x + shift  # noqa: E731
        runner.inspect([5], (), hooks={"embeddings": hook})
        alive.append(weakref.ref(hook))
        del hook
    gc.collect()
    assert [ref() is None for ref in alive] == [True] * 3 + [False] * MOST_KEPT


def test_an_interrupt_waits_for_a_trace():
    """jax and haiku may be left with a part of it, and raise something else."""
    server, later = golden.runner("three-layers"), []

    def press(_, x):
        signal.raise_signal(signal.SIGINT)
        later.append("went on")
        return x

    with pytest.raises(KeyboardInterrupt):
        server.inspect([5, 6], (), hooks={"embeddings": press})
    assert later


def test_a_runner_refuses_what_it_cannot_inspect(monkeypatch):
    server = golden.runner("three-layers")
    for arguments, message in (
        (([[]],), "the prompt has no tokens"),
        (([5] * 1000,), "at most the context of"),
        (([5], ("x",)), "capture: expected names"),
        (("text",), "tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            server.inspect(*arguments)
    with pytest.raises(ValueError, match="capture_layers: expected .* from -3 to 2"):
        server.inspect([5], capture_layers=(7,))

    class Unhashable:
        __hash__ = None
        __call__ = given(None)

    with pytest.raises(ValueError, match="hooks: 'embeddings' must be a hashable function .*got"):
        server.inspect([5], hooks={"embeddings": Unhashable()})
    monkeypatch.setattr(memory_budget, "available_memory", lambda: 2**20)
    server.inspect([5] * 10, ("router_probs",))
    with pytest.raises(ValueError, match=r"takes \d\.\d GiB, and 0\.0 GiB are free; capture fewer"):
        server.inspect([5] * 48, CAPTURE_SITES)
