"""Checkpoints of floats: what is saved is loaded again, in every type that it may have."""

import dataclasses
import json
import pathlib

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoint
from commands import CONFIG
from runner import load_model

TOKENS = [[5, 6, 7, 8]]
SHORT = dataclasses.replace(CONFIG, sequence_len=16, vocab_size=64, fprop_dtype=jnp.float32)


@pytest.fixture(scope="module")
def params() -> dict:
    """Float parameters, of matrices that int8 holds exactly."""
    return SHORT.dequantize_params(SHORT.init_params(0, quantized=True))


def logits_of(params: dict) -> np.ndarray:
    model = hk.without_apply_rng(hk.transform(lambda tokens: SHORT.make()(tokens)))
    return np.asarray(jax.jit(model.apply)(params, jnp.array(TOKENS)).logits)


@pytest.mark.parametrize("form", ["released", "safetensors"])
def test_float_parameters_load_again(form: str, params: dict, tmp_path: pathlib.Path) -> None:
    directory = tmp_path / "saved"
    checkpoint.save(directory, params, SHORT)
    if form == "safetensors":
        checkpoint.convert(directory, tmp_path / "safe", form)
        directory = tmp_path / "safe"
        assert checkpoint.verify(directory)[1] == []
    model = load_model(directory, pad_sizes=(16,), dtype="float32")
    same = jax.tree.map(np.array_equal, params, model.params)
    assert jax.tree.all(same)
    np.testing.assert_allclose(model.logits(TOKENS), logits_of(params), atol=1e-5)
    assert len(model.generate([5, 6], max_len=4, ignore_eos=True).token_ids) == 4


def test_floats_and_int8_are_one_model(params: dict, tmp_path: pathlib.Path) -> None:
    quantized = SHORT.quantize_params(params)
    back = SHORT.dequantize_params(quantized)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-2)
    checkpoint.save(tmp_path, quantized, SHORT)
    model = load_model(tmp_path, pad_sizes=(16,), dtype="float32")
    np.testing.assert_allclose(model.logits(TOKENS), logits_of(back), atol=1e-4)
    bfloat16 = SHORT.dequantize_params(quantized, jnp.bfloat16)
    matrix = bfloat16["transformer/decoder_layer/moe/linear"]["w"]
    assert matrix.dtype == jnp.bfloat16


def test_what_a_bfloat16_model_holds_loads_again(params: dict, tmp_path: pathlib.Path) -> None:
    """Its embeddings are bfloat16, which the released form does not have."""
    checkpoint.save(tmp_path / "one", SHORT.quantize_params(params), SHORT)
    model = load_model(tmp_path / "one", pad_sizes=(16,), dtype="bfloat16")
    checkpoint.save(tmp_path / "two", model.params, SHORT)
    again = load_model(tmp_path / "two", pad_sizes=(16,), dtype="bfloat16")
    assert jax.tree.all(jax.tree.map(np.array_equal, model.params, again.params))
    np.testing.assert_array_equal(model.logits(TOKENS), again.logits(TOKENS))


def test_a_mixture_of_types_is_refused(params: dict, tmp_path: pathlib.Path) -> None:
    checkpoint.save(tmp_path, params, SHORT)
    checkpoint.save(tmp_path / "int8", SHORT.quantize_params(params), SHORT)
    (name,) = (f.file for f in checkpoint.files(params) if f.name.endswith("_1/moe/linear/w"))
    file = tmp_path / "ckpt-0" / name
    file.write_bytes((tmp_path / "int8" / "ckpt-0" / file.name).read_bytes())
    with pytest.raises(checkpoint.CheckpointError, match="it is quantized: save all files"):
        load_model(tmp_path)


def test_parameters_are_saved_with_their_configuration(
    params: dict, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(
        ValueError, match="got .*; give the configuration .* without one they are G"
    ):
        checkpoint.save(tmp_path, params)
    with pytest.raises(ValueError, match="embeddings: expected .4096, 64., got .64, 64.; give the"):
        checkpoint.save(tmp_path, params, CONFIG)
    checkpoint.save(tmp_path, params, SHORT.to_dict())  # its fields are as good
    assert checkpoint.read_model_config(tmp_path).to_dict() == SHORT.to_dict()


def test_what_could_not_be_loaded_is_not_saved(params: dict, tmp_path: pathlib.Path) -> None:
    module, other = "language_model/rms_norm", "transformer/decoder_layer/rms_norm"
    for wrong, message in (
        (np.ones(SHORT.model.emb_size, np.int32), "rms_norm/scale: expected int8 .*got 'int32'"),
        ([1.0], "rms_norm/scale: expected int8 with scales, or an array of float32, .*'list'"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.save(tmp_path, params | {module: {"scale": wrong}}, SHORT)
    for tree, config, message in (
        (None, SHORT, "params: expected a dict {module: {param: array}}, got None"),
        (
            params | {other: 5},
            SHORT,
            "decoder_layer/rms_norm'.: expected a dict .module: .param: a",
        ),
        (params, 5, "config: expected a LanguageModelConfig, its fields, or None, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.save(tmp_path, tree, config)
    assert not any(tmp_path.iterdir())
    with pytest.raises(ValueError, match="linear/w: expected floats, got 'int8 already'"):
        SHORT.quantize_params(SHORT.quantize_params(params))


def test_a_configuration_of_another_program_is_kept(params: dict, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"of": "another program"}')
    with pytest.raises(ValueError, match="config.json: expected no file, or that of a checkpoint,"):
        checkpoint.save(tmp_path, params, SHORT)
    assert [*tmp_path.iterdir()] == [file]
    file.write_text(json.dumps(SHORT.to_dict()))
    checkpoint.save(tmp_path, params, SHORT)
    changed = dataclasses.replace(SHORT, eos_token=5)
    checkpoint.save(tmp_path, params, changed)  # the checkpoint is replaced as a whole
    assert checkpoint.read_model_config(tmp_path).eos_token == 5
