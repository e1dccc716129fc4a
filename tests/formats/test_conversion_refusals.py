"""What a conversion refuses, in one sentence, before it writes or replaces any file."""

import os
import pathlib
import shutil
from collections.abc import Callable

import pytest

import checkpoint
from checkpoint import CheckpointError, convert
from grok1.formats import forms
from small import config_of, contents

INDEX, WORK = forms.INDEX, forms.WORK
OTHERS = '{"of": "another program"}'


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


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which the command fails."""
    assert checkpoint.main([*map(str, arguments)]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: ") and output.err.count("\n") == 1 and not output.out
    return output.err


def cut_tensor(source: pathlib.Path) -> pathlib.Path:
    os.truncate(source / "ckpt-0/tensor00003_000", 100)
    return source


def without_config(source: pathlib.Path) -> pathlib.Path:
    (source / "config.json").unlink()
    return source


def with_pipe(source: pathlib.Path) -> pathlib.Path:
    (source / "tokenizer.model").unlink()
    os.mkfifo(source / "tokenizer.model")
    return source


def in_work(source: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(source, source / "target" / WORK))


# fmt: off
# id -> (source, path of the target in the source's directory, part of the message)
SOURCE_CASES: dict[str, tuple[Callable[[pathlib.Path], pathlib.Path], str, str]] = {
    "no-source": (lambda d: d / "no", "target",
                  "no: expected a directory that holds ckpt-0, model"),
    "no-checkpoint": (lambda d: d / "ckpt-0", "target",
                      "index.json, got one with none of these; name the right one"),
    "cut-tensor": (cut_tensor, "target", "the file is cut"),
    "no-config": (without_config, "target", "got 38 (3 layers); correct the number of layers"),
    "pipe": (with_pipe, "target", "tokenizer.model: expected files that can be read and written"),
    "onto-itself": (lambda d: d, "ckpt-0/../", "got the source itself; name"),
    "into-its-files": (lambda d: d, "ckpt-0/x", "got a part of the source; name"),
    "from-work": (in_work, "target", "expected a source outside of the target's own files"),
    "onto-a-file": (lambda d: d, "config.json", "config.json: expected a directory to write to"),
    "below-a-file": (lambda d: d, "config.json/x", "got an error (Not a directory)"),
}
# fmt: on


@pytest.mark.parametrize(("make", "target", "part"), SOURCE_CASES.values(), ids=SOURCE_CASES)
def test_unsuitable_sources_and_targets_are_refused(
    make: Callable[[pathlib.Path], pathlib.Path],
    target: str,
    part: str,
    released: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    directory = shutil.copytree(released, tmp_path / "source")
    source = make(directory)
    before = contents(directory)
    error = refusal(capsys, "convert", source, directory / target, "--to", "safetensors")
    assert part in error
    assert contents(directory) == before


def test_the_same_form_is_refused(
    released: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refusal(capsys, "convert", released, tmp_path, "--to", "released")
    assert f"{released}: expected a checkpoint in another form, got one that is released" in error


OVER = "expected only files that the new checkpoint replaces, got 1 of another one"
OTHER = "expected no file, or the source's own, got another program's"
OWN_INDEX = '{"metadata": {"format": "grok-1-jax/1"}}'
ODD = "x\nerror: forged\x1b[31m\u2028é.safetensors"
# fmt: off
# id -> (form, files in the target and their text, None for a directory; start of the message)
TARGET_CASES: dict[str, tuple[str, dict[str, str | None], str]] = {
    "old-layer": ("safetensors", {"layer-03.safetensors": "x"}, f"layer-03.safetensors: {OVER}"),
    "old-folder": ("safetensors", {"ckpt-0/tensor00000_000": "x"}, f"ckpt-0: {OVER}"),
    "old-tensor": ("released", {"ckpt-0/tensor00038_000": "x"}, f"ckpt-0/tensor00038_000: {OVER}"),
    "old-index": ("released", {INDEX: OWN_INDEX}, f"{INDEX}: {OVER}"),
    "half-saved": ("released", {forms.SAVING: ""}, f"{forms.SAVING}: {OVER}"),
    "odd-name": ("safetensors", {ODD: ""},
                 rf"x\nerror: forged\x1b[31m\u2028é.safetensors: {OVER}"),
    "config": ("safetensors", {"config.json": OTHERS}, f"config.json: {OTHER}"),
    "tokenizer": ("released", {"tokenizer.model": OTHERS}, f"tokenizer.model: {OTHER}"),
    "layer": ("safetensors", {"layer-00.safetensors": "x"}, f"layer-00.safetensors: {OTHER}"),
    "tensor": ("released", {"ckpt-0/tensor00000_000": "x"}, f"ckpt-0/tensor00000_000: {OTHER}"),
    # Neither ckpt-0 nor the work directory alone is a checkpoint.
    "folder": ("released", {"ckpt-0/model.bin": "x", "config.json": OTHERS},
               f"config.json: {OTHER}"),
    "work": ("released", {WORK: None, "config.json": OTHERS}, f"config.json: {OTHER}"),
    "file-in-work": ("safetensors", {f"{WORK}/thesis.tex": "x", f"{WORK}/config.json": "x"},
                     f"{WORK}/thesis.tex: expected only files of an unfinished conversion, got 1 "),
    "index": ("safetensors", {INDEX: '{"metadata": {"total_size": 5}, "weight_map": {}}'},
              f"{INDEX}: expected no index, or one of this program, got another program's"),
    "index-of-text": ("released", {INDEX: "version https://git-lfs.github.com/spec/v1"},
                      f"{INDEX}: expected no index, or one of this program"),
}
# fmt: on


@pytest.mark.parametrize(("form", "files", "part"), TARGET_CASES.values(), ids=TARGET_CASES)
def test_files_of_others_in_the_target_are_kept(
    form: str,
    files: dict[str, str | None],
    part: str,
    released: pathlib.Path,
    safe: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in files.items():
        path = tmp_path / name
        (path if text is None else path.parent).mkdir(exist_ok=True)
        if text is not None:
            path.write_text(text)
    before = contents(tmp_path)
    source = released if form == "safetensors" else safe
    error = refusal(capsys, "convert", source, tmp_path, "--to", form)
    assert error.startswith(f"error: {tmp_path}/{part}")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_files_that_the_source_lacks_are_not_left_over(
    name: str, monkeypatch: pytest.MonkeyPatch, released: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Without config.json a checkpoint is Grok-1; an old one would make it another model."""
    source, target = shutil.copytree(released, tmp_path / "source"), tmp_path / "target"
    (source / name).unlink()
    target.mkdir()
    (target / name).write_text("{}")
    monkeypatch.setattr(checkpoint, "grok_1", lambda: config_of(3))
    with pytest.raises(CheckpointError, match=f"target/{name}: {OVER}"):
        convert(source, target, "safetensors")
    (target / name).unlink()
    convert(source, target, "safetensors")
    assert not (target / name).exists()


