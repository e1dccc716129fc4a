"""Text from tokens as they are drawn, tokens from text, stop strings, and tokenizer files."""

import os
import pathlib

import numpy as np
import pytest

from grok1.serving.text import Detokenizer, StopFilter, Vocabulary, load_tokenizer
from servers import TOKENIZER

FIRST_BYTE = 69  # the piece of byte 0


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary(load_tokenizer(TOKENIZER, 4096))


def byte_pieces(values):
    return [FIRST_BYTE + value for value in values]


def sequences(vocabulary, count):
    """Random token ids: words, control pieces, spaces, and bytes of whole and cut characters."""
    rng = np.random.default_rng(0)
    space = vocabulary.tokenizer.piece_to_id("\u2581")
    whole = [byte_pieces(char.encode()) for char in "é€😀\u2028"]
    kinds = [
        lambda: [int(rng.integers(4096))],
        lambda: [int(rng.choice([0, 1, 2, 3, space, 32, 47]))],
        lambda: [FIRST_BYTE + int(rng.integers(256))],
        lambda: whole[rng.integers(4)],
        lambda: whole[rng.integers(4)][:-1],
    ]
    every_byte = byte_pieces(range(256))
    yield every_byte
    yield every_byte[::-1]
    for _ in range(count - 2):
        yield sum((kinds[rng.integers(5)]() for _ in range(rng.integers(1, 20))), [])


def test_streamed_text_is_the_decoding_of_all_tokens(vocabulary):
    for ids in sequences(vocabulary, 1000):
        growing = Detokenizer(vocabulary)
        shown = ""
        for end, token in enumerate(ids, 1):
            shown += growing.push(token)
            assert vocabulary.decode(ids[:end]).startswith(shown)
        assert shown + growing.finish() == vocabulary.decode(ids)


def test_text_does_not_depend_on_where_the_prompt_ends(vocabulary):
    for number, ids in enumerate(sequences(vocabulary, 1000)):
        cut = number % (len(ids) + 1)
        before, after = Detokenizer(vocabulary), Detokenizer(vocabulary, ids[:cut])
        shown = "".join(map(before.push, ids[:cut]))
        rest = "".join(map(after.push, ids[cut:])) + after.finish()
        assert shown + rest == vocabulary.decode(ids)


def test_character_of_several_byte_pieces_comes_whole(vocabulary):
    """A piece may end inside a character: U+FFFD must not be printed for its first bytes."""
    growing = Detokenizer(vocabulary, vocabulary.encode("a"))
    texts = [growing.push(token) for token in byte_pieces("né€😀".encode())]
    assert texts == ["n", "", "é", "", "", "€", "", "", "", "😀"]


def test_invalid_bytes_are_replaced_as_soon_as_known(vocabulary):
    growing = Detokenizer(vocabulary)
    texts = [growing.push(token) for token in byte_pieces(b"\xe2\x82\xe2A\xf0\x9f")]
    mark = "\N{REPLACEMENT CHARACTER}"
    assert texts == ["", "", 2 * mark, mark + "A", "", ""]
    assert growing.finish() == 2 * mark
    assert growing.finish() == ""


def test_only_the_first_space_of_a_text_is_removed(vocabulary):
    the = vocabulary.tokenizer.piece_to_id("\u2581the")
    growing = Detokenizer(vocabulary, [1])  # [BOS], which is no text
    assert [growing.push(token) for token in (the, 2, the)] == ["the", "", " the"]


def test_cost_of_a_token_does_not_grow_with_the_text(vocabulary, monkeypatch):
    growing = Detokenizer(vocabulary, [400] * 5000)
    longest, decode = [], vocabulary.tokenizer.decode
    monkeypatch.setattr(
        Vocabulary, "decode", lambda _, ids: longest.append(len(ids)) or decode(ids)
    )
    for token in [400, *byte_pieces(b"\xf0\x9f\x98\x80" * 20), 500] * 20:
        growing.push(token)
    assert max(longest) <= 6


@pytest.mark.parametrize(
    ("text", "special"),
    [
        ("a <|separator|>b", [327, 4039, 47, 4059]),
        ("<|mask|><|control20|>", [48, 68]),
        ("[BOS]<|control1|>3", [1, 49, 17]),
        (" <|mask|>\n", [32, 48, 4]),
        ("<|mask", None),
        ("", []),
    ],
)
def test_special_pieces_are_text_unless_parsed(vocabulary, text, special):
    ids = vocabulary.encode(text)
    assert vocabulary.decode(ids) == text
    assert not set(ids) & set(vocabulary.special.values())
    assert vocabulary.encode(text, parse_special=True) == (ids if special is None else special)


def test_text_after_a_marker_gets_no_space(vocabulary):
    for text in ("ab<|mask|>cd  <|mask|>", "<|mask|> x", "<|separator|>\n\n1 <|separator|>"):
        assert vocabulary.decode(vocabulary.encode(text)) == text
        native = vocabulary.tokenizer.encode(text)
        space = native[:1] if text.startswith("<") else []  # which SentencePiece inserts
        assert space + vocabulary.encode(text, parse_special=True) == native


