"""Logits at every position of complete texts, and the log-probability of each token."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from grok1.interrupts import uninterrupted
from grok1.ops.cache import Memory
from grok1.serving.hooked import not_finite, with_hooks
from grok1.serving.request import encode
from grok1.serving.steps import LoadedModel, logits_step, new_memory, score_step

if TYPE_CHECKING:
    from model import LanguageModelConfig


Result = TypeVar("Result")


class TokenScores(NamedTuple):
    """For each token: logprobs float32 [T]; greedy bool [T], whether it is the most probable."""

    logprobs: np.ndarray
    greedy: np.ndarray


def logits(model: LoadedModel, token_ids: ArrayLike) -> np.ndarray:
    """Return the float32 logits [B, T, V] of int token ids [B, T] (or [T], as one row).

    Raises ValueError if T exceeds the context or an id is out of range.
    """
    try:
        tokens = np.asarray(token_ids)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
    except ValueError as error:
        raise ValueError("expected token ids [B, T], got rows of different lengths") from error
    if tokens.ndim != 2 or not tokens.size or tokens.dtype.kind not in "iu":
        raise ValueError(
            f"expected integer token ids [B, T], got {tokens.dtype} {list(tokens.shape)}"
        )
    check_length(model.config, tokens.shape[1])
    encode(tokens.reshape(-1).tolist(), model.config, None)
    rows = []
    for first in range(0, len(tokens), model.num_slots):
        batch = tokens[first : first + model.num_slots]
        lengths = np.full([len(batch)], tokens.shape[1])
        parts, _ = _read(model, logits_step, _new_memory(model), lengths, batch)
        rows.append(np.concatenate(parts, axis=1)[: len(batch), : tokens.shape[1]])
    return np.concatenate(rows)


def score(
    model: LoadedModel, texts: Sequence[list[int]], before: Sequence[int]
) -> list[TokenScores]:
    """Return the log-probability of each token of each text.

    texts: token ids. before: the token before each text, such as [BOS]. A text longer than the
    context is read in windows that overlap by half, so that each token of a later window has at
    least half a context before it. Raises ValueError if a log-probability is NaN or infinite.
    """
    context = model.config.sequence_len
    scores, windows = [], []
    for index, ids in enumerate(texts):
        scores.append(TokenScores(np.zeros([len(ids)], np.float32), np.zeros([len(ids)], bool)))
        inputs = np.array([before[index], *ids[:-1]], np.int32)
        stride = max(1, context // 2)
        # The last window is the first one that reaches the end of the text.
        for start in range(0, max(len(ids) - context, 0) + stride, stride):
            if not ids:
                break
            end = min(start + context, len(ids))
            windows.append((index, start, inputs[start:end], np.array(ids[start:end])))
    windows.sort(key=lambda window: -len(window[2]))  # batch windows of similar lengths
    for first in range(0, len(windows), model.num_slots):
        batch = windows[first : first + model.num_slots]
        lengths = np.array([len(window[2]) for window in batch])
        tokens, targets = (_pad(rows) for rows in zip(*(w[2:] for w in batch), strict=True))
        parts, _ = _read(model, score_step, _new_memory(model), lengths, tokens, targets)
        found = [np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)]
        for row, (index, start, inputs, _) in enumerate(batch):
            new = 0 if start == 0 else context - stride
            end = start + len(inputs)
            for whole, part in zip(scores[index], found, strict=True):
                whole[start + new : end] = part[row, new : len(inputs)]
    _check_finite(model, scores)
    return scores


def score_continuations(
    model: LoadedModel, pairs: Sequence[tuple[list[int], list[int]]], bos: int
) -> list[TokenScores]:
    """Return the scores of the second text of each pair, which follows the first one or `bos`.

    A first text that several pairs have is read once, unless a second text is empty or does not fit
    into the context with it. Raises ValueError like `score`.
    """
    followed: dict[tuple[int, ...], list[int]] = collections.defaultdict(list)
    for index, (first, _) in enumerate(pairs):
        followed[tuple(first) or (bos,)].append(index)
    room = model.config.sequence_len + 1  # the last token is not read
    shared = {
        first: own
        for first, own in followed.items()
        if len(own) > 1 and all(0 < len(pairs[i][1]) <= room - len(first) for i in own)
    }
    found: dict[int, TokenScores] = {}
    order = sorted(shared, key=len, reverse=True)  # batch texts of similar lengths
    for start in range(0, len(order), model.num_slots):
        batch = order[start : start + model.num_slots]
        seconds = [{i: pairs[i][1] for i in shared[first]} for first in batch]
        found |= _score_after(model, batch, seconds)
    alone = [i for i in range(len(pairs)) if i not in found]
    whole = [(pairs[i][0] or [bos]) + pairs[i][1] for i in alone]
    scored = score(model, [ids[1:] for ids in whole], [ids[0] for ids in whole])
    for i, scores in zip(alone, scored, strict=True):
        found[i] = TokenScores(*(each[len(each) - len(pairs[i][1]) :] for each in scores))
    _check_finite(model, found.values())
    return [found[i] for i in range(len(pairs))]


def _score_after(
    model: LoadedModel, firsts: Sequence[Sequence[int]], seconds: Sequence[dict[int, list[int]]]
) -> dict[int, TokenScores]:
    """Read first texts [<= B], then each of the texts that follow each of them, by their names."""
    lengths = np.array([len(first) - 1 for first in firsts])
    before = _pad([first[:-1] for first in firsts])  # the last one predicts the next text
    _, memory = _read(model, score_step, _new_memory(model), lengths, before, before)
    found = {}
    for names in itertools.zip_longest(*seconds):
        texts = [own.get(name, []) for name, own in zip(names, seconds, strict=True)]
        lasts = [[first[-1], *text][: len(text)] for first, text in zip(firsts, texts, strict=True)]
        # The memory is given away; what is written after the first texts is overwritten later.
        step, valid = jnp.copy(memory.layers.step), jnp.copy(memory.valid)
        lengths = np.array([len(text) for text in texts])
        parts, memory = _read(model, score_step, memory, lengths, _pad(lasts), _pad(texts))
        memory = Memory(memory.layers._replace(step=step), valid)
        scores = [np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)]
        for row, name in enumerate(names):
            if name is not None:
                found[name] = TokenScores(*(each[row, : lengths[row]] for each in scores))
    return found


def _pad(rows: Sequence[Sequence[int] | np.ndarray]) -> np.ndarray:
    """Return token ids int32 [rows, T], where T is the length of the longest row."""
    padded = np.zeros([len(rows), max(map(len, rows))], np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded


def _check_finite(model: LoadedModel, scores: Iterable[TokenScores]) -> None:
    if not all(np.all(np.isfinite(each.logprobs)) for each in scores):
        raise ValueError(not_finite(model.hooks))


def check_length(config: LanguageModelConfig, length: int) -> None:
    """Raise ValueError if a text has more tokens than the context."""
    if length > config.sequence_len:
        raise ValueError(
            f"expected at most the context of {config.sequence_len} tokens, got {length}"
        )


def _read(
    model: LoadedModel,
    step: Callable[..., tuple[Result, Memory]],
    memory: Memory,
    lengths: np.ndarray,
    *arrays: np.ndarray,
) -> tuple[list[Result], Memory]:
    """Run `step` over int arrays [<= B, T] in chunks of one compiled length.

    memory: what precedes the texts; it is given away. lengths: int [<= B], number of real tokens in
    each row. Returns the result of each chunk, as NumPy arrays, and the memory.
    """
    rows, length = arrays[0].shape
    size = next((s for s in model.pad_sizes if s >= length), model.pad_sizes[-1])
    padded = -(-length // size) * size
    whole = np.zeros([len(arrays), model.num_slots, padded], np.int32)
    whole[:, :rows, :length] = arrays
    step, results = with_hooks(step, model.hooks), []
    real = np.zeros([model.num_slots], np.int32)
    real[:rows] = lengths
    for first in range(0, padded, size):
        chunk = whole[:, :, first : first + size]
        count = np.clip(real - first, 0, size)
        with uninterrupted():  # jax and haiku cannot handle an exception while tracing
            result, memory = step(
                model.params, memory, count, *chunk, **_where(model), hook_args=model.hook_args
            )
        results.append(jax.device_get(result))
    return results, memory


def _new_memory(model: LoadedModel) -> Memory:
    return new_memory(**_where(model), batch=model.num_slots)


def _where(model: LoadedModel) -> dict[str, Any]:
    return {"config": model.config, "execution": model.executions.prefill}
