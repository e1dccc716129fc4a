"""The prompts of a run: from the command line and from a file, each with its own settings.

They are stored as JSON values until requests are made, so that process 0 can share them.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import functools
import json
import re
import sys
import types
import typing
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from grok1.checks import is_integer
from grok1.cli.console import standard_input
from grok1.cli.options import Fields, Line, Options
from grok1.serving.names import PUBLISHED, nearest_name, published_names
from grok1.serving.request_limits import DEFAULT_SEED, MOST_SAMPLES
from grok1.strict_json import Json, read_json

if TYPE_CHECKING:
    from grok1.serving.request import Request

# The options that set fields of a Request, for error messages.
OPTIONS = {
    "rng_seed": "--seed",
    "max_len": "--max-tokens",
    "nucleus_p": "--top-p",
    **{
        field: f"--{field.replace('_', '-')}"
        for field in (
            *("top_k", "min_p", "min_len", "num_samples", "logit_bias", "top_logprobs"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty"),
        )
    },
    "truncate": "--truncate",
}
STANDARD_INPUT = "-"
MOST_BYTES = 2**26  # in a line: /dev/zero has no end


# ------------------------------------------------------------------------------------ from a file


def with_file(options: Options) -> Options:
    """Return the options with the prompts of --prompts-file after those of the command line.

    Raises ValueError, with an error message, if the file is unreadable or has no prompts.
    """
    if options.prompts_file is None:
        return options
    more = read_lines(options.prompts_file, options.prompts_format)
    return dataclasses.replace(options, lines=(*options.lines, *more))


def read_lines(file: str, form: str | None = None) -> list[Line]:
    """Return the prompts of a file, or of standard input if it is `-`.

    form: "text", one prompt per line, or "jsonl", one object per line; None: by the file name.
    """
    if form is None and file.endswith(".json"):
        raise ValueError(
            f"{file}: expected text, or JSON lines in a .jsonl file, got a .json file; write one "
            "object per line and give --prompts-format jsonl, or give --prompts-format text"
        )
    form = form or ("jsonl" if file.endswith(".jsonl") else "text")
    name = "standard input" if file == STANDARD_INPUT else file
    lines = []
    for number, text in _numbered(file, name):
        place = f"{name}, line {number}"
        lines.append(_parse(text, place) if form == "jsonl" else Line(text, None, {}, place))
    if not lines:
        wanted = "a prompt" if form == "text" else "a JSON object"
        raise ValueError(f"{name}: expected {wanted} on each line, found only empty ones")
    return lines


def _numbered(file: str, name: str) -> Iterator[tuple[int, str]]:
    """Return an iterator over the non-blank lines and their numbers, from 1."""
    try:
        # Standard input stays open, so that no other file gets its descriptor.
        given = file == STANDARD_INPUT
        with contextlib.nullcontext(standard_input()) if given else open(file, "rb") as opened:
            lines = iter(functools.partial(opened.readline, MOST_BYTES + 1), b"")
            for number, line in enumerate(lines, 1):
                text = _decode(line, number, f"{name}, line {number}")
                if text.strip():
                    yield number, text
    except OSError as error:
        raise ValueError(
            f"{name}: cannot read the prompts ({error.strerror}); name another file with "
            "--prompts-file"
        ) from error


def _decode(line: bytes, number: int, place: str) -> str:
    """Return the text of a line without its line ending. Raises ValueError."""
    if len(line) > MOST_BYTES:
        raise ValueError(f"{place}: expected at most {MOST_BYTES} bytes in a line, got more")
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        return line.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{place}: expected text in UTF-8, got the byte 0x{line[error.start]:02x}; convert the "
            "file"
        ) from None


def _parse(text: str, place: str) -> Line:
    """Return the prompt and settings of a line of JSON. Raises ValueError."""
    try:
        fields = read_json(text)
    except ValueError as error:
        raise ValueError(
            f"{place}: expected a JSON object, got {_short(text)} ({error}); write one such as "
            '{"prompt": "Once upon a time"}'
        ) from None
    if not isinstance(fields, dict):
        raise ValueError(f"{place}: expected a JSON object, got {_short(text)}")
    if "prompt" not in fields:
        raise ValueError(f'{place}: expected the key "prompt", got {_short(text)}')
    prompt, name = fields.pop("prompt"), fields.pop("id", None)
    if not _is_prompt(prompt):
        raise ValueError(
            f"{place}: prompt: expected a string or a list of token ids, got {_shorten(prompt)}"
        )
    if isinstance(name, bool) or not isinstance(name, str | int | None):
        raise ValueError(f"{place}: id: expected a string or an integer, got {_shorten(name)}")
    try:
        return Line(prompt, name, published_names(fields), place)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None


def _is_prompt(value: Json) -> TypeGuard[str | list[int]]:
    ids = isinstance(value, list) and all(map(is_integer, value))
    return isinstance(value, str) or ids


def _shorten(value: object) -> str:
    return _short(json.dumps(value))


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


# --------------------------------------------------------------------------------------- requests


def command_settings(options: Options) -> Fields:
    """Return the fields of a Request that the command line sets."""
    return {
        "temperature": options.temperature,
        "nucleus_p": options.nucleus_p,
        "rng_seed": DEFAULT_SEED if options.seed is None else options.seed,
        "max_len": options.max_len,
        "top_k": options.top_k,
        "min_p": options.min_p,
        "repetition_penalty": options.repetition_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "logit_bias": options.logit_bias,
        "min_len": options.min_len,
        "top_logprobs": options.top_logprobs,
        "stop": options.stop,
        "truncate": options.truncate,
        "num_samples": options.num_samples,
    }


def with_options(reason: str, own: Container[str]) -> str:
    """Return an error message about a request, with field names replaced by option names.

    own: the fields set by a line of a file, which keep their names.
    """
    names = {field: option for field, option in OPTIONS.items() if field not in own}
    if "truncate" in names:
        reason = reason.replace("truncate: left", "--truncate left")
    return re.sub(r"\b[a-z]+_[a-z_]+\b( = )?", lambda found: _option(found, names), reason)


def _option(found: re.Match[str], names: dict[str, str]) -> str:
    """Return "--max-tokens " for "max_len = "; anything that is not a field is unchanged."""
    field, equals = found[0].removesuffix(" = "), found[1]
    return f"{names[field]}{' ' if equals else ''}" if field in names else found[0]


def fields_of(options: Options, index: int) -> Fields:
    """Return the fields of one request, as JSON; its own settings override the command line."""
    line = options.lines[index]
    return {"prompt": line.prompt} | command_settings(options) | line.settings


def answer_keys(options: Options) -> list[tuple[int, int]]:
    """Return the place of each answer: index of its prompt, and of the answer within it."""
    found = []
    for index in range(len(options.lines)):
        wanted = fields_of(options, index)["num_samples"]
        # Other numbers are rejected when the requests are checked.
        good = is_integer(wanted) and 1 <= wanted <= MOST_SAMPLES
        found += [(index, i) for i in range(wanted if good else 1)]
    return found


def _with_numbers(fields: Fields, place: str) -> Fields:
    """Return fields of a Request from JSON, with the keys of mappings as integers."""
    return {
        name: _keyed(value, f"{place}: {name}") if isinstance(value, dict) else value
        for name, value in fields.items()
    }


def request_for(options: Options, prompt: str, changes: Fields) -> Request:
    """Return a request for a prompt with the settings of the command line, updated by `changes`."""
    from grok1.serving.request import Request  # Takes seconds.

    fields = _with_numbers(command_settings(options) | changes, "the options")
    return Request(prompt=prompt, **fields)


def make_requests(options: Options, indices: Sequence[int]) -> list[Request]:
    """Return a request for each of these prompts.

    Raises ValueError, with the place, for a setting of unknown name or wrong type.
    """
    from grok1.serving.request import Request  # Takes seconds.

    hints = typing.get_type_hints(Request)
    requests = []
    for index in indices:
        line = options.lines[index]
        for name, value in line.settings.items():
            _check(name, value, hints, line.place)
        requests.append(Request(**_with_numbers(fields_of(options, index), line.place)))
    return requests


def _check(name: str, value: object, hints: Mapping[str, object], place: str) -> None:
    """Raise ValueError if a setting is not a field of Request or has the wrong type."""
    both = {field: f"{field} or {word}" for word, field in PUBLISHED.items()}
    if name not in hints:
        known = ", ".join(both.get(field, field) for field in hints if field != "prompt")
        raise ValueError(
            f'{place}: expected the keys "prompt", "id" and settings of a request ({known}), got '
            f"{_shorten(name)}{nearest_name(name, [*hints, *PUBLISHED])}"
        )
    if not _fits(value, hints[name]):
        wanted = _json_type(hints[name])
        raise ValueError(
            f"{place}: {both.get(name, name)}: expected {wanted}, got {_shorten(value)}"
        )


_NAMES: dict[object, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): "null",
}


def _json_type(hint: object) -> str:
    """Return the name of a type in JSON, for error messages."""
    parts = typing.get_args(hint)
    if _is_union(hint):
        return " or ".join(_json_type(part) for part in parts)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(json.dumps(part) for part in parts)
    if typing.get_origin(hint) is collections.abc.Sequence:
        return f"a list (each {_json_type(parts[0])})"
    if typing.get_origin(hint) is collections.abc.Mapping:
        key, value = map(_json_type, parts)
        return f"an object (each key {key} in quotes, each value {value})"
    return _NAMES.get(hint, str(hint))


def _fits(value: Any, hint: object) -> bool:
    """Whether a JSON value is of a type; the runner checks its range."""
    parts = typing.get_args(hint)
    if _is_union(hint):
        return any(_fits(value, part) for part in parts)
    if typing.get_origin(hint) is typing.Literal:
        return value in parts
    if typing.get_origin(hint) is collections.abc.Sequence:
        return isinstance(value, list) and all(_fits(item, parts[0]) for item in value)
    if typing.get_origin(hint) is collections.abc.Mapping:
        return isinstance(value, dict) and all(
            _is_key(key, parts[0]) and _fits(item, parts[1]) for key, item in value.items()
        )
    if hint in (int, float):
        kinds = (int,) if hint is int else (int, float)
        return type(value) in kinds and not abs(value) > sys.float_info.max
    return type(value) is hint if hint in _NAMES else True


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _is_key(key: str, hint: object) -> bool:
    return hint is not int or re.fullmatch(r"-?[0-9]{1,18}", key) is not None


def _keyed(value: dict[str, object], place: str) -> dict[str, object] | dict[int, object]:
    """Return a mapping with its keys, strings in JSON, as integers."""
    try:
        keyed = {int(key): item for key, item in value.items()}
    except ValueError:
        return value  # rejected when the request is checked
    if len(keyed) < len(value):
        raise ValueError(f"{place}: expected each token id once, got {_shorten(value)}")
    return keyed
