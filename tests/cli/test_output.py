"""Answers in a file: each once, whatever interrupts the run, and none of another run."""

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
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest

import golden
import processes
import run
from commands import COUNTED, LOADED, PROMPT, assert_one_sentence, changed, finish, start
from grok1.cli import job, output
from grok1.cli.output import AnswerFile
from grok1.formats import atomic
from grok1.parallel.multihost import WAKE
from paths import ROOT
from runner import Completion, Event

start_many = processes.start


def event(index, reason):
    """A token of an answer."""
    return Event(index, 5, "a", Completion("A", [4], [5], [-1.0], "a", reason), 0, reason)


def opened(path, count=3, resume=False):
    """An output file for so many requests."""
    keys = [(i, 0) for i in range(count)]
    return AnswerFile(path, keys, [f"print {i}" for i in range(count)], [None] * count, resume)


def indices(path):
    """Which prompts the lines of a file answer."""
    return [json.loads(line)["index"] for line in path.read_text().splitlines()]


def line_of(index, sample, fingerprint):
    """A line of an output file, without the answer."""
    return json.dumps({"index": index, "sample": sample, "fingerprint": fingerprint}) + "\n"


OURS = line_of(1, 0, "print 1")

# The file.


def test_finished_answers_are_written_at_once(tmp_path):
    file, seen = opened(tmp_path / "out"), []
    file.progress = lambda done, total: seen.append((done, total))
    for index, reason in ((0, None), (2, "eos"), (1, None), (1, "error"), (0, "length")):
        file.show(event(index, reason))
        assert ((2, 0) in file.done) == (2 in indices(tmp_path / "out"))
    file.close()
    assert indices(tmp_path / "out") == [2, 0] and seen == [(1, 3), (2, 3)]


