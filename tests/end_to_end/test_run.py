"""The command as a user meets it: answers on stdout, all else on stderr, one sentence a mistake."""

import fcntl
import io
import json
import os
import pathlib
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import tomllib
from collections.abc import Callable, Sequence
from typing import IO, Any

import jax
import pytest

import checkpoint
import run
from commands import (
    CONFIG,
    COUNTED,
    LOADED,
    PROMPT,
    Command,
    Result,
    assert_one_sentence,
    changed,
    finish,
    start,
)
from grok1 import default_files
from grok1.cli import parsing
from paths import DATA, ROOT
from runner import Completion, Event

# Answers.


def test_text_goes_to_stdout_and_all_else_to_stderr_alike_in_every_process(
    tiny: pathlib.Path, command: Command
) -> None:
    arguments = ["--checkpoint", tiny, "--prompt", PROMPT, "--max-len", 12, "--seed", 1]
    result = finish(start(*arguments))
    assert result.status == 0
    assert result.out.startswith(PROMPT) and len(result.out) > len(PROMPT) + 12
    assert re.fullmatch(LOADED + COUNTED, result.err), result.err
    assert "float32 activations, mesh 1,1" in result.err and "12 tokens" in result.err
    assert command(*arguments).out == result.out
    (answer,) = command(*arguments, "--json").answers
    assert result.out == PROMPT + answer["text"] + "\n"
    (other,) = command(*arguments[:-1], 2, "--json").answers
    assert len(other["token_ids"]) == 12
    assert other["token_ids"] != answer["token_ids"]


MIXED = ("--prompt", PROMPT, "--prompt-ids", "5 6,7", "--prompt", "A dog ", "--temperature", 0)


@pytest.mark.parametrize("mesh", ["1,8", pytest.param("2,4", marks=pytest.mark.exhaustive)])
def test_json_is_one_object_a_line_and_the_same_on_every_mesh(
    mesh: str, tiny: pathlib.Path, command: Command
) -> None:
    """No devices are asked for in the environment: run.py makes them."""
    arguments = ["--checkpoint", tiny, *MIXED, "--max-len", 8, "--json"]
    result = finish(start(*arguments, "--mesh", mesh))
    assert result.status == 0
    assert re.fullmatch(LOADED + COUNTED, result.err), result.err
    assert f"mesh {mesh} on" in result.err and "24 tokens" in result.err
    assert result.out.count("\n") == 3
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


