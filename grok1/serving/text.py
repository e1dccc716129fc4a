"""Text to token ids and back: prompts are encoded completely, answers decoded incrementally.

The vocabulary is a SentencePiece one as of Grok-1: pieces of text in which "▁" is a space, single
bytes for what no piece covers, control pieces that are not text, and user-defined ones such as
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
    "repository on GitHub) and put it next to ckpt-0, or name it with --tokenizer"
)


def load_tokenizer(
    path: str | os.PathLike, vocab_size: int
) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model; ValueError if it is missing or has another vocabulary size."""
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
        # Not by its path, as sentencepiece only accepts paths in UTF-8.
        tokenizer.LoadFromSerializedProto(text)
    except (RuntimeError, UnicodeDecodeError) as error:  # the latter from decoding its message
        raise ValueError(
            f"{path}: expected a SentencePiece model, got another kind of file; {TOKENIZER_SOURCE}"
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
    """A tokenizer, and tables of its byte pieces and special pieces."""

    def __init__(self, tokenizer: sentencepiece.SentencePieceProcessor):
        self.tokenizer = tokenizer
        ids = range(tokenizer.vocab_size())
        pieces = [tokenizer.id_to_piece(i) for i in ids]
        self.byte_of = {i: int(pieces[i][3:-1], 16) for i in ids if tokenizer.is_byte(i)}
        control = {pieces[i]: i for i in ids if tokenizer.is_control(i) and pieces[i]}
        # Pieces of this form that SentencePiece finds in text; the others only look like it.
        found = (i for i in ids if re.fullmatch(r"<\|.+\|>", pieces[i]))
        self.markers = {pieces[i]: i for i in found if i in tokenizer.encode(pieces[i])}
        self.special = control | self.markers
        # A piece that does not begin with a space, used as context before other pieces.
        self.word = next((i for i in ids if pieces[i].isalnum() and i not in self.byte_of), None)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without the space that every text begins with."""
        return self.tokenizer.decode(list(ids))

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        """Return the token ids of a string, without BOS.

        parse_special: parse the name of a special piece, such as [EOS] or <|separator|>, as that
        piece; otherwise it is encoded as ordinary text.
        Raises ValueError if the string is not valid Unicode.
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
            # Split after its first character, so that SentencePiece does not find it.
            end = match.start() if parse_special else match.start() + 1
            ids += self._encode_part(text[begin:end], first)
            if parse_special:
                ids.append(special[match[0]])
                end = match.end()
            begin, first = end, False
        return ids + self._encode_part(text[begin:], first)

    def _encode_part(self, text: str, first: bool) -> list[int]:
        """Encode a part of a text, without a leading space unless it is the first part.

        SentencePiece puts a space before every string that it encodes, but not after a marker.
        """
        if first or not text:
            return self.tokenizer.encode(text)
        if not self.markers:
            raise ValueError("parse_special needs a vocabulary that has a piece such as <|mask|>")
        marker, marker_id = next(iter(self.markers.items()))
        ids = self.tokenizer.encode(marker + text)
        if marker_id not in ids:
            raise ValueError(
                f"expected a tokenizer that finds {marker} in any text, got one that misses some; "
                f"{TOKENIZER_SOURCE}"
            )
        return ids[ids.index(marker_id) + 1 :]


class Detokenizer:
    """Incremental decoder of a sequence, which only returns final text.

    The concatenation of all returned strings, including that of `finish`, is the text of prompt and
    answer without the text of the prompt.
    """

    def __init__(self, vocabulary: Vocabulary, prompt_ids: Sequence[int] = ()):
        self._vocabulary = vocabulary
        # Ids to decode before the next tokens as context, since a text's first space is omitted.
        self._before: list[int] = []
        self._bytes: list[int] = []  # byte pieces of a possibly incomplete character
        # Everything before the last bytes of the prompt is decoded at once.
        cut = len(prompt_ids)
        while cut and prompt_ids[cut - 1] in vocabulary.byte_of:
            cut -= 1
        self._decode(prompt_ids[:cut])
        for token in prompt_ids[cut:]:
            self.push(token)

    def push(self, token: int) -> str:
        """Add the next token; return the text that has become final."""
        if token not in self._vocabulary.byte_of:
            ready, self._bytes = [*self._bytes, token], []
            return self._decode(ready)
        found = [*self._bytes, token]
        values = bytes(self._vocabulary.byte_of[i] for i in found)
        kept = next((n for n in (3, 2, 1) if n <= len(found) and _is_incomplete(values[-n:])), 0)
        cut = len(found) - kept
        self._bytes = found[cut:]
        return self._decode(found[:cut])

    def finish(self) -> str:
        """Return the rest: each byte of an incomplete character as U+FFFD."""
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


def _is_incomplete(values: bytes) -> bool:
    """Whether these bytes are an incomplete character."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(values) == ""
    except UnicodeDecodeError:
        return False


class StopFilter:
    """Passes a growing text up to the first stop string, which is not included.

    stops: non-empty strings. The first complete one ends the text; if two are completed by the same
    character, the longer one.
    """

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""  # a possible beginning of a stop string
        self.stopped = False

    def push(self, text: str, early: bool = False) -> str:
        """Add more text; return the part that is safe to show.

        early: ignore stop strings that are complete in it; one may still begin in it.
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
        """Return the text held back, unless a stop string has ended the text."""
        held, self._held = self._held, ""
        return "" if self.stopped else held

    def _begin(self, text: str) -> bool:
        return any(stop.startswith(text) for stop in self._stops)
