"""The options by the names that other tools give them, and what each of them reaches."""

import dataclasses
import os
import pathlib
import re
import signal
import subprocess
import sys
from typing import Any

import pytest

import grok1
import run
from commands import PROMPT, Command, assert_one_sentence
from grok1 import default_files
from grok1.cli import prompts
from grok1.cli.job import SHARED
from grok1.cli.options import Options
from grok1.cli.parsing import DEFAULT_PROMPT, ELSEWHERE, parse_arguments
from grok1.parallel import multihost
from grok1.serving.request import Request
from paths import ROOT
from run import chunks, slots_for


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        (["-n", "7"], "max_len", 7),
        (["--max-tokens", "7"], "max_len", 7),
        (["--max-len", "7"], "max_len", 7),
        (["-m", "dir"], "checkpoint", pathlib.Path("dir")),
        (["--model", "dir"], "checkpoint", pathlib.Path("dir")),
        (["--checkpoint", "dir"], "checkpoint", pathlib.Path("dir")),
        (["--top-p", "0.5"], "nucleus_p", 0.5),
        (["--nucleus-p", "0.5"], "nucleus_p", 0.5),
        (["--top_p", "0.5"], "nucleus_p", 0.5),
        (["--temp=0"], "temperature", 0),
        (["--repeat-penalty", "1.5"], "repetition_penalty", 1.5),
        (["-i"], "interactive", True),
        (["--mesh", "1x8"], "mesh", (1, 8)),
        (["--mesh", "1,8"], "mesh", (1, 8)),
        (["--logit-bias", "5:-2.5", "--logit-bias", "7:1"], "logit_bias", {"5": -2.5, "7": 1.0}),
    ],
)
def test_options_have_the_names_of_other_tools(given: list[str], field: str, value: object) -> None:
    assert getattr(parse_arguments(given), field) == value


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (["-c", "512", "A"], "arguments: -c; here it is --context"),
        (["--ctx-size=512"], "here it is --context"),
        (["-r", "A"], "here it is --stop"),
        (["--num_return_sequences", "3"], "here it is --num-samples"),
        (["--temperatur", "1"], "the nearest is --temperature"),
    ],
)
def test_names_of_other_tools_are_told_apart(
    given: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(given)
    err = capsys.readouterr().err
    assert "unrecognized arguments: -" in err and name in err


def test_suggested_options_are_there(command: Command) -> None:
    assert set(ELSEWHERE.values()) <= set(re.findall("--[a-z-]+", command("--help").out))


def test_input_that_is_not_read_is_told(tmp_path: pathlib.Path) -> None:
    """`echo text | python run.py` answered another prompt without a word."""
    said = "standard input is ignored; use --prompts-file - to read prompts"
    text = tmp_path / "text"
    text.write_text("A dog\n")
    start = "import sys; from grok1.cli import parsing; parsing.parse_arguments(sys.argv[1:])"

    def told(*given: str, **source: Any) -> bool:
        command = [sys.executable, "-c", start, *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **source)
        assert done.returncode == 0 and done.stderr in ("", f"{said}, one per line\n")
        return bool(done.stderr)

    with text.open() as file:
        assert told(input="A dog\n") and told(stdin=file)
    assert not told(input="") and not told(stdin=subprocess.DEVNULL)
    for given in (["A"], ["--prompts-file", "-"], ["-i"], ["--plan"]):
        assert not told(*given, input="A dog\n")


def test_few_numbers_of_slots_are_compiled_for() -> None:
    assert [slots_for(n) for n in (1, 2, 3, 4, 5, 8, 9, 1000)] == [1, 2, 4, 4, 8, 8, 8, 8]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["-p", "A"], ["A"]),
        (["A", "B"], ["A", "B"]),
        (["A", "-n", "3", "B", "--json", "C"], ["A", "B", "C"]),
        (["A", "-n", "3", "--", "-B", "--json"], ["A", "-B", "--json"]),
        (["--seed", "1", "A"], ["A"]),
        (["--top_k", "1", "--", "--a_b"], ["--a_b"]),
        (["A", "--prompt", "B", "--prompt-ids", "5 6"], ["B", [5, 6], "A"]),
        ([], [DEFAULT_PROMPT]),
        (["--prompts-file", "x"], []),
    ],
)
def test_prompts_are_given_in_any_way(given: list[str], expected: list[object]) -> None:
    lines = parse_arguments(given).lines
    assert [line.prompt for line in lines] == expected
    assert [line.place for line in lines] == [f"request {i + 1}" for i in range(len(expected))]


