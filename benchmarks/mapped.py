"""Measure a checkpoint that is larger than memory, whose files are used in place.

python benchmarks/mapped.py --folder DIR --memory 8GiB

Writes a random checkpoint of full-width Grok-1 layers in the mapped form to DIR, and keeps it.
Then, with a memory limit and nothing of the files in memory: reads one of them in order, for the
disk's rate, and draws tokens. Ends with status 1 if decoding reads at less than 75 % of that rate,
or more than 1.1 times the bytes that a token touches. The limit is that of a memory control group
of Linux, which only root can make; without it, the checkpoint should be larger than the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402  (what follows is found by the line above)

from grok1.cli.console import Parser, byte_size, number, say  # noqa: E402

if TYPE_CHECKING:
    from model import LanguageModelConfig

LEAST_RATE, MOST_BYTES = 0.75, 1.1
PIECE = 64 << 20
SEQUENTIAL = 4 << 30  # bytes that are read in order, at most
PROMPT = [1, 2, 3, 4]
GROUPS = Path("/sys/fs/cgroup")
MOE = "/moe/"


# ------------------------------------------------------------------------------ a random checkpoint


def full_width(layers: int) -> LanguageModelConfig:
    """Return Grok-1 with fewer layers."""
    from model import grok_1

    config = grok_1()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=layers))


def write_checkpoint(directory: Path, config: LanguageModelConfig, experts: str) -> None:
    """Write random parameters of a model, unless they are there."""
    import checkpoint
    from grok1.formats import atomic, forms, layout, mapped, safetensors
    from grok1.parameters import shapes_with_4_bits

    shapes = config.param_shapes()
    shapes = shapes_with_4_bits(shapes) if experts == "int4" else shapes
    there = forms.form(directory) == forms.MAPPED
    if there and checkpoint.config_in(directory).to_dict() == config.to_dict():
        checkpoint.check_files(directory, shapes)
        return
    records = layout.files(shapes)
    stacks = [stack for own in mapped.stacks(records).values() for stack in own]
    needed, free = sum(nbytes(stack.array) for stack in stacks), shutil.disk_usage(directory).free
    if needed > free:
        if (layers := config.model.num_layers) > 1:
            say(f"note: {free / 1e9:.0f} GB are free: fewer than {layers} layers")
            fewer = dataclasses.replace(config.model, num_layers=layers - 1)
            write_checkpoint(directory, dataclasses.replace(config, model=fewer), experts)
            return
        raise ValueError(
            f"{directory}: expected {needed / 1e9:.0f} GB of free space, got {free / 1e9:.0f}; "
            "give another --folder"
        )
    checksums: dict[str, str] = {}
    for stack in stacks:
        say(f"writing {stack.file}, {nbytes(stack.array) / 1e9:.2f} GB")
        header = safetensors.header({stack.name: stack.array}, mapped.HEADER)
        pieces = (
            piece
            for name, array in stack.tensors.items()
            for piece in _counted(name, random_values(name, array, config, experts), checksums)
        )
        atomic.write(str(directory / stack.file), itertools.chain([header], pieces))
    text = json.dumps(config.to_dict()).encode()
    atomic.write(str(directory / "config.json"), [text])
    atomic.write(str(directory / forms.MAPPED_INDEX), [mapped.index_text(records, checksums)])


def nbytes(array: Any) -> int:
    """Return the bytes of an array."""
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _counted(
    name: str, values: Iterator[np.ndarray], checksums: dict[str, str]
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, and then record its checksum."""
    digest = hashlib.sha256()
    for piece in values:
        data = piece.reshape(-1).view(np.uint8).data
        digest.update(data)
        yield data
    checksums[name] = f"sha256:{digest.hexdigest()}"


def random_values(
    name: str, array: Any, config: LanguageModelConfig, experts: str
) -> Iterator[np.ndarray]:
    """Yield the values of a tensor, in pieces."""
    from grok1.formats.mapped import ROUNDED
    from grok1.ops.rounded_table import BLOCK, round_table

    field, count, rng = name.rpartition("/")[2], math.prod(array.shape), np.random.default_rng(0)
    width = config.model.emb_size
    if field == "embeddings" or name.startswith(ROUNDED):
        for first in range(0, array.shape[0], BLOCK):
            table = random_table(first, min(BLOCK, array.shape[0] - first), width)
            yield table if field == "embeddings" else np.asarray(getattr(round_table(table), field))
    elif array.dtype == np.int8:
        block = rng.integers(-128, 128, PIECE, np.int8)
        for first in range(0, count, PIECE):
            yield block[: count - first]
    elif field == "scales":  # the standard deviation of the integers is 4.6, or 74
        spread = 4.6 if experts == "int4" and MOE in name else 74
        yield np.full(count, 1 / (spread * math.sqrt(width)), array.dtype)
    elif len(array.shape) == 2:  # a router
        yield (rng.standard_normal(count) / math.sqrt(array.shape[0])).astype(array.dtype)
    else:  # a norm
        yield np.ones(count, array.dtype)


def random_table(first: int, rows: int, width: int) -> np.ndarray:
    """Return some rows of the embedding table."""
    steps = np.random.default_rng(first).integers(-127, 128, (rows, width), np.int8)
    return steps / np.float32(74 * math.sqrt(width))