@pytest.mark.parametrize("tail", [b"", b"\0" * 5000])
def test_incomplete_line_is_dropped_wherever_it_is_cut(tail, tmp_path):
    """Also with zeros after it, which a crash of the machine leaves for blocks not written.

    Without a line before it, it must be long enough to be recognised.
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


# fmt: off
@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("A dog", "line 1: expected an answer as --output writes it, got 'A dog'; name another"),
        ('{"index": ', "line 1: expected an answer"),
        ('{"index": 3, "sample": 0, "prompt"', "line 1: expected an answer"),
        ("\0\0", "line 1: expected an answer"),
        (OURS + "{}", "line 2: expected an answer as --output writes it, got '{}'"),
        (OURS + '{"index": {', "line 2: expected an answer"),
        (OURS + "\0{", "line 2: expected an answer"),
        (OURS + "\0\n", "line 2: expected an answer"),
        ("{}\n", "line 1: expected an answer as --output writes it, got '{}'"),
        ("[]\n", "line 1: expected an answer"),
        (OURS + '{"index": 0, "sample": 0, ' + "1" * 200, "line 2: expected an answer"),
        (line_of(3, 0, "print 3"), "the index of one of 3 prompts, got 3; give"),
        (line_of("0", 0, ""), "the index of one of 3 prompts, got '0'; give"),
        (line_of(1, 0, "print 2"),
         "line 1: expected an answer to prompt 2 of this run, got one of another prompt"),
        (OURS * 2, "line 2: expected each answer once, got number 0 of prompt 2 again"),
        (line_of(1, 1, "print 1"), "line 1: expected each answer once, got number 1 of prompt 2"),
        (line_of(1, [], "print 1"), "line 1: expected each answer once, got number [] of prompt 2"),
    ],
)
# fmt: on
def test_file_of_another_run_is_refused_and_unchanged(content, part, tmp_path, monkeypatch):
    monkeypatch.setattr(output, "MOST_BYTES", 100)
    path = tmp_path / "out"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        opened(path, resume=True)
    assert part in str(error.value) and path.read_text() == content


def test_file_that_is_checked_is_the_one_that_is_cut(tmp_path, monkeypatch):
    """Even if another file gets its name meanwhile."""
    path, foreign = tmp_path / "out", tmp_path / "foreign"
    foreign.write_text("not an answer\n")
    path.symlink_to(foreign)

    def swap(descriptor):
        path.unlink()
        path.write_text("")
        return lock(descriptor)

    lock = atomic.lock
    monkeypatch.setattr(atomic, "lock", swap)
    with pytest.raises(ValueError, match="expected an answer as --output writes it"):
        opened(path, resume=True)
    assert foreign.read_text() == "not an answer\n"


def test_full_disk_is_an_error_and_file_can_be_resumed(tmp_path, monkeypatch):
    path = tmp_path / "out"
    file = opened(path)
    file.show(event(0, "eos"))
    whole, write = path.read_bytes(), os.write
    room = 20

    def write_a_part(descriptor, data):
        taken = write(descriptor, data[: len(whole) + room - path.stat().st_size])
        if not taken:
            raise OSError(errno.ENOSPC, "No space left on device")
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


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_output_has_no_numbers_that_json_lacks(value, tmp_path, capsys):
    answer = Completion("A", [4], [5], [value], "a", "eos")
    wrong = Event(0, 5, "a", answer, 0, "eos")
    for printer in (opened(tmp_path / "out"), output.JsonPrinter([(0, 0)], [None])):
        with pytest.raises(ValueError, match="expected finite numbers to write as JSON, got NaN"):
            printer.show(wrong)
        printer.close()
    assert capsys.readouterr().out == (tmp_path / "out").read_text() == ""


def test_two_runs_do_not_write_to_one_file(tmp_path):
    path = tmp_path / "out"
    file = opened(path)
    for resume in (False, True):
        with pytest.raises(ValueError, match=f"{path}: expected a file for this run alone"):
            opened(path, resume=resume)
    file.close()
    opened(path).close()


def test_messages_may_go_to_the_same_file(tmp_path):
    """As with --output /dev/stdout >all.log 2>&1."""
    file = opened(tmp_path / "out")
    with (tmp_path / "out").open("ab") as messages:
        messages.write(b"loaded\n")
    file.show(event(0, "eos"))
    assert (tmp_path / "out").read_text().startswith('loaded\n{"index": 0')
    file.close()


def replace(path):
    """Save a file as editors do."""
    new = path.with_name("new")
    new.write_bytes(path.read_bytes())
    new.rename(path)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("change", [replace, os.unlink, lambda path: os.truncate(path, 5)])
def test_replaced_file_is_not_written_to(change, resume, tmp_path):
    """Answers in a file without a name would be lost."""
    path = tmp_path / "out"
    if resume:
        path.write_text(OURS)
    file = opened(path, resume=resume)
    file.show(event(0, "eos"))
    change(path)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(ValueError, match="out: expected the file as this run left it, got one .*"):
        file.show(event(2, "eos"))
    assert (path.read_bytes() if path.exists() else None) == before and (2, 0) not in file.done
    file.close()


def test_file_system_needs_no_locks(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    opened(tmp_path / "out").show(event(0, "eos"))
    assert indices(tmp_path / "out") == [0]


def test_pipe_is_shared_and_not_resumed(tmp_path):
    """Opened to be read as well, it would keep the answers from its reader."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) as reader:
        file, other = opened(path), opened(path)
        for index in (2, 0):
            file.show(event(index, "eos"))
        file.close()
        other.close()
        assert [json.loads(line)["index"] for line in reader] == [2, 0]
    for place in (path, pathlib.Path("/dev/null")):
        with pytest.raises(ValueError, match="expected a file to resume, got a pipe or a device"):
            opened(place, resume=True)


def test_missing_directory_of_the_output_is_named(tmp_path):
    path = tmp_path / "no" / "such"
    with pytest.raises(ValueError, match=f"^{path}: the answers cannot be written there .No such"):
        opened(path)


# Fingerprints.


def test_fingerprint_is_independent_of_key_order():
    values = {"request": {"prompt": "A", "top_k": 1}, "id": None}
    reordered = {"id": None, "request": {"top_k": 1, "prompt": "A"}}
    assert output.fingerprint(**values) == output.fingerprint(**reordered)


