"""Answers in the form of OpenAI's API: choices, log-probabilities and usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from grok1.serving.request import Completion

if TYPE_CHECKING:
    from runner import InferenceRunner

REASONS = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
Likely = Sequence[tuple[int, float]] | None  # tokens and their log-probabilities


class Token(NamedTuple):
    """A token with its log-probability, None for the first of a prompt, and the likely ones."""

    id: int
    logprob: float | None
    likely: Likely


class Form:
    """The forms of one answer to a client. kind: "cmpl" or "chatcmpl"."""

    def __init__(self, server: InferenceRunner, model: str, kind: str):
        self.id = f"{kind}-{uuid.uuid4().hex}"
        self._server = server
        self._chat = kind == "chatcmpl"
        self._common = {"id": self.id, "created": int(time.time()), "model": model}

    def body(
        self, choices: list[dict[str, Any]], usage: dict[str, int] | None, chunk: bool = False
    ) -> dict[str, Any]:
        """Return the body of an answer, or a chunk of a stream."""
        name = f"chat.completion{'.chunk' * chunk}" if self._chat else "text_completion"
        return {**self._common, "object": name, "choices": choices, "usage": usage}

    def choice(
        self,
        index: int,
        text: str | None,
        logprobs: dict[str, Any] | None,
        reason: str | None,
        chunk: bool = False,
    ) -> dict[str, Any]:
        """Return one choice, or what a chunk adds to it."""
        end = None if reason is None else REASONS.get(reason, reason)
        if not self._chat:
            content: dict[str, Any] = {"text": text or ""}
        elif chunk:
            content = {"delta": {} if text is None else {"content": text}}
        else:
            content = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": end}

    def opening(self, index: int) -> dict[str, Any]:
        """Return the first chunk of a choice of a chat, which names the role."""
        choice = self.choice(index, "", None, None, chunk=True)
        choice["delta"] = {"role": "assistant", "content": ""}
        return choice

    # ---------------------------------------------------------------------- log-probabilities

    def logprobs(self, tokens: Iterable[Token], offset: int = 0) -> dict[str, Any]:
        """Return the log-probabilities of tokens. offset: of the first one in the text."""
        if self._chat:
            return {"content": [self._entry(*token) for token in tokens], "refusal": None}
        texts, logprobs, tops, offsets = [], [], [], []
        for token in tokens:
            texts.append(self.token_text(token.id))
            logprobs.append(token.logprob)
            likely = reversed(token.likely or ())  # of two with the same text, the more probable
            names = {self.token_text(token): logprob for token, logprob in likely}
            tops.append(None if token.likely is None else names)
            offsets.append(offset)
            offset += len(texts[-1])
        return {
            "tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops,
            "text_offset": offsets,
        }  # fmt: skip

    def _entry(self, token: int, logprob: float | None, likely: Likely) -> dict[str, Any]:
        text, vocabulary = self.token_text(token), self._server.vocabulary
        byte = None if vocabulary is None else vocabulary.byte_of.get(token)
        values = [*text.encode()] if byte is None else [byte]
        entry: dict[str, Any] = {"token": text, "logprob": logprob, "bytes": values}
        if likely is not None:
            entry["top_logprobs"] = [self._entry(*other, None) for other in likely]
        return entry

    def token_text(self, token: int) -> str:
        """Return a token as text; a byte that is no character alone as OpenAI's API writes it."""
        vocabulary = self._server.vocabulary
        if vocabulary is None:
            return str(token)
        byte = vocabulary.byte_of.get(token)
        if byte is not None:
            return chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}"
        return vocabulary.tokenizer.id_to_piece(token).replace("▁", " ")


def prompt_tokens(answer: Completion) -> list[Token]:
    """Return the tokens of a prompt, whose log-probabilities were asked for."""
    scores = answer.prompt_logprobs or []
    likely = answer.prompt_top_logprobs or [None] * len(scores)
    return [Token(*found) for found in zip(answer.prompt_ids, scores, likely, strict=True)]


def answer_tokens(answer: Completion, first: int = 0, end: int | None = None) -> list[Token]:
    """Return tokens of an answer from `first` on, up to `end`."""
    ids, scores = answer.token_ids[first:end], answer.logprobs[first:end]
    likely: Sequence[Likely] = answer.top_logprobs[first:end] or [()] * len(ids)
    return [Token(*found) for found in zip(ids, scores, likely, strict=True)]


def usage(answers: Sequence[Sequence[Completion]], empty: bool = False) -> dict[str, int]:
    """Return the numbers of tokens of all answers to each prompt; each prompt counts once.

    empty: the answers were not wanted.
    """
    prompt = sum(len(own[0].prompt_ids) for own in answers)
    new = 0 if empty else sum(len(answer.token_ids) for own in answers for answer in own)
    return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
