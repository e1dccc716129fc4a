"""Checkpoints are read to the last bit and written as they were; anything else is refused."""

import functools
import itertools
import json
import os
import pathlib
import pickle
import re
import shutil
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import checkpoint
import reference
from checkpoint import CheckpointError
from commands import Command, Result, assert_one_sentence, changed
from grok1.formats import atomic, layout, pickle_file
from grok1.ops.quantization import QuantizedWeight8bit
from grok1.parallel.sharding import named_shardings, parameter_specs
from model import LanguageModelConfig, grok_1
from paths import DATA
from runner import load_server
from small import (
    LAYER,
    Damage,
    assert_same,
    edited,
    random_params,
    replaced_by,
    stacked,
    tiny_shapes,
)

GOLDEN = DATA / "golden"
GOLDEN_NAMES = ("three-layers", "twelve-layers")


# The models that the tests read and write.


@functools.cache
def golden_shapes(name: str) -> dict[str, dict[str, Any]]:
    config = json.loads((GOLDEN / name / "config.json").read_text())
    return LanguageModelConfig.from_dict(config).param_shapes()


# Reading and writing.


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_models_load_as_pickle_reads_them(name: str) -> None:
    shapes = golden_shapes(name)
    params = checkpoint.load(GOLDEN / name, shapes)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    paths = sorted((GOLDEN / name / "ckpt-0").iterdir())
    records = checkpoint.files(shapes)
    assert [record.file for record in records] == [path.name for path in paths]
    for record, path in zip(records, paths, strict=True):
        arrays = jax.tree.leaves(params[record.module][record.param])
        assert record.size == path.stat().st_size
        for array, stored in zip(arrays, reference.load_arrays(path), strict=True):
            own = array if record.layer is None else array[record.layer]
            assert own.dtype == stored.dtype
            np.testing.assert_array_equal(np.asarray(own), stored)


def test_layers_are_read_in_lexicographic_order() -> None:
    """File 26 begins layer 10, not layer 2: in numeric order, all loads and nothing makes sense."""
    params = checkpoint.load(GOLDEN / "twelve-layers", golden_shapes("twelve-layers"))
    for index, layer in ((2, 0), (14, 1), (26, 10), (38, 11), (50, 2), (134, 9)):
        folder = GOLDEN / "twelve-layers/ckpt-0"
        weight, _ = reference.load_arrays(folder / f"tensor{index:05d}_000")
        (norm,) = reference.load_arrays(folder / f"tensor{index + 7:05d}_000")
        np.testing.assert_array_equal(params[LAYER + "moe/linear"]["w"].weight[layer], weight)
        np.testing.assert_array_equal(params[LAYER + "rms_norm"]["scale"][layer], norm)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_saving_a_golden_model_gives_back_its_bytes(name: str, tmp_path: pathlib.Path) -> None:
    params = checkpoint.load(GOLDEN / name, golden_shapes(name))
    checkpoint.write(tmp_path, params, checkpoint.read_config(GOLDEN / name))
    expected = {path.name: path for path in (GOLDEN / name / "ckpt-0").iterdir()}
    assert {path.name for path in (tmp_path / "ckpt-0").iterdir()} == set(expected)
    for file, path in expected.items():
        assert (tmp_path / "ckpt-0" / file).read_bytes() == path.read_bytes(), file
    config = (GOLDEN / name / "config.json").read_bytes()
    assert (tmp_path / "config.json").read_bytes() == config


def test_all_files_of_the_model_are_as_released() -> None:
    """Every name, type, shape, scales shape and size, as the model's own code gives them."""
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
    assert sum(record.size for record in records) == 318_239_886_140


