"""What a client asks for: the fields of OpenAI's API, and those that we add."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from grok1.checks import is_integer
from grok1.serving.http.errors import ApiError
from grok1.serving.names import nearest_name
from grok1.serving.request import Request
from grok1.serving.request_limits import MOST_LOGPROBS
from grok1.strict_json import Json, read_json

# Field of a body -> field of a Request.
SETTINGS = {
    "temperature": "temperature",
    "top_p": "nucleus_p",
    "n": "num_samples",
    "seed": "rng_seed",
    "stop": "stop",
    "max_tokens": "max_len",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "logit_bias": "logit_bias",
    # Ours, with the names that other servers use.
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_len",
    "ignore_eos": "ignore_eos",
    "stop_token_ids": "stop_tokens",
    "allowed_token_ids": "allowed_tokens",
}
COMMON = {*SETTINGS, "model", "stream", "stream_options", "logprobs"}
COMPLETION = COMMON | {"prompt", "echo"}
CHAT = COMMON | {"messages", "max_completion_tokens", "top_logprobs"}
# Honoured by doing nothing: they do not change an answer.
IGNORED = {
    *("user", "store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("parallel_tool_calls", "prompt_cache_retention"),
}
# Refused unless they ask for nothing: their values that do not.
REFUSED: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}
MOST_CHOICES = 128  # answers of one request, over all of its prompts
MOST_STOPS = 64  # strings, for each of which all answers are searched


class Asked(NamedTuple):
    """What a body asks for, apart from the Requests.

    echo: whether the answer begins with the prompt. logprobs: how many of the most probable tokens
    are reported beside each token; None: no log-probabilities. empty: whether no token is wanted,
    only the prompt. usage: whether a stream ends with the numbers of tokens.
    """

    stream: bool
    usage: bool
    echo: bool = False
    logprobs: int | None = None
    empty: bool = False


def read_body(text: bytes, known: set[str]) -> dict[str, Any]:
    """Return the fields of a body that are given and not null. Raises ApiError."""
    try:
        body = read_json(text)
    except ValueError as error:
        raise ApiError(400, f"the body: expected JSON, got something else ({error})") from error
    if not isinstance(body, dict):
        raise ApiError(400, "the body: expected a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name in REFUSED and value not in REFUSED[name]:
            message = f"{name}: expected no such field, which this server does not support"
            raise ApiError(400, message, name, "unsupported_parameter")
        if name not in known | IGNORED | REFUSED.keys():
            hint = nearest_name(name[:100], known)
            message = f"{name[:100]}: expected a field of this API, got another one{hint}"
            raise ApiError(400, message, name[:100], "unknown_parameter")
    return body


def completion(body: Mapping[str, Any]) -> tuple[list[Request], Asked]:
    """Return the requests of a body of /v1/completions, and what else it asks for.

    Raises ApiError.
    """
    asked = Asked(
        *_stream(body),
        echo=_flag(body, "echo"),
        logprobs=_integer(body, "logprobs", 0, MOST_LOGPROBS),
        empty=body.get("max_tokens") == 0 and is_integer(body["max_tokens"]),
    )
    if asked.empty and not asked.echo:
        message = "max_tokens: expected an integer >= 1, or 0 together with echo, got 0"
        raise ApiError(400, message, "max_tokens")
    body = {"max_tokens": 16, **body} if not asked.empty else {**body, "max_tokens": 1}
    settings = _settings(body) | {
        "top_logprobs": asked.logprobs or 0,
        "prompt_logprobs": asked.echo and asked.logprobs is not None,
    }
    several = prompts(body)
    if len(several) * settings.get("num_samples", 1) > MOST_CHOICES:
        message = f"n: expected at most {MOST_CHOICES} answers to all prompts together, got more"
        raise ApiError(400, message, "n")
    return [_request(prompt, settings) for prompt in several], asked


def chat(body: Mapping[str, Any], prompt: str, stops: Sequence[str] = ()) -> tuple[Request, Asked]:
    """Return the request of a body of /v1/chat/completions, and what else it asks for.

    prompt: the text of the messages. stops: strings that end it, besides those of the body. Raises
    ApiError.
    """
    own = body.get("stop", [])
    if stops and isinstance(own, str | list):
        body = {**body, "stop": [*([own] if isinstance(own, str) else own), *stops]}
    most = _integer(body, "top_logprobs", 0, MOST_LOGPROBS)
    wanted = _flag(body, "logprobs")
    if most is not None and not wanted:
        raise ApiError(400, "top_logprobs: expected logprobs to be true, too", "top_logprobs")
    if "max_completion_tokens" in body:
        if "max_tokens" in body:
            message = "max_tokens and max_completion_tokens are one setting; give one of them"
            raise ApiError(400, message, "max_tokens")
        body = {**body, "max_tokens": body["max_completion_tokens"]}
    asked = Asked(*_stream(body), logprobs=(most or 0) if wanted else None)
    settings = _settings(body) | {"top_logprobs": asked.logprobs or 0}
    if settings.get("num_samples", 1) > MOST_CHOICES:
        raise ApiError(400, f"n: expected at most {MOST_CHOICES}, got more", "n")
    return _request(prompt, settings), asked


def explained(error: ValueError) -> ApiError:
    """Return the error of an invalid Request, with the names that its fields have in a body."""
    message, param = str(error), None
    for name, field in SETTINGS.items():
        if re.search(rf"\b{field}\b", message):
            message, param = re.sub(rf"\b{field}\b", name, message), name
    message = message.replace(", or keep only its newest tokens (truncate: left)", "")
    code = "context_length_exceeded" if "context" in message and "prompt" in message else None
    return ApiError(400, message, param, code)


def _request(prompt: Any, settings: Mapping[str, Any]) -> Request:
    return Request(prompt, **settings)


def _settings(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a Request that a body sets, with OpenAI's defaults for the others."""
    found = {field: body[name] for name, field in SETTINGS.items() if name in body}
    found.setdefault("temperature", 1.0)
    seed = found.setdefault("rng_seed", secrets.randbits(32))
    if is_integer(seed):
        found["rng_seed"] = seed % 2**32  # OpenAI's have 64 bits
    number = found.get("num_samples", 1)
    if not (is_integer(number) and number >= 1):
        raise ApiError(400, f"n: expected an integer >= 1, got {_short(number)}", "n")
    if isinstance(stop := found.get("stop"), list) and len(stop) > MOST_STOPS:
        raise ApiError(400, f"stop: expected at most {MOST_STOPS} strings, got more", "stop")
    bias = found.get("logit_bias", {})
    ids = re.compile("0|[1-9][0-9]{0,8}")
    if not isinstance(bias, dict) or not all(map(ids.fullmatch, bias)):
        message = "logit_bias: expected an object of token ids and numbers, got something else"
        raise ApiError(400, message, "logit_bias")
    return found | {"logit_bias": {int(key): value for key, value in bias.items()} or None}


