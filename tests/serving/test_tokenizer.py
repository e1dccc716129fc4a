"""The demo's tokenizer has the layout and the settings of the released Grok-1 tokenizer."""

import struct
from collections.abc import Iterator

import pytest
import sentencepiece

from paths import ROOT

MODEL = ROOT / "tokenizer.model"

SPECIAL_PIECES = {
    0: "[PAD]",
    1: "[BOS]",
    2: "[EOS]",
    3: "[UNK]",
    **{3 + n: "\n" * n for n in range(1, 11)},
    **{14 + n: str(n) for n in range(10)},
    **{23 + n: "\t" * n for n in range(1, 9)},
    **{30 + n: "\u2581" * n for n in range(2, 17)},
    47: "<|separator|>",
    48: "<|mask|>",
    **{48 + n: f"<|control{n}|>" for n in range(1, 21)},
    **{69 + n: f"<0x{n:02X}>" for n in range(256)},
}

TEXTS = {
    "empty": "",
    "prose": 'Once upon a time, "Peter" ran away - and away!',
    "newlines": "a\n\n\nb\n",
    "leading newlines": "\n\n a",
    "more newlines than a piece holds": "x" + "\n" * 13 + "y",
    "tabs": "\t\tx\ty" + "\t" * 9,
    "one space": " ",
    "spaces": "x   y  ",
    "leading space": " x",
    "more spaces than a piece holds": " " * 37 + "x",
    "digits": "1926 and 3.14",
    "accents": "café, nai\u0308ve",
    "emoji": "\U0001f600 hi \U0001f469\u200d\U0001f680",
    "CJK": "日本語 中文 한국어",
    "control characters": "a\x00b\r\n",
    "special pieces spelled out": "[BOS] hi [EOS][PAD][UNK] <0x41>",
    "user-defined pieces": "a <|mask|>b<|control20|>",
}


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields (field number, value) of a protocol buffer, without needing the protobuf package."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
        else:
            size = {1: 8, 5: 4}[wire_type] if wire_type != 2 else varint()
            yield number, message[position : position + size]
            position += size


def test_special_pieces_have_the_ids_of_grok_1(tokenizer):
    pieces = {i: tokenizer.id_to_piece(i) for i in SPECIAL_PIECES}
    assert pieces == SPECIAL_PIECES
    assert sorted(SPECIAL_PIECES) == list(range(325))
    named = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert named == (0, 1, 2, 3)


def test_special_pieces_have_the_kinds_of_grok_1(tokenizer):
    ids = range(tokenizer.vocab_size())
    assert [i for i in ids if tokenizer.is_control(i)] == [0, 1, 2]
    assert [i for i in ids if tokenizer.is_unknown(i)] == [3]
    assert [i for i in ids if tokenizer.is_byte(i)] == list(range(69, 325))


def test_vocabulary_is_small(tokenizer):
    assert 325 < tokenizer.vocab_size() <= 4096


def test_settings_are_those_of_grok_1():
    """Field numbers are those of `sentencepiece_model.proto`."""
    model = dict(_fields(MODEL.read_bytes()))
    trainer, normalizer = dict(_fields(model[2])), dict(_fields(model[3]))
    assert trainer[3] == 2  # model_type: BPE
    assert trainer[25] == 1  # split_digits
    assert trainer[35] == 1  # byte_fallback
    assert struct.unpack("<f", trainer[10])[0] == pytest.approx(0.9995)  # character_coverage
    assert normalizer[1] == b"identity"
    assert normalizer.get(2, b"") == b""  # precompiled_charsmap: nothing is rewritten
    assert normalizer[3] == 1  # add_dummy_prefix
    assert normalizer[4] == 0  # remove_extra_whitespaces


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_decode_inverts_encode(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_id() not in ids


def test_encoding_is_text_alone(tokenizer):
    """Prompts are encoded with no [BOS], and nothing that a user types can produce one."""
    assert tokenizer.encode("") == []
    ids = tokenizer.encode("[BOS] hi [EOS][PAD][UNK] <s></s>")
    assert not {0, 1, 2, 3} & set(ids)


def test_digits_and_whitespace_use_their_own_pieces(tokenizer):
    digits = tokenizer.encode("x1926")[-4:]
    assert digits == [14 + int(digit) for digit in "1926"]
    assert tokenizer.encode("x\n\n")[-1] == 5
    assert tokenizer.encode("x\t\t\t")[-1] == 26
    # The dummy prefix joins the leading spaces, so three spaces are a run of four.
    assert tokenizer.encode("   x")[0] == 34


def test_unseen_characters_fall_back_to_their_bytes(tokenizer):
    ids = tokenizer.encode("\U0001f600")[1:]  # after the dummy prefix
    assert ids == [69 + byte for byte in "\U0001f600".encode()]
