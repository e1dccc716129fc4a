"""Load a model onto a mesh, and serve requests with it.

`ModelRunner` holds the model and loads its weights; `InferenceRunner` serves requests with them.
Scheduling is in grok1/serving/scheduler.py, and the device programs are in steps.py next to it.

B is the number of slots: sequences that the compiled programs serve at once.
"""

import dataclasses
import inspect
import logging
import os
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece
from jax.sharding import Mesh
from numpy.typing import ArrayLike

import checkpoint
from checkpoint import read_model_config
from grok1 import backend
from grok1.checks import is_integer, require
from grok1.compile_cache import enable as enable_compile_cache
from grok1.config_checks import check_router
from grok1.default_files import default_checkpoint, default_tokenizer
from grok1.execution import Execution, Executions, fastest
from grok1.inspection import HookArgs, SiteHooks
from grok1.kernels import dispatch
from grok1.ops.quantization import Params
from grok1.parallel.mesh_checks import check_devices, check_execution
from grok1.parallel.sharding import (
    axis_size,
    make_mesh,
    named_shardings,
    parameter_specs,
    split_over_hosts,
)
from grok1.parameters import EMBEDDINGS, embedding_table
from grok1.serving import inspecting, scoring
from grok1.serving.inspecting import Inspection
from grok1.serving.likely_logits import rounded_table
from grok1.serving.memory_budget import check_memory
from grok1.serving.names import nearest_name
from grok1.serving.pure import pure_function
from grok1.serving.request import (
    AnswerError,
    CheckedRequest,
    Completion,
    Event,
    Prompt,
    Request,
    RequestError,
    as_list,
    as_request,
    as_requests,
    encode,
)
from grok1.serving.request_limits import CHUNKS
from grok1.serving.sampling import SampleOutput, SampleSettings, sample_token, top_p_filter
from grok1.serving.scheduler import Handle, Phase, Scheduler, Statistics, generate_alone
from grok1.serving.scoring import TokenScores
from grok1.serving.steps import MOST_TOKENS, LoadedModel
from grok1.serving.text import BOS_TOKEN, Vocabulary, load_tokenizer
from model import LanguageModelConfig, LanguageModelOutput

__all__ = [
    "AnswerError",
    "Completion",
    "Event",
    "Handle",
    "InferenceRunner",
    "Inspection",
    "ModelRunner",
    "Request",
    "RequestError",
    "SampleOutput",
    "SampleSettings",
    "Statistics",
    "TokenScores",
    "load_model",
    "load_server",
    "load_tokenizer",
    "make_mesh",
    "read_model_config",
    "sample_from_model",
    "sample_token",
    "top_p_filter",
    "with_settings",
]


# Fields of an Execution that are set from the mesh and the platform.
RUNNERS_OWN = {"mesh", "data_axis", "model_axis", "kernels"}
_log = logging.getLogger(__name__)

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


