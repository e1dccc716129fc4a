"""The arguments of run.py, and checks of their combinations before anything is loaded."""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import ipaddress
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence

import grok1
from grok1.cli.console import (
    Parser,
    byte_rate,
    byte_size,
    given_path,
    input_waits,
    mesh_sizes,
    number,
    say,
    token_ids,
    write_out,
)
from grok1.cli.options import Line, Options
from grok1.parallel import multihost
from grok1.planning.accelerators import ACCELERATORS
from grok1.serving.request_limits import (
    CHUNKS,
    DEFAULT_SEED,
    DEFAULT_TEMPERATURE,
    LARGEST_BIAS,
    LARGEST_PENALTY,
    MOST_LOGPROBS,
    MOST_SAMPLES,
    SERVED_CHUNK,
)

DEFAULT_PROMPT = "Once upon a time"
API_KEY = "GROK_API_KEY"  # in the environment
MOST_WAITING, GRACE = 256, 30.0
OWN_SETTINGS = {  # options that requests to a server set themselves -> their fields
    "--max-tokens": "max_len",
    "--truncate": "truncate",
    **{
        f"--{name.replace('_', '-')}": name
        for name in (
            *("min_len", "stop", "seed", "num_samples", "temperature", "top_k", "min_p"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias"),
        )
    },
    "--top-p": "nucleus_p",
    "--top-logprobs": "top_logprobs",
}
# Names of these options in llama.cpp, Hugging Face and vLLM.
ELSEWHERE = {
    "-b": "--chunk",
    "--batch-size": "--chunk",
    "-c": "--context",
    "--ctx-size": "--context",
    "--max-model-len": "--context",
    "-f": "--prompts-file",
    "--file": "--prompts-file",
    "--max-num-seqs": "--batch",
    "--port": "--serve",
    "--host": "--serve",
    "--n-predict": "--max-tokens",
    "--predict": "--max-tokens",
    "--num-return-sequences": "--num-samples",
    "-r": "--stop",
    "--reverse-prompt": "--stop",
    "-s": "--seed",
    "--tensor-parallel-size": "--mesh",
}
DESCRIPTION = """\
Sample text from Grok-1, or from the small demo model that comes with it.

  %(prog)s "Once upon a time" --temperature 0.7 --seed 1
  %(prog)s --interactive
  %(prog)s --model checkpoints --mesh 1,8 --prompts-file prompts.jsonl --output answers.jsonl"""


def coordinator(text: str) -> str:
    """Check "HOST:PORT"."""
    try:
        multihost.host_and_port(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def logit_bias(text: str) -> tuple[str, float]:
    """Parse "ID:X"; the id stays a string, as in JSON."""
    token, colon, value = text.rpartition(":")
    if not (colon and re.fullmatch("[0-9]{1,9}", token)):
        expected = "a token id and a number such as 5:-2.5"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return str(int(token)), number(float, -LARGEST_BIAS, LARGEST_BIAS)(value)


def on_or_off(text: str) -> bool:
    """Parse "on" or "off"."""
    if text not in ("on", "off"):
        raise argparse.ArgumentTypeError(f"expected on or off, got {text!r}")
    return text == "on"


def parse_arguments(arguments: Sequence[str] | None = None) -> Options:
    """Parse the command line; exit with status 2 and an error message if it is invalid."""
    # Started as a script by Python, or as an installed command.
    script = os.path.basename(sys.argv[0]) == "run.py"
    parser = Parser(
        prog="python run.py" if script else None,
        usage="%(prog)s [options] [PROMPT ...]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.elsewhere, parser.words = ELSEWHERE, "more_prompts"
    parser.add_argument("--version", action="store_true", help="print the versions and exit")
    for add_group in (
        add_model, add_prompts, add_sampling, add_output, add_machine, add_serving, add_plan,
        add_distributed,
    ):  # fmt: skip
        add_group(parser)
    given = parser.parse_args(arguments)
    if given.version:
        write_out(version())
        sys.exit(0)
    prompts = [*(given.prompts or []), *given.more_prompts]
    if "-" in given.more_prompts:
        parser.error("-: to read prompts from standard input, use --prompts-file -")
    check_distributed(parser, given)
    check_prompts(parser, given, prompts)
    check_routing(parser, given)
    check_plan(parser, given, prompts)
    check_serving(parser, given, prompts)
    return as_options(given, prompts)


def as_options(given: argparse.Namespace, prompts: Sequence[str | list[int]]) -> Options:
    """Return the parsed arguments as Options."""
    if given.interactive or given.serve:
        # Stands for the prompts to come, so that settings are checked before loading weights.
        lines = [Line([0], None, {}, "the options")]
    else:
        asked = prompts or ([] if given.prompts_file else [DEFAULT_PROMPT])
        if asked == [DEFAULT_PROMPT] and not given.plan and input_waits():
            say("standard input is ignored; use --prompts-file - to read prompts, one per line")
        lines = [Line(x, None, {}, f"request {number}") for number, x in enumerate(asked, 1)]
    values = vars(given) | {
        "lines": tuple(lines),
        "stop": tuple(given.stop or ()),
        "cors": tuple(given.cors or ()),
        "logit_bias": dict(given.logit_bias) if given.logit_bias else None,
        "streamed": not given.json and given.output is None,
    }
    return Options(**{field.name: values[field.name] for field in dataclasses.fields(Options)})


def version() -> str:
    """Return the output of --version."""
    try:
        jax = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        jax = "none"
    return f"grok-1-jax {grok1.__version__} (jax {jax})"


def add_model(parser: Parser) -> None:
    """Add the options of the model."""
    add = parser.add_argument_group("model").add_argument
    add(
        "-m",
        "--model",
        "--checkpoint",
        dest="checkpoint",
        type=given_path,
        metavar="DIR",
        help="checkpoint directory; by default checkpoints/ if it contains one, else the demo",
    )
    add(
        "--tokenizer",
        type=given_path,
        metavar="FILE",
        help="SentencePiece model; by default DIR/tokenizer.model, else the demo's",
    )
    add(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="activations; by default float32 on a CPU, bfloat16 elsewhere",
    )


def add_sampling(parser: Parser) -> None:
    """Add the options of sampling and of the end of answers."""
    add = parser.add_argument_group("sampling").add_argument
    add_length(add)
    add_filters(add)
    add_penalties(add)


def add_length(add: Callable[..., argparse.Action]) -> None:
    """Add the options of the number and length of answers."""
    add(
        "-n",
        "--max-tokens",
        "--max-len",
        dest="max_len",
        type=number(int, 1, 2**31 - 1),
        metavar="N",
        help="most tokens to generate after the prompt (200, or as many as fit the context)",
    )
    add(
        "--min-len",
        type=number(int, 0, 2**31 - 1),
        default=0,
        metavar="N",
        help="let no end-of-sequence token or stop string end an answer before N tokens (0)",
    )
    add(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end the answer before this text; \\n is not a newline (in most shells $'\\n' is); "
        "may be repeated",
    )
    add(
        "--seed",
        type=number(int, 0, 2**32 - 1, " (--seed $RANDOM: a new one each time)"),
        metavar="N",
        help=f"the same seed gives the same text ({DEFAULT_SEED}; with --interactive, by default a "
        "new one for each answer)",
    )
    add(
        "--num-samples",
        type=number(int, 1, MOST_SAMPLES),
        default=1,
        metavar="N",
        help="number of answers to each prompt, which is read once; answer i uses seed + i (1)",
    )


def add_filters(add: Callable[..., argparse.Action]) -> None:
    """Add the options of the sampling filters."""
    add(
        "--temperature",
        "--temp",
        type=number(float, 0, 1e6, " (0: the most probable token)"),
        default=DEFAULT_TEMPERATURE,
        metavar="X",
        help=f"0 takes the most probable token ({DEFAULT_TEMPERATURE})",
    )
    add(
        "--top-k",
        type=number(int, 0, 2**31 - 1, " (0: no limit)"),
        default=0,
        metavar="N",
        help="draw from the N most probable tokens (0: no limit)",
    )
    add(
        "--top-p",
        "--nucleus-p",
        dest="nucleus_p",
        type=number(float, sys.float_info.min, 1),
        default=1.0,
        metavar="X",
        help="draw from the fewest tokens whose total probability reaches X (1)",
    )
    add(
        "--min-p",
        type=number(float, 0, 1),
        default=0.0,
        metavar="X",
        help="draw from tokens at least X times as probable as the most probable one (0)",
    )


def add_penalties(add: Callable[..., argparse.Action]) -> None:
    """Add the options that change logits."""
    add(
        "--repetition-penalty",
        "--repeat-penalty",
        type=number(float, 1 / LARGEST_PENALTY, LARGEST_PENALTY),
        default=1.0,
        metavar="X",
        help="above 1, tokens of the prompt and the answer are repeated less often (1)",
    )
    add(
        "--presence-penalty",
        type=number(float, -LARGEST_BIAS, LARGEST_BIAS),
        default=0.0,
        metavar="X",
        help="above 0, tokens of the answer are repeated less often (0)",
    )
    add(
        "--frequency-penalty",
        type=number(float, -LARGEST_BIAS, LARGEST_BIAS),
        default=0.0,
        metavar="X",
        help="as --presence-penalty, but once for each time a token is in the answer (0)",
    )
    add(
        "--logit-bias",
        type=logit_bias,
        action="append",
        metavar="ID:X",
        help="add X to the logit of a token; --json shows the ids; may be repeated",
    )


def add_output(parser: Parser) -> None:
    """Add the options of the output."""
    add = parser.add_argument_group("output").add_argument
    add("--json", action="store_true", help="print each answer as one line of JSON")
    add(
        "--top-logprobs",
        type=number(int, 0, MOST_LOGPROBS),
        default=0,
        metavar="N",
        help="also report the N most probable tokens with each token, in JSON (0)",
    )
    add(
        "--output",
        type=given_path,
        metavar="FILE",
        help="write each finished answer to FILE as one line of JSON, and print none",
    )
    add(
        "--resume",
        action="store_true",
        help="continue an interrupted --output: generate only the answers missing from it",
    )
    add(
        "--stats",
        action="store_true",
        help="print latency, speed, slots used and the host's share of the time at the end",
    )
    add(
        "--show-routing",
        action="store_true",
        help="show the experts of each token of the prompt and its answer, in each layer",
    )


def add_machine(parser: Parser) -> None:
    """Add the options of the devices, batch and context."""
    count = number(int, 1, 2**31 - 1)
    add = parser.add_argument_group("machine").add_argument
    add(
        "--mesh",
        type=mesh_sizes,
        metavar="DATA,MODEL",
        help="number of devices that share the batch, and number of devices that share heads and "
        "hidden widths (1,1); Grok-1 on 80 GB GPUs needs at least 1,8",
    )
    add(
        "--batch",
        "--slots",
        dest="batch",
        type=count,
        metavar="N",
        help="sequences to serve at once; by default 1, 2, 4 or 8, by the number of answers",
    )
    add(
        "--context",
        type=count,
        metavar="N",
        help="context of N tokens, prompt and answer together; by default the model's",
    )
    add(
        "--chunk",
        type=count,
        metavar="N",
        help=f"read prompts in chunks of at most N tokens ({CHUNKS[-1]}; {SERVED_CHUNK} with "
        "--serve on a CPU)",
    )
    add(
        "--prefix-cache",
        type=on_or_off,
        metavar="on|off",
        default=True,
        help="whether a prompt takes over the chunks that it shares with an earlier one (on)",
    )
    add(
        "--no-compile-cache",
        dest="compile_cache",
        action="store_false",
        help="do not save compiled programs, nor use saved ones",
    )
    add(
        "--no-kernels",
        dest="kernels",
        action="store_false",
        help="use only JAX operations: slower, but needs no C++ compiler on a CPU",
    )


def add_prompts(parser: Parser) -> None:
    """Add the options of prompts."""
    group = parser.add_argument_group("prompts")
    add = group.add_argument
    add(
        "more_prompts",
        nargs="*",
        metavar="PROMPT",
        help=f"texts to continue, as with --prompt; by default {DEFAULT_PROMPT!r}",
    )
    add(
        "-p",
        "--prompt",
        dest="prompts",
        action="append",
        metavar="TEXT",
        help="text to continue; may be repeated",
    )
    add(
        "--prompt-ids",
        dest="prompts",
        action="append",
        type=token_ids,
        metavar='"5 6 7"',
        help="token ids to continue, without a tokenizer; may be repeated",
    )
    add(
        "--prompts-file",
        type=lambda text: text if text == "-" else str(given_path(text)),
        metavar="FILE",
        help="more prompts, one per line: text, or JSON objects if FILE ends in .jsonl, with the "
        "key prompt and optionally id, temperature and other fields of Request; - is standard "
        "input",
    )
    add(
        "--prompts-format",
        choices=("text", "jsonl"),
        help="format of --prompts-file, whatever its name",
    )
    add(
        "--truncate",
        choices=("left",),
        help="keep only the newest tokens of a prompt that is too long",
    )
    add(
        "-i",
        "--interactive",
        action="store_true",
        help="answer prompts as they are typed, each independently; Ctrl-C stops an answer, Ctrl-D "
        "exits, /help shows more",
    )


def check_prompts(parser: Parser, options: argparse.Namespace, prompts: Sequence[object]) -> None:
    """Exit with status 2 if options of prompts and answers are incompatible."""
    if options.prompts_format and options.prompts_file is None:
        parser.error("--prompts-format needs --prompts-file")
    if options.top_logprobs and not (options.json or options.output):
        parser.error("--top-logprobs needs --json or --output")
    if options.output is not None and str(options.output) == "-":
        parser.error("--output -: without --output answers are printed, with --json as JSON lines")
    if options.resume and options.output is None:
        parser.error("--resume needs --output, the file to continue")
    others = {
        "--prompt": prompts,
        "--prompts-file": options.prompts_file,
        "--output": options.output,
        "--json": options.json,
        "--distributed": options.distributed,
        "--plan": options.plan,
        "--num-samples": options.num_samples > 1,
    }
    if options.interactive:
        refuse(parser, "--interactive", others, "prompts are typed, one answer printed for each")


def check_routing(parser: Parser, options: argparse.Namespace) -> None:
    """Exit with status 2 if --show-routing is given with an incompatible option."""
    others = {
        "--json": options.json,
        "--output": options.output,
        "--interactive": options.interactive,
        "--distributed": options.distributed,
        "--plan": options.plan,
    }
    if options.show_routing:
        refuse(parser, "--show-routing", others, "it prints a text table")


def refuse(parser: Parser, name: str, others: Mapping[str, object], reason: str) -> None:
    """Exit with status 2 if one of `others` was given together with the option `name`."""
    given = [other for other, value in others.items() if value]
    if given:
        parser.error(f"{name} and {given[0]} do not go together: {reason}")


def add_serving(parser: Parser) -> None:
    """Add the options of a server."""
    add = parser.add_argument_group(
        "a server for clients of OpenAI's API (docs/serving.md); needs requirements-serve.txt"
    ).add_argument
    add(
        "--serve",
        type=address,
        metavar="[HOST:]PORT",
        help="answer requests by HTTP, by default of this machine only; --slots sequences at once",
    )
    add(
        "--api-key",
        type=api_key,
        default=os.environ.get(API_KEY) or None,
        metavar="KEY",
        help=f"refuse requests without this key; better in the environment, as {API_KEY}, since "
        "other users see command lines",
    )
    add("--no-auth", action="store_true", help="let a HOST other than this machine need no key")
    add(
        "--queue",
        dest="most_waiting",
        type=number(int, 0, 2**20),
        default=MOST_WAITING,
        metavar="N",
        help=f"refuse requests when N answers wait for a slot ({MOST_WAITING})",
    )
    add(
        "--grace",
        type=number(float, 0, 1e6, " (seconds)"),
        default=GRACE,
        metavar="SECONDS",
        help=f"at SIGTERM or Ctrl-C, time for unfinished requests to finish ({GRACE:g})",
    )
    add(
        "--cors",
        type=origin,
        action="append",
        metavar="ORIGIN",
        help="let scripts of web pages from this origin use the server; may be repeated",
    )
    add(
        "--chat-template",
        type=given_path,
        metavar="FILE",
        help="Jinja template that makes a prompt of the messages of a chat",
    )


def address(text: str) -> tuple[str, int]:
    """Parse "PORT" or "HOST:PORT"."""
    host, _, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 2**16:
        expected = "a port from 1 to 65535, or HOST:PORT"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return host or "127.0.0.1", int(port)


def api_key(text: str) -> str:
    """Check a key, which headers have to hold."""
    if not (text.isascii() and text.isprintable() and text.strip() == text != ""):
        raise argparse.ArgumentTypeError("expected printable ASCII characters, got others or none")
    return text


def origin(text: str) -> str:
    """Check the origin of web pages."""
    if text != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s*]+", text):
        expected = "SCHEME://HOST[:PORT], such as http://localhost:3000, or *"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return text


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach a host."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def check_serving(parser: Parser, options: argparse.Namespace, prompts: Sequence[object]) -> None:
    """Exit with status 2 if options of a server are incompatible."""
    if options.serve is None:
        needing = {
            "--no-auth": options.no_auth,
            "--chat-template": options.chat_template,
            "--cors": options.cors,
            "--api-key": options.api_key and options.api_key != os.environ.get(API_KEY),
        }
        if given := [name for name, value in needing.items() if value]:
            parser.error(f"{given[0]} needs --serve")
        return
    others = {
        "--prompt": prompts,
        "--prompts-file": options.prompts_file,
        "--interactive": options.interactive,
    }
    refuse(parser, "--serve", others, "prompts come by HTTP")
    outputs = {
        "--output": options.output,
        "--json": options.json,
        "--show-routing": options.show_routing,
        "--stats": options.stats,
    }
    refuse(parser, "--serve", outputs, "answers, routing (/inspect) and /metrics go by HTTP")
    refuse(parser, "--serve", {"--plan": options.plan}, "a plan answers nothing")
    if options.distributed:
        refuse(parser, "--serve", {"--distributed": True}, "one process takes the requests")
    own = {
        name: getattr(options, field) != parser.get_default(field)
        for name, field in OWN_SETTINGS.items()
    }
    refuse(parser, "--serve", own, "each request has its own settings")
    if not (is_loopback(options.serve[0]) or options.api_key or options.no_auth):
        parser.error(
            f"--serve {options.serve[0]}: expected --api-key, or {API_KEY} in the environment, for "
            "an address that others can reach, got none; --no-auth lets everyone in"
        )


def add_plan(parser: Parser) -> None:
    """Add the options of a plan."""
    add = parser.add_argument_group(
        "a plan, without weights or GPUs; uses --mesh, --batch, --context, --dtype, --checkpoint "
        "and --json"
    ).add_argument
    add(
        "--plan",
        action="store_true",
        help="show whether the model fits on a mesh, by default the smallest possible one, and the "
        "cost of a token",
    )
    add(
        "--accelerator",
        choices=tuple(ACCELERATORS),
        help="compile for this GPU with NVIDIA's compiler, which needs no GPU but three packages "
        "(docs/performance.md)",
    )
    add(
        "--device-memory",
        type=byte_size,
        metavar="SIZE",
        help="memory of each device (that of --accelerator, or 80GiB)",
    )
    add(
        "--bandwidth",
        type=byte_rate,
        metavar="RATE",
        help="memory bandwidth of each device (that of --accelerator, or 3.35TB/s)",
    )
    add(
        "--experts",
        choices=("int4",),
        help="plan for experts of 4 bits, as checkpoint.py convert --experts int4 makes them",
    )
    add(
        "--mapped",
        action="store_true",
        help="plan for one CPU that uses files of the mapped form in place: what memory can hold, "
        "and the time that the disk takes for a token",
    )
    add(
        "--shard-activations",
        action="store_true",
        help="with --accelerator, plan steps that split the residual stream, as published",
    )
    add(
        "--save-programs",
        type=given_path,
        metavar="DIR",
        help="with --accelerator, write the compiled programs to DIR, as text",
    )


def check_plan(parser: Parser, options: argparse.Namespace, prompts: Sequence[object]) -> None:
    """Exit with status 2 if --plan is given with an incompatible option."""
    others = {
        "--prompt": prompts,
        "--prompts-file": options.prompts_file,
        "--output": options.output,
        "--distributed": options.distributed,
    }
    if options.plan:
        refuse(parser, "--plan", others, "a plan is made by one process, without prompts")
    given = {name: getattr(options, name) for name in ("accelerator", "experts", "mapped")}
    if not options.plan and any(given.values()):
        parser.error(f"--{next(name for name, value in given.items() if value)} needs --plan")
    if options.mapped:
        others = {
            "--accelerator": options.accelerator,
            "--mesh": options.mesh,
            "--device-memory": options.device_memory,
            "--bandwidth": options.bandwidth,
        }
        refuse(parser, "--mapped", others, "files are used in place by one CPU")
    if not options.accelerator and (options.save_programs or options.shard_activations):
        name = "--save-programs" if options.save_programs else "--shard-activations"
        parser.error(f"{name} needs --accelerator")


def add_distributed(parser: Parser) -> None:
    """Add the options of runs with several processes."""
    add = parser.add_argument_group("several processes, usually one per host").add_argument
    add(
        "--distributed",
        action="store_true",
        help="run as one of several processes; SLURM, GKE or MPI provide the rest unless given",
    )
    add(
        "--coordinator",
        type=coordinator,
        metavar="HOST:PORT",
        help="address of process 0, reachable from all others",
    )
    add(
        "--num-processes",
        type=number(int, 1, 2**20),
        metavar="N",
        help="number of processes, all started with the same coordinator",
    )
    add(
        "--process-id",
        type=number(int, 0, 2**20),
        metavar="I",
        help="index of this process, from 0",
    )
    seconds = number(float, 2, 1e6, " (seconds)")
    add(
        "--peer-timeout",
        type=seconds,
        default=multihost.PEER_TIMEOUT,
        metavar="SECONDS",
        help=f"end all processes if one is silent for this long ({multihost.PEER_TIMEOUT:g})",
    )
    add(
        "--join-timeout",
        type=seconds,
        default=multihost.JOIN_TIMEOUT,
        metavar="SECONDS",
        help=f"how long to wait for all processes to connect ({multihost.JOIN_TIMEOUT:g})",
    )


def check_distributed(parser: Parser, options: argparse.Namespace) -> None:
    """Exit with status 2 if the options of several processes are incompatible."""
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
        parser.error(f"{given[0]} needs {' and '.join(missing)}; give all of them or none")
    if given and options.process_id >= options.num_processes:
        parser.error(
            f"argument --process-id: expected an integer from 0 to {options.num_processes - 1}, as "
            f"there are {options.num_processes} processes, got {options.process_id}"
        )
