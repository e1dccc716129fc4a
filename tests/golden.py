"""The golden models, loaded by checkpoint.py onto any mesh, and their recorded outputs."""

import dataclasses
import functools
import json
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import reference
from grok1.parallel.sharding import make_mesh
from model import LanguageModelConfig
from paths import DATA
from runner import InferenceRunner, ModelRunner, read_model_config

DIRECTORY = DATA / "golden"
NAMES = ("three-layers", "twelve-layers")
MESHES = (None, (1, 8), (2, 4))
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Golden(NamedTuple):
    """The recorded outputs of a model.

    tokens int32 [3, 48]; exact: the logits, float64 [3, 48, V]; margin: the running minimum of the
    router's margin, float64 [3, 48]; real: bool [3, 48], False at pads, which are not compared.
    """

    tokens: np.ndarray
    exact: np.ndarray
    margin: np.ndarray
    real: np.ndarray
    greedy: list[dict[str, list[int]]]


@functools.cache
def recorded(name: str) -> Golden:
    """Read the recorded outputs of a model."""
    with np.load(DIRECTORY / name / "golden.npz") as file:
        arrays = dict(file)
    return Golden(
        arrays["tokens"],
        arrays["exact_logits"],
        np.minimum.accumulate(arrays["router_margin"], axis=1),
        arrays["tokens"] > 0,
        json.loads((DIRECTORY / name / "greedy.json").read_text()),
    )


@functools.cache
def reference_model(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a golden model's weights in float64, and the fields of its config.json."""
    fields = json.loads((DIRECTORY / name / "config.json").read_text())
    return reference.load_weights(DIRECTORY / name / "ckpt-0"), fields


def config(name: str, dtype: str) -> LanguageModelConfig:
    """Return a golden model's configuration with activations of `dtype`."""
    return dataclasses.replace(read_model_config(DIRECTORY / name), fprop_dtype=DTYPES[dtype])


@functools.cache
def runner(
    name: str,
    dtype: str = "float32",
    mesh: tuple[int, int] | None = None,
    slots: int = 6,
    kernel: bool = False,
    pad_sizes: tuple[int, ...] = (16, 48),
) -> InferenceRunner:
    """Return a runner of a golden model, shared by all tests that use the same one."""
    sizes, settings = mesh or (1, 1), config(name, dtype)
    server = InferenceRunner(
        name=name,
        runner=ModelRunner(
            settings, slots / (sizes[0] * sizes[1]), DIRECTORY / name, kernels=kernel
        ),
        load=None,
        tokenizer_path=None,
        local_mesh_config=sizes,
        pad_sizes=pad_sizes,
    )
    server.initialize()
    assert server.num_slots == slots
    return server


@functools.cache
def device_mesh(sizes: tuple[int, int] | None) -> Mesh | None:
    """Return the mesh, None for none."""
    return None if sizes is None else make_mesh(sizes)


def relative_error(got: Any, exact: np.ndarray) -> np.ndarray:
    """norm(got - exact) / norm(exact) over the last axis."""
    difference = np.asarray(got, np.float64) - exact
    return np.linalg.norm(difference, axis=-1) / np.linalg.norm(exact, axis=-1)
