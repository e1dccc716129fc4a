"""The answers of run.py: text or JSON on standard output, messages on standard error."""

import io
import json
import os
import pathlib
import re
import shutil
import sys
from typing import Any

import pytest

import checkpoint
import run
from commands import (
    CONFIG,
    COUNTED,
    LOADED,
    PROMPT,
    Command,
    assert_one_sentence,
    finish,
    random_params,
    start,
)
from grok1 import default_files
from grok1.cli import job
from runner import Completion, Event

# In all tests the same: the model is compiled for each number of slots.
SLOTS = ("--batch", 4)


def test_text_goes_to_stdout_and_messages_to_stderr(tiny: pathlib.Path, command: Command) -> None:
    """The same seed gives the same text in another process, and in JSON."""
    arguments = ["--checkpoint", tiny, "--prompt", PROMPT, "--max-len", 12, *SLOTS, "--seed", 1]
    result = finish(start(*arguments))
    assert result.status == 0
    assert re.fullmatch(LOADED + COUNTED, result.err), result.err
    assert "float32 activations, mesh 1,1" in result.err and "12 tokens" in result.err
    (answer,) = command(*arguments, "--json").answers
    assert result.out == PROMPT + answer["text"] + "\n"
    (other,) = command(*arguments[:-1], 2, "--json").answers
    assert len(other["token_ids"]) == 12
    assert other["token_ids"] != answer["token_ids"]


MIXED = ("--prompt", PROMPT, "--prompt-ids", "5 6,7", "--prompt", "A dog ", "--temperature", 0)


