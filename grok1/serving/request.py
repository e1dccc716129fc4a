"""Requests to a runner and its answers. Invalid requests are rejected here, before any work.

Dimension letters: `V` vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np

from grok1.checks import is_integer, is_number
from grok1.serving.names import PUBLISHED, nearest_name, published_names
from grok1.serving.request_limits import (
    DEFAULT_SEED,
    DEFAULT_TEMPERATURE,
    LARGEST_BIAS,
    MOST_SAMPLES,
)
from grok1.serving.sampling import SampleSettings, validate_settings
from grok1.serving.steps import Slots
from grok1.serving.text import Detokenizer, StopFilter, Vocabulary

if TYPE_CHECKING:
    from model import LanguageModelConfig

DEFAULT_MAX_LEN = 200
NO_LIST = str | bytes | bytearray | memoryview  # not a list of token ids or strings
NO_PROMPT = NO_LIST | set | frozenset | Mapping
INTEGERS = "rng_seed", "max_len", "min_len", "num_samples", "top_logprobs"
NUMBERS = (
    *("temperature", "nucleus_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
REQUIRED = "temperature", "nucleus_p"  # of SampleSettings
FLAGS = "parse_special", "ignore_eos", "prompt_logprobs"
FIELD_TYPES = (
    *(np.float32, np.float32, bool, bool, np.int32, np.float32, np.float32, np.float32),
    *(np.float32, np.float32, bool, np.int32, np.int32),
)  # of SampleSettings, in order


def _plain(value: Any) -> Any:
    """Return a NumPy or jax number as an unbounded Python number; other values unchanged."""
    if not isinstance(value, str) and hasattr(value, "item") and np.ndim(value) == 0:
        with contextlib.suppress(NotImplementedError):  # for a key of jax.random
            return value.item()
    return value


Kind = TypeVar("Kind", bound=type)


def _with_other_names(kind: Kind) -> Kind:
    """Let fields also be set and read by the names that other libraries use."""
    make = vars(kind)["__init__"]
    known = {field.name for field in dataclasses.fields(kind)}

    @functools.wraps(make)
    def init(self: object, *values: object, **fields: object) -> None:
        if not fields.keys() <= known:
            fields = published_names(fields)
            if wrong := next((name for name in fields if name not in known), None):
                hint = nearest_name(wrong, [*known, *PUBLISHED])
                raise TypeError(f"{kind.__name__} has no field {wrong!r}{hint}")
        make(self, *values, **fields)

    kind.__init__ = init  # type: ignore[misc]
    for name, published in PUBLISHED.items():
        setattr(kind, name, property(operator.attrgetter(published)))
    return kind


@_with_other_names
@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Lists, iterators and dictionaries are copied. seed, top_p and max_tokens are other names for
    rng_seed, nucleus_p and max_len.

    prompt: text, or token ids; no BOS is added. Token 0 is padding: it occupies a position, but no
        other token attends to it.
    temperature: 0 is greedy, 1 the model's own distribution. nucleus_p: top-p, 1 keeps all. top_k:
        0 keeps all. min_p: keeps tokens at least min_p times as probable as the most probable
        one; 0 keeps all.
    rng_seed: from 0 to 2**32 - 1; the same request with the same seed gives the same tokens.
    max_len: maximum number of tokens to generate; prompt and max_len must fit the context. None:
        200, or as many as fit.
    min_len: minimum number of tokens before a token or a stop string can end the answer.
    truncate: "left" keeps only the newest tokens of a prompt that is too long.
    repetition_penalty, presence_penalty, frequency_penalty, logit_bias (by token id): as in
        SampleSettings.
    allowed_tokens: the only token ids that may be drawn.
    stop: one or more strings that end the answer; the answer omits them. stop_tokens: token ids
        that end the answer. ignore_eos: do not end the answer at the end-of-sequence token.
    top_logprobs: how many of the model's most probable tokens to report with each token.
    num_samples: number of answers, up to 1024; the prompt is read once. Answer i, from 0, is that
        of the same request with rng_seed + i, modulo 2**32.
    prompt_logprobs: report the log-probability of each prompt token, and with it the
        `top_logprobs` most probable tokens.
    parse_special: parse strings such as [EOS] and <|separator|> in the prompt as the pieces of
        that name; otherwise they are ordinary text.
    """

    prompt: str | Sequence[int]
    temperature: float = DEFAULT_TEMPERATURE
    nucleus_p: float = 1.0
    rng_seed: int = DEFAULT_SEED
    max_len: int | None = None
    top_k: int = 0
    allowed_tokens: Sequence[int] | None = None
    parse_special: bool = False
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    stop: str | Sequence[str] = ()
    stop_tokens: Sequence[int] = ()
    ignore_eos: bool = False
    min_len: int = 0
    truncate: Literal["left"] | None = None
    top_logprobs: int = 0
    num_samples: int = 1
    prompt_logprobs: bool = False
    frequency_penalty: float = 0.0

    def __post_init__(self) -> None:
        # The caller may change a list later, and an iterator can be read only once.
        for field in ("prompt", "allowed_tokens", "stop", "stop_tokens"):
            value = getattr(self, field)
            refused = NO_PROMPT if field == "prompt" else NO_LIST
            if isinstance(value, Iterable) and not isinstance(value, refused):
                with contextlib.suppress(TypeError):  # a zero-dimensional array, rejected later
                    object.__setattr__(self, field, tuple(value))
        if isinstance(self.logit_bias, Mapping):
            bias = {token: _plain(value) for token, value in self.logit_bias.items()}
            object.__setattr__(self, "logit_bias", bias)
        for field in (*INTEGERS, *NUMBERS, *FLAGS):
            object.__setattr__(self, field, _plain(getattr(self, field)))


