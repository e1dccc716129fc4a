"""The server: OpenAI's client against one that a test starts, in this process."""

import asyncio
import concurrent.futures
import contextlib
import functools
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest

from grok1.serving.http import fields, serve
from grok1.serving.http.app import MOST_BYTES, Api
from grok1.serving.http.chat import STOPS, Template
from grok1.serving.http.engine import Engine
from grok1.serving.http.errors import ApiError, closing
from grok1.serving.request import Request
from runner import InferenceRunner
from servers import make, server

KEY = "key-of-the-tests"
TEXT = "Once upon a time there was a king"


class Running:
    """A server at a port of this machine, in a thread, until it is closed."""

    def __init__(self, model: InferenceRunner, key: str | None = KEY, most_waiting: int = 64):
        self.api = Api(Engine(model, most_waiting), "tiny", Template(), key)
        self.said: list[str] = []
        self._serving = serve.in_background(self.api, tell=self.said.append)
        self.port = self._serving.__enter__()

    def close(self) -> None:
        self._serving.__exit__(None, None, None)

    def client(self, **options: Any) -> openai.OpenAI:
        own = {"api_key": KEY, "max_retries": 0, "timeout": 60} | options
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", **own)

    def send(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
        """Send a request; return the status and the body, parsed if it is JSON."""
        own = {"authorization": f"Bearer {KEY}"} | headers
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, 60)) as line:
            line.request(method, path, body, own)
            answer = line.getresponse()
            text = answer.read()
        return answer.status, json.loads(text) if text[:1] == b"{" else text.decode()


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    started = Running(server())
    yield started
    started.close()


@pytest.fixture(scope="module")
def client(running: Running) -> Iterator[openai.OpenAI]:
    with running.client() as made:
        yield made


def complete(client: openai.OpenAI, prompt: Any = TEXT, **settings: Any) -> Any:
    return client.completions.create(model="tiny", prompt=prompt, **settings)


def test_an_answer_is_that_of_generate(client):
    settings = {"temperature": 0.7, "seed": 5, "max_tokens": 12, "n": 2}
    found = complete(client, logprobs=3, **settings, extra_body={"top_k": 50, "ignore_eos": True})
    expected = server().generate(
        Request(
            TEXT, temperature=0.7, rng_seed=5, max_len=12, num_samples=2, top_k=50, ignore_eos=True,
            top_logprobs=3,
        )
    )  # fmt: skip
    assert [choice.text for choice in found.choices] == [answer.text for answer in expected]
    for choice, answer in zip(found.choices, expected, strict=True):
        assert choice.logprobs.token_logprobs == answer.logprobs
        assert choice.finish_reason == "length"
        best = [max(likely.values()) for likely in choice.logprobs.top_logprobs]
        assert best == [likely[0][1] for likely in answer.top_logprobs]
    count = len(expected[0].prompt_ids)
    assert found.usage.prompt_tokens == count and found.usage.completion_tokens == 24
    assert found.object == "text_completion" and found.model == "tiny"


def test_several_prompts_are_answered_in_order(client):
    ids = [[5, 6, 7], [8, 9]]
    found = complete(client, ids, temperature=0, max_tokens=4, n=1)
    expected = server().generate(ids, temperature=0, max_len=4)
    assert [choice.text for choice in found.choices] == [answer.text for answer in expected]
    assert [choice.index for choice in found.choices] == [0, 1]
    assert complete(client, ["A", "B"], max_tokens=1).usage.completion_tokens == 2
    assert len(complete(client, [5, 6, 7], max_tokens=1).choices) == 1


