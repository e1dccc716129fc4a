"""Output of answers: to standard output as text or JSON lines, or to a resumable file."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import os
import stat
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from grok1.checks import is_integer
from grok1.cli.console import write_out
from grok1.formats import atomic

if TYPE_CHECKING:
    from grok1.serving.request import Completion, Event, Prompt

AnswerKey = tuple[int, int]  # of an answer: index of its prompt, and of the answer within it
BEGINNING = b'{"index": %d, "sample": %d, '  # the beginning of a line of an output file
MOST_BYTES = 2**30  # in such a line; an incomplete one may be as large as the disk


def answer_fields(answer: Completion) -> dict[str, object]:
    """Return the JSON fields of an answer; optional ones if they were requested."""
    fields: dict[str, object] = {
        "prompt": answer.prompt,
        "prompt_ids": answer.prompt_ids,
        "token_ids": answer.token_ids,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "logprobs": answer.logprobs,
    }
    if answer.top_logprobs:
        fields["top_logprobs"] = answer.top_logprobs
    if answer.prompt_logprobs is not None:
        fields["prompt_logprobs"] = answer.prompt_logprobs
    if answer.prompt_top_logprobs is not None:
        fields["prompt_top_logprobs"] = answer.prompt_top_logprobs
    if answer.error is not None:
        fields["error"] = answer.error
    return fields


def as_json(value: object) -> str:
    """Return a value as JSON. Raises ValueError for NaN and Infinity, which JSON lacks."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError(
            "expected finite numbers to write as JSON, got NaN or Infinity; check the weights with "
            "checkpoint.py verify, and the options"
        ) from None


class Lines:
    """Prints lines; a line cut off by an interrupt or an error is printed again first."""

    def __init__(self) -> None:
        self._cut = ""

    def print(self, line: str) -> None:
        """Print a line. Raises OSError."""
        self.print_again()
        self._cut = line
        write_out(line)
        self._cut = ""

    def print_again(self) -> None:
        """Print the line that was cut off, if any, on a new line. Raises OSError."""
        if self._cut:
            write_out(f"\n{self._cut}")
            self._cut = ""


class TextPrinter:
    """Streams a single answer; prints several with their prompts, each when it is finished."""

    def __init__(self, prompts: Sequence[Prompt], keys: Sequence[AnswerKey]):
        self.alone = len(keys) == 1
        self.prompt = prompts[0] if self.alone and isinstance(prompts[0], str) else ""
        self.begun = False
        self.several = {index for index, sample in keys if sample}
        self.open: dict[AnswerKey, Completion] = {}
        self.lines = Lines()

    def _begin(self) -> None:
        """Print the prompt, once."""
        if self.prompt:
            write_out(self.prompt, end="")
            self.prompt, self.begun = "", True

    def show(self, event: Event) -> None:
        """Print the new text of an event, or the finished answer."""
        if self.alone:
            self._begin()
            ids = event.completion.text is None and event.token_id is not None
            write_out(f"{event.token_id} " if ids else event.text, end="")
            self.begun = True
            return
        key = event.request, event.sample
        self.open[key] = event.completion
        if event.finish_reason is not None:
            self._whole(key)

    def close(self) -> None:
        """End the line, and print the incomplete answers of an interrupted batch."""
        self._begin()
        if self.begun:
            write_out("")
        self.lines.print_again()
        for key in sorted(self.open):
            self._whole(key)

    def _whole(self, key: AnswerKey) -> None:
        index, sample = key
        answer = self.open.pop(key)
        prompt = " ".join(map(str, answer.prompt_ids)) if answer.prompt is None else answer.prompt
        text = " ".join(map(str, answer.token_ids)) if answer.text is None else answer.text
        # Unlike text, ids need a separator before the answer.
        between = " | " if answer.prompt is None else ""
        label = f"{index + 1}.{sample + 1}" if index in self.several else f"{index + 1}"
        self.lines.print(f"[{label}] {prompt}{between}{text}")


