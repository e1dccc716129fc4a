"""Sample text from Grok-1, or from the small demo model that comes with it.

python run.py --prompt "Once upon a time" --max-len 120 --temperature 0.7 --seed 1

With --distributed several processes, on one host or many, are one run: process 0's prompts and
options hold for all, and only it prints. When a process is lost, all end and say which.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TextIO

import multihost
import storage
from commandline import ByteProgress, say
from options import parse_arguments

ROOT = Path(__file__).resolve().parent
RELEASED = ROOT / "checkpoints"  # holds the weights once they have been downloaded
DEMO = ROOT / "checkpoints" / "demo"
MOST_SLOTS = 8
# What process 0 decides for all; the files may lie elsewhere on each host.
SHARED = (
    "prompts", "max_len", "temperature", "top_k", "nucleus_p", "min_p", "repetition_penalty",
    "presence_penalty", "stop", "truncate", "seed", "mesh", "dtype", "batch", "context",
)  # fmt: skip


def choose_files(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """Return the checkpoint directory and the tokenizer, None if only ids are given."""
    directory = options.checkpoint
    if directory is None:
        directory = RELEASED if storage.form(RELEASED) else DEMO
        if directory == DEMO:
            say("checkpoints/ckpt-0 is not there: using the small bundled demo model")
    storage.require_form(directory, "name the right one with --checkpoint")
    tokenizer = options.tokenizer
    words = options.stop or any(isinstance(prompt, str) for prompt in options.prompts)
    if tokenizer is None and words:
        own = directory / "tokenizer.model"
        tokenizer = own if own.is_file() else ROOT / "tokenizer.model"
    return directory, tokenizer


def find_peers(options: argparse.Namespace, errors: TextIO) -> multihost.Peers:
    """Find out where this process stands among those of the run."""
    place = multihost.find_place(
        options.coordinator, options.num_processes, options.process_id, options.join_timeout
    )
    return multihost.Peers(place, options.join_timeout, options.peer_timeout, errors, note=say)


def keep_outputs(peers: multihost.Peers) -> None:
    """Keep the outputs for process 0's answers and messages; the others say only what ended them.

    gloo, which carries the collectives of CPUs, prints lines to stdout from C++.
    """
    if peers.place.process == 0:
        # Never closed: the answers outlive whatever ends the interpreter.
        copy = os.dup(1)
        encoding = sys.stdout.encoding
        sys.stdout = os.fdopen(copy, "w", 1, encoding, "backslashreplace", closefd=False)
    else:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)


def agree(peers: multihost.Peers, options: argparse.Namespace) -> tuple[Path, Path | None]:
    """Take process 0's options, and return this process's files, which must hold what its do."""
    first = peers.place.process == 0
    files: Any = choose_files(options) if first else ()
    shared = peers.share(
        {
            "options": {name: getattr(options, name) for name in SHARED},
            "files": [None if file is None else str(file.absolute()) for file in files],
            "contents": contents(*files) if first else {},
        }
    )
    vars(options).update(shared["options"])
    if first:
        return files
    if options.checkpoint is None:
        options.checkpoint = Path(shared["files"][0])
        if options.tokenizer is None and shared["files"][1] is not None:
            options.tokenizer = Path(shared["files"][1])
    directory, tokenizer = choose_files(options)
    for name, found in contents(directory, tokenizer).items():
        if found != shared["contents"][name]:
            raise ValueError(
                f"the {name} of {directory if name == 'config.json' else tokenizer} is not that of "
                "process 0; give all processes the same files"
            )
    return directory, tokenizer


def contents(directory: Path, tokenizer: Path | None) -> dict[str, str]:
    """Return fingerprints of the files on which all processes must agree to take the same steps."""
    files = {"config.json": directory / "config.json", "tokenizer": tokenizer}
    return {
        name: hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else ""
        for name, file in files.items()
    }


def make_server(
    options: argparse.Namespace,
    progress: ByteProgress,
    directory: Path,
    tokenizer: Path | None,
    processes: int = 1,
) -> Any:
    """Load the model as the options say."""
    mesh = options.mesh or (1, 1)
    # Read when jax starts its CPU backend, and ignored elsewhere: virtual devices for the mesh.
    devices = math.prod(mesh) // processes
    flags = os.environ.get("XLA_FLAGS", "")
    if devices > 1 and "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    import jax  # Takes seconds: after all that can be checked without it.

    from runner import load_server

    began = time.perf_counter()
    server = load_server(
        directory,
        tokenizer,
        mesh=mesh,
        slots=options.batch or min(len(options.prompts), MOST_SLOTS),
        dtype=options.dtype,
        context=options.context,
        requests=make_requests(options),
        progress=progress,
    )
    progress.close()
    dtype = jax.numpy.dtype(server.config.fprop_dtype).name
    say(
        f"loaded {directory} in {time.perf_counter() - began:.1f} s: "
        f"{server.config.model.num_layers} layers, {dtype} activations, "
        f"mesh {mesh[0]},{mesh[1]} on {jax.devices()[0].device_kind}"
    )
    return server


def make_requests(options: argparse.Namespace) -> list[Any]:
    """Return a request for each prompt."""
    from runner import Request

    return [
        Request(
            prompt=prompt,
            temperature=options.temperature,
            nucleus_p=options.nucleus_p,
            rng_seed=options.seed,
            max_len=options.max_len,
            top_k=options.top_k,
            min_p=options.min_p,
            repetition_penalty=options.repetition_penalty,
            presence_penalty=options.presence_penalty,
            stop=options.stop,
            truncate=options.truncate,
        )
        for prompt in options.prompts
    ]


def generate(
    worker: ThreadPoolExecutor,
    server: Any,
    options: argparse.Namespace,
    phase: Callable[[str], object],
) -> None:
    """Print the answers, then a line of statistics."""
    events = server.generate_events(make_requests(options), phase)
    printer = JsonPrinter() if options.json else TextPrinter(options.prompts)
    began, first, tokens = time.perf_counter(), 0.0, 0
    try:
        while event := worker.submit(next, events, None).result():
            first = first or time.perf_counter() - began
            tokens += 1
            printer.show(event)
    finally:
        # After an interruption too: nothing that was computed is lost.
        printer.close()
    total = time.perf_counter() - began
    line = f"{tokens} tokens in {total:.2f} s, compilation included: {first:.2f} s to the first"
    if tokens > 1:
        line += f" token, then {(tokens - 1) / (total - first):.1f} tokens/s"
    say(line)


class TextPrinter:
    """Streams a single answer as it grows; prints several, each with its prompt, as they end."""

    def __init__(self, prompts: Sequence[Any]):
        self.alone = len(prompts) == 1
        self.begun = self.alone and isinstance(prompts[0], str)
        self.open: dict[int, Any] = {}
        if self.begun:
            print(prompts[0], end="", flush=True)

    def show(self, event: Any) -> None:
        """Print what is new."""
        if self.alone:
            text = event.text if event.completion.text is not None else f"{event.token_id} "
            print(text, end="", flush=True)
            self.begun = True
            return
        self.open[event.request] = event.completion
        if event.completion.finish_reason is not None:
            self._whole(event.request)

    def close(self) -> None:
        """End the line, and print what answers there are of an interrupted batch."""
        if self.begun:
            print(flush=True)
        for index in sorted(self.open):
            self._whole(index)

    def _whole(self, index: int) -> None:
        answer = self.open.pop(index)
        prompt = " ".join(map(str, answer.prompt_ids)) if answer.prompt is None else answer.prompt
        text = " ".join(map(str, answer.token_ids)) if answer.text is None else answer.text
        # Ids do not run on into an answer, as words do.
        between = " | " if answer.prompt is None else ""
        print(f"[{index + 1}] {prompt}{between}{text}", flush=True)


class JsonPrinter:
    """Prints finished answers as JSON lines, in the order of the prompts."""

    def __init__(self) -> None:
        self.finished: dict[int, Any] = {}
        self.next = 0

    def show(self, event: Any) -> None:
        """Print the answers that are finished and whose turn it is."""
        if event.completion.finish_reason is not None:
            self.finished[event.request] = event.completion
        while self.next in self.finished:
            self._print(self.finished.pop(self.next))
            self.next += 1

    def close(self) -> None:
        """Print the other finished answers of an interrupted batch."""
        for index in sorted(self.finished):
            self._print(self.finished[index])

    def _print(self, answer: Any) -> None:
        fields = {
            "prompt": answer.prompt,
            "prompt_ids": answer.prompt_ids,
            "token_ids": answer.token_ids,
            "text": answer.text,
            "finish_reason": answer.finish_reason,
            "logprobs": answer.logprobs,
        }
        print(json.dumps(fields), flush=True)


def serve(worker: ThreadPoolExecutor, options: argparse.Namespace) -> None:
    """Load the model and answer, in one process."""
    files = choose_files(options)
    with ByteProgress("loading") as progress:
        server = worker.submit(make_server, options, progress, *files).result()
    generate(worker, server, options, lambda _: None)


def serve_together(
    worker: ThreadPoolExecutor, options: argparse.Namespace, peers: multihost.Peers
) -> None:
    """Load the model and answer, as one of several processes."""
    keep_outputs(peers)
    worker.submit(peers.join).result()
    peers.phase("load")
    files = worker.submit(agree, peers, options).result()
    count = peers.place.processes
    with ByteProgress("loading") as progress:
        server = worker.submit(make_server, options, progress, *files, count).result()
    generate(worker, server, options, peers.phase)
    worker.submit(peers.close).result()


def show_plan(options: argparse.Namespace) -> None:
    """Print whether the model fits a mesh. No weights are read, and no accelerator is touched."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    # In its place the option below, which can wait until the size of the mesh is known.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = re.sub(r"\S*xla_force_host_platform_device_count\S*", "", flags)
    import jax

    import plan

    directory = options.checkpoint
    if directory is None and storage.form(RELEASED):
        directory = RELEASED
    config = plan.read_config(directory, options.dtype, options.context)
    jax.config.update("jax_num_cpu_devices", plan.devices_for(config, options.mesh))
    found = plan.make_plan(
        config,
        options.mesh,
        batch=options.batch,
        device_memory=int(options.device_memory),
        bandwidth=options.bandwidth,
        directory=directory,
    )
    print(json.dumps(dataclasses.asdict(found)) if options.json else plan.in_words(found))