def test_equal_copies_and_damaged_files_are_replaced(
    released: pathlib.Path, safe: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for name in ("config.json", "tokenizer.model"):
        shutil.copy(released / name, tmp_path)
    convert(released, tmp_path, "safetensors")
    for name in ("config.json", "tokenizer.model"):
        (tmp_path / name).write_text("damaged")
    convert(released, tmp_path, "safetensors", overwrite=True)
    assert contents(tmp_path) == contents(safe)


# fmt: off
@pytest.mark.parametrize(
    ("form", "name", "kind"),
    [
        ("safetensors", WORK, "directory"),
        ("safetensors", f"{WORK}/state.json", "file"),
        ("safetensors", f"{WORK}/.state.json.partial", "file"),
        ("safetensors", f"{WORK}/layer-00.safetensors", "file"),
        ("safetensors", "layer-02.safetensors", "file"),
        ("safetensors", "config.json", "nothing"),
        ("released", "ckpt-0", "directory"),
    ],
)
# fmt: on
def test_symbolic_links_in_the_target_are_not_followed(
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
    error = refusal(capsys, "convert", source, tmp_path / "target", "--to", form)
    assert contents(others) == before and link.is_symlink()
    assert error.startswith(f"error: {link}: ") and "got an error (it is a link, which is" in error


def test_unreadable_directory_is_not_called_empty(
    released: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system hides what is in it; root may read every directory."""
    monkeypatch.setattr(os.path, "isfile", lambda _: False)
    monkeypatch.setattr(os.path, "isdir", lambda path: str(path) == str(released))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(CheckpointError, match="got one that may not be read; name the"):
        checkpoint.read_model_config(released)


def test_a_huge_tokenizer_is_not_copied(
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


def test_a_too_small_disk_is_refused_before_writing(
    released: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(released, tmp_path / "source")
    usage, free = shutil.disk_usage(tmp_path), 10_000
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))
    with pytest.raises(CheckpointError, match=r"expected [\d,]+ bytes of free disk .*10,000 by"):
        convert(source, tmp_path / "target", "safetensors")
    os.truncate(source / "tokenizer.model", 1 << 31)
    free = 1 << 30
    with pytest.raises(CheckpointError, match=r"expected 2,147,[\d,]+ bytes of free disk space"):
        convert(source, tmp_path / "target", "safetensors")
    assert not os.listdir(tmp_path / "target")
