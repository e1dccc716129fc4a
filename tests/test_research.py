"""What a researcher does with a loaded model: steering, sweeps, patching, gradients."""

from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from grok1.execution import Execution
from grok1.inspection import CAPTURE_SITES, positions
from grok1.serving.steps import apply_model
from model import Router
from runner import InferenceRunner, load_model

PROMPT, OTHER = [5, 6, 7, 8, 9], [5, 60, 7, 80, 9]
INSTEAD = r"use server.model\(differentiable=True\)"
MESHES = [None, pytest.param((2, 4), marks=pytest.mark.slow)]


def add(_: Any, x: jax.Array, direction: jax.Array) -> jax.Array:
    return x + direction


def direction(server: InferenceRunner) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal(server.config.model.emb_size).astype(np.float32)


# ------------------------------------------------------------------------------------------ hooks


def test_a_hook_of_one_layer_leaves_the_others_as_they_are() -> None:
    server = golden.runner("three-layers")
    capture = ("attention_output",)

    def zero(_: Any, x: jax.Array) -> jax.Array:
        return x * 0

    for layer in (1, -2):
        hooks = {("attention_output", layer): zero}
        one = server.inspect(PROMPT, capture, hooks=hooks)
        assert [bool(np.any(x)) for x in one.captured.attention_output] == [True, False, True]
    where = {"attention_output": lambda at, x: jnp.where(at == 1, 0, x)}
    np.testing.assert_array_equal(one.logits, server.inspect(PROMPT, (), hooks=where).logits)
    both = {("attention_output", 0): zero, **hooks, ("attention_output", 2): zero}
    found = server.inspect(PROMPT, capture, hooks=both).captured.attention_output
    assert not np.any(found)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (("hidden_states", 3), "expected one or more integers from -3 to 2, .* got .3."),
        (("hidden_states", "a"), "expected one or more integers from -3 to 2"),
        (("embeddings", 0), "'embeddings' is in no layer, got .'embeddings', 0."),
        (("scores", 0), "expected names from .*, got 'scores'"),
        (("hidden_states", 0, 1), "expected names from .*, got .'hidden_states', 0, 1."),
    ],
)
def test_a_hook_of_no_layer_is_refused(key: Any, message: str) -> None:
    server = golden.runner("three-layers")
    for use in (server.inspect, server.generate):
        with pytest.raises(ValueError, match=f"hooks: .*{message}"):
            use(PROMPT, hooks={key: add})


def test_a_layer_is_given_once() -> None:
    hooks = {("hidden_states", -1): add, ("hidden_states", 2): add}
    with pytest.raises(ValueError, match="hooks: .'hidden_states', 2. is given twice"):
        golden.runner("three-layers").inspect(PROMPT, hooks=hooks)


def test_hooks_get_arguments_without_compiling_anew() -> None:
    server, traces = golden.runner("three-layers"), []

    def shift(layer: jax.Array, x: jax.Array, size: jax.Array, only: int) -> jax.Array:
        traces.append(layer)
        return x + jnp.where(layer == only, size, 0)

    found = [
        server.inspect(PROMPT, (), hooks={"hidden_states": shift}, hook_args=(size, only)).logits
        for size in (0.0, 0.5)
        for only in range(3)
    ]
    traced = len(traces)
    assert traced <= 2  # of one compilation
    own = {"hidden_states": lambda at, x: x + jnp.where(at == 1, 0.5, 0)}
    np.testing.assert_allclose(found[4], server.inspect(PROMPT, (), hooks=own).logits, atol=1e-5)
    assert len({x.tobytes() for x in found}) == 4  # the shift of zero three times
    server.generate(PROMPT, max_len=4, hooks={"hidden_states": shift}, hook_args=(0.5, 1))
    generating = len(traces)
    server.generate(PROMPT, max_len=4, hooks={"hidden_states": shift}, hook_args=(0.1, 2))
    assert len(traces) == generating


def test_numbers_of_any_kind_are_one_type() -> None:
    """A float of Python's, and those of NumPy and jax, compiled anew each."""
    server, traces = golden.runner("three-layers"), []

    def scale(_: Any, x: jax.Array, size: jax.Array) -> jax.Array:
        traces.append(size)
        return x * size

    for size in (0.5, np.float64(0.5), np.float32(0.5), jnp.float32(0.5)):
        server.inspect(PROMPT, (), hooks={"embeddings": scale}, hook_args=(size,))
    assert len(traces) == 1