def fail(error: Exception, peers: multihost.Peers | None, errors: TextIO) -> int:
    """Say what went wrong, to the other processes too; returns the exit status.

    Raises what should not happen, with its traceback.
    """
    sentence, status = str(error), 1
    if isinstance(error, BrokenPipeError):
        sentence, status = "the reader of its answers has gone, as with `| head`", 141
    elif isinstance(error, ModuleNotFoundError):
        sentence = f"{error.name} is not installed; run: pip install -r requirements.txt"
    elif isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in sentence:
        sentence = f"too little memory for the model or its cache ({error}); use more devices"
    elif isinstance(error, ValueError | OSError):
        pass  # its own sentence
    elif peers is None:
        raise error
    else:
        peers.await_loss()  # which makes collectives fail
        traceback.print_exception(error, file=errors)
        sentence = f"{type(error).__name__}: {sentence.splitlines()[0] if sentence else ''}"
    if peers is not None:
        peers.end(sentence)
    if status != 141:
        say(f"error: {sentence}", errors)
    if peers is not None or status == 141:
        os._exit(status)  # sys.exit would wait: for the other processes, for a flush
    return status


def main() -> int:
    """Run the command; returns the exit status."""
    # jax works in a thread of its own. Ctrl-C strikes the main one, which waits and prints: at
    # once, and never halfway through an import, a trace or a compilation.
    worker = ThreadPoolExecutor(max_workers=1)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal cannot show
    errors = sys.stderr
    peers: multihost.Peers | None = None
    try:
        try:
            options = parse_arguments()
            if options.distributed:
                signal.signal(multihost.WAKE, signal.default_int_handler)
                peers = worker.submit(find_peers, options, errors).result()
                serve_together(worker, options, peers)
            elif options.plan:
                worker.submit(show_plan, options).result()
            else:
                serve(worker, options)
        except Exception as error:
            return fail(error, peers, errors)
    except KeyboardInterrupt:
        if peers is not None:
            peers.end("it was interrupted")
        say("interrupted", errors)
        os._exit(130)  # sys.exit would wait for the worker
    return 0


if __name__ == "__main__":
    sys.exit(main())
