"""The model that a fit is made for: its graph, captured once, with its layers and what it returns; and its runs on batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dyncc.analysis.facts import Facts, analyse
from dyncc.analysis.layers import Stack
from dyncc.call_inputs import flat_example
from dyncc.capture import CaptureError, Signature, from_model
from dyncc.errors import BadCalibration, InputMismatch
from dyncc.fitting.calibration import Batch
from dyncc.fitting.replay import replay
from dyncc.ir import Program, descendants, is_tensor, outputs, shape, val
from dyncc.passes.exit_heads import At, find_head
from dyncc.passes.padding import padding_input, real_rows
from dyncc.passes.reads import output_reads
from dyncc.restrict import Refusal
from dyncc.surface import check_surface


@dataclass(frozen=True, eq=False)
class Subject:
    """`states`: the residual stream in front of layer 0, 1, ... and behind the last one; `output`: the first output behind it that is no
    cache; `real`: the node [B, T] that says which rows are no padding, or None; `at`: the row that the head reads, or None."""

    program: Program
    signature: Signature
    stack: Stack
    states: tuple[fx.Node, ...]
    output: fx.Node
    real: fx.Node | None
    at: At | None

    @property
    def layers(self) -> int:
        return len(self.stack.layers)

    @property
    def device(self) -> torch.device:
        """Where the residual stream is computed, and so the sums over it."""
        found: torch.device = val(self.states[0]).device
        return found

    @property
    def width(self) -> int:
        return int(shape(self.states[0])[-1])

    def inputs(self, batch: Batch, number: int) -> dict[fx.Node, Any]:
        """The values of the graph's placeholders for a batch.

        Raises:
            BadCalibration: it has other sizes than the first one.
        """
        try:
            flat = flat_example(self.program, self.signature, batch.args, batch.kwargs)
        except (InputMismatch, IndexError) as error:
            problem = f"batch {number} is not like the first one: {error}; cut the data into batches of one size"
            raise BadCalibration(problem=problem) from error
        return dict(zip((n for n in self.program.graph.nodes if n.op == "placeholder"), flat, strict=True))

    def run(self, known: dict[fx.Node, Any], wanted: Sequence[fx.Node]) -> dict[fx.Node, Any]:
        """The values of some nodes."""
        return replay(self.program.graph, known, wanted)

    def row(self, known: dict[fx.Node, Any], state: Tensor) -> Tensor:
        """[B, C]: the row of a state [B, T, C] that `exit-early` scores a sequence by."""
        if self.at is None:
            return state.mean(1)
        if isinstance(self.at, int):
            return state[:, self.at]
        return state[torch.arange(len(state), device=state.device), self.run(known, [self.at])[self.at]]

    def rows(self, value: Tensor, real: Tensor | None) -> Tensor:
        """[B, T, C] or [B, C] as rows [N, C], without those that are padding."""
        keep = real is not None and value.dim() == 3 and value.shape[:2] == real.shape
        return value[real] if keep else value.flatten(0, -2)


def subject_of(model: nn.Module, first: Batch) -> Subject:
    """The model's graph at the sizes of the first batch.

    Raises:
        BadCalibration: the model does not take the batch, has no layers that dyncc finds, or writes to its state.
        UnsupportedModel: it carries what dyncc does not understand.
    """
    check_surface(model)
    try:
        program, signature = from_model(model, first.args, first.kwargs)
    except CaptureError as error:
        raise BadCalibration(problem=f"the model does not take the first batch: {error}") from error
    facts = analyse(program)
    if not facts.stacks:
        raise BadCalibration(problem=f"no layers are found in the model: {facts.misses[0] if facts.misses else 'it has no attention'}")
    if facts.mutated:
        raise BadCalibration(problem=f"the model writes to its state in place ({facts.mutated[0].name}); call it without a cache")
    stack = facts.stacks[0]
    if stack.dim != 1:
        raise BadCalibration(problem="the token axis is not dimension 1 of the residual stream")
    last = stack.layers[-1].end
    behind = descendants(last) | {last}
    found = [n for i, n in enumerate(outputs(program.graph)) if i not in facts.kv_outputs and n in behind and is_tensor(n)]
    found = [n for n in found if val(n).is_floating_point() and len(shape(n)) in (2, 3)]
    if not found:
        raise BadCalibration(problem="no output [batch, ..., channels] of the model comes from its last layer")
    try:
        source = padding_input([x.attention for x in stack.layers], facts.axes, stack.axis, stack.batch)
    except Refusal as refusal:
        raise BadCalibration(problem=str(refusal)) from refusal
    at = _row_read(program, facts, stack)
    real = None if source is None else real_rows(last.next, source, last)
    return Subject(program, signature, stack, (*(x.start for x in stack.layers), last), found[0], real, at)


def _row_read(program: Program, facts: Facts, stack: Stack) -> At | None:
    """The row that `exit-early` would score a sequence by, as it finds it; None: the mean of all."""
    try:
        head = find_head(program.graph, facts.axes, stack, output_reads(program, facts, stack))
    except Refusal:
        return None
    return head.at if head.read is not None else None


def all_finite(value: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    return bool(torch.isfinite(value).all())
