"""The routes of the server, from the body of a request to that of its answer."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from grok1.serving.http import fields
from grok1.serving.http.answers import Form, answer_tokens, prompt_tokens, usage
from grok1.serving.http.chat import Template
from grok1.serving.http.engine import Engine, Job
from grok1.serving.http.errors import ApiError, closing, failed
from grok1.serving.http.metrics import Metrics
from grok1.serving.request import Completion
from grok1.serving.request import Request as ModelRequest

MOST_BYTES = 8 << 20  # of a body
MOST_SECONDS = 60  # for a body to arrive
OPEN = {"/health"}  # paths that need no key

_log = logging.getLogger(__name__)
Endpoint = Callable[[Request], Awaitable[Response]]


class Api:
    """The endpoints.

    name: of the model. key: that clients have to send, or None. origins: of web pages whose scripts
    may use the server. closing: whether new requests are refused, since the server ends.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        template: Template,
        key: str | None = None,
        origins: Sequence[str] = (),
    ):
        self.engine = engine
        self.server = engine.server
        self.name = name
        self.metrics = Metrics(engine)
        self.closing = False
        self._template = template
        self._key = key
        self._origins = origins

    def app(self) -> Starlette:
        """Return the application."""
        routes = [
            ("POST", "/v1/completions", self.completions),
            ("POST", "/v1/chat/completions", self.chat),
            ("GET", "/v1/models", self.models),
            ("GET", "/v1/models/{model:path}", self.model),
            ("POST", "/tokenize", self.tokenize),
            ("POST", "/detokenize", self.detokenize),
            ("GET", "/tokenizer_info", self.tokenizer_info),
            ("POST", "/inspect", self.inspect),
            ("GET", "/health", self.health),
            ("GET", "/metrics", self.read_metrics),
        ]
        return Starlette(
            routes=[
                Route(path, self._guarded(path, endpoint), methods=[method])
                for method, path, endpoint in routes
            ],
            middleware=[
                Middleware(
                    CORSMiddleware, allow_origins=self._origins, allow_methods=["GET", "POST"],
                    allow_headers=["authorization", "content-type"],
                )
            ] if self._origins else [],
            exception_handlers={HTTPException: _http_error},  # type: ignore[dict-item]
        )  # fmt: skip

    def _guarded(self, path: str, endpoint: Endpoint) -> Endpoint:
        """Return an endpoint that checks the key, counts, and answers errors as OpenAI does."""

        async def answer(request: Request) -> Response:
            try:
                self._check_key(path, request)
                response = await endpoint(request)
            except ApiError as error:
                response = JSONResponse(error.body(), error.status)
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it; it is counted
            except Exception:
                _log.exception("%s failed", path)
                response = JSONResponse(failed("an error of the server").body(), 500)
            self.metrics.requests.labels(path, response.status_code).inc()
            return response

        return answer

    def _check_key(self, path: str, request: Request) -> None:
        if self._key is None or path in OPEN:
            return
        given = request.headers.get("authorization", "").partition("Bearer ")[2]
        if not hmac.compare_digest(given.encode(), self._key.encode()):
            message = (
                "expected the key of this server as Authorization: Bearer KEY, got another one"
            )
            raise ApiError(401, message, code="invalid_api_key", kind="authentication_error")

    # ------------------------------------------------------------------------------ answers

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        body = self._read(await _body(request), fields.COMPLETION)
        requests, asked = fields.completion(body)
        return await self._answer(request, requests, asked, Form(self.server, self.name, "cmpl"))

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = self._read(await _body(request), fields.CHAT)
        prompt = self._template.prompt(body.get("messages"))
        if "stop" not in body and self._template.stops:
            body["stop"] = self._template.stops
        made, asked = fields.chat(body, prompt)
        form = Form(self.server, self.name, "chatcmpl")
        return await self._answer(request, [made], asked, form)

    def _read(self, text: bytes, known: set[str]) -> dict[str, Any]:
        if self.closing:
            raise closing()
        body = fields.read_body(text, known)
        self._check_model(body.get("model", self.name))
        return body

    def _check_model(self, name: object) -> None:
        if name != self.name:
            message = f"model: expected {self.name}, which this server has, got another one"
            raise ApiError(404, message, "model", "model_not_found")

    async def _answer(
        self, request: Request, requests: list[ModelRequest], asked: fields.Asked, form: Form
    ) -> Response:
        for one in requests:
            try:  # a long prompt takes a while
                await run_in_threadpool(self.server.check, one)
            except ValueError as error:
                raise fields.explained(error) from error
        jobs = self.engine.jobs(requests, asked.stream)
        if asked.stream:
            made = jobs.__enter__()
            chunks = self._stream(jobs, made, asked, form)
            return StreamingResponse(chunks, media_type="text/event-stream")
        with jobs as made:
            reading = asyncio.gather(*(self._finish(job) for job in made))
            answers = await _unless_left(request, reading)
        choices = [
            self._choice(form, index, answer, asked)
            for index, answer in enumerate(answer for own in answers for answer in own)
        ]
        return JSONResponse(form.body(choices, usage(answers, asked.empty)))

    async def _finish(self, job: Job) -> list[Completion]:
        """Wait for all answers of a job and return them. Raises ApiError if one failed."""
        watch = self.metrics.watch()
        found: dict[int, Completion] = {}
        async for event in job.events():
            watch.take(event)
            if event.finish_reason == "error":
                raise failed(event.completion.error)
            found[event.sample] = event.completion
        return [found[sample] for sample in sorted(found)]

    def _choice(
        self, form: Form, index: int, answer: Completion, asked: fields.Asked
    ) -> dict[str, Any]:
        text = "" if asked.empty else self._text(answer)
        tokens = [] if asked.empty else answer_tokens(answer)
        if asked.echo:
            text = self._prompt_text(answer) + text
            tokens = prompt_tokens(answer) + tokens
        logprobs = None if asked.logprobs is None else form.logprobs(tokens)
        reason = "length" if asked.empty else answer.finish_reason
        return form.choice(index, text, logprobs, reason)

    def _text(self, answer: Completion) -> str:
        """Return the text of an answer; without a tokenizer, its token ids."""
        return answer.text if answer.text is not None else " ".join(map(str, answer.token_ids))

    def _prompt_text(self, answer: Completion) -> str:
        if answer.prompt is not None:
            return answer.prompt
        if self.server.vocabulary is None:
            return " ".join(map(str, answer.prompt_ids)) + " "
        return self.server.vocabulary.decode(answer.prompt_ids)

    async def _stream(
        self,
        jobs: contextlib.AbstractContextManager[list[Job]],
        made: list[Job],
        asked: fields.Asked,
        form: Form,
    ) -> AsyncIterator[str]:
        """Yield server-sent events with the tokens of some jobs; cancels them if it is closed."""
        queue: asyncio.Queue[dict[str, Any] | ApiError | None] = asyncio.Queue()
        answers: list[dict[int, Completion]] = [{} for _ in made]
        tasks = [
            asyncio.create_task(self._forward(queue, job, number, answers[number], asked, form))
            for number, job in enumerate(made)
        ]
        try:
            left = len(tasks)
            while left:
                found = await queue.get()
                if found is None:
                    left -= 1
                elif isinstance(found, ApiError):
                    yield _event(found.body())
                    return
                else:
                    yield _event(form.body([found], None, chunk=True))
            if asked.usage:
                counted = usage([list(own.values()) for own in answers], asked.empty)
                yield _event(form.body([], counted, chunk=True))
            yield "data: [DONE]\n\n"
        finally:
            for task in tasks:
                task.cancel()
            jobs.__exit__(None, None, None)

    async def _forward(
        self,
        queue: asyncio.Queue[dict[str, Any] | ApiError | None],
        job: Job,
        number: int,
        answers: dict[int, Completion],
        asked: fields.Asked,
        form: Form,
    ) -> None:
        """Put the choices of a job's tokens in a queue, and at the end None or an error."""
        watch = self.metrics.watch()
        counts: dict[int, int] = {}
        offsets: dict[int, int] = {}  # of the next token in the text
        try:
            async for event in job.events():
                watch.take(event)
                if event.finish_reason == "error":
                    raise failed(event.completion.error)
                index = number * job.request.num_samples + event.sample
                if event.sample not in answers:
                    answers[event.sample] = event.completion
                    if asked.echo:
                        offsets[event.sample] = len(self._prompt_text(event.completion))
                    for choice in self._openings(form, index, event.completion, asked):
                        queue.put_nowait(choice)
                first = counts.get(event.sample, 0)
                counts[event.sample] = first + 1
                text, logprobs = event.text, None
                if self.server.vocabulary is None:
                    text = f"{event.token_id} "
                if asked.logprobs is not None and not asked.empty:
                    (token,) = answer_tokens(event.completion, first, first + 1)
                    offset = offsets.get(event.sample, 0)
                    logprobs = form.logprobs([token], offset)
                    offsets[event.sample] = offset + len(form.token_text(token.id))
                text = "" if asked.empty else text
                if text or logprobs is not None or event.finish_reason is not None:
                    reason = event.finish_reason
                    queue.put_nowait(form.choice(index, text, logprobs, reason, chunk=True))
            queue.put_nowait(None)
        except ApiError as error:
            queue.put_nowait(error)
        except Exception as error:
            _log.exception("a stream failed")
            queue.put_nowait(failed(str(error)))

    def _openings(
        self, form: Form, index: int, answer: Completion, asked: fields.Asked
    ) -> list[dict[str, Any]]:
        """Return what precedes the first token of a streamed choice."""
        if form.id.startswith("chatcmpl"):
            return [form.opening(index)]
        if not asked.echo:
            return []
        logprobs = None if asked.logprobs is None else form.logprobs(prompt_tokens(answer))
        return [form.choice(index, self._prompt_text(answer), logprobs, None, chunk=True)]

    # ------------------------------------------------------------------------ about the model

    def _card(self) -> dict[str, Any]:
        context = self.server.config.sequence_len
        return {"id": self.name, "object": "model", "owned_by": "xai", "max_model_len": context}

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}."""
        self._check_model(request.path_params["model"])
        return JSONResponse(self._card())

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: {"prompt": TEXT} -> {"tokens": [ID, ...], "count", "max_model_len"}."""
        body = self._read(await _body(request), {"model", "prompt", "add_special_tokens"})
        text, special = body.get("prompt"), body.get("add_special_tokens", False)
        if not isinstance(text, str) or not isinstance(special, bool):
            raise ApiError(400, "prompt: expected a string to tokenize", "prompt")
        try:
            ids = await run_in_threadpool(self.server.encode, text)
            ids = [self.server.bos_token, *ids] if special else ids
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from error
        context = self.server.config.sequence_len
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": context})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize: {"tokens": [ID, ...]} -> {"prompt": TEXT}."""
        body = self._read(await _body(request), {"model", "tokens"})
        tokens = body.get("tokens")
        if not isinstance(tokens, list):
            raise ApiError(400, "tokens: expected a list of token ids", "tokens")
        try:
            text = await run_in_threadpool(self.server.decode, [tokens])
        except ValueError as error:
            raise ApiError(400, str(error), "tokens") from error
        return JSONResponse({"prompt": text[0]})

    async def tokenizer_info(self, _: Request) -> Response:
        """GET /tokenizer_info: the special tokens, as other servers report them."""
        tokenizer = self.server.tokenizer
        if tokenizer is None:
            raise ApiError(404, "this server has no tokenizer; prompts are token ids")

        def piece(token: int) -> str | None:
            return tokenizer.id_to_piece(token) if token >= 0 else None

        eos, pad = self.server.config.eos_token, self.server.config.pad_token
        return JSONResponse(
            {
                "tokenizer_class": "SentencePieceProcessor",
                "vocab_size": tokenizer.vocab_size(),
                "bos_token": piece(tokenizer.bos_id()),
                "eos_token": piece(eos),
                "eos_token_id": eos,
                "pad_token": piece(pad),
                "unk_token": piece(tokenizer.unk_id()),
                "chat_template": None,
            }
        )

    async def inspect(self, request: Request) -> Response:
        """POST /inspect: {"prompt": TEXT or [ID, ...]} -> each token's experts in each layer.

        experts, probabilities: [token][layer][choice], the likeliest expert first.
        """
        prompt, *more = fields.prompts(self._read(await _body(request), {"model", "prompt"}))
        if more:
            raise ApiError(400, "prompt: expected one string, or token ids, got several", "prompt")
        try:
            found = await self.engine.call(functools.partial(self.server.inspect, prompt))
        except ValueError as error:
            raise ApiError(400, str(error), "prompt") from error
        chosen, probs = found.captured.expert_index, found.captured.router_probs  # [L, T, ...]
        weights = np.take_along_axis(probs, chosen, axis=-1)
        return JSONResponse(
            {
                "tokens": found.token_ids.tolist(),
                "pieces": found.pieces,
                "experts": np.moveaxis(chosen, 0, 1).tolist(),
                "probabilities": np.moveaxis(weights, 0, 1).tolist(),
            }
        )

    async def health(self, _: Request) -> Response:
        """GET /health: 200 while requests are taken, else 503."""
        if self.closing:
            raise closing()
        return JSONResponse({"status": "ok"})

    async def read_metrics(self, _: Request) -> Response:
        """GET /metrics."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")


async def _body(request: Request) -> bytes:
    """Return the body of a request. Raises ApiError if it is too long or slow."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(MOST_SECONDS):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > MOST_BYTES:
                    message = f"the body: expected at most {MOST_BYTES} bytes, got more"
                    raise ApiError(413, message)
    except TimeoutError:
        message = f"the body: expected it within {MOST_SECONDS} s, got a part of it"
        raise ApiError(408, message) from None
    return b"".join(parts)


async def _unless_left(request: Request, reading: asyncio.Future[Any]) -> Any:
    """Wait for answers; raises ClientDisconnect if the client leaves."""

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    leaving = asyncio.ensure_future(left())
    try:
        await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            raise ClientDisconnect
        return reading.result()
    finally:
        reading.cancel()
        leaving.cancel()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


async def _http_error(_: Request, error: HTTPException) -> Response:
    """Answer what no route does."""
    message = {
        404: "expected a path of this API, got another one",
        405: "expected another method for this path",
    }.get(error.status_code, str(error.detail))
    return JSONResponse(ApiError(error.status_code, message).body(), error.status_code)
