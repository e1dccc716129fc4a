"""What a compiled program does: its operations, how often each runs, and what devices exchange.

XLA prints a compiled program as text, `jax.stages.Compiled.as_text()`. It is a list of computations
in braces, one operation per line; loops, conditionals and fusions name the computations that they
call. The compiler's own cost analysis counts the body of a loop once; here, a loop over 64 layers
counts 64 times.
"""

import dataclasses
import math
import re

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

_COMPUTATION = re.compile(r"(ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
# In each computation the operation marked ROOT is the last.
_OPERATION = re.compile(
    r"\s+(ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<opcode>[\w-]+)\((?P<rest>.*)$"
)
_ARRAY = re.compile(r"\b(?P<dtype>[a-z]+\d+[a-z0-9]*|pred)\[(?P<shape>[\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_DTYPES = {"pred": "bool", "s": "int", "u": "uint", "f": "float", "bf": "bfloat", "c": "complex"}

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


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of a compiled program.

    computation: the name of the list of operations that it is in.
    outputs: ((dtype, shape), ...) of what it returns, on one device; several if it is a tuple.
    times: how often it runs per run of the program. A loop whose length is unknown at compile time
        counts once; every branch counts as taken.
    source: the name that jax gives it, "jit(f)/module/add"; "" if none.
    devices: how many devices exchange data, 1 if it is not a collective.
    root: for a fusion, the opcode of the operation that makes its output; else its own opcode. A
        fusion that ends in a dynamic-update-slice writes in place.
    fused: whether it is part of a fusion, so that its full output is never in memory.
    """

    name: str
    computation: str
    opcode: str
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    times: int
    source: str
    devices: int = 1
    root: str = ""
    fused: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of its outputs."""
        return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for dtype, shape in self.outputs)


def operations(text: str) -> list[Operation]:
    """Return all operations of a compiled program that run, parts of fusions among them."""
    bodies, entry = _split(text)
    counts = _count(bodies, entry)
    roots = {name: lines[-1]["opcode"] for name, lines in bodies.items() if lines}
    found, fusions = [], set()
    for name, times in counts.items():
        for match in bodies[name]:
            operation = _operation(match, name, times)
            if operation.opcode == "fusion":
                called = _CALLED.findall(match["rest"])
                fusions |= set(called)
                operation = dataclasses.replace(operation, root=roots[called[0]])
            found.append(operation)
    return [
        dataclasses.replace(operation, fused=operation.computation in fusions)
        for operation in found
    ]


def collectives(text: str) -> list[Operation]:
    """Return the operations in which devices exchange data.

    A collective in two halves (`all-reduce-start`, `-done`) counts once, under its plain name.
    """
    found = []
    for operation in operations(text):
        opcode = operation.opcode.removesuffix("-start")
        outputs = operation.outputs
        if operation.opcode == "all-gather-start":
            outputs = outputs[len(outputs) // 2 :]  # inputs come before outputs
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


def _count(bodies: dict[str, list[re.Match[str]]], entry: str) -> dict[str, int]:
    """Return how often each computation runs, following calls from the entry."""
    counts: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        counts[name] = counts.get(name, 0) + times
        for match in bodies[name]:
            rest = match["rest"]
            called = _CALLED.findall(rest)
            for branches in _BRANCHES.findall(rest):
                called += re.findall(r"[\w.-]+", branches)
            trips = _TRIPS.search(rest)
            for inner in called:
                if inner in bodies:
                    visit(inner, times * (int(trips[1]) if trips else 1))

    visit(entry, 1)
    return counts


def _operation(match: re.Match[str], computation: str, times: int) -> Operation:
    source = re.search(r'op_name="([^"]*)"', match["rest"])
    opcode = match["opcode"]
    is_collective = opcode.removesuffix("-start") in COLLECTIVES
    return Operation(
        name=match["name"],
        computation=computation,
        opcode=opcode,
        root=opcode,
        outputs=tuple(
            (_dtype(array["dtype"]), tuple(int(n) for n in array["shape"].split(",") if n))
            for array in _ARRAY.finditer(match["type"])
        ),
        times=times,
        source=source[1] if source else "",
        devices=_group_size(match["rest"]) if is_collective else 1,
    )


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