# ---------------------------------------------------------------------------------------- measuring


@contextlib.contextmanager
def memory_limit(limit: int | None) -> Iterator[str | None]:
    """Limit this process's memory, page cache included; yield why that is impossible, or None."""
    parent = GROUPS / "memory" if (GROUPS / "memory").is_dir() else GROUPS
    group = parent / f"grok-1-{os.getpid()}"
    problem = "no --memory was given" if limit is None else _join(group, limit)
    try:
        yield problem
    finally:
        if problem is None:
            (parent / "cgroup.procs").write_text(str(os.getpid()))
            group.rmdir()


def _join(group: Path, limit: int) -> str | None:
    """Make a control group with a limit, and join it; return why that is impossible, or None."""
    try:
        group.mkdir()
        first_version = (group / "memory.limit_in_bytes").exists()
        name = "memory.limit_in_bytes" if first_version else "memory.max"
        (group / name).write_text(str(limit))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        return f"a control group cannot be made ({error.strerror})"
    return None


def forget(directory: Path) -> None:
    """Remove the files of a checkpoint from the page cache."""
    for path in directory.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def sequential_rate(path: Path) -> float:
    """Return at how many bytes/s a file is read in order."""
    buffer = np.empty(8 << 20, np.uint8)
    done, began = 0, time.perf_counter()
    with open(path, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while done < SEQUENTIAL and (got := file.readinto(buffer.data)):
            done += got
    return done / (time.perf_counter() - began)


def bytes_read() -> int:
    """Return how many bytes this process has read from disks."""
    text = Path("/proc/self/io").read_text()
    return int(text.partition("read_bytes:")[2].split()[0])


def touched_bytes(directory: Path) -> int:
    """Return the bytes that a token touches: the chosen experts, and all else but the table."""
    import checkpoint

    config = checkpoint.read_model_config(directory)
    chosen = config.model.num_selected_experts / config.model.num_experts
    sizes = {path.name: path.stat().st_size for path in directory.glob("*.safetensors")}
    experts = sum(size for name, size in sizes.items() if ".moe." in name)
    table = sum(size for name, size in sizes.items() if "embeddings" in name)
    return round(sum(sizes.values()) - experts - table + chosen * experts)


def measure(directory: Path, tokens: int) -> dict[str, Any]:
    """Return the disk's rate, and the time and the bytes read for each token."""
    from runner import Request, load_model

    largest = max(directory.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    forget(directory)
    rate = sequential_rate(largest)
    forget(directory)
    began = time.perf_counter()
    model = load_model(directory, dtype="float32", pad_sizes=(len(PROMPT),), context=64)
    loaded = time.perf_counter() - began
    times, read = [time.perf_counter()], [bytes_read()]
    handle = model.submit(Request(PROMPT, max_len=tokens + 1, ignore_eos=True))
    for _ in model.stream(handle):
        times.append(time.perf_counter())
        read.append(bytes_read())
    return {
        "sequential_rate": rate,
        "loaded_s": loaded,
        "first_token_s": times[1] - times[0],
        "tokens": len(times) - 2,
        "decode_s": times[-1] - times[1],
        "decode_bytes": read[-1] - read[1],
        "touched_bytes": touched_bytes(directory),
    }


def report(found: dict[str, Any]) -> bool:
    """Print the figures; return whether they are within the limits."""
    each, rate = found["decode_bytes"] / found["tokens"], found["decode_bytes"] / found["decode_s"]
    share, times = rate / found["sequential_rate"], each / found["touched_bytes"]
    print(f"disk, in order     {found['sequential_rate'] / 1e9:6.2f} GB/s")
    print(f"load               {found['loaded_s']:6.2f} s")
    print(f"first token        {found['first_token_s']:6.2f} s, compilation included")
    seconds = found["decode_s"] / found["tokens"]
    print(f"each token         {seconds:6.2f} s, of {found['tokens']}")
    print(
        f"read for a token   {each / 1e9:6.2f} GB, {times:.2f} of those it touches, <= {MOST_BYTES}"
    )
    print(f"decoding reads     {rate / 1e9:6.2f} GB/s, {share:.0%}, at least {LEAST_RATE:.0%}")
    return share >= LEAST_RATE and times <= MOST_BYTES


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--folder", type=Path, required=True, help="directory of the checkpoint; written if empty")
    add(
        "--layers",
        type=number(int, 1, 64),
        default=8,
        help="full-width layers, if there is room (8)",
    )
    add("--experts", choices=("int4", "int8"), default="int4", help="bits of the experts (int4)")
    add(
        "--memory",
        type=lambda text: int(byte_size(text)),
        help="what the process may hold, such as 8GiB (all)",
    )
    add("--tokens", type=number(int, 1, 60), default=6, help="tokens that are timed (6)")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the benchmark; return 1 if a limit was exceeded."""
    options = parse_arguments()
    try:
        options.folder.mkdir(exist_ok=True)
        write_checkpoint(options.folder, full_width(options.layers), options.experts)
        with memory_limit(options.memory) as problem:
            if problem is not None:
                say(f"note: memory is not limited: {problem}")
            found = measure(options.folder, options.tokens)
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0 if report(found) else 1


if __name__ == "__main__":
    sys.exit(main())
