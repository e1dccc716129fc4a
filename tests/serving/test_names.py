"""What settings are called elsewhere, and what a wrong name is answered with."""

import dataclasses
import json
import pickle

import pytest

from grok1.cli import parsing, prompts
from grok1.serving.names import nearest_name
from grok1.serving.request import Request


def test_a_request_takes_the_names_of_other_tools():
    request = Request("a", seed=3, top_p=0.5, max_tokens=7)
    assert request == Request("a", rng_seed=3, nucleus_p=0.5, max_len=7)
    assert (request.seed, request.top_p, request.max_tokens) == (3, 0.5, 7)
    changed = dataclasses.replace(request, nucleus_p=0.25)
    assert (changed.nucleus_p, changed.max_len) == (0.25, 7)
    assert pickle.loads(pickle.dumps(request)) == request


def test_one_setting_by_two_names_is_refused():
    with pytest.raises(ValueError, match="seed and rng_seed are one setting; give one of them"):
        Request("a", seed=3, rng_seed=3)


def test_an_unknown_field_gets_the_nearest_name():
    with pytest.raises(TypeError, match="Request has no field 'max_new_tokens'; .* is max_tokens"):
        Request("a", max_new_tokens=3)
    with pytest.raises(TypeError, match="Request has no field 'xyz'$"):
        Request("a", xyz=3)
    assert nearest_name("temprature", ["top_k", "temperature"]) == "; the nearest is temperature"


def test_lines_of_json_take_the_names_of_other_tools(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "A", "seed": 3, "top_p": 0.5, "max_tokens": 7}))
    (line,) = prompts.read_lines(str(file))
    assert line.settings == {"rng_seed": 3, "nucleus_p": 0.5, "max_len": 7}
    file.write_text('{"prompt": "A", "seed": 3, "rng_seed": 4}')
    with pytest.raises(ValueError, match="jsonl, line 1: seed and rng_seed are one setting"):
        prompts.read_lines(str(file))


def test_an_unknown_key_gets_the_nearest_name(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "A", "top-p": 0.5}')
    given = prompts.with_file(parsing.parse_arguments(["--prompts-file", str(file)]))
    with pytest.raises(ValueError, match='line 1: .* got "top-p"; the nearest is top_p$'):
        prompts.make_requests(given, [0])


def test_the_nearest_name_is_one_that_begins_so():
    assert nearest_name("--temp", ["--stop", "--temperature"]) == "; the nearest is --temperature"


def test_hyphens_are_no_likeness():
    assert nearest_name("--file", ["--min-len", "--seed"]) == ""
    assert nearest_name("file", ["--min-len", "--profile"]) == "; the nearest is --profile"


def test_command_and_api_have_one_default_temperature():
    assert parsing.parse_arguments([]).temperature == Request("a").temperature == 0.7
