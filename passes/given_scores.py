"""Trained weights in `evict-kv`: their files, that they belong to the very model, and what they compute in its graph.

LookaheadKV (Ahn et al., ICLR 2026): embeddings and adapters for the rows of rows_ahead.py. TRIM-KV (Bui et al., 2025): a key fades by a
gate on what it was made from, beta = sigmoid(W2 act(W1 x) + b), and is worth beta^age. Attention-Gate (Zeng et al., 2024): a key stays by
a small attention over what the whole prompt's keys are made from, p = sigmoid(W attention(q x, k x, v x) + b). The weights themselves come
through the marks of a `dyncc.KVCache`, as inputs of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dyncc.analysis.facts import Facts
from dyncc.errors import BadWeightFile
from dyncc.given_weights import (
    AttentionGates,
    FadingGates,
    Gates,
    Lookahead,
    load_attention_gates,
    load_gates,
    load_lookahead,
)
from dyncc.ir import Program, emit, op_name, operands, shape
from dyncc.kernels.select_keys import visible_keys
from dyncc.passes.trained_rows import Given
from dyncc.restrict import Refusal, where
from dyncc.stamped_file import digest

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def load_given(score: str, file: str) -> Lookahead | FadingGates | AttentionGates:
    """The weights that a score needs.

    Raises:
        BadWeightFile: there is no such file, or it is damaged, or is something else.
    """
    if score == "ahead":
        return load_lookahead(Path(file))
    return load_attention_gates(Path(file)) if score == "gate" else load_gates(Path(file))


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


def gated(given: FadingGates | AttentionGates, keys: fx.Node, nodes: Sequence[fx.Node], mask: fx.Node | None, before: fx.Node) -> fx.Node:
    """What a gate, whose tensors are `nodes`, says of the keys [B, G, T, D] that a call adds: [B, G, T], -log(beta) or the probability p.

    Args:
        mask: that of the attention, [B or 1, 1, T, N], by whose last row pads are known; None where nothing is hidden.

    Raises:
        BadWeightFile: the gate is for another width or other heads.
        Refusal: what the keys are made from is not found.
    """
    x = _source(keys)
    wanted, found = (shape(nodes[0])[1], shape(nodes[-1])[0]), (shape(x)[-1], shape(keys)[1])
    if wanted != found:
        problem = f"its gates are for width {wanted[0]} and {wanted[1]} key heads, the graph has {found[0]} and {found[1]}"
        raise BadWeightFile(path=given.path, problem=problem, writer=_writer(given))
    compute = partial(_attend, given.heads) if isinstance(given, AttentionGates) else partial(_fade, given.activation)
    made: fx.Node = emit(before, compute, x, mask, *nodes)
    return made


def _fade(activation: str, x: Tensor, mask: Tensor | None, inner: Tensor, outer: Tensor, bias: Tensor) -> Tensor:
    x = x.float()
    gate = F.linear(ACTIVATIONS[activation](F.linear(x, inner.to(x))), outer.to(x), bias.to(x))
    return F.softplus(-gate).transpose(1, 2)


def _attend(heads: int, x: Tensor, mask: Tensor | None, *gate: Tensor) -> Tensor:
    x = x.float()
    q, k, v, outer, bias = (t.to(x) for t in gate)
    seen = None if mask is None else visible_keys(mask[:, :, -1:, mask.shape[3] - x.shape[1] :])[:, :, None]
    q, k, v = (F.linear(x, w).unflatten(2, (heads, -1)).transpose(1, 2) for w in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2).flatten(2)
    return torch.sigmoid(F.linear(mixed, outer, bias)).transpose(1, 2)


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
    writers = {Lookahead: "dyncc.save_lookahead", FadingGates: "dyncc.save_gates", AttentionGates: "dyncc.save_attention_gates"}
    return writers[type(given)]


def behind_old(fresh: Tensor, old: Tensor) -> Tensor:
    """What gates say of each key [B, G, N]: of the last ones anew, of the others as before."""
    return torch.cat([old[:, :, : old.shape[2] - fresh.shape[2]], fresh], 2)
