"""Text to token ids and back: whole prompts in, and out what is final of an answer, piece by piece.

A SentencePiece vocabulary of Grok-1's kind: pieces of text in which "▁" is a space, single bytes
for what no piece covers, control pieces that are no text, and user-defined ones such as
<|separator|>, which SentencePiece finds in any text.
"""

import codecs
import os
import re
from collections.abc import Sequence

import sentencepiece

from grok1.formats import atomic
from grok1.formats.forms import MAX_TOKENIZER_BYTES

BOS_TOKEN = 1  # in Grok-1's tokenizer
TOKENIZER_SOURCE = (
    "fetch the tokenizer.model that belongs to the checkpoint (Grok-1's is in the xai-org/grok-1 "
    "repository on GitHub) and put it beside ckpt-0, or name it with --tokenizer"
)


def load_tokenizer(
    path: str | os.PathLike, vocab_size: int
) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model; ValueError if there is none or it is not of this vocabulary."""
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        with atomic.open_regular(os.fspath(path)) as file:
            text = file.read(MAX_TOKENIZER_BYTES + 1)
    except FileNotFoundError as error:
        raise ValueError(
            f"{path}: expected a tokenizer, found no such file; {TOKENIZER_SOURCE}"
        ) from error
    except OSError as error:
        raise ValueError(
            f"{path}: expected a tokenizer, got a file that cannot be read ({error.strerror}); "
            f"{TOKENIZER_SOURCE}"
        ) from error
    if len(text) > MAX_TOKENIZER_BYTES:
        raise ValueError(
            f"{path}: expected a tokenizer of at most {MAX_TOKENIZER_BYTES} bytes, got more; "
            f"{TOKENIZER_SOURCE}"
        )
    try:
        # Not by its path, which sentencepiece takes in UTF-8 only.
        tokenizer.LoadFromSerializedProto(text)
    except (RuntimeError, UnicodeDecodeError) as error:  # the latter of its own message
        raise ValueError(
            f"{path}: expected a SentencePiece model, got a file that is none; {TOKENIZER_SOURCE}"
        ) from error
    if tokenizer.vocab_size() != vocab_size:
        raise ValueError(
            f"{path}: expected the {vocab_size} pieces of the checkpoint's vocabulary, "
            f"got {tokenizer.vocab_size()}; {TOKENIZER_SOURCE}"
        )
    try:
        tokenizer.id_to_piece(list(range(vocab_size)))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected pieces in UTF-8, got one with the byte "
            f"0x{error.object[error.start]:02x}; {TOKENIZER_SOURCE}"
        ) from error
    return tokenizer


class Vocabulary:
    """A tokenizer, and what has to be known of its pieces."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        self.tokenizer = tokenizer
        ids = range(tokenizer.vocab_size())
        pieces = [tokenizer.id_to_piece(i) for i in ids]
        self.byte_of = {i: int(pieces[i][3:-1], 16) for i in ids if tokenizer.is_byte(i)}
        control = {pieces[i]: i for i in ids if tokenizer.is_control(i) and pieces[i]}
        # Those that SentencePiece itself finds in a text; of the rest only their form is known.
        found = (i for i in ids if re.fullmatch(r"<\|.+\|>", pieces[i]))
        self.markers = {pieces[i]: i for i in found if i in tokenizer.encode(pieces[i])}
        self.special = control | self.markers
        # A piece whose text begins with no space, to stand before others.
        self.word = next((i for i in ids if pieces[i].isalnum() and i not in self.byte_of), None)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; the space that every text begins with is left out."""
        return self.tokenizer.decode(list(ids))

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the token ids of a text, with no BOS.

        parse_special: take the text of a special piece, such as [EOS] or <|separator|>, for that
        piece; else it is text like any other, and its pieces spell it.
        Raises ValueError for what is not text.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not text in UTF-8: {error.reason}") from error
        special = self.special if parse_special else self.markers
        if not special:
            return self.tokenizer.encode(text)
        longest_first = sorted(special, key=len, reverse=True)
        ids: list[int] = []
        begin, first = 0, True
        for match in re.finditer("|".join(map(re.escape, longest_first)), text):
            # Cut after its first character, it is not found; what follows is encoded apart.
            end = match.start() if parse_special else match.start() + 1
            ids += self._encode_part(text[begin:end], first)
            if parse_special:
                ids.append(special[match[0]])
                end = match.end()
            begin, first = end, False
        return ids + self._encode_part(text[begin:], first)

    def _encode_part(self, text: str, first: bool) -> list[int]:
        """Encode a text, or, if it is not the first part of one, what does not begin with a space.

        SentencePiece puts a space before all it encodes. After a marker there is none.
        """
        if first or not text:
            return self.tokenizer.encode(text)
        if not self.markers:
            raise ValueError("parse_special needs a vocabulary that has a piece such as <|mask|>")
        marker, marker_id = next(iter(self.markers.items()))
        ids = self.tokenizer.encode(marker + text)
        if marker_id not in ids:
            raise ValueError(
                f"expected a tokenizer that finds {marker} in any text, got one that does in some; "
                f"{TOKENIZER_SOURCE}"
            )
        return ids[ids.index(marker_id) + 1 :]


class Detokenizer:
    """The text of a sequence as it grows: what is returned is final, and together all of it.

    Together with what `finish` returns at the end it equals the decode of all tokens, those of the
    prompt before them, without the prompt's.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int] = ()):
        self._vocabulary = vocabulary
        # What is decoded before the next tokens, as long as it matters: a text's first space is
        # left out.
        self._before: list[int] = []
        self._bytes: list[int] = []  # ids of bytes that may be the beginning of a character
        # All before the last bytes of the prompt is decoded at once.
        cut = len(prompt_ids)
        while cut and prompt_ids[cut - 1] in vocabulary.byte_of:
            cut -= 1
        self._decode(prompt_ids[:cut])
        for token in prompt_ids[cut:]:
            self.push(token)

    def push(self, token: int) -> str:
        """Take the next token; returns the text that is final with it."""
        if token not in self._vocabulary.byte_of:
            ready, self._bytes = [*self._bytes, token], []
            return self._decode(ready)
        found = [*self._bytes, token]
        values = bytes(self._vocabulary.byte_of[i] for i in found)
        kept = next((n for n in (3, 2, 1) if n <= len(found) and _begins(values[-n:])), 0)
        cut = len(found) - kept
        self._bytes = found[cut:]
        return self._decode(found[:cut])

    def finish(self) -> str:
        """Return the rest: bytes of a character that never came, each as U+FFFD."""
        ready, self._bytes = self._bytes, []
        return self._decode(ready)

    def _decode(self, ids: Sequence[int]) -> str:
        decode = self._vocabulary.decode
        if not ids:
            return ""
        text = decode([*self._before, *ids])[len(decode(self._before)) :]
        word = self._vocabulary.word
        if text and word is not None:
            self._before = [word]
        elif self._before != [word]:
            self._before += ids
        return text


def _begins(values: bytes) -> bool:
    """Whether these bytes are the beginning of a character, and not yet all of it."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(values) == ""
    except UnicodeDecodeError:
        return False


class StopFilter:
    """Lets a growing text through up to the first stop string, of which nothing is shown.

    stops: texts, none empty. The one that is complete first ends the text; of two that are so with
    the same character, the longer one.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""  # what may be the beginning of a stop string
        self.stopped = False

    def push(self, text: str, early: bool = False) -> str:
        """Take more of the text; returns what can be shown.

        early: a stop string may begin in it, but one that is complete in it ends nothing.
        """
        if self.stopped:
            return ""
        before, text = len(self._held), self._held + text
        first = {stop: max(0, before - len(stop) + 1) for stop in self._stops}
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s, first[s])) >= 0]
        if found and not early:
            self.stopped = True
            return text[: min(found)[1]]
        longest = max(map(len, self._stops), default=1) - 1
        held = next((n for n in range(min(longest, len(text)), 0, -1) if self._begin(text[-n:])), 0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back, where no stop string came of it."""
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