def prompts(body: Mapping[str, Any]) -> list[str | list[int]]:
    """Return the prompts: one or several, each a string or token ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(is_integer(item) for item in prompt):
            return [prompt]
        if all(isinstance(item, str) for item in prompt):
            return prompt
        if all(isinstance(item, list) and all(map(is_integer, item)) for item in prompt):
            return prompt
    message = "prompt: expected a string, token ids, or a list of one of these, got something else"
    raise ApiError(400, message, "prompt")


def _stream(body: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return whether an answer is streamed, and whether the stream ends with its usage."""
    stream, options = _flag(body, "stream"), body.get("stream_options", {})
    if not isinstance(options, dict) or options.keys() - {"include_usage", "include_obfuscation"}:
        message = "stream_options: expected an object with include_usage, got something else"
        raise ApiError(400, message, "stream_options")
    return stream, _flag(options, "include_usage")


def _flag(body: Mapping[str, Json], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise ApiError(400, f"{name}: expected true or false, got {_short(value)}", name)
    return bool(value)


def _integer(body: Mapping[str, Json], name: str, least: int, most: int) -> int | None:
    value = body.get(name)
    if value is not None and not (is_integer(value) and least <= value <= most):
        message = f"{name}: expected an integer from {least} to {most}, got {_short(value)}"
        raise ApiError(400, message, name)
    return value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
