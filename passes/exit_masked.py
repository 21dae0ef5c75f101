"""How sure a denoising step is: the best of the positions that are still masked, for those are what the step commits.

A diffusion language model fills, in each step, the masked positions whose probability reaches a threshold, at least the surest. A sequence
whose surest masked position reaches it behind an early layer has something to commit there; one without masked positions is done.
Nie et al., Large Language Diffusion Models (LLaDA), 2025; committing by threshold: Wu et al., Fast-dLLM, 2025.
"""

from __future__ import annotations

from torch import Tensor, fx

from dyncc.analysis.axes import Axes
from dyncc.analysis.layers import Stack
from dyncc.ir import ancestors, is_tensor, op_name, operands, val
from dyncc.restrict import Refusal


def surest_masked(scores: Tensor, ids: Tensor, masked: int) -> Tensor:
    """[B]: the largest of scores [B, T] where ids [B, T] are the mask token; 1 where none is, for then nothing is left to decide.

    >>> import torch
    >>> surest_masked(torch.tensor([[0.9, 0.5], [0.9, 0.5]]), torch.tensor([[3, 7], [3, 3]]), 7).tolist()
    [0.5, 1.0]
    """
    open_ = ids == masked
    best = scores.masked_fill(~open_, float("-inf")).amax(1)
    return best.masked_fill(~open_.any(1), 1.0)


def token_ids(axes: Axes, stack: Stack) -> fx.Node:
    """The model's input [B, T] of token ids: what its embedding looks up.

    Raises:
        Refusal: there is none, or there are several.
    """
    needed = ancestors([stack.layers[0].start])
    looked_up = [operands(n)[1] for n in stack.layers[0].start.graph.nodes if n in needed and op_name(n) == "embedding"]
    given = [n for n in looked_up if n.op == "placeholder" and is_tensor(n) and len(val(n).shape) == 2]
    found = {n for n in given if axes.places(n, stack.axis) == [1]}
    if len(found) != 1:
        raise Refusal(f"masked= needs one input of token ids [batch, tokens] that is looked up in an embedding; {len(found)} are found")
    return found.pop()
