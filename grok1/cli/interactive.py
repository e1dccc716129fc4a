"""Interactive sessions: each prompt is answered independently, as it is typed."""

from __future__ import annotations

import contextlib
import io
import json
import secrets
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grok1.cli.console import READING, Worker, notice_if_slow, say, standard_input, write_out
from grok1.cli.options import Fields
from grok1.cli.prompts import with_options
from grok1.cli.timing import Timing, arrivals
from grok1.serving.names import nearest_name, published_names
from grok1.strict_json import read_json

if TYPE_CHECKING:
    from grok1.serving.request import Event, Request
    from runner import InferenceRunner

SIGN = "> "
HELP = """\
/set             show the changed settings
/set NAME VALUE  change a setting for later answers, such as /set temperature 0.9, or
                 /set logit_bias {"300": 5}; the VALUE none restores the initial one
/seed N          one seed for all answers; /seed new: a new one for each; /seed: show the last
/help            show these lines
/exit            or exit, or Ctrl-D: end the session
Each prompt is answered independently. Type two slashes for a prompt that begins with one."""
# Fields of a Request that cannot be set: a session shows one answer, without log-probabilities.
NOT_HERE = {"prompt", "num_samples", "top_logprobs", "prompt_logprobs"}
# Messages for ends of an answer that are not visible in its text.
ENDS = {
    "length": "ended by max_tokens; /set max_tokens N changes it",
    "context": "ended because the context is full",
}
WORDS = {"true": True, "false": False, "none": None}  # in any case, as in JSON and Python
MOST_CHARACTERS = 2**26  # in a line: /dev/zero has no end


class Keyboard:
    """Reads lines, and records whether Ctrl-C was pressed since the last one.

    While a line is read, Ctrl-C clears it. At any other time it only sets `pressed`: an exception
    between two arbitrary instructions could leave a request behind. A second Ctrl-C before the next
    line ends the command, as an answer may block if its output is not read.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._reading = False
        self._sign = SIGN if sys.stdin.isatty() and sys.stdout.isatty() else ""
        if self._sign:
            with contextlib.suppress(ImportError):  # not on every platform
                import readline  # noqa: F401  # gives `input` its history
        # Invalid UTF-8 reaches the tokenizer, which rejects it.
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        self._lines = io.TextIOWrapper(standard_input(), sys.stdin.encoding, "surrogateescape")
        self._before = signal.signal(signal.SIGINT, self._interrupt)

    def close(self) -> None:
        """Restore the previous handler of Ctrl-C."""
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
                f"standard input: expected prompts, got an error ({error.strerror}); run it in "
                "a terminal or with readable prompts"
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


class Settings:
    """The settings of later answers, changed by lines such as /set.

    make: returns a Request for a prompt and the fields that differ from the command line. check:
    raises ValueError if a Request is invalid. seed: for all answers; None: a new one for each.
    """

    def __init__(
        self,
        make: Callable[[str, Fields], Request],
        check: Callable[[Request], object],
        seed: int | None = None,
    ):
        self._make = make
        self._check = check
        self._changes: Fields = {}
        self._first = self._seed = self._last = seed

    def request(self, prompt: str) -> Request:
        """Return the Request for a prompt."""
        self._last = secrets.randbelow(2**32) if self._seed is None else self._seed
        return self._make(prompt, self._changes | {"rng_seed": self._last})

    def run_command(self, line: str) -> None:
        """Run a command line that begins with a slash. Raises ValueError."""
        match line.split():
            case ["/help"]:
                say(HELP)
            case ["/set"]:
                own = dict(self._changes)
                say(json.dumps(own | ({} if self._seed is None else {"seed": self._seed})))
            case ["/seed"]:
                say("no answer yet" if self._last is None else f"the last seed was {self._last}")
            case ["/seed", "new"]:
                self._seed = None
            case ["/seed", value]:
                self._set("rng_seed", value)
            case ["/set", first, *rest] if rest or "=" in first:
                name, equals, value = first.partition("=")
                self._set(name, " ".join([value, *rest] if equals else rest))
            case [word, *_]:
                known = "/help", "/set", "/seed", "/exit"
                if word in known:
                    raise ValueError(f"{word}: expected the form shown by /help, got {line!r}")
                raise ValueError(
                    f"{word}: expected one of {', '.join(known)}{nearest_name(word, known)}"
                )

    def _set(self, name: str, text: str) -> None:
        try:
            value: Any = WORDS[text.lower()] if text.lower() in WORDS else read_json(text)
        except ValueError:
            value = text  # a string needs no quotes
        field = published_names({name.removeprefix("--").replace("-", "_"): value})
        if field.keys() & NOT_HERE:
            raise ValueError(f"{name}: expected a setting of a session, which prints one answer")
        (name,) = field
        try:
            request = self._make("a", self._changes | field)
        except TypeError as error:
            reason = str(error).replace("Request has no field", "there is no setting")
            raise ValueError(reason) from None
        if value is not None:
            self._check(request)
        if name == "rng_seed":
            self._seed = self._first if value is None else value
        elif value is None:
            self._changes.pop(name, None)
        else:
            self._changes[name] = value


def run_session(
    worker: Worker, server: InferenceRunner, settings: Settings, stats: bool = False
) -> None:
    """Answer each line of the input until it ends.

    worker: the thread that runs jax. stats: print latencies after each answer.
    """
    if sys.stdin.isatty():
        say("one prompt per line; Ctrl-C stops an answer, Ctrl-D exits, /help shows more")
    with contextlib.closing(Keyboard()) as keyboard:
        while (line := keyboard.read()) is not None and line.strip() not in ("exit", "/exit"):
            if not line.strip():
                continue
            timing = Timing()
            try:
                command = line.lstrip()
                if command.startswith("//"):
                    line = command[1:]
                elif command.startswith("/"):
                    settings.run_command(command)
                    continue
                request = settings.request(line)
                _answer(worker, server, request, keyboard, timing)
            except ValueError as error:
                say(f"error: {with_options(str(error), {})}")
                continue
            if stats:
                say(timing.block())


def _answer(
    worker: Worker, server: InferenceRunner, request: Request, keyboard: Keyboard, timing: Timing
) -> None:
    """Stream an answer until it ends or Ctrl-C is pressed. Raises ValueError."""
    handle = worker.call(server.submit, request)
    events = server.stream(handle)

    # Ctrl-C is checked between steps, so that no step is running when the request is cancelled.
    def ask() -> Event | None:
        return None if keyboard.pressed else worker.call(next, events, None)

    for event, now in arrivals(ask, notice_if_slow(READING)):
        if event.token_id is not None:
            timing.take(event.request, prompt=len(event.completion.prompt_ids), at=now)
        write_out(event.text, end="")
    worker.call(server.cancel, handle)  # does nothing if it has ended
    write_out("")
    answer = handle.completion
    if answer.error is not None:
        raise ValueError(answer.error)
    if answer.finish_reason in ENDS and sys.stdin.isatty():
        say(f"({ENDS[answer.finish_reason]})")
