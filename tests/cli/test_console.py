"""Code shared by the commands: sizes, messages, standard streams, progress, Ctrl-C."""

import _thread
import argparse
import contextlib
import errno
import io
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

import checkpoint
import golden
import run
from grok1.cli import console
from grok1.cli.console import ByteProgress, Progress, Worker, byte_rate, byte_size, say, write_out
from grok1.kernels import dispatch
from grok1.parallel.multihost import WAKE
from paths import ROOT

MODEL = str(golden.DIRECTORY / "three-layers")


def test_message_and_newline_are_one_write():
    """Between two writes, another thread could print."""
    written = []

    class Recorder(io.StringIO):
        def write(self, text):
            written.append(text)
            return len(text)

    say("loaded", Recorder())
    assert [text for text in written if text] == ["loaded\n"]


def test_message_escapes_control_characters():
    """A message may quote a file."""
    stream = io.StringIO()
    say("got \x1b[31m\x07\x9b, caf\u00e9\nand more", stream)
    assert stream.getvalue() == "got \\x1b[31m\\x07\\x9b, caf\u00e9\nand more\n"


@pytest.mark.parametrize(
    ("text", "size"),
    [("80GiB", 80 * 2**30), ("80GB", 80e9), ("1.5 TB", 1.5e12), ("8e3kB", 8e6), ("12B", 12)],
)
def test_sizes_have_units(text, size):
    assert byte_size(text) == size
    assert byte_rate(f"{text}/s") == size


@pytest.mark.parametrize(
    "text", ["80", "", "GiB", "-1GB", "0GB", "80Gb", "1e999GB", "1e30GiB", "1.2.3GB", "1GB/s"]
)
def test_size_without_a_known_unit_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="such as 80GiB .*MiB, GiB"):
        byte_size(text)


# Progress.


def test_progress_is_a_line_every_few_seconds(clock, capsys):
    with ByteProgress("loading", seconds=5) as progress:
        clock[0] += 60  # before the work begins
        progress.start()
        for seconds, done in ((4, 10 * 10**8), (2, 15 * 10**8), (1, 20 * 10**8)):
            clock[0] += seconds
            progress(done, 2 * 10**9)
    assert capsys.readouterr().err == "loading: 1.5 of 2.0 GB, 0.25 GB/s, 2 s left\n"


def test_progress_rate_leaves_out_earlier_answers(clock, capsys):
    with Progress("answering", seconds=5, already=60) as progress:
        progress(60, 100)
        clock[0] += 10
        progress(62, 100)
    expected = "answering: 62 of 100 answers, 0.20 per second, 190 s left\n"
    assert capsys.readouterr().err == expected


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for progress, first, last, parts in (
        (ByteProgress("loading"), 10**9, 2 * 10**9, ("loading: 100%", "2.00G/2.00G", "B/s")),
        (Progress("answering", already=60), 60, 100, ("answering: 100%", " 60/100 ", " 100/100 ")),
    ):
        with progress:
            progress(first, last)
            progress(last, last)
        bar = capsys.readouterr().err
        assert bar.endswith("\n") and all(part in bar for part in parts)


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "seconds", "said"),
    [(Terminal, 0.4, "cooking\n"), (Terminal, 0, ""), (io.StringIO, 0.4, "")],
)
def test_only_slow_work_is_announced_on_a_terminal(stream, seconds, said, monkeypatch):
    monkeypatch.setattr(console, "SILENCE", 0.2)
    monkeypatch.setattr(sys, "stderr", stream())
    with console.notice_if_slow("cooking"):
        time.sleep(seconds)
    time.sleep(0.4 - seconds)
    assert sys.stderr.getvalue() == said


def test_slow_parts_of_a_start_are_announced(tiny, command, monkeypatch):
    """The time to load includes the compilation of the kernels."""
    announced = []
    late, perf_counter, available = [0.0], time.perf_counter, dispatch.available

    @contextlib.contextmanager
    def announce(what):
        announced.append(what)
        yield

    def compile_kernels():
        late[0] = late[0] or 1000 * (announced[-1] == "compiling the CPU kernels, once")
        return available()

    monkeypatch.setattr(run, "notice_if_slow", announce)
    monkeypatch.setattr(dispatch, "available", compile_kernels)
    monkeypatch.setattr(time, "perf_counter", lambda: perf_counter() + late[0])
    result = command("--checkpoint", tiny, "--prompt-ids", 5, "-n", 1)
    assert announced == ["starting JAX", "compiling the CPU kernels, once", console.READING]
    (seconds,) = re.findall(r"loaded .* in ([\d.]+) s: ", result.err)
    assert float(seconds) >= 1000


# The worker, and Ctrl-C.


def test_worker_returns_results_and_raises_exceptions():
    """Also exceptions of the types that its own waiting raises."""
    worker = Worker()
    assert worker.call(divmod, 7, 3) == (2, 1)
    assert worker.call(threading.current_thread) is not threading.main_thread()

    def fail(error, seconds):
        time.sleep(seconds)
        raise error

    for error, seconds in ((ValueError(), 0), (TimeoutError(), 0.6), (queue.Empty(), 0)):
        with pytest.raises(type(error)) as caught:
            worker.call(fail, error, seconds)
        assert caught.value is error