def test_a_stream_has_the_text_and_scores_of_an_answer(client):
    settings = {"seed": 3, "max_tokens": 10, "n": 2, "logprobs": 2}
    whole = complete(client, **settings)
    texts, scores, offsets, reasons = {}, {}, {}, {}
    usage = None
    for chunk in complete(client, stream=True, stream_options={"include_usage": True}, **settings):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] = texts.get(choice.index, "") + choice.text
            scores.setdefault(choice.index, []).extend(choice.logprobs.token_logprobs)
            offsets.setdefault(choice.index, []).extend(choice.logprobs.text_offset)
            reasons[choice.index] = choice.finish_reason
    for choice in whole.choices:
        assert texts[choice.index] == choice.text
        assert scores[choice.index] == choice.logprobs.token_logprobs
        assert offsets[choice.index] == choice.logprobs.text_offset
        assert reasons[choice.index] == choice.finish_reason
    assert usage == whole.usage


@pytest.mark.parametrize("stream", [False, True])
def test_echo_returns_the_prompt_and_its_scores(stream, client):
    """As evaluation harnesses ask, with token ids; the first token has no log-probability."""
    ids = server().encode(TEXT)
    settings = {"max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1}
    found = complete(client, ids, stream=stream, **settings)
    chunks = found if stream else [found]
    tokens, scores, offsets, text = [], [], [], ""
    for chunk in chunks:
        for choice in chunk.choices:
            text += choice.text
            tokens += choice.logprobs.tokens
            scores += choice.logprobs.token_logprobs
            offsets += choice.logprobs.text_offset
    asked = {"prompt_logprobs": True, "top_logprobs": 1}
    expected = server().generate(ids, max_len=1, temperature=0, **asked)
    assert scores == [*expected.prompt_logprobs, *expected.logprobs] and scores[0] is None
    assert text == TEXT + expected.text and "".join(tokens) == f" {text}"
    places = zip(tokens, offsets, strict=True)
    assert all(text[place:].startswith(token if place else token[1:]) for token, place in places)


def test_first_choice_of_a_prompt_has_the_same_score_twice(client):
    """Harnesses find out in this way whether a token is the most probable one."""
    found = server().generate(TEXT, max_len=40, temperature=0, ignore_eos=True)
    prompt = [*found.prompt_ids, *found.token_ids]
    logprobs = complete(client, prompt, echo=True, max_tokens=0, logprobs=1).choices[0].logprobs
    pairs = zip(logprobs.token_logprobs, logprobs.top_logprobs, strict=True)
    greedy = [own == max(top.values()) for own, top in pairs if top]
    assert all(greedy[len(found.prompt_ids) - 1 :]) and not all(greedy)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_needs_no_scores(stream, client):
    settings = {"max_tokens": 3, "seed": 1, "temperature": 0}
    found = complete(client, TEXT, stream=stream, echo=True, n=2, **settings)
    texts = ["", ""]
    for chunk in found if stream else [found]:
        for choice in chunk.choices:
            assert choice.logprobs is None
            texts[choice.index] += choice.text
    assert texts == [TEXT + complete(client, TEXT, **settings).choices[0].text] * 2


def test_only_the_prompt_can_be_asked_for(client):
    found = complete(client, echo=True, max_tokens=0, logprobs=0)
    (choice,) = found.choices
    assert choice.text == TEXT and found.usage.completion_tokens == 0
    assert len(choice.logprobs.token_logprobs) == found.usage.prompt_tokens


def test_a_stop_string_ends_an_answer(client):
    whole = complete(client, seed=4, max_tokens=16).choices[0].text
    stop = whole[6:9]
    found = complete(client, seed=4, max_tokens=16, stop=[stop]).choices[0]
    assert found.text == whole[: whole.index(stop)] and found.finish_reason == "stop"


def test_a_chat_is_a_text_that_is_continued(client):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
    ]
    settings = {"seed": 7, "max_completion_tokens": 6, "logprobs": True, "top_logprobs": 2}
    found = client.chat.completions.create(model="tiny", messages=messages, **settings)
    prompt = "System: Be short.\n\nUser: Hello\n\nAssistant:"
    (choice,) = found.choices
    expected = server().generate(
        prompt, rng_seed=7, temperature=1, max_len=6, top_logprobs=2, stop=STOPS
    )
    assert choice.message.content == expected.text and choice.message.role == "assistant"
    assert [token.logprob for token in choice.logprobs.content] == expected.logprobs
    assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    stream = client.chat.completions.create(
        model="tiny", messages=messages, stream=True, **settings
    )
    parts = [choice.delta for chunk in stream for choice in chunk.choices]
    assert parts[0].role == "assistant"
    assert "".join(part.content or "" for part in parts) == expected.text


