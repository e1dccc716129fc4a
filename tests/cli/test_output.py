"""Answers in a file: each once, whatever interrupts the run, and never those of two runs mixed."""

import dataclasses
import errno
import fcntl
import functools
import gc
import json
import math
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

import processes
import run
from commands import COUNTED, LOADED, PROMPT, Command, assert_one_sentence, changed, finish, start
from grok1.cli import output
from grok1.cli.output import AnswerFile
from grok1.formats import atomic
from grok1.parallel.multihost import WAKE
from paths import ROOT
from runner import Completion, Event

start_many = processes.start
# The seed makes the random model's answers differ in length.
SETTINGS = ("--temperature", 1, "--batch", 4)


def event(index: int, reason: str | None) -> Event:
    """A token of an answer."""
    return Event(index, 5, "a", Completion("A", [4], [5], [-1.0], "a", reason), 0, reason)


def opened(path: pathlib.Path, count: int = 3, resume: bool = False) -> AnswerFile:
    """An output file for so many requests."""
    keys = [(i, 0) for i in range(count)]
    return AnswerFile(path, keys, [f"print {i}" for i in range(count)], [None] * count, resume)


def indices(path: pathlib.Path) -> list[int]:
    """Which prompts the lines of a file answer."""
    return [json.loads(line)["index"] for line in path.read_text().splitlines()]


OURS = '{"index": 1, "sample": 0, "fingerprint": "print 1"}\n'


# One file.


def test_only_answers_that_came_to_their_end_are_written_each_at_once(
    tmp_path: pathlib.Path,
) -> None:
    file = opened(tmp_path / "out")
    seen: list[tuple[int, int]] = []
    file.progress = lambda done, total: seen.append((done, total))
    for index, reason in ((0, None), (2, "eos"), (1, None), (1, "error"), (0, "length")):
        file.show(event(index, reason))
        assert ((2, 0) in file.done) == (2 in indices(tmp_path / "out"))
    file.close()
    assert indices(tmp_path / "out") == [2, 0] and seen == [(1, 3), (2, 3)]


