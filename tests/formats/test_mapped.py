"""The mapped form: its files, that a CPU uses them in place, and that damaged ones are refused."""

import ctypes
import dataclasses
import errno
import gc
import json
import mmap
import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open

import checkpoint
import golden
from grok1.formats import atomic, conversion, conversion_output, forms, mapped, safetensors
from grok1.ops import rounded_table
from paths import ROOT
from runner import load_model
from small import (
    EMBED,
    LAYER,
    Damage,
    assert_same,
    config_of,
    contents,
    edited,
    random_params,
    refusal,
    replaced_by,
    save_layers,
    tiny_shapes,
)

INDEX = forms.MAPPED_INDEX
TABLE = f"{EMBED}/embeddings".replace("/", ".") + ".safetensors"
SCALES = f"{LAYER}moe/linear_1/w/scales".replace("/", ".") + ".safetensors"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    source, target = (tmp_path_factory.mktemp(name) for name in ("source", "tiny"))
    checkpoint.write(source, random_params(tiny_shapes()))
    conversion.convert(source, target, forms.MAPPED, tiny_shapes())
    return target


@pytest.fixture
def copy(tiny: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(tiny, tmp_path / "copy"))


def test_arrays_are_those_that_were_saved(tiny: pathlib.Path) -> None:
    assert_same(checkpoint.load(tiny, tiny_shapes()), random_params(tiny_shapes()))


def test_an_array_is_one_file_whose_values_begin_at_a_page(tiny: pathlib.Path) -> None:
    params, index = random_params(tiny_shapes()), safetensors.read_index(tiny, forms.MAPPED)
    scales = params[LAYER + "moe/linear_1"]["w"].scales
    with safe_open(tiny / SCALES, "np") as opened:
        found = opened.get_tensor(f"{LAYER}moe/linear_1/w/scales")
    np.testing.assert_array_equal(found, scales)
    text = (tiny / SCALES).read_bytes()
    assert text[mapped.HEADER :] == scales.tobytes() and mapped.HEADER % 4096 == 0
    assert index.files[f"{LAYER}moe/linear_1/w/scales"] == SCALES
    assert index.total_size == sum(map(os.path.getsize, tiny.glob("*.safetensors"))) - (
        mapped.HEADER * len(index.files)
    )


def test_a_cpu_uses_the_files_in_place(tiny: pathlib.Path) -> None:
    params = checkpoint.load(tiny, tiny_shapes())
    maps = pathlib.Path("/proc/self/maps").read_text().splitlines()
    places = {
        line.split()[-1]: int(line.partition("-")[0], 16) for line in maps if str(tiny) in line
    }
    for name, leaf in ((SCALES, params[LAYER + "moe/linear_1"]["w"].scales),
                       (TABLE, params[EMBED]["embeddings"])):  # fmt: skip
        assert leaf.unsafe_buffer_pointer() == places[str(tiny / name)] + mapped.HEADER


def test_several_devices_get_copies(tmp_path: pathlib.Path) -> None:
    source = golden.DIRECTORY / "three-layers"
    checkpoint.convert(source, tmp_path, "mapped")
    one, other = (load_model(d, mesh=(2, 2), pad_sizes=(16,)) for d in (source, tmp_path))
    assert_same(one.params, other.params)
    assert other._get_loaded()[0].rounded is None


@pytest.mark.parametrize("form", ["released", "safetensors"])
def test_there_and_back_every_byte_is_the_same(form: str, tmp_path: pathlib.Path) -> None:
    source = save_layers(tmp_path / "source", 12)
    if form == "safetensors":
        checkpoint.convert(source, tmp_path / "safe", form)
        source = tmp_path / "safe"
    checkpoint.convert(source, tmp_path / "there", "mapped")
    checkpoint.convert(tmp_path / "there", tmp_path / "back", form)
    assert contents(tmp_path / "back") == contents(source)


