"""Compare the predictions of two checkpoints of one model, such as int8 and 4-bit experts.

    python tools/compare_checkpoints.py checkpoints/demo my-int4-demo

reads the documents with A, writes its log-probabilities to a temporary file, and then reads them
with B: only one model is in memory at a time. Documents are cut into pieces that fit the context.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo_corpus import read_documents  # noqa: E402  (after the path)
from evaluate_demo import nats_per_byte  # noqa: E402
from runner import InferenceRunner, load_server  # noqa: E402

LONGEST = 1024  # tokens of a piece
TOP_SHARE = 99  # per cent, of the quantile that is reported


class Reading(NamedTuple):
    """What a model makes of one piece of text.

    logprobs: float32 [T, V], of the next token. experts: int32 [L, T, A], sorted; None: no mixture.
    """

    logprobs: np.ndarray
    experts: np.ndarray | None


class Comparison(NamedTuple):
    """How B differs from A, for each token.

    divergence: KL(A || B) in nats. agree: whether the likeliest next token is the same. changed:
    the share of the layers in which B chooses other experts, 0 without a mixture.
    """

    divergence: np.ndarray
    agree: np.ndarray
    changed: np.ndarray


def pieces(server: InferenceRunner, documents: list[str]) -> list[list[int]]:
    """Return the tokens of all documents, each cut into pieces of at most LONGEST tokens."""
    longest = min(LONGEST, server.config.sequence_len)
    tokens = [server.encode(document) for document in documents]
    return [ids[i : i + longest] for ids in tokens for i in range(0, len(ids), longest)]


def read(server: InferenceRunner, rows: list[list[int]]) -> Iterator[Reading]:
    """Read pieces of text."""
    capture = ("expert_index",) if server.config.model.num_experts > 1 else ()
    for ids in rows:
        found = server.inspect(ids, capture)
        logits = found.logits.astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        logits -= np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        experts = np.sort(found.captured.expert_index, axis=-1) if capture else None
        yield Reading(logits.astype(np.float32), experts)


def compare(one: Reading, other: Reading) -> Comparison:
    """Compare two readings of the same tokens."""
    first, second = (x.logprobs.astype(np.float64) for x in (one, other))
    divergence = np.sum(np.exp(first) * (first - second), axis=-1)
    changed = np.zeros(len(first))
    if one.experts is not None and other.experts is not None:
        changed = np.any(one.experts != other.experts, axis=-1).mean(axis=0)
    return Comparison(divergence, first.argmax(-1) == second.argmax(-1), changed)


def stored(file: BinaryIO, rows: list[list[int]], vocabulary: int) -> Iterator[np.ndarray]:
    """Yield the log-probabilities of each piece, from a file that holds one after the other."""
    file.seek(0)
    for ids in rows:
        yield np.fromfile(file, np.float32, len(ids) * vocabulary).reshape(len(ids), vocabulary)


def load(directory: Path, options: argparse.Namespace) -> InferenceRunner:
    """Load one of the checkpoints."""
    return load_server(directory, options.tokenizer, slots=4, dtype=options.dtype)


def run(options: argparse.Namespace) -> tuple[list[float], Comparison]:
    """Return the nats per byte of both checkpoints, and their comparison, token by token."""
    documents = read_documents(options.documents)[: options.limit]
    if not documents:
        raise ValueError(f"{options.documents}: expected documents, got none")
    server = load(options.a, options)
    vocabulary, rows = server.config.vocab_size, pieces(server, documents)
    needed = 4 * vocabulary * sum(map(len, rows))
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise ValueError(
            f"{tempfile.gettempdir()}: expected {needed:,} bytes of free disk space for the "
            f"log-probabilities of {sum(map(len, rows)):,} tokens, got {free:,}; give fewer "
            "documents with --limit, or another directory in TMPDIR"
        )
    with tempfile.TemporaryFile() as file:
        experts = []
        for reading in read(server, rows):
            reading.logprobs.tofile(file)
            experts.append(reading.experts)
        nats = [nats_per_byte(server, documents)]
        del server  # before the other one is loaded
        server = load(options.b, options)
        if (server.config.vocab_size, pieces(server, documents)) != (vocabulary, rows):
            raise ValueError(f"{options.b}: expected the vocabulary of {options.a}, got another")
        before = map(Reading, stored(file, rows, vocabulary), experts)
        found = [compare(*pair) for pair in zip(before, read(server, rows), strict=True)]
        nats.append(nats_per_byte(server, documents))
    return nats, Comparison(*map(np.concatenate, zip(*found, strict=True)))


def report(options: argparse.Namespace, nats: list[float], found: Comparison) -> None:
    """Print the figures."""
    quantile = np.percentile(found.divergence, TOP_SHARE)
    print(f"{len(found.agree):,} tokens of {options.documents}, {options.dtype} activations")
    print(f"nats per byte: {nats[0]:.4f} and {nats[1]:.4f}, {nats[1] / nats[0] - 1:+.2%}")
    mean = found.divergence.mean()
    print(f"KL(A || B) per token: mean {mean:.5f}, {TOP_SHARE} % below {quantile:.4f}")
    print(f"the likeliest next token is the same for {found.agree.mean():.2%} of the tokens")
    print(f"other experts are chosen for {found.changed.mean():.2%} of tokens and layers")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("a", type=Path, metavar="A", help="checkpoint directory")
    add("b", type=Path, metavar="B", help="checkpoint directory that is compared with A")
    add("--tokenizer", type=Path, default=ROOT / "tokenizer.model", help="SentencePiece model")
    held_out = ROOT / "tests" / "data" / "stories_valid.txt.gz"
    text = "gzipped documents, each followed by a line <|doc|>"
    add("--documents", type=Path, default=held_out, help=text)
    add("--limit", type=int, metavar="N", help="read only the first N documents")
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the activations")
    options = parser.parse_args()
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit: expected an integer >= 1, got {options.limit}")
    report(options, *run(options))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
