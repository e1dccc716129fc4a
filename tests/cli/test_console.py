"""What the commands have in common: sizes are understood, and long work says how far it is."""

import _thread
import argparse
import contextlib
import errno
import io
import os
import pathlib
import pty
import queue
import re
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

import checkpoint
import run
from grok1.cli import console
from grok1.cli.console import (
    ByteProgress,
    Progress,
    Worker,
    byte_rate,
    byte_size,
    say,
    write_out,
)
from paths import ROOT


def test_a_message_and_its_newline_are_one_write() -> None:
    """Unbuffered, two would let another thread's last words come between."""
    written: list[str] = []

    class Recorder(io.StringIO):
        def write(self, text: str) -> int:
            written.append(text)
            return len(text)

    say("loaded", Recorder())
    assert [text for text in written if text] == ["loaded\n"]


def test_a_message_sends_no_control_characters() -> None:
    """Such as a file that it quotes may hold."""
    stream = io.StringIO()
    say("got \x1b[31m\x07\x9b, caf\u00e9\nand more", stream)
    assert stream.getvalue() == "got \\x1b[31m\\x07\\x9b, caf\u00e9\nand more\n"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80GiB", 80 * 2**30),
        ("80GB", 80e9),
        ("1.5 TB", 1.5e12),
        ("8e3kB", 8e6),
        ("12B", 12),
        ("3MiB", 3 * 2**20),
    ],
)
def test_sizes_have_units(text: str, size: float) -> None:
    assert byte_size(text) == size
    assert byte_rate(f"{text}/s") == size


@pytest.mark.parametrize(
    "text", ["80", "", "GiB", "-1GB", "0GB", "80Gb", "1e999GB", "1e30GiB", "1.2.3GB", "1GB/s"]
)
def test_a_size_without_a_known_unit_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="such as 80GiB .*MiB, GiB"):
        byte_size(text)


def test_progress_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    with ByteProgress("loading", seconds=0.05) as progress:
        progress(10**9, 2 * 10**9)
        assert capsys.readouterr().err == ""
        time.sleep(0.06)
        progress(15 * 10**8, 2 * 10**9)
        progress(2 * 10**9, 2 * 10**9)
    line = capsys.readouterr().err
    assert line.startswith("loading: 1.5 of 2.0 GB, ") and line.endswith(" GB/s, 0 s left\n")
    assert line.count("\n") == 1


def test_progress_counts_from_the_start_of_the_work(capsys: pytest.CaptureFixture[str]) -> None:
    with ByteProgress("loading", seconds=0.05) as progress:
        time.sleep(0.06)  # not yet at work
        progress.start()
        progress(10**9, 2 * 10**9)
    assert capsys.readouterr().err == ""


def test_progress_is_a_bar_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with ByteProgress("loading") as progress:
        for done in (10**9, 2 * 10**9):
            progress(done, 2 * 10**9)
    bar = capsys.readouterr().err
    assert "loading: 100%" in bar and "2.00G/2.00G" in bar and "B/s" in bar and bar.endswith("\n")


