"""Run one prompt and capture its activations; see grok1/inspection.py."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from grok1.checks import is_integer, require
from grok1.inspection import (
    CAPTURE_SITES,
    HEAD_SITES,
    Captured,
    captured_shapes,
    check_capture,
    check_layers,
    nbytes,
)
from grok1.interrupts import uninterrupted
from grok1.parallel.sharding import all_model_axes, axis_size
from grok1.serving.hooked import with_hooks
from grok1.serving.memory_budget import free_memory, local_device
from grok1.serving.scoring import check_length
from grok1.serving.steps import LoadedModel, inspect_step

NOT_BY_POSITION = "embeddings", "attention_weights"  # their second axis is not the position


class Inspection(NamedTuple):
    """The result of `InferenceRunner.inspect` for one prompt.

    token_ids: int32 [T]. pieces: the text of each token; None without a tokenizer. logits: float32
    [T, V], after each token. captured: NumPy arrays as in `inspection.Captured`, without axis B.
    """

    token_ids: np.ndarray
    pieces: list[str] | None
    logits: np.ndarray
    captured: Captured


def inspect(
    model: LoadedModel,
    ids: list[int],
    capture: Collection[str],
    capture_layers: Sequence[int] | None,
) -> Inspection:
    """Run one prompt of these token ids and return an Inspection without `pieces`.

    Arguments and errors are those of `InferenceRunner.inspect`.
    """
    config, length = model.config, len(ids)
    if not ids:
        raise ValueError("the prompt has no tokens; give at least one")
    check_length(config, length)
    capture, layers = check_capture(capture, config.model), None
    if capture_layers is not None:
        layers = check_layers(capture_layers, config.model.num_layers)
    if not model.hooks:
        # Round the length up, since each length compiles. No token attends to the padding at the
        # end. With hooks, every call compiles anyway, and they would see the padding.
        fine = 1 << max(4, min(7, (len(ids) - 1).bit_length()))
        length = min(-(-len(ids) // fine) * fine, config.sequence_len)
    _check_room(model, capture, layers, length)
    tokens = np.full([_rows(model), length], config.pad_token, np.int32)
    tokens[:, : len(ids)] = ids
    with uninterrupted():  # jax and haiku cannot handle an exception while tracing
        logits, captured = with_hooks(inspect_step, model.hooks)(
            model.params, tokens, config=config, execution=model.executions.prefill,
            capture=capture, capture_layers=layers, hook_args=model.hook_args,
        )  # fmt: skip
    found = {site: _first_row(site, x, len(ids)) for site, x in captured._asdict().items()}
    return Inspection(
        np.array(ids, np.int32), None, np.asarray(logits[0, : len(ids)]), Captured(**found)
    )


def patch(
    model: LoadedModel,
    ids: list[int],
    source: list[int],
    metric: Callable[[np.ndarray], float],
    site: str,
    layers: Sequence[int] | None,
    positions: Sequence[int] | None,
) -> np.ndarray:
    """Run activation patching, one layer and position at a time; see `InferenceRunner.patch`."""
    config = model.config.model
    sites = tuple(s for s in CAPTURE_SITES if s not in NOT_BY_POSITION)
    require(site in sites, "site", f"one of {sites}", site)
    count = config.num_layers
    layers = check_layers(range(count) if layers is None else layers, count, "layers")
    same = len(ids) == len(source)
    require(same, "source", f"as many tokens as the prompt, {len(ids)}", len(source))
    places = range(len(ids)) if positions is None else positions
    inside = isinstance(places, Sequence) and all(
        is_integer(place) and -len(ids) <= place < len(ids) for place in places
    )
    require(inside, "positions", f"integers from {-len(ids)} to {len(ids) - 1}", positions)
    values = getattr(inspect(model, source, (site,), layers).captured, site)
    found = np.zeros([len(layers), len(places)], np.float32)
    for row, layer in enumerate(layers):
        for column, place in enumerate(places):
            where = np.int32(layer), np.int32(place % len(ids)), values[row]
            run = inspect(model.hooked({site: _take}, where), ids, (), None)
            value = metric(run.logits)
            require(np.size(value) == 1, "metric", "one number of the logits", np.shape(value))
            found[row, column] = np.reshape(value, ())
    return found


def _take(
    layer: jax.Array, array: jax.Array, only: jax.Array, place: jax.Array, values: jax.Array
) -> jax.Array:
    """Put values [T, ...] in an array [B, T, ...] at one position of one layer."""
    here = (layer == only) & (jnp.arange(array.shape[1]) == place)
    return jnp.where(here.reshape(-1, *(1,) * (array.ndim - 2)), values, array)


def _rows(model: LoadedModel) -> int:
    """Return the smallest batch that the mesh can run."""
    return axis_size(model.mesh, model.config.model.data_axis)


def _check_room(
    model: LoadedModel, capture: Collection[str], layers: Sequence[int] | None, length: int
) -> None:
    """Raise ValueError if captured arrays exceed the free memory of a device or of this host."""
    config, mesh = model.config, model.mesh
    device = local_device(mesh)
    free = free_memory(device)
    shapes = captured_shapes(
        config.model, capture, batch=1, steps=length, positions=length,
        layers=None if layers is None else len(layers),
    )  # fmt: skip
    logits = {"logits": (1, length, config.vocab_size)}
    needed = nbytes(shapes | logits) * _rows(model)
    if device.platform != "cpu":
        # Each device holds the arrays of its sequence; per-head arrays are split over the heads.
        whole = {site: shape for site, shape in shapes.items() if site not in HEAD_SITES}
        heads = nbytes({site: shapes[site] for site in shapes if site in HEAD_SITES})
        needed = nbytes(whole | logits)
        needed += heads // axis_size(mesh, all_model_axes(mesh, config.model.model_axis))
    if free is not None and needed > free:
        raise ValueError(
            f"capturing {length} positions takes {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free; capture fewer sites, fewer layers with "
            "capture_layers=, or use a shorter prompt"
        )


def _first_row(site: str, array: jax.Array | None, length: int) -> np.ndarray | None:
    """Return the array of a site for the first sequence, cut to `length`, without the axis B."""
    if array is None:
        return None
    if site == "embeddings":
        return np.asarray(array[0, :length])
    if site == "attention_weights":
        return np.asarray(array[:, 0, :, :length, :length])
    return np.asarray(array[:, 0, :length])
