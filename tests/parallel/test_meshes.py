"""A model gives the same answers on every mesh."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

import golden
from model import LanguageModelConfig, TransformerConfig
from runner import InferenceRunner, ModelRunner, Request

MESHES = [
    (data, model)
    for data in (1, 2, 4, 8, 16)
    for model in (1, 2, 4, 8, 16)
    if 1 < data * model <= 16
]
# Also with activations that are not split over the model axis, as the golden models' are.
WHOLE = [("three-layers", mesh) for mesh in ((1, 8), (2, 4), (2, 8), (1, 16))]


def serve(config, sizes, directory=None):
    """Return a runner with four slots, or one for each part of the data axis."""
    runner = ModelRunner(config, 4 / (sizes[0] * sizes[1]), directory)
    server = InferenceRunner("test", runner, None, None, sizes, pad_sizes=(16,))
    server.initialize()
    return server


def parts(array):
    """The number of different parts of an array on its devices."""
    return array.size // array.addressable_shards[0].data.size


# Random models with eight groups of scales.


def random_config(query_heads, key_value_heads, experts, sharded=False):
    transformer = TransformerConfig(
        emb_size=48,
        key_size=8,
        num_q_heads=query_heads,
        num_kv_heads=key_value_heads,
        num_layers=2,
        widening_factor=6,  # F = 192
        num_experts=experts,
        num_selected_experts=min(experts, 2),
        shard_activations=sharded,
    )
    return LanguageModelConfig(transformer, vocab_size=48, sequence_len=32, fprop_dtype=jnp.float32)


def test_answers_on_all_mesh_axes_equal_one_device():
    """The axes data, model and replica: two devices share each key/value head.

    The samples of the last prompt are in both parts of the data axis, which copy its cache.
    """
    config = random_config(16, 4, 4, sharded=True)
    scored = {"ignore_eos": True, "prompt_logprobs": True, "top_logprobs": 3}
    requests = [
        Request([9, 8, 7], max_len=3, **scored),
        Request([40, 30], max_len=3, **scored),
        Request([*range(3, 24)], num_samples=6, max_len=4, **scored),
    ]
    expected = serve(config, (1, 1)).generate(requests)
    server = serve(config, (2, 8))
    found, alone = server.generate(requests), server.generate(requests[:1])
    assert [answer.token_ids for answer in found] == [answer.token_ids for answer in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=2e-5)
        scores = one.prompt_logprobs[1:], other.prompt_logprobs[1:]
        np.testing.assert_allclose(*scores, rtol=0, atol=2e-5)
        for top in zip(one.prompt_top_logprobs[1:], other.prompt_top_logprobs[1:], strict=True):
            assert [token for token, _ in top[0]] == [token for token, _ in top[1]]
            np.testing.assert_allclose(*top, rtol=0, atol=2e-5)
    assert alone == found[:1]  # bit for bit
    assert dict(server.mesh.shape) == {"data": 2, "model": 4, "replica": 2}
    assert parts(server.params["transformer/decoder_layer/moe/linear"]["w"].weight) == 8


@pytest.mark.parametrize(
    ("heads", "model", "experts"),
    [
        ((6, 6), 3, 1),
        *(
            pytest.param(*row, marks=pytest.mark.exhaustive)
            for row in [
                ((6, 6), 3, 4),
                ((16, 4), 8, 1),
                ((16, 4), 16, 4),
                ((16, 4), 16, 1),
            ]
        ),
    ],
)
def test_groups_of_scales_need_not_match_the_mesh(heads, model, experts):
    """Eight groups on three devices, or on four pairs, or on four times four."""
    config, tokens = random_config(*heads, experts), np.arange(1, 17).reshape(1, 16)
    expected = serve(config, (1, 1)).logits(tokens)
    assert golden.relative_error(serve(config, (1, model)).logits(tokens), expected).max() <= 1e-5


# The golden models.


def cases():
    """Each mesh that divides the heads of a golden model."""
    for name in golden.NAMES:
        axis_sizes = golden.config(name, "float32").model.model_axis_sizes()
        for mesh in MESHES:
            for sharded in (True, False) if (name, mesh) in WHOLE else (True,):
                if mesh[1] in axis_sizes:
                    yield pytest.param(name, mesh, sharded, id=f"{name}-{mesh}-{sharded}")


@functools.cache
def server(name, sizes=(1, 1), sharded=True):
    """Return a runner of a golden model in float32."""
    config = golden.config(name, "float32")
    model = dataclasses.replace(config.model, shard_activations=sharded)
    return serve(dataclasses.replace(config, model=model), sizes, golden.DIRECTORY / name)


@functools.cache
def answers(name, sizes=(1, 1), sharded=True):
    """Return the logits of the golden tokens, and the greedy tokens after the golden prompts."""
    files, found = golden.recorded(name), server(name, sizes, sharded)
    requests = [Request(entry["prompt"], 0.0, max_len=40) for entry in files.greedy]
    return found.logits(files.tokens), [answer.token_ids for answer in found.generate(requests)]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "sizes", "sharded"), list(cases()))
def test_golden_answers_are_the_same_on_every_mesh(name, sizes, sharded):
    files = golden.recorded(name)
    logits, tokens = answers(name)
    got, got_tokens = answers(name, sizes, sharded)
    assert golden.relative_error(got, logits)[files.real].max() <= 1e-5
    assert got_tokens == tokens
    assert all(len(ids) == 40 or ids[-1] == 2 for ids in tokens)
    weights = server(name, sizes, sharded).params["transformer/decoder_layer/moe/linear"]["w"]
    assert parts(weights.weight) == sizes[1]