@pytest.mark.parametrize("arguments", [3, {"size": 3}, ("a",), (abs,)], ids=str)
def test_arguments_of_hooks_are_arrays(arguments: Any) -> None:
    server = golden.runner("three-layers")
    for use in (server.inspect, server.generate):
        with pytest.raises(ValueError, match="hook_args: expected (a tuple or list of a|a)rrays"):
            use(PROMPT, hooks={"hidden_states": add}, hook_args=arguments)


def at_position(_: Any, x: jax.Array, place: jax.Array) -> jax.Array:
    return jnp.where(positions() == place, 2 * x, x)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_hooks_know_positions_in_every_chunk(mesh: tuple[int, int] | None, kernel: bool) -> None:
    """Read in chunks, padded, in a batch, or as it is generated: one token is changed."""
    server = golden.runner("three-layers", mesh=mesh, kernel=kernel)
    text = [*range(3, 3 + server.pad_sizes[-1] + 5)]
    by_hand = {("hidden_states", 0): lambda _, x, place: x.at[:, place].multiply(2)}
    for place in (1, len(text) - 2):
        hooked: Any = {"hooks": {("hidden_states", 0): at_position}, "hook_args": (place,)}
        expected = server.inspect(text, (), hooks=by_hand, hook_args=(place,)).logits
        for found in (
            server.inspect(text, (), **hooked).logits,
            server.logits(text, **hooked)[0],
            server.logits([text, text], **hooked)[1],
        ):
            np.testing.assert_allclose(found, expected, atol=1e-4)
        assert not np.allclose(server.logits(text)[0], expected, atol=1e-2)
    answer = server.generate(text, temperature=0, max_len=3, ignore_eos=True, **hooked)
    whole = [*text, *answer.token_ids]
    again = server.logits(whole[:-1], **hooked)[0, len(text) - 1 :]
    assert answer.token_ids == again.argmax(-1).tolist()


def test_positions_of_pads_are_below_zero() -> None:
    server, pad = golden.runner("three-layers"), golden.runner("three-layers").config.pad_token
    found = server.inspect([5, pad, 6], ("embeddings",), hooks={
        "embeddings": lambda _, x: x * 0 + positions()
    })  # fmt: skip
    assert found.captured.embeddings[:, 0].tolist() == [0, -1, 2]
    with pytest.raises(RuntimeError, match="expected to be called by a hook"):
        positions()


def test_positions_have_the_axes_of_each_site() -> None:
    """As [B, T, 1] they met the heads of [B, T, N, H], of which there may be T."""
    server = golden.runner("three-layers", slots=1)
    sites = [site for site in CAPTURE_SITES if site not in ("expert_index", "embeddings")]
    before = server.inspect(PROMPT, sites).captured
    for site in sites:
        hooks = {(site, 0): lambda _, x: jnp.where(positions() == 3, 0, x)}
        after = server.inspect(PROMPT, sites, hooks=hooks).captured
        own, other = getattr(after, site)[0], getattr(before, site)[0]
        axis = 1 if site == "attention_weights" else 0
        assert not np.any(own.take(3, axis)), site
        own, other = (np.delete(x, 3, axis) for x in (own, other))
        np.testing.assert_allclose(own, other, atol=1e-4)


@pytest.mark.parametrize("kernel", [False, True])
def test_pads_in_a_chunk_change_no_token(kernel: bool) -> None:
    """NaN of a hook at pads was multiplied by weights of zero."""
    server = golden.runner("three-layers", kernel=kernel)
    hooks = {"embeddings": lambda _, x: jnp.where(positions() < 0, jnp.nan, x)}
    np.testing.assert_allclose(
        server.logits([PROMPT, OTHER], hooks=hooks), server.logits([PROMPT, OTHER]), atol=1e-5
    )
    texts = [PROMPT, OTHER[:3]]
    for found, plain in zip(server.score(texts, hooks=hooks), server.score(texts), strict=True):
        np.testing.assert_allclose(found, plain, atol=1e-5)


def test_hooks_are_named_where_logits_are_not_finite() -> None:
    server = golden.runner("three-layers")
    hooked: Any = {"hooks": {"embeddings": lambda _, x, by: x * by}, "hook_args": (np.nan,)}
    for use in (server.score, server.generate):
        with pytest.raises(ValueError, match="NaN or infinity with hooks; check what they"):
            use(PROMPT, **hooked)


