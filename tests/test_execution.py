"""How a model is run is chosen in one place, and changes no result."""

import dataclasses
import threading

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
import model
from grok1 import backend
from grok1.execution import ONE_DEVICE, Execution, fastest
from grok1.kernels import dispatch
from grok1.parallel.sharding import make_mesh
from grok1.serving.steps import apply_model
from model import LanguageModelConfig, TransformerConfig
from runner import InferenceRunner, ModelRunner, Request, load_server

TINY = LanguageModelConfig(
    model=TransformerConfig(
        emb_size=16, key_size=4, num_q_heads=4, num_kv_heads=2, num_layers=2, num_experts=4,
        num_selected_experts=2, shard_activations=True,
    ),
    vocab_size=32,
    sequence_len=16,
    fprop_dtype=jnp.float32,
)  # fmt: skip
TOKENS = np.random.default_rng(0).integers(1, 32, (2, 6)).astype(np.int32)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("mesh", (1, 8), "a jax.sharding.Mesh, or None"),
        ("data_axis", None, "the name of a mesh axis"),
        ("kernels", True, "one of ('plain', 'xla_cpu', 'cpu', 'gpu')"),
        ("kernels", "tpu", "one of ('plain', 'xla_cpu', 'cpu', 'gpu')"),
        ("expert_dispatch", "fast", "one of ('dynamic', 'static', 'all')"),
        ("expert_dispatch", None, "one of ('dynamic', 'static', 'all')"),
        ("scan_unroll", 0, "an integer >= 1"),
        ("scan_unroll", True, "an integer >= 1"),
        ("router", "x", "a subclass of Router, or None"),
        ("shard_activations", 1, "true or false"),
    ],
)
def test_a_wrong_field_is_refused(field, value, expected):
    with pytest.raises(ValueError) as error:
        Execution(**{field: value})
    assert str(error.value) == f"{field}: expected {expected}, got {value!r}"


def test_kernels_have_no_gradient_to_train_with():
    with pytest.raises(ValueError, match='kernels: expected "plain" unless expert_dispatch is "dy'):
        Execution(kernels="cpu", expert_dispatch="static")


def test_without_one_it_is_the_obvious_one():
    mesh = make_mesh((1, 2))
    assert TINY.model.execution(mesh) == Execution(mesh, shard_activations=True)
    assert TINY.model.execution() == Execution(shard_activations=True)


