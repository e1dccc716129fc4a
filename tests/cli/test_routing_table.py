"""The table of the experts of each token: with and without colour, narrow and wide."""

import io
import os
import re

import numpy as np
import pytest
from rich.cells import cell_len

from grok1 import default_files
from grok1.cli.routing_table import print_routing
from runner import load_model

PIECES = ["Once", " upon\n", "字" * 20, "a" * 40]
INDEX = np.random.default_rng(0).permuted(np.tile(np.arange(8), (5, 4, 1)), axis=-1)[..., :2]


def table(pieces, index, experts, columns, monkeypatch, **environment):
    """Return the table printed in a terminal of so many columns."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = io.StringIO()
    print_routing(pieces, index, experts, file)
    return file.getvalue()


def after_token(line):
    """Return what follows the column of tokens, whose characters may be two cells wide."""
    end = next(i for i in range(len(line)) if cell_len(line[:i]) == 14)
    return line[end:]


def cells(text):
    """Return the rows of each block of layers, as lists of the words after the token."""
    return [
        [after_token(line).split() for line in block.splitlines()]
        for block in text.split("\n\n")
        if block.startswith("layer")
    ]


def rows_of(layers, index=INDEX):
    """Return the block of these layers as `cells` finds it."""
    tokens = range(index.shape[1])
    rows = [["".join(map(str, index[layer, t])) for layer in layers] for t in tokens]
    return [[*map(str, layers)], *rows]


def test_table_has_row_per_token_and_column_per_layer(monkeypatch):
    text = table(["Once", " upon\n", " a", "time"], INDEX, 8, 80, monkeypatch)
    assert cells(text) == [rows_of(range(5))]
    assert text.splitlines()[2].startswith(r" upon\n")
    shares = np.bincount(INDEX.reshape(-1), minlength=8) / INDEX.size
    words = text.splitlines()[-1].split()
    assert words == ["load", *(f"{expert}:{share:.0%}" for expert, share in enumerate(shares))]


def test_layers_that_do_not_fit_go_into_further_tables(monkeypatch):
    text = table(PIECES, INDEX, 8, 21, monkeypatch)
    assert cells(text) == [rows_of((0, 1)), rows_of((2, 3)), rows_of((4,))]
    for line in text.splitlines():
        assert cell_len(line) <= 21
    load = text.partition("load")[2].split()
    assert [entry.partition(":")[0] for entry in load] == list("01234567")


def test_narrowest_terminal_shows_one_layer_a_table(monkeypatch):
    for columns in (1, 16):
        text = table(PIECES, INDEX, 8, columns, monkeypatch)
        assert cells(text) == [rows_of((layer,)) for layer in range(5)]


def test_experts_of_two_digits_are_separated(monkeypatch):
    text = table(["a"], np.array([[[3, 11]]]), 16, 80, monkeypatch)
    assert text.splitlines()[1].split() == ["a", "3.11"]


def test_text_is_the_same_with_colour(monkeypatch):
    plain = table(PIECES, INDEX, 8, 80, monkeypatch)
    colourful = table(PIECES, INDEX, 8, 80, monkeypatch, FORCE_COLOR="1", TERM="xterm")
    assert "\x1b[" in colourful and "\x1b[" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", colourful) == plain


def test_command_shows_experts_of_prompt_and_answer(tiny, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    prompts = ["--prompt", "Once upon a time", "--prompt-ids", "5 6 7 8"]
    options = ["--max-len", 5, "--temperature", 0, "--batch", 1]
    out = command("--checkpoint", tiny, *prompts, *options, "--show-routing").out
    titles = [line for line in out.splitlines() if line.startswith("experts of")]
    assert titles == [f"experts of [{i}], best first" for i in (1, 2)]
    blocks = cells(re.sub("experts of.*\n", "", out[out.index("experts of") :]))
    server = load_model(tiny, default_files.TOKENIZER, slots=1)
    answers = server.generate(["Once upon a time", [5, 6, 7, 8]], temperature=0, max_len=5)
    for block, answer in zip(blocks, answers, strict=True):
        found = server.inspect([*answer.prompt_ids, *answer.token_ids], ("expert_index",))
        assert block == rows_of((0, 1), found.captured.expert_index)
    assert "\x1b[" not in out


def test_pipe_without_a_reader_is_an_error_of_the_call():
    """rich would end the process with status 1."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as file, pytest.raises(BrokenPipeError):
        print_routing(PIECES, INDEX, 8, file)
