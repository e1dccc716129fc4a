"""The table of which experts tokens went to: with and without colour, narrow and wide."""

import io
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.cells import cell_len

from grok1.cli import parsing
from grok1.cli.routing_table import print_routing
from paths import ROOT
from runner import Request, load_server

PIECES = ["Once", " upon\n", "字" * 20, "a" * 40]
INDEX = np.random.default_rng(0).permuted(np.tile(np.arange(8), (5, 4, 1)), axis=-1)[..., :2]


def table(pieces, index, experts, columns, monkeypatch, **environment):
    monkeypatch.setenv("COLUMNS", str(columns))
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    file = io.StringIO()
    print_routing(pieces, index, experts, file)
    return file.getvalue()


def behind_token(line):
    """Return what stands behind the token's column: characters may be two cells wide."""
    end = next(i for i in range(len(line)) if cell_len(line[:i]) == 14)
    return line[end:]


def cells(text):
    """Return the rows of each block of layers as lists of words behind the token's column."""
    return [
        [behind_token(line).split() for line in block.splitlines()]
        for block in text.split("\n\n")
        if block.startswith("layer")
    ]


def rows_of(layers):
    """Return the block of these layers as `cells` finds it."""
    rows = [["".join(map(str, INDEX[layer, t])) for layer in layers] for t in range(4)]
    return [[*map(str, layers)], *rows]


def test_every_token_has_a_row_and_every_layer_a_column(monkeypatch):
    text = table(["Once", " upon\n", " a", "time"], INDEX, 8, 80, monkeypatch)
    ((header, *rows),) = cells(text)
    assert header == ["0", "1", "2", "3", "4"]
    assert rows == [["".join(map(str, INDEX[layer, t])) for layer in range(5)] for t in range(4)]
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


@pytest.mark.parametrize("columns", [1, 10, 16])
def test_a_terminal_too_narrow_for_one_layer_gets_one_all_the_same(columns, monkeypatch):
    text = table(PIECES, INDEX, 8, columns, monkeypatch)
    assert cells(text) == [rows_of((layer,)) for layer in range(5)]


def test_experts_of_two_digits_are_kept_apart(monkeypatch):
    text = table(["a"], np.array([[[3, 11]]]), 16, 80, monkeypatch)
    assert text.splitlines()[1].split() == ["a", "3.11"]


def test_colour_adds_nothing_but_colour(monkeypatch):
    plain = table(PIECES, INDEX, 8, 80, monkeypatch)
    colourful = table(PIECES, INDEX, 8, 80, monkeypatch, FORCE_COLOR="1", TERM="xterm")
    assert "\x1b[" in colourful and "\x1b[" not in plain
    assert re.sub(r"\x1b\[[\d;]*m", "", colourful) == plain


def test_the_command_shows_what_the_runner_finds():
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", "--prompt", "Once upon a time", "--max-len", "5"]
        + ["--temperature", "0", "--show-routing", "--prompt-ids", "5 6 7"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    titles = [line for line in done.stdout.splitlines() if line.startswith("experts of")]
    assert titles == [f"experts of [{i}], best first" for i in (1, 2)]
    blocks = cells(re.sub("experts of.*\n", "", done.stdout[done.stdout.index("experts of") :]))
    server = load_server(ROOT / "checkpoints/demo", ROOT / "tokenizer.model")
    (answer,) = server.generate([Request("Once upon a time", temperature=0, max_len=5)])
    ids = [*answer.prompt_ids, *answer.token_ids]
    index = server.inspect(ids, ("expert_index",)).captured.expert_index
    wanted = [
        ["".join(map(str, index[:, t][layer])) for layer in range(4)] for t in range(len(ids))
    ]
    assert blocks[0][1:] == wanted
    assert len(blocks) == 2 and len(blocks[1]) == 1 + 3 + 5
    assert "\x1b[" not in done.stdout


@pytest.mark.parametrize(
    "other", [["--json"], ["--output", "x"], ["--interactive"], ["--distributed"], ["--plan"]]
)
def test_a_table_goes_with_nothing_that_is_for_programs(other, capsys):
    with pytest.raises(SystemExit) as error:
        parsing.parse_arguments(["--show-routing", *other])
    assert error.value.code == 2
    sentence = f"--show-routing and {other[0]} do not go together: it prints a text table"
    assert sentence in capsys.readouterr().err


def test_a_pipe_without_a_reader_is_told_to_the_caller():
    """rich would end the process with status 1."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as file, pytest.raises(BrokenPipeError):
        print_routing(PIECES, INDEX, 8, file)
