"""The options: their names, which of them go together, and what they set."""

import dataclasses
import os
import pathlib
import re
import signal
import sys

import pytest

import golden
import grok1
import run
import runner
from commands import assert_one_sentence
from grok1.cli import prompts
from grok1.cli.job import SHARED
from grok1.cli.options import Options
from grok1.cli.parsing import DEFAULT_PROMPT, ELSEWHERE, parse_arguments
from grok1.kernels import dispatch
from grok1.parallel import multihost
from grok1.serving.request import Request

MODEL = golden.DIRECTORY / "three-layers"


# field -> (its value, options that set it)
NAMES = {
    "max_len": (7, "-n 7", "--max-tokens 7", "--max-len 7"),
    "checkpoint": (pathlib.Path("dir"), "-m dir", "--model dir", "--checkpoint dir"),
    "nucleus_p": (0.5, "--top-p 0.5", "--nucleus-p 0.5", "--top_p 0.5"),
    "temperature": (0, "--temp=0"),
    "repetition_penalty": (1.5, "--repeat-penalty 1.5"),
    "interactive": (True, "-i"),
    "mesh": ((1, 8), "--mesh 1x8"),
    "logit_bias": ({"5": -2.5, "7": 1.0}, "--logit-bias 5:-2.5 --logit-bias 7:1"),
}


@pytest.mark.parametrize("field", NAMES)
def test_options_have_the_names_of_other_programs(field):
    value, *spellings = NAMES[field]
    for given in spellings:
        assert getattr(parse_arguments(given.split()), field) == value


BIAS = "--logit-bias: expected a token id and a number such as"
SESSION = ("--prompt A", "--prompts-file A", "--output A", "--json", "--distributed", "--plan")
SESSION += ("--num-samples 2",)
TABLE = ("--json", "--output A", "--interactive", "--distributed", "--plan")


