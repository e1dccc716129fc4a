"""Sample text from Grok-1, or from the small demo model that comes with it.

python run.py --prompt "Once upon a time" --max-len 120 --temperature 0.7 --seed 1

With --distributed several processes, on one host or many, are one run: process 0's prompts and
options hold for all, and only it prints. When a process is lost, all end and say which.
"""

import argparse
import hashlib
import io
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn, TextIO

import multihost
import storage

ROOT = Path(__file__).resolve().parent
RELEASED = ROOT / "checkpoints"  # holds the weights once they have been downloaded
DEMO = ROOT / "checkpoints" / "demo"
MOST_SLOTS = 8
DEFAULT_PROMPT = "Once upon a time"
# What process 0 decides for all; the files may lie elsewhere on each host.
SHARED = ("prompts", "max_len", "temperature", "top_k", "nucleus_p", "seed", "mesh", "dtype")


def say(message: str, file: TextIO | None = None) -> None:
    """Print a message for the person, apart from the output."""
    print(message, file=file or sys.stderr, flush=True)


def mesh_sizes(text: str) -> tuple[int, int]:
    """Parse "DATA,MODEL"."""
    try:
        data, model = (int(part) for part in text.split(","))
    except ValueError:
        data = model = 0
    if data < 1 or model < 1:
        raise argparse.ArgumentTypeError(
            f"expected two positive numbers DATA,MODEL such as 1,8, got {text!r}"
        )
    return data, model


def coordinator(text: str) -> str:
    """Check "HOST:PORT"."""
    try:
        multihost.host_and_port(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def token_ids(text: str) -> list[int]:
    """Parse "5 6 7"."""
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected token ids such as '5 6 7', got {text!r}"
        ) from None


