"""What a token costs one CPU that uses the files of a checkpoint in place, as its memory."""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from grok1.formats import mapped
from grok1.host_memory import available_memory
from grok1.ops.quantization import Shapes
from grok1.parameters import embedding_table
from grok1.planning.text import gigabytes

if TYPE_CHECKING:
    from model import LanguageModelConfig

MEASURED = 256 << 20  # bytes of a file that are read for the rate of its disk
MOST_SECONDS = 0.3  # that this may take
PIECE = 8 << 20


@dataclasses.dataclass(frozen=True)
class InPlace:
    """Bytes of a checkpoint, and what reading them takes.

    total: of all files that are used. touched: by one token. copied: of memory for the embedding
    table, if activations have another type. memory: available for the files, or None.
    rate: of the disk, in bytes a second, None if it is unknown or not needed. share: of the files
    that memory can hold. token_s, chunk_s: seconds for a token, and for a chunk of a prompt that
    uses all experts, once memory is full; they are projections from the disk's rate alone.
    """

    total: int
    touched: int
    copied: int
    memory: int | None
    rate: float | None
    share: float
    token_s: float | None
    chunk_s: float | None


def estimate(
    config: LanguageModelConfig, stored: Shapes | None, directory: Path | None, held: int = 0
) -> InPlace:
    """Return the costs for a model with weights of these types, by default those of the model.

    directory: of the checkpoint, whose disk is measured. held: bytes of memory that are still to be
    taken for something else.
    """
    stored = stored or config.param_shapes()
    always, experts = used_bytes(config, stored)
    total, chosen = always + experts, config.model.num_selected_experts / config.model.num_experts
    touched = round(always + chosen * experts)
    memory = available_memory()
    memory = None if memory is None else max(0, memory - held)
    share = 1.0 if memory is None else min(1.0, memory / total)
    rate = None if directory is None or share == 1 else disk_rate(directory)
    token, chunk = (
        None if rate is None else (1 - share) * size / rate for size in (touched, total)
    )
    if rate is not None and memory is not None and memory < touched:
        unheld = experts - max(0, memory - always)  # as mapped.py keeps what is always used
        token = (max(0, always - memory) + chosen * unheld) / rate
    copied = copied_bytes(config, stored)
    return InPlace(total, touched, copied, memory, rate, share, token, chunk)


def copied_bytes(config: LanguageModelConfig, stored: Shapes) -> int:
    """Return the bytes of memory for the embedding table, 0 if its file is used in place."""
    table, dtype = embedding_table(stored), np.dtype(config.fprop_dtype)
    return 0 if table.dtype == dtype else math.prod(table.shape) * dtype.itemsize


def used_bytes(config: LanguageModelConfig, stored: Shapes) -> tuple[int, int]:
    """Return the bytes of a checkpoint that each token uses, and those of the experts."""
    experts = others = 0
    for module, leaves in stored.items():
        own = sum(map(_nbytes, jax.tree.leaves(leaves)))
        if mapped.EXPERTS in f"{module}/":
            experts += own
        else:
            others += own
    table = embedding_table(stored)
    if copied_bytes(config, stored):
        others -= _nbytes(table)
    elif rounded := mapped.rounded_stacks(table):  # few rows of the table itself are read
        others += sum(_nbytes(stack.array) for stack in rounded) - _nbytes(table)
    return others, experts


def _nbytes(array: jax.ShapeDtypeStruct) -> int:
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def disk_rate(directory: Path) -> float | None:
    """Return at how many bytes/s the disk of a directory reads its largest file; None: unknown.

    Reads past the page cache, where that is possible.
    """
    sizes = {path: path.stat().st_size for path in directory.rglob("*") if path.is_file()}
    path = max(sizes, key=lambda path: sizes[path], default=None)
    if path is None or sizes[path] < MEASURED or not hasattr(os, "O_DIRECT"):
        return None
    buffer, done, began = mmap.mmap(-1, PIECE), 0, time.perf_counter()
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            first = sizes[path] // 2 // PIECE * PIECE
            while done < MEASURED and time.perf_counter() - began < MOST_SECONDS:
                got = os.preadv(file, [buffer], (first + done) % (sizes[path] // PIECE * PIECE))
                if got < PIECE:
                    return None
                done += got
        finally:
            os.close(file)
    except OSError:
        return None
    return done / (time.perf_counter() - began)


def sentence(found: InPlace) -> str:
    """Return the costs in one sentence."""
    held = ""
    if found.memory is not None:
        held = f", of which memory can hold {found.share:.0%}"
    text = (
        f"{gigabytes(found.total)} of files are used in place{held}; a token touches "
        f"{gigabytes(found.touched)}"
    )
    if found.copied:
        text += f", besides {gigabytes(found.copied)} of memory for the converted embedding table"
    if found.share == 1:
        return f"{text}, which are read once, and then from memory"
    if found.rate is None:
        return f"{text}; the rate of the disk is not known"
    return (
        f"{text}; at the disk's {gigabytes(found.rate)}/s this takes about {found.token_s:.2g} s "
        f"for a token, and up to {found.chunk_s:.2g} s for each chunk of a prompt"
    )
