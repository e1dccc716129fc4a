"""Names that other libraries use for a setting, and what is suggested for a wrong name."""

import dataclasses
import json
import pickle

import pytest

from grok1.cli import parsing, prompts
from grok1.serving.names import nearest_name
from grok1.serving.request import Request


def test_request_accepts_names_of_other_libraries():
    request = Request("a", seed=3, top_p=0.5, max_tokens=7)
    assert request == Request("a", rng_seed=3, nucleus_p=0.5, max_len=7)
    assert (request.seed, request.top_p, request.max_tokens) == (3, 0.5, 7)
    changed = dataclasses.replace(request, nucleus_p=0.25)
    assert (changed.nucleus_p, changed.max_len) == (0.25, 7)
    assert pickle.loads(pickle.dumps(request)) == request


def test_wrong_field_of_a_request_is_named():
    with pytest.raises(ValueError, match="seed and rng_seed are one setting; give one of them"):
        Request("a", seed=3, rng_seed=3)
    with pytest.raises(TypeError, match="Request has no field 'max_new_tokens'; .* is max_tokens"):
        Request("a", max_new_tokens=3)
    with pytest.raises(TypeError, match="Request has no field 'xyz'$"):
        Request("a", xyz=3)


def test_json_lines_accept_names_of_other_libraries(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "A", "seed": 3, "top_p": 0.5, "max_tokens": 7}))
    (line,) = prompts.read_lines(str(file))
    assert line.settings == {"rng_seed": 3, "nucleus_p": 0.5, "max_len": 7}
    file.write_text('{"prompt": "A", "seed": 3, "rng_seed": 4}')
    with pytest.raises(ValueError, match="jsonl, line 1: seed and rng_seed are one setting"):
        prompts.read_lines(str(file))
    file.write_text('{"prompt": "A", "top-p": 0.5}')
    given = prompts.with_file(parsing.parse_arguments(["--prompts-file", str(file)]))
    with pytest.raises(ValueError, match='line 1: .* got "top-p"; the nearest is top_p$'):
        prompts.make_requests(given, [0])


@pytest.mark.parametrize(
    ("name", "known", "nearest"),
    [
        ("temprature", ["top_k", "temperature"], "temperature"),
        ("--temp", ["--stop", "--temperature"], "--temperature"),  # begins with it
        ("--file", ["--min-len", "--seed"], None),  # hyphens are not compared
        ("file", ["--min-len", "--profile"], "--profile"),
    ],
)
def test_nearest_name(name, known, nearest):
    assert nearest_name(name, known) == (f"; the nearest is {nearest}" if nearest else "")


def test_command_and_api_share_a_default_temperature():
    assert parsing.parse_arguments([]).temperature == Request("a").temperature == 0.7
