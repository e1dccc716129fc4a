"""The adapter for EleutherAI's evaluation harness, by itself and in the harness.

Before a release: `pip install -r requirements-eval.txt`, then `pytest -m exhaustive`.
"""

import functools
import importlib
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from grok1.serving import scoring
from grok1.serving.http import serve
from grok1.serving.http.app import Api
from grok1.serving.http.chat import Template
from grok1.serving.http.engine import Engine
from paths import ROOT
from runner import Request, load_server

pytestmark = pytest.mark.exhaustive
DEMO = ROOT / "checkpoints/demo"
PAIRS = [
    ("Once upon a", " time"),
    ("", "The king"),
    ("There was an old ", "woman who lived"),
    ("The little prince said:", " xylophone"),
]
TEXTS = ["Once upon a time there was a king.", "A dog", "The king had a daughter. " * 90]


@pytest.fixture(scope="module")
def adapter():
    return importlib.import_module("lm_eval_grok")


@pytest.fixture(scope="module")
def server():
    return load_server(DEMO, ROOT / "tokenizer.model", slots=3)


@pytest.fixture(scope="module")
def model(adapter, server):
    return adapter.GrokLM(server=server)


def asked(*arguments):
    """Return requests as the harness makes them."""
    return [SimpleNamespace(args=own) for own in arguments]


def total_of(server, before, text):
    """Return the log-probability of a text after another, both of token ids, and each choice."""
    logits = server.logits([[*before, *text[:-1]]])[0][len(before) - 1 :].astype(np.float64)
    scores = logits[np.arange(len(text)), text] - np.log(np.sum(np.exp(logits), axis=-1))
    return pytest.approx(np.sum(scores), abs=1e-5 * len(text)), bool(
        np.all(np.argmax(logits, -1) == text)
    )


def test_loglikelihood_is_that_of_the_continuation(server, model):
    pairs = [*PAIRS, *((PAIRS[0][0], other) for other in (" xylophone", " time there was"))]
    found = model.loglikelihood(asked(*pairs))
    for (context, continuation), result in zip(pairs, found, strict=True):
        whole = server.encode(context + continuation)
        split = len(server.encode(context.rstrip()))
        assert result == total_of(server, whole[:split] or [1], whole[split:])
    assert [greedy for _, greedy in found[:4]] == [True, False, False, False]


def test_loglikelihood_of_long_pair_reads_last_tokens(server, model):
    context, continuation = "The king had a daughter. " * 100, " And she was a princess."
    ids = server.encode(context + continuation)
    most, own = server.config.sequence_len, len(ids) - len(server.encode(context.rstrip()))
    assert len(ids) > most
    (result,) = model.loglikelihood(asked((context, continuation)))
    assert result == total_of(server, ids[-most:-own], ids[-own:])
    # A continuation that is itself too long is read in windows.
    ((total, _),) = model.loglikelihood(asked(("A", context)))
    first, *rest = server.encode("A" + context)
    (scores,) = server._with_model(scoring.score, [rest], [first])
    assert total == float(np.sum(scores.logprobs, dtype=np.float64))


def test_rolling_loglikelihood_is_the_score_of_text(server, model):
    found = model.loglikelihood_rolling(asked(*((text,) for text in TEXTS)))
    assert len(server.encode(TEXTS[-1])) > server.config.sequence_len
    sums = [float(np.sum(scores, dtype=np.float64)) for scores in server.score(TEXTS)]
    assert found == sums


def test_generate_until_is_generate_of_the_runner(server, model):
    settings = [
        {"until": [".", "\n"], "max_gen_toks": 12},
        {"until": "king", "max_gen_toks": 30, "do_sample": False, "temperature": 0.0},
        {"until": None, "max_new_tokens": 5, "do_sample": True, "temperature": 0.8, "top_p": 0.9},
        {"until": [""], "max_gen_toks": 4, "temperature": 0.7, "top_k": 5},
        {"until": None, "max_gen_toks": 9, "do_sample": True},
    ]
    wanted = [
        {"stop": [".", "\n"], "max_len": 12, "temperature": 0},
        {"stop": "king", "max_len": 30, "temperature": 0},
        {"max_len": 5, "temperature": 0.8, "nucleus_p": 0.9},
        {"max_len": 4, "temperature": 0.7, "top_k": 5},
        {"max_len": 9, "temperature": 1},
    ]
    prompts = [*(context or "A dog" for context, _ in PAIRS), "The king"]
    found = model.generate_until(asked(*zip(prompts, settings, strict=True)))
    requests = [Request(p, **fields) for p, fields in zip(prompts, wanted, strict=True)]
    assert found == [completion.text for completion in server.generate(requests)]
    assert all(found) and "king" not in found[1]


