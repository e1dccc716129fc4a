"""Conversions keep every byte, however they are interrupted; verify finds changed values."""

import errno
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

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
from paths import ROOT
from runner import load_server
from small import assert_same, config_of, contents, random_params, save_layers

INDEX, WORK = forms.INDEX, forms.WORK
FORMS = pytest.mark.parametrize("form", ["safetensors", "released"])


# What comes out.


def test_there_and_back_every_byte_is_the_same(tmp_path: pathlib.Path) -> None:
    source = golden.DIRECTORY / "twelve-layers"
    convert(source, tmp_path / "there", "safetensors")
    convert(tmp_path / "there", tmp_path / "back", "released")
    expected = contents(source / "ckpt-0")
    assert contents(tmp_path / "back/ckpt-0") == expected and len(expected) > 100


def test_a_runner_loads_both_forms_alike(tmp_path: pathlib.Path) -> None:
    source = golden.DIRECTORY / "three-layers"
    convert(source, tmp_path, "safetensors")
    one, other = (load_server(d, mesh=(2, 2), pad_sizes=(16,)) for d in (source, tmp_path))
    assert_same(one.params, other.params)
    for leaf, same in zip(*map(jax.tree.leaves, (one.params, other.params)), strict=True):
        assert leaf.sharding == same.sharding


