"""Train the demo: a small Grok-1 that writes story English, through model.py's own modules.

    python tools/train_demo.py --corpus stories.txt.gz --validation stories_valid.txt.gz

trains a tokenizer and a float32 model, rounds it to int8 in the released group layout, and writes
both to a new directory. It saves its state regularly: after an interruption, the same command
continues from there. Everything is seeded.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece

try:
    import optax
except ModuleNotFoundError:
    sys.exit("error: optax is not installed; run: pip install -r requirements-dev.txt")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import checkpoint  # noqa: E402  (after the path)
from demo_corpus import encode_documents, read_documents, train_tokenizer  # noqa: E402
from grok1.execution import Execution  # noqa: E402
from grok1.formats import forms  # noqa: E402
from grok1.ops.quantization import Params  # noqa: E402
from grok1.serving.text import load_tokenizer  # noqa: E402
from model import LanguageModelConfig, TransformerConfig  # noqa: E402

CONFIG = LanguageModelConfig(
    vocab_size=4096,
    pad_token=0,
    eos_token=2,
    sequence_len=512,
    embedding_init_scale=1.0,
    output_multiplier_scale=1.0,
    embedding_multiplier_scale=16.0,  # sqrt(emb_size)
    fprop_dtype=jnp.float32,
    model=TransformerConfig(
        emb_size=256,
        widening_factor=3,
        key_size=16,
        num_q_heads=16,
        num_kv_heads=8,
        num_layers=4,
        attn_output_multiplier=0.25,  # 1 / sqrt(key_size)
        shard_activations=True,
        num_experts=8,
        num_selected_experts=2,
    ),
)
TOKENS_PER_STEP = 4096
# Short rows train faster, and long rows at the end suffice to learn distant positions:
# (fraction of the training steps, row length as a fraction of the context).
ROW_LENGTHS = ((0.60, 1 / 4), (0.25, 1 / 2), (0.15, 1))
BALANCE_WEIGHT = 0.01


class State(NamedTuple):
    """The training state, which is carried from step to step and saved."""

    params: Params
    optimizer: optax.OptState
    step: np.ndarray


def batches(tokens: np.ndarray, seed: int, steps: int, context: int) -> Iterator[np.ndarray]:
    """Yield int32 [rows, T + 1] for each step, TOKENS_PER_STEP targets each.

    T follows ROW_LENGTHS. Each pass over the corpus cuts it at different places and visits the rows
    in a different order.
    """
    parts, fractions = zip(*ROW_LENGTHS, strict=True)
    lengths = np.repeat([int(context * f) for f in fractions], np.diff(_ends(parts, steps)))
    epoch, rows = 0, np.zeros([0, 0], np.int32)
    for length in lengths:
        count = TOKENS_PER_STEP // length
        if len(rows) < count or rows.shape[1] != length + 1:
            rng = np.random.default_rng([seed, epoch])
            starts = np.arange(rng.integers(length), len(tokens) - length - 1, length)
            starts = rng.permutation(starts)
            rows = tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)
            epoch += 1
        yield rows[:count]
        rows = rows[count:]


def _ends(parts: Sequence[float], steps: int) -> np.ndarray:
    """Return where each part of `steps` ends, after a leading 0."""
    return np.concatenate([[0], np.round(np.cumsum(parts) * steps).astype(int)])


def loss_fn(params: Params, rows: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Rows int32 [B, T + 1] -> the training loss, and (nats per token, expert load [L, E])."""
    execution = Execution(expert_dispatch="static")  # differentiable
    model: Any = hk.without_apply_rng(
        hk.transform(
            lambda tokens: CONFIG.make(execution=execution)(tokens, capture=("router_probs",))
        )
    )
    output = model.apply(params, rows[:, :-1])
    nats = optax.softmax_cross_entropy_with_integer_labels(output.logits, rows[:, 1:]).mean()
    probs = output.captured.router_probs  # [L, B, T, E]
    experts, chosen = probs.shape[-1], CONFIG.model.num_selected_experts
    index = jax.lax.top_k(probs, chosen)[1]
    load = jax.nn.one_hot(index, experts).mean((1, 2, 3))  # [L, E], sums to 1 over E
    # The auxiliary loss of Switch Transformers (Fedus et al. 2021, eq. 4): 1 if even, its minimum.
    balance = experts * jnp.sum(load * probs.mean((1, 2)), axis=-1)
    return nats + BALANCE_WEIGHT * balance.mean(), (nats, load)


def make_optimizer(steps: int, peak: float) -> optax.GradientTransformation:
    """Return AdamW with a short warm-up and linear decay to 1 %; no weight decay on vectors."""
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0, peak, 100),
            optax.linear_schedule(peak, peak / 100, steps - 100),
        ],
        [100],
    )

    def decayed(params: Params) -> dict[str, dict[str, bool]]:
        return {
            module: {name: name != "scale" for name in leaves} for module, leaves in params.items()
        }

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(rate, b1=0.9, b2=0.98, weight_decay=0.1, mask=decayed),
    )


