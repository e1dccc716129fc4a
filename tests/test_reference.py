"""The reference in float64 equals the recorded exact logits, so that it can judge the model."""

import io
import pathlib
import pickle

import jax
import numpy as np
import pytest

import baseline
import golden
import grok1.reference
import reference

name = pytest.mark.parametrize("name", golden.NAMES)


@name
def test_logits_and_router_margins_equal_recorded_ones(name: str) -> None:
    files, (weights, config) = golden.recorded(name), golden.reference_model(name)
    result = reference.run(weights, config, files.tokens)
    error = np.abs(result.logits - files.exact)[files.real]
    assert error.max() < 1e-11  # measured: 5e-14 and 1.3e-13
    assert result.router_probs is not None
    chosen = config["model"]["num_selected_experts"]
    margin = reference.router_margin(result.router_probs, chosen)
    with np.load(golden.DIRECTORY / name / "golden.npz") as file:
        assert np.abs(margin - file["router_margin"])[files.real].max() < 1e-13


def test_numeric_file_order_of_layers_changes_logits() -> None:
    """The agreement above must depend on the lexicographic order of the files."""
    files = golden.recorded("twelve-layers")
    weights, config = golden.reference_model("twelve-layers")
    stored_order = sorted(range(config["model"]["num_layers"]), key=str)
    layers = {name: array[stored_order] for name, array in weights["layers"].items()}
    logits = reference.forward({**weights, "layers": layers}, config, files.tokens)
    assert np.abs(logits - files.exact)[0].max() > 1


def test_pads_are_masked_in_one_pass_and_in_chunks() -> None:
    """A pad in one chunk must stay masked in later ones; a query that sees no key gets zero."""
    weights, config = golden.reference_model("three-layers")
    tokens = golden.recorded("three-layers").tokens.copy()
    tokens[0, 5:9] = tokens[1, :2] = config["pad_token"]
    whole = reference.run(weights, config, tokens)
    totals = whole.attention.sum(axis=-1)  # [L, B, N, T]
    np.testing.assert_array_equal(totals[:, 1, :, :2], 0)
    np.testing.assert_allclose(totals[:, 1, :, 2:], 1)
    np.testing.assert_array_equal(whole.attention[:, 0, ..., 5:9], 0)
    memory, chunks = None, []
    for chunk in np.split(tokens, [16, 32], axis=1):
        result = reference.run(weights, config, chunk, memory)
        memory = result.memory
        chunks.append(result.logits)
    np.testing.assert_allclose(np.concatenate(chunks, axis=1), whole.logits, atol=1e-11)


def test_dense_block_equals_a_mixture_of_equal_experts() -> None:
    """With equal experts and a router of zeros, two gates of 1/2 add up to the expert itself."""
    weights, config = golden.reference_model("three-layers")
    mixed = dict(weights["layers"])
    dense = {name: array for name, array in mixed.items() if not name.startswith("moe/")}
    del dense["router"]
    for name in ("linear", "linear_v", "linear_1"):
        first = mixed[f"moe/{name}"][:, 0]
        mixed[f"moe/{name}"] = np.stack([first, first], axis=1)
        dense[name] = first
    mixed["router"] = np.zeros_like(mixed["router"][..., :2])

    def logits(layers: dict[str, np.ndarray], num_experts: int) -> np.ndarray:
        changed = {**config, "model": {**config["model"], "num_experts": num_experts}}
        tokens = golden.recorded("three-layers").tokens[:1, :8]
        return reference.forward({**weights, "layers": layers}, changed, tokens)

    np.testing.assert_allclose(logits(dense, 1), logits(mixed, 2), atol=1e-11)


def test_file_with_unexpected_global_is_not_loaded(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "tensor00000_000"
    path.write_bytes(pickle.dumps(io.BytesIO))
    with pytest.raises(pickle.UnpicklingError, match="BytesIO"):
        reference.load_tensor(path)


def test_the_baseline_computes_exact_logits() -> None:
    """With int8 weights in float32, as in the benchmark; other tests use it in float64."""
    recorded, server = golden.recorded("three-layers"), golden.runner("three-layers")
    tokens = recorded.tokens
    cache = grok1.reference.empty_cache(server.config, len(tokens), tokens.shape[1])
    weights = grok1.reference.weights_of(server.params)
    read = jax.jit(grok1.reference.forward, static_argnums=1)
    logits, _ = read(weights, server.config, tokens, cache)
    clear = (recorded.margin > 1e-4) & recorded.real
    assert golden.relative_error(logits, recorded.exact)[clear].max() < 1e-5
    form = baseline.Baseline(server.config, server.params)
    state = form.ready([tokens[0, :20], tokens[1, :20]])
    assert state.cache.filled.tolist() == [20, 20] and form.filled(form.draw(state)) == 21
    assert form.compile_s.keys() == {"prefill 20", "decode 2"}
