"""Runs of several processes: the answers of one process, and how a lost process ends the others."""

import pathlib
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence

import numpy as np
import pytest

import golden
import reference
import run
from commands import COUNTED, Result
from paths import ROOT
from processes import IGNORE_INTERRUPT, MODEL, SLACK, TIMEOUT, Start, finish, place
from runner import Request

WORKER = ROOT / "tests/parallel/multihost_worker.py"
HOST = re.escape(socket.gethostname())
ASK = ("--checkpoint", MODEL, "--prompt-ids", "5 6 7", "--temperature", 0, "--mesh", "1,2")


def wait_for(*files: pathlib.Path) -> None:
    """Wait until all files exist."""
    deadline = time.monotonic() + 120
    while not all(file.exists() for file in files):
        assert time.monotonic() < deadline, f"never saw {files}"
        time.sleep(0.02)


def without_progress(err: str) -> str:
    """Standard error without the messages of a run that has not failed."""
    return re.sub(r"(?m)^(loaded|loading:|waiting for) [^\n]*\n", "", err)


# Answers.


def exact_scores(prompt: list[int], tokens: list[int]) -> np.ndarray:
    """Return the log probabilities [T, V] of each token of an answer, in float64."""
    sequence = np.array([[*prompt, *tokens]])
    logits = reference.forward(*golden.reference_model("three-layers"), sequence)[0]
    logits = logits[len(prompt) - 1 : -1]
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


@pytest.mark.parametrize(
    ("mesh", "output"),
    [
        ("2,2", ["--output", "/dev/stdout"]),
        pytest.param("1,2", ["--json"], marks=pytest.mark.exhaustive),
    ],
)
def test_answers_of_two_processes_are_exact(
    mesh: str, output: list[str], start: Start, address: str
) -> None:
    """The data axis lies between the processes, or the model axis.

    The other process has different options and settings of jax; those of process 0 are used. With
    random bits of its own it would go on with other tokens, which would change these log
    probabilities. It does not load its tokenizer, which does not fit the model: a run of token ids
    needs none. Standard output has only the answers, although gloo prints lines to it from C++.
    """
    asked = [*ASK[:4], "--prompt-ids", "9 8 7 6", "--max-len", 6, "--mesh", mesh, *output]
    script, devices = pathlib.Path(run.__file__), int(mesh[0])
    own = ["--prompt-ids", "1", "--no-kernels", "--tokenizer", ROOT / "tokenizer.model"]
    numerics = {"JAX_DEFAULT_PRNG_IMPL": "rbg"}
    second = start(script, *place(address, 1), *own, devices=devices, **numerics)
    first = finish(start(script, *place(address, 0), *asked, "--temperature", 1.5, devices=devices))
    assert finish(second) == (0, "", "")
    assert first.status == 0, first.err
    loaded = r"loaded [^\n]+ in [\d.]+ s: 3 layers, float32 activations, mesh \d,\d on cpu\n"
    said = re.sub(r"(?m)^(loading|answering): [^\n]*\n", "", first.err)  # only if it is slow
    assert re.fullmatch(loaded + COUNTED, said), first.err
    assert sorted(answer["prompt_ids"] for answer in first.answers) == [[5, 6, 7], [9, 8, 7, 6]]
    for answer in first.answers:
        tokens = answer["token_ids"]
        expected = exact_scores(answer["prompt_ids"], tokens)[range(6), tokens]
        np.testing.assert_allclose(answer["logprobs"], expected, rtol=0, atol=1e-5)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "mesh", "devices"),
    [
        *(("three-layers", mesh, 4) for mesh in ("1,8", "2,4", "4,2", "8,1")),
        ("twelve-layers", "1,8", 4),
        *(("three-layers", mesh, 8) for mesh in ("1,16", "2,8")),
    ],
)
def test_logits_and_scores_equal_those_of_one_process(
    name: str, mesh: str, devices: int, start: Start, address: str, tmp_path: pathlib.Path
) -> None:
    out, files, alone = tmp_path / "out.npz", golden.recorded(name), golden.runner(name)
    pair = [start(WORKER, "read", out, address, i, name, mesh, devices=devices) for i in range(2)]
    for process in pair:
        result = finish(process, 240)
        assert result.status == 0, result.err
    with np.load(out) as file:
        found = dict(file)
    assert golden.relative_error(found["logits"], alone.logits(files.tokens)).max() <= 1e-5
    expected = alone.score([[int(token) for token in files.tokens[0] if token]])[0]
    np.testing.assert_allclose(found["scores"], expected, rtol=1e-5, atol=1e-5)
    answers = alone.generate([Request(row["prompt"], 0.0, max_len=40) for row in files.greedy])
    expected = sum((answer.token_ids for answer in answers), [])
    assert found["greedy"].tolist() == expected and len(expected) > 40


# Losses.


def start_stopped(
    start: Start,
    address: str,
    directory: pathlib.Path,
    where: str,
    processes: int = 2,
    before: Sequence[str] = (),
) -> list[subprocess.Popen[bytes]]:
    """Start processes 0 and 1 of a run; wait until one has stopped as `where` tells the worker."""
    hooks = [WORKER, "run", directory, where]
    pair = [
        start(*hooks, *place(address, i, processes), *ASK, before=before, devices=1) for i in (0, 1)
    ]
    wait_for(directory / "stopped", directory / "waiting")
    return pair


