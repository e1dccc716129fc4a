"""Check the kernels on a GPU, and measure them: one command, one file.

python benchmarks/gpu.py [--output gpu.json]

On one 80 GB NVIDIA GPU, without a network, in at most 8 minutes. Each part is a process of its own.
One that fails has its error in the file, which is written after each result; then, or if a result
is wrong, the command ends with status 1.

golden: logits of the golden models (tests/data/golden), with the kernels, against exact ones; with
several GPUs also on all of them.
kernels: each kernel in the widths of one of eight ranks of Grok-1, against its plain form; seconds
of a call; shares of the bandwidth and of the rate of products, both measured in that process.
rank: decode and prefill of such a rank, by speed.py.
constants: what the time model assumes (grok1/planning/projection.py): the seconds of a launch, of a
conditional and, with several GPUs, of all-reduces.

The last two are measured with CUDA graphs ("command buffers") for all operations, as run.py asks
for them, and without. --tiny checks the command on a CPU: small sizes, interpreted kernels, and the
last two once.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

# No jax, which would reserve the GPU's memory for this process.
from grok1 import gpu_settings  # noqa: E402  (found by the line above)
from grok1.cli.console import Parser, say  # noqa: E402
from grok1.formats import atomic  # noqa: E402
from grok1.planning.accelerators import ACCELERATORS  # noqa: E402

LIMIT_S = 480  # of all parts together
SPEED = [str(ROOT / "benchmarks/speed.py"), "--forms", "kernels", "--no-starts", "--json"]
RANK = ["--config", "grok-1-rank", "--batches", "1", "8", "32", "--prompts", "1024", "--turns", "3"]
TINY = ["--config", "demo", "--batches", "1", "--prompts", "16", "--turns", "1"]
NO_GRAPHS = "--xla_gpu_enable_command_buffer="
ON_CPU = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
TWO_DEVICES = "--xla_force_host_platform_device_count=2"


class Part(NamedTuple):
    """A part: its seconds at most, and whether its operations are put into CUDA graphs."""

    limit_s: float
    graphs: bool = True


PARTS = {
    "machine": Part(60),
    "golden": Part(120),
    "kernels": Part(240),
    "rank": Part(150),
    "constants": Part(60),
    "rank, no command buffers": Part(150, False),
    "constants, no command buffers": Part(60, False),
}


def environment(part: Part, tiny: bool) -> dict[str, str]:
    """Return the environment of a part's process."""
    found = os.environ | (ON_CPU if tiny else {})
    flags = [found.get("XLA_FLAGS", ""), *([TWO_DEVICES] if tiny else [])]
    flags += [] if part.graphs else [NO_GRAPHS]
    found["XLA_FLAGS"] = " ".join(flags).strip()
    gpu_settings.prepare(found)
    return found


def command(name: str, tiny: bool) -> list[str]:
    """Return the command of a part, which prints lines, each a JSON object with some results."""
    kind = name.partition(",")[0]
    if kind == "rank":
        return [sys.executable, *SPEED, *(TINY if tiny else RANK)]
    script = str(ROOT / "benchmarks/gpu_parts.py")
    return [sys.executable, script, kind, *(["--tiny"] if tiny else [])]


class Run:
    """The results of a run, written to a file after each line of a part.

    output: the file, None not to write yet.
    """

    def __init__(self, tiny: bool):
        self.tiny, self.began = tiny, time.monotonic()
        self.output: str | None = None
        self.results: dict[str, Any] = {"tiny": tiny}

    def measure(self, name: str) -> dict[str, Any]:
        """Run a part, and return its results: with "error" in them if it failed."""
        part, began = PARTS[name], time.monotonic()
        limit = max(0.0, min(part.limit_s, LIMIT_S - (began - self.began)))
        own = environment(part, self.tiny)
        settings = {key: own.get(key) for key in ("XLA_FLAGS", gpu_settings.MEMORY_FRACTION[0])}
        found: dict[str, Any] = {"settings": settings}
        self.results[name] = found
        with tempfile.TemporaryFile() as errors:
            status = self.collect(subprocess.Popen(
                command(name, self.tiny), env=own, stdout=subprocess.PIPE, stderr=errors, text=True
            ), limit, found)  # fmt: skip
            errors.seek(0)
            said = errors.read().decode(errors="replace").split("\n")
        found["seconds"] = time.monotonic() - began
        if found["seconds"] >= limit:
            found["error"] = f"stopped after {limit:.0f} s"
        elif status:
            found["error"] = next((line for line in reversed(said) if line.strip()), str(status))
        elif found.keys() == {"settings", "seconds"}:
            found["error"] = "it printed no results"
        self.save()
        return found

    def collect(self, process: subprocess.Popen[str], limit: float, found: dict[str, Any]) -> int:
        """Add what a process prints to the results, and return its status; end it after `limit`."""
        timer = threading.Timer(limit, process.kill)
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                with contextlib.suppress(ValueError, TypeError):  # a line that a library prints
                    found.update(json.loads(line))
                    self.save()
        except BaseException:  # Ctrl-C as well
            process.kill()
            raise
        finally:
            status = process.wait()
            process.stdout.close()
            timer.cancel()
        return status

    def save(self) -> None:
        """Write the file, which is complete at any time."""
        if self.output is not None:
            atomic.write(self.output, [json.dumps(self.results, indent=1).encode() + b"\n"])


