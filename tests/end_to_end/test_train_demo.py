"""The training of the demo, with a tiny model and few tokens."""

import dataclasses
import gzip
import shutil
import sys

import jax
import numpy as np
import pytest

import demo_corpus
import train_demo
from paths import ROOT

STEPS = 6


@pytest.fixture
def recipe(monkeypatch, tmp_path):
    """Train a tiny model; returns a function of the name of the state's file."""
    inner = dataclasses.replace(
        train_demo.CONFIG.model,
        emb_size=16, key_size=4, num_q_heads=4, num_kv_heads=2, num_layers=2, num_experts=4,
        widening_factor=1,
    )  # fmt: skip
    config = dataclasses.replace(
        train_demo.CONFIG,
        vocab_size=32,
        sequence_len=16,
        model=inner,
        embedding_multiplier_scale=4.0,
    )
    monkeypatch.setattr(train_demo, "CONFIG", config)
    monkeypatch.setattr(train_demo, "TOKENS_PER_STEP", 64)
    # Consecutive numbers, which the model can learn.
    tokens = (np.arange(600) % 32).astype(np.uint16)

    def train(name, stop_after=None, seed=0):
        words = ["--corpus", "-", "--validation", "-", "--state", str(tmp_path / name)]
        words += ["--steps", str(STEPS), "--save-every", "2", "--seed", str(seed)]
        options = train_demo.parse(words)
        if stop_after is None:
            return train_demo.train(tokens, options)
        plain = train_demo.batches

        def interrupted(*arguments):
            for step, rows in enumerate(plain(*arguments)):
                if step == stop_after:
                    raise KeyboardInterrupt
                yield rows

        with monkeypatch.context() as patch:
            patch.setattr(train_demo, "batches", interrupted)
            with pytest.raises(KeyboardInterrupt):
                train_demo.train(tokens, options)
        return None

    return train


@pytest.mark.parametrize("how", ["cut", "flipped", "an array", "no recipe"])
def test_a_damaged_state_is_refused(how, tmp_path):
    path, state = tmp_path / "state.npz", train_demo.State({"w": np.ones(99)}, (), np.zeros([]))
    train_demo.save_state(path, state, "recipe")
    assert train_demo.load_state(path, state, "recipe").params["w"].sum() == 99
    data = path.read_bytes()
    if how == "an array":
        with path.open("wb") as file:
            np.save(file, np.ones(3))
    elif how == "no recipe":
        np.savez(path, np.ones(3))
    else:
        middle = len(data) // 4
        flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
        path.write_bytes({"cut": data[:-9], "flipped": flipped}[how])
    with pytest.raises(ValueError, match="state.npz: expected a training state, got .*--state"):
        train_demo.load_state(path, state, "recipe")


@pytest.mark.exhaustive
def test_interrupted_training_resumes_with_same_result(recipe):
    whole = recipe("whole.npz")
    recipe("cut.npz", stop_after=5)  # after the state of step 4 was saved
    resumed = recipe("cut.npz")
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(ValueError, match="expected a state of the recipe seed 1, .* got one of"):
        recipe("cut.npz", seed=1)


def test_rows_of_consecutive_tokens_grow_to_context():
    tokens = np.arange(20000) % 4096
    rows = list(train_demo.batches(tokens, seed=0, steps=20, context=512))
    assert [r.shape for r in rows] == [(32, 129)] * 12 + [(16, 257)] * 5 + [(8, 513)] * 3
    for batch in rows:
        assert np.array_equal((batch[:, :1] + np.arange(batch.shape[1])) % 4096, batch)
    again = list(train_demo.batches(tokens, seed=0, steps=20, context=512))
    assert all(np.array_equal(a, b) for a, b in zip(rows, again, strict=True))
    assert not np.array_equal(rows[0], next(train_demo.batches(tokens, 1, 20, 512)))


def test_the_balance_loss_is_1_for_an_even_router(recipe):
    del recipe  # the tiny configuration
    config = train_demo.CONFIG
    params = config.init_params(0)
    rows = np.random.default_rng(0).integers(3, 32, (4, 17)).astype(np.int32)
    loss_fn = jax.jit(train_demo.loss_fn)

    def extra(scale):
        router = params["transformer/decoder_layer/router"]["w"] * scale
        changed = {**params, "transformer/decoder_layer/router": {"w": router}}
        loss, (nats, load) = loss_fn(changed, rows)
        np.testing.assert_allclose(load.sum(-1), 1, rtol=1e-5)
        return float(loss - nats) / train_demo.BALANCE_WEIGHT

    assert extra(0.0) == pytest.approx(1, rel=1e-4)
    assert extra(10.0) > 1.05


BROKEN = {
    "missing": None,
    "cut": gzip.compress(b"a" * 9999)[:20],
    "damaged": gzip.compress(b"a" * 9999)[:10] + b"\xff" * 20,
    "not-utf-8": gzip.compress(b"\xff"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_damaged_corpus_is_refused(how, tmp_path):
    corpus = tmp_path / "corpus.gz"
    if BROKEN[how] is not None:
        corpus.write_bytes(BROKEN[how])
    with pytest.raises(ValueError, match="corpus.gz: expected gzipped text in UTF-8, got "):
        demo_corpus.read_documents(corpus)


FILES = "--corpus", "-", "--validation", "-"


def test_training_overwrites_no_checkpoint():
    options = train_demo.parse([*FILES, "--steps", "4", "--output", str(ROOT / "checkpoints/demo")])
    with pytest.raises(ValueError, match="demo holds a checkpoint; name another directory with"):
        train_demo.check_output(options)
    options.overwrite = True
    train_demo.check_output(options)
    train_demo.check_output(train_demo.parse([*FILES]))  # a new directory by default


def test_the_tokenizer_is_trained_once(monkeypatch, tmp_path):
    def train(documents, path, vocab_size):
        assert documents == ["a story"] and vocab_size == 4096
        shutil.copy(ROOT / "tokenizer.model", path)

    monkeypatch.setattr(train_demo, "train_tokenizer", train)
    options = train_demo.parse([*FILES, "--output", str(tmp_path / "new")])
    train_demo.get_tokenizer(options, ["a story"])
    assert (tmp_path / "new" / "tokenizer.model").exists()
    monkeypatch.delattr(train_demo, "train_tokenizer")
    assert train_demo.get_tokenizer(options, []).vocab_size() == 4096  # after an interruption


def test_corpus_too_small_for_the_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected documents from which 4096 pieces can be made"):
        demo_corpus.train_tokenizer(["story"], tmp_path / "tokenizer.model")
    assert not any(tmp_path.iterdir())


def test_the_tokenizer_tool_overwrites_no_file(monkeypatch, capsys, tmp_path):
    there = tmp_path / "tokenizer.model"
    there.write_bytes(b"mine")
    monkeypatch.setattr(sys, "argv", ["demo_corpus.py", "corpus.gz", str(there)])
    with pytest.raises(SystemExit) as ended:
        demo_corpus.main()
    assert (
        ended.value.code == 2 and "name another file, or give --overwrite" in capsys.readouterr()[1]
    )
    assert there.read_bytes() == b"mine"
