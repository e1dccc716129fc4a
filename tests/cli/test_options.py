"""The options by the names that other tools give them, and what each of them reaches."""

import pathlib
import re
import sys

import pytest

import grok1
from commands import PROMPT, Command, assert_one_sentence
from grok1.cli import prompts
from grok1.cli.options import DEFAULT_PROMPT, parse_arguments
from grok1.serving.request import Request
from run import chunks


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        (["-n", "7"], "max_len", 7),
        (["--max-tokens", "7"], "max_len", 7),
        (["--max-len", "7"], "max_len", 7),
        (["-m", "dir"], "checkpoint", pathlib.Path("dir")),
        (["--model", "dir"], "checkpoint", pathlib.Path("dir")),
        (["--checkpoint", "dir"], "checkpoint", pathlib.Path("dir")),
        (["-p", "A"], "prompts", ["A"]),
        (["A", "B"], "prompts", ["A", "B"]),
        (["--seed", "1", "A"], "prompts", ["A"]),
        (["A", "--prompt", "B", "--prompt-ids", "5 6"], "prompts", ["B", [5, 6], "A"]),
        ([], "prompts", [DEFAULT_PROMPT]),
        (["--top-p", "0.5"], "nucleus_p", 0.5),
        (["--nucleus-p", "0.5"], "nucleus_p", 0.5),
        (["--mesh", "1x8"], "mesh", (1, 8)),
        (["--mesh", "1,8"], "mesh", (1, 8)),
        (["--logit-bias", "5:-2.5", "--logit-bias", "7:1"], "logit_bias", {"5": -2.5, "7": 1.0}),
    ],
)
def test_options_have_the_names_of_other_tools(given: list[str], field: str, value: object) -> None:
    assert getattr(parse_arguments(given), field) == value


def test_every_setting_of_a_request_has_an_option() -> None:
    """But those that only programs need: token ids in place of texts, and what is not printed."""
    settings = prompts.command_settings(parse_arguments([]))
    without = {"prompt", "allowed_tokens", "stop_tokens", "ignore_eos", "parse_special"}
    assert settings.keys() == Request.__dataclass_fields__.keys() - without - {"prompt_logprobs"}


def test_bias_and_least_length_reach_the_answer(tiny: pathlib.Path, command: Command) -> None:
    asked = ["--checkpoint", tiny, "--prompt-ids", "5 6", "--temperature", 0, "--json"]
    (biased,) = command(*asked, "--max-tokens", 3, "--logit-bias", "77:10000").answers
    assert biased["token_ids"] == [77] * 3
    (ended,) = command(*asked, "-n", 5, "--logit-bias", "2:10000").answers
    assert ended["finish_reason"] == "eos" and len(ended["token_ids"]) == 1
    (longer,) = command(*asked, "-n", 5, "--logit-bias", "2:10000", "--min-len", 3).answers
    assert longer["finish_reason"] == "eos" and len(longer["token_ids"]) == 4


def test_first_choices_are_printed_as_json(tiny: pathlib.Path, command: Command) -> None:
    asked = ["--checkpoint", tiny, "--prompt-ids", "5 6", "--temperature", 0, "-n", 3]
    (answer,) = command(*asked, "--json", "--top-logprobs", 2).answers
    assert [len(choices) for choices in answer["top_logprobs"]] == [2, 2, 2]
    assert [choices[0][0] for choices in answer["top_logprobs"]] == answer["token_ids"]
    assert_one_sentence(command(*asked, "--top-logprobs", 2), 2, "needs --json or --output")


def test_the_chunk_is_the_longest_part_of_a_prompt(tiny: pathlib.Path, command: Command) -> None:
    assert chunks(None) == [16, 128, 1024] and chunks(200) == [16, 128, 200] and chunks(4) == [4]
    asked = ["--checkpoint", tiny, "--prompt", PROMPT, "--temperature", 0, "-n", 3]
    assert command(*asked, "--chunk", 2).out == command(*asked).out


@pytest.mark.parametrize("text", ["5", "x:1", "5:x", ":1", "-1:1", "5:1e10"])
def test_a_bias_that_is_none_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([f"--logit-bias={text}"])
    assert re.search("--logit-bias: expected a (token id and a )?number", capsys.readouterr().err)


def test_help_begins_with_what_it_does_and_three_examples(
    monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    monkeypatch.setattr(sys, "argv", ["/some/where/run.py"])
    lines = command("--help").out.splitlines()
    assert lines[0] == "usage: python run.py [options] [PROMPT ...]"
    assert lines[2].startswith("Sample text from Grok-1, or from the small demo model")
    assert all(line.startswith("  python run.py ") for line in lines[4:7])
    groups = [line for line in lines if re.fullmatch("[a-z, -]+:", line)]
    assert groups[1:6] == ["model:", "prompts:", "sampling:", "output:", "machine:"]


def test_the_version_is_that_of_the_package(command: Command) -> None:
    result = command("--version")
    assert result.status == 0
    assert re.fullmatch(rf"grok-1-jax {grok1.__version__} \(jax [\d.]+\)\n", result.out)
