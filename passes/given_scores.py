"""Trained weights in `evict-kv`: their files, that they belong to the very model, and what they compute in its graph.

LookaheadKV (Ahn et al., ICLR 2026): embeddings and adapters for the rows of rows_ahead.py. TRIM-KV (Bui et al., 2025): a key fades by a
gate on what it was made from, beta = sigmoid(W2 act(W1 x) + b), and is worth beta^age. The weights themselves come through the marks of
a `dyncc.KVCache`, as inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dyncc.analysis.facts import Facts
from dyncc.errors import BadWeightFile
from dyncc.given_weights import Gates, Lookahead, load_gates, load_lookahead
from dyncc.ir import Program, emit, op_name, operands, shape
from dyncc.passes.rows_ahead import Given
from dyncc.restrict import Refusal, where
from dyncc.stamped_file import digest

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def load_given(score: str, file: str) -> Lookahead | Gates:
    """The weights that a score needs.

    Raises:
        BadWeightFile: there is no such file, or it is damaged, or is something else.
    """
    return load_lookahead(Path(file)) if score == "ahead" else load_gates(Path(file))


def check_model(given: Lookahead | Gates, program: Program, values: Sequence[Any] | None) -> list[tuple[fx.Node, Tensor]]:
    """The parameters of a program whose inputs have these `values` (None: not known).

    Raises:
        BadWeightFile: they are not those of the model that the weights belong to.
    """
    nodes = [n for n in program.graph.nodes if n.op == "placeholder"]
    told = zip(nodes, values or (), program.inputs, strict=True) if values is not None else ()
    found = [(n, v) for n, v, i in told if i.kind == "parameter" and isinstance(v, Tensor)]
    if strangers := given.model.strangers(v for _, v in found):
        problem = f"it belongs to another model, or to other weights: {strangers} of {len(found)} parameters differ"
        raise BadWeightFile(path=given.path, problem=problem, writer=_writer(given))
    return found


def rows_given(given: Lookahead, nodes: Sequence[fx.Node], parameters: Sequence[tuple[fx.Node, Tensor]]) -> Given:
    """The rows and adapters `nodes`, in the order of `Lookahead.of_layer`, by the parameters that adapters belong to."""
    by_digest = {digest(value): node for node, value in parameters}
    adapters = {}
    for number, name in enumerate(given.adapters):
        weight = by_digest.get(name)
        if weight is None or not any(op_name(u) == "linear" and operands(u)[1] is weight for u in weight.users):
            raise BadWeightFile(path=given.path, problem=f"adapter {number} meets no linear layer of the graph", writer=_writer(given))
        adapters[weight] = (nodes[1 + 2 * number], nodes[2 + 2 * number])
    return Given(nodes[0], adapters, given.scale)


def check_gates(given: Gates, facts: Facts) -> None:
    """Whether there is a gate for each attention.

    Raises:
        BadWeightFile: there are more, or fewer.
    """
    if len(given.gates) != len(facts.attention):
        problem = f"it holds {len(given.gates)} gates, the graph has {len(facts.attention)} attentions"
        raise BadWeightFile(path=given.path, problem=problem, writer=_writer(given))


def fading(given: Gates, keys: fx.Node, nodes: Sequence[fx.Node], before: fx.Node) -> fx.Node:
    """-log(beta) [B, G, T] of the keys [B, G, T, D] that a call adds, by a gate's three nodes.

    Raises:
        BadWeightFile: the gate is for another width or other heads.
        Refusal: what the keys are made from is not found.
    """
    x, activation = _source(keys), ACTIVATIONS[given.activation]
    inner, outer, _ = nodes
    wanted, found = (shape(inner)[1], shape(outer)[0]), (shape(x)[-1], shape(keys)[1])
    if wanted != found:
        problem = f"its gates are for width {wanted[0]} and {wanted[1]} key heads, the graph has {found[0]} and {found[1]}"
        raise BadWeightFile(path=given.path, problem=problem, writer=_writer(given))

    def fade(x: Tensor, inner: Tensor, outer: Tensor, bias: Tensor) -> Tensor:
        x = x.float()
        gate = F.linear(activation(F.linear(x, inner.to(x))), outer.to(x), bias.to(x))
        return F.softplus(-gate).transpose(1, 2)

    made: fx.Node = emit(before, fade, x, *nodes)
    return made


def _source(keys: fx.Node) -> fx.Node:
    """What the projection that gives the keys reads, [B, T, C]."""
    seen, stack, found = {keys}, [keys], set[fx.Node]()
    while stack:
        node = stack.pop()
        slots = operands(node)
        if op_name(node) == "linear" and slots[1].meta.get("role") == "parameter":
            found.add(slots[0])
            continue
        more = [n for n in node.all_input_nodes if n not in seen]
        seen.update(more)
        stack += more
    if len(found) != 1 or len(shape(min(found, key=lambda n: n.name))) != 3:
        raise Refusal(f"{where(keys)}: its keys come from {len(found)} projections of [batch, tokens, width]; a gate needs one")
    return found.pop()


def _writer(given: Lookahead | Gates) -> str:
    return "dyncc.save_lookahead" if isinstance(given, Lookahead) else "dyncc.save_gates"


def faded(fresh: Tensor, old: Tensor) -> Tensor:
    """How fast each key [B, G, N] fades: the last ones anew, the others as before."""
    return torch.cat([old[:, :, : old.shape[2] - fresh.shape[2]], fresh], 2)