class JsonPrinter:
    """Prints finished answers as JSON lines, in the order of the prompts.

    keys: of all answers. ids: the user's name for each prompt, or None.
    """

    def __init__(self, keys: Sequence[AnswerKey], ids: Sequence[str | int | None]) -> None:
        self.ids = ids
        self.waiting = collections.deque(keys)
        self.finished: dict[AnswerKey, Completion] = {}
        self.lines = Lines()

    def show(self, event: Event) -> None:
        """Print the finished answers whose turn it is."""
        if event.finish_reason is not None:
            self.finished[event.request, event.sample] = event.completion
        while self.waiting and self.waiting[0] in self.finished:
            self._print(self.waiting.popleft())

    def close(self) -> None:
        """Print the other finished answers of an interrupted batch."""
        self.lines.print_again()
        for key in sorted(self.finished):
            self._print(key)

    def _print(self, key: AnswerKey) -> None:
        self.lines.print(as_json(fields_of_line(key, self.ids, self.finished.pop(key))))


def fields_of_line(
    key: AnswerKey, ids: Sequence[str | int | None], answer: Completion
) -> dict[str, object]:
    """Return the JSON fields of an answer: its key, the id of its prompt, and the answer."""
    index, sample = key
    own = {} if ids[index] is None else {"id": ids[index]}
    return {"index": index, "sample": sample} | own | answer_fields(answer)


# ------------------------------------------------------------------------------- the output file


