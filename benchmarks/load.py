"""Measure how fast a checkpoint loads, compared with reading its files, and its memory use.

python benchmarks/load.py

Writes a checkpoint of 1.4 GB in the released layout to a temporary folder. Then, in turns, reads
its files into new memory with `np.fromfile` and loads it, with a warm page cache. Ends with status
1 if loading took more than twice as long (by the median of the turns' ratios), or if its anonymous
memory, without the parameters, exceeded 4 times a device's largest share of a file plus 256 MiB.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from grok1.cli.console import Parser, number, say  # noqa: E402  (found by the line above)

if TYPE_CHECKING:
    import jax
    import numpy as np
    from jax.sharding import Mesh

    from model import LanguageModelConfig

Result = TypeVar("Result")

MOST_TIMES = 2.0
MIB = 1 << 20


def write_checkpoint(directory: Path, config: LanguageModelConfig) -> None:
    """Save random parameters."""
    import jax
    import numpy as np

    import checkpoint

    rng = np.random.default_rng(0)

    def draw(shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if shape.dtype == np.int8:
            return rng.integers(-127, 128, shape.shape, np.int8)
        return rng.standard_normal(shape.shape, np.float32).astype(shape.dtype)

    checkpoint.save(directory, jax.tree.map(draw, config.param_shapes()), config.to_dict())


def anonymous_bytes() -> int:
    """Return this process's anonymous resident memory (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def peak_of(work: Callable[[], Result]) -> tuple[Result, float, int]:
    """Return the result of `work`, its seconds, and the peak growth of anonymous memory."""
    before, peak, over = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - began
    over.set()
    watcher.join()
    return result, seconds, max(peak, anonymous_bytes()) - before


def measure(directory: Path, config: LanguageModelConfig, turns: int, mesh: Mesh) -> dict[str, Any]:
    """Read the files and load them, in turns; return the figures."""
    import jax
    import numpy as np

    import checkpoint
    from grok1.parallel.sharding import named_shardings, parameter_specs

    shapes = config.param_shapes()
    specs = parameter_specs(shapes, config.partition_rules(mesh), mesh)
    shardings = named_shardings(specs, mesh)
    slices = [
        int(np.prod(sharding.shard_shape(array.shape))) // (array.shape[0] if stacked else 1)
        * array.dtype.itemsize
        for module, leaves in shapes.items()
        for stacked in [module.startswith(checkpoint.STACKED)]
        for array, sharding in zip(
            jax.tree.leaves(leaves), jax.tree.leaves(shardings[module]), strict=True
        )
    ]  # fmt: skip
    paths = sorted((directory / "ckpt-0").iterdir())
    plain, loads, beyond = [], [], []
    for _ in range(turns):
        began = time.perf_counter()
        read = [np.fromfile(path, np.uint8) for path in paths]
        plain.append(time.perf_counter() - began)
        del read
        params, seconds, grown = peak_of(
            lambda: jax.block_until_ready(checkpoint.load(directory, shapes, shardings))
        )
        loads.append(seconds)
        # A CPU's parameters are anonymous memory too; replicas share one array there.
        on_host = {
            shard.data.unsafe_buffer_pointer(): shard.data.nbytes
            for array in jax.tree.leaves(params)
            for shard in array.addressable_shards
            if shard.device.platform == "cpu"
        }
        beyond.append(max(0, grown - sum(on_host.values())))
        del params
        gc.collect()
    return {
        "bytes": sum(path.stat().st_size for path in paths),
        "plain_s": plain,
        "load_s": loads,
        "ratio": statistics.median(load / read for load, read in zip(loads, plain, strict=True)),
        "beyond_bytes": max(beyond),
        "bound_bytes": 4 * max(slices) + 256 * MIB,
    }


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    count = number(int, 1, 10**6)
    add("--turns", type=count, default=7, metavar="N", help="readings and loads, in turns (7)")
    add("--devices", type=int, choices=(1, 2, 4, 8), default=1, help="the model axis (1)")
    add(
        "--through-buffers",
        action="store_true",
        help="load as for an accelerator, even onto a CPU: piece by piece, through small buffers",
    )
    add("--folder", type=Path, help="where to write the checkpoint (a temporary folder)")
    add("--json", action="store_true", help="print the figures as one JSON object")
    return parser.parse_args(arguments)


def main() -> int:
    """Run the benchmark; return 1 if a limit was exceeded."""
    options = parse_arguments()
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={options.devices}"
    from grok1.formats import loading
    from grok1.parallel.sharding import make_mesh
    from random_models import quarter

    if options.through_buffers:
        loading._on_host = lambda devices: not devices
    config = quarter()
    try:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            write_checkpoint(Path(folder), config)
            found = measure(Path(folder), config, options.turns, make_mesh((1, options.devices)))
    except (ValueError, OSError) as error:
        say(f"error: {error}; give a folder with 1.5 GB of free space with --folder")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    if options.json:
        print(json.dumps(found))
    else:
        report(found)
    held = found["ratio"] <= MOST_TIMES and found["beyond_bytes"] <= found["bound_bytes"]
    return 0 if held else 1


def report(found: dict[str, Any]) -> None:
    """Print the figures as text."""
    size = found["bytes"] / 1e9
    for name, key in (("np.fromfile", "plain_s"), ("load", "load_s")):
        seconds = found[key]
        middle = statistics.median(seconds)
        times = " ".join(f"{second:.2f}" for second in seconds)
        print(f"{name:12} {middle:.2f} s, {size / middle:.1f} GB/s   ({times})")
    print(f"ratio        {found['ratio']:.2f}, at most {MOST_TIMES:g}")
    beyond, bound = found["beyond_bytes"] / MIB, found["bound_bytes"] / MIB
    print(f"memory       {beyond:.0f} MiB besides the parameters, at most {bound:.0f}")


if __name__ == "__main__":
    sys.exit(main())
