"""Saving: parameters load as they were saved; a failure leaves no mixture of two models."""

import dataclasses
import itertools
import json
import os
import pathlib
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoint
from checkpoint import CheckpointError
from grok1.formats import atomic, forms, pickle_file
from grok1.parallel.sharding import make_mesh, named_shardings, parameter_specs
from model import grok_1
from runner import load_model
from small import assert_same, config_of, random_params, tiny_shapes

CONFIG = dataclasses.replace(config_of(1), fprop_dtype=jnp.float32)


@pytest.fixture(scope="module")
def params() -> dict:
    """Float parameters of a small model."""
    integers = random_params(CONFIG.param_shapes(quantized=False))
    return jax.tree.map(lambda x: np.clip(x, -127, 127) / np.float32(128), integers)


@pytest.fixture(scope="module")
def saved(params: dict, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("saved")
    checkpoint.save(directory, params, CONFIG)
    return directory


def loaded(directory: pathlib.Path) -> Any:
    """The parameters of a checkpoint, in the types that are stored."""
    return checkpoint.load(directory, checkpoint.shapes_in(directory, CONFIG))


# checkpoint.save: the parameters of a model, with its configuration.


def test_float_parameters_load_as_saved_in_both_forms(
    saved: pathlib.Path, params: dict, tmp_path: pathlib.Path
) -> None:
    checkpoint.convert(saved, tmp_path, "safetensors")
    assert checkpoint.verify(tmp_path)[1] == []
    for directory in (saved, tmp_path):
        assert_same(loaded(directory), params)


def test_a_float_checkpoint_computes_its_logits(saved: pathlib.Path, params: dict) -> None:
    tokens = np.array([[5, 6, 7, 8]])
    model = load_model(saved, pad_sizes=(8,), dtype="float32", kernels=False)
    apply = hk.without_apply_rng(hk.transform(lambda tokens: CONFIG.make()(tokens))).apply
    expected = jax.jit(apply)(params, tokens).logits
    assert np.std(expected) > 0.1
    np.testing.assert_allclose(model.logits(tokens), expected, atol=1e-5)


def test_quantize_params_inverts_dequantize_params(params: dict) -> None:
    quantized = CONFIG.quantize_params(params)
    back = CONFIG.dequantize_params(quantized)
    for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(back), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-2)
    bfloat16 = CONFIG.dequantize_params(quantized, jnp.bfloat16)
    assert bfloat16["transformer/decoder_layer/moe/linear"]["w"].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="linear/w: expected floats, got integers"):
        CONFIG.quantize_params(quantized)


def test_bfloat16_embeddings_load_as_saved(params: dict, tmp_path: pathlib.Path) -> None:
    """A model of bfloat16 activations has them; the released form has float32 only."""
    embedding = "language_model/in_out_embed"
    table = params[embedding]["embeddings"].astype(jnp.bfloat16)
    changed = CONFIG.quantize_params(params) | {embedding: {"embeddings": table}}
    checkpoint.save(tmp_path, changed, CONFIG.to_dict())
    assert_same(loaded(tmp_path), changed)
    assert checkpoint.read_model_config(tmp_path).to_dict() == CONFIG.to_dict()


