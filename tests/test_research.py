"""Methods of a loaded model with hooks; activation patching, gradients and the pure function."""

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

NAME = "three-layers"
PROMPT, OTHER = [5, 6, 7, 8, 9], [5, 60, 7, 80, 9]
EVERYWHERE = -2  # no position
SETTINGS: dict[str, Any] = {"temperature": 0, "max_len": 4, "ignore_eos": True}
INSTEAD = r"use server.model\(differentiable=True\)"
traces: list[tuple[int, ...]] = []  # the shapes with which `steer` was traced


def loaded(**options: Any) -> InferenceRunner:
    """Return a runner that reads prompts in chunks of one short length, as each is compiled."""
    return golden.runner(NAME, pad_sizes=(8,), **options)


def steer(_: Any, x: jax.Array, direction: jax.Array, place: jax.Array) -> jax.Array:
    """Add a direction to the activation at one position, or everywhere."""
    traces.append(x.shape)
    here = (positions() == place) | (place == EVERYWHERE)
    return jnp.where(here, x + direction, x)


# One hook for most tests, as each hook compiles every step again.
HOOKS = {("hidden_states", 1): steer}


def steered(size: float = 300, place: int = EVERYWHERE) -> dict[str, Any]:
    """Return arguments that add a fixed random direction times `size`."""
    width = loaded().config.model.emb_size
    direction = np.random.default_rng(0).standard_normal(width).astype(np.float32)
    return {"hooks": HOOKS, "hook_args": (size * direction, place)}


# -------------------------------------------------------------------------------- steps with hooks


def test_a_hook_of_one_layer_changes_no_other_layer() -> None:
    def zero(_: Any, x: jax.Array) -> jax.Array:
        return x * 0

    site = "attention_output"
    hooks = {(site, 0): zero, (site, -1): zero}
    found = loaded().inspect(PROMPT, (site,), hooks=hooks).captured.attention_output
    assert [bool(np.any(x)) for x in found] == [False, True, False]


def test_other_hook_args_compile_nothing_again() -> None:
    """Including numbers as a float of Python, and as scalars of NumPy and jax."""
    server = loaded()
    for use in (
        lambda how: server.inspect(PROMPT, (), **how).logits.tobytes(),
        lambda how: tuple(server.generate(PROMPT, **SETTINGS, **how).token_ids),
    ):
        found = {use(steered())}
        before = len(traces)
        direction = steered()["hook_args"][0]
        for number in (2, np.int64(1), np.int32(0), jnp.int32(EVERYWHERE)):
            found.add(use({"hooks": HOOKS, "hook_args": (direction, number)}))
        assert len(traces) == before and len(found) > 1
    width = server.config.model.emb_size
    assert (1, len(PROMPT), width) in traces  # of `inspect`, without padding


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (3, "expected a tuple or list of arrays, got int"),
        ({"size": 3}, "expected a tuple or list of arrays, got dict"),
        (("a",), "expected arrays and numbers, got 'a'"),
        ((2**40,), "expected .*, which int32 does not hold"),
        ((1e300,), "expected .*, which float32 does not hold"),
    ],
    ids=str,
)
def test_invalid_hook_args_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"hook_args: {message}"):
        loaded().inspect(PROMPT, hooks=HOOKS, hook_args=arguments)


def test_each_method_refuses_hook_args_without_hooks() -> None:
    server = loaded()
    for use in (server.inspect, server.generate, server.logits, server.score):
        with pytest.raises(ValueError, match="hook_args: expected none without hooks"):
            use(PROMPT, hook_args=(1.0,))


