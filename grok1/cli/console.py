"""Code shared by the commands: standard streams, Ctrl-C, argument parsers, progress."""

from __future__ import annotations

import argparse
import array
import contextlib
import errno
import io
import math
import os
import re
import select
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn, Self, TextIO, TypeVar, TypeVarTuple

from grok1.serving.names import nearest_name

if TYPE_CHECKING:
    from tqdm import tqdm

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")

MOST_BYTES = 1e18  # of a device, or per second
PATIENCE = 1.0  # seconds to wait until a full non-blocking pipe takes a message
READING = "reading the prompt; the first time, the model is compiled"
SILENCE = 0.7  # seconds before `notice_if_slow` prints to a terminal


def open_standard_streams() -> None:
    """Open closed descriptors 0, 1 and 2, so that no other file gets their numbers.

    Standard input is then empty, standard error is discarded, and writing to standard output is an
    error.
    """
    for descriptor, name, flags in (
        (0, "stdin", os.O_RDONLY),
        (1, "stdout", os.O_RDONLY),
        (2, "stderr", os.O_WRONLY),
    ):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, flags)  # gets the lowest free number
            os.set_inheritable(descriptor, True)
            mode = "w" if descriptor else "r"
            setattr(sys, name, open(descriptor, mode, buffering=1, closefd=False))  # noqa: SIM115


class _Waiting(io.RawIOBase):
    """A reader of a non-blocking file that waits for data, instead of reporting end of file."""

    def __init__(self, raw: io.RawIOBase):
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while (count := self._raw.readinto(buffer)) is None:
            select.select([self._raw], [], [])
        return count


def standard_input() -> BinaryIO:
    """Return standard input as bytes; it may have been set to non-blocking."""
    buffer = sys.stdin.buffer
    raw = getattr(buffer, "raw", None)
    return buffer if raw is None else io.BufferedReader(_Waiting(raw))


def say(message: str, file: TextIO | None = None) -> None:
    """Print a message for the user to standard error, ignoring errors.

    Terminal control characters, which it may quote from a file, are escaped.
    """
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    with contextlib.suppress(OSError):
        _write(f"{shown}\n", file or sys.stderr, PATIENCE)


def input_waits() -> bool:
    """Whether standard input is a file or a pipe with data to read."""
    waiting = array.array("i", [0])
    with contextlib.suppress(OSError, ImportError):  # not on every platform
        import fcntl
        import termios

        mode = os.fstat(0).st_mode
        if stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
            fcntl.ioctl(0, termios.FIONREAD, waiting)
    return waiting[0] > 0


@contextlib.contextmanager
def notice_if_slow(what: str) -> Iterator[None]:
    """Print `what` to a terminal if the block takes long."""
    timer = threading.Timer(SILENCE, say, [what])
    timer.daemon = True
    if sys.stderr.isatty():
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def write_out(text: str, end: str = "\n", file: TextIO | None = None) -> None:
    """Print to standard output. Raises OSError, with an error message, if it cannot be written.

    BrokenPipeError is raised unchanged: the reader of the output has closed it.
    """
    try:
        _write(f"{text}{end}", file or sys.stdout)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise _unwritable(error) from error


def _write(text: str, stream: TextIO, patience: float | None = None) -> None:
    """Write a text at once, so that the output of other threads does not interleave with it.

    patience: seconds to wait for each part if the stream is non-blocking; None: forever.

    Bypasses the stream's buffer, which would keep unwritten data and fail again at exit.
    """
    if not hasattr(stream, "buffer"):
        stream.write(text)
        return
    stream.flush()
    data = text.encode(stream.encoding, "backslashreplace")  # escape unencodable characters
    raw = getattr(stream.buffer, "raw", stream.buffer)
    while data:  # an almost full disk takes only a part
        taken = raw.write(data)
        if taken is None and not select.select([], [raw], [], patience)[1]:  # it does not block
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        data = data[taken or 0 :]


