"""The compiled steps: state in, state out, and what they take, with or without any data.

Functional core: pure functions, jitted at module level. A sequence's result depends on its own row
only, so a request gives the same tokens alone and in a batch. scheduler.py, scoring.py and
inspecting.py drive them; plan.py compiles them ahead of time.

B is the number of slots: sequences that a step serves at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from grok1.checks import require
from grok1.execution import ONE_DEVICE, Execution, Executions
from grok1.inspection import Captured, Hook, Site, check_hooks
from grok1.ops.cache import KVMemory, Memory
from grok1.parallel.sharding import (
    AnyMesh,
    axis_size,
    constrain,
    named_shardings,
    on_shards,
    parameter_specs,
    readable,
)
from grok1.serving.hooked import Hooks, as_arguments, as_hooks, bind
from grok1.serving.sampling import SampleOutput, SampleSettings, first_choices, sample_logits

if TYPE_CHECKING:
    from model import LanguageModelConfig

MOST_TOKENS = 16  # that one dispatch of `decode` can draw for each slot


class LoadedModel(NamedTuple):
    """A model on its devices, and the shapes for which its steps are compiled.

    params: as `stored_shapes` has them, placed on the mesh. executions: how each kind of step is
    run, all on one mesh. num_slots: B. pad_sizes: the chunk lengths, rising, for which prefill is
    compiled. hooks: what changes arrays inside; hook_args: what each gets beside layer and array.
    """

    params: Any
    config: LanguageModelConfig
    executions: Executions
    num_slots: int
    pad_sizes: Sequence[int]
    hooks: Hooks = ()
    hook_args: Sequence[Any] = ()

    def hooked(self, hooks: Mapping[Site, Hook] | None, hook_args: Sequence[Any]) -> LoadedModel:
        """Return the same model with hooks in its steps. Raises ValueError for wrong ones."""
        devices = jax.tree.leaves(self.params)[0].sharding.device_set
        checked, arguments = check_hooks(hooks, self.config.model), as_arguments(hook_args, devices)
        needed = bool(checked) or not arguments
        require(needed, "hook_args", "none without hooks, which get them", hook_args)
        return self._replace(hooks=as_hooks(checked), hook_args=arguments)

    @property
    def mesh(self) -> Mesh | None:
        """The devices, or None for one."""
        mesh = self.executions.decode.mesh
        assert not isinstance(mesh, AbstractMesh)
        return mesh


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


class State(NamedTuple):
    """What the devices hold between steps, beside the parameters.

    memory: the cache of each slot. slots: what it needs for its next token. logits: float32 [B, V],
    those after the last token of its prompt that has been read; answers begin with them.
    """

    memory: Memory
    slots: Slots
    logits: jax.Array


class Decoded(NamedTuple):
    """The tokens of one dispatch, in the order in which they were drawn.

    sample: SampleOutput, each field with an axis before its own: MOST_TOKENS in `decode`, 1 in
    `first_token`. The `logprob` of a token that was drawn from logits that are not all finite is
    NaN, and the token means nothing. drawn: bool [MOST_TOKENS or 1, B], for whom a token was drawn
    each time.
    """

    sample: SampleOutput
    drawn: jax.Array


class PromptScores(NamedTuple):
    """What is reported of one chunk of a prompt.

    logprob: float32 [R, T], the log-probability of the token after each. top_logprob_ids: int32
    [R, T, min(TOP_LOGPROBS, V)], the model's own first choices there, in order. top_logprobs:
    float32, their log-probabilities. The last two are None where nobody asked for them.
    """

    logprob: jax.Array
    top_logprob_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


EMBEDDINGS = "language_model/in_out_embed", "embeddings"


def stored_shapes(config: LanguageModelConfig, stored: Any = None) -> dict[str, dict[str, Any]]:
    """Return the parameters as they lie on the devices, the embedding in the activation dtype.

    stored: their types as they are in a checkpoint; None: int8 with scales, as released.
    """
    shapes = config.param_shapes() if stored is None else jax.tree.map(lambda x: x, stored)
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
    execution: Execution,
    params: Any,
    tokens: jax.Array,
    memory: Memory | None = None,
    length: jax.Array | None = None,
    **options: Any,
) -> Any:
    """Run the model on tokens [B, T], outside `hk.transform` -> LanguageModelOutput."""

    def run(tokens: jax.Array, memory: Memory | None, length: jax.Array | None) -> Any:
        return config.make(execution=execution)(tokens, memory, length=length, **options)

    model: Any = hk.without_apply_rng(hk.transform(run))
    output = model.apply(params, tokens, memory, length)
    if memory is None:
        return output
    # The memory comes back as it was laid out, so that its donated buffers can be used again.
    return output._replace(model_state=_place_memory(output.model_state, config, execution.mesh))


def _place_memory(memory: Memory, config: LanguageModelConfig, mesh: AnyMesh | None) -> Memory:
    return jax.tree.map(lambda x, spec: constrain(x, mesh, *spec), memory, memory_specs(config))


def _sample(
    config: LanguageModelConfig, mesh: AnyMesh | None, logits: jax.Array, slots: Slots
) -> tuple[SampleOutput, Slots]:
    """Draw the next token of the active slots from logits [B, V]; the others keep theirs."""
    keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(
        slots.seed, slots.drawn
    )
    # Each data shard draws for its own rows: left to the compiler, lax.top_k gathered all.
    rows = P(config.model.data_axis)
    draw = on_shards(sample_logits, mesh, rows, rows)
    settings, active = slots.settings, slots.settings.active
    early = (slots.drawn < slots.min_len)[:, None]
    allowed = settings._replace(mask=settings.mask & ~(slots.ends & early))
    sample = draw(keys, logits, allowed)
    # bool [B, V], the token that each slot has drawn
    drawn_token = active[:, None] & (jnp.arange(config.vocab_size) == sample.token_id)
    drawn = slots.drawn + active
    over = jnp.any(slots.ends & drawn_token, axis=-1) | (drawn >= slots.limit)
    assert settings.in_answer is not None
    settings = settings._replace(active=active & ~over, in_answer=settings.in_answer + drawn_token)
    token = jnp.where(active[:, None], sample.token_id, slots.token)
    return sample, slots._replace(token=token, drawn=drawn, settings=settings)


def _draw(
    config: LanguageModelConfig,
    mesh: AnyMesh | None,
    logits: jax.Array,
    slots: Slots,
    drawing: jax.Array,
) -> tuple[Decoded, Slots]:
    """`_sample` for the slots that are active and `drawing` bool [B]; the others stay."""
    active = slots.settings.active
    chosen = slots._replace(settings=slots.settings._replace(active=active & drawing))
    sample, slots = _sample(config, mesh, logits, chosen)
    settings = slots.settings
    still = jnp.where(drawing, settings.active, active)
    finite = jnp.all(jnp.isfinite(logits), axis=-1, keepdims=True)
    sample = sample._replace(logprob=jnp.where(finite, sample.logprob, jnp.nan))
    return Decoded(sample, drawing), slots._replace(settings=settings._replace(active=still))


def _whole_rows(logits: jax.Array, config: LanguageModelConfig, mesh: AnyMesh | None) -> jax.Array:
    """Logits [B, 1, V] -> [B, V], each row on one device.

    Sampling looks at whole rows: gathering them once is cheaper than many reductions.
    """
    return constrain(logits[:, 0], mesh, config.model.data_axis, None)


def _placed(state: State, config: LanguageModelConfig, mesh: AnyMesh | None) -> State:
    """Lay the state out alike after every step: else the next one compiles anew."""
    memory = _place_memory(state.memory, config, mesh)
    rows = jax.tree.map(
        lambda x: constrain(x, mesh, config.model.data_axis), (state.slots, state.logits)
    )
    return State(memory, *rows)


_step = functools.partial(
    jax.jit, static_argnames=("config", "execution"), donate_argnames=("state",)
)


@_step
def start(
    state: State,
    index: jax.Array,
    row: Slots,
    kept: jax.Array | int = 0,
    *,
    config: LanguageModelConfig,
    execution: Execution = ONE_DEVICE,
) -> State:
    """Give the slot `index` int32 [] to a new sequence, `row` (without the axis of slots).

    kept: int32 [], how many positions of its cache stay. The others become zero: a NaN there, of
    the sequence before, would spoil the sums of the new one.
    """
    memory, slots, logits = state
    chosen = jnp.arange(slots.drawn.shape[0]) == index  # bool [B]
    slots = jax.tree.map(
        lambda x, new: jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 1)), new, x), slots, row
    )
    step = jnp.where(chosen, 0, memory.layers.step)
    k, v = (
        _zero_from(cache, index, kept, config, execution.mesh)
        for cache in (memory.layers.k, memory.layers.v)
    )
    memory = memory._replace(layers=memory.layers._replace(k=k, v=v, step=step))
    return _placed(State(memory, slots, logits), config, execution.mesh)


def _zero_from(
    cache: jax.Array,
    index: jax.Array,
    kept: jax.Array | int,
    config: LanguageModelConfig,
    mesh: AnyMesh | None,
) -> jax.Array:
    """Set the positions of a slot to zero, but for the first `kept`; cache: [L, B, S, K, H]."""

    def local(cache: jax.Array, index: jax.Array, kept: jax.Array) -> jax.Array:
        place, mine = _in_part(cache, index, config, mesh)
        row = lax.dynamic_slice_in_dim(cache, place, 1, axis=1)
        row = jnp.where(mine & (_positions(cache) >= kept), jnp.zeros([], cache.dtype), row)
        return lax.dynamic_update_slice_in_dim(cache, row, place, axis=1)

    layout = memory_specs(config).layers.k
    zero = on_shards(local, mesh, (layout, P(), P()), layout)
    return zero(cache, index, jnp.asarray(kept, jnp.int32))


def _in_part(
    cache: jax.Array, slot: jax.Array, config: LanguageModelConfig, mesh: AnyMesh | None
) -> tuple[jax.Array, jax.Array]:
    """Return a slot's place in this part of the data axis, and whether it is there.

    cache: [L, B/data, S, K/model, H], inside `on_shards`. A place that is not there is moved in.
    """
    size = cache.shape[1]
    first = 0 if mesh is None else lax.axis_index(config.model.data_axis) * size
    place = slot - first
    return jnp.clip(place, 0, size - 1), (place >= 0) & (place < size)


def _positions(cache: jax.Array) -> jax.Array:
    """Return the positions of a cache, int32 [S, 1, 1]."""
    return jnp.arange(cache.shape[2])[:, None, None]


@functools.partial(
    jax.jit, static_argnames=("config", "execution", "top_logprobs"), donate_argnames=("state",)
)
def prefill(
    params: Any,
    state: State,
    tokens: jax.Array,
    length: jax.Array,
    slot: jax.Array,
    following: jax.Array | None = None,
    *,
    config: LanguageModelConfig,
    execution: Execution = ONE_DEVICE,
    top_logprobs: bool = False,
    hooks: Hooks = (),
    hook_args: Sequence[Any] = (),
) -> tuple[PromptScores | None, State]:
    """Read one chunk of a prompt, one for each part of the data axis.

    tokens: int32 [R, T], of which the first `length` [R] are real (0: nothing is read). slot:
    int32 [R], whose prompt it is; R is the size of the data axis, and each row's slot lies in its
    own part of that axis. following: int32 [R, T], the token after each. top_logprobs: report the
    model's own first choices, too. hooks: given by `with_hooks`, as to `decode`.
    Returns the scores of `following`, if given; and the state.
    """
    memory, slots, before = state
    output = apply_model(
        config, execution, params, tokens, memory, length,
        sequence=slot, every_position=following is not None, hooks=bind(hooks, hook_args),
    )  # fmt: skip
    logits, scores = output.logits, None
    if following is not None:
        scores = PromptScores(_log_probabilities(logits, following))
        if top_logprobs:
            scores = scores._replace(**_first_choices(logits, config, execution.mesh))
        scores = readable(scores, execution.mesh)
        last = jnp.maximum(length - 1, 0)[:, None, None]
        logits = jnp.take_along_axis(logits, last, axis=1)
    rows = _whole_rows(logits, config, execution.mesh)
    rows = before.at[slot].set(jnp.where(length[:, None] > 0, rows, before[slot]))
    return scores, _placed(State(output.model_state, slots, rows), config, execution.mesh)


def _first_choices(
    logits: jax.Array, config: LanguageModelConfig, mesh: AnyMesh | None
) -> dict[str, jax.Array]:
    """Return the last two fields of PromptScores, of logits [R, T, V]."""
    rows = P(config.model.data_axis)
    find = on_shards(first_choices, mesh, rows, rows)

    def at(position: jax.Array) -> tuple[jax.Array, jax.Array]:
        return find(_whole_rows(position[:, None], config, mesh))

    # One position after the other: no device holds [R, T, V].
    found = lax.map(at, jnp.moveaxis(logits, 1, 0))
    ids, logprobs = (jnp.moveaxis(x, 0, 1) for x in found)
    return {"top_logprob_ids": ids, "top_logprobs": logprobs}


@_step
def first_token(
    state: State,
    drawing: jax.Array,
    source: jax.Array,
    length: jax.Array,
    *,
    config: LanguageModelConfig,
    execution: Execution = ONE_DEVICE,
) -> tuple[Decoded, State]:
    """Draw the first token of the slots `drawing` bool [B], whose prompts have been read.

    source: int32 [B], the slot that read the prompt, whose cache and logits each takes over: its
    own, or one that answers, or has answered, the same prompt. length: int32 [B], the prompt's.
    Returns one token for each, and the state.
    """
    memory, slots, logits = state
    logits = jnp.where(drawing[:, None], logits[source], logits)
    memory = _take_over(memory, drawing, source, length, config, execution.mesh)
    decoded, slots = _draw(config, execution.mesh, logits, slots, drawing)
    state = _placed(State(memory, slots, logits), config, execution.mesh)
    decoded = jax.tree.map(lambda x: x[None], decoded)
    return readable(decoded, execution.mesh), state


def _take_over(
    memory: Memory,
    taking: jax.Array,
    source: jax.Array,
    length: jax.Array,
    config: LanguageModelConfig,
    mesh: AnyMesh | None,
) -> Memory:
    """Give the slots `taking` bool [B] the first `length` [B] positions of the slots `source`."""
    layers = memory.layers
    step = jnp.where(taking, length, layers.step)
    valid = jnp.where(taking[:, None], memory.valid[source], memory.valid)
    copying = taking & (source != jnp.arange(source.shape[0]))

    def local(
        cache: jax.Array, copying: jax.Array, source: jax.Array, length: jax.Array
    ) -> jax.Array:
        # Local: cache [L, B/data, S, K/model, H]; the others [B] as a whole.
        def copy(slot: jax.Array, cache: jax.Array) -> jax.Array:
            own, here = _in_part(cache, source[slot], config, mesh)
            row = lax.dynamic_slice_in_dim(cache, own, 1, axis=1)
            if mesh is not None:
                # The bits, from the part of the data axis that has them to all others.
                kind = jnp.dtype(f"uint{8 * row.dtype.itemsize}")
                bits = lax.bitcast_convert_type(row, kind).astype(jnp.uint32)
                bits = lax.psum(jnp.where(here, bits, 0), config.model.data_axis)
                row = lax.bitcast_convert_type(bits.astype(kind), row.dtype)
            at, mine = _in_part(cache, slot, config, mesh)
            old = lax.dynamic_slice_in_dim(cache, at, 1, axis=1)
            # What an answer to the prompt has added may be NaN.
            row = jnp.where(mine & (_positions(cache) < length[slot]), row, old)
            return lax.dynamic_update_slice_in_dim(cache, row, at, axis=1)

        def visit(slot: jax.Array, cache: jax.Array) -> jax.Array:
            return lax.cond(copying[slot], lambda c: copy(slot, c), lambda c: c, cache)

        return lax.fori_loop(0, source.shape[0], visit, cache)

    cache = memory_specs(config).layers.k
    copy_all = on_shards(local, mesh, (cache, P(), P(), P()), cache)
    k, v = (copy_all(x, copying, source, length) for x in (layers.k, layers.v))
    return Memory(layers._replace(k=k, v=v, step=step), valid)


@_step
def decode(
    params: Any,
    state: State,
    running: jax.Array,
    count: jax.Array,
    until_free: jax.Array,
    *,
    config: LanguageModelConfig,
    execution: Execution = ONE_DEVICE,
    hooks: Hooks = (),
    hook_args: Sequence[Any] = (),
) -> tuple[Decoded, State]:
    """Draw the next tokens of the slots that are active and `running` bool [B], in one dispatch.

    count: int32 [], up to MOST_TOKENS, how many for each; fewer where an answer ends.
    until_free: bool [], end with the first token that ends an answer, as others wait for its slot.
    Returns what was drawn, and the state.
    """
    running &= state.slots.settings.active

    def more(carry: tuple[jax.Array, Decoded, State]) -> jax.Array:
        i, _, state = carry
        active = state.slots.settings.active
        ended = jnp.any(running & ~active)
        return (i < count) & jnp.any(running & active) & ~(until_free & ended)

    def draw(carry: tuple[jax.Array, Decoded, State]) -> tuple[jax.Array, Decoded, State]:
        i, decoded, state = carry
        memory, slots, logits = state
        drawing = slots.settings.active & running
        length = drawing.astype(jnp.int32)
        # Else what is made of a weight, such as the table in float32 for a CPU's product, would be
        # made once before the loop, and held.
        own, token = lax.optimization_barrier((params, slots.token))
        output = apply_model(
            config, execution, own, token, memory, length, hooks=bind(hooks, hook_args)
        )
        rows = _whole_rows(output.logits, config, execution.mesh)
        new, slots = _draw(config, execution.mesh, rows, slots, drawing)
        state = _placed(State(output.model_state, slots, logits), config, execution.mesh)
        return i + 1, jax.tree.map(lambda all, x: all.at[i].set(x), decoded, new), state

    one, _ = jax.eval_shape(
        functools.partial(_draw, config, execution.mesh), state.logits, state.slots, running
    )
    nothing = jax.tree.map(lambda x: jnp.zeros((MOST_TOKENS, *x.shape), x.dtype), one)
    _, decoded, state = lax.while_loop(more, draw, (jnp.int32(0), nothing, state))
    return readable(decoded, execution.mesh), state


@functools.partial(jax.jit, static_argnames=("config", "execution"), donate_argnames=("memory",))
def logits_step(
    params: Any,
    memory: Memory,
    length: jax.Array,
    tokens: jax.Array,
    *,
    config: LanguageModelConfig,
    execution: Execution = ONE_DEVICE,
    hooks: Hooks = (),
    hook_args: Sequence[Any] = (),
) -> tuple[jax.Array, Memory]:
    """Read the first `length` int32 [B] of tokens [B, T] -> logits [B, T, V], and the memory."""
    output = apply_model(
        config, execution, params, tokens, memory, length,
        every_position=True, hooks=bind(hooks, hook_args),
    )  # fmt: skip
    return readable(output.logits, execution.mesh), output.model_state


@functools.partial(jax.jit, static_argnames=("config", "execution"), donate_argnames=("memory",))
def score_step(
    params: Any,
    memory: Memory,
    length: jax.Array,
    tokens: jax.Array,
    targets: jax.Array,
    *,
    config: LanguageModelConfig,
    execution: Execution = ONE_DEVICE,
    hooks: Hooks = (),
    hook_args: Sequence[Any] = (),
) -> tuple[tuple[jax.Array, jax.Array], Memory]:
    """As `logits_step` -> the log-probabilities [B, T] of `targets` after each, and the memory.

    And whether each target is the likeliest token there, bool [B, T].
    """
    output = apply_model(
        config, execution, params, tokens, memory, length,
        every_position=True, hooks=bind(hooks, hook_args),
    )  # fmt: skip
    greedy = jnp.argmax(output.logits, axis=-1) == targets
    found = _log_probabilities(output.logits, targets), greedy
    return readable(found, execution.mesh), output.model_state


@functools.partial(jax.jit, static_argnames=("config", "execution", "capture", "capture_layers"))
def inspect_step(
    params: Any,
    tokens: jax.Array,
    *,
    config: LanguageModelConfig,
    execution: Execution,
    capture: tuple[str, ...],
    capture_layers: tuple[int, ...] | None,
    hooks: Hooks = (),
    hook_args: Sequence[Any] = (),
) -> tuple[jax.Array, Captured]:
    """Read whole sequences, tokens [B, T] -> logits [B, T, V], and what is captured."""
    output = apply_model(
        config, execution, params, tokens,
        capture=capture, capture_layers=capture_layers, hooks=bind(hooks, hook_args),
    )  # fmt: skip
    return readable((output.logits, output.captured), execution.mesh)


def _log_probabilities(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return float32 [B, T], the log-probabilities of `targets` [B, T] by logits [B, T, V]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "batch", "execution"))
def new_memory(
    *, config: LanguageModelConfig, batch: int, execution: Execution = ONE_DEVICE
) -> Memory:
    """Return an empty memory for `batch` sequences of the whole context."""
    dtype = execution.operations.cache_dtype(config.fprop_dtype)
    memory = config.model.init_memory(batch, config.sequence_len, dtype)
    return _place_memory(memory, config, execution.mesh)


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
        frequency_penalty=reals,
        bias=marks.astype(jnp.float32),
        in_prompt=marks,
        in_answer=marks.astype(jnp.int32),
        top_logprobs=rows,
    )
    return Slots(rows[:, None], rows, rows.astype(jnp.uint32), settings, marks, rows, rows)


def _idle_logits(config: LanguageModelConfig, batch: int) -> jax.Array:
    return jnp.zeros([batch, config.vocab_size], jnp.float32)


@functools.partial(jax.jit, static_argnames=("config", "batch", "execution"))
def new_state(
    *, config: LanguageModelConfig, batch: int, execution: Execution = ONE_DEVICE
) -> State:
    """Return the state of slots that serve nothing."""
    memory = new_memory(config=config, batch=batch, execution=execution)
    state = State(memory, _idle_slots(config, batch), _idle_logits(config, batch))
    return _placed(state, config, execution.mesh)


def abstract_inputs(
    config: LanguageModelConfig,
    execution: Execution,
    batch: int,
    chunk: int | None = None,
    stored: Any = None,
) -> tuple[Any, ...]:
    """Return what `prefill` of a chunk length, or `decode`, takes, without any data.

    Leaves are jax.ShapeDtypeStruct with shardings, to compile a step ahead of time:
    `decode.lower(*abstract_inputs(config, how, 1), config=config, execution=how).compile()`.
    """
    mesh = execution.mesh

    def place(tree: Any, specs: Any) -> Any:
        if mesh is None:
            return tree
        shardings = named_shardings(specs, mesh)
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    shapes = stored_shapes(config, stored)
    params = place(shapes, parameter_specs(shapes, config.partition_rules(mesh), mesh))
    memory = jax.eval_shape(lambda: new_memory(config=config, batch=batch, execution=execution))
    memory = place(memory, memory_specs(config))

    def array(*shape: int, dtype: Any = jnp.int32) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = jax.eval_shape(lambda: (_idle_slots(config, batch), _idle_logits(config, batch)))
    rows = place(rows, jax.tree.map(lambda _: P(config.model.data_axis), rows))
    state = State(memory, *rows)
    if chunk is None:
        return params, state, array(batch, dtype=bool), array(), array(dtype=bool)
    prompts = axis_size(mesh, config.model.data_axis)
    return params, state, array(prompts, chunk), array(prompts), array(prompts)


def device_bytes(
    config: LanguageModelConfig, mesh: AnyMesh | None, batch: int, stored: Any = None
) -> int:
    """Return the bytes that one device holds between steps: parameters, and `batch` memories.

    stored: as in `stored_shapes`.
    """
    execution = config.model.execution(mesh)
    params, state, *_ = abstract_inputs(config, execution, batch, stored=stored)

    def own(array: Any) -> int:
        shape = array.shape if mesh is None else array.sharding.shard_shape(array.shape)
        return math.prod(shape) * array.dtype.itemsize

    return sum(map(own, jax.tree.leaves((params, state.memory))))