@pytest.mark.parametrize("kernels", [True, False])
def test_results_are_those_of_a_loaded_model(
    kernels: bool, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, also with a rounded table; and the files are not written."""
    monkeypatch.setattr(mapped, "LEAST_BYTES", 0)
    monkeypatch.setattr("grok1.serving.likely_logits.LEAST_BYTES", 0)
    source = golden.DIRECTORY / "three-layers"
    checkpoint.convert(source, tmp_path, "mapped")
    before = contents(tmp_path)
    prompt = [1, 5, 9, 2, 40, 7]
    found = []
    for directory in (source, tmp_path):
        model = load_model(directory, kernels=kernels, dtype="float32", pad_sizes=(4,), slots=2)
        answers = model.generate([prompt, prompt[::-1]], max_len=12, temperature=0.8, rng_seed=3)
        found.append((model.logits(prompt), model.score([prompt]), answers))
        rounded = model._get_loaded()[0].rounded
        assert (rounded is not None) == kernels
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)
    assert contents(tmp_path) == before
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model.params))


def test_the_rounded_table_is_that_of_a_loaded_model(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mapped, "LEAST_BYTES", 0)
    monkeypatch.setattr("grok1.formats.conversion_output.BLOCK", 24)  # the last one is smaller
    source = golden.DIRECTORY / "three-layers"
    checkpoint.convert(source, tmp_path, "mapped")
    config = checkpoint.read_model_config(tmp_path)
    stored = checkpoint.rounded_table(tmp_path, config)
    params = checkpoint.load(source, checkpoint.shapes_in(source, config))
    expected = rounded_table.round_table(params[EMBED]["embeddings"])
    assert_same(stored[:2], expected[:2])
    np.testing.assert_allclose(stored.errors, expected.errors, rtol=1e-6)  # sums of other blocks
    summary, problems = checkpoint.verify(tmp_path)
    assert "checksums of the index" in summary and not problems


def test_experts_of_4_bits_are_those_of_safetensors(tmp_path: pathlib.Path) -> None:
    source = golden.DIRECTORY / "three-layers"
    one, other = tmp_path / "one", tmp_path / "other"
    checkpoint.convert(source, one, "safetensors", group=16)
    checkpoint.convert(source, other, "mapped", group=16)
    config = checkpoint.read_model_config(one)
    shapes = checkpoint.shapes_in(one, config)
    assert checkpoint.shapes_in(other, config) == shapes
    assert_same(checkpoint.load(one, shapes), checkpoint.load(other, shapes))
    checkpoint.convert(other, tmp_path / "back", "safetensors")
    assert contents(tmp_path / "back") == contents(one)


def test_experts_can_be_required_to_be_int8(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(save_layers(tmp_path / "source", 1))
    how = ["--to", "mapped", "--experts"]
    assert checkpoint.main(["convert", source, str(tmp_path / "int8"), *how, "int8"]) == 0
    command = ["convert", source, str(tmp_path / "int4"), *how, "int4", "--group", "4"]
    assert checkpoint.main(command) == 0
    capsys.readouterr()
    command = ["convert", str(tmp_path / "int4"), str(tmp_path / "more"), *how, "int8"]
    assert checkpoint.main(command) == 1
    assert "int4: expected experts of int8, got experts of another type" in capsys.readouterr().err
    assert not (tmp_path / "more").exists()


def test_a_file_that_cannot_be_mapped_is_refused(
    tiny: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mapped.mapped_files, "map_array", fail)
    sentence = r"expected a file that can be mapped, got an error \(No such device\); convert it to"
    with pytest.raises(checkpoint.CheckpointError, match=sentence):
        checkpoint.load(tiny, tiny_shapes())


# Interrupted conversions.


class Interrupted(Exception):
    """A conversion was interrupted."""


def test_a_conversion_continues_at_its_layer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_layers(tmp_path / "source", 3)
    checkpoint.convert(source, tmp_path / "whole", "mapped")
    write, convert = conversion_output.write_state, conversion_output._convert
    steps, read = 0, []
    for stop in range(1, 100):
        target, count = tmp_path / f"{stop}", 0

        def count_down(work: str, state: Any, stop: int = stop) -> None:
            nonlocal count
            write(work, state)
            count += 1
            if count == stop:
                raise Interrupted

        monkeypatch.setattr(conversion_output, "write_state", count_down)
        try:
            checkpoint.convert(source, target, "mapped")
        except Interrupted:
            monkeypatch.setattr(conversion_output, "write_state", write)
        else:
            steps = stop - 1
            break
        recorded = json.loads((target / forms.WORK / "state.json").read_text())["checksums"]
        read.clear()
        monkeypatch.setattr(
            conversion_output,
            "_convert",
            lambda job, members, *rest: (
                read.extend(r.name for r in members) or convert(job, members, *rest)
            ),
        )
        checkpoint.convert(source, target, "mapped")
        monkeypatch.setattr(conversion_output, "_convert", convert)
        assert contents(target) == contents(tmp_path / "whole")
        assert not any(f"{tensor}/".startswith(f"{name}/") for tensor in recorded for name in read)
    assert steps > 20


def test_a_partial_file_that_is_too_short_is_written_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = save_layers(tmp_path / "source", 3), tmp_path / "target"
    checkpoint.convert(source, tmp_path / "whole", "mapped")
    place = atomic.place

    def fail(temporary: str, path: str) -> None:
        if path.endswith(".safetensors"):
            raise Interrupted
        place(temporary, path)

    monkeypatch.setattr(atomic, "place", fail)
    with pytest.raises(Interrupted):
        checkpoint.convert(source, target, "mapped")
    monkeypatch.undo()
    (partial,) = (target / forms.WORK).glob("*.safetensors")
    os.truncate(partial, os.path.getsize(partial) - 1)
    checkpoint.convert(source, target, "mapped")
    assert contents(target) == contents(tmp_path / "whole")


# Damaged and hostile files.


def index(edit: Callable[[dict[str, Any]], object]) -> Damage:
    """The index with other fields."""

    def change(good: bytes) -> bytes:
        fields = json.loads(good)
        edit(fields)
        return json.dumps(fields).encode()

    return lambda directory: edited(change)(directory / INDEX)


def shorter(good: bytes) -> bytes:
    """A file whose header has 64 bytes less."""
    length = int.from_bytes(good[:8], "little") - 64
    return length.to_bytes(8, "little") + good[8 : 8 + length] + good[mapped.HEADER :]


NAME = f"{EMBED}/embeddings"
# fmt: off
DAMAGED: dict[str, tuple[Damage, str]] = {
    "format": (index(lambda f: f["metadata"].update(format="grok-1-jax/1")),
               "expected the format grok-1-jax-mapped/1, got 'grok-1-jax/1'"),
    "no-array": (index(lambda f: f["weight_map"].pop(NAME)),
                 "expected the 6 arrays of the model, got none"),
    "more-arrays": (index(lambda f: f["weight_map"].update(more="x")),
                    "('more'): expected the 6 arrays of the model, got one more"),
    "no-checksum": (index(lambda f: f["checksums"].pop(NAME)),
                    "expected the 10 tensors of the model, got none"),
    "other-file": (index(lambda f: f["weight_map"].update({NAME: "../x"})), "got '../x'"),
    "size": (index(lambda f: f["metadata"].update(total_size=1)), "expected a total_size of"),
    "missing": (lambda d: (d / TABLE).unlink(), "expected a readable safetensors file"),
    "cut": (lambda d: os.truncate(d / TABLE, os.path.getsize(d / TABLE) - 1), "it should have"),
    "longer": (lambda d: os.truncate(d / TABLE, os.path.getsize(d / TABLE) + 1), "it should have"),
    "other-array": (lambda d: shutil.copy(d / SCALES, d / TABLE), "expected one tensor"),
    "short-header": (lambda d: edited(shorter)(d / TABLE),
                     "expected values from byte 4096 on, got them at byte 4032"),
    "pipe": (lambda d: replaced_by(os.mkfifo)(d / TABLE), "it is not a regular file"),
}
# fmt: on


@pytest.mark.parametrize(("damage", "part"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damage_is_refused_in_one_sentence(damage: Damage, part: str, copy: pathlib.Path) -> None:
    damage(copy)
    assert part in refusal(copy, tiny_shapes())


def test_verify_finds_a_changed_layer(copy: pathlib.Path) -> None:
    with open(copy / SCALES, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    _, problems = conversion.verify(copy, tiny_shapes())
    (problem,) = problems
    assert "transformer/decoder_layer_1/moe/linear_1/w/scales" in problem


# Experts that memory cannot hold.


def in_memory(path: pathlib.Path, layers: int) -> list[float]:
    """Return for each layer in a file the share of its pages that are in the page cache."""
    values = np.memmap(path, np.uint8, "r")
    pages = np.zeros(-(-values.size // mmap.PAGESIZE), np.uint8)
    place, size = (ctypes.c_void_p(values.ctypes.data), ctypes.c_size_t(values.size))
    assert ctypes.CDLL(None).mincore(place, size, ctypes.c_void_p(pages.ctypes.data)) == 0
    each = np.array_split(pages[mapped.HEADER // mmap.PAGESIZE :] & 1, layers)
    return [float(np.mean(own)) for own in each]


@pytest.mark.skipif(sys.platform != "linux", reason="by functions of Linux")
def test_experts_beyond_memory_are_dropped_after_use(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(4)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, emb_size=128, key_size=32, widening_factor=12),
    )
    checkpoint.save(tmp_path / "source", random_params(config.param_shapes()), config)
    checkpoint.convert(tmp_path / "source", tmp_path / "mapped", "mapped")
    gate, attention = (
        tmp_path / f"mapped/transformer.decoder_layer.{name}.w.weight.safetensors"
        for name in ("moe.linear", "multi_head_attention.linear")
    )
    answers = []
    for room, expected in ((1.0, [1, 1, 1, 1]), (0.5, [1, 1, 0, 0])):
        for path in (gate, attention):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if any(in_memory(gate, 4)):
            pytest.skip("this file system keeps its pages in memory")
        monkeypatch.setattr(mapped, "_kept_share", lambda *_, room=room: room)
        model = load_model(tmp_path / "mapped", kernels=True, dtype="float32", slots=1)
        answers.append(model.generate([1, 2, 3], max_len=4))
        assert np.round(in_memory(gate, 4)).tolist() == expected  # others are read ahead
        assert in_memory(attention, 4) == [1, 1, 1, 1]
        del model
        gc.collect()
    assert answers[0] == answers[1]


def test_memory_holds_first_what_every_token_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    def wanted(rows: int, experts: int) -> Any:
        table = jax.ShapeDtypeStruct((rows, 8), np.float32)
        stack = jax.ShapeDtypeStruct((4, experts), np.int8)
        return {(EMBED, "embeddings", 0): table, (f"{LAYER}moe/linear", "w", 0): stack}

    def share(memory: int | None, rows: int) -> float:
        monkeypatch.setattr(mapped, "available_memory", lambda: memory)
        return mapped._kept_share(wanted(rows, 900), 0.25)

    assert share(None, 1) == 1 and share(10_000, 20) == 1
    assert share(1720, 20) == 1 and share(1700, 20) == pytest.approx((0.9 * 1700 - 640) / 3600)
    assert share(500, 20) == 0
    monkeypatch.setattr(mapped, "LEAST_BYTES", 640)
    rounded = 20 * (8 * 2 + 4 + 4)
    assert share(1500, 20) == pytest.approx((0.9 * 1500 - rounded) / 3600)


# A file that becomes shorter while it is used.

SHORTENED = """
import faulthandler, glob, os, sys
from runner import load_model
directory, before = sys.argv[1:]
if before == "handled":
    faulthandler.enable()
model = load_model(directory, kernels=True)
for path in glob.glob(f"{directory}/*.safetensors"):
    os.truncate(path, 4096)
model.generate([1, 2, 3], max_len=4)
print("generated")
"""


@pytest.mark.parametrize("before", ["default", "handled"])
def test_a_file_that_shrinks_ends_in_one_sentence(before: str, tmp_path: pathlib.Path) -> None:
    checkpoint.convert(golden.DIRECTORY / "three-layers", tmp_path, "mapped")
    command = [sys.executable, "-c", SHORTENED, tmp_path, before]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    before_it, first, rest = done.stderr.split("\n", 2)
    sentence = (
        r"error: \S+\.safetensors: expected a file that stays as it is while it is used as memory, "
        r"got one that became shorter or cannot be read; start again when nothing writes to it, "
        r"or convert it again"
    )
    assert re.fullmatch(sentence, first) and not before_it and "generated" not in done.stdout
    if before == "default":
        assert done.returncode == 1 and not rest
    else:
        assert done.returncode < 0 and "Fatal Python error: Bus error" in rest