@dataclasses.dataclass
class Completion:
    """An answer, finished or in progress.

    prompt_ids: the prompt tokens that the model read. token_ids: the generated ids, including the
    token that ended the answer. logprobs: the model's own log-probability of each, before
    penalties, temperature and filters. text: the generated text, without the stop string; None
    without a tokenizer. finish_reason: "eos", "stop", "length" (max_len reached), "context" (the
    context is full), "cancelled", "error", or None while in progress. top_logprobs: for each token,
    the requested number of most probable tokens, as (token id, log-probability).
    prompt_logprobs: the log-probability of each prompt token, None for the first, which has no
    predecessor; None if not requested. prompt_top_logprobs: as top_logprobs, for each prompt
    token, None for the first; None unless both are requested. error: if the answer ended with an
    error, a one-sentence description.
    """

    prompt: str | None
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str | None
    finish_reason: str | None
    top_logprobs: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None
    prompt_top_logprobs: list[list[tuple[int, float]] | None] | None = None
    error: str | None = None


class Event(NamedTuple):
    """One new token of one request.

    request: its index in the list of requests, or the number of its handle. token_id: None if the
    answer ended with an error. text: the new text that is final; an incomplete character, or a
    possible beginning of a stop string, is held back. completion: the answer so far, which may be
    ahead of this token. sample: the index of the answer within its request. finish_reason: for the
    last token, why it is the last; otherwise None.
    """

    request: int
    token_id: int | None
    text: str
    completion: Completion
    sample: int = 0
    finish_reason: str | None = None


def encode(
    prompt: str | Sequence[int],
    config: LanguageModelConfig,
    vocabulary: Vocabulary | None,
    parse_special: bool = False,
) -> list[int]:
    """Return the token ids of a string (without BOS), or check given ids. Raises ValueError.

    parse_special: parse strings such as [EOS] and <|separator|> as the pieces of that name.
    """
    if isinstance(prompt, str):
        if vocabulary is None:
            raise ValueError("a text prompt needs a tokenizer; give token ids instead")
        return vocabulary.encode(prompt, parse_special)
    try:
        ids = tuple(map(_plain, prompt))  # an iterator can be read only once
    except TypeError:
        ids = None
    if ids is None or isinstance(prompt, NO_PROMPT):
        raise ValueError(f"expected a string or a list of token ids, got {prompt!r}")
    for token in ids:
        if not (is_integer(token) and 0 <= token < config.vocab_size):
            raise ValueError(f"expected token ids from 0 to {config.vocab_size - 1}, got {token!r}")
    return [int(token) for token in ids]


Prompt = str | Sequence[int]  # the prompt of a Request


def as_list(prompts: Any) -> tuple[list[Any], bool]:
    """Return prompts as a list, and whether there is a single one: a string, ids or a Request.

    Raises ValueError if it is neither a single prompt nor several of them.
    """
    if isinstance(prompts, str | Request):
        return [prompts], True
    try:
        several = None if isinstance(prompts, NO_PROMPT) else list(prompts)
    except TypeError:  # also for a zero-dimensional array
        several = None
    if several is None:
        raise ValueError(
            f"expected a string, token ids, a Request, or a list of these, got {prompts!r}"
        )
    ids = [_plain(item) for item in several]
    if several and all(map(is_number, ids)):
        return [ids], True
    return several, False


