"""Captured and changed activations equal those of the float64 reference doing the same."""

import dataclasses
import functools
import gc
import math
import signal
import weakref

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
import reference
import small
from grok1 import inspection
from grok1.execution import ONE_DEVICE
from grok1.inspection import CAPTURE_SITES, Captured, captured_shapes, nbytes
from grok1.serving import hooked, inspecting, memory_budget
from grok1.serving.steps import apply_model, inspect_step, new_memory
from model import LanguageModelConfig, Router, TransformerConfig, grok_1

NAME = "three-layers"
STATIC = ("config", "how", "capture", "capture_layers", "hooks")


@functools.partial(jax.jit, static_argnames=STATIC)
def look(
    params,
    tokens,
    memory=None,
    on=None,
    *,
    config,
    how=ONE_DEVICE,
    capture=(),
    capture_layers=None,
    hooks=(),
):
    """Run a model; hooks: ((site, function (layer, array, on)), ...)."""
    options = {"capture": capture, "capture_layers": capture_layers}
    bound = {site: lambda at, x, hook=hook: hook(at, x, on) for site, hook in hooks}
    return apply_model(config, how, params, tokens, memory, hooks=bound, **options)


# ------------------------------------------------------------------------------------ hooks


def only_in(layer, change):
    """Return a change, for jax and for the reference, of one layer."""
    return lambda at, array: jnp.where(at == layer, change(array), array)


CHANGES = {
    "an expert is forbidden": {"router_logits": lambda _, x: _with(x, (..., 5), -jnp.inf)},
    "an expert is forced in one layer": {
        "router_logits": only_in(1, lambda x: _with(x, (..., 3), 50.0))
    },
    "a head is ablated": {"head_outputs": only_in(0, lambda x: _with(x, (..., 2, slice(None)), 0))},
    "attention of one layer is even": {"attention_weights": only_in(1, lambda x: _even(x))},
    "attention adds nothing": {"attention_output": lambda _, x: x * 0},
    "the second expert is left out": {"expert_gates": lambda _, x: _with(x, (..., 1), 0)},
    "probabilities are squared": {"router_probs": lambda _, x: x**2},
    "experts are swapped": {"expert_index": lambda _, x: jnp.where(x < 8, 7 - x, x)},
    "a layer is skipped": {
        "attention_output": only_in(1, lambda x: x * 0),
        "feed_forward_output": only_in(1, lambda x: x * 0),
    },
    "the residual stream is scaled": {"hidden_states": only_in(0, lambda x: x * 0.5)},
    "the queries of a head are zero": {
        "queries": lambda _, x: _with(x, (..., 2, slice(None)), 0)
    },
    "keys are reversed": {"keys": only_in(1, lambda x: x[..., ::-1])},
    "values are swapped": {"values": lambda _, x: x[..., ::-1, :]},
    "embeddings are shifted": {"embeddings": lambda at, x: x + (at == -1) * x[..., ::-1]},
}  # fmt: skip


def _with(array, where, value):
    return jnp.asarray(array).at[where].set(value)


def _even(weights):
    """Spread attention [..., S] evenly over the keys that are seen."""
    seen = (weights > 0).astype(weights.dtype)
    return seen / jnp.maximum(seen.sum(-1, keepdims=True), 1)


def switched(site):
    """Return a hook that makes the changes of a site whose switch in `on` is true.

    One compiled program thus serves all of CHANGES.
    """

    def hook(layer, array, on):
        for number, changes in enumerate(CHANGES.values()):
            if site in changes:
                array = jnp.where(on[number], changes[site](layer, array), array)
        return array

    return hook


HOOKS = {site: switched(site) for site in CAPTURE_SITES}


def switches(change=None):
    """Return `on` for one of CHANGES, or for none."""
    return np.array([name == change for name in CHANGES])


# ------------------------------------------------------------------------- against the reference


def golden_tokens():
    """Return the golden tokens, int32 [4, 48]: four, for a data axis of two."""
    tokens = golden.recorded(NAME).tokens
    return np.concatenate([tokens, tokens[:1]])


@functools.cache
def exact(change=None):
    """Return the reference's Result, and per position [B, T] whether no expert was a near tie."""
    weights, fields = golden.reference_model(NAME)
    result = reference.run(weights, fields, golden_tokens(), None, HOOKS, (switches(change),))
    chosen = fields["model"]["num_selected_experts"]
    ranked = np.sort(result.router_probs, axis=-1)[..., ::-1]
    gap = (1 - ranked[..., chosen] / ranked[..., chosen - 1]).min(axis=0)  # [B, T]
    sure = (np.minimum.accumulate(gap, axis=1) > 1e-3) & (golden_tokens() > 0)
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