def test_fingerprint_covers_all_that_changes_answers(tmp_path):
    def prints(*arguments, model="model", **line):
        where = ["--checkpoint", str(tmp_path / model), "--output", str(tmp_path / "out")]
        options = run.parse_arguments([*where, *(arguments or ["--prompt-ids", "5 6"])])
        lines = tuple(one._replace(**line) for one in options.lines)
        return job.prepare(dataclasses.replace(options, lines=lines)).answers.fingerprints

    shutil.copytree(golden.DIRECTORY / "three-layers", tmp_path / "model")
    changed(tmp_path / "model", tmp_path / "eos", eos_token=3)
    for name in ("copy", "words"):
        shutil.copytree(tmp_path / "model", tmp_path / name)
    (tmp_path / "words" / "tokenizer.model").write_bytes(b"another one")
    asked = ["--prompt-ids", "5 6"]
    changes = [["--seed", "7"], ["--dtype", "bfloat16"], ["--context", "60"], ["--chunk", "4"]]
    changes += [["--no-kernels"], ["--top-k", "2"]]
    found = [prints(), prints("--prompt-ids", "5 7"), prints(id=1), prints(settings={"top_k": 3})]
    found += [prints(*asked, *change) for change in changes]
    found += [prints(model="eos"), prints(model="words")]
    assert len({*map(tuple, found)}) == len(found) == 12
    assert prints(model="copy") == found[0]


# Printing, and the command.