def test_a_converted_directory_has_only_its_files(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    layers = {f"layer-{layer:02d}.safetensors" for layer in range(3)}
    others = {safetensors.OUTER, INDEX, "config.json", "tokenizer.model"}
    assert contents(safe).keys() == layers | others
    convert(safe, tmp_path, "released")
    assert contents(tmp_path) == contents(released)


@FORMS
def test_a_checkpoint_is_replaced_only_with_overwrite(
    form: str, released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    new, target = tmp_path / "new", tmp_path / "target"
    source, before = save_layers(tmp_path / "other", 3, seed=1), safe
    convert(source, new, "safetensors")
    if form == "released":
        source, new, before = new, source, released
    shutil.copytree(before, target)
    with pytest.raises(CheckpointError, match="target: expected a directory without a checkpoint"):
        convert(source, target, form)
    assert contents(target) == contents(before)
    convert(source, target, form, overwrite=True)
    assert contents(target) == contents(new)


def test_progress_counts_every_byte_once(released: pathlib.Path, tmp_path: pathlib.Path) -> None:
    calls: list[tuple[int, int]] = []
    job = convert(released, tmp_path, "safetensors", lambda *call: calls.append(call))
    done = [call[0] for call in calls]
    assert done == sorted(done) and calls[-1] == (job.total, job.total)
    assert job.total == safetensors.read_index(tmp_path).total_size


def test_arrays_are_not_held_in_memory(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer of Grok-1 has 4.9 GB."""
    monkeypatch.setattr(values, "_PIECE_BYTES", 20_000)
    for module, limit in (  # Python allocates as many bytes as a read may return
        (forms, "MAX_TOKENIZER_BYTES"),
        (layout, "_MAX_CONFIG_BYTES"),
        (safetensors, "_MAX_INDEX_BYTES"),
    ):
        monkeypatch.setattr(module, limit, 50_000)
    source, there, back = golden.DIRECTORY / "three-layers", tmp_path / "there", tmp_path / "back"
    shapes = golden.config("three-layers", "float32").param_shapes()
    for work in (
        lambda: conversion.convert(source, there, forms.SAFETENSORS, shapes),
        lambda: conversion.convert(there, back, forms.RELEASED, shapes),
        lambda: conversion.verify(there, shapes),
    ):
        tracemalloc.start()
        work()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 600_000  # a matrix of one layer has 704 kB


def test_the_target_may_be_a_symbolic_link(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "other disk").mkdir()
    (tmp_path / "target").symlink_to("other disk")
    convert(released, tmp_path / "target", "safetensors")
    assert contents(tmp_path / "other disk") == contents(safe)


def test_the_command_finds_either_form(
    safe: pathlib.Path, released: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for directory in (safe, released):
        named = run.parse_arguments(["--checkpoint", str(directory)])
        assert choose_files(named) == (directory, directory / "tokenizer.model")
        monkeypatch.setattr(default_files, "RELEASED", directory)
        assert choose_files(run.parse_arguments([]))[0] == directory


# Verification.


WEIGHT = "transformer/decoder_layer_1/moe/linear_1/w/weight"
NORM = "language_model/rms_norm/scale"


def flip(directory: pathlib.Path, name: str, place: int = 0) -> pathlib.Path:
    """Change one bit of a tensor's values."""
    path = directory / safetensors.read_index(directory).files[name]
    shapes = config_of(3).param_shapes()
    leaves = zip(checkpoint.files(shapes), checkpoint.check_files(directory, shapes), strict=True)
    located = {
        k: v for record, leaf in leaves for k, v in safetensors.tensors(record, leaf).items()
    }
    data = bytearray(path.read_bytes())
    data[located[name].offset + place] ^= 1
    path.write_bytes(data)
    return path


def test_verify_says_what_it_checked(released: pathlib.Path, safe: pathlib.Path) -> None:
    summary, problems = verify(safe)
    assert not problems
    total = safetensors.read_index(safe).total_size
    assert summary == (
        f"{safe}: 59 of 59 tensors in 4 files with {total:,} bytes have the checksums of the index"
    )
    summary, problems = verify(released)
    assert not problems
    assert "headers of 38 files" in summary and "38 of 38 float tensors are finite" in summary
    assert f"no checksums of the values: python checkpoint.py convert {released} DST" in summary


def test_verify_names_each_changed_tensor(
    safe: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = shutil.copytree(safe, tmp_path / "bad")
    changed = {flip(bad, NORM): NORM, flip(bad, WEIGHT, place=100): WEIGHT}
    assert checkpoint.main(["verify", str(bad)]) == 1
    output = capsys.readouterr()
    assert "57 of 59 tensors" in output.out
    hashes = "expected sha256:[0-9a-f]{64}, got sha256:[0-9a-f]{64}; the values have changed"
    lines = output.err.splitlines()
    for line, (path, name) in zip(lines, changed.items(), strict=True):
        assert re.match(re.escape(f"error: {path} ({name}): ") + hashes, line), line


@FORMS
def test_values_that_are_not_finite_are_found(
    form: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = random_params(config_of(3).param_shapes())
    params["language_model/in_out_embed"]["embeddings"][31, 7] = np.nan
    params["transformer/decoder_layer/moe/linear_1"]["w"].scales[2, 1, 0, 0] = -np.inf
    source = tmp_path / "released"
    checkpoint.save(source, params, config_of(3))
    if form == "safetensors":
        with monkeypatch.context() as patch:  # as another program may write it
            patch.setattr(values, "_all_finite", lambda _: True)
            convert(source, tmp_path / form, form)
    summary, (first, last) = verify(tmp_path / form)
    assert "(language_model/in_out_embed/embeddings): expected finite numbers, got nan; " in first
    linear = "transformer/decoder_layer_2/moe/linear_1/w/scales"
    assert f"({linear}): expected finite numbers, got -inf; " in last
    counts = {"released": " 36 of 38 float tensors are finite", "safetensors": ": 57 of 59 tensors"}
    assert counts[form] in summary
    other = {"released": "safetensors", "safetensors": "released"}[form]
    with pytest.raises(CheckpointError, match="expected finite numbers, got nan; the model cannot"):
        convert(tmp_path / form, tmp_path / "converted", other)


def test_changed_values_are_not_converted(
    safe: pathlib.Path, released: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    bad = shutil.copytree(safe, tmp_path / "bad")
    path = flip(bad, WEIGHT)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} ({WEIGHT}): expected sha256:")):
        convert(bad, tmp_path / "out", "released")
    # The files before it are kept, and an intact source starts anew.
    assert os.listdir(tmp_path / "out" / WORK) == ["state.json"]
    convert(safe, tmp_path / "out", "released")
    assert contents(tmp_path / "out") == contents(released)


# Interruptions.


def stop_after(count: int) -> Callable[[int, int], None]:
    """A progress function whose calls raise KeyboardInterrupt after the first `count`."""
    calls = iter(range(count))

    def progress(*_: int) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return progress


def begin(source: pathlib.Path, target: pathlib.Path, form: str = "safetensors") -> None:
    """Interrupt a conversion after some of its files."""
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, form, stop_after(40))


@FORMS
def test_finished_files_are_not_written_again(
    form: str, released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    source, expected = (released, safe) if form == "safetensors" else (safe, released)
    begin(source, tmp_path, form)
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


def test_a_finished_file_that_changed_is_written_again(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    begin(released, tmp_path)
    (tmp_path / safetensors.OUTER).write_bytes(b"other")
    (tmp_path / "layer-00.safetensors").unlink()
    convert(released, tmp_path, "safetensors")
    assert contents(tmp_path) == contents(safe)


@pytest.mark.parametrize("form", forms.FORMS)
def test_a_killed_conversion_resumes_to_the_same_bytes(
    form: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target is copied before each change: a copy is what a kill at that moment leaves."""
    source, target = save_layers(tmp_path / "source", 1), tmp_path / "target"
    if form == "released":
        convert(source, tmp_path / "safe", "safetensors")
        source = tmp_path / "safe"
    copies: list[pathlib.Path] = []

    def tree(directory: pathlib.Path) -> Any:
        return contents(directory), [*map(os.path.isdir, sorted(directory.rglob("*")))]

    def watch(patch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        plain = getattr(module, name)

        def call(*arguments: Any, **how: Any) -> Any:
            if target.exists() and not (copies and tree(copies[-1]) == tree(target)):
                copies.append(shutil.copytree(target, tmp_path / f"{len(copies)}"))
            return plain(*arguments, **how)

        patch.setattr(module, name, call)

    with monkeypatch.context() as patch:
        for name in ("place", "remove", "make_folder"):
            watch(patch, atomic, name)
        watch(patch, os, "rmdir")
        convert(source, target, form)
    assert len(copies) > 10
    for copy in copies:
        for path in (copy / WORK).glob("*"):
            if path.name != "state.json":
                os.truncate(path, path.stat().st_size // 2)  # it was not yet on disk
        convert(source, copy, form)
        assert contents(copy) == contents(target)


@pytest.mark.parametrize("change", ["time", "config", "values"])
def test_a_changed_source_starts_anew(
    change: str, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    source, target = save_layers(tmp_path / "source", 3, seed=1), tmp_path / "target"
    begin(source, target)
    old = (target / safetensors.OUTER).stat().st_ino
    times = {file: file.stat().st_mtime_ns for file in source.rglob("*")}
    if change == "time":
        times[source / "ckpt-0/tensor00005_000"] += 1
    elif change == "config":
        text = (source / "config.json").read_text()
        (source / "config.json").write_text(text.replace('_len": 8', '_len": 9'))
    else:
        save_layers(source, 3, seed=2)
    for file, time_ns in times.items():  # those of an archive or a build may be equal
        os.utime(file, ns=(time_ns, time_ns))
    convert(source, target, "safetensors")
    message = f"{target} is made from another source, or otherwise: starting over"
    assert message in caplog.messages
    assert (target / safetensors.OUTER).stat().st_ino != old
    convert(source, tmp_path / "fresh", "safetensors")
    assert contents(target) == contents(tmp_path / "fresh")


def test_a_damaged_or_changed_state_starts_anew(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """The index gets its checksums of finished files, which are not computed again."""
    begin(released, tmp_path / "begun")
    state = json.loads((tmp_path / "begun" / WORK / "state.json").read_text())
    first = "transformer/decoder_layer_0/rms_norm/scale"
    state["checksums"][first] = f"sha256:{'0' * 64}"
    wrong = {"identity": 1, "files": 2, "checksums": 3}
    for text in ("", "[]", json.dumps(wrong), json.dumps(state), None):
        target = tmp_path / "target"
        if text == json.dumps(state):
            shutil.copytree(tmp_path / "begun", target)  # with its finished files and their times
        (target / WORK).mkdir(parents=True, exist_ok=True)
        path = target / WORK / "state.json"
        path.write_text(text or "")
        if text is None:
            os.truncate(path, 1 << 40)
        for name in (".state.json.partial", "layer-01.safetensors", INDEX):
            (target / WORK / name).write_text("of a process that was killed")
        convert(released, target, "safetensors")
        assert contents(target) == contents(safe)
        shutil.rmtree(target)


@FORMS
def test_a_write_that_fails_can_be_resumed(
    form: str,
    released: pathlib.Path,
    safe: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, expected = (released, safe) if form == "safetensors" else (safe, released)
    fill, calls = atomic.fill, iter(range(8))

    def fill_some(path: str, pieces: Any) -> None:
        fill(path, pieces)
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device", path)

    with monkeypatch.context() as patch:
        patch.setattr(atomic, "fill", fill_some)
        assert checkpoint.main(["convert", str(source), str(tmp_path), "--to", form]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "got an error (No space left on device); fix that and start the same command" in error
    assert os.listdir(tmp_path / WORK) == ["state.json"]
    convert(source, tmp_path, form)
    assert contents(tmp_path) == contents(expected)


@pytest.mark.parametrize("command", ["verify", "convert"])
def test_the_bar_ends_before_the_result_is_printed(
    command: str, safe: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, screen)
    more = [str(tmp_path), "--to", "released"] if command == "convert" else []
    assert checkpoint.main([command, str(safe), *more]) == 0
    *_, bar, result, rest = screen.getvalue().split("\n")
    assert bar.rpartition("\r")[2].startswith("checkpoint: 100%") and rest == ""
    assert {"verify": ": 59 of 59 ", "convert": ": 38 files "}[command] in result


# Other programs that write at the same time.


@pytest.mark.parametrize("name", ["ckpt-0/tensor00000_000", "config.json"])
def test_a_source_that_changes_meanwhile_is_an_error(name: str, tmp_path: pathlib.Path) -> None:
    """Even if the file has been read by then: other files may belong to another model."""
    source = save_layers(tmp_path / "source", 3)

    def touch_at_last(done: int, total: int) -> None:
        if done == total:
            os.utime(source / name)

    with pytest.raises(CheckpointError, match="files that do not change, got some that changed; s"):
        convert(source, tmp_path / "target", "safetensors", touch_at_last)
    assert not (tmp_path / "target" / INDEX).exists()


def test_old_index_is_removed_before_files_are_written(
    safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    shutil.copytree(safe, tmp_path / "target")
    source = save_layers(tmp_path / "source", 3, seed=1)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "target", "safetensors", stop_after(0), overwrite=True)
    assert not (tmp_path / "target" / INDEX).exists()
    convert(source, tmp_path / "target", "safetensors")  # resumes without --overwrite


def test_only_one_conversion_or_save_writes_at_a_time(
    released: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    refused = []

    def again(*_: int) -> None:
        if not refused:
            for write in (
                lambda: convert(released, tmp_path, "safetensors"),
                lambda: save_layers(tmp_path, 3, seed=1),
            ):
                with pytest.raises(CheckpointError, match="one save or conversion at a time"):
                    write()
                refused.append(write)

    convert(released, tmp_path, "safetensors", again)
    assert len(refused) == 2 and not verify(tmp_path)[1]


def test_the_target_is_checked_again_under_the_lock(
    released: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save in another process may be killed after the first check."""
    lock = atomic.lock

    def late(descriptor: int) -> bool:
        (tmp_path / forms.SAVING).touch()
        return lock(descriptor)

    monkeypatch.setattr(atomic, "lock", late)
    with pytest.raises(CheckpointError, match="left over"):
        convert(released, tmp_path, "safetensors")
    assert not (tmp_path / WORK).exists()


def test_the_state_is_read_under_the_lock(
    released: pathlib.Path,
    safe: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another conversion may finish until the lock is taken."""
    begin(released, tmp_path)
    lock, begun, seen = atomic.lock, conversion._begin, []

    def late(descriptor: int) -> bool:
        for name in (safetensors.OUTER, INDEX):
            shutil.copy(safe / name, tmp_path)
        (tmp_path / WORK / "state.json").unlink()
        return lock(descriptor)

    monkeypatch.setattr(atomic, "lock", late)
    monkeypatch.setattr(conversion, "_begin", lambda *call: seen.append(call) or begun(*call))
    convert(released, tmp_path, "safetensors")
    assert seen and contents(tmp_path) == contents(safe)


def test_nothing_is_saved_into_unfinished_conversion(
    released: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    begin(released, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="expected no conversion, got an unfinished one; st"):
        save_layers(tmp_path, 3, seed=1)
    assert contents(tmp_path) == before


def test_a_file_that_others_add_meanwhile_is_kept(
    released: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    thesis = tmp_path / WORK / "thesis.tex"
    with pytest.raises(CheckpointError, match="Directory not empty"):
        convert(released, tmp_path, "safetensors", lambda *_: thesis.write_text("here"))
    assert thesis.read_text() == "here"


# The command, in a process of its own.


def start(*command: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def test_the_command_converts_and_starts_no_device(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Another program may be using the accelerator."""
    target = tmp_path / "made/for it"
    script = str(ROOT / "checkpoint.py")
    arguments = [script, "convert", str(released), str(target), "--to", "safetensors"]
    program = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
sys.argv = {arguments!r}
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    from jax._src import xla_bridge
    sys.exit(end.code or xla_bridge.backends_are_initialized())
"""
    process = start("-c", program)
    out, err = process.communicate(timeout=60)
    total = safetensors.read_index(safe).total_size
    assert (process.returncode, err) == (0, "")
    assert out == f"{target}: 4 files with {total:,} bytes of tensors\n"
    assert contents(target) == contents(safe)


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    while process.poll() is None and not reached():
        time.sleep(0.002)


def test_ctrl_c_ends_a_conversion_that_can_be_resumed(tmp_path: pathlib.Path) -> None:
    source, target = save_layers(tmp_path / "source", 60), tmp_path / "target"
    process = start(ROOT / "checkpoint.py", "convert", source, target, "--to", "safetensors")
    wait_for(process, (target / WORK / "state.json").exists)
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert time.perf_counter() - began < 2
    assert (process.returncode, out) == (130, "")
    assert err == "interrupted; run the same command to resume\n"
    assert (target / WORK).exists() and not (target / INDEX).exists()
    convert(source, target, "safetensors")
    assert verify(target)[1] == []


def test_ctrl_c_during_jax_import_shows_no_traceback(safe: pathlib.Path) -> None:
    process = start(ROOT / "checkpoint.py", "verify", safe)
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    wait_for(process, lambda: "jaxlib" in maps.read_text())
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10) == ("", "")
    assert process.returncode == 130
