"""Which inputs of whole numbers say what tokens are, and which say where they stand: by the tables in which they are looked up.

A table of learned positions looks like one of words. What tells them apart is where a graph's logits come from: a logit for each word.
"""

from __future__ import annotations

from torch import fx

from dyncc.ir import hint, is_tensor, op_name, operands, outputs, same_size, shape, val
from dyncc.restrict import Refusal, where

SAME = ("to", "alias", "view", "reshape")
LOGITS = ("to", "alias", "slice", "select", "mul", "div", "tanh")
"""What may stand between the layer that gives logits and an output: a cast, a choice of rows, a scale, a soft cap."""


def says_what(node: fx.Node, dim: int) -> bool:
    """Whether an input, with tokens along `dim`, says what they are.

    It does where it is looked up in the vocabulary, or in a table with fewer rows than there are tokens (segments), or where it is the only
    one that is looked up and no input holds embeddings.

    Raises:
        Refusal: several inputs are looked up, and nothing says which table is the vocabulary.
    """
    tables = _tables(node)
    given = [n for n in node.graph.nodes if n.op == "placeholder" and n is not node]
    others = {t for n in given for t in _tables(n)}
    embedded = any(n.meta.get("role") == "input" and is_tensor(n) and val(n).is_floating_point() and val(n).dim() == 3 for n in given)
    if not tables or any(hint(shape(t)[0]) < hint(shape(node)[dim]) for t in tables):
        return bool(tables)
    words = _vocabulary(tables | others)
    if not others:
        return not embedded or bool(words)
    if len(words) != 1:
        problem = "capture the model with its language head, whose logits tell"
        raise Refusal(f"{where(node)} is looked up in a table of words or of positions, and nothing says which; {problem}")
    return words <= tables


def _tables(node: fx.Node) -> set[fx.Node]:
    """The tables in which the numbers of a node are looked up."""
    found = {operands(u)[0] for u in node.users if op_name(u) == "embedding" and operands(u)[1] is node}
    return found.union(*(_tables(u) for u in node.users if op_name(u) in SAME))


def _vocabulary(tables: set[fx.Node]) -> set[fx.Node]:
    """Of some tables: the weight of the layer that gives logits, or where there is none, those with a row for each logit."""
    heads = {head for n in outputs(next(iter(tables)).graph) if is_tensor(n) and (head := _head(n)) is not None}
    tied = tables & {operands(head)[1] for head in heads}
    return tied or {t for t in tables if any(same_size(shape(head)[-1], shape(t)[0]) for head in heads)}


def _head(node: fx.Node) -> fx.Node | None:
    """The linear layer that an output comes from."""
    while op_name(node) in LOGITS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node if op_name(node) == "linear" else None
