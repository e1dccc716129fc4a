"""The straightforward form that `speed.py` compares with: grok1/reference.py, compiled."""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grok1 import reference
from grok1.ops.quantization import Params
from model import LanguageModelConfig

TEMPERATURE = 0.7


class State(NamedTuple):
    """The cache of each sequence, its last token int32 [B, 1], and the random key."""

    cache: reference.Cache
    token: jax.Array
    key: jax.Array


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def step(params: Params, state: State, tokens: jax.Array, *, config: LanguageModelConfig) -> State:
    """Read tokens [B, T], and draw the next token of each sequence."""
    weights = reference.weights_of(params)
    h, cache = reference.hidden_states(weights, config, tokens, state.cache)
    logits = reference.logits(weights, config, h[:, -1:], cache.keys.dtype)[:, 0]
    key, own = jax.random.split(state.key)
    token = jax.random.categorical(own, logits / TEMPERATURE)
    return State(cache, token[:, None].astype(jnp.int32), key)


class Baseline:
    """The form of the model without any optimization; has the interface of `speed.Form`."""

    name = "baseline"
    most_tokens = 1

    def __init__(self, config: LanguageModelConfig, params: Params):
        self.config, self.params = config, params
        self.compile_s: dict[str, float] = {}
        self._compiled: dict[tuple[int, int], jax.stages.Compiled] = {}

    def compiled(self, batch: int, length: int) -> jax.stages.Compiled:
        """Return the program that reads `length` tokens of each of `batch` sequences."""
        if (batch, length) not in self._compiled:
            tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
            state = jax.eval_shape(lambda: self.empty(batch))
            began = time.perf_counter()
            lowered = step.lower(self.params, state, tokens, config=self.config)
            self._compiled[batch, length] = lowered.compile()
            name = f"decode {batch}" if length == 1 else f"prefill {length}"
            self.compile_s.setdefault(name, time.perf_counter() - began)
        return self._compiled[batch, length]

    def empty(self, batch: int) -> State:
        """Return the state of empty sequences."""
        config = self.config
        cache = reference.empty_cache(config, batch, config.sequence_len, config.fprop_dtype)
        return State(cache, jnp.zeros([batch, 1], jnp.int32), jax.random.key(0))

    def rewound(self, state: State) -> State:
        """Return the state with nothing in the cache."""
        filled = jnp.zeros_like(state.cache.filled)
        return state._replace(cache=state.cache._replace(filled=filled))

    def filled(self, state: State) -> float:
        """Return the mean number of filled positions of a cache."""
        return float(jnp.mean(state.cache.filled))

    def read(self, state: State, tokens: np.ndarray) -> State:
        """Read a prompt int32 [T] into the only sequence."""
        return self.compiled(1, len(tokens))(self.params, state, jax.device_put(tokens[None]))

    def ready(self, prompts: list[np.ndarray]) -> State:
        """Return the state of sequences that have each read a prompt and drawn one token."""
        states = [self.read(self.empty(1), prompt) for prompt in prompts]
        caches = [state.cache for state in states]
        cache = reference.Cache(
            jnp.concatenate([cache.keys for cache in caches], axis=1),
            jnp.concatenate([cache.values for cache in caches], axis=1),
            jnp.concatenate([cache.valid for cache in caches]),
            jnp.concatenate([cache.filled for cache in caches]),
        )
        token = jnp.concatenate([state.token for state in states])
        return jax.block_until_ready(State(cache, token, states[0].key))

    def draw(self, state: State) -> State:
        """Draw a token of each sequence."""
        return self.compiled(len(state.token), 1)(self.params, state, state.token)
