"""The demo's tokenizer has the layout and the settings of the released Grok-1 tokenizer."""

import struct
from collections.abc import Iterator

import pytest
import sentencepiece

from servers import TOKENIZER

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

# Text -> its last tokens.
TEXTS = {
    "": [],
    'Once upon a time, "Peter" ran away - and away!': [],
    "\n\n a\n\n\nb\nx" + "\n" * 13: [13, 6],
    "\t\tx\ty" + "\t" * 9: [31, 24],
    "x   y  ": [32],
    " " * 37 + "x": [],
    "1926 and 3.14": [15, 18],
    "café, nai\u0308ve 日本語 \U0001f469\u200d\U0001f680": [69 + b for b in "\U0001f680".encode()],
    "a\x00b\r\n": [4],
    "[BOS] hi [EOS][PAD][UNK] <0x41> <s></s>": [],
    "a <|mask|>b<|control20|>": [68],
}


@pytest.fixture(scope="module")
def tokenizer() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER))


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protocol buffer, without needing the protobuf package."""
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


def test_special_pieces_have_ids_and_kinds_of_grok_1(tokenizer):
    assert {i: tokenizer.id_to_piece(i) for i in SPECIAL_PIECES} == SPECIAL_PIECES
    assert sorted(SPECIAL_PIECES) == list(range(325))
    named = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    assert named == (0, 1, 2, 3)
    ids = range(tokenizer.vocab_size())
    assert 325 < len(ids) <= 4096
    assert [i for i in ids if tokenizer.is_control(i)] == [0, 1, 2]
    assert [i for i in ids if tokenizer.is_unknown(i)] == [3]
    assert [i for i in ids if tokenizer.is_byte(i)] == list(range(69, 325))


def test_settings_are_those_of_grok_1():
    """Field numbers are those of `sentencepiece_model.proto`."""
    model = dict(_fields(TOKENIZER.read_bytes()))
    trainer, normalizer = dict(_fields(model[2])), dict(_fields(model[3]))
    assert trainer[3] == 2  # model_type: BPE
    assert trainer[25] == 1  # split_digits
    assert trainer[35] == 1  # byte_fallback
    assert struct.unpack("<f", trainer[10])[0] == pytest.approx(0.9995)  # character_coverage
    assert normalizer[1] == b"identity"
    assert normalizer.get(2, b"") == b""  # precompiled_charsmap: nothing is rewritten
    assert normalizer[3] == 1  # add_dummy_prefix
    assert normalizer[4] == 0  # remove_extra_whitespaces


def test_decode_inverts_encode(tokenizer):
    """Prompts are encoded without [BOS], and no text is encoded as a control piece."""
    for text, last in TEXTS.items():
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not {0, 1, 2, 3} & set(ids)
        assert ids[len(ids) - len(last) :] == last, text
