"""Iterations: the layers of a stack that run again with the same weights, found by the parameters that they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from dyncc.analysis.layers import Layer, Stack, last_residual
from dyncc.ir import Program, ancestors, descendants, shape
from dyncc.restrict import Refusal


@dataclass(frozen=True)
class Iteration:
    """Iteration `number` of a repeated block: its `layers`; the state `before` that the one in front of it gave; the state `start` that its
    first layer reads, which may be made from `before`; and the state `stop` that it gives."""

    number: int
    layers: tuple[Layer, ...]
    before: fx.Node
    start: fx.Node
    stop: fx.Node


def find_iterations(program: Program, stack: Stack) -> tuple[Iteration, ...]:
    """The iterations of the one repeated block of a stack, two or more.

    Raises:
        Refusal: no layer's weights are read again, or not in whole blocks that follow each other.
    """
    read = [_weights(program, layer) for layer in stack.layers]
    first, period, count = _repeats(read)
    found: list[Iteration] = []
    for number in range(count):
        layers = stack.layers[first + number * period : first + (number + 1) * period]
        start = layers[0].start
        found.append(Iteration(number, layers, found[-1].stop if found else start, start, _gives(stack, layers[-1])))
    return tuple(found)


def _repeats(read: Sequence[frozenset[fx.Node]]) -> tuple[int, int, int]:
    """The first layer of the repeated block, its length in layers, and how often it runs."""
    total = len(read)
    apart = [j - i for i in range(total) for j in range(i + 1, total) if read[i] & read[j]]
    if not apart:
        raise Refusal("no layer reads weights of another one, so nothing is iterated; layers that differ are routed by route-tokens")
    period = min(apart)
    again = [i for i in range(total - period) if read[i] & read[i + period]]
    whole = again == list(range(again[0], again[-1] + 1)) and len(again) % period == 0
    others = {i for i in range(total) for j in range(total) if i != j and read[i] & read[j]}
    if not whole or others != set(range(again[0], again[-1] + period + 1)):
        raise Refusal(f"weights are shared by layers {sorted(others)}, which are not one block that is run again and again")
    return again[0], period, len(again) // period + 1


def _weights(program: Program, layer: Layer) -> frozenset[fx.Node]:
    """The matrices that a layer reads."""
    inside = descendants(layer.start) & ancestors([layer.end])
    given = [n for n in program.graph.nodes if n.op == "placeholder"]
    matrices = {n for n, told in zip(given, program.inputs, strict=True) if told.kind == "parameter" and len(shape(n)) > 1}
    moving = {n for n in given if n.meta.get("role") == "input"}
    outside = {n for node in inside for n in node.all_input_nodes if n not in inside and n is not layer.start}
    return frozenset(matrices & ancestors(n for n in outside if not ancestors([n]) & moving))


def _gives(stack: Stack, layer: Layer) -> fx.Node:
    """The state behind a layer, in front of whatever makes another input of it for the next one."""
    after = [n for n in stack.spine if n in descendants(layer.attention.out)]
    order = {n: i for i, n in enumerate(layer.end.graph.nodes)}
    return last_residual([n for n in after if order[n] <= order[layer.end]], layer.start)