def test_hook_args_on_another_device_are_moved() -> None:
    server, how = loaded(), steered()
    expected = server.inspect(PROMPT, (), **how).logits
    direction, place = how["hook_args"]
    there = jax.device_put(direction, jax.devices()[3])
    found = server.inspect(PROMPT, (), hooks=HOOKS, hook_args=(there, place)).logits
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("mesh", "kernel"), [(None, False), pytest.param((2, 4), True, marks=pytest.mark.slow)], ids=str
)
def test_each_method_gives_hooks_all_chunk_positions(
    mesh: tuple[int, int] | None, kernel: bool
) -> None:
    """Of a text in two chunks, in a batch and while it is generated, one token is changed."""
    server = loaded(mesh=mesh, kernel=kernel)
    text = [*range(3, 16)]
    by_hand = {("hidden_states", 1): lambda _, x, d, place: x.at[:, place].add(d)}
    plain, hooked = server.logits(text)[0], {}
    for place in (1, len(text) - 2):
        how = hooked[place] = steered(place=place)
        expected = server.inspect(text, (), hooks=by_hand, hook_args=how["hook_args"]).logits
        for found in (
            server.inspect(text, (), **how).logits,
            server.logits(text, **how)[0],
            server.logits([text, text], **how)[1],
        ):
            np.testing.assert_allclose(found, expected, atol=1e-4)
        assert not np.allclose(plain, expected, atol=1e-2)
    for prompt, how in ((text, hooked[1]), (PROMPT, steered())):
        alone, same, other = server.generate([prompt, prompt, OTHER], **SETTINGS, **how)
        assert alone == same != server.generate(prompt, **SETTINGS)
        for start, answer in ((prompt, alone), (OTHER, other)):
            whole = [*start, *answer.token_ids]
            again = server.logits(whole[:-1], **how)[0, len(start) - 1 :]
            assert answer.token_ids == again.argmax(-1).tolist()
    assert len(server.generate(PROMPT, **SETTINGS, num_samples=3, **how)) == 3


def test_scores_with_hooks_are_those_of_inspect() -> None:
    server, how = loaded(), steered()
    changed = server.score([PROMPT, OTHER], **how)
    for text, found in zip((PROMPT, OTHER), changed, strict=True):
        logits = server.inspect([server.bos_token, *text[:-1]], (), **how).logits
        expected = jax.nn.log_softmax(logits)[np.arange(len(text)), text]
        np.testing.assert_allclose(found, expected, atol=1e-4)
        assert not np.allclose(found, server.score(text), atol=1e-2)
    tokens = server.score_tokens(PROMPT, **how)
    np.testing.assert_allclose(tokens.logprobs, changed[0], atol=1e-6)


def test_positions_of_pads_are_minus_one() -> None:
    server, pad = loaded(), loaded().config.pad_token
    found = server.inspect([5, pad, 6], ("embeddings",), hooks={
        "embeddings": lambda _, x: x * 0 + positions()
    })  # fmt: skip
    assert found.captured.embeddings[:, 0].tolist() == [0, -1, 2]
    with pytest.raises(RuntimeError, match="expected to be called by a hook"):
        positions()


def test_positions_have_the_axes_of_each_site() -> None:
    """As [B, T, 1] they were broadcast along the heads of [B, T, N, H]."""
    server = loaded()
    sites = [site for site in CAPTURE_SITES if site not in ("expert_index", "embeddings")]

    def hook(number: int) -> Callable[..., jax.Array]:
        return lambda _, x, site: jnp.where((site == number) & (positions() == 3), 0, x)

    hooks = {(site, 0): hook(number) for number, site in enumerate(sites)}
    before, *changed = (
        server.inspect(PROMPT, sites, hooks=hooks, hook_args=(number,)).captured
        for number in range(-1, len(sites))
    )
    for site, after in zip(sites, changed, strict=True):
        own, other = getattr(after, site)[0], getattr(before, site)[0]
        axis = 1 if site == "attention_weights" else 0
        assert np.any(other.take(3, axis)) and not np.any(own.take(3, axis)), site
        own, other = (np.delete(x, 3, axis) for x in (own, other))
        np.testing.assert_allclose(own, other, atol=1e-4)


@pytest.mark.parametrize("kernel", [False, True])
def test_nan_at_pads_changes_no_token(kernel: bool) -> None:
    """It was multiplied by weights of zero."""
    server = loaded(kernel=kernel)
    hooks = {"embeddings": lambda _, x: jnp.where(positions() < 0, jnp.nan, x)}
    texts = [PROMPT, OTHER[:3]]
    for found, plain in zip(server.score(texts, hooks=hooks), server.score(texts), strict=True):
        np.testing.assert_allclose(found, plain, atol=1e-5)


def test_nan_of_hooks_is_an_error_that_names_hooks() -> None:
    server = loaded()
    for use in (server.score, server.generate):
        with pytest.raises(ValueError, match="NaN or infinity with hooks; check what they"):
            use(PROMPT, **steered(np.nan))