def test_progress_of_answers_leaves_out_of_its_rate_what_was_there_before(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress("answering", seconds=0.05, already=60) as progress:
        progress(60, 100)
        time.sleep(0.1)
        progress(62, 100)
    words = capsys.readouterr().err.split()
    assert words[:5] == ["answering:", "62", "of", "100", "answers,"]
    assert words[6:8] == ["per", "second,"] and words[9:] == ["s", "left"]
    rate, left = float(words[5]), float(words[8])
    assert 1 < rate < 20.1 and left == pytest.approx(38 / rate, rel=0.1, abs=1)


def test_the_bar_of_answers_begins_where_they_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("answering", already=60) as progress:
        progress(60, 100)
        progress(100, 100)
    bar = capsys.readouterr().err
    assert " 60/100 " in bar and "answering: 100%" in bar and " 100/100 " in bar


def test_a_worker_hands_on_what_a_call_returns_and_raises() -> None:
    worker = Worker()
    assert worker.call(divmod, 7, 3) == (2, 1)
    assert worker.call(threading.current_thread) is not threading.main_thread()
    with pytest.raises(ZeroDivisionError):
        worker.call(divmod, 7, 0)


def test_a_worker_waits_for_a_long_call_and_takes_no_exception_of_its_for_its_own() -> None:
    worker = Worker()

    def work(error: Exception) -> None:
        time.sleep(0.7)
        raise error

    with pytest.raises(TimeoutError, match="too late"):
        worker.call(work, TimeoutError("too late"))
    with pytest.raises(queue.Empty):
        worker.call(work, queue.Empty())


def test_an_interrupt_that_wakes_nobody_is_felt_all_the_same() -> None:
    """As one does that comes in the moment before Python begins to wait."""
    over = threading.Event()

    def work() -> None:
        time.sleep(0.2)
        _thread.interrupt_main()  # sets Python's flag, but no signal wakes the main thread
        over.wait(30)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Worker().call(work)
    assert time.monotonic() - began < 15
    over.set()


@pytest.mark.parametrize("command", ["run", "checkpoint"])
def test_a_second_ctrl_c_ends_a_command_that_is_ending(command: str) -> None:
    program = f"""
import os, signal, time, {command} as command
def press(*_):
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(20)
command.say = command.parse_arguments = press
command.main()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


class Slow(io.RawIOBase):
    """Takes three bytes at a time, and nothing at every other call; then it is full."""

    def __init__(self, room: int) -> None:
        self.taken, self.room, self.ready = b"", room, False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1  # one that can be waited for

    def write(self, data: Any) -> int | None:
        self.ready = not self.ready
        if not self.ready:
            return None
        if len(self.taken) >= self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        piece = bytes(data)[:3]
        self.taken += piece
        return len(piece)


@pytest.mark.parametrize("buffered", [False, True])
def test_output_is_whole_or_an_error(buffered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may take a part of what is written, as with PYTHONUNBUFFERED; nothing is kept."""
    for room in (100, 6):
        raw = Slow(room)
        buffer: Any = io.BufferedWriter(raw) if buffered else raw
        stream = io.TextIOWrapper(buffer, "ascii", write_through=True)
        monkeypatch.setattr(sys, "stdout", stream)
        if room == 100:
            write_out("caf\u00e9 au lait")
            assert raw.taken == b"caf\\xe9 au lait\n"
        else:
            with pytest.raises(OSError, match=r"^standard output cannot be written \(No space"):
                write_out("caf\u00e9 au lait")
            assert raw.taken == b"caf\\xe"
        stream.flush()
        raw.room = 0
        say("lost", stream)
        stream.flush()


@pytest.mark.parametrize("answer", [True, False])
def test_a_full_pipe_that_does_not_block_is_waited_for(
    answer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For an answer as long as it takes, for a message a moment; no core is kept busy."""
    monkeypatch.setattr(console, "PATIENCE", 0.1)
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    with open(receiver, "rb") as reader, open(sender, "w") as stream:
        with pytest.raises(BlockingIOError):
            while os.write(sender, b" " * 2**12):
                pass
        draining = threading.Timer(0.5, lambda: os.read(receiver, 2**20))
        draining.start()
        spent = time.thread_time()
        if answer:
            write_out("an answer", file=stream)
        else:
            say("a message", stream)
        assert time.thread_time() - spent < 0.1
        draining.join()
        stream.close()
        assert reader.read() == (b"an answer\n" if answer else b"")


def run_with(redirections: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python with standard streams that a shell closes or redirects."""
    shell = ["sh", "-c", f'exec "$0" "$@" {redirections}', sys.executable]
    without = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    command = [*shell, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=without, capture_output=True, text=True)


def test_closed_streams_give_no_file_their_numbers(tmp_path: pathlib.Path) -> None:
    program = """
import os, sys
from grok1.cli.console import open_standard_streams, say, write_out
open_standard_streams()
file = open(sys.argv[1], "w")
assert sys.stdin.read() == ""
say("lost")
os.write(2, b"lost")
try:
    write_out("an answer")
except OSError as error:
    print(error, sorted(os.listdir("/dev/fd"))[:3], file.fileno() > 2, file=file)
"""
    path = tmp_path / "file"
    done = run_with("<&- >&- 2>&-", "-c", program, path)
    assert done.returncode == 0
    closed = "standard output is closed; send it to a file or a program that takes it"
    assert path.read_text() == f"{closed} ['0', '1', '2'] True\n"


FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device")


@pytest.mark.parametrize("redirection", [">&-", pytest.param(">/dev/full", marks=FULL)])
@pytest.mark.parametrize(
    "arguments",
    [
        ("run.py", "--help"),
        ("run.py", "--version"),
        ("run.py", "--prompt-ids", "5"),
        ("checkpoint.py", "--help"),
        ("checkpoint.py", "verify", "checkpoints/demo"),
    ],
)
def test_output_that_would_be_lost_is_an_error(
    arguments: tuple[str, ...], redirection: str
) -> None:
    done = run_with(redirection, *arguments)
    why = "is closed" if redirection == ">&-" else "cannot be written (No space left on device)"
    sentence = f"error: standard output {why}; send it to a file or a program that takes it\n"
    assert (done.returncode, done.stderr) == (1, sentence)


@pytest.mark.parametrize("redirection", ["2>&-", pytest.param("2>/dev/full", marks=FULL)])
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (("run.py", "--no-such"), 2),
        (("run.py", "--checkpoint", "no/such"), 1),
        (("checkpoint.py", "verify", "checkpoints/demo"), 0),
        (("checkpoint.py", "verify", "no/such"), 1),
    ],
)
def test_lost_messages_leave_the_status(
    arguments: tuple[str, ...], status: int, redirection: str
) -> None:
    done = run_with(redirection, *arguments)
    assert done.returncode == status and bool(done.stdout) == (status == 0)


