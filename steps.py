"""The compiled steps: state in, state out, and what they take, with or without any data.

Functional core: pure functions, jitted at module level. A sequence's result depends on its own row
only, so a request gives the same tokens alone and in a batch. serving.py and runner.py drive
them; plan.py compiles them ahead of time.

B is the number of slots: sequences that a step serves at once.
"""

import functools
import math
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from attention import cache_dtype
from model import KVMemory, LanguageModelConfig, LanguageModelOutput, Memory
from sampling import SampleOutput, SampleSettings, sample_token
from sharding import AnyMesh, constrain, named_shardings, parameter_specs, readable


class Slots(NamedTuple):
    """What each slot needs for its next token, on the device.

    token: int32 [B, 1], the last token. drawn: int32 [B], how many tokens it has drawn.
    seed: uint32 [B]. settings: SampleSettings, every field given; `active` marks the slots that are
    in use. ends: bool [B, V], the tokens that end an answer; none of the first `min_len` int32 [B]
    is one of these. limit: int32 [B], the most tokens it may draw. A slot that has drawn its last
    token is no longer active.
    """

    token: jax.Array
    drawn: jax.Array
    seed: jax.Array
    settings: SampleSettings
    ends: jax.Array
    min_len: jax.Array
    limit: jax.Array


EMBEDDINGS = "language_model/in_out_embed", "embeddings"


def stored_shapes(config: LanguageModelConfig) -> dict[str, dict[str, Any]]:
    """Return the parameters as they lie on the devices: as released, the embedding in bfloat16."""
    shapes = config.param_shapes()
    module, name = EMBEDDINGS
    table = shapes[module][name]
    shapes[module][name] = jax.ShapeDtypeStruct(table.shape, config.fprop_dtype)
    return shapes


def memory_specs(config: LanguageModelConfig) -> Any:
    """Return the PartitionSpecs of a Memory: sequences over the data axis, heads over the model."""
    data, model = config.model.data_axis, config.model.model_axis
    specs: Any = P(None, data, None, model, None), P(data), P(data, None)
    cache, step, valid = specs
    return Memory(KVMemory(cache, cache, step), valid)


def apply_model(
    config: LanguageModelConfig,
    mesh: Mesh | None,
    params: Any,
    tokens: jax.Array,
    memory: Memory | None = None,
    length: jax.Array | None = None,
) -> Any:
    """Run the model on tokens [B, T], outside `hk.transform` -> LanguageModelOutput."""
    model: Any = hk.without_apply_rng(
        hk.transform(lambda: config.make(mesh)(tokens, memory, length=length))
    )
    output = model.apply(params)
    if mesh is not None and memory is not None:
        # The memory comes back as it lay, so that its donated buffers can be used again.
        state = jax.tree.map(
            lambda x, spec: constrain(x, mesh, *spec), output.model_state, memory_specs(config)
        )
        output = output._replace(model_state=state)
    return output


