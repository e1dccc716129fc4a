"""Safetensors checkpoints load as the released ones do; damaged and hostile ones are refused."""

import hashlib
import json
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import TensorSpec, safe_open, serialize_file

import checkpoint
from checkpoint import CheckpointError
from grok1.formats import atomic, forms, safetensors
from paths import ROOT
from small import LAYER, Damage, assert_same, edited, random_params, replaced_by, tiny_shapes

INDEX = forms.INDEX
ROUTER = "transformer/decoder_layer_0/router/w"


def save(directory: pathlib.Path, params: Any) -> None:
    """Write parameters as safetensors; the checksums are computed from the values in memory."""
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), params)
    records = checkpoint.files(shapes)
    checksums = {}
    for file, members in safetensors.layout(records).items():
        arrays: dict[str, np.ndarray] = {}
        for record in members:
            leaf = params[record.module][record.param]
            own = (
                leaf if record.layer is None else jax.tree.map(lambda a, i=record.layer: a[i], leaf)
            )
            arrays |= safetensors.tensors(record, own)
        pieces = {name: [np.ascontiguousarray(array)] for name, array in arrays.items()}
        atomic.fill(os.fspath(directory / file), safetensors.contents(arrays, pieces))
        for name, array in arrays.items():
            checksums[name] = "sha256:" + hashlib.sha256(array.tobytes()).hexdigest()
    (directory / INDEX).write_bytes(safetensors.write_index(records, checksums))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("tiny")
    save(directory, random_params(tiny_shapes()))
    return directory


@pytest.fixture
def copy(tiny: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_safetensors_load_as_they_were_saved(tiny: pathlib.Path) -> None:
    assert_same(checkpoint.load(tiny, tiny_shapes()), random_params(tiny_shapes()))


def test_the_files_have_one_layer_each_and_names_that_sort(tmp_path: pathlib.Path) -> None:
    save(tmp_path, random_params(tiny_shapes(layers=101)))
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"layer-{layer:03d}.safetensors" for layer in range(101)] + [safetensors.OUTER]
    assert_same(checkpoint.load(tmp_path, tiny_shapes(101)), random_params(tiny_shapes(101)))