def test_what_a_hook_raises_is_named_with_its_site() -> None:
    server = golden.runner("three-layers")
    for wrong, said in (
        (lambda _, x: jnp.where(jnp.ones([7, 1, 1]), x, 0), "ValueError: Incompatible shapes"),
        (lambda _, x: {"b": x}["a"], "KeyError: 'a'"),
    ):
        with pytest.raises(ValueError, match=f"hooks: the function of 'keys' failed .{said}"):
            server.inspect(PROMPT, hooks={"keys": wrong})


def test_arguments_of_another_device_are_taken() -> None:
    server = golden.runner("three-layers", slots=1)
    hooks, value = {"hidden_states": add}, direction(server)
    there = jax.device_put(value, jax.devices()[3])
    found, expected = (
        server.inspect(PROMPT, (), hooks=hooks, hook_args=(x,)).logits for x in (there, value)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("value", [2**40, -(2**31) - 1, 1e300])
def test_numbers_that_no_dtype_holds_are_refused(value: float) -> None:
    server = golden.runner("three-layers")
    with pytest.raises(ValueError, match="hook_args: .*, which (int32|float32) does not hold"):
        server.logits(PROMPT, hooks={"hidden_states": add}, hook_args=(value,))


def test_scores_with_hooks_are_of_a_changed_model() -> None:
    server = golden.runner("three-layers")
    hooked: Any = {"hooks": {("hidden_states", 1): add}, "hook_args": (300 * direction(server),)}
    changed = server.score([PROMPT, OTHER[:3]], **hooked)
    for text, found in zip((PROMPT, OTHER[:3]), changed, strict=True):
        logits = server.inspect([server.bos_token, *text[:-1]], (), **hooked).logits
        expected = jax.nn.log_softmax(logits)[np.arange(len(text)), text]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert not np.allclose(found, server.score(text), atol=1e-2)
    tokens = server.score_tokens(PROMPT, **hooked)
    np.testing.assert_allclose(tokens.logprobs, changed[0], atol=1e-6)


def test_arguments_need_a_hook() -> None:
    server = golden.runner("three-layers")
    for use in (server.inspect, server.generate, server.logits, server.score):
        with pytest.raises(ValueError, match="hook_args: expected none without hooks"):
            use(PROMPT, hook_args=(1.0,))


def test_a_router_with_other_parameters_is_refused() -> None:
    class Biased(Router):
        def logits(self, x: jax.Array, num_experts: int) -> jax.Array:
            bias = hk.get_parameter("bias", [num_experts], init=jnp.zeros)
            return super().logits(x, num_experts) + bias

    class Colder(Router):
        def logits(self, x: jax.Array, num_experts: int) -> jax.Array:
            return super().logits(x, num_experts) * 2

    directory = golden.DIRECTORY / "three-layers"
    with pytest.raises(ValueError, match=r"router: expected one with the parameters .*got .*bias"):
        load_model(directory, router=Biased)
    loaded = load_model(directory, router=Colder, dtype="float32")
    assert not np.allclose(loaded.logits(PROMPT), golden.runner("three-layers").logits(PROMPT))


# --------------------------------------------------------------------------------------- steering


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("kernel", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_generation_with_hooks_is_that_of_a_changed_model(
    mesh: tuple[int, int] | None, kernel: bool
) -> None:
    server = golden.runner("three-layers", mesh=mesh, kernel=kernel)
    hooks, arguments = {("hidden_states", 1): add}, (300 * direction(server),)
    settings: dict[str, Any] = {"temperature": 0, "max_len": 4, "ignore_eos": True}
    plain = server.generate([PROMPT, OTHER], **settings)
    steered = server.generate([PROMPT, OTHER], **settings, hooks=hooks, hook_args=arguments)
    for prompt, answer, before in zip((PROMPT, OTHER), steered, plain, strict=True):
        ids = list(prompt)
        for token in answer.token_ids:
            logits = server.inspect(ids, (), hooks=hooks, hook_args=arguments).logits
            assert token == logits[-1].argmax()
            ids.append(token)
        assert answer.token_ids != before.token_ids
    assert server.generate([PROMPT, OTHER], **settings) == plain
    sampled = server.generate(PROMPT, hooks=hooks, hook_args=arguments, num_samples=3, max_len=2)
    assert len(sampled) == 3


def test_other_requests_go_on_after_those_with_hooks() -> None:
    server = golden.runner("three-layers")
    settings: dict[str, Any] = {"temperature": 0, "max_len": 6, "ignore_eos": True}
    expected = server.generate(PROMPT, **settings)
    handle = server.submit(PROMPT, **settings)
    server.step()
    with pytest.raises(ValueError, match="'hidden_states' must return float32"):
        server.generate(OTHER, hooks={"hidden_states": lambda _, x: x[0]})
    server.generate(OTHER, **settings, hooks={"hidden_states": lambda _, x: x * 0})
    with pytest.raises(ValueError, match="request 1: max_len must"):
        server.generate(OTHER, max_len=0, hooks={"hidden_states": lambda _, x: x})
    list(server.stream(handle))
    assert handle.completion == expected


# --------------------------------------------------------------------------------------- patching


def measure(logits: np.ndarray) -> float:
    return float(logits[-1, 11] - logits[-1, 12])


@pytest.mark.parametrize("site", ["hidden_states", "queries", "values", "head_outputs"])
def test_patching_takes_one_place_from_another_run(site: str) -> None:
    server = golden.runner("three-layers")
    own = measure(server.inspect(PROMPT, ()).logits)
    found = server.patch(PROMPT, OTHER, measure, site)
    assert found.shape == (3, 5) and found.dtype == np.float32
    assert found[0, 0] == pytest.approx(own, abs=1e-5)  # the same token, in the same place
    source = getattr(server.inspect(OTHER, (site,)).captured, site)
    for layer, place in ((1, 4), (2, 3))[: 1 + (site == "hidden_states")]:
        hook = {(site, layer): lambda _, x, v=source[layer], t=place: x.at[:, t].set(v[t])}
        by_hand = measure(server.inspect(PROMPT, (), hooks=hook).logits)
        assert found[layer, place] == pytest.approx(by_hand, abs=1e-5)
    some = server.patch(PROMPT, OTHER, measure, site, layers=[-1], positions=[3, -1])
    np.testing.assert_allclose(some, found[2:, 3:], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": [5]}, "source: expected as many tokens as the prompt, 5, got 1"),
        ({"site": "embeddings"}, "site: expected one of .*, got 'embeddings'"),
        ({"layers": [3]}, "layers: expected one or more integers from -3 to 2"),
        ({"positions": [5]}, "positions: expected integers from -5 to 4, got .5."),
        ({"metric": lambda logits: logits[-1]}, "metric: expected one number of the logits, got"),
        ({"positions": 3}, "positions: expected integers from -5 to 4, got 3"),
        ({"positions": "ab"}, "positions: expected integers from -5 to 4, got 'ab'"),
        ({"prompt": []}, "the prompt has no tokens"),
    ],
)
def test_what_cannot_be_patched_is_refused(change: dict[str, Any], message: str) -> None:
    given = {"prompt": PROMPT, "source": OTHER, "metric": measure, **change}
    if not given["prompt"]:
        given["source"] = []
    with pytest.raises(ValueError, match=message):
        golden.runner("three-layers").patch(**given)


# ------------------------------------------------------------------------------ the pure function


def of_embeddings(server: InferenceRunner, **how: bool) -> tuple[Callable[..., Any], np.ndarray]:
    """Return a number as a function of embeddings, and those of a prompt."""
    model, tokens = server.model(**how), jnp.array([PROMPT])

    def number(embeddings: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(model(server.params, tokens, embeddings=embeddings).logits))

    return number, server.inspect(PROMPT, ("embeddings",)).captured.embeddings[None]


@pytest.mark.parametrize("mesh", [None, pytest.param((1, 8), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("kernel", [False, True])
def test_gradients_by_embeddings_are_slopes(mesh: tuple[int, int] | None, kernel: bool) -> None:
    server = golden.runner("three-layers", mesh=mesh, kernel=kernel)
    number, embeddings = of_embeddings(server, differentiable=True)
    step = direction(server) * np.abs(embeddings).mean()
    value, slope = jax.jit(lambda e: jax.jvp(number, (e,), (jnp.broadcast_to(step, e.shape),)))(
        embeddings
    )
    gradient = jax.jit(jax.grad(number))(embeddings)
    assert float(slope) == pytest.approx(float(np.sum(gradient * step)), rel=1e-3)
    assert np.all(np.linalg.norm(gradient, axis=-1) > 0)  # of every token
    near = [float(number(embeddings + size * step)) for size in (1e-3, -1e-3)]
    assert float(slope) == pytest.approx((near[0] - near[1]) / 2e-3, rel=0.02)
    expected = np.sum(np.sin(server.logits(PROMPT)))
    assert float(value) == pytest.approx(expected, abs=1e-2)


def test_gradients_by_weights_take_a_float_model() -> None:
    server = golden.runner("three-layers", kernel=True)
    params = server.config.dequantize_params(server.params)
    model, tokens = server.model(differentiable=True), jnp.array([PROMPT])

    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(model(params, tokens).logits))

    gradient = jax.jit(jax.grad(loss))(params)
    for slopes in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(slopes)) and np.any(slopes)


def test_the_pure_function_is_mapped_and_looked_into() -> None:
    server = golden.runner("three-layers", kernel=True)
    model, tokens = server.model(differentiable=True), jnp.array([PROMPT, OTHER])
    found = jax.vmap(lambda row: model(server.params, row[None]).logits[0])(tokens)
    np.testing.assert_allclose(found, server.logits([PROMPT, OTHER]), atol=1e-4)
    fast = server.model()
    np.testing.assert_allclose(fast(server.params, tokens).logits, found, atol=1e-4)
    hooks = {"embeddings": lambda _, h: h * 2, ("hidden_states", 0): lambda _, h: h * 0}
    own = model(server.params, tokens, capture=("embeddings",)).captured.embeddings
    sites = ("embeddings", "hidden_states")
    given = model(server.params, tokens, embeddings=3 * own, hooks=hooks, capture=sites).captured
    np.testing.assert_allclose(given.embeddings, 6 * own, atol=1e-5)
    assert not np.any(given.hidden_states[0])
    sized = {"hidden_states": lambda _, h, size: h * size}
    zero = model(server.params, tokens, hooks=sized, hook_args=(0.0,), capture=("hidden_states",))
    assert not np.any(zero.captured.hidden_states)
    with pytest.raises(ValueError, match="embeddings: expected a float32 array .2, 5, .*got"):
        model(server.params, tokens, embeddings=own[0])
    with pytest.raises(ValueError, match="embeddings: expected a float32 array .*bfloat16"):
        model(server.params, tokens, embeddings=own.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="hooks: expected a dict .*, got 'x'"):
        model(server.params, tokens, hooks="x")
    for wrong in (tokens[0], PROMPT, "text"):
        with pytest.raises(ValueError, match=r"tokens: expected an int32 array \[B, T\], got"):
            model(server.params, wrong)


def test_forms_without_derivatives_name_those_that_have_some() -> None:
    server = golden.runner("three-layers", kernel=True)
    number, embeddings = of_embeddings(server)
    for transform, reason in (
        (lambda: jax.grad(number)(embeddings), "compiled kernels have no derivatives"),
        (lambda: jax.jvp(number, (embeddings,), (embeddings,)), "compiled kernels have no deriv"),
        (lambda: jax.vmap(number)(embeddings[None]), "compiled kernels cannot be mapped by"),
    ):
        with pytest.raises(ValueError, match=f"{reason}.*; {INSTEAD}"):
            transform()
        with pytest.raises(ValueError, match=f"{reason}.*; {INSTEAD}"):
            jax.jit(transform)()


def test_a_loop_of_unknown_length_names_what_has_a_gradient() -> None:
    server = golden.runner("three-layers")
    tokens = jnp.array([PROMPT])

    def number(size: Any) -> jax.Array:
        hooks = {"embeddings": lambda _, h: h * size}
        how = Execution()
        return apply_model(server.config, how, server.params, tokens, hooks=hooks).logits.sum()

    with pytest.raises(ValueError, match=f"loops of unknown length have no gradient; {INSTEAD}"):
        jax.grad(number)(1.0)
    _, slope = jax.jvp(number, (1.0,), (1.0,))
    mapped = jax.vmap(lambda size: jax.jvp(number, (size,), (1.0,))[1])(jnp.ones(2))
    np.testing.assert_allclose(mapped, [slope, slope], rtol=1e-3)
