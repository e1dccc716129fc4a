"""A table of the experts of each token, for a terminal; readable without colour."""

from collections.abc import Sequence
from typing import TextIO

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from grok1.cli.console import write_out

# One per expert, repeated after eight: the colours that every terminal distinguishes.
STYLES = "red", "green", "yellow", "blue", "magenta", "cyan", "bright_white", "bright_black"
TOKEN_WIDTH = 14


def print_routing(
    pieces: Sequence[str], expert_index: np.ndarray, num_experts: int, file: TextIO | None = None
) -> None:
    """Print one row per token with its experts in each layer, best first, then the load.

    pieces: the text of each token. expert_index: int [L, T, A]. Layers that do not fit a line go
    into further tables. There is no colour or bold if `file` is not a terminal, and no colour if
    NO_COLOR is set.
    """
    console = Console(file=file, highlight=False)
    layers, tokens, chosen = expert_index.shape
    digits = len(str(num_experts - 1))
    between = "" if digits == 1 else "."
    cell = max(chosen * digits + (chosen - 1) * len(between), len(str(layers - 1)))
    console.width = max(console.width, TOKEN_WIDTH + cell + 1)  # avoids empty lines by rich
    fitting = max(1, (console.width - TOKEN_WIDTH) // (cell + 1))
    names = [_printable(piece) for piece in pieces]
    # Captured, as rich would exit the process if a pipe has no reader.
    with console.capture() as shown:
        for first in range(0, layers, fitting):
            block = range(first, min(first + fitting, layers))
            header = Text(f"{'layer':{TOKEN_WIDTH}}")
            header.append("".join(f" {layer:>{cell}}" for layer in block), style="dim")
            console.print(header, no_wrap=True)
            for token in range(tokens):
                line = Text(names[token])
                for layer in block:
                    experts = [int(expert) for expert in expert_index[layer, token]]
                    line.append(" " * (1 + cell - chosen * digits - (chosen - 1) * len(between)))
                    for rank, expert in enumerate(experts):
                        line.append(between if rank else "")
                        line.append(f"{expert:>{digits}}", style=_style(expert, rank))
                console.print(line, no_wrap=True)
            console.print()
        load = np.bincount(expert_index.reshape(-1), minlength=num_experts)[:num_experts]
        shares = Text(f"{'load':{TOKEN_WIDTH}}")
        for expert, count in enumerate(load):
            shares.append(f" {expert}:", style=_style(expert, 0))
            shares.append(f"{count / load.sum():.0%}")
        console.print(shares)
    write_out(shown.get(), end="", file=file)


def _style(expert: int, rank: int) -> str:
    """Return the style of an expert: its colour, and bold for the best one of a token."""
    return ("bold " if rank == 0 else "") + STYLES[expert % len(STYLES)]


def _printable(piece: str) -> str:
    """Return a token's text in the width of its column, with invisible characters escaped."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in piece)
    if cell_len(shown) >= TOKEN_WIDTH:
        shown = set_cell_size(shown, TOKEN_WIDTH - 2) + "…"
    return set_cell_size(shown, TOKEN_WIDTH)
