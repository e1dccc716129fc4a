"""The notebooks run, reproduce their stored outputs, and state correct results."""

import base64
import io
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
from matplotlib.image import imread

import compiling
from paths import ROOT

NOTEBOOKS = ROOT / "notebooks"
MOST_BYTES = 650_000  # of a notebook, including its figures
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
CHECKS = {
    "inside_grok": """
np.testing.assert_allclose(captured.router_probs.sum(-1), 1, atol=1e-6)
np.testing.assert_allclose(load.sum(-1), 2, atol=1e-6)
np.testing.assert_allclose(captured.attention_weights.sum(-1), 1, atol=1e-5)
np.testing.assert_allclose(lens_logits[-1], found.logits, rtol=0, atol=1e-4)
assert count(params) == count(config.param_shapes()) > 14e6
i, j = np.indices(products.shape)
for distance in (0, 5, 20):
    assert np.ptp(np.diagonal(products, distance)) < 1e-4
assert np.all(np.median(errors, -1) > 1e-3) and np.all(np.median(errors, -1) < 0.1)
# As the text says: errors are large where other experts are chosen.
assert same.mean() > 0.5 and errors[~same].max() > 0.2 > 2 * errors[same].max()
scores = jax.nn.log_softmax(found.logits[:-1])[np.arange(len(pieces) - 1), found.token_ids[1:]]
np.testing.assert_allclose(plain, scores.sum(), atol=1e-3)
assert change.shape == (4, 8) and np.isfinite(change).all() and change.min() < -1
assert abs(log_likelihood(0, experts) - plain) < 1e-4  # there is no such expert
np.testing.assert_allclose(patched[:, 0], before, atol=1e-4)  # the first token is the same
assert np.ptp(patched) > 0.1
for figure in (routing, lens):
    assert figure.axes[0].images
""",
    "tiny_from_scratch": """
assert output.logits.shape == (1, 3, 16)
assert losses[0] > 2 and losses[-1] < 0.2 * np.log(13)
np.testing.assert_allclose(mapped, jax.jit(model.apply)(trained, prompts).logits[:, -1], atol=1e-4)
assert (mapped.argmax(-1) == prompts[:, 5]).mean() >= 0.75
np.testing.assert_allclose(gates.sum(-1), 1, atol=1e-6)
slope = jax.jit(jax.grad(loss))(params, batch(7))
loss = jax.jit(loss)
table = slope["language_model/in_out_embed"]["embeddings"]
place = np.unravel_index(np.argmax(np.abs(table)), table.shape)
def moved(by):
    own = jax.tree.map(lambda x: x, params)
    own["language_model/in_out_embed"]["embeddings"] = (
        own["language_model/in_out_embed"]["embeddings"].at[place].add(by))
    return float(loss(own, batch(7)))
np.testing.assert_allclose((moved(1e-2) - moved(-1e-2)) / 2e-2, table[place], rtol=0.05)
""",
}


@pytest.mark.parametrize(
    "name", ["tiny_from_scratch", pytest.param("inside_grok", marks=pytest.mark.exhaustive)]
)
def test_a_notebook_reproduces_its_outputs(name: str, tmp_path: pathlib.Path) -> None:
    # A copy: the figures of the repository are not overwritten.
    copy = tmp_path / "notebooks"
    copy.mkdir()
    for file in ("checkpoints", "tokenizer.model"):
        (tmp_path / file).symlink_to(ROOT / file)
    shutil.copy(NOTEBOOKS / "plots.py", copy)
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    check = {"cell_type": "code", "id": "check", "metadata": {}, "source": CHECKS[name]}
    notebook["cells"].append({**check, "execution_count": None, "outputs": []})
    file = copy / f"{name}.ipynb"
    file.write_text(json.dumps(notebook))
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "run_notebooks.py", file],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "IPYTHONDIR": str(tmp_path / "ipython"),
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {compiling.FLAGS}",
        },
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    made = json.loads(file.read_text())["cells"][:-1]
    kept = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())["cells"]
    for shown, new in zip(kept, made, strict=True):
        assert_alike(shown.get("outputs", []), new.get("outputs", []))
    for kept in NOTEBOOKS.glob("*.png") if name == "inside_grok" else ():
        made, shown = (imread(directory / kept.name) for directory in (copy, NOTEBOOKS))
        assert made.shape == shown.shape and abs(made - shown).mean() < 0.01, kept.name


def joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the outputs with consecutive printed texts joined: their number varies."""
    found: list[dict[str, Any]] = []
    for output in outputs:
        if found and output["output_type"] == found[-1]["output_type"] == "stream":
            found[-1] = {**found[-1], "text": [*found[-1]["text"], *output["text"]]}
        else:
            found.append(output)
    return found


def assert_alike(kept: list[dict[str, Any]], made: list[dict[str, Any]]) -> None:
    """The outputs of a cell are the stored ones, except for rounding."""
    kept, made = joined(kept), joined(made)
    assert [one["output_type"] for one in kept] == [one["output_type"] for one in made]
    for shown, new in zip(kept, made, strict=True):
        one, other = shown.get("data", {}), new.get("data", {})
        assert one.keys() == other.keys()
        text, again = ("".join(x.get("text", "")) for x in (shown, new))
        assert NUMBER.sub("0", text) == NUMBER.sub("0", again)
        numbers, others = ([float(x) for x in NUMBER.findall(t)] for t in (text, again))
        assert others == pytest.approx(numbers, rel=0.05, abs=0.01)
        if "image/png" in one:
            old, now = (
                imread(io.BytesIO(base64.b64decode(data["image/png"]))) for data in (one, other)
            )
            assert old.shape == pytest.approx(now.shape, rel=0.03)
            assert old.shape != now.shape or abs(old - now).mean() < 0.01


@pytest.mark.parametrize("name", CHECKS)
def test_a_notebook_is_stored_with_all_outputs(name: str) -> None:
    text = (NOTEBOOKS / f"{name}.ipynb").read_text()
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = {output["output_type"] for cell in cells for output in cell["outputs"]}
    assert {"stream", "display_data"} <= kinds <= {"stream", "display_data", "execute_result"}
    assert len(text) < MOST_BYTES and str(ROOT) not in text and "/tmp" not in text


def test_each_notebook_is_tested() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(CHECKS)
