"""What lines with a slash change in a session of --interactive."""

import io
import json
import pathlib
import re
import sys

import pytest

from commands import Command
from grok1.cli.interactive import Settings
from grok1.serving.request import Request


def settings(seed: int | None = None) -> Settings:
    def check(request: Request) -> None:
        if not 0 <= request.temperature <= 2:
            raise ValueError("temperature must be from 0 to 2")

    return Settings(lambda prompt, changes: Request(prompt, **changes), check, seed)


def test_set_changes_the_answers_that_follow() -> None:
    own = settings()
    for line in (
        "/set temperature 0.9",
        "/set --max-tokens 7",
        "/set top_p 0.5",
        "/set stop=The end",
    ):
        own.run_command(line)
    request = own.request("A")
    assert (request.temperature, request.max_len, request.nucleus_p) == (0.9, 7, 0.5)
    assert request.stop == "The end"


def test_what_is_no_json_is_a_string() -> None:
    own = settings()
    for text in ("[" * 9999, "NaN", "a b", "1" * 9999):
        own.run_command(f"/set stop {text}")
        assert own.request("A").stop == text


def test_none_sets_back_what_was_set(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_each_answer_has_a_new_seed() -> None:
    own = settings()
    assert len({own.request("A").rng_seed for _ in range(9)}) == 9
    own.run_command("/seed 7")
    assert [own.request("A").rng_seed for _ in range(2)] == [7, 7]
    own.run_command("/seed new")
    assert own.request("A").rng_seed != own.request("A").rng_seed
    own.run_command("/set seed 8")
    assert own.request("A").rng_seed == 8
    assert settings(seed=3).request("A").rng_seed == 3


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
def test_a_wrong_line_changes_nothing(line: str, said: str) -> None:
    own = settings()
    own.run_command("/set temperature 0.5")
    with pytest.raises(ValueError, match=said):
        own.run_command(line)
    assert own.request("A").temperature == 0.5


def test_a_session_takes_commands_and_ends_with_exit(
    tiny: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "/set temperature 0\n/set max_tokens 3\nThe cat\n/set top_k x\n /help\n"
    lines += "exit\nThe dog\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    session = command("--checkpoint", tiny, "--interactive")
    alone = command("--checkpoint", tiny, "-p", "The cat", "--temperature", 0, "-n", 3)
    assert session.status == 0
    assert session.out == alone.out.removeprefix("The cat")
    assert "error: --top-k must be one number, got 'x'" in session.err
    assert "/seed N          one seed for all answers" in session.err


def test_a_session_takes_a_bias(
    tiny: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its keys are texts in JSON."""
    lines = 'The cat\n/set logit_bias {"9": 100}\nThe cat\n/set logit_bias {"a": 1}\n'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    session = command("--checkpoint", tiny, "--interactive", "--logit-bias", "7:100", "-n", 2)
    one, other = (
        command("--checkpoint", tiny, "-p", "The cat", "--logit-bias", f"{token}:100", "-n", 2).out
        for token in (7, 9)
    )
    assert one != other
    assert session.out == one.removeprefix("The cat") + other.removeprefix("The cat")
    assert re.search("error: --logit-bias: expected token ids from 0 to 4095, got 'a'", session.err)