def test_hooks_do_not_change_requests_without_hooks() -> None:
    server = loaded()
    expected = server.generate(PROMPT, **SETTINGS)
    handle = server.submit(PROMPT, **SETTINGS)
    server.step()
    with pytest.raises(ValueError, match="'hidden_states' must return float32"):
        server.generate(OTHER, hooks={"hidden_states": lambda _, x: x[0]})
    server.generate(OTHER, **SETTINGS, **steered())
    with pytest.raises(ValueError, match="request 1: max_len must"):
        server.generate(OTHER, max_len=0, **steered())
    list(server.stream(handle))
    assert handle.completion == expected


def test_a_router_with_other_parameters_is_refused() -> None:
    class Biased(Router):
        def logits(self, x: jax.Array, num_experts: int) -> jax.Array:
            bias = hk.get_parameter("bias", [num_experts], init=jnp.zeros)
            return super().logits(x, num_experts) + bias

    with pytest.raises(ValueError, match=r"router: expected one with the parameters .*got .*bias"):
        load_model(golden.DIRECTORY / NAME, router=Biased)


# --------------------------------------------------------------------------------------- patching


def measure(logits: np.ndarray) -> float:
    return float(logits[-1, 11] - logits[-1, 12])


@pytest.mark.parametrize(
    "site", ["hidden_states", pytest.param("queries", marks=pytest.mark.exhaustive)]
)
def test_patch_replaces_one_activation_at_a_time(site: str) -> None:
    server = loaded()
    own = measure(server.inspect(PROMPT, ()).logits)
    found = server.patch(PROMPT, OTHER, measure, site)
    assert found.shape == (3, 5) and found.dtype == np.float32
    assert found[0, 0] == pytest.approx(own, abs=1e-5)  # the same token at the same position
    source = getattr(server.inspect(OTHER, (site,)).captured, site)
    hook = {(site, 1): lambda _, x: x.at[:, 4].set(source[1, 4])}
    by_hand = measure(server.inspect(PROMPT, (), hooks=hook).logits)
    assert found[1, 4] == pytest.approx(by_hand, abs=1e-5)
    some = server.patch(PROMPT, OTHER, measure, site, layers=[-1], positions=[3, -1])
    np.testing.assert_allclose(some, found[2:, 3:], atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": [5]}, "source: expected as many tokens as the prompt, 5, got 1"),
        ({"site": "embeddings"}, "site: expected one of .*, got 'embeddings'"),
        ({"layers": [3]}, "layers: expected one or more integers from -3 to 2"),
        ({"positions": [5]}, "positions: expected integers from -5 to 4, got .5."),
        ({"positions": 3}, "positions: expected integers from -5 to 4, got 3"),
        ({"positions": "ab"}, "positions: expected integers from -5 to 4, got 'ab'"),
        ({"metric": lambda logits: logits[-1]}, "metric: expected one number of the logits, got"),
        ({"prompt": [], "source": []}, "the prompt has no tokens"),
    ],
)
def test_invalid_arguments_of_patch_are_refused(change: dict[str, Any], message: str) -> None:
    given = {"prompt": PROMPT, "source": OTHER, "metric": measure, **change}
    with pytest.raises(ValueError, match=message):
        loaded().patch(**given)


# ------------------------------------------------------------------------------ the pure function


def of_embeddings(server: InferenceRunner, **how: bool) -> tuple[Callable[..., Any], np.ndarray]:
    """Return a number as a function of embeddings, and those of a prompt."""
    model, tokens = server.model(**how), jnp.array([PROMPT])

    def number(embeddings: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(model(server.params, tokens, embeddings=embeddings).logits))

    return number, server.inspect(PROMPT, ("embeddings",)).captured.embeddings[None]


def test_gradients_by_embeddings_are_slopes() -> None:
    server = loaded(kernel=True)
    number, embeddings = of_embeddings(server, differentiable=True)
    step = steered(1)["hook_args"][0] * np.abs(embeddings).mean()
    along = jnp.broadcast_to(step, embeddings.shape)
    number_and_slope = jax.jit(lambda e: jax.jvp(number, (e,), (along,)))
    value, slope = number_and_slope(embeddings)
    gradient = jax.jit(jax.grad(number))(embeddings)
    assert float(slope) == pytest.approx(float(np.sum(gradient * step)), rel=1e-3)
    assert np.all(np.linalg.norm(gradient, axis=-1) > 0)  # of every token
    near = [float(number_and_slope(embeddings + size * step)[0]) for size in (1e-3, -1e-3)]
    assert float(slope) == pytest.approx((near[0] - near[1]) / 2e-3, rel=0.02)
    expected = np.sum(np.sin(server.logits(PROMPT)))
    assert float(value) == pytest.approx(expected, abs=1e-2)