def test_other_text_is_encoded_as_by_sentencepiece(vocabulary):
    for text in ("Once upon a time", "  two\n\nlines 12", "[EOS] <not|special|>", "€"):
        assert vocabulary.encode(text) == vocabulary.tokenizer.encode(text)


# ---------------------------------------------------------------------------------- stop strings


def filtered(stops, parts):
    """Return all the text that a filter returns, and whether it stopped."""
    stop = StopFilter(stops)
    shown = ""
    for part in parts:
        shown += stop.push(part)
        whole = "".join(parts)
        assert whole.startswith(shown)
    return shown + stop.finish(), stop.stopped


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\n\ntwo", ["\n\n"], "one"),
        ("aabaabaac", ["aabaac"], "aab"),
        ("no stop here", ["stop!"], "no stop here"),
        ("abcd", ["c", "abcd"], "ab"),  # c is complete first
        ("xabc", ["bc", "abc"], "x"),  # both are complete: the longer one
        ("end", ["end"], ""),
        ("text", [], "text"),
    ],
)
def test_text_ends_before_first_complete_stop_string(text, stops, expected):
    """It does not depend on how the text is cut into parts."""
    stopped = expected != text
    rng = np.random.default_rng(0)
    for _ in range(50):
        cuts = sorted(rng.integers(0, len(text) + 1, rng.integers(0, 5)))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert filtered(stops, parts) == (expected, stopped)


def test_stop_string_that_is_complete_early_is_ignored():
    rng = np.random.default_rng(2)
    for _ in range(2000):
        text = "".join(rng.choice(list("ab"), rng.integers(0, 20)))
        stops = ["".join(rng.choice(list("ab"), rng.integers(1, 6))) for _ in range(2)]
        early = int(rng.integers(0, len(text) + 1))
        stop = StopFilter(stops)
        shown = "".join(stop.push(char, i < early) for i, char in enumerate(text))
        ends = [(i + len(s), i) for s in stops for i in range(len(text)) if text[i:].startswith(s)]
        late = [(end, begin) for end, begin in ends if end > early]
        assert shown + stop.finish() == (text[: min(late)[1]] if late else text)
        assert stop.stopped == bool(late)


def test_text_that_cannot_be_a_stop_string_is_not_held():
    stop = StopFilter(["\n\nHuman:"])
    assert [stop.push(part) for part in ("a", "\n", "\nHum", "b\n", "c")] == [
        "a", "", "", "\n\nHumb", "\nc",
    ]  # fmt: skip
    assert stop.push("d\n") == "d" and stop.finish() == "\n"


# -------------------------------------------------------------------------------- tokenizer files


CONTENT = TOKENIZER.read_bytes()


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "tokenizer.model"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "expected a SentencePiece model, got another kind of file"),
        (CONTENT[:-1], "expected a SentencePiece model, got another kind of file"),
        (CONTENT.replace(b"<0x41>", b"<0x42>"), "got another kind of file"),
        (CONTENT.replace(b"<0x41>", b"<0x\xff1>"), "got another kind of file"),
        (
            CONTENT.replace(b"<|mask|>", b"<|mas\xff|>"),
            "expected pieces in UTF-8, got one with the byte 0xff",
        ),
    ],
    ids=("empty", "cut", "missing byte", "byte not UTF-8", "piece not UTF-8"),
)
def test_damaged_tokenizer_gets_one_sentence(content, part, path):
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load_tokenizer(path, 4096)
    sentence = str(error.value)
    assert sentence.startswith(f"{path}: ") and part in sentence and "\n" not in sentence
    assert sentence.endswith("or name it with --tokenizer")


def test_tokenizer_that_splits_at_words_is_refused(path):
    """It finds a marker only as a whole word; Grok-1's kind of tokenizer finds it anywhere."""
    model_type, dummy_prefix = CONTENT.rindex(b"\x18\x02"), CONTENT.rindex(b"\x18\x01")
    changed = bytearray(CONTENT)
    changed[model_type + 1], changed[dummy_prefix + 1] = 3, 0
    path.write_bytes(changed)
    words = Vocabulary(load_tokenizer(path, 4096))
    assert "<|separator|>" in words.markers
    for text in ("a<|separator|>b", "[EOS]a"):
        with pytest.raises(ValueError, match=r"finds <\|separator\|> in any text, .*tokenizer$"):
            words.encode(text, parse_special=True)


def test_tokenizer_path_need_not_be_utf_8(tmp_path):
    path = pathlib.Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    path.write_bytes(CONTENT)
    assert load_tokenizer(path, 4096).vocab_size() == 4096


def test_too_large_tokenizer_is_refused(path):
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(ValueError, match=f"{path}: expected a tokenizer of at most 67108864 bytes"):
        load_tokenizer(path, 4096)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_tokenizer_must_be_a_regular_file(make, path):
    make(path)
    with pytest.raises(ValueError, match="that cannot be read .it is not a regular file"):
        load_tokenizer(path, 4096)
