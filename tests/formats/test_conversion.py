"""Conversions keep every byte, whatever interrupts them, and damage is found and named."""

import contextlib
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

import checkpoint
import golden
import run
from checkpoint import CheckpointError, convert, verify
from grok1 import default_files
from grok1.cli.job import choose_files
from grok1.formats import atomic, conversion, forms, layout, safetensors, values
from model import LanguageModelConfig, TransformerConfig
from paths import ROOT
from small import assert_same, random_params

INDEX, WORK = forms.INDEX, forms.WORK


def model(layers: int) -> LanguageModelConfig:
    """A configuration whose layers take 5 kB."""
    return LanguageModelConfig(
        vocab_size=32,
        sequence_len=8,
        model=TransformerConfig(
            emb_size=8,
            key_size=2,
            num_q_heads=8,
            num_kv_heads=8,
            num_layers=layers,
            num_experts=2,
            num_selected_experts=2,
        ),
    )


def save(directory: pathlib.Path, layers: int, seed: int = 0) -> pathlib.Path:
    config = model(layers)
    checkpoint.save(directory, random_params(config.param_shapes(), seed), config.to_dict())
    (directory / "tokenizer.model").write_bytes(b"pieces")
    return directory


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    """All files of a directory, hidden ones and those below it too."""
    paths = [path for path in directory.rglob("*") if not path.is_dir()]
    return {os.fspath(path.relative_to(directory)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return save(tmp_path_factory.mktemp("released"), 3)


@pytest.fixture(scope="module")
def safe(released: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("safe")
    convert(released, directory, "safetensors")
    return directory


# What comes out.


@pytest.mark.parametrize("name", golden.NAMES)
def test_there_and_back_again_every_byte_is_the_same(name: str, tmp_path: pathlib.Path) -> None:
    source = golden.DIRECTORY / name
    convert(source, tmp_path / "there", "safetensors")
    convert(tmp_path / "there", tmp_path / "back", "released")
    expected = contents(source / "ckpt-0")
    assert contents(tmp_path / "back/ckpt-0") == expected and len(expected) > 30
    for folder in ("there", "back"):
        assert (tmp_path / folder / "config.json").read_bytes() == (
            source / "config.json"
        ).read_bytes()
        assert not (tmp_path / folder / WORK).exists()
    shapes = golden.config(name, "float32").param_shapes()
    assert_same(checkpoint.load(tmp_path / "there", shapes), checkpoint.load(source, shapes))
    convert(tmp_path / "back", tmp_path / "again", "safetensors")
    assert contents(tmp_path / "again") == contents(tmp_path / "there")


def test_a_converted_directory_has_all_that_belongs_to_it_and_nothing_else(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    layers = {f"layer-{layer:02d}.safetensors" for layer in range(3)}
    others = {safetensors.OUTER, INDEX, "config.json", "tokenizer.model"}
    assert contents(safe).keys() == layers | others
    convert(safe, tmp_path, "released")
    assert contents(tmp_path) == contents(released)


def test_a_finished_conversion_done_again_ends_in_the_same_bytes(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for _ in range(2):
        convert(released, tmp_path, "safetensors", overwrite=True)
        assert contents(tmp_path) == contents(safe)


@pytest.mark.parametrize("form", ["safetensors", "released"])
def test_a_checkpoint_is_replaced_only_when_that_is_asked_for(
    form: str, released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    new, target = tmp_path / "new", tmp_path / "target"
    source = save(tmp_path / "other", 3, seed=1)
    convert(source, new, "safetensors")
    before = released
    if form == "safetensors":
        before = safe
    else:
        source, new = new, source
    shutil.copytree(before, target)
    with pytest.raises(CheckpointError, match="target: expected a directory without a checkpoint"):
        convert(source, target, form)
    assert contents(target) == contents(before)
    arguments = ["convert", str(source), str(target), "--to", form, "--overwrite"]
    assert checkpoint.main(arguments) == 0
    assert contents(target) == contents(new)


def test_progress_counts_every_byte_once(released: pathlib.Path, tmp_path: pathlib.Path) -> None:
    calls: list[tuple[int, int]] = []
    job = convert(released, tmp_path, "safetensors", lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done) and calls[-1] == (job.total, job.total)
    assert job.total == safetensors.read_index(tmp_path).total_size


def test_arrays_are_not_held_in_memory(tmp_path: pathlib.Path) -> None:
    """A layer of Grok-1 has 4.9 GB."""
    program = f"""
import threading, time
import sys; sys.path.insert(0, {str(ROOT)!r})
import jax, jax.numpy as jnp, numpy as np
import checkpoint, model
def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
config = model.LanguageModelConfig(vocab_size=64, sequence_len=8, model=model.TransformerConfig(
    emb_size=512, key_size=8, num_q_heads=8, num_kv_heads=8, num_layers=1, num_experts=8,
    num_selected_experts=2, widening_factor=16))
ones = jax.tree.map(lambda s: np.broadcast_to(np.ones((), s.dtype), s.shape), config.param_shapes())
checkpoint.save({str(tmp_path / "a")!r}, ones, config.to_dict())
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
there = checkpoint.convert({str(tmp_path / "a")!r}, {str(tmp_path / "b")!r}, "safetensors")
checkpoint.convert({str(tmp_path / "b")!r}, {str(tmp_path / "c")!r}, "released")
checkpoint.verify({str(tmp_path / "b")!r})
done = True
thread.join()
print(there.total, peak - before)
"""
    command = [sys.executable, "-W", "error", "-c", program]
    printed = subprocess.run(command, capture_output=True, check=True, cwd=tmp_path).stdout
    total, grown = map(int, printed.split())
    assert total > 60e6
    assert grown < 32e6, printed  # four buffers of 4 MiB, and the rest of the work


# Verification.


def test_what_is_whole_is_verified(released: pathlib.Path, safe: pathlib.Path) -> None:
    summary, problems = verify(safe)
    assert not problems
    total = safetensors.read_index(safe).total_size
    assert summary == (
        f"{safe}: 59 of 59 tensors in 4 files with {total:,} bytes have the checksums of the index"
    )
    summary, problems = verify(released)
    assert not problems
    assert "headers of 38 files" in summary and "38 of 38 float tensors are finite" in summary
    assert "this form holds no checksums" in summary
    assert f"convert {released} DST --to safetensors" in summary


def flip(directory: pathlib.Path, name: str, place: int = 0) -> pathlib.Path:
    """Change one bit of a tensor's values."""
    path = directory / safetensors.read_index(directory).files[name]
    shapes = model(3).param_shapes()
    leaves = zip(checkpoint.files(shapes), checkpoint.check_files(directory, shapes), strict=True)
    located = {
        k: v for record, leaf in leaves for k, v in safetensors.tensors(record, leaf).items()
    }
    data = bytearray(path.read_bytes())
    data[located[name].offset + place] ^= 1
    path.write_bytes(data)
    return path


WEIGHT = "transformer/decoder_layer_1/moe/linear_1/w/weight"
NORM = "language_model/rms_norm/scale"


def test_a_flipped_bit_is_found_and_named(safe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(safe, tmp_path / "bad")
    first, last = flip(tmp_path / "bad", NORM), flip(tmp_path / "bad", WEIGHT, place=100)
    summary, problems = verify(tmp_path / "bad")
    assert "57 of 59 tensors" in summary
    hashes = "expected sha256:[0-9a-f]{64}, got sha256:[0-9a-f]{64}; the values have changed"
    assert len(problems) == 2
    for problem, path, name in zip(problems, (first, last), (NORM, WEIGHT), strict=True):
        assert re.match(re.escape(f"{path} ({name}): ") + hashes, problem), problem


@pytest.mark.parametrize("form", ["released", "safetensors"])
def test_values_that_are_not_finite_are_found(
    form: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = random_params(model(3).param_shapes())
    params["language_model/in_out_embed"]["embeddings"][31, 7] = np.nan
    params["transformer/decoder_layer/moe/linear_1"]["w"].scales[2, 1, 0, 0] = -np.inf
    source = tmp_path / "released"
    checkpoint.save(source, params, model(3).to_dict())
    if form == "safetensors":
        with pytest.MonkeyPatch.context() as patch:  # as written by another program
            patch.setattr(values, "_all_finite", lambda _: True)
            convert(source, tmp_path / "safetensors", form)
    assert checkpoint.main(["verify", str(tmp_path / form)]) == 1
    output = capsys.readouterr()
    first, last = output.err.splitlines()
    assert "(language_model/in_out_embed/embeddings): expected finite numbers, got nan; " in first
    linear = (
        "(transformer/decoder_layer_2/moe/linear_1/w/scales): expected finite numbers, got -inf"
    )
    assert first.startswith(f"error: {tmp_path / form}/") and linear in last
    counts = {"released": " 36 of 38 float tensors are finite", "safetensors": ": 57 of 59 tensors"}
    assert counts[form] in output.out
    other = {"released": "safetensors", "safetensors": "released"}[form]
    with pytest.raises(CheckpointError, match="expected finite numbers, got nan; the model cannot"):
        convert(tmp_path / form, tmp_path / "converted", other)


def test_damaged_values_are_not_converted(safe: pathlib.Path, tmp_path: pathlib.Path) -> None:
    shutil.copytree(safe, tmp_path / "bad")
    path = flip(tmp_path / "bad", WEIGHT)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} ({WEIGHT}): expected sha256:")):
        convert(tmp_path / "bad", tmp_path / "out", "released")
    # What came before it stays, and the good source starts anew.
    assert os.listdir(tmp_path / "out" / WORK) == ["state.json"]
    convert(safe, tmp_path / "out", "released")
    convert(tmp_path / "out", tmp_path / "again", "safetensors")
    assert contents(tmp_path / "again") == contents(safe)


# Interruptions.


def stop_after(count: int) -> Callable[[int, int], None]:
    """A progress that raises, as if by a signal, once so many calls were made."""
    calls = iter(range(count))

    def progress(*_: int) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("form", ["safetensors", "released"])
def test_finished_files_are_not_written_again(
    form: str, released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source, expected = (released, safe) if form == "safetensors" else (safe, released)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path, form, stop_after(40))
    state = json.loads((tmp_path / WORK / "state.json").read_text())
    finished = {name: (tmp_path / name).stat() for name in state["files"]}
    assert 1 < len(finished) < len(contents(expected)) - 3
    assert os.listdir(tmp_path / WORK) == ["state.json"]
    for read in (verify, lambda directory: checkpoint.check_files(directory, {})):
        with pytest.raises(CheckpointError, match="got an unfinished conversion"):
            read(tmp_path)
    convert(source, tmp_path, form)
    assert contents(tmp_path) == contents(expected)
    for name, before in finished.items():
        after = (tmp_path / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_finished_file_that_was_touched_is_written_again(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(released, tmp_path, "safetensors", stop_after(40))
    (tmp_path / safetensors.OUTER).write_bytes(b"other")
    (tmp_path / "layer-00.safetensors").unlink()
    convert(released, tmp_path, "safetensors")
    assert contents(tmp_path) == contents(safe)


@pytest.mark.parametrize("change", ["touched", "config", "other", "other, same times"])
def test_another_source_starts_anew(
    change: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = save(tmp_path / "source", 3, seed=1), tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, "safetensors", stop_after(40))
    old = (target / safetensors.OUTER).stat().st_ino
    if change == "touched":
        os.utime(source / "ckpt-0/tensor00005_000", ns=(1, 1))
    elif change == "config":
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | {"sequence_len": 9}))
    else:
        times = {file: file.stat().st_mtime_ns for file in source.rglob("*")}
        save(source, 3, seed=2)
        if change == "other, same times":  # as an archive or a build may have them
            for file, time_ns in times.items():
                os.utime(file, ns=(time_ns, time_ns))
    convert(source, target, "safetensors")
    assert f"{source} is not the source of {target}: starting over" in caplog.messages
    assert (target / safetensors.OUTER).stat().st_ino != old
    convert(source, tmp_path / "fresh", "safetensors")
    assert contents(target) == contents(tmp_path / "fresh")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"identity": 1, "files": 2, "checksums": 3}'])
def test_a_damaged_state_starts_anew(
    text: str, released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / "state.json").write_text(text)
    for name in (".state.json.partial", "layer-01.safetensors", INDEX):
        (tmp_path / WORK / name).write_text("of a process that was killed")
    convert(released, tmp_path, "safetensors")
    assert contents(tmp_path) == contents(safe)


def test_a_changed_state_is_not_believed(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Its checksums are those of the index, which nothing computes again."""
    first = "transformer/decoder_layer_0/rms_norm/scale"
    with pytest.raises(KeyboardInterrupt):
        convert(released, tmp_path / "begun", "safetensors", stop_after(40))
    state = json.loads((tmp_path / "begun" / WORK / "state.json").read_text())
    assert first in state["checksums"]
    for number, checksum in enumerate((None, 5, "sha256:", f"sha256:{'0' * 64}")):
        changed = {**state, "checksums": state["checksums"] | {first: checksum}}
        target = shutil.copytree(tmp_path / "begun", tmp_path / f"{number}")  # with its times
        (target / WORK / "state.json").write_text(json.dumps(changed))
        convert(released, target, "safetensors")
        assert contents(target) == contents(safe)


@pytest.mark.parametrize("form", ["safetensors", "released"])
def test_files_of_others_are_never_removed(
    form: str, released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Neither those that were there before nor those that come while it works."""
    source = released if form == "safetensors" else safe
    work = tmp_path / WORK
    work.mkdir()
    for name in ("thesis.tex", "config.json"):
        (work / name).write_text("of somebody else")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="thesis.tex: expected only files of an unf.*got 1 "):
        convert(source, tmp_path, form)
    assert contents(tmp_path) == before
    shutil.rmtree(work)
    for stop in (stop_after(20), lambda *_: (work / "thesis.tex").write_text("here")):
        with contextlib.suppress(KeyboardInterrupt, CheckpointError):
            convert(source, tmp_path, form, stop)
    assert (work / "thesis.tex").read_text() == "here"


def test_an_endless_state_is_not_read_to_its_end(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / WORK).mkdir()
    (tmp_path / WORK / "state.json").touch()
    os.truncate(tmp_path / WORK / "state.json", 1 << 40)
    convert(released, tmp_path, "safetensors")
    assert contents(tmp_path) == contents(safe)


@pytest.mark.parametrize("form", ["safetensors", "released"])
def test_a_source_in_the_work_directory_is_refused(
    form: str, released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(released if form == "safetensors" else safe, tmp_path / WORK)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="expected a source outside of the target's own fi"):
        convert(tmp_path / WORK, tmp_path, form)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("ckpt-0/tensor00000_000", "expected the file that was checked"),
        ("config.json", "files that do not change"),
    ],
)
def test_a_source_that_changes_meanwhile_is_an_error(
    name: str, part: str, tmp_path: pathlib.Path
) -> None:
    source = save(tmp_path / "source", 3)
    touch = lambda *_: os.utime(source / name)  # noqa: E731
    with pytest.raises(CheckpointError, match=rf"{part}, got (one|some) that changed; start"):
        convert(source, tmp_path / "target", "safetensors", touch)
    assert not (tmp_path / "target" / INDEX).exists()


def test_a_source_is_converted_as_it_was_checked(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one that takes its place after its headers were read and before its values are."""
    source, target = save(tmp_path / "source", 3), tmp_path / "target"
    check = layout.check_files

    def then_replace(*arguments: Any) -> Any:
        leaves = check(*arguments)
        path = source / "ckpt-0/tensor00007_000"
        (tmp_path / "new").write_bytes(bytes(64) + path.read_bytes())
        (tmp_path / "new").rename(path)
        return leaves

    monkeypatch.setattr(layout, "check_files", then_replace)
    with pytest.raises(CheckpointError, match="tensor00007_000 .*: expected the file that was ch"):
        convert(source, target, "safetensors")
    assert not (target / INDEX).exists()


def test_an_old_index_never_stands_beside_new_files(
    safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(safe, tmp_path / "target")
    source = save(tmp_path / "source", 3, seed=1)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "target", "safetensors", stop_after(0), overwrite=True)
    assert not (tmp_path / "target" / INDEX).exists()
    convert(source, tmp_path / "target", "safetensors")  # it was begun, and goes on


def test_two_conversions_to_one_place_do_not_mix(
    released: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    refused = []

    def again(*_: int) -> None:
        if not refused:
            for write in (
                lambda: convert(released, tmp_path, "safetensors"),
                lambda: save(tmp_path, 3, seed=1),
            ):
                with pytest.raises(CheckpointError, match="one save or conversion at a time"):
                    write()
                refused.append(write)

    convert(released, tmp_path, "safetensors", again)
    assert len(refused) == 2 and not verify(tmp_path)[1]


def test_what_appears_before_the_lock_is_seen(
    released: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A save that another process was killed in, after the first look at the target."""
    lock = atomic.lock

    def late(descriptor: int) -> bool:
        (tmp_path / forms.SAVING).touch()
        return lock(descriptor)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match="left over"):
        patch.setattr(atomic, "lock", late)
        convert(released, tmp_path, "safetensors")
    assert not (tmp_path / WORK).exists()


def test_nothing_is_saved_into_an_unfinished_conversion(
    released: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(released, tmp_path, "safetensors", stop_after(40))
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="expected no conversion, got an unfinished one; st"):
        save(tmp_path, 3, seed=1)
    assert contents(tmp_path) == before
    convert(released, tmp_path, "safetensors")


def test_a_state_is_read_under_the_lock(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Of another conversion, which goes on until the lock is taken."""
    with pytest.raises(KeyboardInterrupt):
        convert(released, tmp_path, "safetensors", stop_after(40))
    lock, seen = atomic.lock, []

    def late(descriptor: int) -> bool:
        for name in (safetensors.OUTER, INDEX):
            shutil.copy(safe / name, tmp_path)
        (tmp_path / WORK / "state.json").unlink()
        return lock(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic, "lock", late)
        patch.setattr(conversion, "_begin", lambda *call: seen.append(call) or BEGIN(*call))
        convert(released, tmp_path, "safetensors")
    assert seen and contents(tmp_path) == contents(safe)


BEGIN = conversion._begin


# The command.


class Result(NamedTuple):
    """What a command left behind."""

    status: int
    out: str
    err: str


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", ROOT / "checkpoint.py", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def command(*arguments: object) -> Result:
    process = start(*arguments)
    out, err = process.communicate(timeout=60)
    return Result(process.returncode, out, err)


def test_the_command_converts_and_verifies(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    target = tmp_path / "made/for it"
    result = command("convert", released, target, "--to", "safetensors")
    assert result == (0, f"{target}: 4 files with {_total(safe):,} bytes of tensors\n", "")
    assert contents(target) == contents(safe)
    result = command("verify", target)
    assert (result.status, result.err) == (0, "") and "59 of 59 tensors in 4 files" in result.out
    path = flip(target, WEIGHT)
    result = command("verify", target)
    assert result.status == 1 and "58 of 59 tensors" in result.out
    assert result.err.startswith(f"error: {path} ({WEIGHT}): expected sha256:")
    assert result.err.count("\n") == 1


def _total(directory: pathlib.Path) -> int:
    return safetensors.read_index(directory).total_size


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "error: the following arguments are required: convert|verify; --help"),
        (["convert", "a"], "required: DST, --to; --help"),
        (["convert", "a", "b", "--to", "zip"], "argument --to: invalid choice: 'zip'"),
        (["verify", "a", "b"], "unrecognized arguments: b"),
        (["convert", "a", "", "--to", "released"], "DST: expected a path, got an empty string"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(
    arguments: list[str], part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        checkpoint.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert part in error and error.count("\n") == 1


def _to(directory: pathlib.Path, *parts: str) -> list[object]:
    return ["convert", directory / "released", directory.joinpath(*parts), "--to", "safetensors"]


def _with(name: str, text: str = "x") -> Callable[[pathlib.Path], list[object]]:
    """Convert to a directory that holds a file already."""

    def arguments(directory: pathlib.Path) -> list[object]:
        (directory / "target" / name).parent.mkdir(parents=True)
        (directory / "target" / name).write_text(text)
        return _to(directory, "target")

    return arguments


def _without_config(directory: pathlib.Path) -> list[object]:
    (directory / "released/config.json").unlink()
    return _to(directory, "target")


def _broken(directory: pathlib.Path) -> list[object]:
    os.truncate(directory / "released/ckpt-0/tensor00003_000", 100)
    return _to(directory, "target")


# fmt: off
REFUSALS: dict[str, tuple[Callable[[pathlib.Path], list[object]], str]] = {
    "no-source": (lambda d: ["convert", d / "no", d / "target", "--to", "released"],
                  "no: expected a directory that holds ckpt-0 or model"),
    "no-checkpoint": (lambda d: ["convert", d, d / "target", "--to", "released"],
                      "index.json, got one with neither; name the right one"),
    "nothing-to-verify": (lambda d: ["verify", d], "got one with neither; name the right one"),
    "already": (lambda d: ["convert", d / "released", d / "target", "--to", "released"],
                "released: expected a checkpoint in another form, got one that is released"),
    "broken-source": (_broken, "the file is cut"),
    "source-of-grok-1": (_without_config, "got 38 (3 layers); correct the number of layers"),
    "onto-itself": (lambda d: _to(d, "released/../released/"), "got the source itself; name"),
    "into-its-files": (lambda d: _to(d, "released/ckpt-0/x"), "got a part of the source; name"),
    "onto-a-file": (lambda d: _to(d, "released/config.json"), "expected a directory to write to"),
    "below-a-file": (lambda d: _to(d, "released/config.json/x"), "got an error (Not a directory)"),
    "no-such-place": (lambda d: ["convert", d / "released", "/proc/x", "--to", "safetensors"],
                      "/proc/x: expected files that can be read and written, got an error (No s"),
    "stale-layer": (_with("layer-03.safetensors"),
                    "layer-03.safetensors: expected only files that the new checkpoint r"),
    "stale-form": (_with("ckpt-0/tensor00000_000"), "target/ckpt-0: expected only files that"),
}
# fmt: on


@pytest.mark.parametrize(("make", "part"), REFUSALS.values(), ids=REFUSALS.keys())
def test_what_cannot_be_is_refused_in_one_sentence_and_writes_nothing(
    make: Callable[[pathlib.Path], list[object]],
    part: str,
    released: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(released, tmp_path / "released")
    arguments = make(tmp_path)
    before = contents(tmp_path)
    assert checkpoint.main([str(argument) for argument in arguments]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    assert part in output.err and not output.out
    assert contents(tmp_path) == before


def test_a_directory_that_may_not_be_read_is_not_called_empty(
    released: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system hides what is in it; root may read all."""
    monkeypatch.setattr(os.path, "isfile", lambda _: False)
    monkeypatch.setattr(os.path, "isdir", lambda path: str(path) == str(released))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(checkpoint.CheckpointError, match="got one that may not be read; name the"):
        checkpoint.read_model_config(released)


@pytest.mark.parametrize("name", ["{0}.safetensors", f"{WORK}/{{0}}", f"{WORK}/é{{0}}"])
def test_names_in_an_error_stay_on_its_line(
    name: str, released: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name.format("x\nerror: forged\x1b[31m\u2028")
    path.parent.mkdir(exist_ok=True)
    path.touch()
    assert checkpoint.main(["convert", str(released), str(tmp_path), "--to", "safetensors"]) == 1
    shown = tmp_path / name.format("x\\nerror: forged\\x1b[31m\\u2028")
    error = capsys.readouterr().err
    assert error.startswith(f"error: {shown}: expected only files ") and error.count("\n") == 1


def link_to_itself(path: pathlib.Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, link_to_itself])
def test_a_tokenizer_that_is_no_file_is_named(
    make: Callable[[pathlib.Path], object], released: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source = shutil.copytree(released, tmp_path / "source")
    (source / "tokenizer.model").unlink()
    make(source / "tokenizer.model")
    with pytest.raises(CheckpointError, match="source/tokenizer.model: expected files that can"):
        convert(source, tmp_path / "target", "safetensors")


def test_an_endless_tokenizer_is_not_copied(
    released: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "MAX_TOKENIZER_BYTES", 1000)
    source = shutil.copytree(released, tmp_path / "source")
    (source / "tokenizer.model").write_bytes(bytes(1000))
    convert(source, tmp_path / "target", "safetensors")
    (source / "tokenizer.model").write_bytes(bytes(1001))
    with pytest.raises(CheckpointError, match="source/tokenizer.model: expected at most 1000 byt"):
        convert(source, tmp_path / "target", "safetensors", overwrite=True)
    assert (tmp_path / "target/tokenizer.model").read_bytes() == bytes(1000)


@pytest.mark.parametrize(
    ("form", "name", "kind"),
    [
        ("safetensors", WORK, "directory"),
        ("safetensors", f"{WORK}/state.json", "file"),
        ("safetensors", f"{WORK}/.state.json.partial", "file"),
        ("safetensors", f"{WORK}/layer-00.safetensors", "file"),
        ("safetensors", "layer-02.safetensors", "file"),
        ("safetensors", INDEX, "file"),
        ("safetensors", "config.json", "nothing"),
        ("safetensors", "tokenizer.model", "file"),
        ("released", "ckpt-0", "directory"),
        ("released", "ckpt-0/tensor00037_000", "file"),
        ("released", f"{WORK}/tensor00000_000", "nothing"),
    ],
)
def test_links_in_the_target_are_not_followed(
    form: str,
    name: str,
    kind: str,
    released: pathlib.Path,
    safe: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    others = tmp_path / "others"
    others.mkdir()
    (others / "state.json").write_text("{}")
    (others / "file").write_bytes(b"of somebody else")
    link = tmp_path / "target" / name
    link.parent.mkdir(parents=True)
    link.symlink_to({"directory": others, "file": others / "file", "nothing": others / "no"}[kind])
    before = contents(others)
    source = released if form == "safetensors" else safe
    status = checkpoint.main(["convert", str(source), str(tmp_path / "target"), "--to", form])
    error = capsys.readouterr().err
    assert contents(others) == before and link.is_symlink()
    assert status == 1 and error.count("\n") == 1
    assert error.startswith(f"error: {link}: ") and "got an error (it is a link, which is" in error


def test_the_target_itself_may_be_a_link(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "other disk").mkdir()
    (tmp_path / "target").symlink_to("other disk")
    convert(released, tmp_path / "target", "safetensors")
    assert contents(tmp_path / "other disk") == contents(safe)


def test_released_files_are_not_left_beside_others(
    safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "a/ckpt-0").mkdir(parents=True)
    (tmp_path / "a/ckpt-0/tensor00038_000").touch()
    with pytest.raises(CheckpointError, match="ckpt-0/tensor00038_000: expected only files that"):
        convert(safe, tmp_path / "a", "released")
    shutil.copytree(safe, tmp_path / "b")
    with pytest.raises(CheckpointError, match="index.json: expected only files that the new"):
        convert(safe, tmp_path / "b", "released")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_no_file_of_another_model_is_left(
    name: str, monkeypatch: pytest.MonkeyPatch, released: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Without config.json, a checkpoint is Grok-1: a stale one would make it another model."""
    shutil.copytree(released, tmp_path / "source")
    (tmp_path / "source" / name).unlink()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / name).write_text("{}")
    monkeypatch.setattr(checkpoint, "grok_1", lambda: model(3))
    with pytest.raises(CheckpointError, match=f"target/{name}: expected only files that the new"):
        convert(tmp_path / "source", tmp_path / "target", "safetensors")
    (tmp_path / "target" / name).unlink()
    convert(tmp_path / "source", tmp_path / "target", "safetensors")
    assert not (tmp_path / "target" / name).exists()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_a_file_of_another_program_is_not_replaced(
    name: str, released: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    other = tmp_path / name
    other.write_text('{"of": "another program"}')
    with pytest.raises(
        CheckpointError, match=f"{name}: expected no file, or the source's own, got"
    ):
        convert(released, tmp_path, "safetensors")
    assert contents(tmp_path) == {name: other.read_bytes()}
    shutil.copy(released / name, other)
    convert(released, tmp_path, "safetensors")
    other.write_text("damaged")  # of a checkpoint, which is replaced as a whole
    convert(released, tmp_path, "safetensors", overwrite=True)
    assert other.read_bytes() == (released / name).read_bytes()


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("released", "ckpt-0/model.bin"),  # beside which a config.json is not a checkpoint's
        ("released", f"{WORK}/other"),
        ("released", "ckpt-0/tensor00001_000"),
        ("safetensors", "layer-00.safetensors"),
    ],
)
def test_no_file_is_replaced_where_no_checkpoint_is(
    form: str, name: str, released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("of somebody else")
    if name.endswith("other"):
        (tmp_path / name).unlink()
    if name != "layer-00.safetensors":
        (tmp_path / "config.json").write_text('{"of": "another program"}')
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="expected no file, or the source's own, got another"):
        convert(released if form == "safetensors" else safe, tmp_path, form)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("form", ["safetensors", "released"])
def test_an_index_of_another_program_is_not_replaced(
    form: str, released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["of another"]}')
    text = json.dumps({"metadata": {"total_size": 5}, "weight_map": {"model.norm": "model.st"}})
    for index in (text, "", "version https://git-lfs.github.com/spec/v1", '{"a": NaN}'):
        (tmp_path / INDEX).write_text(index)
        before = contents(tmp_path)
        with pytest.raises(CheckpointError, match="index.json: expected no index, or one of this"):
            convert(released if form == "safetensors" else safe, tmp_path, form)
        assert contents(tmp_path) == before


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    released: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(CheckpointError, match=r"expected [\d,]+ bytes of free disk .*10,000 by"):
        convert(released, tmp_path / "target", "safetensors")
    assert not os.listdir(tmp_path / "target")


def test_what_is_copied_needs_space_too(
    released: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(released, tmp_path / "source")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 30))
    os.truncate(source / "tokenizer.model", 1 << 31)
    with pytest.raises(CheckpointError, match=r"expected 2,147,[\d,]+ bytes of free disk space"):
        convert(source, tmp_path / "target", "safetensors")


@pytest.mark.parametrize("form", ["safetensors", "released"])
def test_a_write_that_fails_is_one_sentence_and_can_go_on(
    form: str, released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """A limit on the size of files stands for a full disk: only some of them fit."""
    source, expected = (released, safe) if form == "safetensors" else (safe, released)
    limited = (
        f"import resource, sys; sys.path.insert(0, {str(ROOT)!r}); "
        "import checkpoint; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700)); "
        "sys.exit(checkpoint.main(['convert', *sys.argv[1:]]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", limited, source, tmp_path, "--to", form],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
    assert "File too large" in process.stderr
    assert "start the same command again: it continues from there" in process.stderr
    convert(source, tmp_path, form)
    assert contents(tmp_path) == contents(expected)


def start_work(*arguments: object, target: pathlib.Path) -> subprocess.Popen[str]:
    """Start a conversion, and return when it has begun or has finished one more file."""

    def written() -> int:
        try:
            return (target / WORK / "state.json").stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    before = written()
    process = start(*arguments)
    while process.poll() is None and written() == before:
        time.sleep(0.002)
    return process


def test_ctrl_c_ends_it_at_once_and_the_same_command_goes_on(tmp_path: pathlib.Path) -> None:
    source, target = save(tmp_path / "source", 300), tmp_path / "target"
    process = start_work("convert", source, target, "--to", "safetensors", target=target)
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert time.perf_counter() - began < 2
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted; run the same command to resume\n"
    assert (target / WORK).exists() and not (target / INDEX).exists()
    assert command("convert", source, target, "--to", "safetensors").status == 0
    convert(source, tmp_path / "whole", "safetensors")
    assert contents(target) == contents(tmp_path / "whole")


def test_ctrl_c_while_jax_is_imported_shows_no_traceback(safe: pathlib.Path) -> None:
    for seconds in (0.2, 0.4, 0.6):
        process = start("verify", safe)
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
        assert process.returncode == 130
        assert err in ("", "interrupted; run the same command to resume\n")


@pytest.mark.slow
@pytest.mark.parametrize(("form", "layers"), [("safetensors", 120), ("released", 30)])
def test_kills_at_random_moments_end_in_the_same_bytes(
    form: str, layers: int, tmp_path: pathlib.Path
) -> None:
    """Killed at least ten times, most of them between its first and its last file."""
    source, whole = save(tmp_path / "source", layers), tmp_path / "whole"
    if form == "released":
        convert(source, tmp_path / "safe", "safetensors")
        source = tmp_path / "safe"
    began = time.perf_counter()
    files = len(convert(source, whole, form).outputs)
    seconds = time.perf_counter() - began
    target, state = tmp_path / "target", tmp_path / "target" / WORK / "state.json"
    rng, kills, progress = random.Random(0), 0, []
    while kills < 10:
        process = start_work("convert", source, target, "--to", form, target=target)
        time.sleep(rng.uniform(0.0, seconds / 8))
        process.kill()
        out, err = process.communicate()
        assert not err.count("Traceback"), err
        if process.returncode == 0:
            # It ended before it could be killed: from the start again.
            assert contents(target) == contents(whole)
            shutil.rmtree(target)
            continue
        kills += 1
        if state.exists():
            progress.append(len(json.loads(state.read_text())["files"]))
    assert command("convert", source, target, "--to", form).status == 0
    assert contents(target) == contents(whole)
    midway = {done for done in progress if 0 < done < files}
    assert len(midway) >= 5, (files, progress)
    print(f"{files} files; finished at each kill: {progress}")


def test_the_command_touches_no_device(safe: pathlib.Path) -> None:
    """On a machine whose accelerators are in use, it must not take their memory."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import checkpoint; "
        f"status = checkpoint.main(['verify', {str(safe)!r}]); "
        "from jax._src import xla_bridge; sys.exit(status or xla_bridge.backends_are_initialized())"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_logits_are_those_of_the_released_files(tmp_path: pathlib.Path) -> None:
    from runner import load_server

    source = golden.DIRECTORY / "three-layers"
    convert(source, tmp_path, "safetensors")
    tokens = golden.recorded("three-layers").tokens[:1, :16]
    one, other = (load_server(d, dtype="float32", pad_sizes=(16,)) for d in (source, tmp_path))
    np.testing.assert_array_equal(one.logits(tokens), other.logits(tokens))
    assert len(jax.tree.leaves(one.params)) == len(jax.tree.leaves(other.params))


def test_run_finds_either_form_by_itself(
    safe: pathlib.Path, released: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in (safe, released):
        named = run.parse_arguments(["--checkpoint", str(directory)])
        assert choose_files(named) == (directory, directory / "tokenizer.model")
        monkeypatch.setattr(default_files, "RELEASED", directory)
        assert choose_files(run.parse_arguments([]))[0] == directory