def test_several_answers_are_printed_whole_each_with_its_prompt(
    tiny: pathlib.Path, command: Command
) -> None:
    arguments = ["--checkpoint", tiny, *MIXED, "--max-len", 8]
    first, second, third = command(*arguments, "--json").answers
    result = command(*arguments)
    expected = (
        f"[1] {PROMPT}{first['text']}\n[2] 5 6 7 | {second['text']}\n[3] A dog {third['text']}\n"
    )
    assert result.out == expected


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A checkpoint whose weights are finite, and its logits are not."""
    params = CONFIG.init_params(0, quantized=True)
    norm = params["language_model/rms_norm"]
    norm["scale"] = norm["scale"].at[3].set(3e38)
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
    result = command("--checkpoint", overflowing, *options, "--max-len", 3, "--dtype", "float32")
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
    assert not file.exists() or file.read_text() == ""  # to be resumed with other weights


def test_a_session_goes_on_after_logits_that_are_not_finite(
    overflowing: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"A\nB\n"), "utf-8"))
    result = command("--checkpoint", overflowing, "--interactive", "--dtype", "float32")
    assert (result.status, result.out) == (0, "\n\n")
    assert result.err.count("\nerror: expected finite logits") == 2


@pytest.mark.parametrize(("prompt", "out"), [([5, 6], ""), ("A dog", "A dog\n")])
def test_an_interruption_before_the_first_token_prints_no_empty_line(
    prompt: Any, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run.TextPrinter([prompt], [(0, 0)]).close()
    assert capsys.readouterr().out == out


def test_several_answers_to_a_prompt_are_told_apart(tiny: pathlib.Path, command: Command) -> None:
    arguments = ["--checkpoint", tiny, "--prompt", PROMPT, "--max-len", 4, "--num-samples", 3]
    result = command(*arguments, "--stats")
    answers = command(*arguments, "--json").answers
    assert sorted(result.out.splitlines()) == [
        f"[1.{i}] {PROMPT}{answer['text']}" for i, answer in enumerate(answers, 1)
    ]
    (second,) = command(*arguments[:-2], "--seed", 43, "--json", "--batch", 4).answers
    assert answers[1] == second | {"sample": 1}
    assert re.search(r"\nslots used +3.0 of 4 on average\n", result.err), result.err
    assert re.search(r"\nhost's work +[\d.]+ ms a token, \d+% of the time\n", result.err)
    # One token is drawn with the prompt: there is no step whose work could be divided by tokens.
    assert "host's work" not in command(*arguments, "--max-len", 1, "--stats").err


def test_json_keeps_the_order_of_the_prompts_whichever_ends_first(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printer = run.JsonPrinter([(i, 0) for i in range(4)], [None] * 4)

    def show(index: int, finish_reason: str | None) -> list[Any]:
        answer = Completion(None, [index], [5], [-1.0], None, finish_reason)
        printer.show(Event(index, 5, "", answer, 0, answer.finish_reason))
        return [json.loads(line)["prompt_ids"] for line in capsys.readouterr().out.splitlines()]

    assert show(0, None) == show(3, None) == []
    assert show(1, "eos") == show(3, "length") == []
    assert show(0, "context") == [[0], [1]]
    assert show(2, None) == []
    printer.close()  # As after Ctrl-C: what is finished is printed.
    assert json.loads(capsys.readouterr().out)["prompt_ids"] == [3]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model"])
def test_a_file_of_any_size_is_refused_with_an_output_too(
    name: str, tiny: pathlib.Path, tmp_path: pathlib.Path, command: Command
) -> None:
    """None of it is read beyond what such a file may hold, nor waited for."""
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
    arguments = ["--checkpoint", tiny, "--prompt-ids", "5 6 7", "--max-len", 4]
    (answer,) = command(*arguments, "--json").answers
    assert answer["prompt"] is answer["text"] is None
    assert command(*arguments).out.split() == [str(token) for token in answer["token_ids"]]
    result = command("--checkpoint", tiny, "--prompt", PROMPT)
    assert result.status == 1
    assert f"{tmp_path / 'tokenizer.model'}: expected a tokenizer, found no such" in result.err


def test_the_most_probable_token_by_any_setting(tiny: pathlib.Path, command: Command) -> None:
    arguments = ["--checkpoint", tiny, "--prompt", PROMPT, "--max-len", 12, "--json"]
    greedy = command(*arguments, "--temperature", 0).answers
    for settings in (
        ("--temperature", 0, "--seed", 5),
        ("--temperature", 2, "--top-k", 1),
        ("--temperature", 2, "--nucleus-p", 1e-6),
        ("--temperature", 2, "--top-p", 1e-6),
    ):
        assert command(*arguments, *settings).answers == greedy
    assert command(*arguments, "--temperature", 2).answers != greedy


def test_an_answer_says_why_it_ends(
    tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path
) -> None:
    arguments = ["--prompt", PROMPT, "--json", "--temperature", 0, "--checkpoint"]
    (answer,) = command(*arguments, tiny, "--max-len", 3).answers
    assert answer["finish_reason"] == "length" and len(answer["token_ids"]) == 3
    (full,) = command(*arguments, tiny).answers
    assert full["finish_reason"] == "context"
    assert len(full["prompt_ids"]) + len(full["token_ids"]) == 64
    eos = changed(tiny, tmp_path / "eos", eos_token=answer["token_ids"][0])
    (short,) = command(*arguments, eos).answers
    assert short["finish_reason"] == "eos" and short["token_ids"] == answer["token_ids"][:1]


def test_penalties_stops_and_truncation_reach_the_model(
    tiny: pathlib.Path, command: Command
) -> None:
    arguments = ["--checkpoint", tiny, "--json", "--temperature", 0, "--max-len", 30]
    (free,) = command(*arguments, "--prompt", PROMPT).answers
    (once,) = command(*arguments, "--prompt", PROMPT, "--presence-penalty", 1e4).answers
    (novel,) = command(*arguments, "--prompt", PROMPT, "--repetition-penalty", 1e4).answers
    assert len(set(free["token_ids"])) < 30
    assert len(set(once["token_ids"])) == len(set(novel["token_ids"])) == 30
    assert not set(novel["token_ids"]) & set(novel["prompt_ids"])
    stop = free["text"][10:14]
    (stopped,) = command(*arguments, "--prompt", PROMPT, "--stop", "\0", "--stop", stop).answers
    assert stopped["text"] == free["text"][: free["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"
    (cut,) = command(*arguments, "--prompt", "so " * 80, "--truncate", "left").answers
    assert len(cut["prompt_ids"]) == 34 and len(cut["token_ids"]) == 30
    drawn = [*arguments, "--temperature", 2, "--prompt", PROMPT, "--min-p"]
    assert command(*drawn, 1).answers == [free] != command(*drawn, 0).answers


def test_a_terminal_that_cannot_show_a_character_loses_no_answer(tiny: pathlib.Path) -> None:
    arguments = ("--checkpoint", tiny, "--prompt", "caf\u00e9", "--max-len", 1)
    result = finish(start(*arguments, PYTHONIOENCODING="ascii"))
    assert result.status == 0 and result.out.startswith("caf\\xe9")


def test_bfloat16_runs_and_is_announced(tiny: pathlib.Path, command: Command) -> None:
    arguments = ["--checkpoint", tiny, "--prompt", PROMPT, "--max-len", 1, "--json"]
    result = command(*arguments, "--dtype", "bfloat16")
    assert result.status == 0
    assert re.fullmatch(LOADED + COUNTED, result.err) and "bfloat16 activations" in result.err
    (rounded,), (exact,) = result.answers, command(*arguments).answers
    assert rounded["logprobs"][0] != exact["logprobs"][0]
    assert rounded["logprobs"][0] == pytest.approx(exact["logprobs"][0], abs=0.3)


def test_without_a_checkpoint_the_demo_is_used_and_said_to_be(
    tiny: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(default_files, "RELEASED", tmp_path)
    monkeypatch.setattr(default_files, "DEMO", tiny)
    result = command("--max-len", 1)
    assert result.out.startswith(parsing.DEFAULT_PROMPT)
    assert result.err.startswith("checkpoints/ckpt-0 is not there: using the small bundled demo")
    monkeypatch.setattr(default_files, "RELEASED", tiny)
    monkeypatch.setattr(default_files, "DEMO", tmp_path)
    assert re.fullmatch(LOADED + COUNTED, command("--max-len", 1).err)


def test_help_names_every_option(command: Command) -> None:
    result = command("--help")
    assert result.status == 0 and result.err == ""
    for option in ("checkpoint", "tokenizer", "prompt", "prompt-ids", "max-len", "temperature",
                   "top-k", "nucleus-p", "min-p", "repetition-penalty", "presence-penalty",
                   "frequency-penalty", "stop", "truncate", "seed", "mesh", "dtype",
                   "json"):  # fmt: skip
        assert f"--{option}" in result.out


# Mistakes.


# fmt: off
# id -> (arguments, exit status, what the sentence must say)
ARGUMENT_CASES: dict[str, tuple[Sequence[object], int, str]] = {
    "mesh-of-one": (("--mesh", "8"), 2,
                    "--mesh: expected two integers from 1 to 2147483647, DATA,MODEL such as 1,8, "
                    "got '8'"),
    "mesh-beyond-numbers": (("--mesh", f"1,{2**31}"), 2, "such as 1,8, got '1,2147483648'"),
    "mesh-of-three": (("--mesh", "1,2,4"), 2, "such as 1,8, got '1,2,4'"),
    "mesh-of-words": (("--mesh", "a,b"), 2, "such as 1,8, got 'a,b'"),
    "mesh-of-none": (("--mesh", "0,8"), 2, "such as 1,8, got '0,8'"),
    "mesh-that-does-not-fit": (("--mesh", "1,3"), 1,
                               "a model axis of 3 does not divide num_kv_heads = 8; use one of "
                               "[1, 2, 4, 8]"),
    "mesh-too-large": (("--mesh", "4,8"), 1,
                       "a mesh of 4,8 needs 32 devices, but this machine has 16, on which the "
                       "model can use the meshes 16,1 8,2 4,4 2,8;"),
    "batch": (("--batch", "0"), 2, "--batch: expected an integer from 1 to 2147483647, got '0'"),
    "large-batch": (("--batch", "99999999999"), 2, "from 1 to 2147483647, got '99999999999'"),
    "context": (("--context", "65"), 1, "context: expected 1 to 64 tokens, the model's own"),
    "short-context": (("--context", "3", "--prompt-ids", "5 6 7"), 1,
                      "request 1: the prompt has 3 tokens, and the context of 3 must hold"),
    "memory": (("--device-memory", "80"), 2, "--device-memory: expected a number and a unit such "
               "as 80GiB (units: B, kB, MB, GB, TB, KiB, MiB, GiB, TiB), less than 1e+18 bytes, "
               "got '80'"),
    "bandwidth": (("--bandwidth", "3TB"), 2, "a unit such as 3.35TB/s (units: B/s"),
    "plan-together": (("--plan", "--distributed"), 2, "--plan and --distributed do not go"),
    "plan-prompt": (("--plan", "--prompt", "Hi"), 2, "--plan and --prompt do not go together: a"),
    "plan-ids": (("--plan", "--prompt-ids", "5"), 2, "--plan and --prompt do not go together"),
    "a-dash": (("-",), 2, "to read prompts from standard input, use --prompts-file -"),
    "no-prompts-file": (("--prompts-file", ""), 2, "--prompts-file: expected a path, got an empty"),
    "plan-prompts": (("--plan", "--prompts-file", "-"), 2, "--plan and --prompts-file do not go"),
    "plan-output": (("--plan", "--output", "out"), 2, "--plan and --output do not go together"),
    "cold": (("--temperature", "-0.1"), 2, "--temp: expected a number from 0 to 1000000 ("),
    "nan": (("--temperature", "nan"), 2, "--temp: expected a number from 0 to 1000000 ("),
    "hot": (("--temperature", "high"), 2, "got 'high'"),
    "no-nucleus": (("--top-p", "0"), 2,
                   "--nucleus-p: expected a number above 0, up to 1, got '0'"),
    "large-nucleus": (("--top-p", "1.5"), 2, "above 0, up to 1, got '1.5'"),
    "top-k": (("--top-k", "-1"), 2, "--top-k: expected an integer from 0 to 2147483647 (0: "),
    "min-p": (("--min-p", "2"), 2, "--min-p: expected a number from 0 to 1, got '2'"),
    "repetition-penalty": (("--repetition-penalty", "0"), 2, "from 1e-06 to 1000000, got '0'"),
    "presence-penalty": (("--presence-penalty", "nan"), 2, "to 1000000000, got 'nan'"),
    "stop": (("--stop", ""), 1, "request 1: stop must contain non-empty strings, got ''"),
    "truncate": (("--truncate", "right"), 2, "--truncate: invalid choice: 'right'"),
    "long-answer": (("--prompt-ids", "5 6", "--max-len", "63"), 1,
                    "request 1: the prompt has 2 tokens, and the context of 64 must hold "
                    "--max-tokens 63 more; shorten it, or keep only its newest tokens "
                    "(--truncate left)"),
    "no-tokens": (("--max-len", "0"), 2,
                  "--max-len: expected an integer from 1 to 2147483647, got '0'"),
    "half-a-token": (("--max-len", "1.5"), 2, "from 1 to 2147483647, got '1.5'"),
    "seed": (("--seed", "-1"), 2, "to 4294967295 (--seed $RANDOM: a new one each time), got '-1'"),
    "dtype": (("--dtype", "int8"), 2, "--dtype: invalid choice: 'int8'"),
    "no-option": (
        ("--tempratur", "1"), 2,
        "unrecognized arguments: --tempratur; the nearest is --temperature",
    ),
    "output-dash": (("--output", "-"), 2, "--output -: without --output answers are printed"),
    "no-path": (("--output", ""), 2, "--output: expected a path, got an empty string"),
    "no-value": (("--prompt",), 2, "--prompt: expected one argument"),
    "empty-prompt": (("--prompt", ""), 1,
                     "request 1: the prompt is empty; give at least one token"),
    "second-prompt": (("--prompt", "Hi", "--prompt", ""), 1, "request 2: the prompt is empty"),
    "long-prompt": (("--prompt", "so " * 80), 1,
                    "request 1: the prompt has 81 tokens, and the context of 64 must hold at "
                    "least one more; shorten it"),
    "broken-text": (("--prompt", "\udcff"), 1, "request 1: the prompt is not text in UTF-8"),
    "words-for-ids": (("--prompt-ids", "five"), 2,
                      "expected token ids such as '5 6 7', got 'five'"),
    "empty-ids": (("--prompt-ids", " "), 1, "request 1: the prompt is empty"),
    "high-id": (("--prompt-ids", "5 4096"), 1,
                "request 1: expected token ids from 0 to 4095, got 4096"),
    "negative-id": (("--prompt-ids", "5 -1"), 1, "expected token ids from 0 to 4095, got -1"),
    "no-tokenizer": (("--prompt", "Hi", "--tokenizer", "/no/such.model"), 1,
                     "/no/such.model: expected a tokenizer, found no such file; fetch the"),
    "not-a-tokenizer": (("--prompt", "Hi", "--tokenizer", __file__), 1,
                        "test_run.py: expected a SentencePiece model, got a file that is none"),
}
# fmt: on


@pytest.mark.parametrize(
    ("arguments", "status", "part"), ARGUMENT_CASES.values(), ids=ARGUMENT_CASES.keys()
)
def test_a_wrong_argument_is_answered_with_one_sentence(
    arguments: Sequence[object], status: int, part: str, tiny: pathlib.Path, command: Command
) -> None:
    assert_one_sentence(command("--checkpoint", tiny, *arguments), status, part)


Damage = Callable[[pathlib.Path], object]


def config_of(**fields: Any) -> Damage:
    def damage(directory: pathlib.Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | fields))

    return damage


# fmt: off
FILE_CASES: dict[str, tuple[Damage, str]] = {
    "no-directory": (shutil.rmtree,
                     "expected a directory that holds ckpt-0 or model.safetensors.index.json, "
                     "got no such directory; name the "
                     "right one with --checkpoint"),
    "no-ckpt-0": (lambda d: shutil.rmtree(d / "ckpt-0"), "got one with neither; name the"),
    "no-tensors": (lambda d: list(map(os.unlink, (d / "ckpt-0").iterdir())),
                   "tensor00000_000 (language_model/in_out_embed/embeddings): the file is missing"),
    "missing-file": (lambda d: (d / "ckpt-0/tensor00005_000").unlink(),
                     "tensor00005_000 (transformer/decoder_layer_0/multi_head_attention/key/w): "
                     "the file is missing: expected 26 tensor files, got 25; download it again"),
    "cut-file": (lambda d: os.truncate(d / "ckpt-0/tensor00002_000", 1000),
                 "tensor00002_000 (transformer/decoder_layer_0/moe/linear/w): the file is cut: "),
    "broken-config": (lambda d: (d / "config.json").write_text("{"),
                      "config.json: expected valid JSON"),
    "unknown-field": (config_of(emb_sise=64), "config.json: emb_sise: expected one of ['"),
    "wrong-field": (config_of(sequence_len="long"), "config.json: sequence_len: expected "),
    "no-model": (config_of(model=None), "config.json: model: expected an object of the trans"),
    "no-config": (lambda d: (d / "config.json").unlink(),
                  "expected 770 tensor files (64 layers), got 26"),
    "own-tokenizer": (lambda d: (d / "tokenizer.model").write_bytes(b"\0" * 1000),
                      "tokenizer.model: expected a SentencePiece model, got a file that is none"),
}
# fmt: on


@pytest.mark.parametrize(("damage", "part"), FILE_CASES.values(), ids=FILE_CASES.keys())
def test_a_wrong_file_is_answered_with_one_sentence(
    damage: Damage, part: str, tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path
) -> None:
    directory = tmp_path / "copy"
    shutil.copytree(tiny, directory)
    damage(directory)
    result = command("--checkpoint", directory, "--prompt", PROMPT)
    assert_one_sentence(result, 1, str(directory), part)


def test_a_tokenizer_of_another_model_is_refused_and_the_right_one_named(command: Command) -> None:
    golden = DATA / "golden" / "three-layers"
    result = command("--checkpoint", golden, "--prompt", PROMPT)
    assert_one_sentence(
        result,
        1,
        "tokenizer.model: expected the 512 pieces of the checkpoint's vocabulary, got 4096; fetch "
        "the tokenizer.model that belongs to the checkpoint (Grok-1's is in the xai-org/grok-1 "
        "repository on GitHub) and put it next to ckpt-0, or name it with --tokenizer",
    )


def test_prompts_are_checked_before_the_weights_are_loaded(
    tiny: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "load", None)
    result = command("--checkpoint", tiny, "--prompt", "")
    assert_one_sentence(result, 1, "request 1: the prompt is empty")


def test_a_missing_checkpoint_is_reported_first_and_at_once() -> None:
    """Before anything about tokenizers, and before the seconds that importing jax takes."""
    arguments = ("--checkpoint", "no/such", "--tokenizer", "no/such.model")
    assert_one_sentence(finish(start(*arguments)), 1, "no/such: expected a directory that holds")
    program = (
        f"import sys, run; sys.argv[1:] = {arguments}; run.main(); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, check=True)


def test_too_little_memory_is_answered_with_one_sentence(
    tiny: pathlib.Path, command: Command, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is loaded where it is known how much there is, else when it runs out."""
    directory = changed(tiny, tmp_path / "endless", sequence_len=1 << 24)
    asked = "--checkpoint", directory, "--prompt-ids", "5", "--json", "--batch", 20_000
    sentence = "weights and cache take 320", " GiB here, and ", "run.py --plan shows what fits"
    assert_one_sentence(command(*asked), 1, *sentence)
    monkeypatch.setattr("grok1.serving.memory_budget.available_memory", lambda: None)
    result = command(*asked)
    assert_one_sentence(result, 1, "too little memory for the model or its cache", "; use more dev")


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
def test_a_platform_that_is_not_here_is_one_sentence(platforms: str, tiny: pathlib.Path) -> None:
    if platforms == "cuda" and pathlib.Path("/dev/nvidia0").exists():
        platforms = "rocm"
    result = finish(start("--checkpoint", tiny, "--prompt-ids", 5, JAX_PLATFORMS=platforms))
    sentence = f"JAX_PLATFORMS={platforms}: expected platforms with available devices, got none"
    assert_one_sentence(result, 1, sentence, "correct it or leave it unset")


