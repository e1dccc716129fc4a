"""A tiny model with random int8 weights, served with four slots and shared by the tests."""

import dataclasses
import functools
from typing import Any

import numpy as np

from grok1.serving.request import Completion, Event, Request
from model import LanguageModelConfig, TransformerConfig
from paths import ROOT
from runner import InferenceRunner, ModelRunner

SLOTS = 4
TOKENIZER = ROOT / "tokenizer.model"
TINY = LanguageModelConfig(
    vocab_size=4096,
    sequence_len=64,
    output_multiplier_scale=1.0,
    embedding_multiplier_scale=6.0,
    fprop_dtype=np.float32,
    model=TransformerConfig(
        emb_size=32,
        key_size=8,
        num_q_heads=8,
        num_kv_heads=8,
        num_layers=2,
        attn_output_multiplier=0.35,
        num_experts=8,
        num_selected_experts=2,
    ),
)


def make(
    config: LanguageModelConfig = TINY,
    slots: int = SLOTS,
    mesh: tuple[int, int] = (1, 1),
    pad_sizes: tuple[int, ...] = (8, 32),
    prefix_cache: bool = True,
    **options: Any,
) -> InferenceRunner:
    """Return a new server; with the defaults it runs the programs compiled for `server()`."""
    made = InferenceRunner(
        name="tiny",
        runner=ModelRunner(config, slots / (mesh[0] * mesh[1]), None, rng_seed=1, **options),
        load=None,
        tokenizer_path=TOKENIZER,
        local_mesh_config=mesh,
        pad_sizes=pad_sizes,
        prefix_cache=prefix_cache,
    )
    made.initialize()
    return made


@functools.cache
def server() -> InferenceRunner:
    """Return the shared server."""
    return make()


def drain(of: InferenceRunner | None = None) -> list[Event]:
    """Step a server until it has nothing left to do, and return the events."""
    found, of = [], of or server()
    for _ in range(1000):
        if not of.busy:
            return found
        found += of.step()
    raise AssertionError("the server is still busy after 1000 steps")


_known: dict[str, tuple[Completion, str]] = {}


def alone(request: Request) -> tuple[Completion, str]:
    """Return the answer to a request that is served alone, and its text as it was streamed."""
    key = repr(request)
    if key not in _known:
        handle = server().submit(request)
        text = "".join(event.text for event in server().stream(handle))
        _known[key] = handle.completion, text
    return _known[key]


def sample(request: Request, index: int) -> Request:
    """Return the request whose only answer is one of the answers to `request`."""
    return dataclasses.replace(request, num_samples=1, rng_seed=request.rng_seed + index)


def logprobs(ids: list[int]) -> np.ndarray:
    """Return the log-probabilities float64 [T, V] after each of these tokens."""
    logits = server().logits([ids])[0].astype(np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))
