"""Measure a checkpoint on held-out documents: nats per byte, and how evenly its experts are used.

    python tools/evaluate_demo.py

scores tests/data/stories_valid.txt.gz with the demo, document by document, through the runner.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from demo_corpus import encode_documents, read_documents  # noqa: E402  (after the path)
from grok1.ops.quantization import Params  # noqa: E402
from runner import InferenceRunner, load_server  # noqa: E402

SLOTS = 4
CHUNK = 512


def nats_per_byte(server: InferenceRunner, documents: list[str]) -> float:
    """Return the negative log-likelihood of all documents, divided by their UTF-8 bytes."""
    nats = -sum(float(np.sum(scores, dtype=np.float64)) for scores in server.score(documents))
    return nats / sum(len(document.encode()) for document in documents)


def expert_load(server: InferenceRunner, documents: list[str]) -> np.ndarray:
    """Return the share of token copies routed to each expert, [L, E]; rows sum to 1."""
    config = server.config
    assert server.tokenizer is not None
    tokens = encode_documents(server.tokenizer, documents)
    rows = tokens[: len(tokens) // CHUNK * CHUNK].reshape(-1, CHUNK).astype(np.int32)
    model: Any = hk.without_apply_rng(
        hk.transform(lambda tokens: config.make()(tokens, capture=("router_probs",)))
    )

    @jax.jit
    def count(params: Params, tokens: jax.Array) -> jax.Array:
        probs = model.apply(params, tokens).captured.router_probs  # [L, B, T, E]
        chosen = jax.lax.top_k(probs, config.model.num_selected_experts)[1]
        return jnp.sum(jax.nn.one_hot(chosen, config.model.num_experts), axis=(1, 2, 3))

    counts = sum(np.asarray(count(server.params, row[None])) for row in rows)
    return counts / np.sum(counts, axis=1, keepdims=True)


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    demo = ROOT / "checkpoints" / "demo"
    add("--checkpoint", type=Path, default=demo, help="checkpoint directory")
    add("--tokenizer", type=Path, default=ROOT / "tokenizer.model", help="SentencePiece model")
    held_out = ROOT / "tests" / "data" / "stories_valid.txt.gz"
    text = "gzipped documents, each followed by a line <|doc|>"
    add("--documents", type=Path, default=held_out, help=text)
    add("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the activations")
    options = parser.parse_args()
    documents = read_documents(options.documents)
    server = load_server(
        options.checkpoint, options.tokenizer, slots=SLOTS, dtype=options.dtype, pad_sizes=(CHUNK,)
    )
    size = sum(len(document.encode()) for document in documents)
    print(
        f"{len(documents)} documents, {size} bytes, int8 weights, {options.dtype} activations; "
        "a minute or two on a laptop",
        flush=True,
    )
    print(f"held out: {nats_per_byte(server, documents):.4f} nats per byte", flush=True)
    for layer, load in enumerate(expert_load(server, documents)):
        print(f"layer {layer}, share of each expert: {' '.join(f'{x:.3f}' for x in load)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