def test_a_float_model_has_gradients_by_all_weights() -> None:
    server = loaded(kernel=True)
    params = server.config.dequantize_params(server.params)
    model, tokens = server.model(differentiable=True), jnp.array([PROMPT])

    def loss(params: Any) -> jax.Array:
        return jnp.sum(jnp.sin(model(params, tokens).logits))

    gradient = jax.jit(jax.grad(loss))(params)
    for slopes in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(slopes)) and np.any(slopes)


def test_pure_function_takes_vmap_hooks_and_embeddings() -> None:
    server = loaded(kernel=True)
    model, params = server.model(differentiable=True), server.params
    tokens, sites = jnp.array([PROMPT, OTHER]), ("embeddings", "hidden_states")
    found = jax.jit(jax.vmap(lambda row: model(params, row[None]).logits[0]))(tokens)
    expected = server.logits([PROMPT, OTHER])
    np.testing.assert_allclose(found, expected, atol=1e-4)
    fast = jax.jit(server.model())(params, tokens).logits
    np.testing.assert_allclose(fast, expected, atol=1e-4)
    hooks = {
        "embeddings": lambda _, h, size: h * size,
        ("hidden_states", 1): lambda _, h, size: h * (size - 2),
    }

    @jax.jit
    def captured(embeddings: jax.Array, size: jax.Array) -> Any:
        how: Any = {"hooks": hooks, "hook_args": (size,), "capture": sites}
        return model(params, tokens, embeddings=embeddings, **how).captured

    own = np.ones([2, 5, server.config.model.emb_size], np.float32)
    given, slopes = jax.jvp(lambda size: captured(own, size), (2.0,), (1.0,))
    np.testing.assert_allclose(given.embeddings, 2 * own, atol=1e-5)
    np.testing.assert_allclose(slopes.embeddings, own, atol=1e-5)
    assert np.any(given.hidden_states[0]) and not np.any(given.hidden_states[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": np.zeros([5, 128], np.float32)}, "embeddings: expected a float32 array "),
        ({"embeddings": np.zeros([1, 5, 128])}, r"embeddings: expected a .* \[1, 5, 128\], got"),
        ({"hooks": "x"}, "hooks: expected a dict .*, got 'x'"),
        ({"tokens": np.array(PROMPT)}, r"tokens: expected an int32 array \[B, T\], got"),
        ({"tokens": PROMPT}, r"tokens: expected an int32 array \[B, T\], got"),
    ],
)
def test_the_pure_function_refuses_invalid_arguments(change: dict[str, Any], message: str) -> None:
    server = loaded()
    given = {"params": server.params, "tokens": np.array([PROMPT]), **change}
    with pytest.raises(ValueError, match=message):
        server.model()(**given)


def test_transforms_that_kernels_lack_are_refused() -> None:
    number, embeddings = of_embeddings(loaded(kernel=True))
    for transform, reason in (
        (lambda: jax.grad(number)(embeddings), "compiled kernels have no derivatives"),
        (lambda: jax.jvp(number, (embeddings,), (embeddings,)), "compiled kernels have no deriv"),
        (lambda: jax.vmap(number)(embeddings[None]), "compiled kernels cannot be mapped by"),
    ):
        for run in (transform, jax.jit(transform)):
            with pytest.raises(ValueError, match=f"{reason}.*; {INSTEAD}"):
                run()


def test_loops_of_unknown_length_have_jvp_vmap_no_grad() -> None:
    server, tokens = loaded(), jnp.array([PROMPT])

    def number(size: Any) -> jax.Array:
        hooks = {"embeddings": lambda _, h: h * size}
        output = apply_model(server.config, Execution(), server.params, tokens, hooks=hooks)
        return output.logits.sum()

    with pytest.raises(ValueError, match=f"loops of unknown length have no gradient; {INSTEAD}"):
        jax.jit(jax.grad(number))(1.0)
    slope = jax.jit(lambda size: jax.jvp(number, (size,), (1.0,))[1])
    mapped = jax.jit(jax.vmap(slope))(jnp.ones(2))
    np.testing.assert_allclose(mapped, [slope(1.0)] * 2, rtol=1e-3)
