"""The notebooks run from top to bottom, and what they find holds."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from matplotlib.image import imread

from paths import ROOT

NOTEBOOKS = ROOT / "notebooks"
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
scores = jax.nn.log_softmax(found.logits[:-1])[np.arange(len(pieces) - 1), found.token_ids[1:]]
np.testing.assert_allclose(plain, scores.sum(), atol=1e-3)
assert change.shape == (4, 8) and np.isfinite(change).all() and change.min() < -1
assert abs(float(log_likelihood(params, 0, experts)) - plain) < 1e-4  # there is no such expert
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


@pytest.mark.parametrize("name", CHECKS)
def test_the_notebook_runs_and_its_numbers_hold(name: str, tmp_path: pathlib.Path) -> None:
    # A copy, whose figures are written beside it and not over those of the repository.
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
        [pathlib.Path(sys.executable).with_name("jupyter-execute"), file],
        env={**os.environ, "PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path / "ipython")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for kept in NOTEBOOKS.glob("*.png") if name == "inside_grok" else ():
        made, shown = (imread(directory / kept.name) for directory in (copy, NOTEBOOKS))
        assert made.shape == shown.shape and abs(made - shown).mean() < 0.01, kept.name


@pytest.mark.parametrize("name", CHECKS)
def test_the_notebook_is_kept_without_outputs(name: str) -> None:
    notebook = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None


def test_there_is_a_check_of_each_notebook() -> None:
    assert {path.stem for path in NOTEBOOKS.glob("*.ipynb")} == set(CHECKS)