def test_what_is_saved_can_be_unpickled_by_a_program_with_the_class(tmp_path: pathlib.Path) -> None:
    params = random_params(tiny_shapes())
    checkpoint.write(tmp_path, params)
    program = """
import dataclasses, glob, pickle, sys
@dataclasses.dataclass
class QuantizedWeight8bit:
    weight: object
    scales: object
for path in sorted(glob.glob(sys.argv[1] + "/ckpt-0/*")):
    with open(path, "rb") as file:
        value = pickle.loads(file.read())
    both = isinstance(value, QuantizedWeight8bit)
    for array in (value.weight, value.scales) if both else (value,):
        total = float(array.astype("float64").sum())
        print(array.dtype, array.shape, total, array.flags.c_contiguous)
"""
    printed = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    expected = []
    for record in checkpoint.files(tiny_shapes()):
        for array in jax.tree.leaves(params[record.module][record.param]):
            own = array if record.layer is None else array[record.layer]
            expected.append(f"{own.dtype} {own.shape} {own.astype(np.float64).sum()} True")
    assert printed == expected


def test_params_are_saved_alike_from_anywhere_and_in_any_order(tmp_path: pathlib.Path) -> None:
    params = random_params(tiny_shapes())

    def strange(array: np.ndarray) -> np.ndarray:
        return np.asfortranarray(array.astype(array.dtype.newbyteorder(">")))

    specs = parameter_specs(params, grok_1().partition_rules())
    shardings = named_shardings(specs, mesh_of(1, 2))
    for name, variant in (
        ("plain", params),
        ("device", jax.tree.map(jnp.asarray, params)),
        ("strange", jax.tree.map(strange, params)),
        ("sharded", jax.device_put(params, shardings)),
    ):
        checkpoint.write(tmp_path / name, variant)
        for path in (tmp_path / "plain/ckpt-0").iterdir():
            written = (tmp_path / name / "ckpt-0" / path.name).read_bytes()
            assert written == path.read_bytes(), (name, path.name)


def test_saving_replaces_a_checkpoint_but_leaves_nothing_over(tmp_path: pathlib.Path) -> None:
    checkpoint.write(tmp_path, random_params(tiny_shapes(layers=3), seed=1))
    before = {path: path.read_bytes() for path in (tmp_path / "ckpt-0").iterdir()}
    smaller = random_params(tiny_shapes(layers=2), seed=2)
    with pytest.raises(CheckpointError, match="tensor00008_000: expected only .* got 3 that would"):
        checkpoint.write(tmp_path, smaller)
    assert {path: path.read_bytes() for path in (tmp_path / "ckpt-0").iterdir()} == before
    (tmp_path / "ckpt-0/README.md").write_text("not a tensor")
    again = random_params(tiny_shapes(layers=3), seed=3)
    checkpoint.write(tmp_path, again)
    assert_same(checkpoint.load(tmp_path, tiny_shapes(layers=3)), again)