def as_requests(
    prompts: Request | Prompt | Iterable[Request | Prompt], settings: Mapping[str, Any]
) -> tuple[list[Request], bool]:
    """Return prompts as a list of Requests, and whether there is a single one, as `as_list`.

    settings: fields of the Requests that are made from strings and ids. Also raises ValueError if
    settings are given together with a Request, which has its own.
    """
    several, single = as_list(prompts)
    return [as_request(prompt, settings) for prompt in several], single


def as_request(prompt: Request | Prompt, settings: Mapping[str, Any]) -> Request:
    """Return one prompt as a Request; see `as_requests`."""
    if not isinstance(prompt, Request):
        return Request(prompt, **settings)
    if settings:
        name = next(iter(settings))
        raise ValueError(f"{name} is given with a Request, which has its own; set it there")
    return prompt


class RequestError(ValueError):
    """One of several requests is invalid. index: which one, from 0. reason: the error."""

    def __init__(self, index: int, reason: str):
        super().__init__(index, reason)  # for unpickling in another process
        self.index = index
        self.reason = reason

    def __str__(self) -> str:
        return f"request {self.index + 1}: {self.reason}"


class AnswerError(ValueError):
    """An answer ended with an error.

    index: of its request. reason: the error. completions: all requested ones, including this one.
    """

    def __init__(self, index: int, reason: str, completions: list[Completion]):
        super().__init__(index, reason, completions)
        self.index = index
        self.reason = reason
        self.completions = completions

    def __str__(self) -> str:
        return f"request {self.index + 1}: {self.reason}"


class CheckedRequest:
    """A valid request: a copy of it, and what is known before its first token.

    ids: the prompt's token ids, truncated if requested. limit: the most tokens that an answer may
    have. Raises ValueError, with a one-sentence message, if the request is invalid.
    """

    def __init__(
        self, request: Request, config: LanguageModelConfig, vocabulary: Vocabulary | None
    ):
        if not isinstance(request, Request):
            raise ValueError(f"expected a Request, got {request!r}; write Request(prompt)")
        self.request = request = dataclasses.replace(request)
        self.config = config
        self.vocabulary = vocabulary
        ids = encode(request.prompt, config, vocabulary, request.parse_special)
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        self.ids, self.limit = _fit(request, ids, config.sequence_len)
        _check_range("num_samples", request.num_samples, range(1, MOST_SAMPLES + 1))
        _check_range("rng_seed", request.rng_seed, range(2**32))
        for field in FLAGS:
            if not isinstance(getattr(request, field), bool):
                raise ValueError(f"{field} must be True or False, got {getattr(request, field)!r}")
        self.stops = _stops(request, vocabulary)
        self.stop_tokens = frozenset(_ids("stop_tokens", request.stop_tokens, config))
        self.ends = self.stop_tokens | (set() if request.ignore_eos else {config.eos_token})
        _check_settings(self)

    @property
    def prompt_top_logprobs(self) -> bool:
        """Whether the most probable tokens are reported for each prompt token."""
        return self.request.prompt_logprobs and self.request.top_logprobs > 0

    def slot(self, sample: int = 0) -> Slots:
        """Return the Slots row for one answer, as NumPy arrays without the slot axis.

        Created on demand, since it takes a megabyte for Grok-1's vocabulary.
        """
        request, size = self.request, self.config.vocab_size
        bias = np.zeros([size], np.float32)
        for token, value in (request.logit_bias or {}).items():
            bias[token] = value
        allowed = request.allowed_tokens
        settings = {name: getattr(request, name) for name in (*NUMBERS, "top_logprobs")} | {
            "mask": np.ones([size], bool) if allowed is None else _marked(allowed, size),
            "active": True,
            "bias": bias,
            "in_prompt": _marked(self.ids, size),
            "in_answer": np.zeros([size], np.int32),
        }
        pairs = zip(SampleSettings(**settings), FIELD_TYPES, strict=True)
        fields: list[Any] = [np.asarray(value).astype(dtype) for value, dtype in pairs]
        slot: dict[str, Any] = {
            "token": np.zeros([1], np.int32),
            "drawn": np.int32(0),
            "seed": np.uint32((request.rng_seed + sample) % 2**32),
            "settings": SampleSettings(*fields),
            "ends": _marked(self.ends, size),
            "min_len": np.int32(request.min_len),
            "limit": np.int32(self.limit),
        }
        return Slots(**slot)


