"""Random arrays, a small checkpoint with each kind of parameter, and ways to damage its files."""

import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import checkpoint
import reference
from grok1.ops.quantization import QuantizedWeight4bit, QuantizedWeight8bit, dequantize
from model import LanguageModelConfig, TransformerConfig

LAYER = "transformer/decoder_layer/"
EMBED = "language_model/in_out_embed"

Damage = Callable[[pathlib.Path], Any]


def normal(*shape: int, seed: int = 0, dtype: Any = np.float32) -> np.ndarray:
    """Normally distributed numbers of this shape."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def random_weight(
    lead: tuple[int, ...], rows: int, columns: int, groups: int, seed: int = 0
) -> QuantizedWeight8bit:
    """A random int8 weight, with scales from 2^-9 to 2^-3."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (*lead, rows, columns)).astype(np.int8)
    scales = np.exp2(rng.uniform(-9, -3, (*lead, groups, columns))).astype(ml_dtypes.bfloat16)
    return QuantizedWeight8bit(weight, scales)


def exact_weight(weight: Any) -> np.ndarray:
    """The values of a weight in float64."""
    if isinstance(weight, QuantizedWeight4bit):
        return np.asarray(dequantize(weight)).astype(np.float64)
    if isinstance(weight, QuantizedWeight8bit):
        return reference.dequantize(np.asarray(weight.weight), np.asarray(weight.scales))
    return np.asarray(weight).astype(np.float64)


def exact_attention(query: Any, keys: Any, values: Any, mask: Any, multiplier: float) -> Any:
    """Grouped attention with a soft cap in float64, [B, T, K, G, H]; zero if no key is visible.

    query [B, T, K, G, H]; keys, values [B, S, K, H]; mask bool, broadcast to [B, T, S].
    """
    query, keys, values = (np.asarray(x, np.float64) for x in (query, keys, values))
    scores = np.einsum("btkgh,bskh->bkgts", query, keys) * multiplier
    weights = np.exp(30 * np.tanh(scores / 30)) * np.asarray(mask)[:, None, None]
    total = weights.sum(-1, keepdims=True)
    return np.einsum("bkgts,bskh->btkgh", weights / np.where(total > 0, total, 1), values)


def stacked(layers: int, *shape: int, groups: int = 0) -> Any:
    """Shapes of a stacked parameter: float32, or int8 with `groups` scale groups."""
    if not groups:
        return jax.ShapeDtypeStruct((layers, *shape), jnp.float32)
    scales = (layers, *shape[:-2], groups, shape[-1])
    return QuantizedWeight8bit(
        jax.ShapeDtypeStruct((layers, *shape), jnp.int8),
        jax.ShapeDtypeStruct(scales, jnp.bfloat16),
    )


def tiny_shapes(layers: int = 2) -> dict[str, dict[str, Any]]:
    """Shapes of a model with one parameter of each kind: eight files for two layers."""
    return {
        EMBED: {"embeddings": jax.ShapeDtypeStruct((16, 8), jnp.float32)},
        "language_model/rms_norm": {"scale": jax.ShapeDtypeStruct((8,), jnp.float32)},
        LAYER + "moe/linear_1": {"w": stacked(layers, 2, 16, 8, groups=8)},
        LAYER + "rms_norm": {"scale": stacked(layers, 8)},
        LAYER + "router": {"w": stacked(layers, 8, 2)},
    }


def random_params(shapes: Any, seed: int = 0) -> Any:
    """Numpy parameters with these shapes."""
    rng = np.random.default_rng(seed)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.asarray(rng.integers(-128, 128, size=shape.shape)).astype(shape.dtype)

    return jax.tree.map(draw, shapes)


def config_of(layers: int) -> LanguageModelConfig:
    """A configuration whose layers take 5 kB."""
    return LanguageModelConfig(
        vocab_size=32,
        sequence_len=8,
        model=TransformerConfig(
            emb_size=8,
            key_size=2,
            num_q_heads=8,
            num_kv_heads=8,
            num_layers=layers,
            num_experts=2,
            num_selected_experts=2,
        ),
    )


def save_layers(directory: pathlib.Path, layers: int, seed: int = 0) -> pathlib.Path:
    """Save random parameters of this configuration, and a file in place of the tokenizer."""
    config = config_of(layers)
    checkpoint.save(directory, random_params(config.param_shapes(), seed), config)
    (directory / "tokenizer.model").write_bytes(b"pieces")
    return directory


def contents(directory: pathlib.Path) -> dict[str, bytes]:
    """All files in a directory and below it, hidden ones too."""
    paths = [path for path in directory.rglob("*") if path.is_file()]
    return {os.fspath(path.relative_to(directory)): path.read_bytes() for path in paths}


def assert_same(got: Any, expected: Any) -> None:
    """Both trees have the same structure, and leaves equal in dtype, shape and every value."""
    paths = jax.tree_util.tree_leaves_with_path
    for (path, one), (other_path, other) in zip(paths(got), paths(expected), strict=True):
        assert path == other_path
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def edited(edit: Callable[[bytes], bytes]) -> Damage:
    """Change the bytes of a file."""

    def damage(path: pathlib.Path) -> None:
        good = path.read_bytes()
        path.write_bytes(edit(good))
        assert path.read_bytes() != good

    return damage


def replaced_by(make: Damage) -> Damage:
    """Replace a file by what `make` creates."""

    def damage(path: pathlib.Path) -> None:
        path.unlink()
        make(path)

    return damage


def refusal(directory: pathlib.Path, shapes: Any = None) -> str:
    """The message of the CheckpointError that loading raises before it takes device memory."""
    before = jax.live_arrays()  # Held, so that no array of another test is freed meanwhile.
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoint.load(directory, shapes or tiny_shapes())
    assert len(jax.live_arrays()) == len(before)
    message = str(caught.value)
    assert re.fullmatch(r"[^\n]+: expected [^\n]+, got [^\n]+; [^\n]+[^.\n]", message), message
    assert len(message) < 1000
    return message


def choices(tokens, experts, masked=0):
    """Gates and index [M, 2]: of the experts but the second; none for the last tokens."""
    rng = np.random.default_rng(5)
    index = np.stack([rng.permutation(np.delete(np.arange(experts), 1))[:2] for _ in range(tokens)])
    index[tokens - masked :] = experts
    return rng.uniform(0.1, 1, (tokens, 2)).astype(np.float32), index.astype(np.int32)


def dense_gates(gates, index, experts):
    """Return gates [M, E], zero where a token has not chosen an expert."""
    return np.sum(gates[..., None] * (index[..., None] == np.arange(experts)), axis=1)
