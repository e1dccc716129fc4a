"""Load, save and check a checkpoint; its files are read shard by shard.

The parameters are `{module: {param: leaf}}`; every leaf of a module under
`transformer/decoder_layer/` is stacked, with a leading layer axis [L, ...]. grok1/formats/layout.py
defines the files and their order; this module reads and writes the arrays in them. A checkpoint has
one of three forms, see grok1/formats/forms.py; all are loaded the same way, except that a CPU uses
the files of the mapped form in place.

python checkpoint.py --help says how to convert one form into the other, and how to verify them.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

if __name__ == "__main__":
    from grok1.cli.startup import check_surroundings

    try:
        check_surroundings(Path(__file__).resolve().parent)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        # jax takes a second to import: Ctrl-C ends it without a traceback.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from grok1 import backend
from grok1.checks import require
from grok1.cli.console import (
    ByteProgress,
    Parser,
    Worker,
    end_at_next_interrupt,
    given_path,
    limit_reached,
    number,
    open_standard_streams,
    run_command,
    say,
    write_out,
)
from grok1.formats import (
    atomic,
    conversion,
    forms,
    layout,
    loading,
    mapped,
    pickle_file,
    safetensors,
)
from grok1.formats.forms import CheckpointError, Directory, TensorFile
from grok1.formats.layout import STACKED, LeafTree, files, read_config
from grok1.formats.loading import Progress
from grok1.formats.pickle_file import Array, Leaf, StoredLeaf
from grok1.ops.quantization import Params, QuantizedWeight, QuantizedWeight8bit, Shapes
from grok1.ops.quantize_4bit import GROUP
from grok1.ops.rounded_table import RoundedTable
from grok1.parallel.sharding import Shardings
from grok1.strict_json import Json, read_json
from model import LanguageModelConfig, grok_1

Item = TypeVar("Item")

__all__ = [
    "CheckpointError",
    "check_config",
    "check_files",
    "config_in",
    "convert",
    "files",
    "load",
    "read_config",
    "read_model_config",
    "rounded_table",
    "save",
    "shapes_in",
    "used_in_place",
    "verify",
    "write",
]


def read_model_config(directory: Directory) -> LanguageModelConfig:
    """Return the configuration in DIR/config.json; without one, Grok-1's own.

    Raises ValueError if DIR holds no complete checkpoint or config.json is not a configuration.
    """
    forms.require_form(directory, "name the right one, or download the checkpoint into it")
    return config_in(directory)


def config_in(directory: Directory) -> LanguageModelConfig:
    """Return the configuration in DIR/config.json; without one, Grok-1's own. Raises ValueError."""
    fields = read_config(directory)
    if fields is None:
        return grok_1()
    try:
        return LanguageModelConfig.from_dict(fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{os.path.join(directory, 'config.json')}: {error}") from error


def check_config(directory: Directory, config: LanguageModelConfig) -> None:
    """Raise CheckpointError unless DIR still has this configuration."""
    if read_model_config(directory) != config:
        where = os.path.join(directory, "config.json")
        got, remedy = "another one", "load it again when nothing writes to it"
        raise forms.error(where, "the configuration from before the weights were read", got, remedy)


def shapes_in(directory: Directory, config: LanguageModelConfig) -> Shapes:
    """Return the parameter shapes of a model, with the dtypes that are stored in DIR.

    The weights are int8 with scales, as released, or floats; embedding, norms and router are
    floats.
    """
    return layout.shapes_in(directory, config.param_shapes())


def check_files(directory: Directory, shapes: Shapes) -> list[StoredLeaf]:
    """Check the names, sizes and headers of all files of DIR; puts nothing on a device.

    shapes: what the files must hold, as in `files`. If DIR has both forms, DIR/ckpt-0 is used.

    Returns where the arrays of each parameter are stored, in the order of `files`. Raises
    CheckpointError.
    """
    return layout.check_files(directory, files(shapes))


def load(
    directory: Directory,
    shapes: Shapes,
    shardings: Shardings | None = None,
    dtypes: Mapping[str, DTypeLike] | None = None,
    progress: Progress | None = None,
) -> Params:
    """Load the checkpoint in DIR onto devices, each of which gets only its own slices.

    All names, sizes and headers are checked before anything is put on a device. Stacked parameters
    are allocated once and filled in place, so that little data is held in addition to the
    parameters, on the host and on the devices (see loading.py), and never an entire file. One CPU
    uses the files of the mapped form in place, without reading or checking their values.

    shapes: what the files must hold, as in `files`.
    shardings: a jax.sharding.Sharding for each array of `shapes`, in the same structure, that does
        not split the layer axis. None: everything on the default device.
    dtypes: {"module/param": dtype}: float parameters to cast on the way to the device.
    progress: called as progress(bytes_done, bytes_total), of the bytes that this process reads.

    Returns {module: {param: leaf}} of jax.Array, structured like `shapes`.
    Raises CheckpointError if the files do not match `shapes` or hold non-finite values, and
    ValueError if the other arguments do not fit `shapes`.
    """
    records = files(shapes)
    wanted = _cast(shapes, dtypes or {})
    if shardings is not None:
        jax.tree_util.tree_map_with_path(_check_sharding, wanted, shardings)
    headers = layout.check_files(directory, records)
    if shardings is None:
        default = jnp.zeros(()).sharding
        shardings = jax.tree.map(lambda _: default, shapes)

    sources = [
        loading.Source((record.module, record.param, i), record.layer, located, name)
        for record, header in zip(records, headers, strict=True)
        for i, (name, located) in enumerate(safetensors.tensors(record, header).items())
    ]
    by_key, places = _by_key(wanted), _by_key(shardings)
    arrays = {}
    if forms.form(directory) == forms.MAPPED:
        arrays = mapped.map_arrays(sources, by_key, places, _share_of_experts(directory))
    sources = [source for source in sources if source.array not in arrays]
    by_key = {key: array for key, array in by_key.items() if key not in arrays}
    arrays |= loading.fill_arrays(sources, by_key, places, progress)
    return {
        module: {
            param: jax.tree.unflatten(
                jax.tree.structure(leaf),
                [arrays[module, param, i] for i in range(len(jax.tree.leaves(leaf)))],
            )
            for param, leaf in leaves.items()
        }
        for module, leaves in wanted.items()
    }


def _share_of_experts(directory: Directory) -> float:
    """Return which share of the experts a token uses, 1 if config.json does not say it."""
    if not (read_config(directory) or {}).get("model"):
        return 1.0
    model = config_in(directory).model
    return model.num_selected_experts / model.num_experts


def used_in_place(directory: Directory | None) -> bool:
    """Return whether one CPU uses the files of DIR as its memory."""
    mapped_files = directory is not None and forms.form(directory) == forms.MAPPED
    return mapped_files and backend.on_cpu()


def rounded_table(directory: Directory, config: LanguageModelConfig) -> RoundedTable | None:
    """Return the rounded embedding table in DIR, used in place, or None if it has none.

    Raises CheckpointError.
    """
    if forms.form(directory) != forms.MAPPED:
        return None
    located = mapped.rounded_table(directory, files(shapes_in(directory, config)))
    arrays = {
        name.rpartition("/")[2]: jax.device_put(mapped.map_values(array, name))
        for name, array in located.items()
    }
    return RoundedTable(**arrays) if arrays else None


def _by_key(
    tree: Mapping[str, Mapping[str, Item | QuantizedWeight]],
) -> dict[loading.Key, Item]:
    """Return the arrays of a parameter tree by module, parameter, and index in the leaf."""
    return {
        (module, param, i): array
        for module, leaves in tree.items()
        for param, leaf in leaves.items()
        for i, array in enumerate(jax.tree.leaves(leaf))
    }


def _cast(shapes: Shapes, dtypes: Mapping[str, DTypeLike]) -> Shapes:
    """Return `shapes` with the dtypes of the loaded parameters."""
    wanted = {module: dict(leaves) for module, leaves in shapes.items()}
    for name, dtype in dtypes.items():
        module, _, param = name.rpartition("/")
        leaf = wanted.get(module, {}).get(param)
        if leaf is None or isinstance(leaf, QuantizedWeight):
            raise ValueError(f"dtypes: expected names of float parameters, got {name!r}")
        wanted[module][param] = jax.ShapeDtypeStruct(leaf.shape, dtype)
    return wanted


def _check_sharding(
    path: tuple[jax.tree_util.DictKey, ...],
    array: jax.ShapeDtypeStruct,
    sharding: jax.sharding.Sharding,
) -> None:
    """Raise ValueError if a sharding does not fit an array, or splits the layer axis."""
    shard = sharding.shard_shape(array.shape)
    if path[0].key.startswith(STACKED) and shard[0] != array.shape[0]:
        raise ValueError(
            f"{path[0].key}: expected a sharding that leaves all {array.shape[0]} layers on each "
            f"device, got one that leaves {shard[0]}"
        )


@jax.jit
def _get_layer(stack: jax.Array, index: jax.Array) -> jax.Array:
    """Return layer `index` [...] of [L, ...]; one compiled program serves all layers."""
    return lax.dynamic_index_in_dim(stack, index, axis=0, keepdims=False)


def save(
    directory: Directory,
    params: LeafTree,
    config: LanguageModelConfig | Mapping[str, Json] | None = None,
) -> None:
    """Write the parameters of a model as DIR/ckpt-0, and its configuration as DIR/config.json.

    An existing checkpoint is replaced. params: int8 with scales, or floats of 16 or 32 bits; `load`
    and `load_model` read all of these. config: the model's, or its fields; None: Grok-1's, without
    a config.json, as in the released form.

    Raises ValueError if the parameters do not match the configuration, otherwise as `write`.
    """
    if isinstance(config, LanguageModelConfig):
        config = config.to_dict()
    known = config is None or isinstance(config, Mapping)
    require(known, "config", "a LanguageModelConfig, its fields, or None", config)
    _check_types(params)
    model = grok_1() if config is None else LanguageModelConfig.from_dict(dict(config))
    wanted, given = _shapes_of(model.param_shapes()), _shapes_of(params)
    for name in sorted(wanted.keys() | given.keys()):
        if (expected := wanted.get(name)) != (got := given.get(name)):
            needed = "give the configuration that belongs to the parameters"
            if config is None:
                needed += ", as save(directory, params, config): without one they are Grok-1's"
            raise ValueError(
                f"{name}: expected {expected or 'none'}, got {got or 'none'}; {needed}"
            )
    write(directory, params, config)


def _check_types(params: LeafTree) -> None:
    """Raise ValueError unless `load` can read the leaves of a parameter tree."""
    tree = "a dict {module: {param: array}}"
    require(isinstance(params, Mapping), "params", tree, params)
    for module, leaves in params.items():
        require(isinstance(leaves, Mapping), f"params[{module!r}]", tree, leaves)
        for name, leaf in leaves.items():
            dtype = str(getattr(leaf, "dtype", None))
            right = isinstance(leaf, QuantizedWeight8bit) or dtype in layout.FLOATS
            what = f"int8 with scales, or an array of {', '.join(layout.FLOATS)}"
            require(right, f"{module}/{name}", what, type(leaf) if dtype == "None" else dtype)


def _shapes_of(params: LeafTree) -> dict[str, list[int]]:
    return {
        f"{module}/{name}": list(leaf.shape)
        for module, leaves in params.items()
        for name, leaf in leaves.items()
    }


def write(directory: Directory, params: LeafTree, config: Mapping[str, Json] | None = None) -> None:
    """Write a parameter tree in the released layout, and `config` as DIR/config.json.

    params: {module: {param: leaf}} of jax or numpy arrays, structured as in `files`; fetched one
        layer at a time. Float parameters keep their dtype.

    Each file is written under another name and then renamed, so it is never incomplete. Once one
    file has been replaced, DIR is not a valid checkpoint until saving finishes. DIR may be a link
    to a directory; a link inside it, at a path to be written, raises OSError. Raises
    CheckpointError if DIR holds tensor files that this would not replace, or if another save or
    conversion writes there or was interrupted; ValueError if the layout does not support the
    parameters; OSError if writing fails.
    """
    records = files(jax.tree.map(_native, params))
    if not records:
        raise ValueError("params: expected parameters to save, got none")
    text = None if config is None else json.dumps(config, indent=2).encode()
    folder, config_path = (os.path.join(directory, name) for name in (forms.FOLDER, "config.json"))
    os.makedirs(directory, exist_ok=True)
    with forms.only_writer(directory):
        if config is not None:
            _check_config_file(directory, config)
        _check_place(directory, records)
        with _marked(directory, os.path.join(folder, records[0].file)):
            for record in records:
                arrays = _fetch(record, params[record.module][record.param])
                path = os.path.join(folder, record.file)
                atomic.write(path, pickle_file.contents(record.leaf, arrays))
            if text is not None:
                atomic.write(config_path, [text])


def _check_place(directory: Directory, records: Sequence[TensorFile]) -> None:
    """Make DIR/ckpt-0; raise CheckpointError or OSError if the files cannot be written there."""
    folder, config_path = (os.path.join(directory, name) for name in (forms.FOLDER, "config.json"))
    if os.path.lexists(os.path.join(directory, forms.WORK)):
        remedy = "start the conversion again, or save to another directory"
        raise forms.error(str(directory), "no conversion", "an unfinished one", remedy)
    for name in forms.INDEXES.values():
        if os.path.lexists(index := os.path.join(directory, name)):
            expected, got = "no checkpoint in another form", "one that would be left over"
            raise forms.error(index, expected, got, "remove it, or save to another directory")
    atomic.make_folder(folder)
    for path in (*(os.path.join(folder, record.file) for record in records), config_path):
        atomic.require_plain(path)
    stale = sorted(layout.tensor_names(folder) - {record.file for record in records})
    if stale:
        raise forms.error(
            os.path.join(folder, stale[0]),
            f"only tensor files that the {len(records)} new ones replace",
            f"{len(stale)} that would be left over",
            "remove them, or save to another directory",
        )


def _check_config_file(directory: Directory, config: Mapping[str, Json]) -> None:
    """Raise CheckpointError if another program's config.json would be replaced."""
    path = os.path.join(directory, "config.json")
    atomic.require_plain(path)
    folder = os.path.join(directory, forms.FOLDER)
    marked = os.path.lexists(os.path.join(directory, forms.SAVING))
    ours = marked or (os.path.isdir(folder) and layout.tensor_names(folder))
    if ours or not os.path.lexists(path):
        return
    with contextlib.suppress(ValueError), atomic.open_regular(path) as file:
        if read_json(file.read(forms.MAX_TOKENIZER_BYTES)) == json.loads(json.dumps(config)):
            return
    remedy = "move it to another place, or save to another directory"
    raise forms.error(path, "no file, or that of a checkpoint", "another program's", remedy)


@contextlib.contextmanager
def _marked(directory: Directory, first: str) -> Iterator[None]:
    """Mark DIR as incomplete while the block replaces its files, starting with `first`.

    If the block fails, the mark stays unless DIR was complete before and is unchanged.
    """
    marker = os.path.join(directory, forms.SAVING)
    whole = os.path.lexists(first) and not os.path.lexists(marker)
    before = atomic.stamp(first) if whole else None
    atomic.write(marker, [])
    try:
        yield
    except BaseException:
        if before is not None and atomic.stamp(first) == before:
            atomic.remove(marker)
        raise
    atomic.remove(marker)


def _native(array: Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, np.dtype(array.dtype).newbyteorder("="))


def _fetch(record: TensorFile, leaf: Leaf) -> Iterator[jax.Array | np.ndarray]:
    """Yield the arrays of one file, each fetched on demand."""
    for array in jax.tree.leaves(leaf):
        if record.layer is not None:
            on_device = isinstance(array, jax.Array)
            array = _get_layer(array, record.layer) if on_device else array[record.layer]
        yield array


def convert(
    source: Directory,
    target: Directory,
    form: str,
    progress: Progress | None = None,
    *,
    overwrite: bool = False,
    group: int | None = None,
) -> conversion.Job:
    """Write the checkpoint in `source` to `target` in another form: one of `forms.FORMS`.

    group: round the experts to 4 bits, with a scale for so many rows of a column.
    See `conversion.convert`; the files are those of the model in config.json, or else of Grok-1.
    """
    require(form in forms.FORMS, "form", f"one of {forms.FORMS}", form)
    rounds = group is None or form != forms.RELEASED
    wanted = f"{forms.SAFETENSORS} or {forms.MAPPED}, which can hold experts of 4 bits"
    require(rounds, "form", wanted, form)
    shapes = shapes_in(source, read_model_config(source))
    return conversion.convert(
        source, target, form, shapes, progress, overwrite=overwrite, group=group
    )


def verify(directory: Directory, progress: Progress | None = None) -> tuple[str, list[str]]:
    """Check a checkpoint's headers, that its floats are finite and, if present, its checksums.

    See `conversion.verify`; the files are those of the model in config.json, or else of Grok-1.
    """
    shapes = shapes_in(directory, read_model_config(directory))
    return conversion.verify(directory, shapes, progress)


# ---------------------------------------------------------------------------------------- the shell


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with status 2 and one sentence if it is invalid."""
    parser = Parser(
        prog="checkpoint.py",
        description="Convert a checkpoint between its forms, and verify its files.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="convert|verify")
    text = "write a checkpoint in another form; if interrupted, run the same command to resume"
    command = commands.add_parser("convert", help=text, description=text, allow_abbrev=False)
    add = command.add_argument
    add("source", type=given_path, metavar="SRC", help="directory that holds the checkpoint")
    add("target", type=given_path, metavar="DST", help="directory to write to; created if needed")
    add(
        "--to",
        choices=(forms.SAFETENSORS, forms.MAPPED, forms.RELEASED),
        required=True,
        help="one safetensors file per layer with checksums; files that a CPU uses in place, as "
        "its memory; or Grok-1's own ckpt-0",
    )
    text = "round the experts to 4 bits (not with --to released), which halves the checkpoint; or "
    add("--experts", choices=("int4", "int8"), help=f"{text}require that they are int8")
    text = f"rows of a column that share a scale, with --experts int4 ({GROUP})"
    add("--group", type=number(int, 2, 1 << 20), metavar="ROWS", help=text)
    add("--overwrite", action="store_true", help="replace an existing checkpoint in DST")
    text = "check all headers, float values and, for safetensors, the checksum of every tensor"
    command = commands.add_parser("verify", help=text, description=text, allow_abbrev=False)
    add = command.add_argument
    add("directory", type=given_path, metavar="DIR", help="directory that holds the checkpoint")
    options = parser.parse_args(arguments)
    if options.command == "convert":
        if options.experts == "int4" and options.to == forms.RELEASED:
            wanted = f"--to {forms.SAFETENSORS} or {forms.MAPPED}"
            parser.error(f"--experts: expected {wanted}, got --to {options.to}")
        if options.group is not None and options.experts != "int4":
            parser.error("--group: expected together with --experts int4, got none")
    return options


def _require_int8(directory: Directory) -> None:
    """Raise CheckpointError unless the experts of DIR are int8."""
    for module, leaves in shapes_in(directory, read_model_config(directory)).items():
        right = all(isinstance(leaf, QuantizedWeight8bit) for leaf in leaves.values())
        if mapped.EXPERTS in f"{module}/" and not right:
            remedy = "leave out --experts, or name the checkpoint that has them"
            raise forms.error(str(directory), "experts of int8", "experts of another type", remedy)


def _run(options: argparse.Namespace, progress: ByteProgress) -> int:
    """Carry out the command and return the exit status."""
    if options.command == "verify":
        with progress:
            summary, problems = verify(options.directory, progress)
        for problem in problems:
            say(f"error: {problem}")
        write_out(summary)
        return 1 if problems else 0
    group = None
    if options.experts == "int4":
        group = GROUP if options.group is None else options.group
    elif options.experts == "int8":
        _require_int8(options.source)
    if options.experts or options.to == forms.MAPPED:
        jax.config.update("jax_platforms", "cpu")  # a GPU's memory may be in use
    how = {"progress": progress, "overwrite": options.overwrite, "group": group}
    with progress:
        job = convert(options.source, options.target, options.to, **how)
    written = sum(output.nbytes for output in job.outputs)
    count = sum(len(output.files) for output in job.outputs)
    write_out(f"{job.target}: {count} files with {written:,} bytes of tensors")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit status."""
    open_standard_streams()
    worker = Worker()
    progress = ByteProgress("checkpoint")
    try:
        options = parse_arguments(arguments)
        return worker.call(_run, options, progress)
    except KeyboardInterrupt:
        end_at_next_interrupt()
        progress.close()
        say("interrupted; run the same command to resume")
        os._exit(130)  # sys.exit would wait for the worker
    except BrokenPipeError:
        os._exit(141)  # the reader has closed the pipe
    except (ValueError, OSError) as problem:
        say(f"error: {problem}")
        return 1
    except (MemoryError, RuntimeError) as problem:
        if (sentence := limit_reached(problem)) is None:
            raise
        say(f"error: {sentence}")
        return 1
    except ModuleNotFoundError as problem:
        say(f"error: {problem.name} is not installed; run: pip install -r requirements.txt")
        return 1


if __name__ == "__main__":
    run_command(main)