def test_options_stay_as_they_were_given() -> None:
    given = parse_arguments([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        given.seed = 5  # type: ignore[misc]


def test_process_0_decides_all_but_what_is_each_hosts_own() -> None:
    """An option that is added is shared, or named here."""
    own = {
        *("checkpoint", "tokenizer", "prompts_file", "prompts_format", "interactive"),
        *("json", "output", "resume", "stats", "show_routing", "compile_cache"),
        *("plan", "device_memory", "bandwidth", "distributed", "coordinator"),
        *("num_processes", "process_id", "peer_timeout", "join_timeout"),
    }
    assert {field.name for field in dataclasses.fields(Options)} == own | set(SHARED)
    assert not own & set(SHARED)


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


def test_help_begins_with_three_examples(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
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


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--max-tokens", 99), "--max-tokens 99 leaves no room for a prompt"),
        (("--context", 1), "a context of 1 has no room for a prompt and an answer"),
        (("--max-tokens", 60), "must hold --max-tokens 60 more; .* tokens .--truncate left."),
        (("--min-len", 9, "-n", 5), "--min-len must be an integer from 0 to --max-tokens 5, got 9"),
        (("--logit-bias", "9999:1"), "--logit-bias: expected token ids from 0 to 4095, got 9999"),
    ],
)
def test_mistakes_are_told_by_the_names_of_options(
    asked: tuple[object, ...], said: str, tiny: pathlib.Path, command: Command
) -> None:
    result = command("--checkpoint", tiny, "--prompt-ids", "5 6 7 8 9 10 11", *asked)
    assert result.status == 1 and re.search(f"request 1: .*{said}", result.err), result.err


def test_settings_of_a_line_keep_their_names(
    tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": [5], "max_len": 99}')
    result = command("--checkpoint", tiny, "--prompts-file", file)
    assert "line 1: max_len = 99 leaves no room" in result.err


def test_lines_of_json_say_which_answer_they_are(tiny: pathlib.Path, command: Command) -> None:
    asked = ["--checkpoint", tiny, "--prompt-ids", "5 6", "--prompt-ids", "7", "-n", 2, "--json"]
    answers = command(*asked, "--num-samples", 2).answers
    keys = [(answer["index"], answer["sample"]) for answer in answers]
    assert keys == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_ids_are_answered_in_words_if_possible(
    tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["--prompt-ids", "5 6", "-n", 4, "--temperature", 0]
    monkeypatch.setattr(default_files, "TOKENIZER", tmp_path / "none")
    (without,) = command("-m", tiny, *asked, "--json").answers
    assert without["text"] is None
    (tmp_path / "ckpt-0").symlink_to(tiny / "ckpt-0")
    for name, source in (("config.json", tiny), ("tokenizer.model", ROOT)):
        (tmp_path / name).symlink_to(source / name)
    (answer,) = command("-m", tmp_path, *asked, "--json").answers
    assert answer["token_ids"] == without["token_ids"] and answer["text"]
    assert command("-m", tmp_path, *asked).out == answer["text"] + "\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "interrupted"),
        (["--output", "{}/out"], "interrupted; --resume continues from here"),
        (["--output", "/dev/null"], "interrupted"),
    ],
)
def test_an_interrupted_run_says_how_to_resume(
    given: list[str],
    said: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    def leave(status: int) -> None:
        raise SystemExit(status)

    (tmp_path / "out").touch()
    monkeypatch.setattr(run, "serve", interrupted)
    monkeypatch.setattr(run, "end_at_next_interrupt", lambda: None)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(sys, "argv", ["run.py", *(word.format(tmp_path) for word in given)])
    handler = signal.getsignal(multihost.WAKE)
    with pytest.raises(SystemExit) as ended:
        run.main()
    signal.signal(multihost.WAKE, handler)
    assert ended.value.code == 130 and capfd.readouterr().err == f"{said}\n"