def test_the_library_alone_reads_the_same_tensors(tiny: pathlib.Path) -> None:
    params = random_params(tiny_shapes())
    weight_map = json.loads((tiny / INDEX).read_text())["weight_map"]
    found = {}
    for file in sorted(set(weight_map.values())):
        with safe_open(tiny / file, "np") as opened:
            found |= {name: (file, opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    assert {name: file for name, (file, _) in found.items()} == weight_map
    linear = params[LAYER + "moe/linear_1"]["w"]
    for layer in range(2):
        name = f"transformer/decoder_layer_{layer}/"
        for key, array in (
            ("moe/linear_1/w/weight", linear.weight),
            ("moe/linear_1/w/scales", linear.scales),
            ("rms_norm/scale", params[LAYER + "rms_norm"]["scale"]),
        ):
            file, value = found[name + key]
            assert file == f"layer-{layer:02d}.safetensors"
            assert value.dtype == array.dtype
            np.testing.assert_array_equal(value, array[layer])


def test_files_are_as_the_library_writes_them(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"{i}/{dtype}": rng.integers(0, 2, (2, 3 + i)).astype(dtype)
        for i, dtype in enumerate(rng.permutation([*safetensors._DTYPES.values()] * 2))
    }
    specs = {
        name: TensorSpec(
            dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in arrays.items()
    }  # fmt: skip
    serialize_file(specs, tmp_path / "theirs", {"format": "np"})
    written = safetensors.contents(arrays, {name: [array] for name, array in arrays.items()})
    assert b"".join(written) == (tmp_path / "theirs").read_bytes()


def test_files_may_be_read_by_whom_the_umask_lets(tiny: pathlib.Path) -> None:
    """The library makes files with mode 0600: another user of the machine could not load them."""
    (tiny / "plain").touch()
    modes = {path.stat().st_mode for path in tiny.iterdir()}
    (tiny / "plain").unlink()
    assert len(modes) == 1


def test_of_both_forms_the_released_one_is_loaded(copy: pathlib.Path) -> None:
    released = random_params(tiny_shapes(), seed=1)
    checkpoint.write(copy / "released", released)
    (copy / "released" / forms.FOLDER).rename(copy / forms.FOLDER)
    assert forms.form(copy) == forms.RELEASED
    assert_same(checkpoint.load(copy, tiny_shapes()), released)


def test_a_conversion_that_is_under_way_is_not_loaded(copy: pathlib.Path) -> None:
    (copy / forms.WORK).mkdir()
    assert "got an unfinished conversion; start the same" in refusal(copy)


def test_the_checksum_is_that_of_the_values(tiny: pathlib.Path) -> None:
    leaves = checkpoint.check_files(tiny, tiny_shapes())
    records = checkpoint.files(tiny_shapes())
    index = safetensors.read_index(tiny)
    counted: list[int] = []
    for record, leaf in zip(records, leaves, strict=True):
        for name, array in safetensors.tensors(record, leaf).items():
            assert safetensors.checksum(array, name, counted.append) == index.checksums[name]
    assert sum(counted) == index.total_size


def test_the_checksum_of_a_file_that_was_cut_is_an_error(copy: pathlib.Path) -> None:
    leaves = checkpoint.check_files(copy, tiny_shapes())
    for path in copy.glob("*.safetensors"):
        os.truncate(path, 300)
    with pytest.raises(CheckpointError, match="the file that was checked, got one that changed;"):
        for leaf in jax.tree.leaves(leaves):
            safetensors.checksum(leaf, "x")


# Damaged and hostile files.


def refusal(directory: pathlib.Path, layers: int = 2) -> str:
    """The sentence of the CheckpointError that loading raises."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(directory, tiny_shapes(layers))
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+: expected [^\n]+, got [^\n]+; [^\n]+[^.\n]", message), message
    assert len(message) < 1000
    return message


def index(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """The index with other fields."""

    def change(good: bytes) -> bytes:
        fields = json.loads(good)
        edit(fields)
        return json.dumps(fields).encode()

    return edited(change)


def with_header(good: bytes, header: bytes) -> bytes:
    length = struct.unpack("<Q", good[:8])[0]
    return struct.pack("<Q", len(header)) + header + good[8 + length :]


def header_of(good: bytes) -> bytes:
    return good[8 : 8 + struct.unpack("<Q", good[:8])[0]]


def header(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """The file with another header, its length right."""

    def change(good: bytes) -> bytes:
        fields = json.loads(header_of(good))
        edit(fields)
        return with_header(good, json.dumps(fields).encode())

    return edited(change)


def move(fields: dict[str, Any], by: int) -> None:
    """Move all tensors, by so many bytes."""
    for name in fields.keys() - {"__metadata__"}:
        fields[name]["data_offsets"] = [place + by for place in fields[name]["data_offsets"]]


def rename(fields: dict[str, Any], old: str, new: str) -> None:
    fields[new] = fields.pop(old)


def twice(good: bytes) -> bytes:
    """The router's entry comes twice, first with another place."""
    text = header_of(good).decode()
    entry = f'"{ROUTER}":{{"dtype":"F32","shape":[8,2],"data_offsets":[0,64]}},'
    return with_header(good, text.replace("{", "{" + entry, 1).encode())


HASH = "sha256:" + "0" * 64
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
WHOLE = "expected a complete safetensors file, got a damaged one ("
# fmt: off
INDEX_CASES: dict[str, tuple[Damage, str]] = {
    "empty": (edited(lambda _: b""), "expected valid JSON"),
    "cut": (edited(lambda good: good[:-20]), "expected valid JSON"),
    "html": (edited(lambda _: b"<html>404</html>"), "expected valid JSON"),
    "latin-1": (edited(lambda _: b'{"a": "\xff"}'), "expected valid JSON"),
    "deep": (edited(lambda _: b"[" * 1_000_000), "expected valid JSON"),
    "long-number": (edited(lambda _: b"9" * 100_000), "expected valid JSON"),
    "huge": (edited(lambda _: b" " * (5 << 20)), "expected at most 4194304 bytes"),
    "endless": (lambda path: os.truncate(path, 1 << 40), "expected at most 4194304 bytes of JSON"),
    "list": (edited(lambda _: b"[]"), "expected a JSON object, got a list"),
    "name-twice": (edited(lambda good: good.replace(b"{", b'{"metadata": 1,', 1)), "is repeated"),
    "by-others": (index(lambda f: f.pop("checksums")), "by another program is not accepted"),
    "list-of-files": (index(lambda f: f.update(weight_map=[])), "expected metadata"),
    "no-size": (index(lambda f: f["metadata"].pop("total_size")), "expected metadata"),
    "other-format": (index(lambda f: f["metadata"].update(format="pt")),
                     "expected the format grok-1-jax/1, got 'pt'"),
    "other-size": (index(lambda f: f["metadata"].update(total_size=1)), "expected a total_size of"),
    "no-checksum": (index(lambda f: f["checksums"].pop(ROUTER)), "checksum for each tensor"),
    "short-checksum": (index(lambda f: f["checksums"].update({ROUTER: HASH[:-1]})),
                       f"{INDEX} ('{ROUTER}'): expected a checksum like sha256:00ff, got 'sha"),
    "number-as-checksum": (index(lambda f: f["checksums"].update({ROUTER: 5})), "00ff, got 5"),
    "line-break": (index(lambda f: f["checksums"].update({ROUTER: HASH + "\n"})), "0\\n'; convert"),
    "surrogate": (index(lambda f: f["checksums"].update({"\ud800": HASH})), r"got '\ud800'"),
    "no-tensor": (index(lambda f: [f[key].pop(ROUTER) for key in ("checksums", "weight_map")]),
                  f"({ROUTER}): expected the 10 tensors of the model, got none"),
    "one-more": (index(lambda f: (f["checksums"].update(x=HASH),
                                  f["weight_map"].update(x="layer-00.safetensors"))),
                 "expected the 10 tensors of the model, got one more, 'x'; check"),
    "one-layer-more": (index(lambda f: (f["checksums"].update(x=HASH),
                                        f["weight_map"].update(x="layer-02.safetensors"))),
                       "expected files of 2 layers, got 3; correct the number of layers"),
    "elsewhere": (index(lambda f: f["weight_map"].update({ROUTER: "layer-01.safetensors"})),
                  f"({ROUTER}): expected layer-00.safetensors, got 'layer-01.safetensors'"),
    "outside": (index(lambda f: f["weight_map"].update(
                    {k: "../../etc/passwd" for k, v in f["weight_map"].items() if "00" in v})),
                "expected layer-00.safetensors, got '../../etc/passwd'"),
    "number-as-file": (index(lambda f: f["weight_map"].update({ROUTER: 5})), "name, got 5"),
    "list-as-file": (index(lambda f: f["weight_map"].update({ROUTER: [[]]})),
                     "expected a file's name, got 'list'"),
    "pipe": (replaced_by(os.mkfifo), "expected a directory"),
    "directory": (replaced_by(pathlib.Path.mkdir), "expected a directory"),
}
FILE_CASES: dict[str, tuple[Damage, str]] = {
    "missing": (pathlib.Path.unlink, "got an error (No such file or directory)"),
    "empty": (edited(lambda _: b""), WHOLE),
    "seven-bytes": (edited(lambda good: good[:7]), WHOLE),
    "cut-in-header": (edited(lambda good: good[:100]), WHOLE),
    "cut-by-a-byte": (edited(lambda good: good[:-1]), WHOLE),
    "long-by-a-byte": (edited(lambda good: good + b"\0"), WHOLE),
    "html": (edited(lambda _: b"<html>404</html>"), "expected a header of at most 262144 bytes"),
    "header-of-exabytes": (edited(lambda good: b"\xff" * 8 + good[8:]), "expected a header of"),
    "endless": (lambda path: os.truncate(path, 1 << 40), WHOLE),
    "zeros": (edited(lambda good: bytes(len(good))), WHOLE),
    "deep": (edited(lambda good: with_header(good, b"[" * 200_000)), WHOLE),
    "deep-inside": (edited(lambda good: with_header(good, b'{"a":' * 40_000)), "64 levels deep"),
    "list": (edited(lambda good: with_header(good, b"[]")), WHOLE),
    "name-twice": (edited(twice), f"got an error (the key '{ROUTER}' is repeated in an"),
    "metadata": (header(lambda f: f.update(__metadata__=5)), WHOLE),
    "no-tensor": (header(lambda f: f.pop(ROUTER)), f"tensors, got none of the name {ROUTER}"),
    "number": (header(lambda f: f.update({ROUTER: 5})), WHOLE),
    "true": (header(lambda f: f[ROUTER].update(shape=[8, 2, True])), WHOLE),
    "one-place": (header(lambda f: f[ROUTER].update(data_offsets=[32])), WHOLE),
    "renamed": (header(lambda f: rename(f, ROUTER, "x\ny")), "tensors, got none of the name"),
    "one-more": (header(lambda f: f.update(x=EMPTY)),
                 "expected 4 tensors, got one more, 'x'"),
    "other-type": (header(lambda f: f[ROUTER].update(dtype="I32")),
                   f"({ROUTER}): expected float32 [8, 2], got int32 [8, 2]; check that the config"),
    "unknown-type": (header(lambda f: f[ROUTER].update(dtype="Q7")), "got Q7 [8, 2]; check"),
    "transposed": (header(lambda f: f[ROUTER].update(shape=[2, 8])), "got float32 [2, 8]"),
    "endless-shape": (header(lambda f: f[ROUTER].update(shape=[1] * 70_000 + [8, 2])),
                      "got float32 [1, 1, 1"),
    "negative": (header(lambda f: f[ROUTER].update(shape=[-8, -2])), "got float32 [-8, -2]"),
    "overflow": (header(lambda f: f[ROUTER].update(shape=[1 << 62, 1 << 62])), "float32 [461"),
    "overlap": (header(lambda f: f[ROUTER].update(data_offsets=[0, 64])), WHOLE),
    "backwards": (header(lambda f: f[ROUTER].update(data_offsets=[64, 0])), WHOLE),
    "gap": (header(lambda f: move(f, 8)), WHOLE),
    "beyond": (header(lambda f: f[ROUTER].update(data_offsets=[9000, 9064])), WHOLE),
    "fraction": (header(lambda f: f[ROUTER].update(data_offsets=[32.0, 96.0])), WHOLE),
    "pipe": (replaced_by(os.mkfifo), "got an error (it is not a regular file)"),
    "directory": (replaced_by(pathlib.Path.mkdir), "got an error (it is not a regular file)"),
    "link-to-itself": (replaced_by(lambda path: path.symlink_to(path.name)), "Too many levels"),
}
# fmt: on


@pytest.mark.parametrize(("damage", "part"), INDEX_CASES.values(), ids=INDEX_CASES.keys())
def test_a_damaged_index_is_refused_in_one_sentence(
    damage: Damage, part: str, copy: pathlib.Path
) -> None:
    damage(copy / INDEX)
    message = refusal(copy)
    assert message.startswith(str(copy if forms.form(copy) is None else copy / INDEX))
    assert part in message


@pytest.mark.parametrize(("damage", "part"), FILE_CASES.values(), ids=FILE_CASES.keys())
def test_a_damaged_file_is_refused_in_one_sentence(
    damage: Damage, part: str, copy: pathlib.Path
) -> None:
    path = copy / "layer-00.safetensors"
    damage(path)
    message = refusal(copy)
    assert message.startswith(str(path))
    assert part in message


def test_a_file_that_is_cut_while_checked_is_refused(copy: pathlib.Path) -> None:
    """A mapped file would end the process, without a word."""
    program = f"""
import os, sys
sys.path[:0] = {[str(ROOT), str(ROOT / "tests")]!r}
import checkpoint, small
path, good = sys.argv[1] + "/outer.safetensors", 0
whole = open(path, "rb").read()
parent, writer = os.getpid(), os.fork()
while not writer:
    if os.getppid() != parent:
        os._exit(0)
    os.truncate(path, 0)
    with open(path, "r+b", buffering=0) as file:
        file.write(whole)
shapes = small.tiny_shapes()
for _ in range(3000):
    try:
        checkpoint.check_files(sys.argv[1], shapes)
        good += 1
    except checkpoint.CheckpointError:
        pass
print(good)
"""
    command = [sys.executable, "-c", program, copy]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert 0 < int(done.stdout) < 3000  # it was seen whole, and it was seen cut


def test_the_last_file_is_checked_before_anything_is_loaded(copy: pathlib.Path) -> None:
    (copy / "layer-01.safetensors").unlink()
    before = len(jax.live_arrays())
    assert refusal(copy).startswith(str(copy / "layer-01.safetensors"))
    assert len(jax.live_arrays()) == before


def test_another_number_of_layers_is_said(copy: pathlib.Path) -> None:
    assert f"{INDEX}: expected files of 3 layers, got 2; correct the number" in refusal(copy, 3)


@pytest.mark.parametrize("name", [INDEX, "layer-00.safetensors"])
def test_random_damage_raises_nothing_else(name: str, copy: pathlib.Path) -> None:
    good = (copy / name).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        bad = bytearray(good)
        # In a tensor file, mostly in the header.
        for place in rng.integers(0, min(len(good), 1500), size=rng.integers(1, 4)):
            bad[place] = rng.integers(0, 256)
        (copy / name).write_bytes(bad)
        try:
            checkpoint.check_files(copy, tiny_shapes())
        except CheckpointError as problem:
            refused += 1
            assert str(problem).startswith(str(copy / name)) and "\n" not in str(problem)
    assert refused > 100