@pytest.mark.parametrize("again", ["show", "close"])
def test_line_that_is_cut_is_printed_again(again, monkeypatch, capsys):
    """By a second Ctrl-C; the next answer begins on a line of its own."""
    write, printed = output.write_out, []

    def cut(line):
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
def test_loss_of_a_process_cuts_no_line(order, monkeypatch):
    """Whether an answer is being printed or, at the end, the remaining ones are."""
    printed = []

    class Server:
        def generate_events(self, *_):
            yield from (event(index, "eos") for index in order)
            raise KeyboardInterrupt

    def interrupted(line):
        if len(printed) == len(order) - 2:
            signal.raise_signal(WAKE)
        printed.append(json.loads(line)["id"])

    monkeypatch.setattr(output, "write_out", interrupted)
    options = run.parse_arguments(["--json", *(f"--prompt-ids={i}" for i in range(3))])
    lines = tuple(line._replace(id=i) for i, line in enumerate(options.lines))
    options = dataclasses.replace(options, lines=lines)
    before = signal.signal(WAKE, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run.generate(run.Worker(), Server(), job.Job(options, None, None, None, range(3)))
    finally:
        signal.signal(WAKE, before)
    assert printed == sorted(order)


def test_written_answers_are_counted_and_leave_memory(tmp_path, monkeypatch, capsys):
    answers = []

    class Server:
        def generate_events(self, requests, *_):
            for index in range(len(requests)):
                answer = event(index, "eos").completion
                answers.append(weakref.ref(answer))
                yield event(index, "eos")._replace(completion=answer)
                del answer
                gc.collect()
                assert sum(known() is not None for known in answers) <= 2

    monkeypatch.setattr(run, "Progress", functools.partial(run.Progress, seconds=0))
    arguments = [f"--prompt-ids={i}" for i in range(5)]
    options = run.parse_arguments([*arguments, "--output", str(tmp_path / "out")])
    file = opened(tmp_path / "out", 5)
    run.generate(run.Worker(), Server(), job.Job(options, None, None, file, range(5)))
    assert indices(tmp_path / "out") == list(range(5))
    told = re.findall(r"answering: (\d) of 5 answers, [\d.]+ per second", capsys.readouterr().err)
    assert told == [*map(str, range(6))]


def test_resumed_run_adds_the_missing_answers(tiny, command, tmp_path):
    """The file has the bytes of an undisturbed run in any order of lines, and stdout nothing."""
    path, file = tmp_path / "out.jsonl", tmp_path / "prompts.jsonl"
    prompts = [{"prompt": f"{i} dogs", "id": f"n{i}", "max_len": 2 + i} for i in range(6)]
    prompts[2]["num_samples"] = 2
    file.write_text("\n".join(map(json.dumps, prompts)))
    arguments = ["--checkpoint", tiny, "--prompt", PROMPT, "--prompts-file", file, "--max-len", 9]
    arguments += ["--temperature", 1, "--batch", 1]
    printed = command(*arguments, "--json").answers
    arguments += ["--output", path]
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
    assert result == (0, "", f"{path} holds all 8 answers already\n")

    content = path.read_bytes()
    assert_one_sentence(
        command(*arguments), 1, f"{path}: expected no such file, or an empty one, got one of "
        f"{len(content)} bytes; add --resume to continue it, or name another file",
    )  # fmt: skip
    other = command(*arguments, "--resume", "--seed", 7)
    assert_one_sentence(other, 1, "another prompt, other settings or another model; give those")
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(0, marks=pytest.mark.slow),
        *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in (1, 2)),
    ],
)
def test_killed_run_is_resumed_without_loss(seed, tiny, tmp_path):
    """Killed at any moment, a run leaves complete lines, except for the last one."""
    count = 40
    file, path = tmp_path / "prompts.txt", tmp_path / "out"
    file.write_text("".join(f"{i} dogs and a cat\n" for i in range(count)))
    arguments = ["--checkpoint", tiny, "--prompts-file", file, "--max-len", 40, "--seed", seed]
    kept = {"JAX_ENABLE_COMPILATION_CACHE": "true", "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    finish(start(*arguments, "--output", tmp_path / "undisturbed", **kept))
    expected = sorted((tmp_path / "undisturbed").read_bytes().splitlines())
    process = start(*arguments, "--output", path, **kept)
    random_numbers = random.Random(seed)
    wanted = random_numbers.randrange(1, count // 2)
    while not path.exists() or path.read_bytes().count(b"\n") < wanted:
        assert process.poll() is None
        time.sleep(0.002)
    time.sleep(random_numbers.uniform(0, 0.1))
    process.kill()
    assert finish(process).status == -signal.SIGKILL
    assert wanted <= path.read_bytes().count(b"\n") < count
    path.write_bytes(path.read_bytes() + expected[0][: random_numbers.randrange(200)])
    result = finish(start(*arguments, "--output", path, "--resume", **kept))
    assert (result.status, result.out) == (0, "")
    assert sorted(path.read_bytes().splitlines()) == expected and len(expected) == count


@pytest.mark.exhaustive
def test_processes_resume_together_and_first_writes(start_many, address, tmp_path):
    """Only process 0 has the file of prompts."""
    prompts, path = tmp_path / "prompts.jsonl", tmp_path / "out"
    lines = [{"prompt": [5, 6, i], "id": i, "logit_bias": {"7": i}} for i in range(5)]
    prompts.write_text("\n".join(map(json.dumps, lines)))
    options = ["--checkpoint", processes.MODEL, "--max-len", 3, "--prompts-file", prompts]
    options += ["--mesh", "1,8", "--output", path, "--resume"]
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
    alone = start_many(run.__file__, *processes.place(address, 0, 1), *options)
    assert f"{path} holds all" in processes.finish(alone).err


def test_closed_streams_leave_the_output_file_alone(tmp_path):
    """No message gets into it."""
    path = tmp_path / "out"
    arguments = ["--checkpoint", str(golden.DIRECTORY / "three-layers"), "--prompt-ids", "5"]
    arguments += ["--output", str(path)]
    (fingerprint,) = job.prepare(run.parse_arguments(arguments)).answers.fingerprints
    path.write_text(line_of(0, 0, fingerprint))
    shell = ["sh", "-c", 'exec "$0" "$@" <&- >&- 2>&-', sys.executable, ROOT / "run.py"]
    assert subprocess.run([*shell, *arguments, "--resume"], cwd="/").returncode == 0
    assert path.read_text() == line_of(0, 0, fingerprint)
