"""Lines that begin with a slash, in a session of --interactive."""

import functools
import io
import json
import sys

import pytest

from grok1.cli import prompts
from grok1.cli.interactive import Settings
from grok1.cli.parsing import parse_arguments
from grok1.serving.request import Request


def check(request):
    """Refuse a high temperature."""
    if not 0 <= request.temperature <= 2:
        raise ValueError("temperature must be from 0 to 2")


def settings(seed=None):
    """Settings of a session without a model."""
    return Settings(lambda prompt, changes: Request(prompt, **changes), check, seed)


def test_set_changes_later_answers():
    own = settings()
    for line in ("temperature 0.9", "--max-tokens 7", "top_p 0.5", "stop=The end"):
        own.run_command(f"/set {line}")
    request = own.request("A")
    assert (request.temperature, request.max_len, request.nucleus_p) == (0.9, 7, 0.5)
    assert request.stop == "The end"


def test_value_that_is_not_json_is_a_string():
    own = settings()
    for text in ("[" * 9999, "NaN", "a b", "1" * 9999):
        own.run_command(f"/set stop {text}")
        assert own.request("A").stop == text


def test_none_restores_the_initial_value(capsys):
    own = settings(seed=3)
    for line in ("/set stop The end", "/set ignore_eos True", "/set seed 4"):
        own.run_command(line)
    assert own.request("A").ignore_eos is True
    capsys.readouterr()
    own.run_command("/set")
    assert json.loads(capsys.readouterr().err) == {"stop": "The end", "ignore_eos": True, "seed": 4}
    for line in ("/set stop none", "/set ignore_eos null", "/set seed None", "/set top_k none"):
        own.run_command(line)
    assert own.request("A") == settings(seed=3).request("A")


def test_each_answer_has_a_new_seed():
    own = settings()
    assert len({own.request("A").rng_seed for _ in range(9)}) == 9
    own.run_command("/seed 7")
    assert [own.request("A").rng_seed for _ in range(2)] == [7, 7]
    own.run_command("/seed new")
    assert own.request("A").rng_seed != own.request("A").rng_seed
    own.run_command("/set seed 8")
    assert own.request("A").rng_seed == 8
    assert settings(seed=3).request("A").rng_seed == 3


def test_keys_of_a_bias_are_token_ids():
    """In JSON they are strings. It replaces that of the command line."""
    options = parse_arguments(["-i", "--logit-bias", "7:100"])
    own = Settings(functools.partial(prompts.request_for, options), check)
    assert own.request("A").logit_bias == {7: 100}
    own.run_command('/set logit_bias {"9": 100}')
    assert own.request("A").logit_bias == {9: 100}
    own.run_command('/set logit_bias {"a": 1}')  # the runner's check refuses it
    assert own.request("A").logit_bias == {"a": 1}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/temperature 1", "/temperature: expected one of /help, /set, /seed, /exit"),
        ("/halp", "/halp: expected one of /help, /set, /seed, /exit; the nearest is /help"),
        ("/set temperature", "/set: expected the form shown by /help, got '/set temperature'"),
        ("/set temprature 1", "there is no setting 'temprature'; the nearest is temperature"),
        ("/set temperature 3", "temperature must be from 0 to 2"),
        ("/set prompt x", "prompt: expected a setting of a session"),
        ("/set num-samples 3", "num-samples: expected a setting of a session"),
        ("/set top_logprobs 3", "top_logprobs: expected a setting of a session"),
        ("/set temprature none", "there is no setting 'temprature'"),
    ],
)
def test_invalid_line_changes_nothing(line, said):
    own = settings()
    own.run_command("/set temperature 0.5")
    with pytest.raises(ValueError, match=said):
        own.run_command(line)
    assert own.request("A").temperature == 0.5


def test_session_takes_commands_and_ends_with_exit(tiny, command, monkeypatch):
    lines = "/set temperature 0\n/set max_tokens 3\nThe cat\n/set top_k x\n /help\n"
    lines += "exit\nThe dog\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    session = command("--checkpoint", tiny, "--interactive")
    alone = command("--checkpoint", tiny, "-p", "The cat", "--temperature", 0, "-n", 3)
    assert session.status == 0
    assert session.out == alone.out.removeprefix("The cat")
    assert "error: --top-k must be a single number, got 'x'" in session.err
    assert "/seed N          one seed for all answers" in session.err
