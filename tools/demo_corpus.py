"""Data of the demo model: documents, the tokenizer trained on them, and token arrays.

    python tools/demo_corpus.py stories.txt.gz tokenizer.model --vocab-size 4096

The tokenizer has the layout of the released Grok-1 tokenizer: the same special pieces at the same
ids and the same settings, with fewer learned pieces after them.
"""

import argparse
import gzip
import io
import os
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece

SEPARATOR = "<|doc|>"  # alone on the line after each document

# The trainer assigns ids in this order, after [PAD], [BOS], [EOS] and [UNK].
USER_DEFINED = (
    *("\n" * n for n in range(1, 11)),  # ids 4-13
    *"0123456789",  # 14-23
    *("\t" * n for n in range(1, 9)),  # 24-31
    # Pieces are matched after normalization, which replaces each space by U+2581.
    *("\u2581" * n for n in range(2, 17)),  # 32-46
    "<|separator|>",  # 47
    "<|mask|>",  # 48
    *(f"<|control{n}|>" for n in range(1, 21)),  # 49-68; the 256 bytes follow at 69-324
)


def read_documents(path_gz: str | os.PathLike) -> list[str]:
    """Read a gzipped UTF-8 file in which a line `<|doc|>` ends each document.

    Returns:
      The documents in file order, without leading and trailing newlines; empty ones are dropped.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        with gzip.open(path_gz, "rt", encoding="utf-8", newline="\n") as file:
            text = "\n" + file.read()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise ValueError(f"{path_gz}: expected gzipped text in UTF-8, got {error}") from error
    parts = (part.strip("\n") for part in text.split(f"\n{SEPARATOR}\n"))
    return [part for part in parts if part]


def train_tokenizer(
    documents: Sequence[str], path: str | os.PathLike, vocab_size: int = 4096
) -> sentencepiece.SentencePieceProcessor:
    """Train a SentencePiece BPE tokenizer with the layout of Grok-1's and write it to `path`.

    The same documents and size give the same bytes. The file is written atomically.

    Raises:
      ValueError: `vocab_size` is too small for the special pieces and the characters, or larger
        than the documents can fill.
    """
    model = io.BytesIO()
    try:
        _train(documents, vocab_size, model)
    except RuntimeError as error:
        raise ValueError(
            f"expected documents from which {vocab_size} pieces can be made, got others ({error})"
        ) from error
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(model.getvalue())
    os.replace(partial, path)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def _train(documents: Sequence[str], vocab_size: int, model: io.BytesIO) -> None:
    sentencepiece.SentencePieceTrainer.train(
        # Complete documents, because the trainer must see their inner newlines. It silently skips
        # "sentences" above the limit.
        sentence_iterator=iter(documents),
        max_sentence_length=max(10, *(len(document.encode()) + 1 for document in documents)),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        pad_piece="[PAD]",
        bos_piece="[BOS]",
        eos_piece="[EOS]",
        unk_piece="[UNK]",
        user_defined_symbols=list(USER_DEFINED),
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.9995,
        num_threads=1,  # stored in the file, so it must not depend on the machine
        minloglevel=1,
    )


def encode_documents(
    tokenizer: sentencepiece.SentencePieceProcessor, documents: Sequence[str]
) -> np.ndarray:
    """Encode each document as [BOS] text [EOS] and join them.

    Returns:
      [total tokens], uint16 if every id fits, otherwise int32.
    """
    dtype = np.uint16 if tokenizer.vocab_size() <= 2**16 else np.int32
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    # One array per document: a list of Python integers for the whole corpus takes ten times more.
    arrays = [np.array([bos, *tokenizer.encode(text), eos], dtype) for text in documents]
    return np.concatenate([np.empty(0, dtype), *arrays])


def main() -> None:
    """Train the tokenizer named on the command line."""
    parser = argparse.ArgumentParser(description="Train the demo's tokenizer.")
    parser.add_argument("corpus", help="gzipped training documents")
    parser.add_argument("output", help="where to write the tokenizer")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    arguments = parser.parse_args()
    if os.path.lexists(arguments.output) and not arguments.overwrite:
        parser.error(f"{arguments.output} exists; name another file, or give --overwrite")
    try:
        train_tokenizer(read_documents(arguments.corpus), arguments.output, arguments.vocab_size)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