def _sample(
    config: LanguageModelConfig, mesh: Mesh | None, output: LanguageModelOutput, slots: Slots
) -> tuple[SampleOutput, Slots]:
    """Draw the next token of the active slots; the others keep theirs."""
    # Sampling looks at whole rows: gathering them once is cheaper than many reductions.
    logits = constrain(output.logits, mesh, config.model.data_axis, None, None)
    keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(
        slots.seed, slots.drawn
    )
    draw = sample_token
    if mesh is not None:
        # Each data shard draws for its own rows: left to the compiler, lax.top_k gathered all.
        rows = P(config.model.data_axis)
        draw = jax.shard_map(draw, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    settings, active = slots.settings, slots.settings.active
    early = (slots.drawn < slots.min_len)[:, None]
    allowed = settings._replace(mask=settings.mask & ~(slots.ends & early))
    sample = draw(keys, LanguageModelOutput(logits, None), allowed)
    # bool [B, V], the token that each slot has drawn
    drawn_token = active[:, None] & (jnp.arange(config.vocab_size) == sample.token_id)
    drawn = slots.drawn + active
    over = jnp.any(slots.ends & drawn_token, axis=-1) | (drawn >= slots.limit)
    assert settings.in_answer is not None
    settings = settings._replace(active=active & ~over, in_answer=settings.in_answer | drawn_token)
    token = jnp.where(active[:, None], sample.token_id, slots.token)
    return readable(sample, mesh), slots._replace(token=token, drawn=drawn, settings=settings)


def _draw(
    config: LanguageModelConfig,
    mesh: Mesh | None,
    output: LanguageModelOutput,
    slots: Slots,
    drawing: jax.Array,
) -> tuple[SampleOutput, Slots]:
    """`_sample` for the slots that are active and `drawing` bool [B]; the others stay."""
    active = slots.settings.active
    chosen = slots._replace(settings=slots.settings._replace(active=active & drawing))
    sample, slots = _sample(config, mesh, output, chosen)
    settings = slots.settings
    still = jnp.where(drawing, settings.active, active)
    slots = slots._replace(settings=settings._replace(active=still))
    return sample, _placed(slots, config, mesh)


def _placed(slots: Slots, config: LanguageModelConfig, mesh: Mesh | None) -> Slots:
    """Lay slots out over the data axis, in every step alike: else the next one compiles anew."""
    return jax.tree.map(lambda x: constrain(x, mesh, config.model.data_axis), slots)


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames=("memory", "slots"))
def start(
    memory: Memory,
    slots: Slots,
    index: jax.Array,
    row: Slots,
    *,
    config: LanguageModelConfig,
    mesh: Mesh | None = None,
) -> tuple[Memory, Slots]:
    """Give the slot `index` int32 [] to a new sequence, `row` (without the axis of slots)."""
    chosen = jnp.arange(slots.drawn.shape[0]) == index  # bool [B]
    slots = jax.tree.map(
        lambda x, new: jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 1)), new, x), slots, row
    )
    step = jnp.where(chosen, 0, memory.layers.step)
    memory = memory._replace(layers=memory.layers._replace(step=step))
    return memory, _placed(slots, config, mesh)


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames=("memory", "slots"))
def prefill(
    params: Any,
    memory: Memory,
    slots: Slots,
    tokens: jax.Array,
    length: jax.Array,
    last: jax.Array,
    *,
    config: LanguageModelConfig,
    mesh: Mesh | None = None,
) -> tuple[SampleOutput, Memory, Slots]:
    """Read one chunk of each slot's prompt.

    tokens int32 [B, T], of which the first `length` [B] are real (0: this slot is left alone);
    last bool [B]: the prompt ends with this chunk, so that the slot's first token is drawn.
    """
    output = apply_model(config, mesh, params, tokens, memory, length)
    sample, slots = _draw(config, mesh, output, slots, last)
    return sample, output.model_state, slots


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames=("memory", "slots"))
def decode_step(
    params: Any,
    memory: Memory,
    slots: Slots,
    running: jax.Array,
    *,
    config: LanguageModelConfig,
    mesh: Mesh | None = None,
) -> tuple[SampleOutput, Memory, Slots]:
    """Read the last token of each slot that is active and `running` bool [B], and draw its next."""
    length = (slots.settings.active & running).astype(jnp.int32)
    output = apply_model(config, mesh, params, slots.token, memory, length)
    sample, slots = _draw(config, mesh, output, slots, running)
    return sample, output.model_state, slots


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames=("memory",))
def logits_step(
    params: Any,
    memory: Memory,
    tokens: jax.Array,
    *,
    config: LanguageModelConfig,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Memory]:
    """Read one chunk of tokens [B, T] -> the logits [B, T, V] at each, and the memory."""
    output = apply_model(config, mesh, params, tokens, memory)
    return readable(output.logits, mesh), output.model_state


