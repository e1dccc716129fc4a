"""The routes of the server, from the body of a request to that of its answer."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from grok1.checks import is_integer
from grok1.serving.http import fields
from grok1.serving.http.answers import Form, Stream, usage
from grok1.serving.http.chat import Template
from grok1.serving.http.engine import Call, Engine
from grok1.serving.http.errors import ApiError, closing, failed
from grok1.serving.http.metrics import Metrics
from grok1.serving.request import Completion, Event
from grok1.serving.request import Request as ModelRequest

MOST_BYTES = 8 << 20  # of a body
MOST_SECONDS = 60  # for a body to arrive
WORKERS = 2  # threads that check and encode texts
OPEN = {"/health"}  # paths that need no key

_log = logging.getLogger(__name__)
Result = TypeVar("Result")
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
        self._created = int(time.time())
        self._workers = concurrent.futures.ThreadPoolExecutor(WORKERS)

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
        app = Starlette(
            routes=[
                Route(path, self._guarded(path, endpoint), methods=[method])
                for method, path, endpoint in routes
            ],
            middleware=[
                Middleware(
                    CORSMiddleware, allow_origins=self._origins, allow_methods=["GET", "POST"],
                    allow_headers=["*"],
                )
            ] if self._origins else [],
            exception_handlers={HTTPException: _http_error},  # type: ignore[dict-item]
        )  # fmt: skip
        app.router.redirect_slashes = False
        return app

    def _guarded(self, path: str, endpoint: Endpoint) -> Endpoint:
        """Return an endpoint that checks the key, counts, and answers errors as OpenAI does."""

        async def answer(request: Request) -> Response:
            try:
                self._check_origin(request)
                self._check_key(path, request)
                response = await endpoint(request)
            except ApiError as error:
                response = JSONResponse(error.body(), error.status, error.headers())
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it; it is counted
            except Exception:
                _log.exception("%s failed", path)
                response = JSONResponse(failed("an error of the server").body(), 500)
            self.metrics.requests.labels(path, response.status_code).inc()
            return response

        return answer

    def _check_origin(self, request: Request) -> None:
        """Refuse web pages, which a browser names, unless they are allowed."""
        origin = request.headers.get("origin")
        if origin is not None and not {origin, "*"} & {*self._origins}:
            message = "expected no web page, or one that --cors allows, got another one"
            raise ApiError(403, message, code="origin_not_allowed", kind="permission_error")

    def _check_key(self, path: str, request: Request) -> None:
        if self._key is None or path in OPEN:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.encode("latin-1"), self._key.encode())
        if scheme.lower() != "bearer" or not right:
            got = "another one" if given else "none"
            message = f"expected the key of this server as Authorization: Bearer KEY, got {got}"
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
        made, asked = fields.chat(body, prompt, self._template.stops)
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

    async def _aside(self, work: Callable[..., Result], *arguments: object) -> Result:
        """Call a function in another thread, as a long text takes a while."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, functools.partial(work, *arguments))

    async def _answer(
        self, request: Request, requests: list[ModelRequest], asked: fields.Asked, form: Form
    ) -> Response:
        for one in requests:
            try:
                await self._aside(self.server.check, one)
            except ValueError as error:
                raise fields.explained(error) from error
        calling = self.engine.call(requests, asked.stream)
        if asked.stream:
            return _Stream(calling, self._stream(calling.__enter__(), asked, form))
        with calling as call:
            answers = await _unless_left(request, asyncio.ensure_future(self._finish(call)))
        choices = [
            form.answer(index, answer, asked)
            for index, answer in enumerate(answer for own in answers for answer in own)
        ]
        return JSONResponse(form.body(choices, usage(answers, asked.empty)))

    async def _events(self, call: Call) -> AsyncIterator[tuple[int, Event]]:
        """Yield the events of a call, and count them. Raises ApiError if an answer fails."""
        watches = [self.metrics.watch() for _ in call.jobs]
        try:
            async for number, event in call.events():
                watches[number].take(event)
                if event.finish_reason == "error":
                    raise failed(event.completion.error)
                yield number, event
        except (asyncio.CancelledError, GeneratorExit):
            self.metrics.ended.labels("cancelled").inc(sum(call.left))
            raise

    async def _finish(self, call: Call) -> list[list[Completion]]:
        """Wait for the answers to each request of a call and return them. Raises ApiError."""
        found: list[dict[int, Completion]] = [{} for _ in call.jobs]
        async for number, event in self._events(call):
            found[number][event.sample] = event.completion
        return [[own[sample] for sample in sorted(own)] for own in found]

    async def _stream(self, call: Call, asked: fields.Asked, form: Form) -> AsyncIterator[str]:
        """Yield server-sent events with the tokens of a call."""
        streams: list[dict[int, Stream]] = [{} for _ in call.jobs]
        try:
            async for number, event in self._events(call):
                own, sample = streams[number], event.sample
                if sample not in own:
                    index = number * call.jobs[number].request.num_samples + sample
                    own[sample] = Stream(form, index, asked, event.completion)
                for choice in own[sample].chunks(event):
                    yield _event(form.body([choice], None, chunk=True))
            if asked.usage:
                answers = [[stream.answer for stream in own.values()] for own in streams]
                yield _event(form.body([], usage(answers, asked.empty), chunk=True))
            yield "data: [DONE]\n\n"
        except ApiError as error:
            yield _event(error.body())
        except Exception as error:
            _log.exception("a stream failed")
            yield _event(failed(str(error)).body())

    # ------------------------------------------------------------------------ about the model

    def _card(self) -> dict[str, Any]:
        context = self.server.config.sequence_len
        about = {"id": self.name, "object": "model", "created": self._created, "owned_by": "xai"}
        return about | {"max_model_len": context}

    async def models(self, _: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{model}."""
        self._check_model(request.path_params["model"])
        return JSONResponse(self._card())

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize: {"prompt": TEXT} -> {"tokens": [ID, ...], "count", "max_model_len"}.

        The name of a special piece alone is that piece: lm_eval looks up the id of [BOS] by it.
        """
        body = self._read(await _body(request), {"model", "prompt", "add_special_tokens"})
        text, special = body.get("prompt"), body.get("add_special_tokens", False)
        if not isinstance(text, str) or not isinstance(special, bool):
            raise ApiError(400, "prompt: expected a string to tokenize", "prompt")
        try:
            vocabulary = self.server.vocabulary
            alone = vocabulary is not None and text in vocabulary.special
            ids = await self._aside(self.server.encode, text, alone)
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
            text = await self._aside(self.server.decode, [tokens])
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
        body = self._read(await _body(request), {"model", "prompt"})
        if isinstance(prompt := body.get("prompt"), list) and not all(map(is_integer, prompt)):
            raise ApiError(400, "prompt: expected one string, or token ids", "prompt")
        try:
            (prompt,) = fields.prompts({"prompt": prompt})
            work = self.engine.run(functools.partial(self.server.inspect, prompt))
            found = await _unless_left(request, asyncio.ensure_future(work))
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


class _Stream(StreamingResponse):
    """A stream that ends its call even if the client leaves before the first chunk."""

    def __init__(self, calling: contextlib.AbstractContextManager[Call], chunks: Any):
        super().__init__(chunks, media_type="text/event-stream")
        self._calling = calling

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._calling.__exit__(None, None, None)


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
    body = ApiError(error.status_code, message).body()
    return JSONResponse(body, error.status_code, error.headers)