def save_state(path: Path, state: State, recipe: str) -> None:
    """Write the state atomically, together with its recipe."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, *leaves, recipe=recipe)
    os.replace(partial, path)


def load_state(path: Path, like: State, recipe: str) -> State:
    """Read a state that has the structure of `like`.

    Raises ValueError if it is damaged or its recipe differs.
    """
    remedy = "name another file with --state, or remove this one"
    try:
        with path.open("rb") as file, np.load(file) as saved:
            found = str(saved["recipe"])
            leaves = [saved[f"arr_{i}"] for i in range(len(saved.files) - 1)]
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"{path}: expected a training state, got {error!r}; {remedy}") from error
    if found != recipe:
        raise ValueError(
            f"{path}: expected a state of the recipe {recipe}, got one of {found}; {remedy}"
        )
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def train(tokens: np.ndarray, options: argparse.Namespace) -> Params:
    """Train, or continue training, and return the float32 parameters."""
    optimizer = make_optimizer(options.steps, options.learning_rate)

    @jax.jit
    def initial() -> State:
        params = CONFIG.init_params(options.seed)
        return State(params, optimizer.init(params), np.zeros([], np.int32))

    def update(state: State, rows: jax.Array) -> tuple[State, Any]:
        (_, aux), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, rows)
        updates, moments = optimizer.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, moments, state.step + 1), aux

    update = jax.jit(update, donate_argnums=0)
    state = initial()
    path = options.state
    recipe = f"seed {options.seed}, {options.steps} steps, rate {options.learning_rate}, "
    recipe += f"{len(tokens)} tokens, {CONFIG.to_dict()}"
    if path.exists():
        state = load_state(path, state, recipe)
        print(f"continuing after step {int(state.step)}", flush=True)
    first, began = int(state.step), time.time()
    schedule = batches(tokens, options.seed, options.steps, CONFIG.sequence_len)
    for step, rows in enumerate(schedule):
        if step < first:
            continue
        state, (nats, load) = update(state, rows)
        if (step + 1) % 20 == 0:
            nats = float(nats)  # waits for the step
            rate = (step + 1 - first) * TOKENS_PER_STEP / (time.time() - began)
            spread = f"{float(load.min()):.3f}-{float(load.max()):.3f}"
            print(
                f"step {step + 1}/{options.steps}  nats/token {nats:.3f}  "
                f"expert load {spread}  {rate:.0f} tokens/s",
                flush=True,
            )
        if (step + 1) % options.save_every == 0 or step + 1 == options.steps:
            save_state(path, state, recipe)
    return state.params


def held_out(
    params: Params, tokenizer: sentencepiece.SentencePieceProcessor, documents: Sequence[str]
) -> float:
    """Return nats per byte over rows of the full context length: a quick check after training.

    `tools/evaluate_demo.py` measures it exactly, document by document.
    """
    tokens = encode_documents(tokenizer, documents).astype(np.int32)
    length = CONFIG.sequence_len
    rows = tokens[: (len(tokens) - 1) // length * length + 1]
    rows = np.stack([rows[i : i + length + 1] for i in range(0, len(rows) - 1, length)])
    evaluate = jax.jit(lambda params, rows: loss_fn(params, rows)[1][0])
    nats = [float(evaluate(params, row[None])) for row in rows]
    bytes_per_token = sum(len(d.encode()) for d in documents) / len(tokens)
    return float(np.mean(nats)) / bytes_per_token


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    text = "gzipped training documents, each followed by a line <|doc|>"
    add("--corpus", required=True, help=text)
    add("--validation", required=True, help="gzipped held-out documents, in the same form")
    text = "an existing tokenizer; by default one is trained and saved as OUTPUT/tokenizer.model"
    add("--tokenizer", type=Path, help=text)
    add(
        "--output",
        type=Path,
        default=Path("trained-demo"),
        help="directory of the checkpoint (%(default)s)",
    )
    add("--overwrite", action="store_true", help="replace an existing checkpoint")
    add(
        "--state",
        type=Path,
        default=Path("train_demo.npz"),
        help="file of the training state (%(default)s)",
    )
    add(
        "--steps",
        type=int,
        default=1700,
        help=f"training steps, of {TOKENS_PER_STEP} tokens each (%(default)s)",
    )
    add("--learning-rate", type=float, default=3e-3, help="the highest learning rate (%(default)s)")
    add("--save-every", type=int, default=100, help="steps between saves (%(default)s)")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the weights and of the order of the data (%(default)s)",
    )
    return parser.parse_args(arguments)


def check_output(options: argparse.Namespace) -> None:
    """Raise ValueError if the checkpoint would replace another one."""
    if forms.form(options.output) and not options.overwrite:
        raise ValueError(
            f"{options.output} holds a checkpoint; name another directory with --output, or give "
            "--overwrite"
        )


def get_tokenizer(
    options: argparse.Namespace, documents: Sequence[str]
) -> sentencepiece.SentencePieceProcessor:
    """Return the given tokenizer, or that of the output directory, trained if it is missing."""
    own = options.output / "tokenizer.model"
    if options.tokenizer is None and not own.exists():
        options.output.mkdir(parents=True, exist_ok=True)
        return train_tokenizer(documents, own, CONFIG.vocab_size)
    return load_tokenizer(options.tokenizer or own, CONFIG.vocab_size)


def main() -> None:
    """Run the full recipe."""
    options = parse()
    check_output(options)
    documents = read_documents(options.corpus)
    validation = read_documents(options.validation)
    tokenizer = get_tokenizer(options, documents)
    tokens = encode_documents(tokenizer, documents)
    print(f"{len(documents)} documents, {len(tokens)} tokens", flush=True)
    params = train(tokens, options)
    quantized = jax.jit(CONFIG.quantize_params)(params)
    for name, weights in (("float32", params), ("int8", quantized)):
        print(f"held out, {name}: {held_out(weights, tokenizer, validation):.4f} nats per byte")
    checkpoint.save(options.output, quantized, CONFIG)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    # glibc frees large temporaries after every step and faults them in again at the next. If they
    # are kept, in huge pages, a step takes about 3/4 of the time. glibc reads this only at start.
    keep = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "100000000000",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    if sys.platform == "linux" and not set(keep) <= set(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **keep})
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command continues from the last saved step")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
