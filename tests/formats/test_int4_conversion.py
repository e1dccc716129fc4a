"""Conversion of experts to 4 bits: what changes, what does not, and what is refused."""

import json
import pathlib
import re
import shutil
from typing import Any

import jax
import numpy as np
import pytest

import checkpoint
import golden
from checkpoint import CheckpointError, convert, verify
from grok1.formats.conversion import EXPERTS
from grok1.ops.quantization import QuantizedWeight4bit
from grok1.parameters import quantize_experts
from runner import load_server
from small import assert_same, config_of, contents, random_params, save_layers

GROUP = 8


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    return save_layers(tmp_path / "source", 3)


@pytest.fixture
def small(source: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """The source with experts of 4 bits."""
    convert(source, tmp_path / "small", "safetensors", group=GROUP)
    return tmp_path / "small"


def load(directory: pathlib.Path) -> Any:
    shapes = checkpoint.shapes_in(directory, config_of(3))
    return checkpoint.load(directory, shapes)


def tensors(directory: pathlib.Path) -> dict[str, bytes]:
    """The bytes of each tensor, read by the safetensors library's rules."""
    found = {}
    for path in directory.glob("*.safetensors"):
        data = path.read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:begin]).items():
            if name != "__metadata__":
                first, end = entry["data_offsets"]
                found[name] = data[begin + first : begin + end]
    return found


