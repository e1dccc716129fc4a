"""One process of a run of several, with hooks that place a signal exactly; started by the tests.

run DIRECTORY VICTIM:WHERE ARGUMENTS: run.py, in which process VICTIM stalls at "load", "prefill" or
"decode". In DIRECTORY it leaves the file "stalled"; the other one leaves "waiting" when it is in a
collective that the victim does not enter, or, for "load", past the same place. "late" is "load",
but the other one takes its time to act upon the loss. At "start" none stalls: both leave their
files when they know of each other.

meet COORDINATOR PROCESSES PROCESS TIMEOUT WHAT [...]: only meet, without jax, and then do WHAT:
"stay"; "close", in which jax never ends; "say HEX COUNT", which sends process 0 these bytes so
often in place of messages, and ends; "share COUNT" bytes; be "deaf", that is read nothing more; or
"fail" in the thread that takes messages.

print ARGUMENTS: run.py with one answer, of no model, before which gloo prints a line. Without jax.

read OUT COORDINATOR PROCESSES PROCESS NAME MESH...: what a golden model finds, logits, scores and
greedy tokens.
"""

import os
import pathlib
import sys
import time
import traceback
import types
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# At which of its steps a process stops, and the other one waits for it for ever.
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
        (directory / ("stalled" if mine else "waiting")).touch()
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

    def hear(self: Any, *arguments: Any) -> None:
        take(self, *arguments)
        if place == "start":
            arrive()

    def lose(self: Any, sentence: str) -> None:
        time.sleep(2 if place == "late" else 0)
        lost(self, sentence)

    lost, multihost.Peers._record_loss = multihost.Peers._record_loss, lose
    take, multihost.Peers._take = multihost.Peers._take, hear
    console.ByteProgress.__call__ = progress
    multihost.Peers.phase = change
    scheduler.prefill, scheduler.decode = counted(scheduler.prefill), counted(scheduler.decode)
    sys.argv = ["run.py", *arguments]
    sys.exit(run.main())


def main_meet(
    coordinator: str, processes: str, process: str, timeout: str, what: str, *more: str
) -> None:
    """Meet the other processes, and do one thing."""
    from grok1.cli.console import say
    from grok1.parallel import multihost

    place = multihost.Process(coordinator, int(processes), int(process))
    peers = multihost.Peers(place, 30, float(timeout), say)

    def hear(*message: Any) -> None:
        take(*message)
        if peers._complete and what == "deaf":
            time.sleep(1000)
        elif peers._complete and what == "fail":
            raise LookupError("on purpose")

    take = peers._take
    vars(peers).update(_start_jax=lambda: None, _take=hear)
    try:
        peers.join()
        print("met", flush=True)
        if what == "say":
            peers._links[0].socket.sendall(bytes.fromhex(more[0]) * int(more[1]))
            os._exit(0)
        elif what == "share":
            peers.share("x" * int(more[0]))
        elif what == "close":
            sys.modules["jax"] = types.SimpleNamespace(
                distributed=types.SimpleNamespace(shutdown=lambda: time.sleep(1000))
            )
            peers.close()
        time.sleep(1000)
    except ValueError as error:
        peers.end(str(error))
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def main_print(*arguments: str) -> None:
    """Print one answer, without a model or jax."""
    import run

    def generate(*given: Any) -> None:
        job = given[2]
        os.write(1, b"of gloo")
        words = dict.fromkeys(
            ("prompt", "text", "finish_reason", "prompt_logprobs", "prompt_top_logprobs", "error")
        )
        numbers = dict.fromkeys(("prompt_ids", "token_ids", "logprobs", "top_logprobs"), [5])
        completion = types.SimpleNamespace(**words, **numbers)
        event = types.SimpleNamespace(
            request=0, sample=0, finish_reason="length", completion=completion
        )
        (job.answers or run.make_printer(job.options)).show(event)

    run.make_server, run.generate = lambda *_: run.say("loaded"), generate
    run.connect_processes = lambda *_: None
    run.multihost.Peers._start_jax = run.multihost.Peers.close = lambda _: None
    sys.argv = ["run.py", *arguments]
    sys.exit(run.main())


def main_read(
    out: str, coordinator: str, processes: str, process: str, name: str, *meshes: str
) -> None:
    """Read a golden model on each mesh; process 0 writes down what comes out."""
    from grok1.parallel import multihost

    place = multihost.Process(coordinator, int(processes), int(process))
    peers = multihost.Peers(place, 60, 60, print)
    peers.join()
    import jax
    import numpy as np

    import golden
    from grok1.parallel.sharding import split_over_hosts
    from runner import InferenceRunner, ModelRunner, Request

    found: dict[str, Any] = {}
    for mesh in meshes:
        data, model = map(int, mesh.split(","))
        hosts = int(processes), jax.local_device_count()
        local, between = split_over_hosts(data, model, *hosts)
        server = InferenceRunner(
            name=name,
            runner=ModelRunner(
                golden.config(name, "float32"), 4 / (data * model), golden.DIRECTORY / name
            ),
            load=None,
            tokenizer_path=None,
            local_mesh_config=local,
            between_hosts_config=between,
            pad_sizes=(16,),
        )
        server.initialize()
        tokens = golden.recorded(name).tokens
        found[f"logits {mesh}"] = server.logits(tokens)
        found[f"score {mesh}"] = server.score([[int(t) for t in tokens[0] if t]])[0]
        prompts = [entry["prompt"] for entry in golden.recorded(name).greedy]
        answers = server.generate([Request(prompt, 0.0, max_len=40) for prompt in prompts])
        found[f"greedy {mesh}"] = sum((answer.token_ids for answer in answers), [])
    if process == "0":
        np.savez(out, **found)
    peers.close()


if __name__ == "__main__":
    if sys.argv[1] == "run":
        main_run(pathlib.Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
    elif sys.argv[1] == "meet":
        main_meet(*sys.argv[2:])
    elif sys.argv[1] == "print":
        main_print(*sys.argv[2:])
    else:
        try:
            main_read(*sys.argv[2:])
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)  # jax would wait for the others
