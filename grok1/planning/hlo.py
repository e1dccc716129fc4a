"""What a compiled program does: its operations, how often each runs, and what devices exchange.

XLA prints a compiled program as text, `jax.stages.Compiled.as_text()`. It is a list of computations
in braces, one operation per line; loops, conditionals and fusions name the computations that they
call. The compiler's own cost analysis counts the body of a loop once; here, a loop over 64 layers
counts 64 times.
"""

import dataclasses
import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)

# These return a tuple of their inputs, then of their outputs.
_RETURN_INPUTS = {f"{name}-start" for name in COLLECTIVES if name != "all-reduce"}

_COMPUTATION = re.compile(r"(ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
# In each computation the operation marked ROOT is the last.
_OPERATION = re.compile(
    r"\s+(ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+\d+[a-z0-9]*|pred)\[(?P<shape>[\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
# What calls computations whose operations run by themselves. All others, such as fusions and
# reductions, compute theirs as part of their own.
_RUN_OTHERS = ("while", "conditional", "call", "async-start")
# What moves no data on the device, or is only the end of an operation that began before.
_NOT_LAUNCHED = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency",
    "opt-barrier", "optimization-barrier", "domain", "partition-id", "replica-id", *_RUN_OTHERS,
}  # fmt: skip
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_DTYPES = {"pred": "bool", "s": "int", "u": "uint", "f": "float", "bf": "bfloat"}

# For a program that will not run: CPU code may be slow, but XLA's decisions are the same.
_QUICK: dict[str, str | bool] = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": True,
}


def compile_for_inspection(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compile a program that will not run, in about half the time.

    Temporaries (except some hundred bytes) and exchanges are those of the usual program; the code
    is slow.
    """
    try:
        return lowered.compile({**_QUICK, "xla_cpu_use_fusion_emitters": False})
    except jax.errors.JaxRuntimeError:  # jax 0.11 has no such option
        return lowered.compile(_QUICK)


class Loop(NamedTuple):
    """A loop: the name that jax gives it, and its length, None if unknown when compiled."""

    source: str
    length: int | None


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program.

    computation: the name of the list of operations that it is in.
    outputs: ((dtype, shape), ...) of what it returns, on one device; several if it is a tuple.
    loops: the loops that it is in, the outermost first. Every branch of a conditional counts as
        taken.
    source: the name that jax gives it, "jit(f)/module/add"; "" if none.
    devices: how many devices exchange data, 1 if it is not a collective.
    root: for a fusion, the opcode of the operation that makes its output; else its own opcode. A
        fusion that ends in a dynamic-update-slice writes in place.
    fused: whether it is part of a fusion, so that its full output is never in memory, or of another
        operation, such as the sum of a reduction.
    operands: the names of its operands, in the same computation; of a parameter, its number.
    calls: the names of the computations that it calls.
    """

    name: str
    computation: str
    opcode: str
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    loops: tuple[Loop, ...]
    source: str
    devices: int = 1
    root: str = ""
    fused: bool = False
    operands: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()

    @property
    def times(self) -> int:
        """How often it runs per run of the program; a loop of unknown length counts once."""
        return math.prod(loop.length or 1 for loop in self.loops)

    @property
    def launched(self) -> bool:
        """Whether a device runs it by itself: a kernel, a copy, or an exchange of data."""
        ending = self.opcode.endswith(("-done", "-update"))
        return not (self.fused or ending or self.opcode in _NOT_LAUNCHED)

    @property
    def nbytes(self) -> int:
        """Bytes of its outputs."""
        return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for dtype, shape in self.outputs)


def operations(text: str) -> list[Operation]:
    """Return all operations of a compiled program that run, parts of fusions among them.

    A computation that is called from several places is listed once for each.
    """
    bodies, entry = _split(text)
    roots = {name: lines[-1]["opcode"] for name, lines in bodies.items() if lines}
    found = []

    def visit(name: str, loops: tuple[Loop, ...], fused: bool) -> None:
        for match in bodies[name]:
            opcode, called = match["opcode"], [c for c in _called(match) if c in bodies]
            operation = _operation(match, name, loops)
            root = roots[called[0]] if opcode == "fusion" else opcode
            found.append(dataclasses.replace(operation, root=root, fused=fused))
            if opcode == "while":
                trips = _TRIPS.search(match["rest"])
                loop = Loop(operation.source, int(trips[1]) if trips else None)
                inside = (*loops, loop)
            else:
                inside = loops
            for inner in called:
                visit(inner, inside, fused or opcode not in _RUN_OTHERS)

    visit(entry, (), False)
    return found