def test_only_the_experts_change(
    source: pathlib.Path, small: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """And they load as `quantize_experts` rounds them."""
    convert(source, tmp_path / "safe", "safetensors")
    before, after = tensors(tmp_path / "safe"), tensors(small)
    others = {name for name in before if EXPERTS not in name}
    assert len(others) > 30 and {name: after[name] for name in others} == {
        name: before[name] for name in others
    }
    kinds = {name.rpartition("/")[2] for name in after.keys() - others}
    assert kinds == {"int4", "scales"}
    params = load(small)
    assert_same(params, quantize_experts(load(source), GROUP))
    weight = params["transformer/decoder_layer/moe/linear_1"]["w"]
    assert isinstance(weight, QuantizedWeight4bit)
    for name in ("config.json", "tokenizer.model"):
        assert (small / name).read_bytes() == (source / name).read_bytes()
    assert "have the checksums of the index" in verify(small)[0] and verify(small)[1] == []


@pytest.mark.parametrize("kind", ["safetensors", "floats"])
def test_any_source_gives_the_same_experts(
    kind: str, source: pathlib.Path, small: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = tmp_path / "other"
    if kind == "safetensors":
        convert(source, other, "safetensors")
    else:
        config = config_of(3)
        floats = config.dequantize_params(load(source))
        checkpoint.save(other, floats, config)
        (other / "tokenizer.model").write_bytes(b"pieces")
    convert(other, tmp_path / "again", "safetensors", group=GROUP)
    first, again = tensors(small), tensors(tmp_path / "again")
    experts = [name for name in first if EXPERTS in name]
    assert all(first[name] == again[name] for name in experts) and len(experts) == 18
    assert (first == again) == (kind == "safetensors")


def test_interrupted_rounding_resumes_to_the_same_bytes(
    source: pathlib.Path, small: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    calls = 0

    def stop(*_: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 40:
            raise KeyboardInterrupt

    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, "safetensors", stop, group=GROUP)
    other = shutil.copytree(target, tmp_path / "other")
    finished = (target / "outer.safetensors").stat()
    convert(source, target, "safetensors", group=GROUP)
    assert contents(target) == contents(small)
    assert (target / "outer.safetensors").stat().st_mtime_ns == finished.st_mtime_ns
    convert(source, other, "safetensors", group=4)  # starts over
    convert(source, tmp_path / "fresh", "safetensors", group=4)
    assert contents(other) == contents(tmp_path / "fresh") != contents(small)


def test_experts_of_4_bits_load_on_a_mesh_that_cuts_groups(tmp_path: pathlib.Path) -> None:
    """43 groups on 4 devices: their scales are repeated."""
    convert(golden.DIRECTORY / "three-layers", tmp_path, "safetensors", group=16)
    tokens = np.arange(1, 15).reshape(2, 7)
    one, several = (
        load_server(tmp_path, mesh=mesh, pad_sizes=(8,), dtype="float32")
        for mesh in ((1, 1), (2, 4))
    )
    stored = one.params["transformer/decoder_layer/moe/linear_1"]["w"]
    assert isinstance(stored, QuantizedWeight4bit) and stored.scales.shape[-2] == 43
    expected = one.logits(tokens)
    assert golden.relative_error(several.logits(tokens), expected).max() <= 1e-5
    shards = {s.data.nbytes for s in jax.tree.leaves(several.params)[0].addressable_shards}
    assert len(shards) == 1


def test_conversions_that_cannot_be_are_refused(
    source: pathlib.Path, small: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    target = tmp_path / "target"
    for given, form, group, message in (
        (
            small,
            "released",
            None,
            "expected int8 or floats, .*, got experts of 4 bits; convert the",
        ),
        (
            small,
            "safetensors",
            GROUP,
            "expected experts of 8 bits or floats, got experts of 4 bits",
        ),
        (
            source,
            "safetensors",
            6,
            r"an even group that divides .* rows, got 6; give --group one of",
        ),
        (source, "safetensors", 0, "an even group that divides"),
        (source, "safetensors", -2, "an even group that divides"),
        (small, "safetensors", None, "expected a checkpoint in another form"),
    ):
        with pytest.raises(CheckpointError, match=message):
            convert(given, target, form, group=group)
    with pytest.raises(ValueError, match="form: expected safetensors or mapped, which can hold"):
        convert(source, target, "released", group=GROUP)
    with pytest.raises(ValueError, match="moe/linear/w: expected int8 with scales, or an array"):
        checkpoint.save(target, load(small), config_of(3))
    assert not target.exists()


def test_a_changed_value_is_not_rounded(source: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """The checksums of a safetensors source are verified, also of what is rounded."""
    convert(source, tmp_path / "safe", "safetensors")
    path = tmp_path / "safe/layer-01.safetensors"
    value = tensors(tmp_path / "safe")["transformer/decoder_layer_1/moe/linear/w/weight"]
    data = path.read_bytes()
    assert data.count(value) == 1
    path.write_bytes(data.replace(value, bytes([value[0] ^ 1]) + value[1:]))
    with pytest.raises(CheckpointError, match="layer-01.* expected sha256:.* got sha256:"):
        convert(tmp_path / "safe", tmp_path / "target", "safetensors", group=GROUP)


def test_the_command_rounds_experts(
    source: pathlib.Path, small: pathlib.Path, tmp_path: pathlib.Path, capfd: Any
) -> None:
    words = ["convert", str(source), str(tmp_path / "target"), "--to", "safetensors"]
    words += ["--experts", "int4", "--group", str(GROUP)]
    assert checkpoint.main(words) == 0
    size = sum(map(len, tensors(small).values()))
    assert f"4 files with {size:,} bytes of tensors" in capfd.readouterr().out
    assert contents(tmp_path / "target") == contents(small)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--to", "released", "--experts", "int4"],
            "--experts: expected --to safetensors or mapped, got",
        ),
        (["--to", "safetensors", "--group", "64"], "--group: expected together with --experts"),
        (
            ["--to", "safetensors", "--experts", "int5"],
            "argument --experts: invalid choice",
        ),
        (
            ["--to", "safetensors", "--experts", "int4", "--group", "x"],
            "argument --group: expected",
        ),
    ],
)
def test_invalid_options_end_in_one_sentence(words: list[str], message: str, capfd: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        checkpoint.parse_arguments(["convert", "a", "b", *words])
    assert caught.value.code == 2
    assert re.search(f"^error: {message}[^\n]*\n$", capfd.readouterr().err)


def test_groups_that_no_matrix_has_are_refused(tmp_path: pathlib.Path) -> None:
    config = config_of(1)
    checkpoint.save(tmp_path / "source", random_params(config.param_shapes()), config)
    convert(tmp_path / "source", tmp_path / "small", "safetensors", group=4)
    path = tmp_path / "small/layer-00.safetensors"
    data = path.read_bytes()
    changed = data.replace(b'"shape":[2,2,', b'"shape":[2,3,', 1)
    assert len(changed) == len(data) and changed != data
    path.write_bytes(changed)
    with pytest.raises(CheckpointError, match="expected the 21 tensors of the model, .*w/int4'"):
        verify(tmp_path / "small")
