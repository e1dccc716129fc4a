"""Execution: its fields are checked, and no choice of them changes a result."""

import dataclasses
import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

import golden
import model
from grok1 import backend
from grok1.execution import ONE_DEVICE, Execution, fastest
from grok1.kernels import dispatch
from grok1.parallel.sharding import make_mesh
from grok1.serving.steps import apply_model
from model import LanguageModelConfig, TransformerConfig
from runner import InferenceRunner, ModelRunner, load_server

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


EXPLICIT = AbstractMesh((1, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
STATIC = {"expert_dispatch": "static"}
KERNELS = "one of ('plain', 'xla_cpu', 'cpu', 'gpu')"
DISPATCH = "one of ('dynamic', 'static', 'all')"


@pytest.mark.parametrize(
    ("field", "value", "expected", "others"),
    [
        ("mesh", (1, 8), "a jax.sharding.Mesh, or None", {}),
        ("mesh", EXPLICIT, "axes of AxisType.Auto, as runner.make_mesh makes them", {}),
        ("data_axis", None, "the name of a mesh axis", {}),
        ("kernels", "tpu", KERNELS, {}),
        ("kernels", "cpu", '"plain" unless expert_dispatch is "dynamic"', STATIC),
        ("expert_dispatch", None, DISPATCH, {}),
        ("scan_unroll", 0, "an integer >= 1", {}),
        ("router", "x", "a subclass of Router, or None", {}),
        ("shard_activations", 1, "true or false", {}),
    ],
)
def test_wrong_field_is_rejected(field, value, expected, others):
    with pytest.raises(ValueError) as error:
        Execution(**{field: value}, **others)
    assert str(error.value) == f"{field}: expected {expected}, got {value!r}"


def test_make_rejects_a_wrong_mesh_or_execution():
    one, other = make_mesh((1, 2)), make_mesh((2, 1))
    uneven = dataclasses.replace(TINY.model, emb_size=9, shard_activations=False)
    uneven = dataclasses.replace(TINY, model=uneven)
    uneven.check_mesh(one)
    for config, options, message in (
        (TINY, {"execution": "x"}, "execution: expected a grok1.execution.Execution, .*'x'"),
        (TINY, {"mesh": other, "execution": Execution(one)}, "mesh: expected that of `execution`"),
        (TINY, {"execution": Execution(make_mesh((1, 3)))}, "a model axis of 3 does not divide"),
        (TINY, {"execution": Execution(one, data_axis="rows")}, r"axes .*, got \('rows', 'model'"),
        # Only a residual stream that is split needs a width that divides.
        (
            uneven,
            {"execution": Execution(one, shard_activations=True)},
            "mesh: a model axis of 2 does not divide emb_size = 9",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            config.make(**options)


def test_runner_rejects_a_wrong_execution():
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
def test_fastest_kernels_are_those_of_the_platform(platform, names, monkeypatch):
    monkeypatch.setattr(backend, "platform", lambda: platform)
    for compiled, name in zip((False, True), names, strict=True):
        prefill, decode = fastest(TINY, None, compiled=compiled)
        assert (prefill.kernels, decode.kernels) == (name, name)
        assert prefill.shard_activations == (name != "gpu") and not decode.shard_activations


def test_kernels_that_this_machine_lacks_are_rejected(monkeypatch):
    def run(kernels):
        runner = ModelRunner(TINY, 1, None, execution=Execution(kernels=kernels))
        InferenceRunner("tiny", runner, None, None).initialize()

    with pytest.raises(ValueError, match='kernels: expected "plain" or kernels for the platform'):
        run("gpu")
    cpu = dispatch._compiled("cpu")
    monkeypatch.setattr(cpu, "load", cpu.load.__wrapped__)  # as if not loaded yet
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match=r"kernels: 'cpu' cannot be used here \(no C\+\+ compiler"):
        run("cpu")


def test_server_chooses_the_fastest_execution():
    """On a mesh only prefill splits the activations; a given execution is used for both."""
    directory = golden.DIRECTORY / "three-layers"
    for kernels, name in ((True, "cpu"), (False, "xla_cpu")):
        chosen = load_server(directory, mesh=(1, 8), kernels=kernels, context=64)
        prefill, decode = chosen.executions
        assert prefill.kernels == decode.kernels == name
        assert prefill.shard_activations and not decode.shard_activations
    given = Execution(scan_unroll=3)
    server = load_server(directory, mesh=(1, 8), context=64, execution=given)
    expected = dataclasses.replace(given, mesh=server.mesh)
    assert [*server.executions] == [expected, expected]


def test_cpu_kernels_on_a_mesh_equal_the_plain_model():
    """With activations that are split and not, in two chunks: the second attends to the first."""
    params, logits = TINY.init_params(0, quantized=True), []
    on_mesh = Execution(make_mesh((1, 2)), kernels="cpu")
    for how in (ONE_DEVICE, on_mesh, dataclasses.replace(on_mesh, shard_activations=True)):
        read = jax.jit(functools.partial(apply_model, TINY, how))
        first = read(params, TOKENS[:, :3], TINY.model.init_memory(2, 16, jnp.float32))
        second = read(params, TOKENS[:, 3:], first.model_state)
        logits.append(np.concatenate([first.logits, second.logits], axis=1))
    for found in logits[1:]:
        assert golden.relative_error(found, logits[0]).max() <= 1e-5


# ------------------------------------------------------------------------------------------- taps


def test_unused_taps_add_nothing_to_the_program(monkeypatch):
    """The lowered text equals that of a model with the identity in their place."""

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


def test_threads_capture_independently():
    params, start = TINY.param_shapes(), threading.Barrier(4)
    sites = ("router_probs", "hidden_states", None, "embeddings")
    found: dict[int, set[str]] = {}

    def look(number):
        capture = () if sites[number] is None else (sites[number],)
        start.wait()
        for _ in range(2):  # traced anew each time
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


def test_failing_hook_does_not_affect_the_next_call():
    def fail(*_):
        raise TypeError("no")

    def captured(hooks):
        call = functools.partial(apply_model, TINY, ONE_DEVICE, hooks=hooks)
        return jax.eval_shape(call, TINY.param_shapes(), TOKENS).captured

    with pytest.raises(ValueError, match="'hidden_states' failed"):
        captured({"hidden_states": fail})
    assert captured({}) == model.Captured()