def test_save_refuses_what_load_would(params: dict, tmp_path: pathlib.Path) -> None:
    norm, other = "language_model/rms_norm", "transformer/decoder_layer/rms_norm"
    integers = np.ones(CONFIG.model.emb_size, np.int32)
    for tree, config, message in (
        (params, None, "got .*; give the configuration .* without one they are Grok-1's"),
        (params, grok_1(), "embeddings: expected .131072, 6144., got .32, 8.; give the config"),
        (params, 5, "config: expected a LanguageModelConfig, its fields, or None, got 5"),
        (None, CONFIG, "params: expected a dict {module: {param: array}}, got None"),
        (params | {other: 5}, CONFIG, "decoder_layer/rms_norm'.: expected a dict .module: .param"),
        (
            params | {norm: {"scale": integers}},
            CONFIG,
            "rms_norm/scale: expected int8 with scales, or an array of float32, .*got 'int32'",
        ),
        (params | {norm: {"scale": [1.0]}}, CONFIG, "rms_norm/scale: expected int8 .*got.*'list'"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.save(tmp_path, tree, config)
    assert not any(tmp_path.iterdir())


def test_save_keeps_a_config_of_another_program(params: dict, tmp_path: pathlib.Path) -> None:
    file = tmp_path / "config.json"
    file.write_text('{"of": "another program"}')
    with pytest.raises(ValueError, match="config.json: expected no file, or that of a checkpoint,"):
        checkpoint.save(tmp_path, params, CONFIG)
    assert [*tmp_path.iterdir()] == [file]
    file.write_text(json.dumps(CONFIG.to_dict()))
    checkpoint.save(tmp_path, params, CONFIG)
    changed = dataclasses.replace(CONFIG, eos_token=5)
    checkpoint.save(tmp_path, params, changed)  # replaces the checkpoint as a whole
    assert checkpoint.read_model_config(tmp_path).eos_token == 5


# checkpoint.write: any parameters.


def files_of(directory: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "ckpt-0").iterdir()}


def test_files_are_independent_of_device_and_layout(tmp_path: pathlib.Path) -> None:
    params = random_params(tiny_shapes())

    def strange(array: np.ndarray) -> np.ndarray:
        return np.asfortranarray(array.astype(array.dtype.newbyteorder(">")))

    specs = parameter_specs(params, grok_1().partition_rules())
    shardings = named_shardings(specs, make_mesh((1, 2)))
    for name, variant in (
        ("plain", params),
        ("device", jax.tree.map(jnp.asarray, params)),
        ("strange", jax.tree.map(strange, params)),
        ("sharded", jax.device_put(params, shardings)),
    ):
        checkpoint.write(tmp_path / name, variant)
        assert files_of(tmp_path / name) == files_of(tmp_path / "plain"), name


def test_a_checkpoint_is_replaced_only_as_a_whole(tmp_path: pathlib.Path) -> None:
    checkpoint.write(tmp_path, random_params(tiny_shapes(layers=3), seed=1))
    before = files_of(tmp_path)
    for smaller, message in (
        (
            random_params(tiny_shapes(), seed=2),
            "tensor00008_000: expected only .* got 3 that would",
        ),
        ({}, "expected parameters to save, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.write(tmp_path, smaller)
    assert files_of(tmp_path) == before
    (tmp_path / "ckpt-0/README.md").write_text("not a tensor")
    again = random_params(tiny_shapes(layers=3), seed=3)
    checkpoint.write(tmp_path, again)
    assert_same(checkpoint.load(tmp_path, tiny_shapes(layers=3)), again)


def test_a_save_leaves_no_index_of_another_form(tmp_path: pathlib.Path) -> None:
    (tmp_path / forms.INDEX).touch()
    with pytest.raises(CheckpointError, match="index.json: expected no checkpoint in another form"):
        checkpoint.write(tmp_path, random_params(tiny_shapes()))
    assert os.listdir(tmp_path) == [forms.INDEX]


def full_disk(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_a_save_that_fails_leaves_the_old_file_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write(tmp_path, random_params(tiny_shapes(), seed=1))
    before, fill = files_of(tmp_path), atomic.fill

    def fill_little(path: str, contents: Any) -> None:
        fill(path, contents)
        if "tensor" in path:
            full_disk()

    for name, value in (("fill", fill_little), ("_sync", full_disk)):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(atomic, name, value)
            checkpoint.write(tmp_path, random_params(tiny_shapes(), seed=2))
        assert files_of(tmp_path) == before
        assert_same(checkpoint.load(tmp_path, tiny_shapes()), random_params(tiny_shapes(), seed=1))


def test_interrupted_save_is_not_loaded_as_two_models(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file is valid, but one array would have layers of both models."""
    first, second = (random_params(tiny_shapes(), seed=seed) for seed in (1, 2))
    checkpoint.write(tmp_path, first)
    placed, place = itertools.count(), atomic.place

    def interrupt(temporary: str, path: str) -> None:
        if path.endswith("_000") and next(placed) == 1:
            raise KeyboardInterrupt
        place(temporary, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "place", interrupt)
        checkpoint.write(tmp_path, second)
    for read in (
        lambda: checkpoint.load(tmp_path, tiny_shapes()),
        lambda: checkpoint.convert(tmp_path, tmp_path / "other", "safetensors"),
        lambda: checkpoint.verify(tmp_path),
        lambda: checkpoint.read_model_config(tmp_path),
    ):
        with pytest.raises(CheckpointError, match="got an incomplete one .*; save it again: files"):
            read()
    # A save that fails before its first file changes nothing: it is still a mixture.
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(pickle_file, "contents", full_disk)
        checkpoint.write(tmp_path, second)
    with pytest.raises(CheckpointError, match="got an incomplete one"):
        checkpoint.load(tmp_path, tiny_shapes())
    checkpoint.write(tmp_path, second, {})
    assert_same(checkpoint.load(tmp_path, tiny_shapes()), second)
    assert sorted(os.listdir(tmp_path)) == ["ckpt-0", "config.json"]


@pytest.mark.parametrize(
    "name",
    ["ckpt-0", "ckpt-0/tensor00005_000", "ckpt-0/.tensor00005_000.partial", "config.json"],
)
def test_a_save_follows_no_symbolic_link(name: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "others").mkdir()
    (tmp_path / "others/file").write_bytes(b"of somebody else")
    link = tmp_path / "saved" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(tmp_path / ("others" if name == "ckpt-0" else "others/file"))
    with pytest.raises(OSError, match=f"it is a link, which is not followed: '{link}'"):
        checkpoint.write(tmp_path / "saved", random_params(tiny_shapes()), {})
    files = {path.name: path.read_bytes() for path in (tmp_path / "others").iterdir()}
    assert files == {"file": b"of somebody else"}
    assert set(os.listdir(tmp_path / "saved")) <= {"ckpt-0", "config.json", ".saving"}


def test_a_save_writes_into_no_hard_link(tmp_path: pathlib.Path) -> None:
    """A file may have another name elsewhere, where it must not change."""
    (tmp_path / "file").write_bytes(b"of somebody else")
    (tmp_path / "ckpt-0").mkdir()
    for name in ("tensor00005_000", ".tensor00005_000.partial"):
        os.link(tmp_path / "file", tmp_path / "ckpt-0" / name)
    checkpoint.write(tmp_path, random_params(tiny_shapes()))
    assert (tmp_path / "file").read_bytes() == b"of somebody else"