def test_generate_until_truncates_a_long_context(server, model):
    context = "The king had a daughter. " * 100
    (text,) = model.generate_until(asked((context, {"until": [], "max_gen_toks": 6})))
    ids = server.encode(context)[-(server.config.sequence_len - 6) :]
    (completion,) = server.generate([Request(ids, temperature=0, max_len=6)])
    assert text == completion.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"colour": "red"}, "--model_args: expected checkpoint, .*kernels, got 'colour'"),
        ({"mesh": 1}, "expected mesh=DATAxMODEL, such as 1x8, .*got 1 and 1"),
        ({"mesh": "99x1"}, "99,1 needs 99 devices"),
        ({"batch_size": "auto"}, "a number as batch_size, got '1x1' and 'auto'"),
        ({"context": 513}, "context: expected 1 to 512 tokens, .*got 513"),
        ({"dtype": "float16"}, "dtype: expected float32 or bfloat16"),
        ({"tokenizer": "nowhere"}, "nowhere: expected a tokenizer, found no such file"),
    ],
)
def test_wrong_model_arguments_are_refused(arguments, message, adapter):
    with pytest.raises(ValueError, match=message):
        adapter.GrokLM(**{"checkpoint": DEMO, **arguments})


def test_unknown_generation_settings_are_refused(model):
    with pytest.raises(ValueError, match="generation: expected settings from .*got 'num_beams'"):
        model.generate_until(asked(("A dog", {"until": [], "num_beams": 4})))


def test_local_completions_gives_the_same_scores(server, model):
    """The harness's own model, by HTTP, and its tokenizer, which asks the server."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    stories = [(text[:n], text[n:]) for text in TEXTS[:2] for n in (1, 5)]
    pairs = [*PAIRS, *stories, (TEXTS[2][:900], TEXTS[2][900:950]), (PAIRS[0][0], " a fox")]
    api = Api(Engine(server, most_waiting=64), "demo", Template())
    with serve.in_background(api) as port:
        base = {"base_url": f"http://127.0.0.1:{port}/v1/completions", "model": "demo"}
        for more in ({"batch_size": 4}, {"num_concurrent": 3}):
            remote = LocalCompletionsAPI(**base, max_length=server.config.sequence_len, **more)
            found, expected = (each.loglikelihood(asked(*pairs)) for each in (remote, model))
            np.testing.assert_allclose(
                [total for total, _ in found], [total for total, _ in expected], rtol=0, atol=1e-5
            )
            assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


CHOICE = """
task: story_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: acc}}]
"""
NEXT = """
task: story_next
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{text}}}}"
doc_to_target: "{{{{next}}}}"
generation_kwargs: {{until: [" "], max_gen_toks: 8}}
metric_list: [{{metric: exact_match}}]
"""


def test_the_harness_evaluates_tasks_with_the_model(adapter, server, tmp_path, monkeypatch):
    documents = [
        {"text": "Once upon a", "choices": [" time", " xylophone"], "answer": 0, "next": "x"},
        {"text": "There was once a", "choices": [" zebra", " king"], "answer": 1, "next": "x"},
        {"text": "He had three", "choices": [" sons", " gearboxes"], "answer": 1, "next": "x"},
    ]
    for row in documents[:2]:  # the model gets the third one wrong
        first = server.generate([Request(row["text"], temperature=0, max_len=8, stop=" ")])
        row["next"] = first[0].text
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in documents))
    for name, task in (("choice", CHOICE), ("next", NEXT)):
        (tmp_path / f"{name}.yaml").write_text(task.format(data=data))
    words = ["lm_eval", "run", "--model", "grok-1", "--model_args", f"checkpoint={DEMO}"]
    words += ["--batch_size", "2", "--include_path", tmp_path]
    words += ["--tasks", "story_choice,story_next", "--output_path", tmp_path / "out.json"]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    adapter.main()
    (file,) = tmp_path.glob("out*.json")
    results = json.loads(file.read_text())["results"]
    assert results["story_choice"]["acc,none"] == pytest.approx(2 / 3)
    assert results["story_next"]["exact_match,none"] == pytest.approx(2 / 3)


def test_the_harness_reports_a_missing_checkpoint(adapter, tmp_path, monkeypatch):
    """Without the harness's own index of its tasks, which takes it a quarter of a minute."""
    evaluate = functools.partial(adapter.GrokLM, checkpoint=tmp_path)
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", evaluate)
    with pytest.raises(SystemExit, match=f"^error: {tmp_path}[^\n]*$"):
        adapter.main()
