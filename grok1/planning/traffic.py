"""How many bytes the operations of a compiled program read from a device's memory.

Counted are the operands of each operation that is launched. Where an operation takes slices of an
operand, such as one layer's weights in a loop over layers, only the slices count; what it
overwrites in place does not. Our own kernels take the stacks of all layers and read a part of them,
see KERNELS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence

from grok1.planning.hlo import Operation, operations

_SLICES = "dynamic-slice", "slice", "gather"
_UPDATES = "dynamic-update-slice", "scatter"  # in place
_SAME = "bitcast", "reshape"  # the operand itself, in another shape


def bytes_read(text: str, experts: float) -> float:
    """Return the bytes that a program reads in one run, on one device.

    experts: the share of the experts that the tokens of the step are expected to use.
    """
    program = _Program(operations(text))
    return sum(each.times * program.bytes_of(each, experts) for each in program.launched)


class _Program:
    """The operations of a program, by computation and name, and the users of their outputs."""

    def __init__(self, every: Sequence[Operation]):
        self.launched = [operation for operation in every if operation.launched]
        self.bodies: dict[str, dict[str, Operation]] = {}
        for operation in every:
            self.bodies.setdefault(operation.computation, {})[operation.name] = operation

    def bytes_of(self, operation: Operation, experts: float) -> float:
        """Return the bytes that an operation reads when it runs once."""
        body = self.bodies[operation.computation]
        given = [body[name] for name in operation.operands]
        for name, count in KERNELS.items():
            if operation.opcode == "custom-call" and f"/{name}/" in operation.source:
                return count(given, experts)
        if operation.opcode == "fusion":
            inner = self.bodies[operation.calls[0]].values()
            numbers = {int(p.operands[0]): p for p in inner if p.opcode == "parameter"}
            return sum(self._taken(numbers[i]) for i in range(len(given)))
        return sum(_taken_by(operation, operand) for operand in given)

    def _taken(self, value: Operation) -> int:
        """Return the bytes that a computation reads of one of its values."""
        users = [o for o in self.bodies[value.computation].values() if value.name in o.operands]
        taken = 0
        for user in users:
            taken += self._taken(user) if user.opcode in _SAME else _taken_by(user, value)
        return min(taken, value.nbytes)


def _taken_by(user: Operation, value: Operation) -> int:
    """Return the bytes that an operation reads of an operand."""
    first = user.operands[0] == value.name
    if user.opcode in _SLICES and first:
        return user.nbytes
    if user.opcode in _UPDATES and first:
        return 0
    return value.nbytes


# ------------------------------------------------------------------------------ our own kernels


def _layer_bytes(given: Sequence[Operation], experts: float, stacks: Collection[int]) -> float:
    """Of stacks [L, ...] one layer, and of those with experts [L, E, ...] the ones in use.

    stacks: their positions among the operands that are not int32.
    """
    read = 0.0
    operands = [each for each in given if each.outputs[0][0] != "int32"]
    for position, each in enumerate(operands):
        shape, share = each.outputs[0][1], 1.0
        if position in stacks:
            share = (experts if len(shape) == 4 and shape[1] > 1 else 1) / shape[0]
        read += share * each.nbytes
    return read


def _attention_bytes(given: Sequence[Operation], experts: float) -> float:
    """Of keys and values [L, C, S, K, H], one layer and the sequences of the queries, all full."""
    del experts
    queries, *others = (each for each in given if each.outputs[0][0] != "int32")
    read = float(queries.nbytes)
    for each in others:
        shape, share = each.outputs[0][1], 1.0
        if len(shape) == 5:
            share = queries.outputs[0][1][0] / (shape[0] * shape[1])
        read += share * each.nbytes
    return read


def _stacks(*positions: int) -> Callable[[Sequence[Operation], float], float]:
    """Return `_layer_bytes` for stacks at these positions."""
    return functools.partial(_layer_bytes, stacks=positions)


KERNELS: dict[str, Callable[[Sequence[Operation], float], float]] = {
    "grouped_product": _stacks(1, 2, 3, 4),
    "side_by_side": _stacks(1, 2, 3, 4, 5, 6),
    "gated": _stacks(1, 2, 3, 4),
    "expert_sum": _stacks(2, 3),
    "route": _stacks(2, 3, 4),
    "draw_token": _stacks(),
    "attend_cached": _attention_bytes,
    "write_and_attend": _attention_bytes,
}
