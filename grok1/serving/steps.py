"""The compiled steps, which map a state to the next one, and their inputs, real or abstract.

Functional core: pure functions, jitted at module level. A sequence's result depends on its own row
only, so a request gives the same tokens alone and in a batch. scheduler.py, scoring.py and
inspecting.py drive them; plan.py compiles them ahead of time.

B is the number of slots, that is, of sequences that a step serves at once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from grok1.checks import require
from grok1.execution import ONE_DEVICE, Execution, Executions
from grok1.inspection import Captured, HookArgs, SiteHooks, check_hooks
from grok1.ops.cache import KVMemory, Memory
from grok1.ops.quantization import Params, Shapes
from grok1.ops.rounded_table import RoundedTable
from grok1.parallel.sharding import (
    AnyMesh,
    SpecTree,
    axis_size,
    constrain,
    named_shardings,
    on_shards,
    parameter_specs,
    readable,
)
from grok1.parameters import EMBEDDINGS, embedding_table
from grok1.serving.hooked import Hooks, as_arguments, as_hooks, bind
from grok1.serving.likely_logits import likely_logits
from grok1.serving.sampling import (
    Draw,
    SampleOutput,
    SampleSettings,
    first_choices,
    log_probabilities,
    most_probable,
    sample_logits,
)

if TYPE_CHECKING:
    from model import LanguageModelConfig, LanguageModelOutput

Tree = TypeVar("Tree")

MOST_TOKENS = 16  # per slot in one dispatch of `decode`


class LoadedModel(NamedTuple):
    """A model on its devices, and the shapes for which its steps are compiled.

    params: shaped as by `stored_shapes`, placed on the mesh. executions: how each kind of step is
    run, all on one mesh. num_slots: B. pad_sizes: the chunk lengths, ascending, for which prefill
    is compiled. rounded: of the output table, for `decode`; None: it reads the table itself. hooks:
    functions that change activations; hook_args: their additional arguments after layer and array.
    """

    params: Params
    config: LanguageModelConfig
    executions: Executions
    num_slots: int
    pad_sizes: Sequence[int]
    rounded: RoundedTable | None = None
    hooks: Hooks = ()
    hook_args: HookArgs = ()

    def hooked(self, hooks: SiteHooks | None, hook_args: HookArgs) -> LoadedModel:
        """Return the same model with hooks in its steps. Raises ValueError if they are invalid."""
        devices = jax.tree.leaves(self.params)[0].sharding.device_set
        checked, arguments = check_hooks(hooks, self.config.model), as_arguments(hook_args, devices)
        needed = bool(checked) or not arguments
        require(needed, "hook_args", "none without hooks", hook_args)
        rounded = None if checked else self.rounded
        return self._replace(hooks=as_hooks(checked), hook_args=arguments, rounded=rounded)

    @property
    def mesh(self) -> Mesh | None:
        """The devices, or None for one."""
        mesh = self.executions.decode.mesh
        assert not isinstance(mesh, AbstractMesh)
        return mesh


class Slots(NamedTuple):
    """What each slot needs for its next token, on the device.

    token: int32 [B, 1], the last token. drawn: int32 [B], number of tokens drawn so far.
    seed: uint32 [B]. settings: SampleSettings with every field given; `active` marks the slots in
    use. ends: bool [B, V], the tokens that end an answer. min_len: int32 [B], number of first
    tokens that are not drawn from `ends`. limit: int32 [B], the most tokens to draw. A slot that
    has drawn its last token is no longer active.
    """

    token: jax.Array
    drawn: jax.Array
    seed: jax.Array
    settings: SampleSettings
    ends: jax.Array
    min_len: jax.Array
    limit: jax.Array


class State(NamedTuple):
    """What the devices hold between steps, in addition to the parameters.

    memory: the cache of each slot. slots: what it needs for its next token. logits: float32 [B, V],
    those after the last prompt token read so far, from which an answer's first token is drawn.
    """

    memory: Memory
    slots: Slots
    logits: jax.Array


class Decoded(NamedTuple):
    """The tokens of one dispatch, in the order in which they were drawn, as arrays of NumPy.

    n is MOST_TOKENS in `decode`, 1 in `first_token`. drawn: bool [n, B], True where a token was
    drawn; the other fields are zero elsewhere. token: int32 [n, B]. logprob: float32 [n, B], as in
    SampleOutput; NaN if the logits were not all finite, where the token is meaningless.
    top_logprob_ids, top_logprobs: [n, B, min(TOP_LOGPROBS, V)], as in SampleOutput.
    """

    drawn: np.ndarray
    token: np.ndarray
    logprob: np.ndarray
    top_logprob_ids: np.ndarray
    top_logprobs: np.ndarray


def unpack(rows: np.ndarray) -> Decoded:
    """Return the tokens that `_pack` has put in int32 [n, B, 3 + 2 N], on the host."""
    drawn, token, *_ = np.moveaxis(rows, -1, 0)
    count = (rows.shape[-1] - 3) // 2
    floats = rows[..., 2 + count :].view(np.float32)
    ids = rows[..., 2 : 2 + count]
    return Decoded(drawn.astype(bool), token, floats[..., 0], ids, floats[..., 1:])


def _pack(sample: SampleOutput, drawn: jax.Array) -> jax.Array:
    """Put what `decode` returns of each slot in one array, int32 [B, 3 + 2 N].

    Several arrays would be written, and copied to the host, one after the other.
    """
    assert sample.top_logprob_ids is not None and sample.top_logprobs is not None
    floats = jnp.concatenate([sample.logprob, sample.top_logprobs], axis=1)
    floats = lax.bitcast_convert_type(floats, jnp.int32)
    fields = drawn[:, None].astype(jnp.int32), sample.token_id, sample.top_logprob_ids, floats
    return jnp.concatenate(fields, axis=1)


class PromptScores(NamedTuple):
    """Log-probabilities for one chunk of a prompt.

    logprob: float32 [R, T], the log-probability of the token after each. top_logprob_ids: int32
    [R, T, min(TOP_LOGPROBS, V)], the most probable next tokens, in order. top_logprobs: float32,
    their log-probabilities. The last two are None if not requested.
    """

    logprob: jax.Array
    top_logprob_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def stored_shapes(config: LanguageModelConfig, stored: Shapes | None = None) -> Shapes:
    """Return the abstract parameters on the devices, with the embedding in the activation dtype.

    stored: their types in a checkpoint; None: int8 with scales, as released.
    """
    own = config.param_shapes() if stored is None else stored
    shapes = {module: {**leaves} for module, leaves in own.items()}
    module, name = EMBEDDINGS
    table = shapes[module][name]
    shapes[module][name] = jax.ShapeDtypeStruct(table.shape, config.fprop_dtype)
    return shapes


def memory_specs(config: LanguageModelConfig) -> Memory:
    """Return the PartitionSpecs of a Memory: sequences over data, heads over model."""
    data, model = config.model.data_axis, config.model.model_axis
    specs: Any = P(None, data, None, model, None), P(data), P(data, None)
    cache, step, valid = specs
    return Memory(KVMemory(cache, cache, step), valid)


def apply_model(
    config: LanguageModelConfig,
    execution: Execution,
    params: Params,
    tokens: jax.Array,
    memory: Memory | None = None,
    length: jax.Array | None = None,
    **options: Any,
) -> Any:
    """Run the model on tokens [B, T], outside `hk.transform` -> LanguageModelOutput."""

    def run(
        tokens: jax.Array, memory: Memory | None, length: jax.Array | None
    ) -> LanguageModelOutput | jax.Array:
        return config.make(execution=execution)(tokens, memory, length=length, **options)

    model: Any = hk.without_apply_rng(hk.transform(run))
    output = model.apply(params, tokens, memory, length)
    if memory is None:
        return output
    # The memory keeps its sharding, so that its donated buffers can be reused.
    return output._replace(model_state=_place_memory(output.model_state, config, execution.mesh))


def _place_memory(memory: Memory, config: LanguageModelConfig, mesh: AnyMesh | None) -> Memory:
    return jax.tree.map(lambda x, spec: constrain(x, mesh, *spec), memory, memory_specs(config))


def _draw(
    config: LanguageModelConfig,
    execution: Execution,
    logits: jax.Array,
    slots: Slots,
    drawing: jax.Array,
    exact: Callable[[jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, Slots]:
    """Draw the next token of the slots that are active and `drawing` bool [B] -> `_pack`, slots.

    logits: [B, V]. exact: tokens int32 [B] -> their logits [B], if those given are not all exact.
    Other slots are unchanged.
    """
    # Each data shard draws for its own rows: by default, XLA gathered all rows for lax.top_k.
    rows = P(config.model.data_axis)
    draw = functools.partial(_draw_rows, form=execution.operations.draw, exact=exact)
    return on_shards(draw, execution.mesh, rows, rows)(logits, slots, drawing)


def _draw_rows(
    logits: jax.Array,
    slots: Slots,
    drawing: jax.Array,
    form: Draw | None,
    exact: Callable[[jax.Array], jax.Array] | None,
) -> tuple[jax.Array, Slots]:
    """`_draw` on one device."""
    keys = jax.vmap(lambda seed, n: jax.random.fold_in(jax.random.key(seed), n))(
        slots.seed, slots.drawn
    )
    settings, active = slots.settings, slots.settings.active & drawing
    early = (slots.drawn < slots.min_len)[:, None]
    allowed = settings._replace(mask=settings.mask & ~(slots.ends & early), active=active)
    sample = sample_logits(keys, logits, allowed, form)
    row, token = jnp.arange(len(logits)), sample.token_id[:, 0]
    logprob = sample.logprob
    if exact is not None:
        logprob += (exact(token) - logits[row, token])[:, None]
    finite = jnp.isfinite(jnp.max(jnp.abs(logits), axis=-1, keepdims=True))  # NaN is the maximum
    packed = _pack(sample._replace(logprob=jnp.where(finite, logprob, jnp.nan)), drawing)

    drawn = slots.drawn + active
    over = active & (slots.ends[row, token] | (drawn >= slots.limit))
    assert settings.in_answer is not None
    in_answer = settings.in_answer.at[row, token].add(active)
    settings = settings._replace(active=settings.active & ~over, in_answer=in_answer)
    token = jnp.where(active[:, None], sample.token_id, slots.token)
    return packed, slots._replace(token=token, drawn=drawn, settings=settings)


def _gather_rows(logits: jax.Array, config: LanguageModelConfig, mesh: AnyMesh | None) -> jax.Array:
    """Logits [B, 1, V] -> [B, V], each row on one device.

    Sampling reads entire rows: gathering them once is cheaper than many reductions.
    """
    return constrain(logits[:, 0], mesh, config.model.data_axis, None)


def _placed(state: State, config: LanguageModelConfig, mesh: AnyMesh | None) -> State:
    """Give the state the same sharding after every step, so that no step is recompiled."""
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
    source: jax.Array | int = 0,
    *,
    config: LanguageModelConfig,
    execution: Execution = ONE_DEVICE,
) -> State:
    """Assign the slot `index` int32 [] to a new sequence, `row` (without the slot axis).

    kept: int32 [], the number of first cache positions that it takes over from the slot `source`
    int32 [], which may be `index`, with the logits after its prompt. The other positions are set to
    zero, as a NaN from the previous sequence would propagate into the sums of the new one.
    """
    memory, slots, logits = state
    chosen = jnp.arange(slots.drawn.shape[0]) == index  # bool [B]
    slots = jax.tree.map(
        lambda x, new: jnp.where(chosen.reshape(-1, *(1,) * (x.ndim - 1)), new, x), slots, row
    )
    logits = jnp.where(chosen[:, None], logits[source], logits)
    step = jnp.where(chosen, kept, memory.layers.step)
    first = jnp.arange(memory.valid.shape[1]) < kept  # bool [S]
    valid = jnp.where(chosen[:, None], memory.valid[source] & first, memory.valid)
    k, v = (
        _copy_first(cache, index, source, kept, config, execution.mesh)
        for cache in (memory.layers.k, memory.layers.v)
    )
    memory = Memory(memory.layers._replace(k=k, v=v, step=step), valid)
    return _placed(State(memory, slots, logits), config, execution.mesh)


def _copy_first(
    cache: jax.Array,
    index: jax.Array,
    source: jax.Array | int,
    kept: jax.Array | int,
    config: LanguageModelConfig,
    mesh: AnyMesh | None,
) -> jax.Array:
    """Copy the first `kept` positions of slot `source` to slot `index`, and zero the others.

    cache: [L, B, S, K, H].
    """

    def copy(cache: jax.Array, index: jax.Array, source: jax.Array) -> jax.Array:
        own, here = _in_part(cache, source, config, mesh)
        row = lax.dynamic_slice_in_dim(cache, own, 1, axis=1)
        if mesh is not None:
            # Broadcast the bits from the data shard that has them to all others.
            kind = jnp.dtype(f"uint{8 * row.dtype.itemsize}")
            bits = lax.bitcast_convert_type(row, kind).astype(jnp.uint32)
            bits = lax.psum(jnp.where(here, bits, 0), config.model.data_axis)
            row = lax.bitcast_convert_type(bits.astype(kind), row.dtype)
        place, mine = _in_part(cache, index, config, mesh)
        row = jnp.where(mine, row, lax.dynamic_slice_in_dim(cache, place, 1, axis=1))
        return lax.dynamic_update_slice_in_dim(cache, row, place, axis=1)

    def local(cache: jax.Array, index: jax.Array, source: jax.Array, kept: jax.Array) -> jax.Array:
        # Local: cache [L, B/data, S, K/model, H].
        needed = (kept > 0) & (source != index)
        cache = lax.cond(needed, lambda c: copy(c, index, source), lambda c: c, cache)
        place, mine = _in_part(cache, index, config, mesh)
        row = lax.dynamic_slice_in_dim(cache, place, 1, axis=1)
        position = jnp.arange(cache.shape[2])[:, None, None]
        row = jnp.where(mine & (position >= kept), jnp.zeros([], cache.dtype), row)
        return lax.dynamic_update_slice_in_dim(cache, row, place, axis=1)

    layout = memory_specs(config).layers.k
    run = on_shards(local, mesh, (layout, P(), P(), P()), layout)
    return run(cache, index, jnp.asarray(source, jnp.int32), jnp.asarray(kept, jnp.int32))


def _in_part(
    cache: jax.Array, slot: jax.Array, config: LanguageModelConfig, mesh: AnyMesh | None
) -> tuple[jax.Array, jax.Array]:
    """Return a slot's local index in this data shard, and whether the slot belongs to the shard.

    cache: [L, B/data, S, K/model, H], inside `on_shards`. An index out of range is clipped.
    """
    size = cache.shape[1]
    first = 0 if mesh is None else lax.axis_index(config.model.data_axis) * size
    place = slot - first
    return jnp.clip(place, 0, size - 1), (place >= 0) & (place < size)


@functools.partial(
    jax.jit, static_argnames=("config", "execution", "top_logprobs"), donate_argnames=("state",)
)
def prefill(
    params: Params,
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
    hook_args: HookArgs = (),
) -> tuple[PromptScores | None, State]:
    """Read one chunk of a prompt for each part of the data axis.

    tokens: int32 [R, T], of which the first `length` [R] are real (0: nothing is read). slot:
    int32 [R], the slot of each row; R is the size of the data axis, and each row's slot is in its
    own part of that axis. following: int32 [R, T], the token after each. top_logprobs: also report
    the most probable tokens. hooks: set by `with_hooks`, as for `decode`.
    Returns the scores of `following`, or None if it is None, and the state.
    """
    memory, slots, before = state
    output = apply_model(
        config, execution, params, tokens, memory, length,
        sequence=slot, every_position=following is not None, hooks=bind(hooks, hook_args),
    )  # fmt: skip
    logits, scores = output.logits, None
    if following is not None:
        if top_logprobs:
            scores = _with_first_choices(logits, following, config, execution.mesh)
        else:
            scores = PromptScores(_log_probabilities(logits, following))
        scores = readable(scores, execution.mesh)
        last = jnp.maximum(length - 1, 0)[:, None, None]
        logits = jnp.take_along_axis(logits, last, axis=1)
    rows = _gather_rows(logits, config, execution.mesh)
    rows = before.at[slot].set(jnp.where(length[:, None] > 0, rows, before[slot]))
    return scores, _placed(State(output.model_state, slots, rows), config, execution.mesh)


def _with_first_choices(
    logits: jax.Array, following: jax.Array, config: LanguageModelConfig, mesh: AnyMesh | None
) -> PromptScores:
    """Return all scores of `following` [R, T] for logits [R, T, V].

    If a token is the first choice, its log-probability has the same bits in both places.
    """

    def scores(logits: jax.Array, following: jax.Array) -> PromptScores:
        own = log_probabilities(logits, following[:, None])[:, 0]
        return PromptScores(own, *first_choices(logits))

    rows = P(config.model.data_axis)
    score = on_shards(scores, mesh, (rows, rows), rows)

    def at(position: tuple[jax.Array, jax.Array]) -> PromptScores:
        logits, following = position
        return score(_gather_rows(logits[:, None], config, mesh), following)

    # One position at a time, so that no device holds [R, T, V].
    found = lax.map(at, (jnp.moveaxis(logits, 1, 0), following.T))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)


@_step
def first_token(
    state: State,
    drawing: jax.Array,
    *,
    config: LanguageModelConfig,
    execution: Execution = ONE_DEVICE,
) -> tuple[jax.Array, State]:
    """Draw the first token of the slots `drawing` bool [B], whose prompts have been read.

    Returns one token for each, for `unpack`, and the state.
    """
    memory, slots, logits = state
    tokens, slots = _draw(config, execution, logits, slots, drawing)
    state = _placed(State(memory, slots, logits), config, execution.mesh)
    return readable(tokens[None], execution.mesh), state


@_step
def decode(
    params: Params,
    state: State,
    running: jax.Array,
    count: jax.Array,
    until_free: jax.Array,
    rounded: RoundedTable | None = None,
    *,
    config: LanguageModelConfig,
    execution: Execution = ONE_DEVICE,
    hooks: Hooks = (),
    hook_args: HookArgs = (),
) -> tuple[jax.Array, State]:
    """Draw the next tokens of the slots that are active and `running` bool [B], in one dispatch.

    count: int32 [], tokens per slot, up to MOST_TOKENS; fewer if an answer ends.
    until_free: bool [], stop after the first token that ends an answer, as a request is waiting.
    rounded: as in LoadedModel.
    Returns the drawn tokens, for `unpack`, and the state.
    """
    running &= state.slots.settings.active

    def more(carry: tuple[jax.Array, jax.Array, State]) -> jax.Array:
        i, _, state = carry
        active = state.slots.settings.active
        # Both at once, so that the devices need one exchange.
        going, ended = jnp.any(running & jnp.stack([active, ~active]), axis=1)
        return (i < count) & going & ~(until_free & ended)

    def draw(carry: tuple[jax.Array, jax.Array, State]) -> tuple[jax.Array, jax.Array, State]:
        i, tokens, state = carry
        memory, slots, logits = state
        drawing = slots.settings.active & running
        length = drawing.astype(jnp.int32)
        # Keeps XLA from hoisting conversions of weights out of the loop and storing the result,
        # such as the float32 embedding table for a matrix product on a CPU.
        own, token = lax.optimization_barrier((params, slots.token))
        output = apply_model(
            config, execution, own, token, memory, length, hooks=bind(hooks, hook_args)
        )
        rows, exact = _gather_rows(output.logits, config, execution.mesh), None
        if rounded is not None:  # XLA then leaves the model's own logits out
            x, table = output.last_hidden[:, 0], embedding_table(own)
            rows, exact = likely_logits(config, execution, x, table, rounded, slots)
        new, slots = _draw(config, execution, rows, slots, drawing, exact)
        state = _placed(State(output.model_state, slots, logits), config, execution.mesh)
        return i + 1, tokens.at[i].set(new), state

    one, _ = jax.eval_shape(
        functools.partial(_draw, config, execution), state.logits, state.slots, running
    )
    nothing = jnp.zeros((MOST_TOKENS, *one.shape), one.dtype)
    _, tokens, state = lax.while_loop(more, draw, (jnp.int32(0), nothing, state))
    return readable(tokens, execution.mesh), state


@functools.partial(jax.jit, static_argnames=("config", "execution"), donate_argnames=("memory",))
def logits_step(
    params: Params,
    memory: Memory,
    length: jax.Array,
    tokens: jax.Array,
    *,
    config: LanguageModelConfig,
    execution: Execution = ONE_DEVICE,
    hooks: Hooks = (),
    hook_args: HookArgs = (),
) -> tuple[jax.Array, Memory]:
    """Read the first `length` int32 [B] of tokens [B, T] -> logits [B, T, V] and the memory."""
    output = apply_model(
        config, execution, params, tokens, memory, length,
        every_position=True, hooks=bind(hooks, hook_args),
    )  # fmt: skip
    return readable(output.logits, execution.mesh), output.model_state


@functools.partial(jax.jit, static_argnames=("config", "execution"), donate_argnames=("memory",))
def score_step(
    params: Params,
    memory: Memory,
    length: jax.Array,
    tokens: jax.Array,
    targets: jax.Array,
    *,
    config: LanguageModelConfig,
    execution: Execution = ONE_DEVICE,
    hooks: Hooks = (),
    hook_args: HookArgs = (),
) -> tuple[tuple[jax.Array, jax.Array], Memory]:
    """Like `logits_step`, but score `targets` [B, T], the token after each.

    Returns their log-probabilities [B, T], whether each target is the most probable token, bool
    [B, T], and the memory.
    """
    output = apply_model(
        config, execution, params, tokens, memory, length,
        every_position=True, hooks=bind(hooks, hook_args),
    )  # fmt: skip
    greedy = most_probable(output.logits) == targets
    found = _log_probabilities(output.logits, targets), greedy
    return readable(found, execution.mesh), output.model_state


@functools.partial(jax.jit, static_argnames=("config", "execution", "capture", "capture_layers"))
def inspect_step(
    params: Params,
    tokens: jax.Array,
    *,
    config: LanguageModelConfig,
    execution: Execution,
    capture: tuple[str, ...],
    capture_layers: tuple[int, ...] | None,
    hooks: Hooks = (),
    hook_args: HookArgs = (),
) -> tuple[jax.Array, Captured]:
    """Read complete sequences, tokens [B, T] -> logits [B, T, V] and the captured arrays."""
    output = apply_model(
        config, execution, params, tokens,
        capture=capture, capture_layers=capture_layers, hooks=bind(hooks, hook_args),
    )  # fmt: skip
    return readable((output.logits, output.captured), execution.mesh)


def _log_probabilities(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Return the log-probabilities, float32 [B, T], of `targets` [B, T] for logits [B, T, V]."""
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@functools.partial(jax.jit, static_argnames=("config", "batch", "execution"))
def new_memory(
    *, config: LanguageModelConfig, batch: int, execution: Execution = ONE_DEVICE
) -> Memory:
    """Return an empty memory for `batch` sequences of the full context length."""
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
    """Return a state in which all slots are unused."""
    memory = new_memory(config=config, batch=batch, execution=execution)
    state = State(memory, _idle_slots(config, batch), _idle_logits(config, batch))
    return _placed(state, config, execution.mesh)


