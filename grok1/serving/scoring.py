"""Logits at every position of complete texts, and the log-probability of each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import jax
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
        parts = [np.asarray(part) for part in _read(model, logits_step, lengths, batch)]
        rows.append(np.concatenate(parts, axis=1)[: len(batch), : tokens.shape[1]])
    return np.concatenate(rows)


def score(model: LoadedModel, texts: Sequence[list[int]], bos: int) -> list[TokenScores]:
    """Return the log-probability of each token of each text; the first token follows `bos`.

    texts: token ids. A text longer than the context is read in windows that overlap by half, so
    that each token of a later window has at least half a context before it. Raises ValueError if a
    log-probability is NaN or infinite.
    """
    context = model.config.sequence_len
    scores, windows = [], []
    for index, ids in enumerate(texts):
        scores.append(TokenScores(np.zeros([len(ids)], np.float32), np.zeros([len(ids)], bool)))
        inputs = np.array([bos, *ids[:-1]], np.int32)
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
        tokens, targets = np.zeros([2, len(batch), lengths.max()], np.int32)
        for row, (_, _, inputs, wanted) in enumerate(batch):
            tokens[row, : len(inputs)], targets[row, : len(wanted)] = inputs, wanted
        parts = map(jax.device_get, _read(model, score_step, lengths, tokens, targets))
        found = [np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True)]
        for row, (index, start, inputs, _) in enumerate(batch):
            new = 0 if start == 0 else context - stride
            end = start + len(inputs)
            for whole, part in zip(scores[index], found, strict=True):
                whole[start + new : end] = part[row, new : len(inputs)]
    if not all(np.all(np.isfinite(score.logprobs)) for score in scores):
        raise ValueError(not_finite(model.hooks))
    return scores


def check_length(config: LanguageModelConfig, length: int) -> None:
    """Raise ValueError if a text has more tokens than the context."""
    if length > config.sequence_len:
        raise ValueError(
            f"expected at most the context of {config.sequence_len} tokens, got {length}"
        )


def _read(
    model: LoadedModel,
    step: Callable[..., tuple[Result, Memory]],
    lengths: np.ndarray,
    *arrays: np.ndarray,
) -> Iterator[Result]:
    """Run `step` over int arrays [<= B, T] in chunks of one compiled length.

    lengths: int [<= B], number of real tokens in each row.
    """
    rows, length = arrays[0].shape
    size = next((s for s in model.pad_sizes if s >= length), model.pad_sizes[-1])
    padded = -(-length // size) * size
    whole = np.zeros([len(arrays), model.num_slots, padded], np.int32)
    whole[:, :rows, :length] = arrays
    where = {"config": model.config, "execution": model.executions.prefill}
    memory = new_memory(**where, batch=model.num_slots)
    step = with_hooks(step, model.hooks)
    real = np.zeros([model.num_slots], np.int32)
    real[:rows] = lengths
    for first in range(0, padded, size):
        chunk = whole[:, :, first : first + size]
        count = np.clip(real - first, 0, size)
        with uninterrupted():  # jax and haiku cannot handle an exception while tracing
            result, memory = step(
                model.params, memory, count, *chunk, **where, hook_args=model.hook_args
            )
        yield result