def part(sites, start, end, keys):
    """Return the sites at positions start ... end, with attention weights for `keys` keys."""
    found = {}
    for site, x in sites.items():
        if site == "attention_weights":
            x = x[..., start:end, :end]
            found[site] = np.pad(x, (*[(0, 0)] * 4, (0, keys - end)))
        else:
            found[site] = x[:, start:end] if site == "embeddings" else x[:, :, start:end]
    return found


def where(server):
    """Return the configuration of a runner, and how it reads prompts."""
    return {"config": server.config, "how": server.executions.prefill}


@pytest.mark.parametrize(
    ("mesh", "kernel"),
    [
        (None, False),
        pytest.param(None, True, marks=pytest.mark.slow),
        pytest.param((2, 4), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_captured_arrays_equal_the_reference(mesh, kernel):
    server = golden.runner(NAME, mesh=mesh, kernel=kernel)
    got = look(server.params, golden_tokens(), **where(server), capture=CAPTURE_SITES)
    result, sure = exact()
    assert sure.mean() > 0.5
    assert_sites(got.captured, result.sites, sure, 1e-4)
    assert errors(got.logits, result.logits)[sure].max() <= 1e-4
    if mesh is not None:  # a device holds its own sequences and heads, as a runner assumes
        for site in inspection.HEAD_SITES:
            heads_axis = 2 if site == "attention_weights" else 3
            array = getattr(got.captured, site)
            own = list(array.shape)
            own[1] //= mesh[0]
            own[heads_axis] //= mesh[1]
            assert list(array.sharding.shard_shape(array.shape)) == own, site


@pytest.mark.parametrize(
    ("mesh", "kernel"),
    [(None, False), pytest.param((2, 4), True, marks=pytest.mark.slow)],
    ids=str,
)
def test_prefill_and_decode_with_hook_equal_reference(mesh, kernel):
    server, change = golden.runner(NAME, mesh=mesh, kernel=kernel), "attention of one layer is even"
    site = "attention_weights"
    options = {"capture": CAPTURE_SITES, "hooks": ((site, HOOKS[site]),), **where(server)}
    tokens, size = golden_tokens(), server.config.sequence_len
    result, sure = exact(change)
    execution = server.executions.prefill
    memory = new_memory(config=server.config, batch=len(tokens), execution=execution)
    for start, end in ((0, 20), (20, 21), (21, 22)):
        output = look(server.params, tokens[:, start:end], memory, switches(change), **options)
        memory = output.model_state
        assert sure[:, start:end].any()
        wanted = part(result.sites, start, end, size)
        assert_sites(output.captured, wanted, sure[:, start:end], 1e-4)


def test_hooks_equal_the_same_change_of_the_reference():
    server, plain = golden.runner(NAME), exact()[0]
    for change, sites in CHANGES.items():
        # Without a hook of attention_weights, attention is computed in another way.
        attention = "attention_weights" in sites
        hooks = [site for site in CAPTURE_SITES if attention or site != "attention_weights"]
        got = look(
            server.params, golden_tokens(), None, switches(change),
            config=server.config, capture=tuple(hooks),
            hooks=tuple((site, HOOKS[site]) for site in hooks),
        )  # fmt: skip
        result, sure = exact(change)
        assert sure.mean() > 0.3, change
        assert_sites(got.captured, {site: result.sites[site] for site in hooks}, sure, 1e-4)
        assert errors(got.logits, result.logits)[sure].max() <= 1e-4, change
        assert errors(plain.logits, result.logits)[sure].max() > 1e-3, change  # it has an effect


def test_bfloat16_captures_are_float32_near_reference():
    server = golden.runner(NAME, "bfloat16")
    got = look(server.params, golden_tokens(), config=server.config, capture=CAPTURE_SITES).captured
    result, sure = exact()
    for site in ("embeddings", "attention_weights", "router_probs", "hidden_states"):
        assert getattr(got, site).dtype == jnp.float32
        error = errors(getattr(got, site), result.sites[site])
        first = error if site == "embeddings" else error[0]  # before errors choose other experts
        first = first.max(axis=1) if site == "attention_weights" else first
        assert 1e-5 < first[sure].max() < 0.05, site


# ------------------------------------------------------------------------------- sizes and routers

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
    """Return parameters so large that layers, experts and heads matter."""
    return jax.tree.map(lambda x: x * 1.5, TINY.init_params(1))


def test_captured_shapes_and_nbytes_match_the_arrays():
    how = {"config": TINY, "capture": CAPTURE_SITES, "capture_layers": (0, 2)}
    got = jax.eval_shape(functools.partial(look, **how), params(), TOKENS).captured
    shapes = captured_shapes(TINY.model, CAPTURE_SITES, batch=2, steps=6, positions=6, layers=2)
    assert shapes == {site: x.shape for site, x in got._asdict().items()}
    sizes = (math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(got))
    assert nbytes(shapes) == sum(sizes)
    weights_of_all = captured_shapes(
        grok_1().model, ["attention_weights"], batch=1, steps=1024, positions=8192
    )
    assert round(nbytes(weights_of_all) / 1e9) == 103


class OtherRouter(Router):
    """A router that never chooses expert 0 and whose gates sum to one."""

    def logits(self, x, num_experts):
        return super().logits(x, num_experts).at[..., 0].set(-jnp.inf)

    def choose(self, probs):
        gates, index = super().choose(probs)
        return gates / jnp.sum(gates, axis=-1, keepdims=True), index


def test_router_subclass_has_its_own_logits_and_choice():
    x, params = small.normal(2, 6, 16), {"router": {"w": small.normal(16, 4, seed=1)}}
    run = hk.without_apply_rng(hk.transform(lambda x: OtherRouter(2)(x, None, 4)))
    gates, index, probs = run.apply(params, x)
    assert np.all(probs[..., 0] == 0) and np.all(index != 0)
    np.testing.assert_allclose(np.sum(gates, axis=-1), 1, atol=1e-6)


# --------------------------------------------------------------------------------- invalid options


def given(array):
    """Return a hook that returns this array."""
    return lambda _, __: array


def same(_, x):
    """Return the array unchanged."""
    return x


def trace(**options):
    """Trace a tiny model with these options."""
    jax.eval_shape(lambda p: apply_model(TINY, ONE_DEVICE, p, TOKENS, **options), params())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture": ("scores",)}, r"capture: expected names from \('embeddings', .*got 'scores'"),
        ({"capture": "embeddings"}, "capture: expected a collection of .*got 'embeddings'"),
        ({"capture": None}, "capture: expected a collection of sites, .*got None"),
        ({"last_hid_only": True}, "capture: expected none with last_hid_only"),
        ({"capture": (), "capture_layers": (9,)}, r"integers from -3 to 2, .*, got \(9,\)"),
        ({"capture_layers": (3,)}, r"capture_layers: expected one or more integers .*, got \(3,\)"),
        ({"capture_layers": (-4,)}, r"from -3 to 2, each layer once, got \(-4,\)"),
        ({"capture_layers": (1.5,)}, r"each layer once, got \(1.5,\)"),
        ({"capture_layers": (1, -2)}, r"each layer once, got \(1, -2\)"),
        ({"capture_layers": ()}, r"expected one or more integers .* got \(\)"),
        ({"capture_layers": 2}, "each layer once, got 2"),
        ({"capture_layers": "0"}, "each layer once, got '0'"),
    ],
)
def test_invalid_captures_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        trace(**{"capture": ("hidden_states",), **options})


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (["head_outputs"], r"expected a dict \{site: function\}, got \['head_outputs'\]"),
        ({"x": abs}, r"expected names from \('embeddings', .*got 'x'"),
        ({("scores", 0): same}, "expected names from .*, got 'scores'"),
        ({("keys", 0, 1): same}, r"expected names from .*, got \('keys', 0, 1\)"),
        ({("keys", 3): same}, r"\('keys', 3\): expected .* integers from -3 to 2, .* got \[3\]"),
        ({("keys", "a"): same}, r"\('keys', 'a'\): expected .* integers from -3 to 2"),
        ({("embeddings", 0): same}, r"'embeddings' is in no layer, got \('embeddings', 0\)"),
        ({("keys", -1): same, ("keys", 2): same}, r"\('keys', 2\) is given twice, as 2 is"),
        ({"keys": 3}, "'keys' must be a hashable function .*got 3"),
        ({"keys": lambda x: x}, r"the function of 'keys' failed \(.*positional arg.*pure function"),
        (
            {"keys": lambda at, x: x if at == 1 else 0},
            r".* failed \(.*: Attempted bool.* of if",
        ),
        ({"keys": lambda _, x: np.sin(x)}, r".* failed \(.*use jax.numpy"),
        ({"keys": lambda _, x: x[x > 0]}, r".* failed \(.*jnp.where"),
        ({"keys": lambda _, x: {"b": x}["a"]}, r".* failed \(KeyError: 'a'\)"),
        ({"keys": given(None)}, "'keys' must return .*got NoneType"),
        (
            {"router_probs": given(np.zeros((2, 6), np.float32))},
            r"'router_probs' must return float32 \[2, 6, 4\], as it was .*, got float32 \[2, 6\]",
        ),
        (
            {"expert_index": given(np.zeros((2, 6, 2), np.float32))},
            r"'expert_index' must return int32 \[2, 6, 2\].*got float32 \[2, 6, 2\]",
        ),
    ],
)
def test_invalid_hooks_are_refused(hooks, message):
    with pytest.raises(ValueError, match=f"^hooks: {message}"):
        trace(hooks=hooks)


