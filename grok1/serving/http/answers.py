"""Answers in the form of OpenAI's API: choices, log-probabilities and usage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from grok1.serving.http.fields import Asked
from grok1.serving.request import Completion, Event

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

    def openings(self, index: int, answer: Completion, asked: Asked) -> list[dict[str, Any]]:
        """Return what precedes the first token of a streamed answer."""
        if self._chat:
            return [self._opening(index)]
        if not asked.echo:
            return []
        logprobs = None
        if asked.logprobs is not None:
            tokens = prompt_tokens(answer)
            logprobs = self.logprobs(tokens, self._start(tokens))
        return [self.choice(index, self.prompt_text(answer), logprobs, None, chunk=True)]

    def _opening(self, index: int) -> dict[str, Any]:
        """Return the first chunk of a choice of a chat, which names the role."""
        choice = self.choice(index, "", None, None, chunk=True)
        choice["delta"] = {"role": "assistant", "content": ""}
        return choice

    def text(self, answer: Completion) -> str:
        """Return the text of an answer; without a tokenizer, its token ids."""
        return answer.text if answer.text is not None else " ".join(map(str, answer.token_ids))

    def event_text(self, event: Event) -> str:
        """Return what an event adds to the text of its answer."""
        return event.text if self._server.vocabulary is not None else f"{event.token_id} "

    def prompt_text(self, answer: Completion) -> str:
        """Return the text of a prompt; without a tokenizer, its token ids."""
        if answer.prompt is not None:
            return answer.prompt
        if self._server.vocabulary is None:
            return " ".join(map(str, answer.prompt_ids)) + " "
        return self._server.vocabulary.decode(answer.prompt_ids)

    def answer(self, index: int, answer: Completion, asked: Asked) -> dict[str, Any]:
        """Return the choice of a complete answer."""
        text = "" if asked.empty else self.text(answer)
        text = self.prompt_text(answer) + text if asked.echo else text
        logprobs = None
        if asked.logprobs is not None:
            tokens = [] if asked.empty else answer_tokens(answer)
            before = prompt_tokens(answer) if asked.echo else []
            logprobs = self.logprobs(before + tokens, self._start(before))
        return self.choice(index, text, logprobs, "length" if asked.empty else answer.finish_reason)

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
            offsets.append(max(0, offset))
            offset += self.characters(token.id)
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

    def _start(self, tokens: Sequence[Token]) -> int:
        """Return the offset of the first token of a prompt, whose space is not in the text."""
        return -1 if tokens and self.token_text(tokens[0].id).startswith(" ") else 0

    def characters(self, token: int) -> int:
        """Return how many characters a token adds; the first of its bytes counts for one."""
        vocabulary = self._server.vocabulary
        if vocabulary is None:
            return len(str(token)) + 1
        byte = vocabulary.byte_of.get(token)
        if byte is not None:
            return int(byte & 0xC0 != 0x80)
        return 0 if vocabulary.tokenizer.is_control(token) else len(self.token_text(token))

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


class Stream:
    """One answer as chunks. index: of its choice."""

    def __init__(self, form: Form, index: int, asked: Asked, answer: Completion):
        self.answer = answer
        self._form = form
        self._index = index
        self._asked = asked
        self._count = 0  # tokens so far
        self._offset = len(form.prompt_text(answer)) if asked.echo else 0  # of the next one

    def chunks(self, event: Event) -> Iterator[dict[str, Any]]:
        """Yield the choices that an event adds."""
        form, asked, index = self._form, self._asked, self._index
        if not self._count:
            yield from form.openings(index, event.completion, asked)
        self.answer, logprobs = event.completion, None
        if asked.logprobs is not None and not asked.empty:
            (token,) = answer_tokens(event.completion, self._count, self._count + 1)
            logprobs = form.logprobs([token], self._offset)
            self._offset += form.characters(token.id)
        self._count += 1
        text = "" if asked.empty else form.event_text(event)
        if text or logprobs is not None or event.finish_reason is not None:
            yield form.choice(index, text, logprobs, event.finish_reason, chunk=True)