def number(low: float, high: float, kind: type, wanted: str) -> Any:
    """Return a parser for a number in [low, high]."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return parse


class Parser(argparse.ArgumentParser):
    """Ends with one sentence where argparse would print its whole usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        say(f"error: {message}; --help lists all options")
        sys.exit(2)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exits with status 2 and one sentence if it is wrong."""
    parser = Parser(
        description=(__doc__ or "").splitlines()[0],
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="directory of a checkpoint; by default checkpoints/ if it holds one, else the demo",
    )
    add(
        "--tokenizer",
        type=Path,
        metavar="FILE",
        help="SentencePiece model; by default DIR/tokenizer.model, else the one beside run.py",
    )
    add(
        "--prompt",
        dest="prompts",
        action="append",
        metavar="TEXT",
        help=f"text to continue, may be repeated; by default {DEFAULT_PROMPT!r}",
    )
    add(
        "--prompt-ids",
        dest="prompts",
        action="append",
        type=token_ids,
        metavar='"5 6 7"',
        help="token ids to continue, may be repeated; needs no tokenizer",
    )
    count = number(1, 2**31 - 1, int, "a whole number of at least 1")
    add(
        "--max-len",
        type=count,
        default=200,
        metavar="N",
        help="most tokens to generate, beside the prompt's (200)",
    )
    add(
        "--temperature",
        type=number(0, 1e6, float, "a number of at least 0 (0: the most probable token)"),
        default=0.7,
        metavar="X",
        help="0 takes the most probable token (0.7)",
    )
    add(
        "--top-k",
        type=number(0, 2**31 - 1, int, "a whole number of at least 0 (0: no limit)"),
        default=0,
        metavar="N",
        help="draw from the N most probable tokens (0: no limit)",
    )
    add(
        "--nucleus-p",
        "--top-p",
        type=number(sys.float_info.min, 1, float, "a number above 0 and at most 1"),
        default=1.0,
        metavar="X",
        help="draw from the fewest tokens whose probability reaches X (1)",
    )
    add(
        "--seed",
        type=number(0, 2**32 - 1, int, "a whole number from 0 to 4294967295"),
        default=42,
        metavar="N",
        help="the same seed gives the same text (42)",
    )
    add(
        "--mesh",
        type=mesh_sizes,
        default=(1, 1),
        metavar="DATA,MODEL",
        help="devices along the batch and along heads and hidden widths (1,1); Grok-1 needs 1,8",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="activations; by default float32 on a CPU, bfloat16 elsewhere",
    )
    add("--json", action="store_true", help="print one JSON object a line for each prompt")
    add_distributed(parser)
    options = parser.parse_args(arguments)
    check_distributed(parser, options)
    options.prompts = options.prompts or [DEFAULT_PROMPT]
    return options


def add_distributed(parser: Parser) -> None:
    """Add the options of a run of several processes."""
    add = parser.add_argument_group("several processes, as a rule one a host").add_argument
    add(
        "--distributed",
        action="store_true",
        help="be one of several processes; by default placed by SLURM, GKE or MPI",
    )
    add(
        "--coordinator",
        type=coordinator,
        metavar="HOST:PORT",
        help="where process 0 listens, which all others must reach",
    )
    add(
        "--num-processes",
        type=number(1, 2**20, int, "a whole number of at least 1"),
        metavar="N",
        help="how many processes are started, each with the same coordinator",
    )
    add(
        "--process-id",
        type=number(0, 2**20, int, "a whole number of at least 0"),
        metavar="I",
        help="which one this is, from 0",
    )
    seconds = number(2, 1e6, float, "a number of seconds of at least 2")
    add(
        "--peer-timeout",
        type=seconds,
        default=multihost.PEER_TIMEOUT,
        metavar="SECONDS",
        help="a process that is silent for so long is lost, and all end "
        f"({multihost.PEER_TIMEOUT:g})",
    )
    add(
        "--join-timeout",
        type=seconds,
        default=multihost.JOIN_TIMEOUT,
        metavar="SECONDS",
        help=f"how long to wait for all processes to come ({multihost.JOIN_TIMEOUT:g})",
    )


def check_distributed(parser: Parser, options: argparse.Namespace) -> None:
    """Exit with status 2 if the options of several processes do not fit together."""
    place = {
        "--coordinator": options.coordinator,
        "--num-processes": options.num_processes,
        "--process-id": options.process_id,
    }
    given = [name for name, value in place.items() if value is not None]
    missing = [name for name in place if name not in given]
    if given and not options.distributed:
        parser.error(f"{given[0]} needs --distributed")
    if given and missing:
        parser.error(f"{given[0]} needs {' and '.join(missing)}, or none of them to be given")
    if given and options.process_id >= options.num_processes:
        parser.error(
            f"argument --process-id: expected one from 0 to {options.num_processes - 1}, as there "
            f"are {options.num_processes} processes, got {options.process_id}"
        )


def choose_files(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """Return the checkpoint directory and the tokenizer, None if only ids are given."""
    directory = options.checkpoint
    if directory is None:
        directory = RELEASED if storage.form(RELEASED) else DEMO
        if directory == DEMO:
            say("checkpoints/ckpt-0 is not there: using the small bundled demo model")
    storage.require_form(directory, "name the right one with --checkpoint")
    tokenizer = options.tokenizer
    if tokenizer is None and any(isinstance(prompt, str) for prompt in options.prompts):
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
    options: argparse.Namespace, directory: Path, tokenizer: Path | None, processes: int = 1
) -> Any:
    """Load the model as the options say."""
    # Read when jax starts its CPU backend, and ignored elsewhere: virtual devices for the mesh.
    devices = options.mesh[0] * options.mesh[1] // processes
    flags = os.environ.get("XLA_FLAGS", "")
    if devices > 1 and "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={devices}"
    import jax  # Takes seconds: after all that can be checked without it.

    from runner import load_server

    began = time.perf_counter()
    server = load_server(
        directory,
        tokenizer,
        mesh=options.mesh,
        slots=min(len(options.prompts), MOST_SLOTS),
        dtype=options.dtype,
        requests=make_requests(options),
        progress=LoadProgress(),
    )
    dtype = jax.numpy.dtype(server.config.fprop_dtype).name
    say(
        f"loaded {directory} in {time.perf_counter() - began:.1f} s: "
        f"{server.config.model.num_layers} layers, {dtype} activations, "
        f"mesh {options.mesh[0]},{options.mesh[1]} on {jax.devices()[0].device_kind}"
    )
    return server


class LoadProgress:
    """Says every few seconds how much of a checkpoint has been loaded."""

    def __init__(self, seconds: float = 5.0):
        self.seconds = seconds
        self.next = time.perf_counter() + seconds

    def __call__(self, done: int, total: int) -> None:
        """Take the bytes that are loaded, and all there are."""
        if time.perf_counter() >= self.next:
            say(f"loading: {done / 1e9:.1f} of {total / 1e9:.1f} GB")
            self.next = time.perf_counter() + self.seconds


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
    events = server.stream(make_requests(options), phase)
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
        self.open: dict[int, Any] = {}
        if self.alone and isinstance(prompts[0], str):
            print(prompts[0], end="", flush=True)

    def show(self, event: Any) -> None:
        """Print what is new."""
        if self.alone:
            text = event.text if event.completion.text is not None else f"{event.token_id} "
            print(text, end="", flush=True)
            return
        self.open[event.request] = event.completion
        if event.completion.finish_reason is not None:
            self._whole(event.request)

    def close(self) -> None:
        """End the line, and print what answers there are of an interrupted batch."""
        if self.alone:
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
    server = worker.submit(make_server, options, *choose_files(options)).result()
    generate(worker, server, options, lambda _: None)


def serve_together(
    worker: ThreadPoolExecutor, options: argparse.Namespace, peers: multihost.Peers
) -> None:
    """Load the model and answer, as one of several processes."""
    keep_outputs(peers)
    worker.submit(peers.join).result()
    peers.phase("load")
    files = worker.submit(agree, peers, options).result()
    server = worker.submit(make_server, options, *files, peers.place.processes).result()
    generate(worker, server, options, peers.phase)
    worker.submit(peers.close).result()


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
                peers = worker.submit(find_peers, options, errors).result()
                serve_together(worker, options, peers)
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