def test_a_dense_model_has_no_router_sites():
    shapes = DENSE.param_shapes()
    run = lambda name: jax.eval_shape(  # noqa: E731
        lambda p: apply_model(DENSE, ONE_DEVICE, p, TOKENS, capture=(name,)).captured, shapes
    )
    assert run("feed_forward_output").feed_forward_output.shape == (3, 2, 6, 16)
    for name in inspection.ROUTER_SITES:
        with pytest.raises(ValueError, match=f"capture: expected names .*got '{name}'"):
            run(name)


# -------------------------------------------------------------------------------- runner.inspect


def test_inspect_returns_the_reference_of_one_prompt():
    server, length = golden.runner(NAME), 9
    prompt = golden_tokens()[0, :length].tolist()
    found = server.inspect(prompt, iter(CAPTURE_SITES), capture_layers=(-1, 0))
    result, sure = exact()
    sure = sure[:1, :length]
    assert found.token_ids.tolist() == prompt and found.pieces is None
    wanted, batched = {}, {}
    for site, x in part(result.sites, 0, length, length).items():
        own = getattr(found.captured, site)
        outside = site == "embeddings"
        wanted[site] = x[:1] if outside else x[[2, 0], :1]
        batched[site] = own[None] if outside else own[:, None]
    assert sure.any()
    assert_sites(Captured(**batched), wanted, sure, 1e-4)
    assert errors(found.logits, result.logits[0, :length])[sure[0]].max() <= 1e-4