def test_json_answers_are_the_same_on_a_mesh(tiny: pathlib.Path, command: Command) -> None:
    """The environment asks for no virtual devices: run.py makes them."""
    arguments = ["--checkpoint", tiny, *MIXED, "--max-len", 8, "--json"]
    result = finish(start(*arguments, "--mesh", "1,8"))
    assert result.status == 0
    assert re.fullmatch(LOADED + COUNTED, result.err), result.err
    assert "mesh 1,8 on" in result.err and "24 tokens" in result.err
    assert [answer["prompt"] for answer in result.answers] == [PROMPT, None, "A dog "]
    assert result.answers[1]["prompt_ids"] == [5, 6, 7]
    for answer, alone in zip(result.answers, command(*arguments).answers, strict=True):
        assert list(answer) == [
            "index", "sample",
            "prompt", "prompt_ids", "token_ids", "text", "finish_reason", "logprobs",
        ]  # fmt: skip
        assert answer["token_ids"] == alone["token_ids"]
        assert answer["text"] == alone["text"]
        assert answer["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-4)
        assert len(answer["token_ids"]) == len(answer["logprobs"]) == 8
        assert answer["finish_reason"] == "length"


def test_several_text_answers_are_printed_with_prompts(
    tiny: pathlib.Path, command: Command
) -> None:
    arguments = ["--checkpoint", tiny, *MIXED, "--max-len", 8]
    first, second, third = command(*arguments, "--json").answers
    assert command(*arguments).out == (
        f"[1] {PROMPT}{first['text']}\n[2] 5 6 7 | {second['text']}\n[3] A dog {third['text']}\n"
    )


def test_samples_are_numbered_and_their_seeds_count_up(
    tiny: pathlib.Path, command: Command
) -> None:
    arguments = ["--checkpoint", tiny, "--prompt", PROMPT, "--max-len", 4, "--num-samples", 3]
    result = command(*arguments, "--stats")
    answers = command(*arguments, "--json").answers
    assert sorted(result.out.splitlines()) == [
        f"[1.{i}] {PROMPT}{answer['text']}" for i, answer in enumerate(answers, 1)
    ]
    (second,) = command(*arguments[:-2], "--seed", 43, "--json", *SLOTS).answers
    assert answers[1] == second | {"sample": 1}
    assert re.search(r"\nslots used +3.0 of 4 on average\n", result.err), result.err
    assert re.search(r"\nhost's work +[\d.]+ ms a token, \d+% of the time\n", result.err)
    # The only token is drawn with the prompt: no time per token of a decode step is known.
    assert "host's work" not in command(*arguments, "--max-len", 1, "--stats").err


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint with finite weights whose logits overflow."""
    params = random_params()
    params["language_model/rms_norm"]["scale"][:] = 3e38
    directory = tmp_path_factory.mktemp("overflowing")
    checkpoint.save(directory, params, CONFIG.to_dict())
    return directory


@pytest.mark.parametrize(
    ("options", "out"),
    [
        (["--prompt", "A dog"], "A dog\n"),
        (["--prompt-ids", "5 6"], "\n"),
        (["--prompt", "A dog", "--num-samples", 2], "[1.1] A dog\n[1.2] A dog\n"),
        (["--prompt", "A dog", "--json"], None),
        (["--prompt", "A dog", "--output"], ""),
    ],
    ids=["text", "ids", "samples", "json", "output"],
)
def test_logits_that_are_not_finite_are_an_error(
    options: list[object],
    out: str | None,
    overflowing: pathlib.Path,
    tmp_path: pathlib.Path,
    command: Command,
) -> None:
    file = tmp_path / "answers.jsonl"
    if options[-1] == "--output":
        options = [*options, file]
    result = command("--checkpoint", overflowing, *options, *SLOTS, "--max-len", 3)
    assert result.status == 1
    *_, last = result.err.splitlines()
    assert last.startswith("error: request 1: expected finite logits, got NaN or infinity")
    assert last.endswith(" (2 answers ended with an error)") == ("--num-samples" in options)
    if out is None:
        (answer,) = result.answers
        assert answer["finish_reason"] == "error" and answer["error"] in last
        assert answer["text"] == "" and answer["token_ids"] == []
    else:
        assert result.out == out
    assert not file.exists() or file.read_text() == ""  # can be resumed with other weights


def test_a_session_continues_after_infinite_logits(
    overflowing: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A\nB\n"), "utf-8"))
    result = command("--checkpoint", overflowing, *SLOTS, "--interactive")
    assert (result.status, result.out) == (0, "\n\n")
    assert result.err.count("\nerror: expected finite logits") == 2


@pytest.mark.parametrize(("prompt", "out"), [([5, 6], ""), ("A dog", "A dog\n")])
def test_no_empty_line_is_printed_without_a_token(
    prompt: Any, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an interrupt before the first token."""
    run.TextPrinter([prompt], [(0, 0)]).close()
    assert capsys.readouterr().out == out


def test_json_answers_keep_the_order_of_the_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    printer = run.JsonPrinter([(i, 0) for i in range(4)], [None] * 4)

    def show(index: int, finish_reason: str | None) -> list[Any]:
        answer = Completion(None, [index], [5], [-1.0], None, finish_reason)
        printer.show(Event(index, 5, "", answer, 0, answer.finish_reason))
        return [json.loads(line)["prompt_ids"] for line in capsys.readouterr().out.splitlines()]

    assert show(0, None) == show(3, None) == []
    assert show(1, "eos") == show(3, "length") == []
    assert show(0, "context") == [[0], [1]]
    assert show(2, None) == []
    printer.close()  # as after Ctrl-C: finished answers are printed
    assert json.loads(capsys.readouterr().out)["prompt_ids"] == [3]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_file_that_is_not_small_and_regular_is_refused(
    name: str, tiny: pathlib.Path, tmp_path: pathlib.Path, command: Command
) -> None:
    """For --output, which reads these files for its fingerprints, at most a bounded part of one."""
    shutil.copytree(tiny, tmp_path / "model")
    file = tmp_path / "model" / name
    arguments = ["--checkpoint", file.parent, "--prompt", PROMPT, "--output"]
    with open(file, "ab") as opened:
        opened.truncate(2**40)
    result = command(*arguments, tmp_path / "one")
    assert_one_sentence(result, 1, str(file), "expected", "got more")
    file.unlink()
    os.mkfifo(file)
    result = command(*arguments, tmp_path / "other")
    assert_one_sentence(result, 1, str(file), "expected", "it is not a regular file")


def test_token_ids_need_no_tokenizer(
    tiny: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(default_files, "TOKENIZER", tmp_path / "tokenizer.model")
    arguments = ["--checkpoint", tiny, "--prompt-ids", "5 6 7", "--max-len", 4, *SLOTS]
    (answer,) = command(*arguments, "--json").answers
    assert answer["prompt"] is answer["text"] is None
    assert command(*arguments).out.split() == [str(token) for token in answer["token_ids"]]


def test_the_demo_is_used_if_no_weights_are_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    options = run.parse_arguments(["A"])
    monkeypatch.setattr(default_files, "RELEASED", tmp_path)
    directory, _ = job.choose_files(options)
    assert directory == default_files.DEMO
    message = "checkpoints/ckpt-0 is not there: using the small bundled demo model\n"
    assert capsys.readouterr().err == message
    monkeypatch.setattr(default_files, "RELEASED", default_files.DEMO)
    monkeypatch.setattr(default_files, "DEMO", tmp_path)
    directory, _ = job.choose_files(options)
    assert directory == default_files.RELEASED
    assert capsys.readouterr().err == ""
