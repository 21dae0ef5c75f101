"""All that the analyses know of a program, computed once and frozen, with a text dump of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dyncc.analysis.attention import AttentionRegion, find_attention, kv_sources
from dyncc.analysis.axes import Axes
from dyncc.analysis.layers import Stack, find_stacks
from dyncc.ir import Program, is_mutating, op_name, outputs, shape, source_line


@dataclass(frozen=True)
class Facts:
    """`found` of `expected` attentions (expected: the softmaxes and SDPAs in the graph), stacks of layers, KV cache inputs and outputs."""

    axes: Axes
    attention: tuple[AttentionRegion, ...]
    expected: int
    stacks: tuple[Stack, ...]
    misses: tuple[str, ...]
    kv_inputs: tuple[fx.Node, ...]
    kv_outputs: frozenset[int]
    mutated: tuple[fx.Node, ...]

    @property
    def found(self) -> int:
        return len(self.attention)

    def dump(self) -> str:
        """The facts as text, one a line."""
        lines = [f"attention: {self.found} of {self.expected}"]
        for stack in self.stacks:
            sizes = "x".join(str(a.size) for a in stack.axis)
            batch = "x".join(str(a.size) for a in stack.batch) or 1
            lines.append(f"stack: {len(stack.layers)} layers over a token axis of {sizes}, batch {batch}")
            steps = [(x.index, x.start, x.attention.out, x.middle, x.end) for x in stack.layers]
            lines += [f"  layer {index}: {' -> '.join(n.name for n in nodes)}" for index, *nodes in steps]
        for r in self.attention:
            sizes = f"q{list(shape(r.q))} k{list(shape(r.k))}"
            lines.append(f"attention {r.index}: {'fused' if r.fused else 'spelled out'} {r.out.name} {sizes} {source_line(r.out)}")
        lines += [f"kv input: {n.name}" for n in self.kv_inputs]
        lines += [f"kv output: {i}" for i in sorted(self.kv_outputs)]
        lines += [f"mutates: {n.name} ({op_name(n)})" for n in self.mutated]
        lines += [f"not understood: {m}" for m in self.misses]
        unknown = sorted({op_name(n) for n, op in self.axes.ops.items() if not op.known})
        return "\n".join(lines + ([f"ops without an axis rule: {', '.join(unknown)}"] if unknown else []))

def analyse(program: Program) -> Facts:
    """Run every analysis on a program."""
    graph = program.graph
    for node, given in zip((n for n in graph.nodes if n.op == "placeholder"), program.inputs, strict=True):
        node.meta["role"] = given.kind
    axes = Axes(graph)
    attention, expected, misses = find_attention(graph)
    stacks, more = find_stacks(graph, axes, attention)
    sources = set().union(*[kv_sources(r) for r in attention]) if attention else set()
    returned = outputs(graph)
    kv_outputs = frozenset(i for i, n in enumerate(returned) if n in sources)
    kv_inputs = tuple(n for n in graph.nodes if n.op == "placeholder" and n in sources and n.meta.get("role") == "input")
    mutated = tuple(n for n in graph.nodes if is_mutating(n))
    return Facts(axes, attention, expected, stacks, misses + more, kv_inputs, kv_outputs, mutated)