class Answer:
    """One answer to a request, in progress, on the host.

    completion: the answer so far, which the caller may modify. count: number of tokens so far.
    reason: why it has ended, None while in progress.
    """

    def __init__(self, checked: CheckedRequest, sample: int = 0):
        request, vocabulary = checked.request, checked.vocabulary
        self.checked = checked
        self.sample = sample
        self.count = 0
        self.reason: str | None = None
        self._words = None if vocabulary is None else Detokenizer(vocabulary, checked.ids)
        self._filter = StopFilter(checked.stops)
        self.completion = Completion(
            prompt=request.prompt if isinstance(request.prompt, str) else None,
            prompt_ids=list(checked.ids),
            token_ids=[],
            logprobs=[],
            text=None if vocabulary is None else "",
            finish_reason=None,
            prompt_logprobs=[None] if request.prompt_logprobs else None,
            prompt_top_logprobs=[None] if checked.prompt_top_logprobs else None,
        )

    @property
    def ended(self) -> bool:
        """Whether the answer is complete."""
        return self.reason is not None

    def take_prompt(self, logprobs: np.ndarray, *top: np.ndarray) -> None:
        """Append log-probabilities of prompt tokens.

        logprobs: [n]. top: ids and log-probabilities [n, at least as many as requested].
        """
        answer = self.completion
        if answer.prompt_logprobs is not None:
            answer.prompt_logprobs += logprobs.tolist()
        if answer.prompt_top_logprobs is not None:
            answer.prompt_top_logprobs += map(self._first_choices, *top)

    def take(
        self, token: int, logprob: float, top_ids: np.ndarray, top_logprobs: np.ndarray
    ) -> str:
        """Append a token to the answer; return the new text that is final.

        top_ids, top_logprobs: [at least as many as requested], as in SampleOutput.
        """
        answer, request = self.completion, self.checked.request
        self.count += 1
        answer.token_ids.append(token)
        answer.logprobs.append(logprob)
        if request.top_logprobs:
            answer.top_logprobs.append(self._first_choices(top_ids, top_logprobs))
        reason = self._reason(token)
        new = self._text(token, reason)
        # Last, so that another thread never sees a finished answer that is incomplete.
        reason = "stop" if self._filter.stopped else reason
        if reason is not None:
            self.end(reason)
        return new

    def _first_choices(self, ids: np.ndarray, logprobs: np.ndarray) -> list[tuple[int, float]]:
        """Return the requested number of most probable tokens."""
        wanted = self.checked.request.top_logprobs
        return list(zip(ids[:wanted].tolist(), logprobs[:wanted].tolist(), strict=True))

    def end(self, reason: str, error: str | None = None) -> None:
        """End the answer, if it has not ended."""
        if not self.ended:
            self.completion.finish_reason, self.completion.error = reason, error
            self.reason = reason

    def _text(self, token: int, reason: str | None) -> str:
        """Append a token's text and return it; reason: why it is the last token, if it is."""
        answer = self.completion
        if self._words is None or answer.text is None:
            return ""
        # The token that ends an answer is not part of its text.
        new = "" if reason in ("eos", "stop") else self._words.push(token)
        if reason is not None:
            new += self._words.finish()
        new = self._filter.push(new, early=self.count < self.checked.request.min_len)
        if reason is not None:
            new += self._filter.finish()
        answer.text += new
        return new

    def _reason(self, token: int) -> str | None:
        """Return why the answer ends with its last token, or None."""
        checked = self.checked
        if token in checked.stop_tokens:
            return "stop"
        if token in checked.ends:
            return "eos"
        if self.count < checked.limit:
            return None
        max_len = checked.request.max_len
        return "length" if self.count >= (max_len or DEFAULT_MAX_LEN) else "context"


