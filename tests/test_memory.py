"""The memory of sequences: chunks, padding and the rest of the batch change no result."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
import reference
from grok1.execution import Execution
from grok1.serving.steps import abstract_inputs, apply_model, decode, new_memory

NAME = "three-layers"
PROMPT = [17, 300, 44, 9, 0, 250, 7, 7, 121, 480, 5, 0, 33, 402, 2, 91]  # with two pads
MORE = [64, 200, 11, 0, 350]
SLOTS = 16
EXECUTION = Execution(kernels="xla_cpu")
DTYPES = [pytest.param("float32", marks=pytest.mark.exhaustive), "bfloat16"]


@functools.cache
def step(dtype: str = "float32"):
    """Return the model with a memory as one jitted function; it compiles once for each shape."""
    config = golden.config(NAME, dtype)
    params = golden.runner(NAME, dtype).params

    @jax.jit
    def run(memory, tokens, length):
        output = apply_model(config, EXECUTION, params, tokens, memory, length)
        return output.logits, output.model_state

    return run


@pytest.fixture(scope="module")
def whole():
    """Logits [T, V] of PROMPT + MORE in one prefill."""
    return golden.runner(NAME).logits(PROMPT + MORE)[0]


def empty(slots: int = SLOTS, dtype: str = "float32"):
    return new_memory(config=golden.config(NAME, dtype), batch=slots, execution=EXECUTION)


def chunks(rows, width):
    """Pad lists of tokens to [B, width] and return them with their lengths."""
    tokens = np.zeros([len(rows), width], np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(tokens), jnp.asarray([len(ids) for ids in rows], jnp.int32)


def assert_close(got, expected):
    assert golden.relative_error(got, expected).max() <= 1e-5


def test_chunks_of_any_lengths_equal_one_prefill(whole):
    """Each slot splits the prompt at another position, with pads on both sides of the split."""
    cuts = np.arange(1, SLOTS + 1)  # the last slot has an empty second chunk
    width = len(PROMPT)
    logits, memory = step()(empty(), *chunks([PROMPT[:cut] for cut in cuts], width))
    assert_close(logits[:, 0], whole[cuts - 1])
    logits, memory = step()(memory, *chunks([PROMPT[cut:] for cut in cuts], width))
    assert_close(logits[:-1, 0], np.tile(whole[width - 1], (SLOTS - 1, 1)))
    for position, token in enumerate(MORE, start=width):
        logits, memory = step()(memory, *chunks([[token]] * SLOTS, 1))
        assert_close(logits[:, 0], np.tile(whole[position], (SLOTS, 1)))


def test_last_position_is_used_and_nothing_past_it():
    config = golden.config(NAME, "float32")
    rng = np.random.default_rng(0)
    ids = rng.integers(3, config.vocab_size, config.sequence_len).tolist()
    expected = golden.runner(NAME).logits(ids)[0, -1]
    memory = empty()
    width = len(PROMPT)
    # One token first, so that the chunks are not aligned and the last one runs past the end.
    _, memory = step()(memory, *chunks([ids[:1]] * SLOTS, 1))
    for start in range(1, len(ids), width):
        logits, memory = step()(memory, *chunks([ids[start : start + width]] * SLOTS, width))
    assert_close(logits[0, 0], expected)
    full = memory
    _, memory = step()(memory, *chunks([[5]] * SLOTS, 1))
    for before, after in zip(full.layers[:2], memory.layers[:2], strict=True):
        assert np.array_equal(before, after)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_and_other_slots_change_no_bit(dtype):
    """Of its logits and of its memory."""
    rng = np.random.default_rng(1)
    width, vocab = len(PROMPT), 512
    mine = PROMPT[:11]
    seen = set()
    for trial in range(8):
        tokens = rng.integers(0, vocab, (SLOTS, width))
        length = rng.integers(0, width + 1, SLOTS) if trial else np.zeros(SLOTS, int)
        tokens[3, : len(mine)], length[3] = mine, len(mine)
        memory = empty(dtype=dtype)
        logits, memory = step(dtype)(memory, jnp.asarray(tokens), jnp.asarray(length, jnp.int32))
        # A decode step, in which the other slots are sometimes active.
        token = rng.integers(0, vocab, (SLOTS, 1))
        active = rng.integers(0, 2, SLOTS) if trial else np.zeros(SLOTS, int)
        token[3], active[3] = 99, 1
        after, memory = step(dtype)(memory, jnp.asarray(token), jnp.asarray(active, jnp.int32))
        rows = len(mine) + 1
        seen.add(
            b"".join(
                np.asarray(x).tobytes()
                for x in (
                    logits[3],
                    after[3],
                    memory.layers.k[:, 3, :rows],
                    memory.layers.v[:, 3, :rows],
                    memory.layers.step[3],
                    memory.valid[3],
                )
            )
        )
    assert len(seen) == 1


def test_slot_of_length_zero_keeps_every_bit_of_memory():
    memory = empty()
    _, memory = step()(memory, *chunks([PROMPT] * SLOTS, len(PROMPT)))
    rows = [PROMPT if slot % 2 else [] for slot in range(SLOTS)]
    _, after = step()(memory, *chunks(rows, len(PROMPT)))
    for name, axis in {"k": 1, "v": 1, "step": 0}.items():
        old, new = (np.asarray(getattr(m.layers, name)) for m in (memory, after))
        kept, changed = (np.take(new, range(n, SLOTS, 2), axis) for n in (0, 1))
        assert np.array_equal(np.take(old, range(0, SLOTS, 2), axis), kept)
        assert not np.array_equal(np.take(old, range(1, SLOTS, 2), axis), changed)
    assert np.array_equal(memory.valid[::2], after.valid[::2])


def test_a_pad_stays_masked_in_later_chunks():
    """The memory must know which positions are pads: a token there would change later logits."""
    outputs = []
    for inside in (0, 77):
        prompt = [17, 300, inside, 9]
        _, memory = step()(empty(), *chunks([prompt] * SLOTS, len(PROMPT)))
        assert bool(memory.valid[0, 2]) == (inside != 0)
        logits, _ = step()(memory, *chunks([[5]] * SLOTS, 1))
        outputs.append(np.asarray(logits[0, 0]))
    assert golden.relative_error(outputs[0], outputs[1]) > 1e-3
    exact = reference.forward(*golden.reference_model(NAME), [[17, 300, 0, 9, 5]])[0, -1]
    assert golden.relative_error(outputs[0], exact) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_updates_the_cache_in_place(dtype):
    """XLA's CPU backend converted a bfloat16 cache to float32 and back for each written row."""
    config = dataclasses.replace(golden.config(NAME, dtype), sequence_len=8192)
    memory = jax.eval_shape(lambda: new_memory(config=config, batch=4, execution=EXECUTION))
    compiled = decode.lower(
        *abstract_inputs(config, EXECUTION, batch=4), config=config, execution=EXECUTION
    ).compile()
    shape = ",".join(map(str, memory.layers.k.shape))
    made = re.findall(rf"= (\w+)\[{shape}\]\S* ([\w-]+)\(", compiled.as_text())
    kinds = {kind for _, kind in made}
    assert "dynamic-update-slice" in kinds
    assert not kinds & {"copy", "convert", "select", "scatter", "concatenate"}
    assert "f32" not in {number for number, _ in made} or dtype == "float32"


def test_positions_past_the_length_go_to_no_expert():
    """They would take time."""
    config, params = golden.config(NAME, "float32"), golden.runner(NAME).params
    tokens, length = chunks([PROMPT[:3], [], PROMPT[:4]], 8)
    tokens = jnp.where(tokens == 0, 55, tokens)  # padding that looks like text
    options = {"capture": ("expert_index",)}
    run = jax.jit(
        lambda memory: apply_model(config, EXECUTION, params, tokens, memory, length, **options)
    )
    sent = (run(empty(3)).captured.expert_index < config.model.num_experts).all(axis=-1)
    real = np.arange(8) < np.asarray(length)[:, None]
    assert np.array_equal(sent, np.broadcast_to(real, sent.shape))