def collectives(text: str) -> list[Operation]:
    """Return the operations in which devices exchange data.

    A collective in two halves (`all-reduce-start`, `-done`) counts once, under its plain name.
    """
    found = []
    for operation in operations(text):
        opcode = operation.opcode.removesuffix("-start")
        outputs = operation.outputs
        if operation.opcode in _RETURN_INPUTS:
            count = len(operation.operands)
            outputs = outputs[count : 2 * count]
        if opcode in COLLECTIVES:
            found.append(dataclasses.replace(operation, opcode=opcode, outputs=outputs))
    return found


def _split(text: str) -> tuple[dict[str, list[re.Match[str]]], str]:
    """Return the operations of each computation, and the name of the one that is run."""
    bodies: dict[str, list[re.Match[str]]] = {}
    current, entry = "", ""
    for line in text.splitlines():
        # Types may contain comments, like /*index=5*/.
        line = re.sub(r"/\*.*?\*/", "", line)
        if match := _COMPUTATION.match(line):
            current = match["name"]
            bodies[current] = []
            if line.startswith("ENTRY"):
                entry = current
        elif current and (match := _OPERATION.match(line)):
            bodies[current].append(match)
    if not entry:
        raise ValueError("expected the text of a compiled program, got one without an entry")
    return bodies, entry


def _called(match: re.Match[str]) -> list[str]:
    """Return the computations that an operation calls.

    A loop of known length needs no condition.
    """
    rest = match["rest"]
    called = _CALLED.findall(rest)
    for branches in _BRANCHES.findall(rest):
        called += re.findall(r"[\w.-]+", branches)
    if match["opcode"] == "while" and _TRIPS.search(rest):
        called = re.findall(r"body=%?([\w.-]+)", rest)
    return called


def _operation(match: re.Match[str], computation: str, loops: tuple[Loop, ...]) -> Operation:
    source = re.search(r'op_name="([^"]*)"', match["rest"])
    opcode = match["opcode"]
    is_collective = opcode.removesuffix("-start") in COLLECTIVES
    operands = _operands(match["rest"])
    return Operation(
        name=match["name"],
        computation=computation,
        opcode=opcode,
        outputs=tuple(
            (_dtype(array["dtype"]), tuple(int(n) for n in array["shape"].split(",") if n))
            for array in _ARRAY.finditer(match["type"])
        ),
        loops=loops,
        source=source[1] if source else "",
        devices=_group_size(match["rest"]) if is_collective else 1,
        operands=tuple(re.findall(r"%([\w.-]+)", operands) or operands.split()),
        calls=tuple(_called(match)),
    )


def _operands(rest: str) -> str:
    """Return the text of an operation's operands: up to the parenthesis that ends them."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            return rest[:i]
    return rest


def _dtype(name: str) -> str:
    """Return numpy's name of XLA's element type: "bf16" is "bfloat16", "s8" is "int8"."""
    letters = name.rstrip("0123456789")
    if name == "pred" or letters in ("s", "u", "f", "bf"):
        return _DTYPES[letters] + name[len(letters) :]
    return {"c64": "complex64", "c128": "complex128"}.get(name, "uint8")


def _group_size(rest: str) -> int:
    """Return how many devices a collective joins: {{0,1}}, [4,2]<=[8], or axes of a mesh."""
    groups = rest.partition("replica_groups=")[2]
    if match := re.match(r"\{\{([\d,]*)\}", groups):
        return match[1].count(",") + 1
    if match := re.match(r"\[\d+,(\d+)\]", groups):
        return int(match[1])
    if match := re.match(r"mesh\[(.*?)\].*? \{(.*?)\}", groups):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        return math.prod(sizes[name] for name in re.findall(r"'(\w+)'", match[2]))
    return 1
