"""One function, whatever it is spread over: every mesh, either form of a checkpoint."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoint
import golden
from grok1.formats import forms
from model import LanguageModelConfig, TransformerConfig
from runner import InferenceRunner, ModelRunner, Request

MESHES = [
    (data, model)
    for data in (1, 2, 4, 8, 16)
    for model in (1, 2, 4, 8, 16)
    if 1 < data * model <= 16
]
SLOW = [("three-layers", (2, 4), True), ("twelve-layers", (1, 8), True)]
WHOLE = [("three-layers", mesh) for mesh in ((1, 8), (2, 4), (2, 8), (1, 16))]
QUICK = [("three-layers", (1, 16), True)]


def cases():
    """Every mesh that divides a model's heads; most of them are proven before a release."""
    for name in golden.NAMES:
        sizes = golden.config(name, "float32").model.model_axis_sizes()
        for mesh in MESHES:
            # As configured, and on some meshes with activations that are whole.
            for sharded in (True, False) if (name, mesh) in WHOLE else (True,):
                if mesh[1] in sizes:
                    case = (name, mesh, sharded)
                    long = pytest.mark.slow if case in SLOW else pytest.mark.exhaustive
                    marks = () if case in QUICK else long
                    yield pytest.param(*case, marks=marks, id="-".join(map(str, case)))


@functools.cache
def server(name, sizes=(1, 1), sharded=True, directory=None):
    """Return a runner of a golden model in float32, with one slot a prompt or more."""
    config = golden.config(name, "float32")
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, shard_activations=sharded)
    )
    runner = ModelRunner(config, 3 / (sizes[0] * sizes[1]), directory or golden.DIRECTORY / name)
    found = InferenceRunner(name, runner, None, None, local_mesh_config=sizes, pad_sizes=(48,))
    found.initialize()
    return found


@functools.cache
def answers(name, sizes=(1, 1), sharded=True, directory=None):
    """Return the logits of the golden tokens, and the greedy tokens after the golden prompts."""
    files = golden.recorded(name)
    found = server(name, sizes, sharded, directory)
    logits = found.logits(files.tokens)
    requests = [Request(entry["prompt"], 0.0, max_len=40) for entry in files.greedy]
    return logits, [answer.token_ids for answer in found.generate(requests)]


@pytest.mark.parametrize(("name", "sizes", "sharded"), list(cases()))
def test_every_mesh_computes_the_same(name, sizes, sharded):
    files = golden.recorded(name)
    logits, tokens = answers(name)
    got, got_tokens = answers(name, sizes, sharded)
    assert golden.relative_error(got, logits)[files.real].max() <= 1e-5
    assert got_tokens == tokens
    assert all(len(ids) == 40 or ids[-1] == 2 for ids in tokens)
    # It is spread over the mesh: a device holds its share of the experts, and of the cache.
    weights = server(name, sizes, sharded).params["transformer/decoder_layer/moe/linear"]["w"]
    assert weights.weight.addressable_shards[0].data.size == weights.weight.size // sizes[1]


def test_an_axis_longer_than_the_key_value_heads_is_split_in_two():
    found = server("three-layers", (1, 16), True)
    assert dict(found.mesh.shape) == {"data": 1, "model": 8, "replica": 2}
    attention = "transformer/decoder_layer/multi_head_attention/"

    def parts(name, scales=False):
        weight = found.params[name]["w"]
        array = weight.scales if scales else weight.weight
        return array.size // array.addressable_shards[0].data.size

    assert parts(attention + "key") == parts(attention + "value") == 8
    assert parts(attention + "query") == parts(attention + "linear") == 16
    assert parts("transformer/decoder_layer/moe/linear_1") == 16
    # Eight groups of scales: one for each pair of devices.
    assert parts(attention + "linear", scales=True) == 8
    assert parts("transformer/decoder_layer/moe/linear_1", scales=True) == 8


@pytest.mark.parametrize(
    ("heads", "model", "experts"),
    [
        pytest.param(heads, model, experts, marks=marks)
        for heads, model, experts, marks in (
            ((6, 6), 3, 1, ()),
            ((16, 4), 8, 4, ()),
            ((6, 6), 3, 4, pytest.mark.exhaustive),
            ((16, 4), 8, 1, pytest.mark.exhaustive),
            ((16, 4), 16, 4, pytest.mark.exhaustive),
            ((16, 4), 16, 1, pytest.mark.exhaustive),
        )
    ],
)
def test_groups_of_scales_need_not_be_those_of_the_mesh(heads, model, experts):
    """Eight groups on three devices, or on four pairs, or on four times four."""
    queries, keys = heads
    transformer = TransformerConfig(
        emb_size=48,
        key_size=8,
        num_q_heads=queries,
        num_kv_heads=keys,
        num_layers=2,
        widening_factor=6,  # F = 192
        num_experts=experts,
        num_selected_experts=min(experts, 2),
    )
    config = LanguageModelConfig(
        transformer, vocab_size=48, sequence_len=16, fprop_dtype=jnp.float32
    )
    tokens = np.arange(1, 17).reshape(1, 16)

    def logits(sizes):
        found = InferenceRunner(
            "random", ModelRunner(config, 1 / sizes[1], None), None, None, sizes, pad_sizes=(16,)
        )
        found.initialize()
        return found.logits(tokens)

    assert golden.relative_error(logits((1, model)), logits((1, 1))).max() <= 1e-5


@pytest.mark.parametrize("name", golden.NAMES)
def test_safetensors_and_back_compute_the_same_from_the_same_bytes(name, tmp_path):
    first, second = tmp_path / "safetensors", tmp_path / "released"
    checkpoint.convert(golden.DIRECTORY / name, first, forms.SAFETENSORS)
    checkpoint.convert(first, second, forms.RELEASED)
    originals = sorted((golden.DIRECTORY / name / "ckpt-0").iterdir())
    assert [path.name for path in sorted((second / "ckpt-0").iterdir())] == [
        path.name for path in originals
    ]
    for path in originals:
        assert (second / "ckpt-0" / path.name).read_bytes() == path.read_bytes()
    plain = server(name).params
    for directory in (first, second):
        for got, expected in zip(
            jax.tree.leaves(server(name, directory=directory).params),
            jax.tree.leaves(plain),
            strict=True,
        ):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
    if name == "three-layers":
        logits, tokens = answers(name)
        got, got_tokens = answers(name, (1, 8), directory=first)
        assert golden.relative_error(got, logits)[golden.recorded(name).real].max() <= 1e-5
        assert got_tokens == tokens