def check_output(path: str) -> str | None:
    """Return why a file cannot be written, in one sentence, or None."""
    try:
        atomic.require_plain(path)
        atomic.fill(atomic.partial(path), [])
        os.remove(atomic.partial(path))
    except OSError as error:
        return f"--output: {path} cannot be written ({error.strerror})"
    return None


# --------------------------------------------------------------------------------------- the report


def failures(name: str, found: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each result of a part that is wrong, and for its error."""
    said = [f"{name}: {found['error']}"] if "error" in found else []
    for key, row in found.items():
        if isinstance(row, dict) and "limit" in row:
            if "failed" in row:
                said.append(f"{name}: {key}: {row['failed']}")
            elif not row["error"] <= row["limit"]:  # also if it is NaN
                said.append(f"{name}: {key}: error {row['error']:.1e}, limit {row['limit']:.1e}")
    return said


def report(name: str, found: Mapping[str, Any]) -> None:
    """Print a part's results."""
    print(f"\n{name}, {found['seconds']:.0f} s")
    for key, value in found.get("figures", found).items():
        if key not in ("settings", "seconds"):
            row = value if isinstance(value, dict) else {"": value}
            print(f"  {key:40}" + "".join(f"  {n} {_shown(n, each)}" for n, each in row.items()))


def _shown(name: str, value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    if "share" in name:
        return f"{value:.0%}"
    return f"{value * 1e6:.1f} us" if name == "seconds" else f"{value:.4g}"


def bandwidth_share(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the shares of the memory's nominal bandwidth that were reached, if it is known.

    A plain read reaches "read share"; the best kernel the other, which BANDWIDTH_SHARE stands for.
    """
    device, kernels = results["machine"]["device"], results["kernels"]
    known = {a.name: a.bandwidth for a in ACCELERATORS.values()}
    rows = {key: row for key, row in kernels.items() if isinstance(row, dict) and "share" in row}
    if device not in known or not rows:
        return {"nominal bandwidth": known.get(device)}
    read = kernels["limits"]["bandwidth"] / known[device]
    best = max(rows, key=lambda key: rows[key]["share"])
    return {"read share": read, "kernel share": read * rows[best]["share"], "kernel": best}


def driver() -> str | None:
    """Return the version of NVIDIA's driver, if its command is there."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or [""])[0].strip() or None


def measure_all(run: Run, output: str) -> int:
    """Run the parts and print their results; return 1 if one fails or computes something wrong."""
    machine = run.measure("machine")
    if "error" not in machine and not run.tiny and machine["platform"] != "gpu":
        machine["error"] = (
            f"expected a GPU, got {machine['device']}; use --tiny to check the command on a CPU"
        )
    if "error" in machine:
        say(f"error: {machine['error']}")
        return 1
    run.output = output
    machine["driver"] = driver()
    run.save()
    wrong = []
    for name in (n for n, part in PARTS.items() if part.graphs or not run.tiny):
        found = machine if name == "machine" else run.measure(name)
        report(name, found)
        wrong += failures(name, found)
    run.results["bandwidth"] = {"of the memory": bandwidth_share(run.results), "seconds": 0}
    run.results["wrong"] = wrong
    run.save()
    report("bandwidth", run.results["bandwidth"])
    for sentence in wrong:
        say(f"error: {sentence}")
    print(f"all results are in {output}")
    return 1 if wrong else 0


def main() -> int:
    """Run the command."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", metavar="FILE", default="gpu.json", help="(gpu.json)")
    parser.add_argument("--tiny", action="store_true", help="check this command, on a CPU")
    options = parser.parse_args()
    if reason := check_output(options.output):
        say(f"error: {reason}")
        return 2
    try:
        return measure_all(Run(options.tiny), options.output)
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except OSError as error:
        say(f"error: --output: {options.output} cannot be written ({error.strerror})")
        return 1


if __name__ == "__main__":
    sys.exit(main())
