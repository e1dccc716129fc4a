"""The measured limits of a machine, and the least work that a step must do."""

import dataclasses
import functools
import math
import os
import threading
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grok1 import backend
from grok1.ops.quantization import Params
from grok1.ops.rounded_table import RoundedTable
from grok1.parameters import embedding_table
from grok1.planning import projection
from grok1.planning.accelerators import ACCELERATORS
from model import LanguageModelConfig
from random_models import RANKS, as_loaded


class Limits(NamedTuple):
    """Bytes read and operations done per second."""

    bandwidth: float
    rate: float


class Machine:
    """The best speeds at which this device reads and multiplies.

    They are measured in turns with the forms that are compared with them, so that other programs
    slow down both or neither.
    """

    def __init__(self, config: LanguageModelConfig):
        dtype = config.fprop_dtype
        precision = "highest" if dtype == jnp.float32 else None
        self._multiply = jax.jit(functools.partial(jnp.dot, precision=precision))
        self._on_cpu = backend.on_cpu()
        rows, inputs, outputs = (128, 1536, 8192) if self._on_cpu else (4096, 6144, 8192)
        self._product = jnp.ones([rows, inputs], dtype), jnp.ones([inputs, outputs], dtype)
        self._operations = 2 * rows * inputs * outputs
        if self._on_cpu:
            self._row = jnp.ones([1, 8192], dtype)
            self._matrix = as_loaded(np.ones([8192, 8192], np.float32))
            threads = len(os.sched_getaffinity(0))
            self._numbers = np.array_split(np.ones(1 << 25, np.int64), threads)  # 256 MiB
        else:
            self._array = jnp.zeros([1 << 30], jnp.int32)  # 4 GiB
            self._read = jax.jit(lambda x: jnp.max(x))
        self.limits()  # compiles

    def limits(self) -> Limits:
        """Measure both limits, for some tenths of a second."""
        product = median(_times(lambda: self._multiply(*self._product).block_until_ready()))
        return Limits(self._bandwidth(), self._operations / product)

    def _bandwidth(self) -> float:
        """Return the bytes read per second: the best of several methods and tries."""
        if not self._on_cpu:
            read = min(_times(lambda: self._read(self._array).block_until_ready()))
            return self._array.nbytes / read
        by_product = min(
            _times(lambda: self._multiply(self._row, self._matrix).block_until_ready())
        )
        size = sum(part.nbytes for part in self._numbers)
        return max(size / min(_times(self._add_up)), self._matrix.nbytes / by_product)

    def _add_up(self) -> None:
        workers = [threading.Thread(target=part.sum) for part in self._numbers]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()


def _times(function: Callable[[], object], tries: int = 5) -> list[float]:
    seconds = []
    for _ in range(tries):
        began = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - began)
    return seconds


@dataclasses.dataclass(frozen=True)
class Work:
    """The least work of a step: the bytes that it reads, and its operations."""

    bytes: float
    operations: float

    def floor(self, limits: Limits) -> float:
        """Return the least time in seconds that it can take."""
        return max(self.bytes / limits.bandwidth, self.operations / limits.rate)


def decode_work(
    config: LanguageModelConfig,
    params: Params,
    batch: int,
    filled: float,
    experts: float,
    rounded: RoundedTable | None = None,
) -> Work:
    """Return the work of a decode step.

    experts: how many the batch selects, over all layers. rounded: read instead of the table.
    """
    model = config.model
    each = model.num_layers * model.num_experts
    mixture = sum(_bytes(p) for name, p in params.items() if "/moe/" in name)
    attention = sum(_bytes(p) for name, p in params.items() if "multi_head" in name)
    table = embedding_table(params)
    position = model.num_layers * 2 * model.num_kv_heads * model.key_size
    cache = batch * filled * position * jnp.dtype(config.fprop_dtype).itemsize
    scores = 4 * filled * model.num_layers * model.num_q_heads * model.key_size
    operations = batch * (2 * _matrices(config) + 2 * math.prod(table.shape) + scores)
    logits = _bytes(table if rounded is None else rounded)
    return Work(mixture * experts / each + attention + logits + cache, operations)


def prefill_operations(config: LanguageModelConfig, tokens: int) -> float:
    """Return the useful operations of reading a prompt: logits only after the last token."""
    model = config.model
    scores = 2 * tokens * tokens * model.num_layers * model.num_q_heads * model.key_size
    return 2 * tokens * _matrices(config) + scores + 2 * config.vocab_size * model.emb_size


def _matrices(config: LanguageModelConfig) -> float:
    """Return how many weights a token is multiplied with, without the output table."""
    model = config.model
    heads = 2 * model.num_q_heads + 2 * model.num_kv_heads
    chosen = 3 * model.num_selected_experts * model.ffn_size
    return model.num_layers * model.emb_size * (heads * model.key_size + chosen)


def _bytes(tree: object) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def exchange_seconds(config: LanguageModelConfig, tokens: int) -> float:
    """Return the projected time of two all-reduces per layer among eight H100s.

    Each sends float32 [tokens, D] 2 (n - 1) / n times, if the devices form a ring.
    """
    sent = 2 * (RANKS - 1) / RANKS * tokens * config.model.emb_size * 4
    number = 2 * config.model.num_layers
    return projection.exchange_seconds(ACCELERATORS["h100"], number, number * sent)