def test_no_devices_at_all_are_one_sentence(
    tiny: pathlib.Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("Getting local topologies failed\nmore")

    monkeypatch.setattr(jax, "devices", fail)
    platforms = jax.config.values["jax_platforms"]
    jax.config.update("jax_platforms", None)
    try:
        result = command("--checkpoint", tiny, "--prompt-ids", 5)
    finally:
        jax.config.update("jax_platforms", platforms)
    assert_one_sentence(result, 1, "error: jax found no devices (Getting local topologies failed)")


def test_no_machine_is_asked_for_a_million_devices(tiny: pathlib.Path) -> None:
    """Virtual ones take threads and memory; of the largest numbers XLA would make a crash."""
    result = finish(start("--checkpoint", tiny, "--prompt-ids", 5, "--mesh", f"{2**31 - 1},1"))
    assert_one_sentence(result, 1, f"a mesh of {2**31 - 1},1 needs", "but this machine has 128,")


@pytest.mark.parametrize("flag", ["-O", "-OO"])
@pytest.mark.parametrize("script", ["run.py", "checkpoint.py"])
def test_python_without_assertions_is_refused(flag: str, script: str) -> None:
    done = subprocess.run([sys.executable, flag, ROOT / script], capture_output=True, text=True)
    assert_one_sentence(Result(done.returncode, done.stdout, done.stderr), 1, "python -O removes")


@pytest.mark.parametrize("script", ["run.py", "checkpoint.py"])
def test_without_room_for_temporary_files_it_ends(script: str) -> None:
    full = ["bash", "-c", 'ulimit -f 0; exec "$@"', "-", sys.executable, ROOT / script]
    done = subprocess.run(full, capture_output=True, text=True)
    result = Result(done.returncode, done.stdout, done.stderr)
    assert_one_sentence(result, 1, "No usable temporary directory found in", "or set TMPDIR to a")


def test_a_place_that_jax_cannot_name_is_refused(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROOT", pathlib.Path("/m\udcfcller"))
    assert_one_sentence(command(), 1, "ller: expected a path in UTF-8; move this program")


# Interruptions.


def test_ctrl_c_cuts_no_answer_for_a_slow_reader(tiny: pathlib.Path) -> None:
    """Nobody reads until it is pressed, so that the command waits in the midst of an answer."""
    requests = [argument for i in range(64) for argument in ("--prompt", f"{i} {PROMPT * 8}")]
    process = start("--checkpoint", tiny, *requests, "--json", "--max-len", 20, "--num-samples", 4)
    assert process.stdout is not None
    deadline = time.monotonic() + 60
    while pipe_bytes(process.stdout) < 2**16 and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)
    result = interrupt(process)
    answers = [tuple(answer["token_ids"]) for answer in result.answers]
    indices = [int(answer["prompt"].split()[0]) for answer in result.answers]
    assert indices == sorted(indices) and len(set(zip(indices, answers, strict=True))) > 32
    assert [indices.count(i) for i in range(8)] == [4] * 8


@pytest.mark.parametrize("script", ["run.py", "checkpoint.py"])
def test_ctrl_c_when_all_is_done_shows_no_traceback(script: str) -> None:
    program = (
        "import atexit, runpy, signal, sys; sys.argv[1:] = ['--help']; "
        "atexit.register(signal.raise_signal, signal.SIGINT); "
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (130, "") and "options:" in done.stdout


@pytest.mark.parametrize("script", ["run.py", "checkpoint.py"])
def test_ctrl_c_that_is_ignored_stays_so(script: str) -> None:
    """As in the background of a shell script."""
    program = (
        "import atexit, runpy, signal, sys; sys.argv[1:] = ['--help']; "
        "signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "atexit.register(lambda: print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)); "
        f"runpy.run_path({script!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("True\n")


@pytest.mark.parametrize("moment", ["open_standard_streams", "Worker", "end_at_next_interrupt"])
def test_ctrl_c_around_the_command_shows_no_traceback(moment: str) -> None:
    program = f"""
import signal, sys, run
from grok1.cli import console
place = console if "{moment}" == "end_at_next_interrupt" else run
def strike():
    place.{moment} = real
    signal.raise_signal(signal.SIGINT)
real, place.{moment} = place.{moment}, strike
sys.argv[1:] = ["--help"]
run.run_and_exit()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def pipe_bytes(file: IO[bytes]) -> int:
    """How many bytes wait to be read."""
    return struct.unpack("i", fcntl.ioctl(file, termios.FIONREAD, b"0000"))[0]


def interrupt(process: subprocess.Popen[bytes], seen: bytes = b"") -> Result:
    """Press Ctrl-C."""
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    pressed = time.perf_counter()
    result = finish(process, seen)
    assert time.perf_counter() - pressed < 2
    assert result.status == 130
    return result


@pytest.fixture(scope="module")
def long(tiny: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A context that takes long to fill."""
    return changed(tiny, tmp_path_factory.mktemp("long") / "copy", sequence_len=16384)


def test_ctrl_c_leaves_the_text_so_far(long: pathlib.Path) -> None:
    process = start("--checkpoint", long, "--prompt", PROMPT, "--max-len", 16000, "--top-k", 50)
    assert process.stdout is not None
    seen = b""
    while len(seen) < len(PROMPT) + 30:  # It is streamed: this is there long before the end.
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece
        seen += piece
    result = interrupt(process, seen)
    assert result.out.startswith(PROMPT) and result.out.endswith("\n")
    assert re.fullmatch(LOADED + "interrupted\n", result.err), result.err


@pytest.mark.skipif(sys.platform != "linux", reason="sees by /proc what a process has imported")
def test_ctrl_c_is_obeyed_at_once_while_jax_is_imported(tiny: pathlib.Path) -> None:
    process = start("--checkpoint", tiny, "--prompt", PROMPT)
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    while "jaxlib" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.01)
    assert interrupt(process) == Result(130, "", "interrupted\n")


SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]


