"""load_model: its defaults and arguments, and that a loaded model cannot be changed."""

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


def test_default_directory_is_the_released_one_or_demo(
    tiny: pathlib.Path, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(default_files, "RELEASED", tmp_path)
    monkeypatch.setattr(default_files, "DEMO", tiny)
    assert load_model(pad_sizes=(16,)).name == str(tiny)
    monkeypatch.setattr(default_files, "RELEASED", tiny)
    monkeypatch.setattr(default_files, "DEMO", tmp_path)
    assert load_server(pad_sizes=(16,)).name == str(tiny)  # the older name of load_model


def test_the_default_tokenizer_is_that_of_the_demo(
    loaded: runner.InferenceRunner,
    tiny: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: pathlib.Path,
) -> None:
    assert loaded.tokenizer is not None
    monkeypatch.setattr(default_files, "TOKENIZER", tmp_path / "missing")
    assert load_model(tiny, pad_sizes=(16,)).tokenizer is None


def test_a_compile_cache_that_cannot_be_used_is_logged(
    tiny: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(runner, "enable_compile_cache", lambda: "they cannot be kept")
    load_model(tiny, pad_sizes=(16,))
    assert caplog.messages == ["they cannot be kept"]
    load_model(tiny, pad_sizes=(16,), compile_cache=False)
    assert len(caplog.messages) == 1


def test_compiled_kernels_are_used_unless_turned_off(
    loaded: runner.InferenceRunner, tiny: pathlib.Path
) -> None:
    assert loaded.executions is not None
    assert {how.kernels for how in loaded.executions} == {"cpu"}
    plain = load_model(tiny, pad_sizes=(16,), kernels=False).executions
    assert plain is not None and {how.kernels for how in plain} == {"xla_cpu"}


def test_a_context_has_1_token_to_the_models(tiny: pathlib.Path) -> None:
    assert load_model(tiny, pad_sizes=(16,), context=32).config.sequence_len == 32
    config = model.grok_1()
    for length in (1, 8192):
        assert runner.with_settings(config, "bfloat16", length).sequence_len == length
    for length in (0, 8193, 5.5):
        with pytest.raises(ValueError, match=f"context: expected 1 to 8192 tokens, .* {length}$"):
            runner.with_settings(config, "bfloat16", length)  # type: ignore[arg-type]


class LastExperts(model.Router):
    """Chooses the least probable experts."""

    def choose(self, probs: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Return their gates and indices."""
        gates, index = jax.lax.top_k(-probs, self.num_selected_experts)
        return -gates, index.astype(jnp.int32)


def test_settings_are_fields_of_both_executions(tiny: pathlib.Path) -> None:
    settings = {"expert_dispatch": "static", "scan_unroll": 2, "router": LastExperts}
    turned = load_model(tiny, pad_sizes=(16,), **settings)
    assert turned.executions is not None
    for how in turned.executions:
        assert how.kernels == "plain"
        assert {name: getattr(how, name) for name in settings} == settings
    captured = turned.inspect([5, 6, 7]).captured
    least = np.argsort(np.asarray(captured.router_probs), axis=-1)[..., :2]
    np.testing.assert_array_equal(captured.expert_index, least)


def test_an_unknown_argument_gets_the_nearest_name(tiny: pathlib.Path) -> None:
    with pytest.raises(TypeError, match="load_model has no argument 'contxt'; the .* is context"):
        load_model(tiny, contxt=5)
    with pytest.raises(TypeError, match="has no argument 'data_axis'"):
        load_model(tiny, data_axis="x")


def test_attributes_of_a_loaded_model_cannot_be_set(loaded: runner.InferenceRunner) -> None:
    """A change of `config` would reach `inspect` but not `generate`."""
    for name in ("config", "params", "mesh", "executions", "tokenizer", "runner"):
        before = getattr(loaded, name)
        with pytest.raises(AttributeError, match=f"{name}: .* call load_model with other argument"):
            setattr(loaded, name, None)
        with pytest.raises(AttributeError, match=f"{name}: expected no change to a loaded model"):
            delattr(loaded, name)
        assert getattr(loaded, name) is before
    loaded.note = "mine"  # type: ignore[attr-defined]


def test_statistics_can_be_replaced_by_new_ones(loaded: runner.InferenceRunner) -> None:
    loaded.statistics = runner.Statistics()
    with pytest.raises(ValueError, match=r"statistics: expected a Statistics\(\), which restarts"):
        loaded.statistics = 5  # type: ignore[assignment]