def test_a_conversion_needs_no_streams(tmp_path: pathlib.Path) -> None:
    """Its files do not get the numbers of those that are closed."""
    target = tmp_path / "safe"
    convert = ("checkpoint.py", "convert", "checkpoints/demo", target, "--to", "safetensors")
    done = run_with("<&- 2>&-", *convert)
    assert done.returncode == 0 and done.stdout.startswith(f"{target}: ")
    assert run_with("2>&-", "checkpoint.py", "verify", target).returncode == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "error: this process got no more memory; raise its limit (ulimit -v), or"),
        (RuntimeError("can't start new thread"), "error: this process got no more threads; raise"),
    ],
)
@pytest.mark.parametrize("command", [run, checkpoint])
def test_a_limit_of_the_process_is_named(
    command: Any,
    error: Exception,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(command, "parse_arguments", fail)
    monkeypatch.setattr(sys, "argv", ["program"])
    assert command.main() == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(said) and captured.err.count("\n") == 1 and not captured.out


# What is being done, on a terminal.


class Terminal(io.StringIO):
    """Says that it is one."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "seconds", "said"),
    [(Terminal, 0.3, "cooking\n"), (Terminal, 0, ""), (io.StringIO, 0.3, "")],
)
def test_only_long_work_is_told_and_only_to_a_terminal(
    stream: type[io.StringIO], seconds: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "SILENCE", 0.1)
    monkeypatch.setattr(sys, "stderr", stream())
    with console.notice_if_slow("cooking"):
        time.sleep(seconds)
    time.sleep(0.15)
    assert sys.stderr.getvalue() == said  # type: ignore[attr-defined]


def test_a_first_start_says_what_it_does(tmp_path: pathlib.Path) -> None:
    """For eight seconds a terminal showed nothing."""
    terminal, other = pty.openpty()
    variables = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "COLUMNS": "200"}
    variables.pop("JAX_COMPILATION_CACHE_DIR", None)
    command = [sys.executable, ROOT / "run.py", "A", "-n", "2", "--stats"]
    process = subprocess.Popen(command, env=variables, stderr=other, stdout=subprocess.PIPE)
    os.close(other)
    said = b""
    with contextlib.suppress(OSError):  # the end of what a terminal says
        while part := os.read(terminal, 4096):
            said += part
    os.close(terminal)
    out, _ = process.communicate()
    lines = said.decode().replace("\r", "\n").splitlines()
    assert process.returncode == 0 and out.startswith(b"A")
    told = ["starting JAX", "compiling the CPU kernels, once", console.READING]
    assert [line for line in lines if line in told] == told, said
    (loaded,) = [line for line in lines if "loaded " in line]
    (seconds,) = re.findall(r" in ([\d.]+) s: ", loaded)
    assert float(seconds) > 1  # the kernels, too, were compiled
    speeds = re.findall(r"([\d.]+) tokens/s$", "\n".join(lines), re.MULTILINE)
    assert len(speeds) == 2 and speeds[0] == speeds[1]
