"""Where answers go: to standard output as text or JSON lines, or to a file that can be resumed."""

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
from typing import Any, NoReturn

from grok1.checks import is_integer
from grok1.cli.console import write_out
from grok1.formats import atomic

Place = tuple[int, int]  # of an answer: which prompt it is to, and which one of that prompt's
BEGINNING = b'{"index": %d, "sample": %d, '  # of a line of an output file
MOST_BYTES = 2**30  # in such a line: half a line may be the rest of a disk


def answer_fields(answer: Any) -> dict[str, Any]:
    """Return what JSON says of an answer; what else was asked for, if it was."""
    fields = {
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


def as_json(value: Any) -> str:
    """Return a value as JSON. Raises ValueError for NaN and Infinity, which JSON does not have."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        raise ValueError(
            "expected finite numbers to write as JSON, got NaN or Infinity; check the weights with "
            "checkpoint.py verify, and the options"
        ) from None


class Lines:
    """Prints lines; one that was cut, by an interruption or an error, once more before the next."""

    def __init__(self) -> None:
        self._cut = ""

    def print(self, line: str) -> None:
        """Print a line. Raises OSError."""
        self.print_again()
        self._cut = line
        write_out(line)
        self._cut = ""

    def print_again(self) -> None:
        """Print the line that was cut, if one was, below its half. Raises OSError."""
        if self._cut:
            write_out(f"\n{self._cut}")
            self._cut = ""


class TextPrinter:
    """Streams a single answer as it grows; prints several, each with its prompt, as they end."""

    def __init__(self, prompts: Sequence[Any], places: Sequence[Place]):
        self.alone = len(places) == 1
        self.prompt = prompts[0] if self.alone and isinstance(prompts[0], str) else ""
        self.begun = False
        self.several = {index for index, sample in places if sample}
        self.open: dict[Place, Any] = {}
        self.lines = Lines()

    def _begin(self) -> None:
        """Print the prompt, once."""
        if self.prompt:
            write_out(self.prompt, end="")
            self.prompt, self.begun = "", True

    def show(self, event: Any) -> None:
        """Print what is new."""
        if self.alone:
            self._begin()
            ids = event.completion.text is None and event.token_id is not None
            write_out(f"{event.token_id} " if ids else event.text, end="")
            self.begun = True
            return
        place = event.request, event.sample
        self.open[place] = event.completion
        if event.finish_reason is not None:
            self._whole(place)

    def close(self) -> None:
        """End the line, and print what answers there are of an interrupted batch."""
        self._begin()
        if self.begun:
            write_out("")
        self.lines.print_again()
        for place in sorted(self.open):
            self._whole(place)

    def _whole(self, place: Place) -> None:
        index, sample = place
        answer = self.open.pop(place)
        prompt = " ".join(map(str, answer.prompt_ids)) if answer.prompt is None else answer.prompt
        text = " ".join(map(str, answer.token_ids)) if answer.text is None else answer.text
        # Ids do not run on into an answer, as words do.
        between = " | " if answer.prompt is None else ""
        label = f"{index + 1}.{sample + 1}" if index in self.several else f"{index + 1}"
        self.lines.print(f"[{label}] {prompt}{between}{text}")


class JsonPrinter:
    """Prints finished answers as JSON lines, in the order of the prompts.

    places: of all answers. ids: the person's own name for each prompt, or None.
    """

    def __init__(self, places: Sequence[Place], ids: Sequence[str | int | None]) -> None:
        self.ids = ids
        self.waiting = collections.deque(places)
        self.finished: dict[Place, Any] = {}
        self.lines = Lines()

    def show(self, event: Any) -> None:
        """Print the answers that are finished and whose turn it is."""
        if event.finish_reason is not None:
            self.finished[event.request, event.sample] = event.completion
        while self.waiting and self.waiting[0] in self.finished:
            self._print(self.waiting.popleft())

    def close(self) -> None:
        """Print the other finished answers of an interrupted batch."""
        self.lines.print_again()
        for place in sorted(self.finished):
            self._print(place)

    def _print(self, place: Place) -> None:
        self.lines.print(as_json(fields_of_line(place, self.ids, self.finished.pop(place))))


def fields_of_line(place: Place, ids: Sequence[str | int | None], answer: Any) -> dict[str, Any]:
    """Return the fields of an answer's line: its place, its prompt's own name, and the answer."""
    index, sample = place
    own = {} if ids[index] is None else {"id": ids[index]}
    return {"index": index, "sample": sample} | own | answer_fields(answer)


# ------------------------------------------------------------------------------- the output file


def fingerprint(**values: Any) -> str:
    """Return a fingerprint of all that an answer depends on, which must be JSON."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class AnswerFile:
    """Writes answers to a file, a JSON line each, as they finish.

    places: of all answers. fingerprints: of each request; they stand in the lines, and tell whether
    what is there already belongs to this run. ids: the person's own name for each prompt, or None.
    resume: keep what is there; `done` holds the places of those. progress: called with the number
    of answers that are there, and of all.

    Raises ValueError, in one sentence, if the file cannot be written or holds something else.
    """

    def __init__(
        self,
        path: Path,
        places: Sequence[Place],
        fingerprints: Sequence[str],
        ids: Sequence[str | int | None],
        resume: bool = False,
    ):
        self.path = path
        self.places = frozenset(places)
        self.fingerprints = fingerprints
        self.ids = ids
        self.progress: Callable[[int, int], object] = lambda _, __: None
        self.done: set[Place] = set()
        try:
            # Once, and until the end: what is checked and locked is what is written.
            how = os.O_RDWR if resume else os.O_WRONLY
            self._descriptor = os.open(path, how | os.O_APPEND | os.O_CREAT, 0o666)
            self.close = weakref.finalize(self, os.close, self._descriptor)
            self._regular = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
            self._size = 0  # of the file, at least: standard error may go there, too
            if self._regular:  # a device or a pipe is shared
                self._take_up(resume)
            elif resume:
                raise ValueError(
                    f"{path}: expected a file to resume, got a pipe or a device, which keeps no "
                    "answers; start without --resume"
                )
        except OSError as error:
            raise ValueError(
                f"{path}: the answers cannot be written there ({error.strerror}); name another "
                "file with --output"
            ) from error

    def show(self, event: Any) -> None:
        """Write an answer that is finished; one that an error ended is left to another run."""
        place = event.request, event.sample
        # Of several answers to a prompt some may have been there before.
        if event.finish_reason not in (None, "error") and place not in self.done:
            self._write(place, event.completion)
            self.done.add(place)
            self.progress(len(self.done), len(self.places))

    def _write(self, place: Place, answer: Any) -> None:
        fields = fields_of_line(place, self.ids, answer)
        fields["fingerprint"] = self.fingerprints[place[0]]
        try:
            self._append(as_json(fields).encode() + b"\n")
        except OSError as error:
            raise ValueError(
                f"{self.path}: {len(self.done)} of {len(self.places)} answers are written, "
                f"and no more can be ({error.strerror}); mend that, and start again, with --resume "
                "if it is a file"
            ) from error

    def _append(self, line: bytes) -> None:
        """Put a line at the end of the file, where it is when this returns."""
        if self._regular:
            self._check_unchanged()
        while line:  # a disk that is almost full takes a part of it
            written = os.write(self._descriptor, line)
            self._size += written
            line = line[written:]

    def _check_unchanged(self) -> None:
        """Raise ValueError if the path has another file now, or this one was cut.

        Editors save by renaming a new file, and what this run wrote to the old one would be lost.
        """
        found = os.fstat(self._descriptor)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(found, os.stat(self.path)) and found.st_size >= self._size:
                return
        raise ValueError(
            f"{self.path}: expected the file as this run left it, got one that another program has "
            "removed, replaced or cut; start again, with --resume if the file is there"
        )

    def _take_up(self, resume: bool) -> None:
        """Keep other runs away, and find out what is done; half a line at the end is cut off."""
        if not atomic.lock(self._descriptor):
            raise ValueError(
                f"{self.path}: expected a file for this run alone, got one that another run is "
                "writing to; wait until that ends, or name another file with --output"
            )
        size = os.fstat(self._descriptor).st_size
        if size and not resume:
            raise ValueError(
                f"{self.path}: expected no such file, or an empty one, got one of "
                f"{size} bytes; add --resume to go on with it, or name another file"
            )
        if not resume:
            return
        whole = 0  # bytes of whole lines
        with open(self._descriptor, "rb", closefd=False) as file:
            lines = iter(functools.partial(file.readline, MOST_BYTES + 1), b"")
            for number, line in enumerate(lines, 1):
                place = f"{self.path}, line {number}"
                if line.endswith(b"\n"):
                    self.done.add(self._place(line, place))
                    whole += len(line)
                elif len(line) > MOST_BYTES or not self._may_begin(line):
                    self._refuse(line, place)
        os.ftruncate(self._descriptor, whole)
        self._size = whole

    def _may_begin(self, half: bytes) -> bool:
        """Whether an interruption of this run, or of the machine, may have left half a line so."""
        half = half.rstrip(b"\0")  # of a block that never reached the disk
        # Without a whole line before it, it must be long enough to be known as ours.
        return any(
            half.startswith(beginning) or (self.done and beginning.startswith(half))
            for beginning in (BEGINNING % place for place in self.places)
        )

    def _place(self, line: bytes, place: str) -> Place:
        """Return which answer is in a line. Raises ValueError if it is none of this run."""
        try:
            fields = json.loads(line)
            index, sample, found = fields["index"], fields["sample"], fields["fingerprint"]
        except (ValueError, TypeError, KeyError, RecursionError):
            self._refuse(line, place)
        if not is_integer(index) or not 0 <= index < len(self.fingerprints):
            raise ValueError(
                f"{place}: expected the index of one of {len(self.fingerprints)} prompts, got "
                f"{index!r}; give the prompts that the file was begun with, or name another file"
            )
        if found != self.fingerprints[index]:
            raise ValueError(
                f"{place}: expected an answer to prompt {index + 1} as it is now, got one of "
                "another prompt, other settings or another model; give those that the file was "
                "begun with, or name another file"
            )
        known = is_integer(sample) and (index, sample) in self.places
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
