"""The comparison of two checkpoints, by known distributions and with the demo."""

import argparse
import gzip
import shutil

import numpy as np
import pytest

import checkpoint
import compare_checkpoints
from compare_checkpoints import Reading, compare
from paths import ROOT

DEMO = ROOT / "checkpoints" / "demo"


def test_divergence_agreement_and_experts_are_those_of_tokens():
    first = Reading(np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), np.array([[[0, 1], [2, 3]]] * 2))
    second = Reading(np.log([[0.25, 0.5, 0.25], [0.2, 0.7, 0.1]]), np.array([[[0, 1], [2, 3]]] * 2))
    second.experts[1, 0] = 0, 2
    found = compare(first, second)
    expected = 0.5 * np.log(2) - 0.25 * np.log(2), 0.1 * np.log(0.5) + 0.8 * np.log(8 / 7)
    np.testing.assert_allclose(found.divergence, expected, rtol=1e-12)
    assert found.agree.tolist() == [False, True] and found.changed.tolist() == [0.5, 0]
    same = compare(first, first)
    assert not same.divergence.any() and same.agree.all() and not same.changed.any()
    dense = compare(first._replace(experts=None), second._replace(experts=None))
    assert not dense.changed.any()


def options(b, documents, **changes):
    given = {
        "a": DEMO, "b": b, "tokenizer": ROOT / "tokenizer.model", "documents": documents,
        "limit": None, "dtype": "float32",
    }  # fmt: skip
    return argparse.Namespace(**given | changes)


@pytest.fixture
def documents(tmp_path):
    path = tmp_path / "documents.gz"
    with gzip.open(path, "wt") as file:
        for text in ("Once upon a time there was a king. " * 3, "A dog."):
            file.write(f"{text}\n<|doc|>\n")
    return path


@pytest.mark.slow
def test_demo_in_4_bits_predicts_nearly_the_same(documents, tmp_path, monkeypatch, capsys):
    """In pieces of few tokens, of several documents."""
    monkeypatch.setattr(compare_checkpoints, "LONGEST", 16)
    checkpoint.convert(DEMO, tmp_path / "int4", "safetensors", group=64)
    nats, found = compare_checkpoints.run(options(tmp_path / "int4", documents))
    assert 0 < found.divergence.mean() < 0.05 and found.divergence.min() > -1e-6
    assert found.agree.mean() > 0.8 and 0 < found.changed.mean() < 0.3
    assert abs(nats[1] / nats[0] - 1) < 0.02
    compare_checkpoints.report(options(tmp_path / "int4", documents), nats, found)
    out = capsys.readouterr().out
    assert out.startswith(f"{len(found.agree)} tokens of ") and out.count("\n") == 5


def test_comparisons_that_cannot_be_are_refused(documents, tmp_path, monkeypatch):
    empty = tmp_path / "empty.gz"
    empty.write_bytes(gzip.compress(b""))
    with pytest.raises(ValueError, match="empty.gz: expected documents, got none"):
        compare_checkpoints.run(options(DEMO, empty))
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match="bytes of free disk space .*, got 1,000; give fewer"):
        compare_checkpoints.run(options(DEMO, documents))