def check_output() -> None:
    """Raise OSError, with an error message, if standard output is closed."""
    try:
        os.write(1, b"")
    except OSError as error:
        raise _unwritable(error) from error


def _unwritable(error: OSError) -> OSError:
    closed = error.errno == errno.EBADF
    why = "is closed" if closed else f"cannot be written ({error.strerror})"
    return OSError(f"standard output {why}; send it to a file or a program that takes it")


def limit_reached(error: BaseException) -> str | None:
    """Return an error message if the process ran out of memory or threads, otherwise None."""
    if isinstance(error, MemoryError):
        what, limit = "memory", "ulimit -v"
    elif isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        what, limit = "threads", "ulimit -u, or -v for their stacks"
    else:
        return None
    return f"this process got no more {what}; raise its limit ({limit}), or use a larger machine"


class Worker:
    """A thread that runs calls one after the other while the main thread waits for them.

    Ctrl-C is thus handled at once, and never interrupts an import, a trace or a compilation. After
    it the process must end by os._exit, as sys.exit would wait for the call.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)

    def call(self, function: Callable[[*Arguments], Result], *arguments: *Arguments) -> Result:
        """Call a function in the thread and return its result; may raise KeyboardInterrupt."""
        future = self._thread.submit(function, *arguments)
        over: SimpleQueue[Future[Result]] = SimpleQueue()
        future.add_done_callback(over.put)
        # Not future.result(): a signal that arrives just before it waits would be handled too late,
        # and one inside the locks of threading.py becomes a RuntimeError.
        while not future.done():
            with contextlib.suppress(Empty):
                over.get(timeout=0.5)
        return future.result()


def run_command(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its status; Ctrl-C never shows a traceback."""
    try:
        # In the background of a shell script, Ctrl-C is ignored, and stays ignored.
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            status = main()
        finally:
            end_at_next_interrupt()  # only the shutdown of Python is left
    except KeyboardInterrupt:  # before or after main handles it
        os._exit(130)
    sys.exit(status)


def end_at_next_interrupt() -> None:
    """From now on, end the process immediately on Ctrl-C, even during shutdown."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))


def mesh_sizes(text: str) -> tuple[int, int]:
    """Parse "DATA,MODEL", or "DATAxMODEL"."""
    try:
        data, model = (int(part) for part in re.split("[,x]", text))
    except ValueError:
        data = model = 0
    if not 0 < min(data, model) <= max(data, model) < 2**31:
        raise argparse.ArgumentTypeError(
            f"expected two integers from 1 to {2**31 - 1}, DATA,MODEL such as 1,8, got {text!r}"
        )
    return data, model


def token_ids(text: str) -> list[int]:
    """Parse "5 6 7"."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected token ids such as '5 6 7', got {text!r}"
        ) from None


