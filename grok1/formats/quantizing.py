"""Round the stored matrices of experts to 4 bits, a block at a time, on all cores."""

import itertools
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import ml_dtypes
import numpy as np

from grok1.formats import values
from grok1.formats.pickle_file import Located, StoredLeaf
from grok1.ops.quantization import QuantizedWeight
from grok1.ops.quantize_4bit import quantize_4bit

BLOCK = 1 << 21  # values of a block, about: each thread has one in memory
WORKERS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Rounded(NamedTuple):
    """The arrays of a QuantizedWeight4bit: int8 [..., I / 2, O] and bfloat16 [..., J, O]."""

    weight: np.ndarray
    scales: np.ndarray


def in_4_bits(leaf: StoredLeaf, name: str, group: int) -> Rounded:
    """Read a stored matrix [..., I, O], floats or int8 with scales, and round it to 4 bits.

    group: rows that share a scale; it divides I. Raises the errors of `values.read_box`, and
    CheckpointError, in which the matrix is called `name`, if the file changes or is not finite.
    """
    source = leaf.weight if isinstance(leaf, QuantizedWeight) else leaf
    scales = _read(leaf.scales, name) if isinstance(leaf, QuantizedWeight) else None
    *lead, rows, columns = source.shape
    rounded = Rounded(
        np.empty((*lead, rows // 2, columns), np.int8),
        np.empty((*lead, rows // group, columns), ml_dtypes.bfloat16),
    )

    def work(at: tuple[int, ...], first: int, end: int) -> None:
        box = (*(slice(i, i + 1) for i in at), slice(first, end), slice(0, columns))
        block = np.empty((end - first, columns), source.dtype)
        with values.open_values(source, name) as file:
            values.read_box(file, source, box, block)
        values.require_finite(block, source, name)
        numbers = block.astype(np.float32)
        if scales is not None:
            each = rows // scales.shape[-2]
            numbers *= scales[at][np.arange(first, end) // each].astype(np.float32)
        found = quantize_4bit(numbers, group)
        rounded.weight[at][first // 2 : end // 2] = found.weight
        rounded.scales[at][first // group : end // group] = found.scales

    with ThreadPoolExecutor(WORKERS) as pool:
        for done in [pool.submit(work, *block) for block in _blocks(source, group)]:
            done.result()
    return rounded


def _blocks(array: Located, group: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield blocks of complete groups: the index of a matrix, its first row, and the end."""
    *lead, rows, columns = array.shape
    step = group * max(1, BLOCK // (group * columns))
    for at in itertools.product(*map(range, lead)):
        for first in range(0, rows, step):
            yield at, first, min(first + step, rows)


def _read(array: Located, name: str) -> np.ndarray:
    """Return all values of an array."""
    flat = np.empty(math.prod(array.shape), array.dtype)
    filled = 0
    for piece in values.read_pieces(array, name):
        flat[filled : filled + piece.size] = piece
        filled += piece.size
    return flat.reshape(array.shape)