def test_a_bound_method_is_a_new_hook_each_time():
    """Two of one object are equal, and its attributes may have changed in between."""

    class Scale:
        def hook(self, _, x):
            return x

    scale = Scale()
    first, second = (hooked.as_hooks({"keys": scale.hook}) for _ in range(2))
    step = hooked.with_hooks(inspect_step, first)
    assert hooked.with_hooks(inspect_step, second) is not step
    again = hooked.as_hooks({"keys": first[0][1].hook})
    assert hooked.with_hooks(inspect_step, again) is step


def test_programs_of_old_hooks_are_freed():
    """Those of a model take megabytes each."""

    @jax.jit
    def step(x, *, hooks=()):
        return hooked.bind(hooks, ())["keys"](0, x)

    alive = []
    for shift in range(hooked.MOST_KEPT + 3):
        hook = lambda _, x, shift=shift: x + shift  # noqa: E731
        assert hooked.with_hooks(step, hooked.as_hooks({"keys": hook}))(1) == 1 + shift
        alive.append(weakref.ref(hook))
        del hook
    gc.collect()
    assert [ref() is None for ref in alive] == [True] * 3 + [False] * hooked.MOST_KEPT
    hook = lambda _, x: x + 1  # noqa: E731
    golden.runner(NAME).inspect([5], (), hooks={"embeddings": hook})
    last = weakref.ref(hook)
    del hook
    hooked._with_hooks.cache_clear()
    gc.collect()
    assert last() is None


def test_interrupt_of_inspect_is_raised_after_step(monkeypatch):
    """While tracing, jax and haiku may be left in a broken state, and raise something else."""
    later = []

    def step(*_, **__):
        signal.raise_signal(signal.SIGINT)
        later.append("traced on")
        return None, Captured()

    monkeypatch.setattr(inspecting, "with_hooks", lambda *_: step)
    with pytest.raises(KeyboardInterrupt):
        golden.runner(NAME).inspect([5, 6], ())
    assert later


def test_inspect_refuses_invalid_arguments(monkeypatch):
    class Unhashable:
        __hash__ = None
        __call__ = given(None)

    server = golden.runner(NAME)
    for arguments, options, message in (
        (([[]],), {}, "the prompt has no tokens"),
        (([5] * 1000,), {}, "at most the context of"),
        (([5], ("x",)), {}, "capture: expected names"),
        (("text",), {}, "tokenizer"),
        (([5],), {"capture_layers": (7,)}, "capture_layers: expected .* from -3 to 2"),
        (([5],), {"hooks": {"keys": Unhashable()}}, "hooks: 'keys' must be a hashable function"),
    ):
        with pytest.raises(ValueError, match=message):
            server.inspect(*arguments, **options)
    monkeypatch.setattr(memory_budget, "available_memory", lambda: 2**20)
    server.inspect([5] * 10, CAPTURE_SITES, capture_layers=(-1, 0))
    with pytest.raises(ValueError, match=r"takes \d\.\d GiB, and 0\.0 GiB are free; capture fewer"):
        server.inspect([5] * 48, CAPTURE_SITES)
