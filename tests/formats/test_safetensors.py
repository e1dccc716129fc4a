"""Safetensors checkpoints: their format, how they load, and that damaged ones are refused."""

import hashlib
import json
import os
import pathlib
import shutil
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from safetensors import TensorSpec, safe_open, serialize_file

import checkpoint
from grok1.formats import atomic, conversion, forms, safetensors
from small import (
    LAYER,
    Damage,
    assert_same,
    edited,
    random_params,
    refusal,
    replaced_by,
    tiny_shapes,
)

INDEX = forms.INDEX
ROUTER = "transformer/decoder_layer_0/router/w"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "tiny"))
    checkpoint.write(source, random_params(tiny_shapes()))
    conversion.convert(source, target, forms.SAFETENSORS, tiny_shapes())
    return target


@pytest.fixture
def copy(tiny: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_safetensors_load_as_saved(tiny: pathlib.Path) -> None:
    assert_same(checkpoint.load(tiny, tiny_shapes()), random_params(tiny_shapes()))


def test_each_layer_has_one_file_and_the_names_sort() -> None:
    files = [*safetensors.layout(checkpoint.files(tiny_shapes(layers=101)))]
    assert files == [safetensors.OUTER, *(f"layer-{layer:03d}.safetensors" for layer in range(101))]


def test_the_library_reads_the_tensors_of_the_index(tiny: pathlib.Path) -> None:
    params, index = random_params(tiny_shapes()), safetensors.read_index(tiny)
    found = {}
    for file in sorted(set(index.files.values())):
        with safe_open(tiny / file, "np") as opened:
            found |= {name: (file, opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    assert {name: file for name, (file, _) in found.items()} == index.files
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
            checksum = "sha256:" + hashlib.sha256(array[layer].tobytes()).hexdigest()
            assert index.checksums[name + key] == checksum


def test_files_are_equal_to_those_of_the_library(tmp_path: pathlib.Path) -> None:
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


def test_file_modes_follow_the_umask(tiny: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Another user may have to load the files; those of the library have mode 0600."""
    (tmp_path / "plain").touch()
    modes = {path.stat().st_mode for path in (*tiny.iterdir(), tmp_path / "plain")}
    assert len(modes) == 1


def test_of_both_forms_the_released_one_is_loaded(copy: pathlib.Path) -> None:
    released = random_params(tiny_shapes(), seed=1)
    checkpoint.write(copy / "released", released)
    (copy / "released" / forms.FOLDER).rename(copy / forms.FOLDER)
    assert forms.form(copy) == forms.RELEASED
    assert_same(checkpoint.load(copy, tiny_shapes()), released)


# Damaged and hostile files.


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
    """The file with another header and its length."""

    def change(good: bytes) -> bytes:
        fields = json.loads(header_of(good))
        edit(fields)
        return with_header(good, json.dumps(fields).encode())

    return edited(change)


def move(fields: dict[str, Any], by: int) -> None:
    """Add to the offsets of all tensors."""
    for name in fields.keys() - {"__metadata__"}:
        fields[name]["data_offsets"] = [place + by for place in fields[name]["data_offsets"]]


def twice(good: bytes) -> bytes:
    """A header that has the router's entry twice, first with other offsets."""
    text = header_of(good).decode()
    entry = f'"{ROUTER}":{{"dtype":"F32","shape":[8,2],"data_offsets":[0,64]}},'
    return with_header(good, text.replace("{", "{" + entry, 1).encode())


HASH = "sha256:" + "0" * 64
EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
WHOLE = "expected a complete safetensors file, got a damaged one ("
# fmt: off
INDEX_CASES: dict[str, tuple[Damage, str]] = {
    "not-json": (edited(lambda good: good[:-20]), "expected valid JSON"),
    "repeated-key": (edited(lambda good: good.replace(b"{", b'{"metadata": 1,', 1)), "is repeated"),
    "huge": (lambda path: os.truncate(path, 1 << 40), "expected at most 4194304 bytes of JSON"),
    "list": (edited(lambda _: b"[]"), "expected a JSON object, got a list"),
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
    "list-as-file": (index(lambda f: f["weight_map"].update({ROUTER: [[]]})),
                     "expected a file's name, got 'list'"),
    "directory": (replaced_by(pathlib.Path.mkdir), "expected a directory"),
}
FILE_CASES: dict[str, tuple[Damage, str]] = {
    "missing": (pathlib.Path.unlink, "got an error (No such file or directory)"),
    "pipe": (replaced_by(os.mkfifo), "got an error (it is not a regular file)"),
    "cut-in-header": (edited(lambda good: good[:100]), WHOLE),
    "cut-by-a-byte": (edited(lambda good: good[:-1]), WHOLE),
    "long-by-a-byte": (edited(lambda good: good + b"\0"), WHOLE),
    "zeros": (edited(lambda good: bytes(len(good))), WHOLE),
    "huge-header": (edited(lambda good: b"\xff" * 8 + good[8:]),
                    "expected a header of at most 262144 bytes"),
    "huge": (lambda path: os.truncate(path, 1 << 40), WHOLE),
    "deep": (edited(lambda good: with_header(good, b'{"a":' * 40_000)), "64 levels deep"),
    "list": (edited(lambda good: with_header(good, b"[]")), WHOLE),
    "repeated-name": (edited(twice), f"got an error (the key '{ROUTER}' is repeated in an"),
    "metadata": (header(lambda f: f.update(__metadata__=5)), WHOLE),
    "no-tensor": (header(lambda f: f.pop(ROUTER)), f"tensors, got none of the name {ROUTER}"),
    "one-more": (header(lambda f: f.update(x=EMPTY)), "expected 4 tensors, got one more, 'x'"),
    "number": (header(lambda f: f.update({ROUTER: 5})), WHOLE),
    "true": (header(lambda f: f[ROUTER].update(shape=[8, 2, True])), WHOLE),
    "one-offset": (header(lambda f: f[ROUTER].update(data_offsets=[32])), WHOLE),
    "fraction": (header(lambda f: f[ROUTER].update(data_offsets=[32.0, 96.0])), WHOLE),
    "other-type": (header(lambda f: f[ROUTER].update(dtype="I32")),
                   f"({ROUTER}): expected float32 [8, 2], got int32 [8, 2]; check that config"),
    "unknown-type": (header(lambda f: f[ROUTER].update(dtype="Q7")), "got Q7 [8, 2]; check"),
    "long-shape": (header(lambda f: f[ROUTER].update(shape=[1] * 70_000 + [8, 2])),
                   "got float32 [1, 1, 1"),
    "overlap": (header(lambda f: f[ROUTER].update(data_offsets=[0, 64])), WHOLE),
    "wrong-end": (header(lambda f: f[ROUTER].update(data_offsets=[32, 95])), WHOLE),
    "gap": (header(lambda f: move(f, 8)), WHOLE),
}
# fmt: on


@pytest.mark.parametrize(("damage", "part"), INDEX_CASES.values(), ids=INDEX_CASES)
def test_damaged_indexes_are_refused_in_one_sentence(
    damage: Damage, part: str, copy: pathlib.Path
) -> None:
    damage(copy / INDEX)
    message = refusal(copy)
    assert message.startswith(str(copy if forms.form(copy) is None else copy / INDEX))
    assert part in message


@pytest.mark.parametrize(("damage", "part"), FILE_CASES.values(), ids=FILE_CASES)
def test_damaged_safetensors_are_refused(damage: Damage, part: str, copy: pathlib.Path) -> None:
    path = copy / "layer-00.safetensors"
    damage(path)
    message = refusal(copy)
    assert message.startswith(str(path))
    assert part in message


def test_a_file_cut_while_header_is_read_is_refused(
    copy: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a mapped file that is cut would end the process with SIGBUS."""
    stamp = atomic.stamp

    def then_cut(file: str | int) -> atomic.FileVersion:
        found = stamp(file)
        os.truncate(copy / "outer.safetensors", 0)
        return found

    monkeypatch.setattr(atomic, "stamp", then_cut)
    assert "outer.safetensors: " + WHOLE in refusal(copy)
