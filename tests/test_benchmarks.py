"""The benchmarks run, and what they hold the code to holds."""

import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.timed
@pytest.mark.parametrize("arguments", [(), ("--devices", "8", "--through-buffers")])
def test_loading_is_as_fast_as_reading_and_takes_little_memory(arguments: tuple[str, ...]) -> None:
    """The original took 4.3 s for this checkpoint, and unpickled it whole."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/load.py", "--json", "--turns", "5", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    found = json.loads(done.stdout)
    assert found["bytes"] > 1.4e9
    assert found["beyond_bytes"] <= found["bound_bytes"]
    if not arguments:  # onto the host itself; through buffers the time is a GPU's to judge
        assert done.returncode == 0 and found["ratio"] <= 2
