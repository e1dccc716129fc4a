"""The pictures of the notebooks: arrays in, a matplotlib figure out."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

EXPERTS = plt.get_cmap("tab10")


def _seen(pieces: Sequence[str]) -> list[str]:
    """Return the texts of tokens as labels: what would be blank has a sign."""
    return [piece.strip(" ").replace("\n", "\\n") or "␣" for piece in pieces]


def routing(expert_index: np.ndarray, pieces: Sequence[str], num_experts: int) -> Figure:
    """Draw the first expert of each token in each layer; expert_index int [L, T, A]."""
    layers, tokens, _ = expert_index.shape
    figure, axes = plt.subplots(
        figsize=(max(6, 0.5 * tokens), 1.6 + 0.5 * layers), layout="constrained"
    )
    colours = EXPERTS.resampled(max(10, num_experts))
    image = axes.imshow(
        expert_index[..., 0], cmap=colours, vmin=-0.5, vmax=colours.N - 0.5, aspect="auto"
    )
    for layer in range(layers):
        for token in range(tokens):
            first, second = expert_index[layer, token, :2]
            axes.text(token, layer, f"{first}·{second}", ha="center", va="center", fontsize=11)
    axes.set(xlabel="token", ylabel="layer", title="the two experts of each token")
    axes.set_xticks(range(tokens), _seen(pieces), rotation=60, ha="right", fontsize=11)
    axes.set_yticks(range(layers))
    bar = figure.colorbar(image, ticks=range(num_experts), label="best expert", pad=0.01)
    bar.ax.set_ylim(-0.5, num_experts - 0.5)
    return figure


def bars(values: np.ndarray, title: str, x: str, y: str, even: float | None = None) -> Figure:
    """Draw a group of bars for each row of values [L, N]; even: a dashed line at that height."""
    rows, count = values.shape
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for row, heights in enumerate(values):
        place = np.arange(count) + 0.8 * (row - rows / 2 + 0.5) / rows
        colour = plt.get_cmap("viridis")(row / max(1, rows))
        axes.bar(place, heights, 0.8 / rows, label=f"layer {row}", color=colour)
    if even is not None:
        axes.axhline(even, color="grey", linestyle="--", linewidth=1, label=f"even: {even:g}")
    axes.set(title=title, xlabel=x, ylabel=y, xticks=range(count))
    axes.legend(fontsize=7, ncols=2)
    return figure


def lines(curves: dict[str, Any], title: str, x: str, y: str, log: bool = False) -> Figure:
    """Draw a line a name: (x values, y values), or y values alone; x values are whole numbers.

    Each has a sign of its own, the first the largest, so that equal ones can be told apart.
    """
    figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
    for number, (name, curve) in enumerate(curves.items()):
        points = curve if isinstance(curve, tuple) else (curve,)
        sign, size = "os^v"[number % 4], max(3, 9 - 3 * number)
        axes.plot(*points, linewidth=1, label=name, marker=sign, markersize=size)
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if log:
        axes.set_yscale("log")
    if len(curves) > 1:
        axes.legend(fontsize=8)
    return figure


def attention(weights: np.ndarray, heads: Sequence[tuple[int, int]], pieces: Any) -> Figure:
    """Draw what queries (down) take of keys (across), weights [L, N, T, S], of (layer, head)s."""
    figure, all_axes = plt.subplots(
        1, len(heads), figsize=(3.7 * len(heads), 3.6), squeeze=False, layout="constrained"
    )
    for axes, (layer, head) in zip(all_axes[0], heads, strict=True):
        image = axes.imshow(weights[layer, head], cmap="magma", vmin=0)
        figure.colorbar(image, ax=axes, shrink=0.6, pad=0.02)
        axes.set_title(f"layer {layer}, head {head}", fontsize=9)
        axes.set_xticks(range(len(pieces)), _seen(pieces), rotation=90, fontsize=6)
        axes.set_yticks(range(len(pieces)), _seen(pieces), fontsize=6)
    all_axes[0][0].set(xlabel="key", ylabel="query")
    return figure


def lens(words: Sequence[Sequence[str]], shares: np.ndarray, pieces: Sequence[str]) -> Figure:
    """Draw the likeliest next token by layer (words [L][T]) and its probability, shares [L, T]."""
    layers, tokens = shares.shape
    figure, axes = plt.subplots(
        figsize=(max(6, 0.6 * tokens), 1.4 + 0.5 * layers), layout="constrained"
    )
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for layer, row in enumerate(words):
        for token, word in enumerate(_seen(row)):
            colour = "white" if shares[layer, token] > 0.5 else "black"
            axes.text(token, layer, word, ha="center", va="center", fontsize=10, color=colour)
    axes.set(
        xlabel="token", ylabel="after layer", title="the next token, if this layer were the last"
    )
    axes.set_xticks(range(tokens), _seen(pieces), rotation=60, ha="right", fontsize=11)
    axes.set_yticks(range(layers))
    figure.colorbar(image, label="probability", pad=0.01)
    return figure


def heat(
    values: np.ndarray, title: str, x: str, y: str, label: str, columns: Sequence[str] | None = None
) -> Figure:
    """Draw an array [rows, columns], zero in white; columns: their names, in place of numbers."""
    most = float(np.abs(values).max()) or 1.0
    rows, wide = values.shape
    figure, axes = plt.subplots(
        figsize=(max(6, 0.6 * wide), 1.4 + 0.4 * rows), layout="constrained"
    )
    image = axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set(title=title, xlabel=x, ylabel=y)
    for row, column in np.ndindex(rows, wide):
        value = f"{values[row, column]:.1f}".replace("-0.0", "0.0")
        colour = "white" if abs(values[row, column]) > 0.6 * most else "black"
        axes.text(column, row, value, ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(wide), columns and _seen(columns))
    if columns:
        axes.tick_params("x", rotation=60)
    axes.set_yticks(range(rows))
    figure.colorbar(image, label=label, pad=0.01)
    return figure