def test_make_takes_a_mesh_or_an_execution_of_its_own():
    one, other = make_mesh((1, 2)), make_mesh((2, 1))
    wrong_axes = Execution(one, data_axis="rows")
    for options, message in (
        ({"mesh": other, "execution": Execution(one)}, "mesh: expected that of `execution`"),
        ({"execution": Execution(make_mesh((1, 3)))}, "mesh: a model axis of 3 does not divide"),
        (
            {"execution": wrong_axes},
            "execution: expected the configuration's axes .*, got \\('rows', 'model'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(hk.transform(lambda o=options: TINY.make(**o)(TOKENS)).init, None)


def test_what_is_no_execution_is_refused_by_make():
    with pytest.raises(ValueError, match="execution: expected a grok1.execution.Execution, .*'x'"):
        TINY.make(execution="x")


def test_a_split_stream_needs_a_width_that_divides():
    model = dataclasses.replace(TINY.model, emb_size=9, shard_activations=False)
    config, mesh = dataclasses.replace(TINY, model=model), make_mesh((1, 2))
    config.check_mesh(mesh)
    with pytest.raises(ValueError, match="mesh: a model axis of 2 does not divide emb_size = 9"):
        config.make(execution=Execution(mesh, shard_activations=True))


def test_a_runner_refuses_a_wrong_execution():
    mesh, demo = make_mesh((1, 2)), golden.DIRECTORY / "three-layers"
    for execution, message in (
        (Execution(mesh), "execution: expected one without a mesh; give the sizes of the mesh"),
        ("fast", "execution: expected a grok1.execution.Execution, or None, got 'fast'"),
        (
            Execution(model_axis="x"),
            r"execution: expected the configuration's axes .*, got \(.*'x'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            load_server(demo, mesh=(1, 2), execution=execution)


@pytest.mark.parametrize(
    ("platform", "names"), [("cpu", ("xla_cpu", "cpu")), ("gpu", ("plain", "gpu"))]
)
def test_the_fastest_forms_are_those_of_the_platform(platform, names, monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: platform)
    for compiled, name in zip((False, True), names, strict=True):
        prefill, decode = fastest(TINY, None, compiled=compiled)
        assert (prefill.kernels, decode.kernels) == (name, name)
        assert prefill.shard_activations and not decode.shard_activations


def test_forms_that_this_machine_lacks_are_refused(monkeypatch):
    def run(kernels):
        runner = ModelRunner(TINY, 1, None, execution=Execution(kernels=kernels))
        InferenceRunner("tiny", runner, None, None).initialize()

    with pytest.raises(ValueError, match='kernels: expected "plain" or kernels for the platform'):
        run("gpu")
    cpu = dispatch._compiled("cpu")
    monkeypatch.setattr(cpu, "load", cpu.load.__wrapped__)  # which has not been done yet
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"kernels: 'cpu' cannot be used here \(no C\+\+ compiler"):
        run("cpu")


@pytest.mark.parametrize("kernels", [False, True], ids=["plain", "kernels"])
def test_whatever_is_chosen_gives_the_same_answers(kernels):
    """What a server chooses by itself, and both forms of its activations that it may be told."""
    directory, found = golden.DIRECTORY / "three-layers", []
    chosen = load_server(directory, mesh=(1, 8), dtype="float32", kernels=kernels, context=64)
    prefill, decode = chosen.executions
    assert prefill.kernels == decode.kernels == ("cpu" if kernels else "xla_cpu")
    assert prefill.shard_activations and not decode.shard_activations
    servers = [chosen]
    for sharded in (True, False):
        told = Execution(shard_activations=sharded, kernels=prefill.kernels)
        servers.append(
            load_server(directory, mesh=(1, 8), dtype="float32", context=64, execution=told)
        )
        expected = dataclasses.replace(told, mesh=servers[-1].mesh)
        assert [*servers[-1].executions] == [expected, expected]
    tokens = golden.recorded("three-layers").tokens[:1, :20]
    for server in servers:
        answer = server.generate([Request(tokens[0].tolist(), 0.0, max_len=8)])[0]
        found.append((server.logits(tokens), answer.token_ids, answer.logprobs))
    for logits, ids, logprobs in found[1:]:
        assert golden.relative_error(logits, found[0][0]).max() <= 1e-5
        assert ids == found[0][1]
        np.testing.assert_allclose(logprobs, found[0][2], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------------------------- taps


def test_unused_taps_are_not_in_the_program(monkeypatch):
    """The lowered text is that of a model with the identity in their place."""

    def text():
        def call(params, tokens, memory):
            return apply_model(TINY, ONE_DEVICE, params, tokens, memory)

        memory = jax.eval_shape(lambda: TINY.model.init_memory(2, 16, jnp.float32))
        return [
            jax.jit(call).lower(TINY.param_shapes(), TOKENS, memory).as_text()
            for memory in (None, memory)
        ]

    plain = text()
    monkeypatch.setattr(model, "tap", lambda _, x: x)
    monkeypatch.setattr(model, "tapped", lambda _: False)
    assert text() == plain


def test_each_thread_captures_what_it_asked_for():
    params, start = TINY.init_params(0), threading.Barrier(4)
    sites = ("router_probs", "hidden_states", None, "embeddings")
    found: dict[int, set[str]] = {}

    def look(number):
        capture = () if sites[number] is None else (sites[number],)
        start.wait()
        for _ in range(5):  # traced anew each time
            call = lambda p: apply_model(TINY, ONE_DEVICE, p, TOKENS, capture=capture).captured  # noqa: E731
            captured = jax.eval_shape(call, params)
            seen = {site for site, x in captured._asdict().items() if x is not None}
            found.setdefault(number, set()).update(seen)

    threads = [threading.Thread(target=look, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: {"router_probs"}, 1: {"hidden_states"}, 2: set(), 3: {"embeddings"}}


def test_a_hook_that_fails_leaves_nothing_behind():
    params = TINY.init_params(0)

    def fail(*_):
        raise TypeError("no")

    with pytest.raises(ValueError, match="'hidden_states' failed"):
        apply_model(TINY, ONE_DEVICE, params, TOKENS, hooks={"hidden_states": fail})
    assert apply_model(TINY, ONE_DEVICE, params, TOKENS).captured == model.Captured()
