"""How many bytes the operations of a compiled program read from a device's memory.

Counted are the operands of each operation that is launched. Where an operation takes slices of an
operand, such as one layer's weights in a loop over layers, only the slices count; what it
overwrites in place does not. Our own kernels take the stacks of all layers and read a part of them,
see `_KERNELS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
        for name, count in _KERNELS.items():
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


def _product_bytes(given: Sequence[Operation], experts: float) -> float:
    """Of int8 [L, E, I, O] and scales [L, E, J, O], one layer and the experts in use."""
    x, *weights = (each for each in given if each.outputs[0][0] != "int32")
    groups = weights[0].outputs[0][1][1]
    share = experts if groups > 1 else 1
    return x.nbytes + sum(share * w.nbytes / w.outputs[0][1][0] for w in weights)


def _attention_bytes(given: Sequence[Operation], experts: float) -> float:
    """Of keys and values [L, C, S, K, H], one layer and the sequences of the queries, all full."""
    del experts
    _, _, _, rows, keys, values, mask = given
    layers, sequences, *_ = keys.outputs[0][1]
    share = rows.outputs[0][1][0] / (layers * sequences)
    return rows.nbytes + mask.nbytes + share * (keys.nbytes + values.nbytes)


_KERNELS: dict[str, Callable[[Sequence[Operation], float], float]] = {
    "grouped_product": _product_bytes,
    "attend_cached": _attention_bytes,
}
