"""Released checkpoints load to the last bit; damaged ones are refused in one sentence."""

import json
import os
import pathlib
import pickle
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import checkpoint
import golden
import reference
from checkpoint import CheckpointError
from commands import changed
from grok1.formats import atomic, layout, pickle_file
from grok1.ops.quantization import QuantizedWeight8bit
from grok1.parallel.sharding import make_mesh
from model import LanguageModelConfig, grok_1
from paths import DATA
from runner import load_model
from small import (
    LAYER,
    Damage,
    assert_same,
    edited,
    random_params,
    refusal,
    replaced_by,
    stacked,
    tiny_shapes,
)

TWELVE_LAYERS = golden.DIRECTORY / "twelve-layers"


def struct(*shape: int, dtype: Any = jnp.int8) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


# Reading and writing.


def test_golden_model_loads_and_saves_the_same_bytes(tmp_path: pathlib.Path) -> None:
    config = checkpoint.read_config(TWELVE_LAYERS)
    shapes = LanguageModelConfig.from_dict(config).param_shapes()
    params = checkpoint.load(TWELVE_LAYERS, shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    checkpoint.write(tmp_path, params, config)
    paths = sorted((TWELVE_LAYERS / "ckpt-0").iterdir())
    records = checkpoint.files(shapes)
    assert [record.file for record in records] == [path.name for path in paths]
    assert len(os.listdir(tmp_path / "ckpt-0")) == len(paths)
    for record, path in zip(records, paths, strict=True):
        arrays = jax.tree.leaves(params[record.module][record.param])
        assert record.size == path.stat().st_size
        for array, stored in zip(arrays, reference.load_arrays(path), strict=True):
            own = array if record.layer is None else array[record.layer]
            assert own.dtype == stored.dtype
            np.testing.assert_array_equal(np.asarray(own), stored)
        assert (tmp_path / "ckpt-0" / path.name).read_bytes() == path.read_bytes(), path.name
    expected = (TWELVE_LAYERS / "config.json").read_bytes()
    assert (tmp_path / "config.json").read_bytes() == expected


def test_all_files_of_grok_1_are_as_released() -> None:
    """Every name, dtype, shape and size; layers are in the order 0, 1, 10, 11, ..., 2, 20, ..."""
    rows = (DATA / "grok1_tensors.tsv").read_text().splitlines()[1:]
    records = checkpoint.files(grok_1().param_shapes())
    assert len(records) == len(rows) == 770
    for record, row in zip(records, rows, strict=True):
        weight, *scales = jax.tree.leaves(record.leaf)
        texts = ["x".join(map(str, array.shape)) for array in (weight, *scales)]
        assert all(array.dtype == jnp.bfloat16 for array in scales)
        assert row.split("\t") == [
            record.file, record.name, weight.dtype.name, texts[0], *(texts[1:] or ["-"]),
            str(record.size),
        ]  # fmt: skip
        assert record.layer is None or f"layer_{record.layer}/" in record.name
    assert sum(record.size for record in records) == 318_239_886_140


def test_other_files_and_links_to_tensors_are_accepted(
    tiny_checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    add("README.md", ".gitattributes", "tensor00001_000.incomplete")(tmp_path)
    path = tmp_path / "ckpt-0/tensor00002_000"
    path.rename(tmp_path / "blob")  # as download caches store it
    path.symlink_to(tmp_path / "blob")
    assert_same(checkpoint.load(tmp_path, tiny_shapes()), random_params(tiny_shapes()))


def test_loading_runs_no_pickle(
    tiny_checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was run")

    for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
        monkeypatch.setattr(pickle, name, run)
    assert_same(checkpoint.load(tiny_checkpoint, tiny_shapes()), random_params(tiny_shapes()))


def test_a_config_replaced_while_loading_is_noticed(tmp_path: pathlib.Path) -> None:
    """A save may finish between reading config.json and the tensor files."""
    shutil.copytree(golden.DIRECTORY / "three-layers", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["output_multiplier_scale"] *= 2

    def save(*_: int) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(
        CheckpointError, match="config.json: expected the configuration from before"
    ):
        load_model(tmp_path, kernels=False, progress=save)


def test_a_save_begun_while_reading_headers_is_noticed(
    tiny_checkpoint: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have replaced some of the files, and be interrupted."""
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    read = layout._read_header

    def begin(*arguments: Any) -> Any:
        (tmp_path / ".saving").touch()
        return read(*arguments)

    monkeypatch.setattr(layout, "_read_header", begin)
    with pytest.raises(CheckpointError, match="got an incomplete one"):
        checkpoint.check_files(tmp_path, tiny_shapes())


# Arguments.


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"m": {"p": struct(2, dtype=jnp.complex64)}}, "m/p: expected numbers"),
        ({"m": {"p": struct(1 << 31)}}, "axes of 1 to 2"),
        ({"m": {"p": struct(2, 0)}}, r"axes of 1 to .*got int8 \[2, 0\]"),
        (
            {"m": {"p": QuantizedWeight8bit(struct(2, 2), struct(1, 2))}},
            "m/p: expected numbers, or int8 with bfloat16 scales",
        ),
        (
            {LAYER + "a": {"p": stacked(2, 4)}, LAYER + "b": {"p": stacked(3, 4)}},
            r"expected the same number of layers in each, got \[2, 3\]",
        ),
    ],
    ids=["complex", "too-long", "empty", "scales-of-int8", "layers-differ"],
)
def test_shapes_that_the_layout_does_not_support(shapes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.files(shapes)


def test_dtypes_and_shardings_must_fit_the_shapes(tmp_path: pathlib.Path) -> None:
    shapes = tiny_shapes()
    for name in ("no/such", f"{LAYER}moe/linear_1/w"):
        with pytest.raises(ValueError, match=f"float parameters, got '{name}'"):
            checkpoint.load(tmp_path, shapes, dtypes={name: jnp.bfloat16})
    split = NamedSharding(make_mesh((1, 2)), PartitionSpec("model"))
    with pytest.raises(ValueError, match="leaves all 2 layers on each device, got one .* 1"):
        checkpoint.load(tmp_path, shapes, jax.tree.map(lambda _: split, shapes))


# Damaged and hostile files.


FLOATS, INTS = 4, 2  # the files of a float parameter and of an int8 one


def holding(*arrays: np.ndarray) -> Damage:
    """Replace the file by one of this array, or of this weight and its scales."""
    leaf: Any = QuantizedWeight8bit(*arrays) if len(arrays) == 2 else arrays[0]
    return lambda path: path.write_bytes(b"".join(pickle_file.contents(leaf, arrays)))


def floats(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


# fmt: off
WEIGHT, SCALES = np.ones((2, 16, 8), np.int8), floats(2, 8, 8, dtype=ml_dtypes.bfloat16)

# id -> (file, damage, part of the message)
FILE_CASES: dict[str, tuple[int, Damage, str]] = {
    "empty": (INTS, edited(lambda _: b""),
              "the file is cut: expected 814 bytes, got 0; download it again"),
    "cut-by-a-byte": (INTS, edited(lambda good: good[:-1]), "cut: expected 814 bytes, got 813;"),
    "long-by-a-byte": (INTS, edited(lambda good: good + b"\0"),
                       "the file is too long: expected 814 bytes, got 815; download it again"),
    "wrong-length": (FLOATS, edited(lambda good: good.replace(b"C\x40", b"C\xff")),
                     "the file ends too early: expected 255 more bytes after byte"),
    "hostile": (FLOATS, edited(lambda _: pickle.dumps(print, protocol=4)),
                "got 'builtins.print'; download it again"),
    # Not a file.
    "directory": (INTS, replaced_by(pathlib.Path.mkdir), "it is not a regular file"),
    "pipe": (INTS, replaced_by(os.mkfifo), "it is not a regular file"),
    "dangling-link": (INTS, replaced_by(lambda path: path.symlink_to("gone")),
                      "expected a readable file of 814 bytes, got an error (No such file or"),
    # Another array.
    "float64": (FLOATS, holding(floats(8, 2, dtype=np.float64)),
                "expected float32 [8, 2], got float64 [8, 2]; check that config.json"),
    "transposed": (FLOATS, holding(floats(2, 8)), "got float32 [2, 8]"),
    "int8-alone": (INTS, holding(WEIGHT),
                   "expected quantized int8 [2, 16, 8] with scales bfloat16 [2, 8, 8], got int8"),
    "float-for-int8": (INTS, holding(floats(2, 16, 8)),
                       "got float32 [2, 16, 8]; it is not quantized: save all files"),
    "int8-for-float": (FLOATS, holding(WEIGHT, SCALES), "; it is quantized: save all files"),
    "one-group": (INTS, holding(WEIGHT, SCALES[:, :1]),
                  "got quantized int8 [2, 16, 8] with scales bfloat16 [2, 1, 8]"),
    "big-endian": (FLOATS, edited(lambda good: good.replace(b"\x8c\x01<", b"\x8c\x01>")),
                   "got big-endian float32 [8, 2]; save it again, little-endian and in C order"),
}
# fmt: on


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("tiny")
    checkpoint.write(directory, random_params(tiny_shapes()))
    return directory


@pytest.fixture
def copy(tiny_checkpoint: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.mark.parametrize(("index", "damage", "part"), FILE_CASES.values(), ids=FILE_CASES)
def test_damaged_files_are_refused_in_one_sentence(
    index: int, damage: Damage, part: str, copy: pathlib.Path
) -> None:
    path = copy / f"ckpt-0/tensor{index:05d}_000"
    damage(path)
    message = refusal(copy)
    name = {FLOATS: "router/w", INTS: "moe/linear_1/w"}[index]
    assert message.startswith(f"{path} (transformer/decoder_layer_0/{name}): ")
    assert part in message


def test_shapes_in_does_not_take_an_unsupported_type(copy: pathlib.Path) -> None:
    """Otherwise the check of the files would find the type that it expects."""
    index, damage, _ = FILE_CASES["float64"]
    damage(copy / f"ckpt-0/tensor{index:05d}_000")
    assert layout.shapes_in(copy, tiny_shapes()) == tiny_shapes()


def test_a_file_without_permission_is_named(
    tiny_checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, mode: str, **how: Any) -> Any:
        if path.endswith("tensor00003_000"):
            raise PermissionError(13, "Permission denied")
        return open(path, mode, **how)

    monkeypatch.setattr(atomic, "open", refuse, raising=False)  # root may open every file
    message = refusal(tiny_checkpoint)
    assert "tensor00003_000 (transformer/decoder_layer_0/rms_norm/scale): expected a rea" in message
    assert "got an error (Permission denied); check its permissions" in message


def remove(*names: str) -> Damage:
    def damage(directory: pathlib.Path) -> None:
        for name in names:
            (directory / "ckpt-0" / name).unlink()

    return damage


def add(*names: str) -> Damage:
    def damage(directory: pathlib.Path) -> None:
        for name in names:
            (directory / "ckpt-0" / name).touch()

    return damage


# fmt: off
DIRECTORY_CASES: dict[str, tuple[Damage, str]] = {
    "no-directory": (shutil.rmtree,
     "ckpt-0: expected a directory of 8 tensor files, got an error (No such file or directory); "
     "give the directory that contains ckpt-0"),
    "one-missing": (remove("tensor00003_000"),
     "tensor00003_000 (transformer/decoder_layer_0/rms_norm/scale): the file is missing: "
     "expected 8 tensor files, got 7; download it again"),
    "all-missing": (remove(*(f"tensor0000{i}_000" for i in range(8))),
     "tensor00000_000 (language_model/in_out_embed/embeddings): the file is missing: "
     "expected 8 tensor files, got 0; download it again"),
    "one-extra": (add("tensor00008_000"),
     "tensor00008_000: the file belongs to no parameter of the model: expected 8 tensor files, "
     "got 9; remove it, or correct the configuration"),
    "second-shard": (add("tensor00003_001"), "tensor00003_001: the file belongs to no parameter"),
    "renamed": (lambda d: (d / "ckpt-0/tensor00003_000").rename(d / "ckpt-0/tensor3_000"),
     "the file is missing: expected 8 tensor files, got 8"),
    "fewer-layers": (remove(*(f"tensor0000{i}_000" for i in (5, 6, 7))),
     "ckpt-0: expected 8 tensor files (2 layers), got 5 (1 layers); correct the number of"),
    "more-layers": (add("tensor00008_000", "tensor00009_000", "tensor00010_000"),
     "ckpt-0: expected 8 tensor files (2 layers), got 11 (3 layers); correct the number of"),
}
# fmt: on


@pytest.mark.parametrize(("damage", "part"), DIRECTORY_CASES.values(), ids=DIRECTORY_CASES)
def test_missing_and_extra_files_are_refused(damage: Damage, part: str, copy: pathlib.Path) -> None:
    damage(copy)
    message = refusal(copy)
    assert message.startswith(str(copy))
    assert part in message


# The configuration.


def test_config_is_a_dict_or_none(tmp_path: pathlib.Path) -> None:
    assert checkpoint.read_config(tmp_path) is None
    checkpoint.write(tmp_path, random_params(tiny_shapes()), {"model": {"num_layers": 2}})
    assert checkpoint.read_config(tmp_path) == {"model": {"num_layers": 2}}


# fmt: off
@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b'{"a": 1', "expected valid JSON"),
        (b'{"a": NaN}', "got an error (NaN is not a JSON number)"),
        (b"[1, 2]", "expected a JSON object, got a list"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "at most 1048576 bytes of JSON, got more"),
        (None, "got an error (it is not a regular file)"),
    ],
    ids=["cut", "nan", "list", "huge", "directory"],
)
# fmt: on
def test_invalid_configs_are_refused_in_one_sentence(
    content: bytes | None, part: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "config.json"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read_config(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{path}: expected ")
    assert part in message and "\n" not in message


def test_a_billion_layers_are_refused_at_once(tmp_path: pathlib.Path) -> None:
    """Listing their names would take all memory."""
    directory = changed(TWELVE_LAYERS, tmp_path / "huge")
    fields = json.loads((directory / "config.json").read_text())
    fields["model"]["num_layers"] = 10**9
    (directory / "config.json").write_text(json.dumps(fields))
    began = time.perf_counter()
    for use in (checkpoint.verify, load_model):
        with pytest.raises(ValueError, match="config.json: num_layers: expected an integer <= "):
            use(directory)
    assert time.perf_counter() - began < 1
