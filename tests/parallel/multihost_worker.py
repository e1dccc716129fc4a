"""One process of a run, with hooks that stop it at a given place; started by the tests.

run DIRECTORY VICTIM:WHERE ARGUMENTS: run.py, in which process VICTIM stops and sleeps at WHERE:
"load", "prefill" or "decode". It then creates the file "stopped" in DIRECTORY. The other process
creates "waiting" when it is in a collective that the victim does not enter; for "load", when it has
reached the same place. "late" is like "load", but the other process handles a loss two seconds
late. At "start" neither stops: both create their files when they are connected.

read OUT COORDINATOR PROCESS NAME MESH: write the logits, scores and greedy tokens of a golden
model on a mesh of two processes.
"""

import os
import pathlib
import sys
import time
import traceback
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# The step before which the victim stops, and the one in which the other process waits for it.
STEPS = {"prefill": (None, 1), "decode": (4, 4)}


def main_run(directory: pathlib.Path, where: str, arguments: list[str]) -> None:
    """Run the command with its hooks."""
    import run
    from grok1.cli import console
    from grok1.parallel import multihost
    from grok1.serving import scheduler

    victim, _, place = where.partition(":")
    mine = arguments[arguments.index("--process-id") + 1] == victim

    def arrive() -> None:
        (directory / ("stopped" if mine else "waiting")).touch()
        if mine and place != "start":
            time.sleep(1000)

    def progress(*_: Any) -> None:
        if place in ("load", "late"):
            arrive()

    phase, steps = multihost.Peers.phase, []

    def change(self: Any, name: str) -> None:
        phase(self, name)
        if name == place == "prefill" and mine:
            arrive()

    def counted(step: Any) -> Any:
        def go(*arguments: Any, **options: Any) -> Any:
            steps.append(0)
            if place in STEPS and len(steps) == STEPS[place][0 if mine else 1]:
                arrive()
            return step(*arguments, **options)

        return go

    def receive(self: Any, *arguments: Any) -> None:
        take(self, *arguments)
        if place == "start":
            arrive()

    def lose(self: Any, sentence: str) -> None:
        time.sleep(2 if place == "late" else 0)
        lost(self, sentence)

    lost, multihost.Peers._record_loss = multihost.Peers._record_loss, lose
    take, multihost.Peers._take = multihost.Peers._take, receive
    console.ByteProgress.__call__ = progress
    multihost.Peers.phase = change
    scheduler.prefill, scheduler.decode = counted(scheduler.prefill), counted(scheduler.decode)
    sys.argv = ["run.py", *arguments]
    sys.exit(run.main())


def main_read(out: str, coordinator: str, process: str, name: str, mesh: str) -> None:
    """Compute the results of a golden model; process 0 writes them to a file."""
    from grok1.parallel import multihost

    place = multihost.Process(coordinator, 2, int(process))
    peers = multihost.Peers(place, 60, 60, print)
    peers.join()
    import numpy as np

    import golden
    from runner import Request, load_model

    data, model = map(int, mesh.split(","))
    server = load_model(
        golden.DIRECTORY / name,
        mesh=(data, model),
        slots=8,
        dtype="float32",
        pad_sizes=(16,),
        kernels=False,
        compile_cache=False,
    )
    files = golden.recorded(name)
    answers = server.generate([Request(row["prompt"], 0.0, max_len=40) for row in files.greedy])
    found = {
        "logits": server.logits(files.tokens),
        "scores": server.score([[int(token) for token in files.tokens[0] if token]])[0],
        "greedy": sum((answer.token_ids for answer in answers), []),
    }
    if process == "0":
        np.savez(out, **found)
    peers.close()


if __name__ == "__main__":
    if sys.argv[1] == "run":
        main_run(pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    try:
        main_read(*sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # jax would wait for the other processes
