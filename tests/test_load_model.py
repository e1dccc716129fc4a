"""What load_model finds where nothing is said, and that a loaded model stays what it is."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import model
import runner
from grok1 import default_files
from runner import load_model, load_server


@pytest.fixture(scope="module")
def loaded(tiny: pathlib.Path) -> runner.InferenceRunner:
    return load_model(tiny, pad_sizes=(16,))


def test_without_a_directory_it_is_that_of_the_command(
    tiny: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(default_files, "RELEASED", tmp_path)
    monkeypatch.setattr(default_files, "DEMO", tiny)
    assert load_model(pad_sizes=(16,)).name == str(tiny)
    monkeypatch.setattr(default_files, "RELEASED", tiny)
    monkeypatch.setattr(default_files, "DEMO", tmp_path)
    assert load_server(pad_sizes=(16,)).name == str(tiny)  # by its first name


def test_the_tokenizer_is_found_as_by_the_command(
    loaded: runner.InferenceRunner,
    tiny: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    assert loaded.generate("Once upon", max_len=3).text is not None
    monkeypatch.setattr(default_files, "TOKENIZER", tmp_path / "missing")
    without = load_model(tiny, pad_sizes=(16,))
    assert without.tokenizer is None and without.generate([5], max_len=3).text is None
    with pytest.raises(ValueError, match="a text prompt needs a tokenizer"):
        without.generate("Once upon")


def test_compiled_programs_are_kept_as_by_the_command(
    tiny: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "enable_compile_cache", lambda: "they cannot be kept")
    load_model(tiny, pad_sizes=(16,))
    assert caplog.messages == ["they cannot be kept"]
    load_model(tiny, pad_sizes=(16,), compile_cache=False)
    assert len(caplog.messages) == 1


class LastExperts(model.Router):
    """Chooses the least probable experts."""

    def choose(self, probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """As in Router, the other way round."""
        gates, index = jax.lax.top_k(-probs, self.num_selected_experts)
        return -gates, index.astype(jnp.int32)


def test_settings_of_an_execution_are_arguments(
    loaded: runner.InferenceRunner, tiny: pathlib.Path
) -> None:
    other = load_model(tiny, pad_sizes=(16,), expert_dispatch="static", scan_unroll=2)
    how = other.executions
    assert how is not None and how.prefill.kernels == how.decode.kernels == "plain"
    assert how.decode.expert_dispatch == "static" and how.decode.scan_unroll == 2
    np.testing.assert_allclose(other.logits([5, 6]), loaded.logits([5, 6]), atol=1e-4)
    turned = load_model(tiny, pad_sizes=(16,), router=LastExperts)
    captured = turned.inspect([5, 6, 7]).captured
    least = np.argsort(np.asarray(captured.router_probs), axis=-1)[..., :2]
    np.testing.assert_array_equal(captured.expert_index, least)
    assert turned.generate([5, 6, 7], max_len=4).token_ids


def test_an_unknown_argument_gets_the_nearest_name(tiny: pathlib.Path) -> None:
    with pytest.raises(TypeError, match="load_model has no argument 'contxt'; the .* is context"):
        load_model(tiny, contxt=5)
    with pytest.raises(TypeError, match="has no argument 'data_axis'"):
        load_model(tiny, data_axis="x")


@pytest.mark.parametrize("name", ["config", "params", "mesh", "executions", "tokenizer", "runner"])
def test_a_loaded_model_is_not_changed(loaded: runner.InferenceRunner, name: str) -> None:
    """A change of `config` reached `inspect` and not `generate`, without a word."""
    before = getattr(loaded, name)
    with pytest.raises(AttributeError, match=f"{name}: .* call load_model with other arguments"):
        setattr(loaded, name, None)
    with pytest.raises(AttributeError, match=f"{name}: expected no change to a loaded model"):
        delattr(loaded, name)
    assert getattr(loaded, name) is before
    loaded.statistics = runner.Statistics()  # takes effect
    with pytest.raises(
        ValueError, match=r"statistics: expected a Statistics\(\), which restarts the"
    ):
        loaded.statistics = 5  # type: ignore[assignment]
    loaded.note = "mine"  # type: ignore[attr-defined]