def excluded(option, others, reason):
    """Rows of options that may not be combined with `option`."""
    for other in others:
        said = f"{option} and {other.split()[0]} do not go together: {reason}"
        yield [option, *other.split()], said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["-c", "512", "A"], "unrecognized arguments: -c; use --context"),
        (["--ctx-size=512"], "unrecognized arguments: --ctx-size=512; use --context"),
        (["--num_return_sequences", "3"], "use --num-samples"),
        (["--temperatur", "1"], "unrecognized arguments: --temperatur; the nearest is --temper"),
        (["--resume"], "--resume needs --output, the file to continue"),
        (["--prompts-format", "text"], "--prompts-format needs --prompts-file"),
        (["--top-logprobs", "2"], "--top-logprobs needs --json or --output"),
        *excluded("--interactive", SESSION, "prompts are typed"),
        *excluded("--show-routing", TABLE, "it prints a text table"),
        (["--logit-bias=5"], f"{BIAS} 5:-2.5, got '5'"),
        (["--logit-bias=x:1"], f"{BIAS} 5:-2.5, got 'x:1'"),
        (["--logit-bias=-1:1"], f"{BIAS} 5:-2.5, got '-1:1'"),
        (["--logit-bias=5:x"], "--logit-bias: expected a number from -1000000000 to 1000000000"),
        (["--logit-bias=5:1e10"], "--logit-bias: expected a number from -1000000000 to"),
    ],
)
def test_invalid_options_are_refused(given, said, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_arguments(given)
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and said in err


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
def test_prompts_may_stand_anywhere_among_options(given, expected):
    lines = parse_arguments(given).lines
    assert [line.prompt for line in lines] == expected
    assert [line.place for line in lines] == [f"request {i + 1}" for i in range(len(expected))]


def test_ignored_standard_input_is_reported(tmp_path, capsys):
    """As in `echo text | python run.py`."""
    text = tmp_path / "text"
    text.write_text("A dog\n")
    (full, sender), (empty, other) = os.pipe(), os.pipe()
    os.write(sender, b"A dog\n")
    os.close(other)
    file, nothing = (os.open(path, os.O_RDONLY) for path in (text, os.devnull))

    def told(descriptor, *given):
        kept = os.dup(0)
        os.dup2(descriptor, 0)
        try:
            parse_arguments(given)
        finally:
            os.dup2(kept, 0)
            os.close(kept)
        return capsys.readouterr().err

    said = "standard input is ignored; use --prompts-file - to read prompts, one per line\n"
    assert told(full) == told(file) == said
    assert told(empty) == told(nothing) == ""
    for given in (["A"], ["--prompts-file", "-"], ["-i"], ["--plan"]):
        assert told(full, *given) == ""
    for descriptor in (full, sender, empty, file, nothing):
        os.close(descriptor)


def test_parsed_options_are_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_arguments([]).seed = 5


def test_options_are_shared_by_hosts_or_their_own():
    """A new option belongs to one of the two."""
    own = {
        *("checkpoint", "tokenizer", "prompts_file", "prompts_format", "interactive"),
        *("json", "output", "resume", "stats", "show_routing", "compile_cache"),
        *("plan", "device_memory", "bandwidth", "distributed", "coordinator"),
        *("num_processes", "process_id", "peer_timeout", "join_timeout"),
        *("accelerator", "experts", "mapped", "shard_activations", "save_programs"),
        *("serve", "api_key", "most_waiting", "grace", "chat_template", "cors"),
    }
    assert {field.name for field in dataclasses.fields(Options)} == own | set(SHARED)
    assert not own & set(SHARED)


def test_options_set_every_field_of_a_request():
    """Except for those that only programs need."""
    given = ["--prompt-ids", "5 6", "-n", "5", "--min-len", "3", "--stop", "a", "--stop", "b"]
    given += ["--seed", "7", "--num-samples", "2", "--temp", "0.5", "--top-k", "9", "--min-p", ".1"]
    given += ["--top-p", "0.8", "--repeat-penalty", "1.5", "--presence-penalty", "2"]
    given += ["--frequency-penalty", "3", "--logit-bias", "7:-1", "--json", "--top-logprobs", "4"]
    (request,) = prompts.make_requests(parse_arguments([*given, "--truncate", "left"]), [0])
    assert request == Request(
        [5, 6], max_len=5, min_len=3, stop=("a", "b"), rng_seed=7, num_samples=2, temperature=0.5,
        top_k=9, min_p=0.1, nucleus_p=0.8, repetition_penalty=1.5, presence_penalty=2,
        frequency_penalty=3, logit_bias={7: -1}, top_logprobs=4, truncate="left",
    )  # fmt: skip
    without = {"allowed_tokens", "stop_tokens", "ignore_eos", "parse_special", "prompt_logprobs"}
    usual = vars(Request([0]))
    assert {name for name in usual if getattr(request, name) == usual[name]} == without


def test_machine_options_reach_the_model(command, monkeypatch):
    given = {}

    def load(*_, **options):
        given.update(options)
        raise ValueError("enough")

    monkeypatch.setattr(runner, "load_model", load)
    monkeypatch.setattr(dispatch, "available", lambda: pytest.fail("kernels were compiled"))
    machine = [
        "--mesh",
        "1,2",
        "--batch",
        "3",
        "--context",
        "60",
        "--chunk",
        "200",
        "--dtype",
        "bfloat16",
        "--prefix-cache",
        "off",
    ]
    command("--checkpoint", MODEL, "--prompt-ids", "5", *machine, "--no-kernels")
    expected = {"mesh": (1, 2), "slots": 3, "context": 60, "dtype": "bfloat16", "kernels": False}
    expected["prefix_cache"] = False
    assert {name: given[name] for name in expected} == expected
    assert given["pad_sizes"] == [16, 128, 200]


def test_number_of_slots_and_chunk_lengths_are_few():
    """Each of them is compiled."""
    assert [run.slots_for(n) for n in (1, 2, 3, 4, 5, 8, 9, 1000)] == [1, 2, 4, 4, 8, 8, 8, 8]
    assert run.chunks(1024) == [16, 128, 1024] and run.chunks(4) == [4]
    assert run.longest_chunk(parse_arguments([])) == 1024
    assert run.longest_chunk(parse_arguments(["--serve", "80"])) == 128  # on a CPU


def test_help_has_examples_and_groups(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/run.py"])
    lines = command("--help").out.splitlines()
    assert lines[0] == "usage: python run.py [options] [PROMPT ...]"
    assert lines[2].startswith("Sample text from Grok-1, or from the small demo model")
    assert all(line.startswith("  python run.py ") for line in lines[4:7])
    groups = [line for line in lines if re.fullmatch("[a-z, -]+:", line)]
    assert groups[1:6] == ["model:", "prompts:", "sampling:", "output:", "machine:"]
    assert set(ELSEWHERE.values()) <= set(re.findall("--[a-z-]+", "\n".join(lines)))


def test_version_is_that_of_the_package(command):
    result = command("--version")
    assert result.status == 0
    assert re.fullmatch(rf"grok-1-jax {grok1.__version__} \(jax [\d.]+\)\n", result.out)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("--max-tokens", 128), "--max-tokens 128 leaves no room for a prompt"),
        (("--context", 1), "a context of 1 has no room for a prompt and an answer"),
        (
            ("--max-tokens", 125),
            "the prompt has 7 tokens, and the context of 128 must hold --max-tokens 125 more; "
            "shorten it, or keep only its newest tokens (--truncate left)",
        ),
        (("--min-len", 9, "-n", 5), "--min-len must be an integer from 0 to --max-tokens 5, got 9"),
        (("--logit-bias", "9999:1"), "--logit-bias: expected token ids from 0 to 511, got 9999"),
    ],
)
def test_errors_name_options_not_fields(asked, said, command):
    result = command("--checkpoint", MODEL, "--prompt-ids", "5 6 7 8 9 10 11", *asked)
    assert_one_sentence(result, 1, f"request 1: {said}")


def test_answer_to_token_ids_is_printed_as_text(tiny, command):
    """If there is a tokenizer of the model's vocabulary."""
    asked = ["-m", tiny, "--prompt-ids", "5 6", "-n", 4, "--temperature", 0]
    (answer,) = command(*asked, "--json").answers
    assert answer["text"] and command(*asked).out == answer["text"] + "\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "interrupted"),
        (["--output", "{}/out"], "interrupted; --resume continues from here"),
        (["--output", "/dev/null"], "interrupted"),
    ],
)
def test_interrupted_run_says_how_to_resume(given, said, tmp_path, monkeypatch, capfd):
    def interrupted(*_):
        raise KeyboardInterrupt

    def leave(status):
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
