"""The command as the tests run it, in this process or in one of its own, and a tiny checkpoint."""

import contextlib
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

import checkpoint
import run
from model import LanguageModelConfig, TransformerConfig
from paths import ROOT

CONFIG = LanguageModelConfig(
    vocab_size=4096,
    sequence_len=64,
    model=TransformerConfig(
        emb_size=64,
        key_size=8,
        num_q_heads=8,
        num_kv_heads=8,
        num_layers=2,
        num_experts=8,
        num_selected_experts=2,
    ),
)
PROMPT = "Once upon a time"
LOADED = r"loaded [^\n]+ in [\d.]+ s: 2 layers, (bfloat16|float32) activations, mesh \d,\d on cpu\n"
COUNTED = (
    r"\d+ tokens in [\d.]+ s, compilation included: [\d.]+ s to the first"
    r"( token, then [\d.]+ tokens/s)?\n"
)


@contextlib.contextmanager
def halting_input(patch: pytest.MonkeyPatch, *pieces: bytes) -> Iterator[None]:
    """Standard input that does not block, to which these pieces come with pauses between them."""
    reading, writing = os.pipe()
    os.set_blocking(reading, False)

    def write() -> None:
        for piece in pieces:
            time.sleep(0.3)
            os.write(writing, piece)
        os.close(writing)

    thread = threading.Thread(target=write)
    with open(reading) as stream:
        patch.setattr(sys, "stdin", stream)
        thread.start()
        try:
            yield
        finally:
            thread.join()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random checkpoint whose vocabulary is that of the repository's tokenizer."""
    directory = tmp_path_factory.getbasetemp() / "tiny"
    if not directory.exists():  # of another module
        checkpoint.save(directory, CONFIG.init_params(0, quantized=True), CONFIG.to_dict())
    return directory


def changed(directory: pathlib.Path, target: pathlib.Path, **fields: Any) -> pathlib.Path:
    """The same parameters with other fields in config.json."""
    config = json.loads((directory / "config.json").read_text())
    target.mkdir()
    (target / "ckpt-0").symlink_to(directory / "ckpt-0")
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


class Result(NamedTuple):
    """What a command left behind."""

    status: int | str | None
    out: str
    err: str

    @property
    def answers(self) -> list[dict[str, Any]]:
        """The JSON objects, one a line."""
        return [json.loads(line) for line in self.out.splitlines()]


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the command in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        try:
            status: int | str | None = run.main()
        except SystemExit as exit_:
            status = exit_.code
        return Result(status, *capsys.readouterr())

    return call


def start(*arguments: object, **variables: str) -> subprocess.Popen[bytes]:
    """Start the command as its own process, elsewhere, and with no settings for XLA."""
    return start_program(ROOT / "run.py", *arguments, **variables)


def start_program(*arguments: object, **variables: str) -> subprocess.Popen[bytes]:
    """Start Python in the same way."""
    environment = {name: os.environ[name] for name in os.environ if name != "XLA_FLAGS"}
    environment |= variables
    return subprocess.Popen(
        [sys.executable, "-W", "error", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
    )


def finish(process: subprocess.Popen[bytes], seen: bytes = b"") -> Result:
    """Wait for the end of a process, of whose output `seen` has been read."""
    out, err = process.communicate(timeout=60)
    return Result(process.returncode, (seen + out).decode(), err.decode())


def assert_one_sentence(result: Result, status: int, *parts: str) -> None:
    """The command failed, printed nothing, and said why in one line."""
    assert result.status == status and result.out == ""
    sentence = re.sub(f"^{LOADED}", "", result.err)
    assert re.fullmatch(r"error: [^\n]+\n", sentence), result.err
    for part in parts:
        assert part in sentence
