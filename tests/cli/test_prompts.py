"""Prompts from a file: each with its own settings, and errors with file and line."""

import dataclasses
import io
import json
import sys

import pytest

import checkpoint
import run
from commands import PROMPT, assert_one_sentence, halting_input
from grok1.cli import prompts
from grok1.serving.request import Request


def give_input(monkeypatch, content):
    """Put this on standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))


def test_each_line_of_text_is_a_prompt(tmp_path):
    """Except for blank ones."""
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfA dog \r\n\n  \t\n caf\xc3\xa9\n{}")
    lines = prompts.read_lines(str(file))
    assert [line.prompt for line in lines] == ["A dog ", " caf\u00e9", "{}"]
    assert [line.place for line in lines] == [f"{file}, line {n}" for n in (1, 4, 5)]


def test_json_lines_have_prompts_ids_and_settings(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "A dog", "id": 5, "top_k": 3}\n\n{"prompt": [5, 6]}\n')
    assert prompts.read_lines(str(file)) == [
        ("A dog", 5, {"top_k": 3}, f"{file}, line 1"),
        ([5, 6], None, {}, f"{file}, line 3"),
    ]
    (line, _) = prompts.read_lines(str(file), "text")
    assert line.prompt.startswith('{"prompt"')


def test_stdin_is_text_by_default_and_stays_open(monkeypatch):
    """If it were closed, another file would get its number."""
    give_input(monkeypatch, '{"prompt": "A"}\n')
    (line,) = prompts.read_lines("-")
    assert line == ('{"prompt": "A"}', None, {}, "standard input, line 1")
    assert not sys.stdin.closed
    give_input(monkeypatch, '{"prompt": "A"}\n')
    (line,) = prompts.read_lines("-", "jsonl")
    assert line.prompt == "A"


def test_json_list_is_not_read_as_text(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text('["A dog"]')
    with pytest.raises(ValueError, match="expected text, or JSON lines .* --prompts-format jsonl"):
        prompts.read_lines(str(file))
    assert [line.prompt for line in prompts.read_lines(str(file), "text")] == ['["A dog"]']


def test_pause_of_standard_input_is_not_its_end(monkeypatch):
    with halting_input(monkeypatch, b"one\ntw", b"o\nthree"):
        assert [line.prompt for line in prompts.read_lines("-")] == ["one", "two", "three"]


# fmt: off
# id -> (the second line of a file of JSON lines, a part of the error)
LINE_CASES = {
    "no-json": ("{", "line 2: expected a JSON object, got { (Expecting property name"),
    "deep": ("[" * 10**5, "line 2: expected a JSON object, got [[["),
    "no-object": ("[1]", "line 2: expected a JSON object, got [1]"),
    "no-prompt": ('{"promt": "A"}', 'line 2: expected the key "prompt", got {"promt": "A"}'),
    "prompt": ('{"prompt": 5}', "line 2: prompt: expected a string or a list of token ids, got 5"),
    "prompt-ids": ('{"prompt": [5, true]}', "a list of token ids, got [5, true]"),
    "id": ('{"prompt": "A", "id": [1]}', "line 2: id: expected a string or an integer, got [1]"),
    "nan": ('{"prompt": "A", "temperature": NaN}', "(NaN is not a JSON number)"),
    "utf-8": ("caf\udce9", "line 2: expected text in UTF-8, got the byte 0xe9; convert the file"),
    "endless": ("a" * 10**6, "line 2: expected at most 500000 bytes in a line, got more"),
}
# id -> (a setting, a part of the error), which need the fields of a Request
SETTING_CASES = {
    "key": ('"temprature": 1', 'a request (temperature, nucleus_p or top_p, rng_seed or seed, '),
    "text": ('"temperature": "0.5"', 'temperature: expected a number, got "0.5"'),
    "true": ('"top_k": true', "top_k: expected an integer, got true"),
    "no-samples": ('"num_samples": 0', "num_samples must be an integer from 1 to 1024, got 0"),
    "half": ('"max_len": 1.5', "max_len or max_tokens: expected an integer or null, got 1.5"),
    "null": ('"min_p": null', "min_p: expected a number, got null"),
    "one": ('"ignore_eos": 1', "ignore_eos: expected true or false, got 1"),
    "list": ('"stop": ["a", 1]', 'stop: expected a string or a list (each a string), got ["a", 1]'),
    "choice": ('"truncate": "right"', 'truncate: expected "left" or null, got "right"'),
    "bias-key": ('"logit_bias": {"x": 1}', "logit_bias: expected an object (each key an "
                 'integer in quotes, each value a number) or null, got {"x": 1}'),
    "bias-value": ('"logit_bias": {"5": "1"}', 'got {"5": "1"}'),
    "bias-id": ('"logit_bias": {"4096": 1}',
                "logit_bias: expected token ids from 0 to 4095, got 4096"),
    "bias-twice": ('"logit_bias": {"5": 1, "05": 1}',
                   'logit_bias: expected each token id once, got {"5": 1, "05": 1}'),
    "long": ('"max_len": 64', "max_len = 64 leaves no room for a prompt in the context of 64"),
}
# fmt: on


@pytest.mark.parametrize(("text", "part"), LINE_CASES.values(), ids=LINE_CASES.keys())
def test_invalid_line_is_named(text, part, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "MOST_BYTES", 500_000)
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(b'{"prompt": "A"}\n' + text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError) as error:
        prompts.read_lines(str(file))
    sentence = str(error.value)
    assert sentence.startswith(f"{file}, line 2: ") and part in sentence and "\n" not in sentence
    assert len(sentence) < 400


@pytest.mark.parametrize(("setting", "part"), SETTING_CASES.values(), ids=SETTING_CASES.keys())
def test_invalid_setting_is_named_before_loading(
    setting, part, tiny, command, tmp_path, monkeypatch
):
    monkeypatch.setattr(checkpoint, "load", None)
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'\n{{"prompt": "A"}}\n{{"prompt": "B", {setting}}}\n')
    result = command("--checkpoint", tiny, "--prompts-file", file, "--prompt", "C")
    assert_one_sentence(result, 1, f"error: {file}, line 3: ", part)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot read the prompts (No such file or directory); name another file"),
        ("", "expected a prompt on each line, found only empty ones"),
        (" \n\n", "expected a prompt on each line, found only empty ones"),
    ],
)
def test_file_without_prompts_is_refused(content, part, tmp_path):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError) as error:
        prompts.read_lines(str(file))
    assert str(error.value).startswith(f"{file}: {part}")


@pytest.mark.parametrize("number", [0, 2000, True, "2", None])
def test_invalid_number_of_answers_counts_as_one(number):
    """So that its error is reported when the requests are checked."""
    options = run.parse_arguments(["--prompt-ids", "5"])
    lines = tuple(line._replace(settings={"num_samples": number}) for line in options.lines)
    assert prompts.answer_keys(dataclasses.replace(options, lines=lines)) == [(0, 0)]


def test_every_field_of_a_request_is_a_setting(monkeypatch):
    """Also those that are added later."""

    @dataclasses.dataclass(frozen=True)
    class Later(Request):
        novelty: float | None = None

    own = {
        "logit_bias": {"5": 1, "07": -2.5},
        "stop": ["a"],
        "stop_tokens": [3],
        "truncate": "left",
        "novelty": 5,
    }
    monkeypatch.setattr("grok1.serving.request.Request", Later)
    options = run.parse_arguments(["--prompt-ids", "5", "--top-k", "9", "--stop", "b"])
    lines = tuple(line._replace(settings=own) for line in options.lines)
    options = dataclasses.replace(options, lines=lines)
    (request,) = prompts.make_requests(options, [0])
    expected = own | {"logit_bias": {5: 1, 7: -2.5}, "prompt": [5], "top_k": 9, "temperature": 0.7}
    assert request == Later(**expected)


def test_lines_of_a_file_have_their_own_settings(tiny, command, monkeypatch):
    arguments = ["--checkpoint", tiny, "--json", "--max-len", 4, "--batch", 1]
    arguments += ["--temperature", 0]
    (first,) = command(*arguments, "--prompt", PROMPT).answers
    banned = first["token_ids"][0]
    lines = [
        {"prompt": PROMPT, "id": "same"},
        {"prompt": first["prompt_ids"], "max_len": 2, "top_logprobs": 1, "id": 9},
        {"prompt": PROMPT, "logit_bias": {str(banned): -1e9}},
    ]
    give_input(monkeypatch, "\n".join(map(json.dumps, lines)))
    file = ("--prompts-file", "-", "--prompts-format", "jsonl")
    answers = command(*arguments, *file, "--prompt", PROMPT).answers
    assert answers[0] == first and answers[1] == {"id": "same"} | first | {"index": 1}
    assert answers[2]["id"] == 9 and answers[2]["token_ids"] == first["token_ids"][:2]
    ((token, logprob),) = answers[2]["top_logprobs"][0]
    assert (token, logprob) == (banned, pytest.approx(first["logprobs"][0]))
    assert banned != answers[3]["token_ids"][0] and "id" not in answers[3]
