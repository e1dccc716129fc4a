"""A prompt line: each prompt is answered by itself, as it is typed."""

import contextlib
import io
import signal
import sys
from collections.abc import Callable
from typing import Any

from grok1.cli.console import Worker, say, standard_input, write_out
from grok1.cli.timing import Timing

SIGN = "> "
MOST_CHARACTERS = 2**26  # in a line: /dev/zero has no end


class Keyboard:
    """Reads lines, and knows whether Ctrl-C was pressed since.

    While a line is read Ctrl-C clears it. At any other time it only sets `pressed`: an exception
    between two arbitrary instructions could leave a request behind. Pressed again before the next
    line is read it ends the command: an answer may not stop, with nobody who reads the output.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._reading = False
        self._sign = SIGN if sys.stdin.isatty() and sys.stdout.isatty() else ""
        if self._sign:
            with contextlib.suppress(ImportError):  # not on every platform
                import readline  # noqa: F401  # gives `input` its history
        # What is not UTF-8 reaches the tokenizer, which refuses it.
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        self._lines = io.TextIOWrapper(standard_input(), sys.stdin.encoding, "surrogateescape")
        self._before = signal.signal(signal.SIGINT, self._interrupt)

    def close(self) -> None:
        """Give Ctrl-C back its meaning."""
        signal.signal(signal.SIGINT, self._before)

    def read(self) -> str | None:
        """Return the next line; None at the end of the input."""
        self.pressed = False
        try:
            try:
                self._reading = True
                return self._line()
            finally:
                self._reading = False
        except KeyboardInterrupt:
            line = ""
        except EOFError:
            line = None
        if self._sign:
            write_out("")
        return line

    def _line(self) -> str:
        try:
            if self._sign:
                return input(self._sign)
            line = self._lines.readline(MOST_CHARACTERS + 1)
        except OSError as error:
            raise OSError(
                f"standard input: expected prompts, got an error ({error.strerror}); start it from "
                "a terminal or with prompts that can be read"
            ) from error
        if not line:
            raise EOFError
        if len(line) > MOST_CHARACTERS:
            raise OSError(
                f"standard input: expected at most {MOST_CHARACTERS} characters in a line, got more"
            )
        return line.removesuffix("\n")

    def _interrupt(self, *_: object) -> None:
        if self._reading or self.pressed:
            self._reading = False
            raise KeyboardInterrupt
        self.pressed = True


def converse(
    worker: Worker,
    server: Any,
    make_request: Callable[[str], Any],
    stats: bool = False,
) -> None:
    """Answer each line of the input until it ends.

    worker: the thread in which jax works. stats: say after each answer when its tokens came.
    """
    if sys.stdin.isatty():
        say("a prompt a line; Ctrl-C stops an answer, Ctrl-D ends")
    with contextlib.closing(Keyboard()) as keyboard:
        while (prompt := keyboard.read()) is not None:
            if not prompt.strip():
                continue
            timing = Timing()
            try:
                _answer(worker, server, make_request(prompt), keyboard, timing)
            except ValueError as error:
                say(f"error: {error}")
                continue
            if stats:
                say(timing.block())


def _answer(worker: Worker, server: Any, request: Any, keyboard: Keyboard, timing: Timing) -> None:
    """Print an answer as it grows, to its end or to Ctrl-C. ValueError: what is wrong."""
    handle = worker.call(server.submit, request)
    events = server.stream(handle)
    # Whether it was pressed is looked at between the steps: none is running when it is cancelled.
    while not keyboard.pressed and (event := worker.call(next, events, None)):
        if event.token_id is not None:
            timing.take(event.request)
        write_out(event.text, end="")
    worker.call(server.cancel, handle)  # leaves one that has ended as it is
    write_out("")
    if handle.completion.error is not None:
        raise ValueError(handle.completion.error)