def abstract_inputs(
    config: LanguageModelConfig,
    execution: Execution,
    batch: int,
    chunk: int | None = None,
    stored: Shapes | None = None,
) -> tuple[Shapes, State, *tuple[jax.ShapeDtypeStruct, ...]]:
    """Return abstract inputs of `prefill` for a chunk length, or of `decode` if `chunk` is None.

    Leaves are jax.ShapeDtypeStruct with shardings, to compile a step ahead of time:
    `decode.lower(*abstract_inputs(config, how, 1), config=config, execution=how).compile()`.
    """
    mesh = execution.mesh

    def place(tree: Tree, specs: SpecTree) -> Tree:
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

    def array(*shape: int, dtype: DTypeLike = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    rows = jax.eval_shape(lambda: (_idle_slots(config, batch), _idle_logits(config, batch)))
    rows = place(rows, jax.tree.map(lambda _: P(config.model.data_axis), rows))
    state = State(memory, *rows)
    if chunk is None:
        return params, state, array(batch, dtype=bool), array(), array(dtype=bool)
    prompts = axis_size(mesh, config.model.data_axis)
    return params, state, array(prompts, chunk), array(prompts), array(prompts)


def device_bytes(
    config: LanguageModelConfig, mesh: AnyMesh | None, batch: int, stored: Shapes | None = None
) -> int:
    """Return the bytes that one device holds between steps: parameters and `batch` memories.

    stored: as in `stored_shapes`.
    """
    execution = config.model.execution(mesh)
    params, state, *_ = abstract_inputs(config, execution, batch, stored=stored)

    def own(array: jax.ShapeDtypeStruct) -> int:
        shape = array.shape if mesh is None else array.sharding.shard_shape(array.shape)
        return math.prod(shape) * array.dtype.itemsize

    return sum(map(own, jax.tree.leaves((params, state.memory))))
