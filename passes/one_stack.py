"""The stack of layers that a pass with layer numbers means: a model's only one."""

from __future__ import annotations

from dyncc.analysis.facts import Facts
from dyncc.analysis.layers import Stack, find_row_stack
from dyncc.ir import Program
from dyncc.restrict import Refusal


def one_stack(program: Program, facts: Facts) -> Stack:
    """The stack of layers of a model that has one, be it of a step of one row.

    Raises:
        Refusal: there is none, or more, or its last layer was cut down to some rows.
    """
    step = None if facts.stacks else find_row_stack(program.graph, facts.axes, facts.attention)
    if step is not None:
        return step
    if not facts.stacks:
        raise Refusal(facts.misses[0] if facts.misses else "no attention layers were found")
    if len(facts.stacks) > 1:
        raise Refusal(f"the model has {len(facts.stacks)} stacks of layers, and layer numbers do not say which one is meant")
    stack = facts.stacks[0]
    if stack.tail:
        raise Refusal("the last layer was already cut down to the rows that are read; put this pass in front of slice-last-token")
    return stack