def _fit(request: Request, ids: list[int], context: int) -> tuple[list[int], int]:
    """Return the prompt to read, and the most tokens to generate. Raises ValueError."""
    max_len, most = request.max_len, len(ids)
    if max_len is not None and (not is_integer(max_len) or max_len < 1):
        raise ValueError(f"max_len must be an integer of at least 1, got {max_len}")
    if request.truncate is not None and str(request.truncate) != "left":
        raise ValueError(f'truncate must be None or "left", got {request.truncate!r}')
    room = context - (1 if max_len is None else max_len)  # for the prompt
    if request.truncate == "left" and room > 0:
        ids = ids[-room:]
    if len(ids) > room:
        asked = "at least one more" if max_len is None else f"max_len = {max_len} more"
        if context == 1:
            raise ValueError(
                "a context of 1 has no room for a prompt and an answer; make it longer"
            )
        raise ValueError(
            f"the prompt has {most} tokens, and the context of {context} must hold {asked}; "
            "shorten it, or keep only its newest tokens (truncate: left)"
            if room > 0
            else f"max_len = {max_len} leaves no room for a prompt in the context of {context}; "
            f"set it below {context}"
        )
    limit = min(DEFAULT_MAX_LEN, context - len(ids)) if max_len is None else max_len
    min_len = request.min_len
    if not is_integer(min_len) or not 0 <= min_len <= limit:
        raise ValueError(f"min_len must be an integer from 0 to max_len = {limit}, got {min_len}")
    return ids, limit


def _check_range(field: str, value: object, allowed: range) -> None:
    if not is_integer(value) or int(value) not in allowed:
        raise ValueError(
            f"{field} must be an integer from {allowed[0]} to {allowed[-1]}, got {value!r}"
        )


def _ids(field: str, ids: Sequence[int], config: LanguageModelConfig) -> list[int]:
    """Check the token ids of a field, which may be NumPy integers."""
    try:
        if isinstance(ids, str):
            raise ValueError(f"expected a list of token ids, got {ids!r}")
        return encode(ids, config, None)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error


def _stops(request: Request, vocabulary: Vocabulary | None) -> tuple[str, ...]:
    stops: Iterable[str] = (request.stop,) if isinstance(request.stop, str) else request.stop
    try:
        stops = tuple(stops)
    except TypeError:
        raise ValueError(f"stop must be a string or a list of strings, got {stops!r}") from None
    for stop in stops:
        if not isinstance(stop, str) or not stop:
            raise ValueError(f"stop must contain non-empty strings, got {stop!r}")
    if stops and vocabulary is None:
        raise ValueError("stop strings need a tokenizer; give stop_tokens instead")
    return stops


def _check_settings(checked: CheckedRequest) -> None:
    """Raise ValueError if the sampling settings of a request are invalid."""
    request, config = checked.request, checked.config
    if not is_integer(request.top_logprobs):
        raise ValueError(f"top_logprobs must be an integer, got {request.top_logprobs!r}")
    for field in NUMBERS:
        if not is_number(getattr(request, field)):
            raise ValueError(f"{field} must be a single number, got {getattr(request, field)!r}")
    allowed: Sequence[int] = range(config.vocab_size)
    if request.allowed_tokens is not None:
        allowed = _ids("allowed_tokens", request.allowed_tokens, config)
        if not allowed:
            raise ValueError("allowed_tokens must contain at least one token, got none")
    if request.min_len > 0 and not any(token not in checked.ends for token in allowed):
        raise ValueError(
            f"min_len = {request.min_len} needs a token in allowed_tokens that does not end the "
            "answer; add one"
        )
    _check_bias(request, config)
    # Defaults are valid and skipped: there may be a million requests to check.
    settings: dict[str, Any] = {
        name: value
        for name in (*NUMBERS, "top_logprobs")
        if (value := getattr(request, name)) != getattr(Request, name) or name in REQUIRED
    }
    settings |= {"mask": np.ones([1], bool), "active": True}
    validate_settings(SampleSettings(**settings))


def _marked(ids: Iterable[int], size: int) -> np.ndarray:
    """Return bool [V], True at the ids."""
    marks = np.zeros([size], bool)
    marks[list(ids)] = True
    return marks


def _check_bias(request: Request, config: LanguageModelConfig) -> None:
    """Raise ValueError unless logit_bias maps token ids to numbers."""
    if request.logit_bias is None:
        return
    if not isinstance(request.logit_bias, Mapping):
        raise ValueError(f"logit_bias must map token ids to numbers, got {request.logit_bias!r}")
    for token, value in request.logit_bias.items():
        _ids("logit_bias", [token], config)
        if not is_number(value) or not abs(value) <= LARGEST_BIAS:
            raise ValueError(
                f"logit_bias must map token ids to numbers from -{LARGEST_BIAS:g} to "
                f"{LARGEST_BIAS:g}, got {value!r} for {token}"
            )