@pytest.mark.parametrize(
    "begin",
    [
        f"runpy.run_path({run.__file__!r}, run_name='__main__')",
        "runpy.run_module('grok1', run_name='__main__')",
        f"__import__({SCRIPTS['grok-1'].partition(':')[0]!r})",
    ],
    ids=["script", "module", "installed"],
)
@pytest.mark.parametrize(("before", "status"), [("default_int_handler", 130), ("SIG_IGN", 1)])
def test_ctrl_c_in_an_import_shows_no_traceback(
    before: str, status: int, begin: str, tmp_path: pathlib.Path
) -> None:
    """Where it is ignored, as in the background of a shell script, it stays so."""
    (tmp_path / "socket.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(1)\nraise OSError"
    )
    program = f"""
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.{before})
sys.path[:0] = [sys.path[0], {str(tmp_path)!r}]  # the first one is that of the script
{begin}
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, "KeyboardInterrupt" in done.stderr) == (status, False)


def test_ctrl_c_is_obeyed_at_once_while_the_model_is_compiled(tiny: pathlib.Path) -> None:
    """In the main thread, it would wait for the compiler, and jax's callbacks could swallow it."""
    process = start("--checkpoint", tiny, "--prompt", PROMPT, "--no-compile-cache")
    assert process.stderr is not None
    loaded = process.stderr.readline().decode()
    time.sleep(0.5)  # The steps of prefill and decode take seconds to compile.
    result = interrupt(process)
    assert result.out == f"{PROMPT}\n"
    assert re.fullmatch(LOADED + "interrupted\n", loaded + result.err), result.err


def test_a_reader_that_leaves_ends_the_command_quietly(tiny: pathlib.Path) -> None:
    process = start("--checkpoint", tiny, "--prompt", PROMPT, "--max-len", 60)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(10)
    process.stdout.close()
    with process.stderr:
        err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 141
    assert re.fullmatch(LOADED, err), err