def assert_lost(survivor: Result, victim: str, phase: str, how: str) -> None:
    """The survivor failed, and its error names the lost process, the phase and the reason."""
    assert survivor.status == 1
    sentence = (
        rf"error: process {victim} \(host {HOST}\) was lost during {phase}: {how}; "
        r"all processes end, start them again\n"
    )
    assert re.fullmatch(sentence, without_progress(survivor.err)), survivor.err


@pytest.mark.parametrize(
    ("victim", "where", "name"),
    [
        (0, "late", "SIGKILL"),
        (1, "decode", "SIGTERM"),
        (1, "prefill", "SIGSTOP"),
        *(
            pytest.param(*row, marks=pytest.mark.exhaustive)
            for row in [
                (0, "load", "SIGKILL"),
                (1, "load", "SIGKILL"),
                (0, "prefill", "SIGKILL"),
                (0, "decode", "SIGKILL"),
                (0, "load", "SIGSTOP"),
            ]
        ),
    ],
)
def test_lost_process_ends_the_other(
    victim: int, where: str, name: str, start: Start, address: str, tmp_path: pathlib.Path
) -> None:
    """In prefill and decode the survivor waits in a collective, which would wait forever.

    When process 0 dies, jax's coordination service dies with it: jax alone would abort the survivor
    within milliseconds, without naming the lost process. When jax handles SIGTERM itself (its
    preemption service), the process does not end.
    """
    pair = start_stopped(start, address, tmp_path, f"{victim}:{where}", before=IGNORE_INTERRUPT)
    pair[victim].send_signal(getattr(signal, name))
    began = time.monotonic()
    survivor = finish(pair[1 - victim], TIMEOUT + SLACK)
    seconds = time.monotonic() - began
    if name == "SIGSTOP":
        how = f"no sign of life for {TIMEOUT} s"
        assert seconds > TIMEOUT - 1
    else:
        how = r"its connection (was closed|broke [^\n]*)"
        assert seconds < SLACK + 2 * (where == "late")  # a closed connection needs no time-out
        assert pair[victim].wait(SLACK) == -getattr(signal, name)
    if where == "decode" and victim == 1:  # process 0 keeps the tokens that it has printed
        assert re.fullmatch(r"(\d+ ){2,3}\n", survivor.out), survivor.out
        tokens = [int(token) for token in survivor.out.split()]
        assert np.argmax(exact_scores([5, 6, 7], tokens), axis=-1).tolist() == tokens
    assert_lost(survivor, f"{victim} of 2", "load" if where == "late" else where, how)


def test_error_of_one_process_ends_the_other(
    start: Start, address: str, tmp_path: pathlib.Path
) -> None:
    """A file is missing on one host; jax would have this process wait until the others end."""
    (tmp_path / "ckpt-0").mkdir()
    (tmp_path / "config.json").write_bytes((MODEL / "config.json").read_bytes())
    first = start(run.__file__, *place(address, 0), *ASK, devices=1)
    own = ["--checkpoint", tmp_path]
    second = finish(start(run.__file__, *place(address, 1), *own, devices=1))
    assert second.status == 1
    assert re.fullmatch(rf"error: {tmp_path}/ckpt-0/tensor\S+ [^\n]*missing[^\n]*\n", second.err)
    reason = second.err.removeprefix("error: ")
    result = finish(first)
    assert (result.status, result.out) == (1, "")
    told = f"error: process 1 of 2 (host {socket.gethostname()}) ended: {reason}"
    assert without_progress(result.err) == told


@pytest.mark.parametrize(("victim", "name"), [(1, "SIGINT"), (0, "SIGKILL")])
def test_end_of_process_while_others_connect_ends_all(
    victim: int, name: str, start: Start, address: str, tmp_path: pathlib.Path
) -> None:
    """Two of three processes are connected."""
    pair = start_stopped(start, address, tmp_path, f"{victim}:start", 3)
    pair[victim].send_signal(getattr(signal, name))
    survivor = finish(pair[1 - victim], SLACK)
    if name == "SIGKILL":
        assert_lost(survivor, "0 of 3", "the start", r"its connection (was closed|broke [^\n]*)")
        return
    told = f"error: process 1 of 3 (host {socket.gethostname()}) ended: it was interrupted\n"
    assert (survivor.status, survivor.err) == (1, told)
    assert finish(pair[victim]) == (130, "", "interrupted\n")


def test_process_that_does_not_connect_is_named(start: Start, address: str) -> None:
    """jax would end the two processes that did connect with a trace that names none."""
    options = ["--join-timeout", 2, *ASK]
    running = [start(run.__file__, *place(address, i, 3), *options) for i in (0, 1)]
    for process in running:
        result = finish(process, 2 + TIMEOUT + SLACK)
        assert (result.status, result.out) == (1, "")
        assert re.fullmatch(
            rf"error: process 2 of 3 did not connect to {address} within 2 s; start all 3 [^\n]*\n",
            result.err,
        ), result.err
