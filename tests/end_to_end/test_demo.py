"""The demo model of the repository."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

import evaluate_demo
from demo_corpus import read_documents
from paths import DATA, ROOT
from runner import load_server

DEMO = ROOT / "checkpoints" / "demo"
VALIDATION = DATA / "stories_valid.txt.gz"
PROMPT = ("--prompt", "Once upon a time", "--max-len", "120")


def run(*arguments: str) -> str:
    """Run the command in another directory, and return its standard output."""
    environment = {name: os.environ[name] for name in os.environ if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, ROOT / "run.py", "--checkpoint", DEMO, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
        env=environment,
    ).stdout


def test_it_writes_english_within_half_a_minute():
    """With the command of README.md."""
    began = time.perf_counter()
    text = run(*PROMPT, "--seed", "1", "--temperature", "0.7")
    assert time.perf_counter() - began < 30
    assert text.startswith("Once upon a time")
    # Almost every word is also in the held-out stories.
    known = set(re.findall(r"[a-z']+", " ".join(read_documents(VALIDATION)).lower()))
    words = re.findall(r"[a-z']+", text.lower())
    assert len(words) > 60
    assert sum(word in known for word in words) / len(words) > 0.9


@pytest.mark.exhaustive
def test_greedy_float32_text_is_the_same_on_every_mesh():
    arguments = (*PROMPT, "--temperature", "0", "--dtype", "float32", "--json")
    answers = [json.loads(run(*arguments, "--mesh", mesh)) for mesh in ("1,1", "1,8", "2,4")]
    assert len(answers[0]["token_ids"]) == 120 or answers[0]["finish_reason"] == "eos"
    for answer in answers[1:]:
        assert answer["text"] == answers[0]["text"]
        assert answer["token_ids"] == answers[0]["token_ids"]


def test_its_files_are_small():
    files = [ROOT / "tokenizer.model", *(path for path in DEMO.rglob("*") if path.is_file())]
    assert sum(path.stat().st_size for path in files) < 24e6


@pytest.mark.exhaustive
def test_held_out_likelihood_is_that_of_the_model_card():
    server = load_server(
        DEMO, ROOT / "tokenizer.model", slots=4, dtype="float32", pad_sizes=(evaluate_demo.CHUNK,)
    )
    nats = evaluate_demo.nats_per_byte(server, read_documents(VALIDATION))
    assert nats <= 1.00
    card = (ROOT / "checkpoints" / "README.md").read_text()
    assert f"{nats:.3f} nats per byte" in card


def test_story_is_more_probable_than_words_reversed():
    server = load_server(DEMO, ROOT / "tokenizer.model", slots=2, pad_sizes=(128,))
    text = read_documents(VALIDATION)[0][:300]
    scores, backwards = server.score([text, " ".join(reversed(text.split(" ")))])
    assert len(scores) == len(server.encode(text))
    assert scores.sum() > backwards.sum() + 20
