"""What a sequence remembers: cut anywhere, in any company, it computes the same."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden
from grok1.execution import Execution
from grok1.ops import mixture
from grok1.ops.quantization import QuantizedWeight8bit
from grok1.serving.steps import abstract_inputs, apply_model, decode, new_memory

PROMPT = [17, 300, 44, 9, 0, 250, 7, 7, 121, 480, 5, 0, 33, 402, 2, 91]  # two pads inside
MORE = [64, 200, 11, 0, 350]
SLOTS = 16
EXECUTION = Execution(kernels="xla_cpu")


@functools.cache
def step(dtype: str = "float32"):
    """Return the model over a memory as one jitted function; it compiles once a shape."""
    config = golden.config("three-layers", dtype)
    params = golden.runner("three-layers", dtype).params

    @jax.jit
    def run(memory, tokens, length):
        output = apply_model(config, EXECUTION, params, tokens, memory, length)
        return output.logits, output.model_state

    return run


@pytest.fixture(scope="module")
def whole():
    """Logits [T, V] of PROMPT + MORE in one prefill."""
    return golden.runner("three-layers").logits(PROMPT + MORE)[0]


def empty(slots: int = SLOTS, dtype: str = "float32"):
    return new_memory(config=golden.config("three-layers", dtype), batch=slots, execution=EXECUTION)


def chunks(rows, width):
    """Pad lists of tokens to [B, width] and return them with their lengths."""
    tokens = np.zeros([len(rows), width], np.int32)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return jnp.asarray(tokens), jnp.asarray([len(ids) for ids in rows], jnp.int32)


def assert_close(got, expected):
    assert golden.relative_error(got, expected).max() <= 1e-5


def test_token_by_token_equals_one_prefill(whole):
    memory = empty()
    for position, token in enumerate(PROMPT + MORE):
        logits, memory = step()(memory, *chunks([[token]] * SLOTS, 1))
        assert_close(logits[0, 0], whole[position])


def test_a_prompt_cut_anywhere_equals_one_prefill(whole):
    """Each slot cuts the prompt at another place, with pads on either side of the cut."""
    cuts = np.arange(1, SLOTS + 1)  # the last one: all in the first chunk, none in the second
    width = len(PROMPT)
    logits, memory = step()(empty(), *chunks([PROMPT[:cut] for cut in cuts], width))
    assert_close(logits[:, 0], whole[cuts - 1])
    logits, memory = step()(memory, *chunks([PROMPT[cut:] for cut in cuts], width))
    assert_close(logits[:-1, 0], np.tile(whole[width - 1], (SLOTS - 1, 1)))
    for position, token in enumerate(MORE, start=width):
        logits, memory = step()(memory, *chunks([[token]] * SLOTS, 1))
        assert_close(logits[:, 0], np.tile(whole[position], (SLOTS, 1)))


def test_the_last_position_of_the_context_is_usable_and_nothing_is_written_past_it():
    config = golden.config("three-layers", "float32")
    rng = np.random.default_rng(0)
    ids = rng.integers(3, config.vocab_size, config.sequence_len).tolist()
    expected = golden.runner("three-layers").logits(ids)[0, -1]
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


@pytest.mark.parametrize("dtype", golden.DTYPES)
def test_padding_and_company_change_nothing_bit_for_bit(dtype):
    """One slot's logits and memory, whatever lies in the padding and in the other slots."""
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


def test_a_slot_of_length_zero_keeps_its_memory_bit_for_bit():
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


def test_a_pad_stays_masked_for_later_chunks():
    """The memory must know which slots are pads: a token there would change what comes after."""
    outputs = []
    for inside in (0, 77):
        prompt = [17, 300, inside, 9]
        _, memory = step()(empty(), *chunks([prompt] * SLOTS, len(PROMPT)))
        assert bool(memory.valid[0, 2]) == (inside != 0)
        logits, _ = step()(memory, *chunks([[5]] * SLOTS, 1))
        outputs.append(np.asarray(logits[0, 0]))
    # Without the pad's slot, positions included, the answer is that of the reference.
    assert golden.relative_error(outputs[0], outputs[1]) > 1e-3
    exact = golden.exact_logits("three-layers", [17, 300, 0, 9, 5])[-1]
    assert golden.relative_error(outputs[0], exact) < 1e-4


def test_a_query_that_sees_no_key_attends_to_nothing():
    """A leading pad sees no key at all: its attention is zero, not the mean of masked values."""
    config = golden.config("three-layers", "float32")
    one_layer = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=1))
    params = {
        module: jax.tree.map(lambda x: x[:1], leaves) if "decoder_layer" in module else leaves
        for module, leaves in golden.runner("three-layers").params.items()
    }

    @jax.jit
    def run(params, tokens):
        return apply_model(one_layer, EXECUTION, params, tokens).logits

    name = "transformer/decoder_layer/multi_head_attention/value"
    value = params[name]["w"]
    changed = {**params, name: {"w": QuantizedWeight8bit(-value.weight, value.scales)}}
    tokens = jnp.asarray([[0, 5]], jnp.int32)
    before, after = np.asarray(run(params, tokens)), np.asarray(run(changed, tokens))
    assert np.array_equal(before[0, 0], after[0, 0])
    assert not np.array_equal(before[0, 1], after[0, 1])


@pytest.mark.parametrize("dtype", golden.DTYPES)
def test_a_step_writes_its_rows_and_copies_no_cache(dtype):
    """XLA's CPU backend converted a bfloat16 cache to float32 and back for every row written."""
    config = dataclasses.replace(golden.config("three-layers", dtype), sequence_len=8192)
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


def test_padding_is_sent_to_no_expert(monkeypatch):
    """Rows past a sequence's length must not cost an expert's work."""
    config = golden.config("three-layers", "float32")
    seen = []
    plain = mixture.sort_by_expert

    def record(index, *others):
        jax.debug.callback(lambda index: seen.append(np.array(index)), index)
        return plain(index, *others)

    monkeypatch.setattr(mixture, "sort_by_expert", record)
    tokens, length = chunks([PROMPT[:3], [], PROMPT[:4]], 8)
    tokens = jnp.where(tokens == 0, 55, tokens)  # padding that looks like text
    params = golden.runner("three-layers").params
    # A function of its own, so that nothing traced without the recorder is used again.
    run = jax.jit(lambda m: apply_model(config, EXECUTION, params, tokens, m, length).logits)
    jax.block_until_ready(run(empty(3)))
    jax.effects_barrier()
    assert len(seen) == config.model.num_layers
    real = np.arange(8) < np.asarray(length)[:, None]
    for index in seen:
        sent = (index < config.model.num_experts).all(axis=-1).reshape(3, 8)
        assert np.array_equal(sent, real)