class ModelRunner:
    """The model, how many sequences it serves at once, and its weights.

    model: the configuration, its `fprop_dtype` included.
    bs_per_device: sequences per device; the number of slots is this times the number of devices, at
    least one, rounded up to a multiple of the data axis.
    checkpoint_path: a checkpoint directory; None: random int8 weights, seeded with `rng_seed`.
    kernels: use compiled kernels; ignored with an `execution`. execution: how prefill and decode
    are run; its mesh must be None, since the runner makes the mesh. None: the fastest execution for
    each, except for the fields in `settings`.
    """

    def __init__(
        self,
        model: LanguageModelConfig,
        bs_per_device: float,
        checkpoint_path: str | os.PathLike | None,
        rng_seed: int = 42,
        *,
        kernels: bool = False,
        execution: Execution | None = None,
        settings: Mapping[str, Any] | None = None,
    ):
        if not bs_per_device > 0:
            raise ValueError(f"bs_per_device: expected a number above 0, got {bs_per_device!r}")
        self.model = model
        self.bs_per_device = bs_per_device
        self.checkpoint_path = checkpoint_path
        if execution is not None:
            given = isinstance(execution, Execution)
            require(given, "execution", "a grok1.execution.Execution, or None", execution)
            expected = "one without a mesh; give the sizes of the mesh instead"
            require(execution.mesh is None, "execution", expected, execution.mesh)
            require(not settings, "settings", "none with an execution, which has them", settings)
        self.rng_seed = rng_seed
        self.kernels = kernels
        self.execution = execution
        self.settings = dict(settings or {})

    def executions(self, mesh: Mesh | None) -> Executions:
        """Return how prefill and decode are run on this mesh."""
        if self.execution is None:
            how = fastest(self.model, mesh, compiled=self.kernels)
            settings = self.settings
            if settings.get("expert_dispatch", "dynamic") != "dynamic":
                settings = {"kernels": "plain", **settings}  # other kernels need dynamic dispatch
            return Executions(*(dataclasses.replace(one, **settings) for one in how))
        execution = dataclasses.replace(self.execution, mesh=mesh)
        return Executions(execution, execution)

    def num_slots(self, mesh: Mesh | None) -> int:
        """Return B, the number of sequences served at once on this mesh."""
        devices = 1 if mesh is None else mesh.size
        data = axis_size(mesh, self.model.model.data_axis)
        wanted = max(1, round(self.bs_per_device * devices))
        return -(-wanted // data) * data

    def check(self, mesh: Mesh | None) -> None:
        """Raise ValueError if mesh, kernels, checkpoint or memory do not fit; loads no weights."""
        backend.check_settings()
        executions = self.executions(mesh)
        for execution in executions:
            check_execution(self.model, execution)
            dispatch.check(execution.kernels)
            check_router(self.model.model, execution.router)
        shapes = None
        if self.checkpoint_path is not None:
            shapes = checkpoint.shapes_in(self.checkpoint_path, self.model)
            checkpoint.check_files(self.checkpoint_path, shapes)
        in_place = mesh is None and checkpoint.used_in_place(self.checkpoint_path)
        check_memory(self.model, executions.decode, self.num_slots(mesh), shapes, in_place)

    def load_or_init(
        self, mesh: Mesh | None, progress: Callable[[int, int], object] | None = None
    ) -> Params:
        """Return the parameters, placed on the mesh or on the default device.

        progress: called as progress(bytes_done, bytes_total) while loading. Raises
        checkpoint.CheckpointError (a ValueError) if the files are invalid.
        """
        config, path = self.model, self.checkpoint_path
        shapes = config.param_shapes() if path is None else checkpoint.shapes_in(path, config)
        shardings = None
        if mesh is not None:
            specs = parameter_specs(shapes, config.partition_rules(mesh), mesh)
            shardings = named_shardings(specs, mesh)
        if path is None:
            params: Any = config.init_params(self.rng_seed, quantized=True)
            module, name = EMBEDDINGS
            params[module][name] = params[module][name].astype(config.fprop_dtype)
            return params if shardings is None else jax.device_put(params, shardings)
        dtypes = {"/".join(EMBEDDINGS): config.fprop_dtype}
        return checkpoint.load(path, shapes, shardings, dtypes, progress)


class InferenceRunner:
    """Serve requests in batches, each with its own settings, tokens and stop reason.

    name: a label for messages. runner: the model. load: a checkpoint directory to use instead of
    the runner's own. tokenizer_path: a SentencePiece model; None: prompts are token ids.
    local_mesh_config, between_hosts_config: as in make_mesh; (1, 1) twice means no mesh.
    pad_sizes: the chunk lengths for which prefill is compiled. A prompt is read in chunks of the
    largest length, and its remainder in the smallest that holds it. prefix_cache: let a prompt that
    begins like one that a slot has read and still holds copy that part, in chunks of the largest
    length, instead of reading it again; the answers are the same bit for bit. A prompt with
    prompt_logprobs is read in full. `logits`, `inspect` and `score` release what idle slots hold.

    `initialize()` loads everything and must be called before the other methods. Afterwards
    `executions` says how prefill and decode are run, and attributes cannot be set: the loaded model
    would not change with them.

    Any thread may call any method, and each call gets its own results, whichever thread drives the
    devices. A loop over `generate_events` or `stream` may call other methods. `logits`, `inspect`
    and `score` block other threads until they are done. If there are several processes, all must
    make the same calls in the same order, and so from one thread; if one fails, the others wait for
    it forever and must be killed (run.py watches its own). In a forked process every method raises
    RuntimeError: jax does not work there.
    """

    def __init__(
        self,
        name: str,
        runner: ModelRunner,
        load: str | os.PathLike | None,
        tokenizer_path: str | os.PathLike | None,
        local_mesh_config: tuple[int, int] = (1, 1),
        between_hosts_config: tuple[int, int] = (1, 1),
        pad_sizes: Sequence[int] = (1024,),
        prefix_cache: bool = True,
    ):
        sizes = list(pad_sizes) if isinstance(pad_sizes, Iterable) else []
        positive = bool(sizes) and all(is_integer(size) and size >= 1 for size in sizes)
        require(positive, "pad_sizes", "a list of integers >= 1", pad_sizes)
        require(isinstance(prefix_cache, bool), "prefix_cache", "true or false", prefix_cache)
        self.name = name
        self.runner = runner
        if load is not None:
            runner.checkpoint_path = load
        self.config = runner.model
        self.tokenizer_path = tokenizer_path
        self.mesh_config = (local_mesh_config, between_hosts_config)
        self.pad_sizes = sorted({min(int(size), self.config.sequence_len) for size in sizes})
        self.prefix_cache = prefix_cache
        self.tokenizer: sentencepiece.SentencePieceProcessor | None = None
        self.vocabulary: Vocabulary | None = None
        self.mesh: Mesh | None = None
        self.executions: Executions | None = None
        self.params: Any = None  # Params, once they are loaded
        self.num_slots = 0
        self._loaded: tuple[LoadedModel, Scheduler] | None = None

    def initialize(
        self,
        requests: Iterable[Request | Prompt] = (),
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Make the mesh, check the files, load the tokenizer and then the weights.

        requests: to be checked before the weights are loaded, which may take long. progress: called
        as progress(bytes_done, bytes_total). Raises ValueError with a one-sentence reason.
        """
        vars(self).pop("_fixed", None)
        if self.mesh_config != ((1, 1), (1, 1)):
            sizes, between = self.mesh_config
            if between == (1, 1):
                check_devices(self.config.model_axis_sizes(), *sizes, jax.local_device_count())
            heads = self.config.model.num_kv_heads
            self.mesh = make_mesh(*self.mesh_config, num_kv_heads=heads)
        self.runner.check(self.mesh)
        if self.tokenizer_path is not None:
            self.tokenizer = load_tokenizer(self.tokenizer_path, self.config.vocab_size)
            self.vocabulary = Vocabulary(self.tokenizer)
        self.num_slots = self.runner.num_slots(self.mesh)
        self._check_all(as_requests(requests, {})[0])
        self.params = self.runner.load_or_init(self.mesh, progress)
        self.executions = self.runner.executions(self.mesh)
        model = LoadedModel(
            self.params, self.config, self.executions, self.num_slots, self.pad_sizes
        )
        path, table = self.runner.checkpoint_path, embedding_table(self.params)
        stored = None if path is None else checkpoint.rounded_table(path, self.config)
        model = model._replace(rounded=rounded_table(table, self.executions.decode, stored))
        self._loaded = model, Scheduler(model, self.prefix_cache)
        self._fixed = frozenset(vars(self))

    def __setattr__(self, name: str, value: object) -> None:
        self._check_change(name)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self._check_change(name)
        super().__delattr__(name)

    def _check_change(self, name: str) -> None:
        if name in vars(self).get("_fixed", ()):
            raise AttributeError(
                f"{name}: expected no change to a loaded model; "
                "call load_model with other arguments to load another one"
            )

    @property
    def _scheduler(self) -> Scheduler:
        return self._get_loaded()[1]

    def _get_loaded(self) -> tuple[LoadedModel, Scheduler]:
        if self._loaded is None:
            raise ValueError(f"{self.name}: nothing is loaded yet; call initialize() first")
        return self._loaded

    def _with_model(
        self,
        work: Callable[[LoadedModel, *Arguments], Result],
        *arguments: *Arguments,
        hooks: SiteHooks | None = None,
        hook_args: HookArgs = (),
    ) -> Result:
        """Call `work` with the model while no slot uses it, after releasing idle slots' memory."""
        model, scheduler = self._get_loaded()
        model = model.hooked(hooks, hook_args)

        def call() -> Result:
            scheduler.release()
            return work(model, *arguments)

        return scheduler.alone(call)

    # ---------------------------------------------------------------------------- generation

    def run(self) -> Generator[str | None, Request, None]:
        """Serve one request at a time: `next(server)`, then `server.send(request)` -> the text.

        An invalid request raises ValueError, which ends the generator; call `run()` again.
        """
        while True:
            request = yield None
            yield self.generate([request])[0].text

    def submit(self, prompt: Request | Prompt, **settings: Any) -> Handle:
        """Queue a request and return its handle; `step` and other generating calls work on it.

        prompt: a Request; or a string or token ids, from which one is made with these settings.
        Raises ValueError that names the field, the expected values and the given one.
        """
        return self._scheduler.submit(self._check(as_request(prompt, settings)))

    def step(self, tokens: int = 1) -> list[Event]:
        """Do the next piece of work for all requests, and return the new tokens.

        Reads at most one chunk of a prompt, and draws `tokens` tokens for each request being
        answered, or one while a prompt is being read. Several tokens, up to 16, cost the host less,
        and are returned together. An empty list does not mean that all requests have ended; see
        `busy`.

        Each token of a submitted request is returned once: by `stream` if that is called for the
        request, else by `step`, including tokens that other calls have drawn since. If this call
        fails, the requests being answered end with an error. Raises ValueError unless `tokens` is
        from 1 to 16.
        """
        return self._scheduler.step(tokens)

    @property
    def busy(self) -> bool:
        """Whether there are unfinished requests, or tokens that `step` has yet to return."""
        return self._scheduler.busy

    @property
    def statistics(self) -> Statistics:
        """The work done since this was last set to `Statistics()`."""
        return self._scheduler.statistics

    @statistics.setter
    def statistics(self, statistics: Statistics) -> None:
        right = isinstance(statistics, Statistics)
        require(right, "statistics", "a Statistics(), which restarts the count", statistics)
        self._scheduler.statistics = statistics

    def stream(self, handle: Handle, tokens: int = 1) -> Iterator[Event]:
        """Return an iterator over the tokens of one request; other requests continue meanwhile.

        tokens: how many to draw at a time, as in `step`.
        """
        return self._scheduler.stream(handle, tokens)

    def cancel(self, handle: Handle) -> None:
        """End a request and free its slot for the next one. Its answer so far is kept."""
        self._scheduler.cancel(handle)

    @overload
    def generate(self, prompts: str | Sequence[int], **settings: Any) -> Completion: ...

    @overload
    def generate(self, prompts: Request, **settings: Any) -> Any: ...

    @overload
    def generate(
        self, prompts: Iterable[Request | Prompt], **settings: Any
    ) -> list[Completion]: ...

    def generate(
        self,
        prompts: Request | Prompt | Iterable[Request | Prompt],
        *,
        hooks: SiteHooks | None = None,
        hook_args: HookArgs = (),
        **settings: Any,
    ) -> Completion | list[Completion]:
        """Answer one prompt -> its Completion, or several -> a list of Completions in that order.

        prompts: a string, token ids or a Request, or a list of these. settings: fields of Request,
        for strings and ids: `generate("The fox", temperature=0, max_len=20)`.

        A request with num_samples > 1 has that many consecutive completions in the list, which is
        returned even for such a request alone. Raises ValueError for an invalid request, before the
        first token, and AnswerError (a ValueError), which holds all answers, if one ended with an
        error.

        hooks, hook_args: as for `inspect`, in prefill and decode. Hooks get the arrays of a chunk
        of a prompt, padded, or of the newest token of every slot; `grok1.inspection.positions`
        returns the tokens' positions. With hooks, other threads wait until all answers are done.
        """
        requests, single = as_requests(prompts, settings)
        events: Iterable[Event]
        if self._get_loaded()[0].hooked(hooks, hook_args).hooks:
            self._check_all(requests)
            checked = map(self._check, requests)
            events = self._with_model(generate_alone, checked, hooks=hooks, hook_args=hook_args)
        else:
            events = self.generate_events(requests, tokens=MOST_TOKENS)
        found: dict[tuple[int, int], Completion] = {}
        for event in events:
            if event.finish_reason is not None:
                found[event.request, event.sample] = event.completion
        answers = [found[place] for place in sorted(found)]
        for index, sample in sorted(found):
            if (error := found[index, sample].error) is not None:
                raise AnswerError(index, error, answers)
        return answers[0] if single and len(answers) == 1 else answers

    def generate_events(
        self,
        prompts: Request | Prompt | Iterable[Request | Prompt],
        phase: Phase = lambda _: None,
        tokens: int = 1,
        **settings: Any,
    ) -> Iterator[Event]:
        """Return an iterator over each token of each request as it is drawn.

        prompts, settings: as for `generate`. All requests are checked first: ValueError names the
        request and the error. Requests beyond the number of slots wait in order. Closing the
        iterator cancels its requests. If an answer ends with an error, its last event says so.
        phase: called with "prefill" and "decode" as these begin. tokens: how many to draw at a
        time, as in `step`.
        """
        scheduler, (requests, _) = self._scheduler, as_requests(prompts, settings)
        self._check_all(requests)
        return scheduler.answer(map(self._check, requests), tokens, phase)

    def encode(self, prompt: str | Sequence[int], parse_special: bool = False) -> list[int]:
        """Return the token ids of a string (without BOS), or check given ids. Raises ValueError.

        parse_special: read text such as [EOS] or <|separator|> as the piece of that name.
        """
        return encode(prompt, self.config, self.vocabulary, parse_special)

    @overload
    def decode(self, token_ids: Iterable[int]) -> str: ...

    @overload
    def decode(self, token_ids: Iterable[Iterable[int]]) -> list[str]: ...

    def decode(self, token_ids: Any) -> str | list[str]:
        """Return the text of token ids, or a list of texts for a list of token id sequences.

        The space with which every text begins is removed. Raises ValueError without a tokenizer,
        and for ids that are out of range.
        """
        if self.vocabulary is None:
            raise ValueError("decoding token ids requires a tokenizer; load the model with one")
        several, single = as_list(token_ids)
        texts = [self.vocabulary.decode(self.encode(ids)) for ids in several]
        return texts[0] if single else texts

    def check(self, prompt: Request | Prompt, **settings: Any) -> None:
        """Raise ValueError unless this request can be answered; arguments as for `submit`."""
        self._check(as_request(prompt, settings))

    def _check(self, request: Request) -> CheckedRequest:
        return CheckedRequest(request, self.config, self.vocabulary)

    def _check_all(self, requests: Iterable[Request]) -> None:
        """Raise RequestError unless all requests are valid.

        They are checked again when they are answered, since keeping the results for a million
        requests would take gigabytes.
        """
        for index, request in enumerate(requests):
            try:
                self._check(request)
            except ValueError as error:
                raise RequestError(index, str(error)) from error

    # ------------------------------------------------------------------------------ research

    def logits(
        self,
        token_ids: str | Sequence[str] | ArrayLike,
        *,
        hooks: SiteHooks | None = None,
        hook_args: HookArgs = (),
    ) -> np.ndarray:
        """Return the float32 logits [B, T, V] of int token ids [B, T].

        A string, several strings with equal numbers of tokens, and one row of ids [T] are accepted
        as well; B is 1 for one string or row. hooks, hook_args: as for `generate`; programs are
        compiled for a few lengths only, whatever T is. Raises ValueError if T exceeds the context
        or an id is out of range.
        """
        texts = [token_ids] if isinstance(token_ids, str) else token_ids
        if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
            token_ids = [self.encode(text) for text in texts]
        return self._with_model(scoring.logits, token_ids, hooks=hooks, hook_args=hook_args)

    @overload
    def inspect(  # type: ignore[overload-overlap]
        self,
        prompts: Prompt,
        capture: Collection[str] = ...,
        *,
        capture_layers: Sequence[int] | None = ...,
        hooks: SiteHooks | None = ...,
        hook_args: HookArgs = ...,
    ) -> Inspection: ...

    @overload
    def inspect(
        self,
        prompts: Iterable[Prompt],
        capture: Collection[str] = ...,
        *,
        capture_layers: Sequence[int] | None = ...,
        hooks: SiteHooks | None = ...,
        hook_args: HookArgs = ...,
    ) -> list[Inspection]: ...

    def inspect(
        self,
        prompts: Prompt | Iterable[Prompt],
        capture: Collection[str] = ("router_probs", "expert_index"),
        *,
        capture_layers: Sequence[int] | None = None,
        hooks: SiteHooks | None = None,
        hook_args: HookArgs = (),
    ) -> Inspection | list[Inspection]:
        """Run the model on one or several prompts, and return activations by position.

        prompts: a string or token ids -> an Inspection, or a list of these -> a list. capture:
        names from `model.CAPTURE_SITES`, see `inspection.Captured`. capture_layers: the layers to
        capture; None: all. hooks: pure functions (layer, array, *hook_args) -> array by site, or by
        (site, layer), as in a LanguageModel's call; several for one site are called in order. In
        their arrays T is the length of the prompt and B the size of the mesh's data axis, with the
        prompt repeated; `grok1.inspection.positions` returns the tokens' positions. Each new
        function object, including a bound method, is compiled again, and so is each prompt length
        with hooks; outside variables that a hook reads are fixed at that time. hook_args: arrays
        and numbers passed to every hook; other values of the same shapes and dtypes (int and float
        differ) do not compile again.

        Raises ValueError for a prompt that is empty or longer than the context, an unknown site or
        layer, an invalid hook, or arrays that take more memory than is free.
        """
        several, single = as_list(prompts)
        found = []
        for ids in [self.encode(prompt) for prompt in several]:
            options = ids, capture, capture_layers
            one = self._with_model(inspecting.inspect, *options, hooks=hooks, hook_args=hook_args)
            if self.tokenizer is not None:
                pieces = [self.tokenizer.id_to_piece(i).replace("▁", " ") for i in ids]
                one = one._replace(pieces=pieces)
            found.append(one)
        return found[0] if single else found

    def patch(
        self,
        prompt: Prompt,
        source: Prompt,
        metric: Callable[[np.ndarray], float],
        site: str = "hidden_states",
        *,
        layers: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Run a prompt repeatedly, each time with one activation taken from a run of `source`.

        Activation patching: where the result is high, the metric depends on the activation of
        `source`.
        metric: logits float32 [T, V] -> a number. source: a prompt with the same number of tokens.
        site: any except embeddings and attention_weights. layers, positions: which to patch, one at
        a time; None: all. Returns the metric, float32 [layers, positions]. Raises ValueError if an
        argument does not fit.
        """
        ids, others = self.encode(prompt), self.encode(source)
        return self._with_model(inspecting.patch, ids, others, metric, site, layers, positions)

    def model(self, *, differentiable: bool = False) -> Callable[..., LanguageModelOutput]:
        """Return the model as a pure function (params, tokens, ...) -> LanguageModelOutput.

        params: such as `self.params`; for gradients with respect to weights, which int8 does not
        have, `self.config.dequantize_params(self.params)`. tokens: int32 [B, T]. The other
        arguments are those of a LanguageModel's call, `hook_args`, and `embeddings`, float32
        [B, T, D], which replaces the array at the site of that name, for gradients with respect to
        it.
        differentiable: use slower operations that support jax.grad, jax.jvp and jax.vmap; otherwise
        these raise ValueError. To compile the function as one program, call it under jax.jit.
        """
        self._get_loaded()
        assert self.executions is not None
        how = self.executions.prefill
        if differentiable:
            how = dataclasses.replace(how, kernels="plain", expert_dispatch="static")
        return pure_function(self.config, how)

    @overload
    def score(  # type: ignore[overload-overlap]
        self, texts: Prompt, *, hooks: SiteHooks | None = ..., hook_args: HookArgs = ...
    ) -> np.ndarray: ...

    @overload
    def score(
        self, texts: Iterable[Prompt], *, hooks: SiteHooks | None = ..., hook_args: HookArgs = ...
    ) -> list[np.ndarray]: ...

    def score(
        self,
        texts: Prompt | Iterable[Prompt],
        *,
        hooks: SiteHooks | None = None,
        hook_args: HookArgs = (),
    ) -> np.ndarray | list[np.ndarray]:
        """Return the log-probability of each token of a text, or for each of several texts.

        texts: a string or token ids -> an array, or a list of these -> a list. Each array is
        float32 [tokens], the first token conditioned on [BOS]; its sum is the log-probability of
        the full text, every byte counted once. A text longer than the context is read in windows
        that overlap by half, so that each token sees at least half a context of text before it.
        hooks, hook_args: as for `logits`, with [BOS] at position 0, and positions that restart in
        each window. Raises ValueError if a log-probability is NaN or infinite.
        """
        found = self.score_tokens(texts, hooks=hooks, hook_args=hook_args)
        if isinstance(found, TokenScores):
            return found.logprobs
        return [scores.logprobs for scores in found]

    @property
    def bos_token(self) -> int:
        """The id of [BOS], with which a scored text begins.

        Raises ValueError if the tokenizer has none.
        """
        bos = BOS_TOKEN if self.tokenizer is None else self.tokenizer.bos_id()
        if bos < 0:
            raise ValueError(
                f"{self.tokenizer_path}: expected a tokenizer with a piece for the beginning of a "
                "text, [BOS], got one without; train it with bos_id"
            )
        return bos

    @overload
    def score_tokens(  # type: ignore[overload-overlap]
        self, texts: Prompt, *, hooks: SiteHooks | None = ..., hook_args: HookArgs = ...
    ) -> TokenScores: ...

    @overload
    def score_tokens(
        self, texts: Iterable[Prompt], *, hooks: SiteHooks | None = ..., hook_args: HookArgs = ...
    ) -> list[TokenScores]: ...

    def score_tokens(
        self,
        texts: Prompt | Iterable[Prompt],
        *,
        hooks: SiteHooks | None = None,
        hook_args: HookArgs = (),
    ) -> TokenScores | list[TokenScores]:
        """Return the results of `score`, and whether each token is the most likely one."""
        several, single = as_list(texts)
        ids = [self.encode(text) for text in several]
        given = ids, [self.bos_token] * len(ids)
        scores = self._with_model(scoring.score, *given, hooks=hooks, hook_args=hook_args)
        return scores[0] if single else scores

    def score_continuations(self, pairs: Iterable[tuple[Prompt, Prompt]]) -> list[TokenScores]:
        """Return the scores, as of `score_tokens`, of the second text of each pair.

        It follows the first text, which follows nothing, or [BOS] if the first text is empty. A
        first text that several pairs have is read once, as in questions with several answers. A
        pair longer than the context is read in windows. Raises ValueError like `score`.
        """
        ids = [(self.encode(first), self.encode(second)) for first, second in pairs]
        return self._with_model(scoring.score_continuations, ids, self.bos_token)


def with_settings(
    config: LanguageModelConfig, dtype: str, context: int | None
) -> LanguageModelConfig:
    """Return a configuration with activations of `dtype`, and optionally a shorter context."""
    lengths = range(1, config.sequence_len + 1)
    if context is not None and context not in lengths:
        raise ValueError(
            f"context: expected 1 to {config.sequence_len} tokens, the model's own context, "
            f"got {context}"
        )
    return dataclasses.replace(
        config,
        fprop_dtype=jnp.dtype(dtype).type,
        sequence_len=context or config.sequence_len,
    )


def load_model(
    directory: str | os.PathLike | None = None,
    tokenizer_path: str | os.PathLike | None = None,
    *,
    mesh: tuple[int, int] = (1, 1),
    slots: int = 1,
    dtype: str | None = None,
    context: int | None = None,
    pad_sizes: Sequence[int] = CHUNKS,
    prefix_cache: bool = True,
    requests: Sequence[Request] = (),
    progress: Callable[[int, int], object] | None = None,
    kernels: bool = True,
    compile_cache: bool = True,
    execution: Execution | None = None,
    **settings: Any,
) -> InferenceRunner:
    """Load a checkpoint and return an initialised runner, ready to generate.

    directory: of the checkpoint; None: `checkpoints/` if it holds the released weights, else the
    demo. tokenizer_path: a SentencePiece model; None: DIR/tokenizer.model, else that of the demo if
    the vocabulary sizes match; with neither, prompts are token ids. mesh: (data, model), over the
    devices of all processes once jax.distributed has started; each process then makes the same
    calls. slots: sequences served at once, rounded up to a multiple of the data axis. dtype: of the
    activations, "float32" or "bfloat16"; by default float32 on a CPU, bfloat16 elsewhere. context:
    the maximum number of tokens in a sequence, at most the model's own context, the default.
    pad_sizes, prefix_cache: as in InferenceRunner. requests, progress: as in its `initialize`.
    kernels: use those in grok1/kernels, which are compiled at first use; if that fails, a warning
    is logged, and slower plain JAX is used instead. On a GPU they require bfloat16. compile_cache:
    keep what jax compiles from now on for the next start, in the same directory as run.py; not with
    several processes. execution: as in ModelRunner. settings: fields of Execution to set instead:
    router, expert_dispatch, scan_unroll, shard_activations.

    Raises ValueError with a one-sentence reason if anything is missing or does not fit.
    """
    _check_arguments(mesh, slots, dtype, settings)
    for name, path in (("directory", directory), ("tokenizer_path", tokenizer_path)):
        given = path is None or (isinstance(path, str | os.PathLike) and bool(os.fspath(path)))
        require(given, name, "a path, or None", path)
    for name, flag in (("kernels", kernels), ("compile_cache", compile_cache)):
        require(isinstance(flag, bool), name, "true or false", flag)
    dtype = dtype or ("float32" if backend.on_cpu() else "bfloat16")
    directory = default_checkpoint() if directory is None else directory
    stored = read_model_config(directory)
    config = with_settings(stored, dtype, context)
    if tokenizer_path is None:
        tokenizer_path = _find_tokenizer(directory, config.vocab_size)
    if compile_cache and jax.process_count() == 1 and (reason := enable_compile_cache()):
        _log.warning(reason)
    wanted = execution is None and kernels and (dtype == "bfloat16" or backend.on_cpu())
    compiled = wanted and dispatch.available()
    local, between = split_over_hosts(*mesh, jax.process_count(), backend.devices_of_each_process())
    server = InferenceRunner(
        name=str(directory),
        runner=ModelRunner(
            config,
            slots / (mesh[0] * mesh[1]),
            directory,
            kernels=compiled,
            execution=execution,
            settings=settings,
        ),
        load=None,
        tokenizer_path=tokenizer_path,
        local_mesh_config=local,
        between_hosts_config=between,
        pad_sizes=pad_sizes,
        prefix_cache=prefix_cache,
    )
    server.initialize(requests, progress)
    checkpoint.check_config(directory, stored)  # a save may have replaced both it and the weights
    return server


def _check_arguments(
    mesh: object, slots: object, dtype: object, settings: Mapping[str, object]
) -> None:
    """Raise ValueError, or TypeError for an unknown name, if `load_model` does not accept these."""
    if dtype not in (None, "float32", "bfloat16"):
        raise ValueError(f"dtype: expected float32 or bfloat16, got {dtype!r}")
    require(is_integer(slots) and slots >= 1, "slots", "an integer >= 1", slots)
    pair = isinstance(mesh, Sequence) and len(mesh) == 2 and all(map(is_integer, mesh))
    require(pair, "mesh", "the sizes (data, model), two integers", mesh)
    known = {field.name for field in dataclasses.fields(Execution)} - RUNNERS_OWN
    if wrong := next((name for name in settings if name not in known), None):
        known |= inspect.signature(load_model).parameters.keys()
        raise TypeError(f"load_model has no argument {wrong!r}{nearest_name(wrong, known)}")


def _find_tokenizer(directory: str | os.PathLike, vocab_size: int) -> Path | None:
    """Return the tokenizer in a checkpoint's directory, or the demo's if its size fits."""
    path = default_tokenizer(directory)
    if path.parent != Path(directory):
        try:
            load_tokenizer(path, vocab_size)
        except ValueError:
            return None
    return path


def load_server(
    directory: str | os.PathLike | None = None,
    tokenizer_path: str | os.PathLike | None = None,
    **options: Any,
) -> InferenceRunner:
    """Call `load_model`; this is its earlier name."""
    return load_model(directory, tokenizer_path, **options)


def sample_from_model(
    server: Generator[str | None, Request, None], prompt: str, max_len: int, temperature: float
) -> str:
    """Continue one prompt on a running `InferenceRunner.run()`; return only the new text."""
    next(server)
    return (
        server.send(
            Request(
                prompt=prompt, temperature=temperature, nucleus_p=1.0, rng_seed=42, max_len=max_len
            )
        )
        or ""
    )