def given_path(text: str) -> Path:
    """Return a path; reject the empty one, which would mean the working directory."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got an empty string")
    return Path(text)


def number(
    kind: type[int] | type[float], low: float, high: float, note: str = ""
) -> Callable[[str], float]:
    """Return a parser of an int or float in [low, high]; `note` is appended to the message."""
    name = "an integer" if kind is int else "a number"
    least = "above 0, up to" if low == sys.float_info.min else f"from {low:.10g} to"
    wanted = f"{name} {least} {high:.10g}{note}"

    def parse(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return parse


def quantity(units: dict[str, float], example: str) -> Callable[[str], float]:
    """Return a parser of a positive number with one of these units, such as 80GiB."""

    def parse(text: str) -> float:
        match = re.fullmatch(r"\s*([0-9.]+(?:[eE][0-9]+)?)\s*([A-Za-z/]*)\s*", text)
        try:
            value = float(match[1]) * units[match[2]] if match else 0.0
        except (KeyError, ValueError):
            value = 0.0
        if not 0 < value < MOST_BYTES:
            known = ", ".join(unit for unit in units if unit)
            raise argparse.ArgumentTypeError(
                f"expected a number and a unit such as {example} (units: {known}), less than "
                f"{MOST_BYTES:g} bytes, got {text!r}"
            )
        return value

    return parse


SIZES = {f"{prefix}B": 1000.0**i for i, prefix in enumerate(("", "k", "M", "G", "T"))}
SIZES |= {f"{prefix}iB": 1024.0**i for i, prefix in enumerate(("K", "M", "G", "T"), start=1)}
byte_size = quantity(SIZES, "80GiB")
byte_rate = quantity({f"{unit}/s": size for unit, size in SIZES.items()}, "3.35TB/s")


def _with_hyphens(argument: str) -> str:
    """Return --top-p for --top_p, and anything else unchanged."""
    name, equals, value = argument.partition("=")
    known = re.fullmatch("--[a-z_-]+", name)
    return f"{name.replace('_', '-')}{equals}{value}" if known else argument


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, without the usage.

    elsewhere: names of options in other programs -> the name here, for error messages. words: the
    argument that takes all positional arguments, wherever they are, and all after `--`; None:
    positional arguments as in argparse.
    """

    elsewhere: Mapping[str, str] = {}
    words: str | None = None

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; the error for an unknown option suggests the most similar one."""
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)  # no options after it
        options = [_with_hyphens(argument) for argument in given[:end]]
        if self.words is None:
            found, unknown = self.parse_known_args([*options, *given[end:]], namespace)
        else:  # `--` is handled here: argparse treats it differently in each Python version
            found, unknown = self.parse_known_intermixed_args(options, namespace)
            setattr(found, self.words, [*getattr(found, self.words), *given[end + 1 :]])
        # Only name options: an unknown word may be the value of an unknown option.
        if unknown := [word for word in unknown if word.startswith("-")] or unknown:
            known, name = re.findall(r"--[a-z-]+", self.format_help()), unknown[0].partition("=")[0]
            there = self.elsewhere.get(name)
            hint = f"; use {there}" if there else nearest_name(name, known)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found

    def print_help(self, file: Any = None) -> None:
        """Print all options. Raises OSError."""
        if file is None:
            write_out(self.format_help(), end="")
        else:
            super().print_help(file)

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        say(f"error: {message}; --help lists all options")
        sys.exit(2)


class Progress:
    """Shows progress: a bar on a terminal, otherwise a line every few seconds.

    what: the work, in one word. already: how much was done before. Call it as
    progress(done, total), from any thread.
    """

    unit, scaled = " answers", False  # for tqdm

    def __init__(self, what: str, seconds: float = 5.0, already: int = 0):
        self.what = what
        self.seconds = seconds
        self.already = already
        self.bar: tqdm | None = None
        self.start()

    def start(self) -> None:
        """Restart the clock when the work begins."""
        self.began = time.perf_counter()
        self.next = self.began + self.seconds

    def __call__(self, done: int, total: int) -> None:
        """Update with the amount done and the total."""
        if sys.stderr.isatty():
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(
                    total=total,
                    initial=self.already,
                    desc=self.what,
                    unit=self.unit,
                    unit_scale=self.scaled,
                )
            self.bar.update(done - self.bar.n)
        elif time.perf_counter() >= self.next:
            passed, new = time.perf_counter() - self.began, done - self.already
            left = passed * (total - done) / max(1, new)
            say(f"{self.what}: {self.amounts(done, total, new / passed)}, {left:.0f} s left")
            self.next = time.perf_counter() + self.seconds

    def amounts(self, done: int, total: int, rate: float) -> str:
        """Return the amount done, the total and the rate as text."""
        return f"{done} of {total} answers, {rate:.2f} per second"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the line of the bar."""
        if self.bar is not None:
            self.bar.close()


class ByteProgress(Progress):
    """Shows progress in bytes."""

    unit, scaled = "B", True

    def amounts(self, done: int, total: int, rate: float) -> str:
        """Return the amounts and the rate in GB."""
        return f"{done / 1e9:.1f} of {total / 1e9:.1f} GB, {rate / 1e9:.2f} GB/s"
