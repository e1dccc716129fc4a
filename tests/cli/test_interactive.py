"""A prompt line, as a person meets it: in a terminal, and with prompts from a pipe."""

import contextlib
import io
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from commands import (
    LOADED,
    PROMPT,
    Command,
    Result,
    assert_one_sentence,
    changed,
    halting_input,
)
from grok1.cli import interactive
from paths import ROOT

# Makes the terminal on standard input that of the process, as Ctrl-C needs it.
TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
TAKE_TERMINAL += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"


class Terminal:
    """A command in a pseudo-terminal, and all that it has shown there."""

    def __init__(self, *arguments: object):
        self.person, inside = os.openpty()
        plain = {"TERM": "dumb", "INPUTRC": os.devnull}
        without = {name: os.environ[name] for name in os.environ if name != "XLA_FLAGS"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, "-W", "error", ROOT / "run.py", *arguments],
            stdin=inside,
            stdout=inside,
            stderr=subprocess.PIPE,
            env=without | plain,
            start_new_session=True,
        )
        os.close(inside)
        self.shown = ""

    def type(self, text: str) -> None:
        """Press these keys."""
        os.write(self.person, text.encode())

    def wait_for(self, pattern: str, seconds: float = 60) -> str:
        """Wait until this is shown, and return what has been up to its end since the last time."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < deadline, f"{pattern} not in {self.shown!r}"
            if select.select([self.person], [], [], 1)[0]:
                piece = os.read(self.person, 4096).decode(errors="replace")
                self.shown += piece.replace("\r\n", "\n")
        seen, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return seen

    def close(self) -> None:
        """End the command if it has not ended."""
        self.process.kill()
        self.process.communicate()
        os.close(self.person)


@pytest.fixture
def terminal(tiny: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[Terminal]:
    """A session whose answers are long, but not endless: a terminal not read from holds less."""
    model = changed(tiny, tmp_path / "model", sequence_len=4096)
    settings = map(str, ("--max-len", 3600, "--temperature", 0))
    session = Terminal("--checkpoint", model, "--interactive", *settings)
    yield session
    session.close()


@pytest.mark.skipif(sys.platform != "linux", reason="takes a terminal as Linux gives it")
def test_a_session_in_a_terminal(terminal: Terminal) -> None:
    """Prompt, answer, Ctrl-C in it, the whole answer, Ctrl-C in a line, a mistake, Ctrl-D."""
    terminal.wait_for("> $")
    terminal.type(PROMPT + "\n")
    begun = terminal.wait_for(rf"{PROMPT}\n.{{30}}")
    terminal.type("\x03")
    begun += terminal.wait_for(r"\n> $")
    part = begun.removeprefix(f"{PROMPT}\n").removesuffix("\n> ").replace("^C", "")

    terminal.type(PROMPT + "\n")
    whole = terminal.wait_for(r"\n> $").removeprefix(f"{PROMPT}\n").removesuffix("\n> ")
    assert whole.startswith(part[:30]) and len(whole) > len(part) + 30

    terminal.type("never sent")
    terminal.wait_for("never sent$")
    time.sleep(0.2)  # it reads: between two keys Python's readline sees Ctrl-C only at the next
    terminal.type("\x03")
    terminal.wait_for(r"\n> $")
    terminal.type("so " * 1000 + "\n")
    terminal.wait_for(r"\n> $")
    terminal.type("\x10\x10\n")  # Ctrl-P twice: the last line but one, as it was typed
    assert PROMPT in terminal.wait_for(r"\n> $")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=20) == 0
    assert terminal.process.stderr is not None
    err = terminal.process.stderr.read().decode()
    hint = r"one prompt per line; Ctrl-C stops an answer, Ctrl-D exits, /help shows more\n"
    mistake = r"error: the prompt has \d+ tokens, and the context of 4096 must hold [^\n]*\n"
    end = r"\(ended by max_tokens; /set max_tokens N changes it\)\n"
    assert re.fullmatch(LOADED + hint + end + mistake + end, err), err


def test_prompts_from_a_pipe_are_answered_line_by_line_with_no_sign(
    tiny: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--checkpoint", tiny, "--max-len", 5, "--temperature", 0]
    first, second = (
        command(*settings, "--json", "--prompt", prompt).answers[0]["text"]
        for prompt in (PROMPT, "A dog ")
    )
    lines = f"{PROMPT}\n\n{'so ' * 80}\ncaf\udce9\nA dog ".encode(errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), "utf-8"))
    before = signal.getsignal(signal.SIGINT)
    result = command(*settings, "--interactive", "--stats")
    assert (result.status, result.out) == (0, f"{first}\n{second}\n")
    assert signal.getsignal(signal.SIGINT) is before
    block = r"time to first token [^\n]*\nprompts [^\n]*\nbetween tokens [^\n]*\nanswers [^\n]*\n"
    mistakes = r"error: the prompt has 81 tokens[^\n]*\nerror: the prompt is not text in UTF-8[^\n]"
    assert re.fullmatch(LOADED + block + mistakes + r"*\n" + block, result.err), result.err


def test_a_pause_between_prompts_does_not_end_a_session(
    tiny: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--checkpoint", tiny, "--max-len", 5, "--temperature", 0]
    answer = command(*settings, "--json", "--prompt", PROMPT).answers[0]["text"]
    first, second = PROMPT[:3].encode(), PROMPT[3:].encode()
    with halting_input(monkeypatch, first, second + b"\n", first, second + b"\n"):
        assert command(*settings, "--interactive").out == f"{answer}\n" * 2


@pytest.mark.skipif(sys.platform != "linux", reason="takes a terminal as Linux gives it")
def test_a_pause_in_a_terminal_does_not_end_a_session_whose_output_goes_elsewhere(
    tiny: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--checkpoint", tiny, "--max-len", 5, "--temperature", 0]
    answer = command(*settings, "--json", "--prompt", PROMPT).answers[0]["text"]
    person, inside = os.openpty()
    os.set_blocking(inside, False)

    def type_slowly() -> None:
        for keys in (f"{PROMPT}\n", "\x04"):
            time.sleep(0.5)
            os.write(person, keys.encode())

    typing = threading.Thread(target=type_slowly)
    with open(inside) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        typing.start()
        result = command(*settings, "--interactive")
        typing.join()
    os.close(person)
    assert (result.status, result.out) == (0, f"{answer}\n")


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_twice_ends_a_session_whose_output_nobody_reads(tiny: pathlib.Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    with subprocess.Popen(
        [sys.executable, ROOT / "run.py", "--checkpoint", tiny, "--interactive", "--max-len", "5"],
        stdin=subprocess.PIPE,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    ) as session:
        assert session.stdin is not None and session.stderr is not None
        said = session.stderr.readline()
        session.stdin.write(f"{PROMPT}\n" * 9)  # one that comes too early takes a line
        session.stdin.flush()
        signals = 0
        while session.poll() is None and signals < 9:
            time.sleep(1)
            session.send_signal(signal.SIGINT)
            signals += 1
        session.kill()  # does nothing to one that has ended
        said += session.stderr.read()
    os.close(reading)
    os.close(writing)
    assert session.returncode == 130 and signals > 1
    assert re.fullmatch(rf"{LOADED}interrupted\n", said), said


def test_a_line_without_an_end_is_refused(
    tiny: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interactive, "MOST_CHARACTERS", 100)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(1000)), "utf-8"))
    result = command("--checkpoint", tiny, "--interactive")
    assert_one_sentence(result, 1, "standard input: expected at most 100 characters in a line, got")


def test_an_input_that_cannot_be_read_is_told(tiny: pathlib.Path) -> None:
    """As nohup leaves it: open, and only for writing."""
    arguments = ["--checkpoint", tiny, "--interactive", "--max-len", 1]
    with open(os.devnull, "wb") as only_written:
        done = subprocess.run(
            [sys.executable, ROOT / "run.py", *map(str, arguments)],
            stdin=only_written, capture_output=True, text=True,
        )  # fmt: skip
    result = Result(done.returncode, done.stdout, done.stderr)
    assert_one_sentence(result, 1, "standard input: expected prompts, got an error (Bad file de")


def test_settings_that_fit_no_prompt_are_told_before_the_weights_are_loaded(
    tiny: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpoint.load", None)
    result = command("--checkpoint", tiny, "--interactive", "--max-len", 64)
    assert_one_sentence(result, 1, "error: the options: --max-tokens 64 leaves no room")


@pytest.mark.parametrize(
    "other",
    [
        ("--prompt", "A"),
        ("--prompt-ids", "5"),
        ("--prompts-file", "A"),
        ("--output", "A"),
        ("--json",),
        ("--distributed",),
        ("--plan",),
    ],
)
def test_a_session_goes_with_neither_other_prompts_nor_other_outputs(
    other: tuple[str, ...], command: Command
) -> None:
    name = other[0].removesuffix("-ids")
    sentence = f"--interactive and {name} do not go together: prompts are typed"
    assert_one_sentence(command("--interactive", *other), 2, sentence)