def test_interrupt_without_a_signal_ends_a_call():
    """As if the signal had come just before Python began to wait."""
    over = threading.Event()

    def work():
        time.sleep(0.2)
        _thread.interrupt_main()  # sets Python's flag, but no signal wakes the main thread
        over.wait(30)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Worker().call(work)
    assert time.monotonic() - began < 15
    over.set()


@pytest.mark.parametrize("program", [run, checkpoint])
def test_second_ctrl_c_ends_a_command_that_is_ending(program, monkeypatch):
    """The message "interrupted" may block."""

    def press(*_):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("Ctrl-C was ignored")

    def leave(status):
        raise SystemExit(status)

    monkeypatch.setattr(program, "parse_arguments", press)
    monkeypatch.setattr(program, "say", press)
    monkeypatch.setattr(os, "_exit", leave)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, WAKE)}
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        program.main()
    for number, handler in before.items():
        signal.signal(number, handler)
    assert repr(ended.value) == "SystemExit(130)"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "error: this process got no more memory; raise its limit (ulimit -v), or"),
        (RuntimeError("can't start new thread"), "error: this process got no more threads; raise"),
    ],
)
@pytest.mark.parametrize("program", [run, checkpoint])
def test_limit_of_the_process_is_named(program, error, said, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(program, "parse_arguments", fail)
    assert program.main() == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(said) and captured.err.count("\n") == 1 and not captured.out


# Standard streams.


class Slow(io.RawIOBase):
    """Takes nothing at every second call and three bytes at the others, until it is full."""

    def __init__(self, room):
        self.taken, self.room, self.ready = b"", room, False

    def writable(self):
        return True

    def fileno(self):
        return 1  # one that can be waited for

    def write(self, data):
        self.ready = not self.ready
        if not self.ready:
            return None
        if len(self.taken) >= self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        piece = bytes(data)[:3]
        self.taken += piece
        return len(piece)


@pytest.mark.parametrize("buffered", [False, True])
def test_output_is_complete_or_an_error(buffered, monkeypatch):
    """A device may take a part of what is written; the rest must not stay in a buffer."""
    for room in (100, 6):
        raw = Slow(room)
        buffer = io.BufferedWriter(raw) if buffered else raw
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
def test_full_nonblocking_pipe_is_waited_for(answer, monkeypatch):
    """For an answer without limit, for a message PATIENCE seconds, and not in a busy loop."""
    monkeypatch.setattr(console, "PATIENCE", 0.1)
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)
    with open(receiver, "rb") as reader, open(sender, "w") as stream:
        with pytest.raises(BlockingIOError):
            while os.write(sender, b" " * 2**12):
                pass
        draining = threading.Timer(0.3, lambda: os.read(receiver, 2**20))
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


def run_with(redirections, *arguments):
    """Run Python with standard streams that a shell closes or redirects."""
    shell = ["sh", "-c", f'exec "$0" "$@" {redirections}', sys.executable]
    without = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    command = [*shell, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=without, capture_output=True, text=True)


def test_no_file_gets_the_number_of_a_closed_stream(tmp_path):
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


CLOSED = "error: standard output is closed; send it to a file or a program that takes it\n"


@pytest.mark.parametrize(
    ("redirection", "arguments", "status", "err"),
    [
        (">&-", ("run.py", "--prompt-ids", "5"), 1, CLOSED),
        (">&-", ("checkpoint.py", "--help"), 1, CLOSED),
        ("2>&-", ("run.py", "--no-such"), 2, ""),
        ("2>&-", ("checkpoint.py", "verify", "no/such"), 1, ""),
    ],
)
def test_closed_stdout_is_an_error_but_not_stderr(redirection, arguments, status, err):
    done = run_with(redirection, *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", err)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs the device")
@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        (run, ["--help"]),
        (run, ["--version"]),
        (run, ["--prompt-ids", "5"]),
        (checkpoint, ["--help"]),
        (checkpoint, ["verify", MODEL]),
    ],
)
def test_output_to_a_full_device_is_an_error(program, arguments, monkeypatch, capsys):
    monkeypatch.setattr(run, "serve", lambda *_: write_out("an answer"))
    monkeypatch.setattr(sys, "argv", ["program", *arguments])
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert program.main() == 1
    sentence = "error: standard output cannot be written (No space left on device); send it to a "
    assert capsys.readouterr().err == f"{sentence}file or a program that takes it\n"


def test_conversion_needs_no_streams(tmp_path):
    """Its files do not get the numbers of closed streams."""
    target = tmp_path / "safe"
    convert = ("checkpoint.py", "convert", MODEL, target, "--to", "safetensors")
    done = run_with("<&- 2>&-", *convert)
    assert done.returncode == 0 and done.stdout.startswith(f"{target}: ")
    assert not checkpoint.verify(target)[1]