def test_a_save_that_fails_leaves_the_old_file_whole(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.write(tmp_path, random_params(tiny_shapes(), seed=1))
    before = {path: path.read_bytes() for path in (tmp_path / "ckpt-0").iterdir()}

    def full_disk(_: str) -> None:
        raise OSError(28, "No space left on device")

    fill = atomic.fill

    def fill_little(path: str, contents: Any) -> None:
        fill(path, contents)
        if "tensor" in path:
            raise OSError(28, "No space left on device")

    for name, value in (("fill", fill_little), ("_sync", full_disk)):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(atomic, name, value)
            checkpoint.write(tmp_path, random_params(tiny_shapes(), seed=2))
        assert {path: path.read_bytes() for path in (tmp_path / "ckpt-0").iterdir()} == before
        assert_same(checkpoint.load(tmp_path, tiny_shapes()), random_params(tiny_shapes(), seed=1))


def test_nothing_is_no_checkpoint_to_save(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="expected parameters to save, got none"):
        checkpoint.write(tmp_path, {})
    assert not os.listdir(tmp_path)


def test_weights_go_with_the_configuration_that_was_read(tmp_path: pathlib.Path) -> None:
    """A save may come to its end between the reading of config.json and of the tensor files."""
    shutil.copytree(GOLDEN / "three-layers", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["output_multiplier_scale"] *= 2

    def save(*_: int) -> None:
        (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(
        CheckpointError, match="config.json: expected the configuration from before"
    ):
        load_server(tmp_path, kernels=False, progress=save)
    load_server(tmp_path, kernels=False)


def test_a_save_replaces_no_model_in_the_other_form(tmp_path: pathlib.Path) -> None:
    checkpoint.convert(GOLDEN / "three-layers", tmp_path, "safetensors")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(CheckpointError, match="index.json: expected no checkpoint in another form"):
        checkpoint.write(tmp_path, random_params(tiny_shapes()))
    assert sorted(os.listdir(tmp_path)) == before


def test_a_save_that_begins_while_headers_are_read_is_seen(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has replaced some files before their headers were read, and does not go on."""
    checkpoint.write(tmp_path, random_params(tiny_shapes()))
    read = layout._read_header

    def begin(*arguments: Any) -> Any:
        (tmp_path / ".saving").touch()
        return read(*arguments)

    monkeypatch.setattr(layout, "_read_header", begin)
    with pytest.raises(CheckpointError, match="got one half saved"):
        checkpoint.check_files(tmp_path, tiny_shapes())


def test_two_saves_to_one_place_do_not_mix(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (random_params(tiny_shapes(), seed=seed) for seed in (1, 2))
    write, refused = atomic.write, []

    def meanwhile(*arguments: Any) -> None:
        with monkeypatch.context() as patch, pytest.raises(CheckpointError) as caught:
            patch.setattr(atomic, "write", write)
            checkpoint.write(tmp_path, second)
        refused.append(str(caught.value))
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "write", meanwhile)
        checkpoint.write(tmp_path, first)
    sentence = "expected one save or conversion at a time, got another in progress; wait until"
    assert len(refused) > 7 and all(sentence in error for error in refused)
    assert_same(checkpoint.load(tmp_path, tiny_shapes()), first)


@pytest.mark.parametrize("written", [1, 5, 7])
def test_a_save_that_is_cut_leaves_no_mixture_of_two_models(
    written: int, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers of both would be in one array, and every file as it should be."""
    first, second = (random_params(tiny_shapes(), seed=seed) for seed in (1, 2))
    checkpoint.write(tmp_path, first)
    placed, place = itertools.count(), atomic.place

    def cut(temporary: str, path: str) -> None:
        if path.endswith("_000") and next(placed) == written:
            raise KeyboardInterrupt
        place(temporary, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "place", cut)
        checkpoint.write(tmp_path, second)
    for read in (
        lambda: checkpoint.load(tmp_path, tiny_shapes()),
        lambda: checkpoint.convert(tmp_path, tmp_path / "other", "safetensors"),
        lambda: checkpoint.verify(tmp_path),
        lambda: checkpoint.read_model_config(tmp_path),
    ):
        with pytest.raises(CheckpointError, match="got one half saved .*; save it again: files"):
            read()

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    # A save that fails at once leaves it as it was: a mixture.
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(pickle_file, "contents", full_disk)
        checkpoint.write(tmp_path, second)
    with pytest.raises(CheckpointError, match="got one half saved"):
        checkpoint.load(tmp_path, tiny_shapes())
    checkpoint.write(tmp_path, second, {})
    assert_same(checkpoint.load(tmp_path, tiny_shapes()), second)
    assert sorted(os.listdir(tmp_path)) == ["ckpt-0", "config.json"]


@pytest.mark.parametrize(
    "name",
    ["ckpt-0", "ckpt-0/tensor00005_000", "ckpt-0/.tensor00005_000.partial", "config.json"],
)
def test_saving_follows_no_link(name: str, tmp_path: pathlib.Path) -> None:
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


@pytest.mark.parametrize("name", ["tensor00005_000", ".tensor00005_000.partial"])
def test_saving_writes_into_no_file_of_others(name: str, tmp_path: pathlib.Path) -> None:
    """A file may have another name elsewhere, where it must stay as it is."""
    (tmp_path / "file").write_bytes(b"of somebody else")
    (tmp_path / "ckpt-0").mkdir()
    os.link(tmp_path / "file", tmp_path / "ckpt-0" / name)
    checkpoint.write(tmp_path, random_params(tiny_shapes()))
    assert (tmp_path / "file").read_bytes() == b"of somebody else"


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"m": {"p": jax.ShapeDtypeStruct((2,), jnp.complex64)}}, "m/p: expected numbers"),
        ({"m": {"p": jax.ShapeDtypeStruct((1 << 31,), jnp.int8)}}, "axes of 1 to 2"),
        ({"m": {"p": jax.ShapeDtypeStruct((2, 0), jnp.int8)}}, r"axes of 1 to .*got int8 \[2, 0\]"),
        (
            {"m": {"p": jax.tree.map(lambda _: jax.ShapeDtypeStruct((2, 2), jnp.int8),
                                     stacked(1, 2, 2, groups=1))}},
            "m/p: expected numbers, or int8 with bfloat16 scales",
        ),
        (
            {LAYER + "a": {"p": stacked(2, 4)}, LAYER + "b": {"p": stacked(3, 4)}},
            r"expected the same number of layers in each, got \[2, 3\]",
        ),
    ],
    ids=["complex", "too-long", "empty", "scales-of-int8", "layers-differ"],
)  # fmt: skip
def test_shapes_that_the_layout_has_no_place_for(shapes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.files(shapes)


# Devices.


def mesh_of(data: int, model: int) -> Mesh:
    devices = np.array(jax.devices()[: data * model]).reshape(data, model)
    return Mesh(devices, ("data", "model"))


def test_arguments_that_do_not_fit_the_shapes_are_refused_at_once(tmp_path: pathlib.Path) -> None:
    shapes = tiny_shapes()
    for name in ("no/such", f"{LAYER}moe/linear_1/w"):
        with pytest.raises(ValueError, match=f"float parameters, got '{name}'"):
            checkpoint.load(tmp_path, shapes, dtypes={name: jnp.bfloat16})
    split = NamedSharding(mesh_of(1, 2), PartitionSpec("model"))
    with pytest.raises(ValueError, match="leaves all 2 layers on each device, got one .* 1"):
        checkpoint.load(tmp_path, shapes, jax.tree.map(lambda _: split, shapes))


def test_importing_touches_no_device() -> None:
    program = (
        "import jax; before = dict(jax.config.values); import checkpoint\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert dict(jax.config.values) == before\n"
    )
    root = pathlib.Path(checkpoint.__file__).parent
    subprocess.run([sys.executable, "-W", "error", "-c", program], cwd=root, check=True)


# Damaged and hostile files.


FLOATS, INTS = 4, 2  # The files of a float parameter, and of an int8 one.


def holding(*arrays: np.ndarray) -> Damage:
    """The file holds this array, or this weight and its scales."""
    leaf: Any = QuantizedWeight8bit(*arrays) if len(arrays) == 2 else arrays[0]
    return lambda path: path.write_bytes(b"".join(pickle_file.contents(leaf, arrays)))


def floats(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


# fmt: off
WEIGHT, SCALES = np.ones((2, 16, 8), np.int8), floats(2, 8, 8, dtype=ml_dtypes.bfloat16)

# id -> (file, damage, what the sentence must say)
FILE_CASES: dict[str, tuple[int, Damage, list[str]]] = {
    # Not whole.
    "empty": (INTS, edited(lambda _: b""),
              ["the file is cut: expected 814 bytes, got 0; download it again"]),
    "cut-in-header": (INTS, edited(lambda good: good[:100]), ["cut: expected 814 bytes, got 100;"]),
    "cut-in-weight": (INTS, edited(lambda good: good[:300]), ["cut: expected 814 bytes, got 300;"]),
    "cut-in-scales": (INTS, edited(lambda good: good[:700]), ["cut: expected 814 bytes, got 700;"]),
    "cut-by-a-byte": (INTS, edited(lambda good: good[:-1]), ["cut: expected 814 bytes, got 813;"]),
    # As tensor_file says.
    "long-by-a-byte": (INTS, edited(lambda good: good + b"\0"),
                       ["the file is too long: expected 814 bytes, got 815; download it again"]),
    "html": (INTS, edited(lambda _: b"<html>404</html>"),
             [r"the file is no tensor file: expected b'\x80\x04' at its start, got b'<h'"]),
    "another-axis": (FLOATS, edited(lambda good: good.replace(b"K\x08K\x02", b"K\x09K\x02")),
                     ["the file contradicts itself: expected 72 bytes for its float32 [9, 2]"]),
    "length-that-lies": (FLOATS, edited(lambda good: good.replace(b"C\x40", b"C\xff")),
                         ["the file ends too early: expected 255 more bytes after byte"]),
    "hostile": (FLOATS, edited(lambda _: pickle.dumps(print, protocol=4)),
                ["expected only the globals __main__.Quant", "got 'builtins.print'; download"]),
    # Not a file.
    "directory": (INTS, replaced_by(pathlib.Path.mkdir), ["it is not a regular file"]),
    "pipe": (INTS, replaced_by(os.mkfifo), ["it is not a regular file"]),
    "dangling-link": (INTS, replaced_by(lambda path: path.symlink_to("gone")),
                      ["expected a readable file of 814 bytes, got an error (No such file or"]),
    "link-to-directory": (INTS, replaced_by(lambda path: path.symlink_to(".")),
                          ["it is not a regular file"]),
    "link-to-itself": (INTS, replaced_by(lambda path: path.symlink_to(path.name)),
                       ["Too many levels of symbolic links"]),
    # Another array.
    "float64": (FLOATS, holding(floats(8, 2, dtype=np.float64)),
                ["expected float32 [8, 2], got float64 [8, 2]; check that the configuration"]),
    "float16": (FLOATS, holding(floats(8, 2, dtype=np.float16)), ["got float16 [8, 2]"]),
    "bfloat16": (FLOATS, holding(floats(8, 2, dtype=ml_dtypes.bfloat16)), ["got bfloat16 [8, 2]"]),
    "int8-alone": (INTS, holding(WEIGHT),
                   ["expected quantised int8 [2, 16, 8] with scales bfloat16 [2, 8, 8], got int8"]),
    "float-for-int8": (INTS, holding(floats(2, 16, 8)),
                       ["got float32 [2, 16, 8]; it is not quantized: save all files"]),
    "int8-for-float": (FLOATS, holding(WEIGHT, SCALES),
                       ["expected float32 [8, 2], got quantised", "it is quantized: save all"]),
    "transposed": (FLOATS, holding(floats(2, 8)), ["got float32 [2, 8]"]),
    "flat": (FLOATS, holding(floats(16)), ["got float32 [16]"]),
    "more-rows": (FLOATS, holding(floats(9, 2)), ["got float32 [9, 2]"]),
    "uint8-weight": (INTS, holding(WEIGHT.astype(np.uint8), SCALES), ["got quantised uint8"]),
    "one-group": (INTS, holding(WEIGHT, SCALES[:, :1]),
                  ["got quantised int8 [2, 16, 8] with scales bfloat16 [2, 1, 8]"]),
    "float32-scales": (INTS, holding(WEIGHT, floats(2, 8, 8)), ["with scales float32 [2, 8, 8]"]),
    "fortran": (FLOATS, edited(lambda good: good.replace(b"b\x89C", b"b\x88C")),
                ["got Fortran-ordered float32 [8, 2]; save it again, little-endian and in C"]),
    "fortran-weight": (INTS, edited(lambda good: good.replace(b"b\x89B", b"b\x88B", 1)),
                       ["got quantised Fortran-ordered int8 [2, 16, 8]", "save it again"]),
    "big-endian": (FLOATS, edited(lambda good: good.replace(b"\x8c\x01<", b"\x8c\x01>")),
                   ["got big-endian float32 [8, 2]; save it again, little-endian and in C order"]),
}
# fmt: on


@pytest.fixture(scope="module")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("tiny")
    checkpoint.write(directory, random_params(tiny_shapes()))
    return directory


def refusal(directory: pathlib.Path, shapes: Any = None) -> str:
    """The sentence of the CheckpointError that loading raises, with no device memory taken."""
    before = len(jax.live_arrays())
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(directory, shapes or tiny_shapes())
    assert len(jax.live_arrays()) == before
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+: expected [^\n]+, got [^\n]+; [^\n]+[^.\n]", message), message
    return message


@pytest.mark.parametrize(("index", "damage", "parts"), FILE_CASES.values(), ids=FILE_CASES.keys())
def test_files_that_hold_something_else_are_refused_in_one_sentence(
    index: int,
    damage: Damage,
    parts: list[str],
    tiny_checkpoint: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, directory)
    path = directory / f"ckpt-0/tensor{index:05d}_000"
    damage(path)
    message = refusal(directory)
    name = {FLOATS: "router/w", INTS: "moe/linear_1/w"}[index]
    assert message.startswith(f"{path} (transformer/decoder_layer_0/{name}): ")
    for part in parts:
        assert part in message


def test_loading_runs_no_pickle(
    tiny_checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was run")

    for name in ("load", "loads", "Unpickler", "dump", "dumps", "Pickler"):
        monkeypatch.setattr(pickle, name, run)
    assert_same(checkpoint.load(tiny_checkpoint, tiny_shapes()), random_params(tiny_shapes()))


def test_a_file_without_permission_is_named(
    tiny_checkpoint: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, mode: str, **how: Any) -> Any:
        if path.endswith("tensor00003_000"):
            raise PermissionError(13, "Permission denied")
        return open(path, mode, **how)

    monkeypatch.setattr(atomic, "open", refuse, raising=False)  # Root may open everything.
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


def as_file(directory: pathlib.Path) -> None:
    shutil.rmtree(directory / "ckpt-0")
    (directory / "ckpt-0").write_text("a file")


# fmt: off
DIRECTORY_CASES: dict[str, tuple[Damage, list[str]]] = {
    "no-directory": (shutil.rmtree,
     ["ckpt-0: expected a directory of 8 tensor files, got an error (No such file or directory)",
      "give the directory that contains ckpt-0"]),
    "no-ckpt-0": (lambda d: shutil.rmtree(d / "ckpt-0"), ["ckpt-0: expected a directory of 8"]),
    "ckpt-0-is-a-file": (as_file, ["expected a directory of 8 tensor files", "Not a directory"]),
    "nothing": (remove(*(f"tensor0000{i}_000" for i in range(8))),
     ["tensor00000_000 (language_model/in_out_embed/embeddings): the file is missing: "
      "expected 8 tensor files, got 0; download it again"]),
    "one-missing": (remove("tensor00003_000"),
     ["tensor00003_000 (transformer/decoder_layer_0/rms_norm/scale): the file is missing: "
      "expected 8 tensor files, got 7; download it again"]),
    "three-missing": (remove("tensor00002_000", "tensor00003_000", "tensor00004_000"),
     ["tensor00002_000 (transformer/decoder_layer_0/moe/linear_1/w): the file is missing"]),
    "one-extra": (add("tensor00008_000"),
     ["tensor00008_000: the file belongs to no parameter of the model: expected 8 tensor files, "
      "got 9; remove it, or correct the configuration"]),
    "second-shard": (add("tensor00003_001"), ["tensor00003_001: the file belongs to no parameter"]),
    "renamed": (lambda d: (d / "ckpt-0/tensor00003_000").rename(d / "ckpt-0/tensor3_000"),
     ["tensor00003_000", "the file is missing: expected 8 tensor files, got 8"]),
    "fewer-layers": (remove(*(f"tensor0000{i}_000" for i in (5, 6, 7))),
     ["ckpt-0: expected 8 tensor files (2 layers), got 5 (1 layers); correct the number of"]),
    "more-layers": (add("tensor00008_000", "tensor00009_000", "tensor00010_000"),
     ["ckpt-0: expected 8 tensor files (2 layers), got 11 (3 layers); correct the number of"]),
}
# fmt: on


@pytest.mark.parametrize(("damage", "parts"), DIRECTORY_CASES.values(), ids=DIRECTORY_CASES.keys())
def test_directories_with_other_files_are_refused_in_one_sentence(
    damage: Damage,
    parts: list[str],
    tiny_checkpoint: pathlib.Path,
    tmp_path: pathlib.Path,
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, directory)
    damage(directory)
    message = refusal(directory)
    assert message.startswith(str(directory))
    for part in parts:
        assert part in message


def test_other_files_beside_the_tensors_are_no_matter(
    tiny_checkpoint: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    add("README.md", ".gitattributes", "tensor00001_000.incomplete")(tmp_path)
    path = tmp_path / "ckpt-0/tensor00002_000"
    path.rename(tmp_path / "blob")  # As download caches store it.
    path.symlink_to(tmp_path / "blob")
    assert_same(checkpoint.load(tmp_path, tiny_shapes()), random_params(tiny_shapes()))


# The configuration.


def test_config_is_a_dict_or_none(tmp_path: pathlib.Path) -> None:
    assert checkpoint.read_config(tmp_path) is None
    checkpoint.write(tmp_path, random_params(tiny_shapes()), {"model": {"num_layers": 2}})
    assert checkpoint.read_config(tmp_path) == {"model": {"num_layers": 2}}
    config = checkpoint.read_config(GOLDEN / "three-layers")
    assert config is not None and config["model"]["num_layers"] == 3


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "expected valid JSON"),
        (b"{'a': 1}", "expected valid JSON"),
        (b'{"a": 1', "expected valid JSON"),
        (b'{"a": "\xff"}', "expected valid JSON"),
        (b"[" * 200_000, "expected valid JSON"),
        (b'{"model": {"emb_size": 8, "emb_size": 9}}', "the key 'emb_size' is repeated in an obj"),
        (b'{"output_multiplier_scale": NaN}', "got an error (NaN is no JSON number)"),
        (b'{"vocab_size": 1' + b"0" * 400 + b"}", "000... is too large for a float)"),
        (b"[1, 2]", "expected a JSON object, got a list"),
        (b'"{}"', "expected a JSON object, got a str"),
        (b'{"a": "' + b"x" * (1 << 20) + b'"}', "at most 1048576 bytes of JSON, got more"),
        (None, "got an error (it is not a regular file)"),
    ],
    ids=["empty", "quotes", "cut", "latin-1", "deep", "twice", "nan", "endless", "list", "text",
         "huge", "directory"],
)  # fmt: skip
def test_broken_configs_are_refused_in_one_sentence(
    content: bytes | None, part: str, tmp_path: pathlib.Path
) -> None:
    if content is None:
        (tmp_path / "config.json").mkdir()
    else:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read_config(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: expected ")
    assert part in message and "\n" not in message


@pytest.mark.parametrize("field", ["num_layers", "key_size"])
@pytest.mark.parametrize("use", ["run", "plan", "verify", "convert"])
def test_a_billion_layers_are_refused_at_once(
    field: str,
    use: str,
    tmp_path: pathlib.Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their names alone would take all memory."""
    directory = changed(GOLDEN / "three-layers", tmp_path / "huge")
    fields = json.loads((directory / "config.json").read_text())
    fields["model"][field] = 10**9
    (directory / "config.json").write_text(json.dumps(fields))
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # --plan changes it
    began = time.perf_counter()
    if use in ("run", "plan"):
        more = ("--plan",) if use == "plan" else ("--prompt-ids", "5 6", "--no-kernels")
        result = command("--checkpoint", directory, *more)
    else:
        more = (str(tmp_path / "out"), "--to", "safetensors") if use == "convert" else ()
        result = Result(checkpoint.main([use, str(directory), *more]), *capsys.readouterr())
    assert time.perf_counter() - began < 1
    assert_one_sentence(
        result, 1, f"config.json: {field}: expected an integer <= ", "got 1000000000"
    )