@pytest.mark.parametrize("tail", [b"", b"\0", b"\0" * 5000])
def test_half_a_line_is_dropped_wherever_it_is_cut(tail: bytes, tmp_path: pathlib.Path) -> None:
    """With zeros behind it, too, as a machine that crashes leaves them for what it did not store.

    The first line alone must be long enough to be known as one of ours.
    """
    path = tmp_path / "out"
    file = opened(path)
    file.show(event(2, "eos"))
    first = path.stat().st_size
    file.show(event(0, "eos"))
    file.close()
    whole = path.read_bytes()
    for length in range(len(b'{"index": 2, "sample": 0, '), len(whole) + 1):
        path.write_bytes(whole[:length] + tail)
        file = opened(path, resume=True)
        file.close()
        complete = whole[:length].count(b"\n")
        assert path.read_bytes() == whole[: (0, first, len(whole))[complete]]
        assert file.done == {(i, 0) for i in [2, 0][:complete]}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("A dog", "line 1: expected an answer as --output writes it, got 'A dog'; name another"),
        ("{", "line 1: expected an answer as --output writes it, got '{'; name another"),
        ('{"index": {"a": 1}}', "line 1: expected an answer"),
        ('{"index": ', "line 1: expected an answer"),
        ('{"index": 3, "sample": 0, "prompt"', "line 1: expected an answer"),
        ("\0\0", "line 1: expected an answer"),
        (OURS + "{}", "line 2: expected an answer as --output writes it, got '{}'"),
        (OURS + '{"index": {', "line 2: expected an answer"),
        (OURS + "\0{", "line 2: expected an answer"),
        (OURS + "\0\n", "line 2: expected an answer"),
        ("{}\n", "line 1: expected an answer as --output writes it, got '{}'"),
        ("[]\n", "line 1: expected an answer"),
        ('\n{"index": 0', "line 1: expected an answer"),
        (
            '{"index": 3, "sample": 0, "fingerprint": "print 3"}\n',
            "the index of one of 3 prompts, got 3; give",
        ),
        (
            '{"index": "0", "sample": 0, "fingerprint": ""}\n',
            "the index of one of 3 prompts, got '0'; give",
        ),
        (
            '{"index": 1, "sample": 0, "fingerprint": "print 2"}\n',
            "line 1: expected an answer to prompt 2 of this run, got one of another prompt",
        ),
        (
            '{"index": 1, "sample": 0, "fingerprint": "print 1"}\n' * 2,
            "line 2: expected each answer once, got number 0 of prompt 2 again",
        ),
        (
            '{"index": 1, "sample": 1, "fingerprint": "print 1"}\n',
            "line 1: expected each answer once, got number 1 of prompt 2 again, or one that",
        ),
        (
            '{"index": 1, "sample": [], "fingerprint": "print 1"}\n',
            "line 1: expected each answer once, got number [] of prompt 2",
        ),
    ],
)
def test_a_file_that_is_not_of_this_run_is_refused_and_left_as_it_is(
    content: str, part: str, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "out"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        opened(path, resume=True)
    assert part in str(error.value) and path.read_text() == content


def test_what_is_checked_is_what_is_cut(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the name means another file meanwhile, as in a directory of somebody else."""
    path, foreign = tmp_path / "out", tmp_path / "foreign"
    foreign.write_text("not an answer\n")
    path.symlink_to(foreign)

    def swap(descriptor: int) -> bool:
        path.unlink()
        path.write_text("")
        return lock(descriptor)

    lock = atomic.lock
    monkeypatch.setattr(atomic, "lock", swap)
    with pytest.raises(ValueError, match="expected an answer as --output writes it"):
        opened(path, resume=True)
    assert foreign.read_text() == "not an answer\n"


def test_a_line_without_an_end_is_not_resumed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "MOST_BYTES", 100)
    path = tmp_path / "out"
    path.write_text(OURS + '{"index": 0, "sample": 0, ' + "1" * 200)
    with pytest.raises(ValueError, match="line 2: expected an answer as --output writes it"):
        opened(path, resume=True)


def test_a_full_disk_is_one_sentence_and_what_it_holds_can_be_resumed(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    file = opened(path)
    file.show(event(0, "eos"))
    whole, write = path.read_bytes(), os.write
    room = 20

    def write_a_part(descriptor: int, data: bytes) -> int:
        taken = write(descriptor, data[: len(whole) + room - path.stat().st_size])
        if not taken:
            raise OSError(28, "No space left on device")
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write_a_part)
        with pytest.raises(ValueError) as error:
            file.show(event(1, "eos"))
    assert str(error.value) == (
        f"{path}: 1 of 3 answers are written, and no more can be (No space left on device); fix "
        "that, and start again, with --resume if it is a file"
    )
    assert file.done == {(0, 0)} and len(path.read_bytes()) == len(whole) + room
    file.close()
    assert opened(path, resume=True).done == {(0, 0)} and path.read_bytes() == whole


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_output_holds_what_is_not_json(
    value: float, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = Completion("A", [4], [5], [value], "a", "eos")
    wrong = Event(0, 5, "a", answer, 0, "eos")
    for printer in (opened(tmp_path / "out"), output.JsonPrinter([(0, 0)], [None])):
        with pytest.raises(ValueError, match="expected finite numbers to write as JSON, got NaN"):
            printer.show(wrong)
        printer.close()
    assert capsys.readouterr().out == (tmp_path / "out").read_text() == ""


def test_two_runs_do_not_write_to_one_file(tmp_path: pathlib.Path) -> None:
    """Nor is anything left of the first one that would keep others away."""
    path = tmp_path / "out"
    program = """
import pathlib, sys
from grok1.cli.output import AnswerFile
file = AnswerFile(pathlib.Path(sys.argv[1]), [(0, 0)], ["print 0"], [None])
print(flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program, path]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None and process.stdout.readline()
        for resume in (False, True):
            with pytest.raises(ValueError, match=f"{path}: expected a file for this run alone"):
                opened(path, resume=resume)
        process.kill()
    file = opened(path)
    file.show(event(0, "eos"))
    file.close()
    assert opened(path, resume=True).done == {(0, 0)}


def test_messages_may_go_to_the_same_file(tmp_path: pathlib.Path) -> None:
    """As with --output /dev/stdout >all.log 2>&1."""
    file = opened(tmp_path / "out")
    with (tmp_path / "out").open("ab") as messages:
        messages.write(b"loaded\n")
    file.show(event(0, "eos"))
    assert (tmp_path / "out").read_text().startswith('loaded\n{"index": 0')
    file.close()


def _replace(path: pathlib.Path) -> None:
    new = path.with_name("new")  # as an editor saves
    new.write_bytes(path.read_bytes())
    new.rename(path)


CHANGES = {
    "replaced": _replace,
    "removed": lambda path: path.unlink(),
    "cut": lambda path: os.truncate(path, 5),
}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("how", CHANGES)
def test_a_replaced_output_is_not_written_on(
    how: str, resume: bool, tmp_path: pathlib.Path
) -> None:
    """What is written to a file that has no name any more is lost."""
    path = tmp_path / "out"
    if resume:
        path.write_text(OURS)
    file = opened(path, resume=resume)
    file.show(event(0, "eos"))
    CHANGES[how](path)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(ValueError, match="out: expected the file as this run left it, got one .*"):
        file.show(event(2, "eos"))
    assert (path.read_bytes() if path.exists() else None) == before and (2, 0) not in file.done
    file.close()
    if how == "replaced":
        again = opened(path, resume=True)
        again.show(event(2, "eos"))
        assert {0, 2} <= {*indices(path)}


def test_without_locks_in_the_file_system_it_is_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    opened(tmp_path / "out").show(event(0, "eos"))
    assert indices(tmp_path / "out") == [0]


def test_a_pipe_and_a_device_are_neither_locked_nor_reopened(tmp_path: pathlib.Path) -> None:
    """The reader of a named pipe gets all answers, and several runs may write to a device."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with subprocess.Popen(["cat", path], stdout=subprocess.PIPE) as reader:
        file, other = opened(path), opened(path)
        for index in (2, 0):
            file.show(event(index, "eos"))
        file.close()
        other.close()
        assert reader.stdout is not None
        assert [json.loads(line)["index"] for line in reader.stdout] == [2, 0]


def test_a_fingerprint_changes_with_all_that_an_answer_depends_on() -> None:
    values: dict[str, Any] = {"request": {"prompt": "A", "top_k": 1}, "id": None, "model": {}}
    prints = {output.fingerprint(**values)}
    for change in (
        {"request": {"prompt": "A", "top_k": 2}},
        {"request": {"prompt": [5], "top_k": 1}},
        {"id": 1},
        {"model": {"config.json": "0"}},
    ):
        prints.add(output.fingerprint(**values | change))
    assert len(prints) == 5
    reordered = {"model": {}, "id": None, "request": {"top_k": 1, "prompt": "A"}}
    assert output.fingerprint(**reordered) in prints


# The command.


@pytest.mark.parametrize("again", ["show", "close"])
def test_a_line_that_is_cut_is_printed_again(
    again: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As by a second Ctrl-C. The answers after it do not stand behind its half."""
    write, printed = output.write_out, []

    def cut(line: str) -> None:
        printed.append(line)
        if len(printed) == 2:
            write(line[:3], end="")
            raise KeyboardInterrupt
        write(line)

    monkeypatch.setattr(output, "write_out", cut)
    keys = [(i, 0) for i in range(3)]
    whole = {"{": output.JsonPrinter(keys, [1, 2, 3]), "[": output.TextPrinter("ABC", keys)}
    for first, printer in whole.items():
        printed.clear()
        with pytest.raises(KeyboardInterrupt):
            for index in (0, 1):
                printer.show(event(index, "eos"))
        if again == "show":
            printer.show(event(2, "eos"))
        printer.close()
        lines = capsys.readouterr().out.splitlines()
        half = lines.pop(1)
        count = 3 if again == "show" else 2
        assert len(half) == 3 and lines[1].startswith(half)
        assert len(lines) == len({*lines}) == count and all(line[0] == first for line in lines)


@pytest.mark.parametrize("order", [[0, 2, 1], [2, 1]])
def test_a_lost_process_cuts_no_line(order: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its loss strikes while an answer is printed, or those that are left are."""
    printed: list[int] = []

    class Server:
        def generate_events(self, *_: Any) -> Iterator[Event]:
            yield from (event(index, "eos") for index in order)
            raise KeyboardInterrupt

    def interrupted(line: str) -> None:
        if len(printed) == len(order) - 2:
            signal.raise_signal(WAKE)
        printed.append(json.loads(line)["id"])

    monkeypatch.setattr(output, "write_out", interrupted)
    options = run.parse_arguments(["--json", *(f"--prompt-ids={i}" for i in range(3))])
    lines = tuple(line._replace(id=i) for i, line in enumerate(options.lines))
    options = dataclasses.replace(options, lines=lines)
    job = run.Job(options, pathlib.Path(), None, None, range(3))
    before = signal.signal(WAKE, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.generate(run.Worker(), Server(), job)
    finally:
        signal.signal(WAKE, before)
    assert printed == sorted(order)


def test_answers_that_are_written_are_forgotten(tmp_path: pathlib.Path) -> None:
    """However many there are, their tokens are in memory only until then."""
    answers: list[weakref.ref[Completion]] = []

    class Server:
        def generate_events(self, requests: list[Any], *_: Any) -> Iterator[Event]:
            for index in range(len(requests)):
                answer = event(index, "eos").completion
                answers.append(weakref.ref(answer))
                yield event(index, "eos")._replace(completion=answer)
                del answer
                gc.collect()
                assert sum(known() is not None for known in answers) <= 2

    arguments = [f"--prompt-ids={i}" for i in range(9)]
    options = run.parse_arguments([*arguments, "--output", str(tmp_path / "out")])
    file = opened(tmp_path / "out", 9)
    job = run.Job(options, pathlib.Path(), None, file, range(9))
    run.generate(run.Worker(), Server(), job)
    assert indices(tmp_path / "out") == list(range(9))


def test_answers_go_to_the_file_and_a_resumed_run_adds_what_is_missing(
    tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path
) -> None:
    """Byte for byte but for the order; nothing of it on standard output."""
    path, file = tmp_path / "out.jsonl", tmp_path / "prompts.jsonl"
    prompts = [{"prompt": f"{i} dogs", "id": f"n{i}", "max_len": 2 + i} for i in range(6)]
    prompts[2]["num_samples"] = 2
    file.write_text("\n".join(map(json.dumps, prompts)))
    arguments = ["--checkpoint", tiny, "--prompt", PROMPT, "--prompts-file", file, "--max-len", 9]
    printed = command(*arguments, *SETTINGS, "--json").answers
    arguments += [*SETTINGS, "--output", path]
    result = command(*arguments)
    assert (result.status, result.out) == (0, "") and re.fullmatch(LOADED + COUNTED, result.err)
    lines = path.read_bytes().splitlines(keepends=True)
    answers = sorted(map(json.loads, lines), key=lambda answer: (answer["index"], answer["sample"]))
    assert list(answers[0])[:3] == ["index", "sample", "prompt"]
    assert list(answers[1])[:3] == ["index", "sample", "id"]
    assert len({answer.pop("fingerprint") for answer in answers}) == 7
    keys = [(answer["index"], answer["sample"]) for answer in answers]
    assert keys == [(0, 0), (1, 0), (2, 0), (3, 0), (3, 1), (4, 0), (5, 0), (6, 0)]
    assert answers == printed and answers[3]["token_ids"] != answers[4]["token_ids"]

    both = [i for i, line in enumerate(lines) if json.loads(line)["index"] == 3]
    for kept in (lines[:3], [line for i, line in enumerate(lines) if i != both[0]]):
        path.write_bytes(b"".join(kept) + lines[both[0]][:-1])
        result = command(*arguments, "--resume")
        assert (result.status, result.out) == (0, "")
        assert sorted(path.read_bytes().splitlines(keepends=True)) == sorted(lines)
    result = command(*arguments, "--resume")
    assert (result.status, result.out) == (0, "")
    assert result.err == f"{path} holds all 8 answers already\n"

    content = path.read_bytes()
    assert_one_sentence(
        command(*arguments), 1, f"{path}: expected no such file, or an empty one, got one of "
        f"{len(content)} bytes; add --resume to continue it, or name another file",
    )  # fmt: skip
    for other in (("--seed", 7), ("--dtype", "bfloat16"), ("--context", 60)):
        other_settings = command(*arguments, "--resume", *other)
        assert_one_sentence(other_settings, 1, "other settings or another model; give those that")
    file.write_text("\n".join(map(json.dumps, prompts[1:])))
    assert_one_sentence(command(*arguments, "--resume"), 1, "got one of another prompt")
    assert path.read_bytes() == content


def test_it_is_told_how_many_answers_are_there(
    tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "Progress", functools.partial(run.Progress, seconds=0))
    arguments = ["--checkpoint", tiny, "--prompt", "A", "--prompt", "B", *SETTINGS]
    result = command(*arguments, "--max-len", 2, "--output", tmp_path / "out")
    told = re.findall(r"answering: (\d) of 2 answers, [\d.]+ per second", result.err)
    assert told == ["0", "1", "2"]


def test_another_model_is_not_resumed_with(
    tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "out"
    arguments = ["--prompt", "A", "--max-len", 1, *SETTINGS, "--output", path, "--checkpoint"]
    assert command(*arguments, tiny).status == 0
    other = changed(tiny, tmp_path / "other", eos_token=3)
    assert_one_sentence(command(*arguments, other, "--resume"), 1, "or another model")


def test_another_tokenizer_is_not_resumed_with(
    tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path
) -> None:
    """Prompts that are ids take none, and their answers have text nonetheless."""
    model = changed(tiny, tmp_path / "model")
    path, file = tmp_path / "out", model / "tokenizer.model"
    arguments = ["--checkpoint", model, "--prompt-ids", "5 6", "-n", 1, "--output", path]
    assert command(*arguments, *SETTINGS).status == 0
    tokenizer = bytearray((ROOT / "tokenizer.model").read_bytes())
    place = tokenizer.index(b"down")
    tokenizer[place : place + 4] = b"DOWN"
    file.write_bytes(tokenizer)
    result = command(*arguments, *SETTINGS, "--resume")
    assert_one_sentence(result, 1, "or another model")


def test_an_output_that_cannot_be_written_is_one_sentence(
    tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path
) -> None:
    arguments = ["--checkpoint", tiny, "--prompt", "A", "--max-len", 1, *SETTINGS, "--output"]
    missing = tmp_path / "no" / "such"
    result = command(*arguments, missing)
    assert_one_sentence(result, 1, f"{missing}: the answers cannot be written there (No such file")
    if pathlib.Path("/dev/full").exists():
        full = "/dev/full: 0 of 1 answers are written, and no more can be (No space left on device)"
        assert_one_sentence(command(*arguments, "/dev/full"), 1, full)


def test_resuming_needs_a_file(command: Command) -> None:
    assert_one_sentence(command("--resume"), 2, "--resume needs --output, the file to continue")


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(0, marks=pytest.mark.slow),
        *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2)),
    ],
)
def test_a_run_that_is_killed_and_resumed_leaves_what_an_undisturbed_one_does(
    seed: int, tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path
) -> None:
    """At any moment: the loss of a process leaves whole lines, but for the last one."""
    file, path = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("".join(f"{i} dogs and a cat\n" for i in range(100)))
    arguments = ["--checkpoint", tiny, "--prompts-file", file, "--max-len", 40, "--seed", seed]
    assert command(*arguments, "--output", tmp_path / "undisturbed").status == 0
    expected = sorted((tmp_path / "undisturbed").read_bytes().splitlines())
    process = start(*arguments, "--output", path)
    random_numbers = random.Random(seed)
    wanted = random_numbers.randrange(1, 60)
    while not path.exists() or path.read_bytes().count(b"\n") < wanted:
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(random_numbers.uniform(0, 0.1))
    process.kill()
    assert finish(process).status == -signal.SIGKILL
    there = path.read_bytes().count(b"\n")
    assert wanted <= there < 100
    path.write_bytes(path.read_bytes() + expected[0][: random_numbers.randrange(200)])
    result = finish(start(*arguments, "--output", path, "--resume"))
    assert (result.status, result.out) == (0, "")
    assert sorted(path.read_bytes().splitlines()) == expected and len(expected) == 100


def test_only_a_file_is_resumed(tmp_path: pathlib.Path) -> None:
    """A pipe that is open to be read as well would swallow the answers."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", pathlib.Path("/dev/null")):
        with pytest.raises(ValueError, match="expected a file to resume, got a pipe or a device"):
            AnswerFile(path, [(0, 0)], ["x"], [None], resume=True)


@pytest.mark.exhaustive
def test_several_processes_skip_the_same_answers_and_only_the_first_writes(
    start_many: processes.Start, address: str, tmp_path: pathlib.Path
) -> None:
    """The file of prompts is process 0's: the others have none."""
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "out"
    lines = [{"prompt": [5, 6, i], "id": i, "logit_bias": {"7": i}} for i in range(5)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    model = processes.MODEL
    options = ["--checkpoint", model, "--max-len", 3, "--prompts-file", prompts, "--mesh", "1,8"]
    options += ["--output", path, "--resume"]
    for rest in (b"", b'{"index": 4'):
        pair = processes.start_pair(start_many, address, *options)
        first, second = (processes.finish(process) for process in pair)
        assert (first.status, first.out, second) == (0, "", (0, "", "")), first.err
        assert sorted(indices(path)) == list(range(5))
        whole = path.read_bytes()
        path.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]) + rest)
    pair = processes.start_pair(start_many, address, *options)
    first, second = (processes.finish(process) for process in pair)
    assert (first.status, second) == (0, (0, "", "")), first.err
    assert sorted(path.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert (
        f"{path} holds all"
        in processes.finish(start_many(run.__file__, *processes.place(address, 0, 1), *options)).err
    )


def test_closed_streams_leave_the_answers_alone(tiny: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """No message gets into the file, and none of its lines elsewhere."""
    path = tmp_path / "out"
    arguments = ["--checkpoint", tiny, "--prompt-ids", 5, "--max-len", 2, "--output", path]
    shell = 'exec "$0" "$@" <&- >&- 2>&-'
    command = ["sh", "-c", shell, sys.executable, run.__file__, *map(str, arguments)]
    assert subprocess.run(command, cwd="/").returncode == 0
    assert indices(path) == [0]
