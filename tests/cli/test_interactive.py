"""A session of prompts: in a terminal, and with prompts from a pipe."""

import contextlib
import io
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time

import pytest

import compiling
from commands import LOADED, PROMPT, assert_one_sentence, changed, halting_input
from grok1.cli import interactive
from grok1.cli.console import write_out
from paths import ROOT

# Makes the terminal on standard input that of the process, as Ctrl-C needs it.
TAKE_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
TAKE_TERMINAL += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="takes a terminal as Linux gives it")


class Terminal:
    """A command in a pseudo-terminal, and all that it has shown there."""

    def __init__(self, *arguments):
        self.person, inside = os.openpty()
        plain = {"TERM": "dumb", "INPUTRC": os.devnull, "XLA_FLAGS": compiling.FLAGS}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TAKE_TERMINAL, "-W", "error", ROOT / "run.py", *arguments],
            stdin=inside,
            stdout=inside,
            stderr=subprocess.PIPE,
            env=os.environ | plain,
            start_new_session=True,
        )
        os.close(inside)
        self.shown = ""

    def type(self, text):
        """Press these keys."""
        os.write(self.person, text.encode())

    def wait_for(self, pattern, seconds=60):
        """Wait until this is shown, and return all that has been shown since the last call."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < deadline, f"{pattern} not in {self.shown!r}"
            if select.select([self.person], [], [], 1)[0]:
                piece = os.read(self.person, 4096).decode(errors="replace")
                self.shown += piece.replace("\r\n", "\n")
        seen, self.shown = self.shown[: found.end()], self.shown[found.end() :]
        return seen

    def close(self):
        """End the command if it has not ended."""
        self.process.kill()
        self.process.communicate()
        os.close(self.person)


@pytest.fixture
def terminal(tiny, tmp_path):
    """A session whose answers take about a second."""
    model = changed(tiny, tmp_path / "model", sequence_len=700)
    settings = map(str, ("--max-len", 500, "--temperature", 0))
    session = Terminal("--checkpoint", model, "--interactive", *settings)
    yield session
    session.close()


@on_linux
def test_session_in_a_terminal(terminal):
    """Ctrl-C in an answer, an answer, Ctrl-C in a line, an error, the history, Ctrl-D."""
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
    time.sleep(0.2)  # until it waits: between two keys, readline sees Ctrl-C only at the next one
    terminal.type("\x03")
    terminal.wait_for(r"\n> $")
    terminal.type("so " * 1000 + "\n")
    terminal.wait_for(r"\n> $")
    terminal.type("/set max_tokens 4\n")
    terminal.wait_for(r"\n> $")
    terminal.type("\x10\x10\x10\n")  # Ctrl-P three times: the line before the last two
    assert PROMPT in terminal.wait_for(r"\n> $")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=20) == 0
    err = terminal.process.stderr.read().decode()
    hint = r"one prompt per line; Ctrl-C stops an answer, Ctrl-D exits, /help shows more\n"
    mistake = r"error: the prompt has \d+ tokens, and the context of 700 must hold [^\n]*\n"
    end = r"\(ended by max_tokens; /set max_tokens N changes it\)\n"
    assert re.fullmatch(LOADED + hint + end + mistake + end, err), err


def test_prompts_from_a_pipe_are_answered_line_by_line(tiny, command, monkeypatch):
    """Only the answers are printed to standard output."""
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


def lines_typed():
    """The lines that a session reads until the end of its input."""
    with contextlib.closing(interactive.Keyboard()) as keyboard:
        return [*iter(keyboard.read, None)]


def test_pause_in_the_input_does_not_end_a_session(monkeypatch):
    with halting_input(monkeypatch, b"A d", b"og\nA cat\n", b"A cow"):
        assert lines_typed() == ["A dog", "A cat", "A cow"]


@on_linux
def test_pause_in_a_terminal_does_not_end_a_session(monkeypatch):
    """If the output goes elsewhere, the terminal is read like a pipe."""
    person, inside = os.openpty()
    os.set_blocking(inside, False)

    def type_slowly():
        for keys in (b"A dog\n", b"\x04"):
            time.sleep(0.3)
            os.write(person, keys)

    typing = threading.Thread(target=type_slowly)
    with open(inside) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        typing.start()
        assert lines_typed() == ["A dog"]
        typing.join()
    os.close(person)


def test_second_ctrl_c_interrupts_blocked_output(monkeypatch):
    """The first one waits for the end of the write, which does not come."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(4096))
    os.set_blocking(writing, True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    press = [os.getpid(), signal.SIGINT]
    timers = [threading.Timer(seconds, os.kill, press) for seconds in (0.2, 0.4)]
    timers.append(threading.Timer(10, os.read, [reading, 2**20]))
    with (
        contextlib.closing(interactive.Keyboard()) as keyboard,
        open(reading, "rb"),
        open(writing, "w") as stream,
    ):
        for timer in timers:
            timer.start()
        with pytest.raises(KeyboardInterrupt):
            write_out("an answer", file=stream)
        assert keyboard.pressed
        timers[-1].cancel()


def test_too_long_line_ends_a_session(tiny, command, monkeypatch):
    monkeypatch.setattr(interactive, "MOST_CHARACTERS", 100)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(bytes(1000)), "utf-8"))
    result = command("--checkpoint", tiny, "--interactive")
    assert_one_sentence(result, 1, "standard input: expected at most 100 characters in a line, got")


def test_unreadable_input_is_an_error(monkeypatch):
    """As nohup leaves it: open for writing only."""
    with open(os.open(os.devnull, os.O_WRONLY)) as only_written:
        monkeypatch.setattr(sys, "stdin", only_written)
        with pytest.raises(OSError, match="standard input: expected prompts, got an error .Bad"):
            lines_typed()


def test_session_settings_are_checked_before_loading(tiny, command, monkeypatch):
    monkeypatch.setattr("checkpoint.load", None)
    result = command("--checkpoint", tiny, "--interactive", "--max-len", 64)
    assert_one_sentence(result, 1, "error: the options: --max-tokens 64 leaves no room")
