"""run.py in this process or in one of its own, and a tiny checkpoint for it."""

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

import ml_dtypes
import numpy as np
import pytest

import checkpoint
import compiling
import run
from grok1.ops.quantization import QuantizedWeight8bit
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
    """Non-blocking standard input on which these pieces arrive after pauses."""
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


def random_params() -> dict[str, dict[str, Any]]:
    """Return parameters such as CONFIG.init_params makes, without its compilation of seconds."""
    rng = np.random.default_rng(0)

    def draw(module: str, shape: Any) -> Any:
        if module.endswith("embed"):
            return rng.normal(0, shape.shape[-1] ** -0.5, shape.shape).astype(np.float32)
        if "norm" in module:
            return np.ones(shape.shape, np.float32)
        if not isinstance(shape, QuantizedWeight8bit):  # the router
            return rng.normal(0, shape.shape[-2] ** -0.5, shape.shape).astype(np.float32)
        weight = rng.integers(-127, 128, shape.weight.shape, np.int8)
        scale = shape.weight.shape[-2] ** -0.5 / weight.std()
        return QuantizedWeight8bit(weight, np.full(shape.scales.shape, scale, ml_dtypes.bfloat16))

    return {
        module: {name: draw(module, shape) for name, shape in leaves.items()}
        for module, leaves in CONFIG.param_shapes().items()
    }


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A random checkpoint with the vocabulary of the repository's tokenizer."""
    directory = tmp_path_factory.getbasetemp() / "tiny"
    if not directory.exists():  # it may have been made for another module
        checkpoint.save(directory, random_params(), CONFIG.to_dict())
    return directory


def changed(directory: pathlib.Path, target: pathlib.Path, **fields: Any) -> pathlib.Path:
    """Make a checkpoint with the same parameters and other fields in config.json."""
    config = json.loads((directory / "config.json").read_text())
    target.mkdir()
    (target / "ckpt-0").symlink_to(directory / "ckpt-0")
    (target / "config.json").write_text(json.dumps(config | fields))
    return target


class Result(NamedTuple):
    """The exit status and the output of a command."""

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
    """A function that runs the command in this process."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["run.py", *map(str, arguments)])
        try:
            status: int | str | None = run.main()
        except SystemExit as exit_:
            status = exit_.code
        return Result(status, *capsys.readouterr())

    return call


def start(*arguments: object, **variables: str) -> subprocess.Popen[bytes]:
    """Start the command in a process of its own, in another directory, with one device."""
    return start_program(ROOT / "run.py", *arguments, **variables)


def start_program(*arguments: object, **variables: str) -> subprocess.Popen[bytes]:
    """Start a Python program in the same way."""
    environment = os.environ | {"XLA_FLAGS": compiling.FLAGS} | variables
    return subprocess.Popen(
        [sys.executable, "-W", "error", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
    )


def finish(process: subprocess.Popen[bytes], seen: bytes = b"") -> Result:
    """Wait for the end of a process, of whose output `seen` has been read."""
    out, err = process.communicate(timeout=300)  # compiling takes long on a busy machine
    return Result(process.returncode, (seen + out).decode(), err.decode())


def assert_one_sentence(result: Result, status: int, *parts: str) -> None:
    """The command failed, printed no answer, and one line with these parts on standard error."""
    assert result.status == status and result.out == ""
    sentence = re.sub(f"^{LOADED}", "", result.err)
    assert re.fullmatch(r"error: [^\n]+\n", sentence), result.err
    for part in parts:
        assert part in sentence
