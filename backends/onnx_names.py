"""Names of an ONNX graph's inputs and outputs, in the convention of transformers and Optimum.

Inputs are called as the model calls its arguments, outputs as the fields of its result; keys and values of a cache are
`past_key_values.N.key` and `present.N.key`, N counting the layers that keep any.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from dyncc.analysis.attention import CARRY
from dyncc.analysis.facts import Facts
from dyncc.capture import Signature
from dyncc.ir import Program, is_tensor, op_name, operands, outputs


@dataclass(frozen=True)
class Names:
    """One name a tensor input and a tensor output, and the names of the sizes that vary."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    sizes: dict[str, str]


def names_of(program: Program, signature: Signature, facts: Facts) -> Names:
    """The names for a program's flat inputs and outputs; all of them differ."""
    nodes = [n for n in program.graph.nodes if n.op == "placeholder"][len(signature.state) :]
    returned = [outputs(program.graph)[i] for i in range(signature.results) if i not in {j for _, j in signature.copies}]
    paths = _paths(signature, len(returned))
    given = dict(zip(nodes, signature.names, strict=True))
    taken = dict(enumerate(paths))
    layer = 0
    for region in facts.attention:
        found = [(kind, *_cache(n, nodes, returned)) for kind, n in (("key", region.k), ("value", region.v))]
        for kind, past, present in found:
            if past is not None:
                given[past] = f"past_key_values.{layer}.{kind}"
            if present is not None:
                taken[present] = f"present.{layer}.{kind}"
        layer += any(past is not None or present is not None for _, past, present in found)
    kept = [taken[i] for i, n in enumerate(returned) if isinstance(n, fx.Node)]
    inputs = _distinct([given[n] for n in nodes], set())
    return Names(tuple(inputs), tuple(_distinct(kept, set(inputs))), _sizes(nodes, inputs))


def _paths(signature: Signature, count: int) -> list[str]:
    """The place of every result in what the model returns: `last_hidden_state`, or `output_0` where it has no name."""
    tree = pytree.tree_unflatten(list(range(count)), signature.out_spec)
    found = []
    for number, (path, _) in enumerate(pytree.tree_leaves_with_path(tree)):
        words = [str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", "")))) for step in path]
        named = any(not word.isdigit() for word in words)
        found.append("_".join(words) if named else f"output_{number}")
    return found


def _cache(node: fx.Node, inputs: list[fx.Node], returned: list[Any]) -> tuple[fx.Node | None, int | None]:
    """The input that holds the past of keys (or values) and the position of the output that holds them after the call."""
    past, present = None, None
    seen, stack = set(), [node]
    while stack:
        n = stack.pop()
        if n in seen:
            continue
        seen.add(n)
        if n in returned and present is None:
            present = returned.index(n)
        if n in inputs:
            past = n
        elif n.op == "call_function" and op_name(n) in CARRY:
            stack.extend(m for m in operands(n) if is_tensor(m))
    return past, present


def _distinct(names: list[str], used: set[str]) -> list[str]:
    found: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in used or candidate in found:
            candidate, number = f"{name}_{number}", number + 1
        found.append(candidate)
    return found


def _sizes(nodes: list[fx.Node], names: list[str]) -> dict[str, str]:
    """Symbol -> a readable name: a first dimension is the batch, the second last of a past its length, any other a sequence."""
    found: dict[str, str] = {}
    for node, name in zip(nodes, names, strict=True):
        for dim, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, torch.SymInt) or not size.node.expr.is_symbol or str(size) in found:
                continue
            kind = "batch_size" if dim == 0 else "past_sequence_length" if name.startswith("past_key_values.") else "sequence_length"
            taken = list(found.values())
            found[str(size)] = _distinct([kind], set(taken))[0]
    return found