def fingerprint(**values: object) -> str:
    """Return a fingerprint of JSON values, such as all that an answer depends on."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class AnswerFile:
    """Writes each answer to a file as a JSON line when it is finished.

    keys: of all answers. fingerprints: of each request, written to the lines to detect whether
    existing answers belong to this run. ids: the user's name for each prompt, or None. resume: keep
    the existing answers, whose keys are in `done`. progress: called with the number of answers
    written and in total.

    Raises ValueError, with an error message, if the file is not writable or has other contents.
    """

    def __init__(
        self,
        path: Path,
        keys: Sequence[AnswerKey],
        fingerprints: Sequence[str],
        ids: Sequence[str | int | None],
        resume: bool = False,
    ):
        self.path = path
        self.keys = frozenset(keys)
        self.fingerprints = fingerprints
        self.ids = ids
        self.progress: Callable[[int, int], object] = lambda _, __: None
        self.done: set[AnswerKey] = set()
        try:
            # Opened only once, so that the file checked and locked is the file written.
            how = os.O_RDWR if resume else os.O_WRONLY
            self._descriptor = os.open(path, how | os.O_APPEND | os.O_CREAT, 0o666)
            self.close = weakref.finalize(self, os.close, self._descriptor)
            self._regular = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
            self._size = 0  # least size of the file, as standard error may also go there
            if self._regular:  # a device or a pipe is shared
                self._read_existing(resume)
            elif resume:
                raise ValueError(
                    f"{path}: expected a file to resume, got a pipe or a device, which does not "
                    "store answers; start without --resume"
                )
        except OSError as error:
            raise ValueError(
                f"{path}: the answers cannot be written there ({error.strerror}); name another "
                "file with --output"
            ) from error

    def show(self, event: Event) -> None:
        """Write a finished answer; one that ended with an error is left to another run."""
        key = event.request, event.sample
        # Some of several answers to a prompt may have been there before.
        if event.finish_reason not in (None, "error") and key not in self.done:
            self._write(key, event.completion)
            self.done.add(key)
            self.progress(len(self.done), len(self.keys))

    def _write(self, key: AnswerKey, answer: Completion) -> None:
        fields = fields_of_line(key, self.ids, answer)
        fields["fingerprint"] = self.fingerprints[key[0]]
        try:
            self._append(as_json(fields).encode() + b"\n")
        except OSError as error:
            raise ValueError(
                f"{self.path}: {len(self.done)} of {len(self.keys)} answers are written, "
                f"and no more can be ({error.strerror}); fix that, and start again, with --resume "
                "if it is a file"
            ) from error

    def _append(self, line: bytes) -> None:
        """Append a line to the file; it is written when this returns."""
        if self._regular:
            self._check_unchanged()
        while line:  # an almost full disk takes only a part
            written = os.write(self._descriptor, line)
            self._size += written
            line = line[written:]

    def _check_unchanged(self) -> None:
        """Raise ValueError if the file was replaced or truncated.

        Editors save by renaming a new file; answers written to the old one would then be lost.
        """
        found = os.fstat(self._descriptor)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(found, os.stat(self.path)) and found.st_size >= self._size:
                return
        raise ValueError(
            f"{self.path}: expected the file as this run left it, got one that another program has "
            "removed, replaced or truncated; start again, with --resume if the file is there"
        )

    def _read_existing(self, resume: bool) -> None:
        """Lock the file and read its answers; remove an incomplete last line."""
        if not atomic.lock(self._descriptor):
            raise ValueError(
                f"{self.path}: expected a file for this run alone, got one that another run is "
                "writing to; wait until that ends, or name another file with --output"
            )
        size = os.fstat(self._descriptor).st_size
        if size and not resume:
            raise ValueError(
                f"{self.path}: expected no such file, or an empty one, got one of "
                f"{size} bytes; add --resume to continue it, or name another file"
            )
        if not resume:
            return
        whole = 0  # bytes of complete lines
        with open(self._descriptor, "rb", closefd=False) as file:
            lines = iter(functools.partial(file.readline, MOST_BYTES + 1), b"")
            for number, line in enumerate(lines, 1):
                place = f"{self.path}, line {number}"
                if line.endswith(b"\n"):
                    self.done.add(self._key(line, place))
                    whole += len(line)
                elif len(line) > MOST_BYTES or not self._may_begin(line):
                    self._refuse(line, place)
        os.ftruncate(self._descriptor, whole)
        self._size = whole

    def _may_begin(self, half: bytes) -> bool:
        """Whether `half` may be a line left incomplete by an interruption or a crash."""
        half = half.rstrip(b"\0")  # of a block that never reached the disk
        # Without a complete line before it, it must be long enough to identify it.
        return any(
            half.startswith(beginning) or (self.done and beginning.startswith(half))
            for beginning in (BEGINNING % key for key in self.keys)
        )

    def _key(self, line: bytes, place: str) -> AnswerKey:
        """Return the key of the answer in a line. Raises ValueError if it is not of this run."""
        try:
            fields = json.loads(line)
            index, sample, found = fields["index"], fields["sample"], fields["fingerprint"]
        except (ValueError, TypeError, KeyError, RecursionError):
            self._refuse(line, place)
        if not is_integer(index) or not 0 <= index < len(self.fingerprints):
            raise ValueError(
                f"{place}: expected the index of one of {len(self.fingerprints)} prompts, got "
                f"{index!r}; give the prompts that the file was started with, or name another file"
            )
        if found != self.fingerprints[index]:
            raise ValueError(
                f"{place}: expected an answer to prompt {index + 1} of this run, got one of "
                "another prompt, other settings or another model; give those that the file was "
                "started with, or name another file"
            )
        known = is_integer(sample) and (index, sample) in self.keys
        if not known or (index, sample) in self.done:
            raise ValueError(
                f"{place}: expected each answer once, got number {sample!r} of prompt {index + 1} "
                "again, or one that was not asked for; remove the line"
            )
        return index, sample

    def _refuse(self, line: bytes, place: str) -> NoReturn:
        got = line[:40].removesuffix(b"\n").decode(errors="replace")
        raise ValueError(
            f"{place}: expected an answer as --output writes it, got {got!r}; name another file, "
            "or remove this line if an interrupted run left it"
        )