def test_a_template_file_replaces_the_plain_one(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}>")
    template = Template(path)
    assert template.prompt([{"role": "user", "content": "A"}]) == "[user]A>"
    assert not template.stops
    path.write_text("{% for %}")
    said = f"--chat-template {path}: expected a Jinja template, got an error"
    with pytest.raises(ValueError, match=said):
        Template(path)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=said):
        Template(path)
    with pytest.raises(ValueError, match="nowhere: .* got an error: No such file"):
        Template(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{{ 1 // 0 }}", "{{ raise_exception('odd') }}", "{{ other }}"])
def test_a_template_that_fails_refuses_the_messages(text, tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text(text)
    with pytest.raises(ApiError, match="the chat template refuses them") as refused:
        Template(path).prompt([{"role": "user", "content": "A"}])
    assert refused.value.status == 400


def test_own_stop_strings_are_added_to_those_of_the_template():
    for own, expected in (("a", ["a"]), (["a", "b"], ["a", "b"]), ([], [])):
        request, _ = fields.chat({"stop": own}, "A", STOPS)
        assert list(request.stop) == [*expected, *STOPS]


WRONG = [
    ({"model": "gpt"}, openai.NotFoundError, "model_not_found", "expected tiny"),
    ({"temperature": -1}, openai.BadRequestError, None, "temperature"),
    ({"top_p": 7}, openai.BadRequestError, None, "top_p must"),
    ({"max_tokens": 0}, openai.BadRequestError, None, "max_tokens: expected an integer >= 1"),
    ({"max_tokens": 5000}, openai.BadRequestError, "context_length_exceeded", "max_tokens"),
    ({"n": 0}, openai.BadRequestError, None, "n: expected an integer >= 1"),
    ({"n": 1000}, openai.BadRequestError, None, "n: expected at most 128"),
    ({"stop": ""}, openai.BadRequestError, None, "stop"),
    ({"logprobs": 21}, openai.BadRequestError, None, "logprobs: expected an integer from 0 to 20"),
    ({"suffix": "x"}, openai.BadRequestError, "unsupported_parameter", "suffix"),
    ({"best_of": 3}, openai.BadRequestError, "unsupported_parameter", "best_of"),
    ({"extra_body": {"temprature": 1}}, openai.BadRequestError, "unknown_parameter", "temperature"),
    ({"prompt": []}, openai.BadRequestError, None, "prompt: expected a string"),
    ({"prompt": [[1], "a"]}, openai.BadRequestError, None, "prompt: expected a string"),
    ({"prompt": [99999]}, openai.BadRequestError, None, "token ids from 0 to 4095"),
    ({"logit_bias": {"a": 1}}, openai.BadRequestError, None, "logit_bias: expected an object"),
]


@pytest.mark.parametrize(("fields", "kind", "code", "said"), WRONG, ids=str)
def test_wrong_fields_are_refused_as_openai_does(fields, kind, code, said, client):
    with pytest.raises(kind) as refused:
        client.completions.create(**{"model": "tiny", "prompt": TEXT} | fields)
    assert refused.value.code == code and said in refused.value.body["message"]
    assert "Traceback" not in str(refused.value.body)


def test_fields_that_ask_for_nothing_do_nothing(client):
    nothing = {"best_of": 1, "user": "me", "suffix": None, "seed": -1, "logit_bias": {"5": -2}}
    assert complete(client, max_tokens=1, **nothing).choices


def test_a_wrong_key_is_refused(running):
    with running.client(api_key="another") as other, pytest.raises(openai.AuthenticationError):
        complete(other)
    assert running.send("GET", "/v1/models", authorization="")[0] == 401
    assert running.send("GET", "/health", authorization="")[0] == 200
    for given, status in ((f"bearer {KEY}", 200), (f"xBearer {KEY}", 401), (KEY, 401)):
        assert running.send("GET", "/v1/models", authorization=given)[0] == status


HOSTILE = [
    ("POST", "/v1/completions", b"{", 400),
    ("POST", "/v1/completions", b"[]", 400),
    ("POST", "/v1/completions", b"\xff\xfe", 400),
    ("POST", "/v1/completions", b"[" * 100_000, 400),
    ("POST", "/v1/completions", b'{"prompt": "a", "prompt": "b"}', 400),
    ("POST", "/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400),
    ("POST", "/v1/completions", b'{"prompt": "\\ud800"}', 400),
    ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": 1e999}', 400),
    ("POST", "/v1/completions", b'{"prompt": {"a": 1}}', 400),
    ("POST", "/v1/completions", b'{"prompt": "a", "stream": "yes"}', 400),
    ("POST", "/v1/completions", b'{"prompt": "a", "stream_options": []}', 400),
    ("POST", "/v1/completions", b'{"prompt": "a", "seed": 1.5}', 400),
    ("POST", "/v1/completions", b'{"prompt": "a", "max_tokens": true}', 400),
    ("POST", "/v1/completions", b" " * (MOST_BYTES + 1), 413),
    ("POST", "/v1/chat/completions", b"{}", 400),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "tool", "content": ""}]}', 400),
    ("POST", "/v1/chat/completions", b'{"messages": [{"role": "user", "content": 1}]}', 400),
    ("POST", "/v1/chat/completions", b'{"messages": [1]}', 400),
    ("POST", "/v1/completions", b'{"\\ud800": 1}', 400),
    ("POST", "/v1/completions", b'{"prompt": "a", "logit_bias": {"5": 1, "05": 2}}', 400),
    ("POST", "/v1/completions/", b"{}", 404),
    ("POST", "/inspect", b'{"prompt": [[]]}', 400),
    ("POST", "/inspect", b'{"prompt": ["a", "b"]}', 400),
    ("POST", "/tokenize", b'{"prompt": 1}', 400),
    ("POST", "/detokenize", b'{"tokens": [-1]}', 400),
    ("GET", "/v1/models/../../etc/passwd", b"", 404),
    ("GET", "/v1/completions", b"", 405),
    ("GET", "/nothing", b"", 404),
]


@pytest.mark.parametrize(("method", "path", "body", "status"), HOSTILE)
def test_hostile_requests_get_an_error(method, path, body, status, running):
    found, answer = running.send(method, path, body)
    assert found == status, answer
    assert answer["error"]["message"] and "Traceback" not in answer["error"]["message"]
    assert running.send("GET", "/health")[0] == 200


def test_tokens_and_text_are_converted(running):
    status, found = running.send("POST", "/tokenize", json.dumps({"prompt": TEXT}).encode())
    assert status == 200 and found["tokens"] == server().encode(TEXT)
    text = json.dumps({"tokens": found["tokens"]}).encode()
    assert running.send("POST", "/detokenize", text) == (200, {"prompt": TEXT})
    special = json.dumps({"prompt": TEXT, "add_special_tokens": True}).encode()
    tokens = running.send("POST", "/tokenize", special)[1]["tokens"]
    assert tokens == [server().bos_token, *found["tokens"]]
    status, found = running.send("GET", "/tokenizer_info")
    assert found["eos_token"] == server().tokenizer.id_to_piece(server().config.eos_token)


def test_the_experts_of_a_text_are_reported(running):
    status, found = running.send("POST", "/inspect", json.dumps({"prompt": TEXT}).encode())
    expected = server().inspect(TEXT)
    assert status == 200 and found["tokens"] == expected.token_ids.tolist()
    experts = np.array(found["experts"])  # [token, layer, choice]
    np.testing.assert_array_equal(experts.swapaxes(0, 1), expected.captured.expert_index)
    probabilities = np.array(found["probabilities"]).swapaxes(0, 1)
    assert np.all(np.diff(probabilities, axis=-1) <= 0) and found["pieces"] == expected.pieces
    assert running.send("POST", "/inspect", b'{"prompt": []}')[0] == 400


def test_other_origins_are_refused_unless_named(running):
    asked = {"origin": "http://page", "access-control-request-method": "POST"}
    assert running.send("OPTIONS", "/v1/completions", **asked)[0] == 405
    api = Api(running.api.engine, "tiny", Template(), origins=["http://page"])
    for origin, status in ((None, 200), ("http://page", 403)):
        headers = {} if origin is None else {"origin": origin}
        assert running.send("GET", "/v1/models", **headers)[0] == status
    (middleware,) = api.app().user_middleware
    assert middleware.kwargs["allow_origins"] == ["http://page"]


def test_models_are_listed(client):
    (model,) = client.models.list()
    assert model.id == "tiny" and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_requests_and_tokens_are_counted(running, client):
    def value(name: str) -> float:
        lines = running.send("GET", "/metrics")[1].splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name))

    names = (
        "grok_generated_tokens_total",
        "grok_prompt_tokens_total",
        'grok_answers_total{reason="l',
    )
    before = [value(name) for name in names]
    found = complete(client, max_tokens=5, extra_body={"ignore_eos": True})
    after = [value(name) for name in names]
    prompt = found.usage.prompt_tokens
    assert [b - a for a, b in zip(before, after, strict=True)] == [5, prompt, 1]
    assert value("grok_slots") == 4 and value("grok_time_to_first_token_seconds_count") >= 1