@functools.partial(jax.jit, static_argnames=("config", "mesh"), donate_argnames=("memory",))
def score_step(
    params: Any,
    memory: Memory,
    tokens: jax.Array,
    targets: jax.Array,
    *,
    config: LanguageModelConfig,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Memory]:
    """Read one chunk of tokens [B, T] -> the log-probabilities [B, T] of `targets` after each."""
    output = apply_model(config, mesh, params, tokens, memory)
    logits = output.logits
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    scores = chosen - jax.nn.logsumexp(logits, axis=-1)
    return readable(scores, mesh), output.model_state


@functools.partial(jax.jit, static_argnames=("config", "batch", "mesh"))
def new_memory(*, config: LanguageModelConfig, batch: int, mesh: Mesh | None = None) -> Memory:
    """Return an empty memory for `batch` sequences of the whole context."""
    dtype = cache_dtype(config.fprop_dtype)
    memory = config.model.init_memory(batch, config.sequence_len, dtype)
    return jax.tree.map(lambda x, spec: constrain(x, mesh, *spec), memory, memory_specs(config))


def _idle_slots(config: LanguageModelConfig, batch: int) -> Slots:
    rows, reals = jnp.zeros([batch], jnp.int32), jnp.zeros([batch], jnp.float32)
    flags = jnp.zeros([batch], bool)
    marks = jnp.zeros([batch, config.vocab_size], bool)
    settings = SampleSettings(
        temperature=reals,
        nucleus_p=reals,
        mask=marks,
        active=flags,
        top_k=rows,
        min_p=reals,
        repetition_penalty=reals,
        presence_penalty=reals,
        bias=marks.astype(jnp.float32),
        in_prompt=marks,
        in_answer=marks,
        top_logprobs=rows,
    )
    return Slots(rows[:, None], rows, rows.astype(jnp.uint32), settings, marks, rows, rows)


@functools.partial(jax.jit, static_argnames=("config", "batch", "mesh"))
def new_slots(*, config: LanguageModelConfig, batch: int, mesh: Mesh | None = None) -> Slots:
    """Return slots that serve nothing."""
    return _placed(_idle_slots(config, batch), config, mesh)


def abstract_inputs(
    config: LanguageModelConfig, mesh: AnyMesh | None, batch: int, chunk: int | None = None
) -> tuple[Any, ...]:
    """Return what `prefill` of a chunk length, or `decode_step`, takes, without any data.

    Leaves are jax.ShapeDtypeStruct with shardings, to compile a step ahead of time:
    `decode_step.lower(*abstract_inputs(config, mesh, 1), config=config, mesh=mesh).compile()`.
    """

    def place(tree: Any, specs: Any) -> Any:
        if mesh is None:
            return tree
        shardings = named_shardings(specs, mesh)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    shapes = stored_shapes(config)
    params = place(shapes, parameter_specs(shapes, config.partition_rules(mesh), mesh))
    memory = jax.eval_shape(lambda: new_memory(config=config, batch=batch))
    memory = place(memory, memory_specs(config))

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    rows, flags = array(batch), array(batch, dtype=bool)
    slots = jax.eval_shape(lambda: _idle_slots(config, batch))
    slots = place(slots, jax.tree.map(lambda _: P(config.model.data_axis), slots))
    if chunk is None:
        return params, memory, slots, flags
    return params, memory, slots, array(batch, chunk), rows, flags


def device_bytes(config: LanguageModelConfig, mesh: AnyMesh | None, batch: int) -> int:
    """Return the bytes that one device holds between steps: parameters, and `batch` memories."""
    params, memory, *_ = abstract_inputs(config, mesh, batch)

    def own(array: Any) -> int:
        shape = array.shape if mesh is None else array.sharding.shard_shape(array.shape)
        return math.prod(shape) * array.dtype.itemsize

    return sum(map(own, jax.tree.leaves((params, memory))))