def wait_until(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot(stream, running):
    body = {"prompt": [5], "max_tokens": 63, "n": 100, "ignore_eos": True, "stream": stream}
    text = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection(("127.0.0.1", running.port)) as line:
        line.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
        wait_until(lambda: running.api.engine.held)
    wait_until(lambda: not running.api.engine.held and not server().busy)


def test_a_client_that_leaves_before_its_stream():
    """Its stream is never read, so that nothing in it can end the request."""
    api = Api(Engine(server(), 64), "tiny", Template())

    async def ask() -> None:
        api.engine.start()
        body = json.dumps({"prompt": [5], "stream": True, "n": 9, "max_tokens": 60}).encode()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            return next(messages, {"type": "http.disconnect"})

        async def send(_: Any) -> None:
            raise OSError("the client has left")

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
        with contextlib.suppress(Exception):
            await api.app()(scope | {"query_string": b""}, receive, send)
        assert not api.engine.held
        await asyncio.to_thread(api.engine.stop)

    asyncio.run(ask())
    assert not server().busy


def test_requests_beyond_the_queue_are_refused(running, monkeypatch):
    engine = running.api.engine
    monkeypatch.setattr(engine, "most_waiting", 1)
    with running.client() as client:
        stream = complete(client, [5], stream=True, n=100, max_tokens=63)
        next(iter(stream))
        metrics = running.send("GET", "/metrics")[1]
        waiting = float(metrics.partition("\ngrok_answers_waiting ")[2].split()[0])
        assert 90 < waiting <= 100 - server().num_slots
        with pytest.raises(openai.RateLimitError) as refused:
            complete(client, [5])
        assert "at most 1 waiting answers" in refused.value.body["message"]
        assert refused.value.response.headers["retry-after"] == "1"
        stream.close()
    wait_until(lambda: not engine.held)


def test_requests_at_once_get_their_own_answers(running):
    """Each has the bits of the answer alone."""
    found: dict[int, Any] = {}

    def ask(seed: int) -> None:
        with running.client() as own:
            prompt = [5 + seed] * (1 + 3 * seed)
            found[seed] = complete(own, prompt, seed=seed, max_tokens=9, logprobs=0)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, answer in found.items():
        prompt = [5 + seed] * (1 + 3 * seed)
        alone = server().generate(prompt, rng_seed=seed, max_len=9, temperature=1)
        assert answer.choices[0].logprobs.token_logprobs == alone.logprobs
        assert answer.choices[0].text == alone.text
    assert len(found) == 12


def test_the_server_goes_on_after_a_failed_step(client, monkeypatch):
    scheduler = server()._scheduler
    monkeypatch.setattr(scheduler, "_decode", lambda *_: 1 / 0)
    with pytest.raises(openai.InternalServerError) as failed:
        complete(client, max_tokens=3)
    assert "did not finish" in failed.value.body["message"]
    monkeypatch.undo()
    assert complete(client, max_tokens=3).choices


def test_what_runs_ends_before_the_server():
    started = Running(make(), key=None)
    with started.client() as client:
        stream = iter(
            complete(client, [5], stream=True, max_tokens=60, n=20, extra_body={"ignore_eos": True})
        )
        first = next(stream)
        ending = threading.Thread(target=started.close)
        ending.start()
        wait_until(lambda: started.api.closing)
        assert started.send("GET", "/health")[0] == 503
        with pytest.raises(openai.InternalServerError, match="the server is about to end"):
            complete(client)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason == "length" and first.choices
        ending.join(30)
    assert any("that have 5 s to finish: 1" in text for text in started.said)


def test_what_is_given_up_is_not_done():
    """As if clients of /inspect had left, or the server had ended, while others are served."""
    done: list[str] = []

    async def ask() -> None:
        engine, free = Engine(server(), 64), threading.Event()
        engine.start()
        first = asyncio.create_task(engine.run(free.wait))
        left = asyncio.create_task(engine.run(lambda: done.append("left")))
        await asyncio.sleep(0.1)
        left.cancel()
        engine._orders.put(functools.partial(int, "not a number"))  # fails in the thread
        engine.end_calls(closing())
        with pytest.raises(ApiError, match="about to end"):
            await first
        free.set()
        await engine.run(lambda: done.append("next"))
        assert not engine.held
        await asyncio.to_thread(engine.stop)

    asyncio.run(ask())
    assert done == ["next"]


def test_what_does_not_end_in_time_gets_an_error():
    started = Running(server())
    body = json.dumps({"prompt": [5], "n": 60, "max_tokens": 60, "ignore_eos": True}).encode()
    inspected = json.dumps({"prompt": [5, 6, 7]}).encode()
    with concurrent.futures.ThreadPoolExecutor(3) as pool, started.client() as client:
        forever = {"n": 60, "max_tokens": 60, "extra_body": {"ignore_eos": True}}
        stream = complete(client, [5], stream=True, **forever)
        next(iter(stream))
        started.api.engine.most_waiting = 200
        whole = pool.submit(started.send, "POST", "/v1/completions", body)
        wait_until(lambda: len(started.api.engine.held) == 2)
        inspecting = pool.submit(started.send, "POST", "/inspect", inspected)
        ended = pool.submit(started.close)
        wait_until(lambda: started.api.closing)
        started.api.engine.end_calls(closing())  # as when the time is over
        status, answer = whole.result()
        assert status == 503 and answer["error"]["code"] == "service_unavailable"
        with pytest.raises(openai.APIError, match="the server is about to end"):
            list(stream)
        assert inspecting.result()[0] in (200, 503)
        ended.result()
    assert not server().busy


def test_scores_of_texts_are_those_of_score(client):
    """As harnesses compute them, with echo after [BOS]."""
    ids = server().encode(TEXT)
    found = complete(
        client, [[server().bos_token, *ids]], echo=True, max_tokens=1, logprobs=1, temperature=0
    )
    logprobs = found.choices[0].logprobs.token_logprobs[1:-1]
    np.testing.assert_allclose(logprobs, server().score(ids), rtol=0, atol=1e-5)
