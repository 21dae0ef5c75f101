"""Calibration for FASA (Wang et al., FASA: Frequency-Aware Sparse Attention, ICLR 2026): which rotary pairs of a head tell its best keys.

CA(pair) = |best keys by the whole q.k and by the pair's share of it alone| / how many are best, mean over rows of the given texts. Rotary
embeddings turn pairs of channels, each at a speed of its own; the sum of all pairs' shares is q.k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from dyncc.analysis.attention import AttentionRegion, find_attention
from dyncc.capture import from_model
from dyncc.decoding import Prefill
from dyncc.errors import BadCalibration, OutputNotWritable
from dyncc.ir import Program, argument, op_name, operands, shape
from dyncc.kernels.select_keys import pair_channels
from dyncc.pair_order import PairOrder
from dyncc.stamped_file import digest

Layout = Literal["half", "interleaved"]
PROJECTIONS = ("linear", "addmm", "mm", "matmul")


@torch.no_grad()
def calibrate_pairs(
    model: nn.Module, texts: Iterable[Tensor], path: str | Path, *, top: int = 256, rows: int = 16, layout: Layout | None = None
) -> Path:
    """Write the file that `select-kv{score=pairs file=...}` and the recipe `fasa` take; returns its path.

    Args:
        model: a decoder of transformers, in the precision it will run in, its attention SDPA.
        texts: token ids [B, T] without pads, T above `top`; some thousands of tokens are enough.
        top: how many keys count as a row's best ones.
        rows: how many rows of each text are looked at, spread over its second half.
        layout: whether a pair is a channel of the first half of a head with its like in the second ("half") or with its neighbour
            ("interleaved"); found in the graph where None.
    Raises:
        BadCalibration: a text is too short, or the model's attention or rotary embedding is not understood.
        OutputNotWritable: the file cannot be written.
    """
    total, count, channels, graphs = torch.zeros(()), 0, [(0, 0)], dict[Any, Any]()
    for ids in texts:
        if ids.dim() != 2 or ids.shape[1] <= top:
            raise BadCalibration(problem=f"token ids of {list(ids.shape)} are given; each text must be [batch, more than top={top} tokens]")
        program, sites, state = graphs[ids.shape] = graphs.get(ids.shape) or _captured(model, ids)
        channels = _channels(sites, layout)
        watch = _Watch(program.module, sites, partial(agreements, channels=channels, top=top, rows=rows))
        watch.run(*state, ids)
        found = torch.stack(watch.found)
        total, count = found + (total if count else 0.0), count + 1
    if not count:
        raise BadCalibration(problem="no text is given")
    pairs = (total / count).cpu().argsort(dim=2, descending=True, stable=True)
    order = PairOrder(pairs, torch.tensor(channels), frozenset(digest(p) for p in model.parameters()))
    try:
        order.save(Path(path), {"top": top, "rows": rows, "texts": count})
    except OSError as error:
        raise OutputNotWritable(path=path, problem=error) from error
    return Path(path)


def agreements(q: Tensor, k: Tensor, channels: list[tuple[int, int]], top: int, rows: int) -> Tensor:
    """CA of each pair, [H, D / 2], of queries and keys [B, H, T, D] of one causal attention."""
    length: int = q.shape[2]
    at = torch.linspace(max(top, length // 2), length - 1, rows).long().unique().to(q.device)
    later = torch.arange(length, device=q.device) > at[:, None]
    row = q[:, :, at].float()

    def best(own: list[int]) -> Tensor:
        logits = row[..., own] @ k[..., own].float().transpose(2, 3)
        return logits.masked_fill(later, -torch.inf).topk(top, dim=3).indices

    whole = torch.zeros(*row.shape[:3], length, dtype=torch.bool, device=q.device).scatter_(3, best(list(range(q.shape[3]))), True)
    return torch.stack([whole.gather(3, best(list(pair))).float().mean((0, 2, 3)) for pair in channels], dim=1)


class _Watch(fx.Interpreter):
    """Runs a graph and notes what `look` finds in the queries and keys [B, H, T, D] of each attention, in order."""

    def __init__(self, module: fx.GraphModule, sites: tuple[AttentionRegion, ...], look: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(module)
        self.outs, self.look, self.found = {site.out for site in sites}, look, list[Tensor]()

    def run_node(self, n: fx.Node) -> Any:
        if n in self.outs:
            q, k = self.fetch_args_kwargs_from_env(n)[0][:2]
            self.found.append(self.look(q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)))
        return super().run_node(n)


def _captured(model: nn.Module, ids: Tensor) -> tuple[Program, tuple[AttentionRegion, ...], tuple[Tensor, ...]]:
    """The model as a graph for such token ids, its attentions, and its parameters and buffers."""
    program, signature = from_model(Prefill(model), (ids,))
    sites, _, misses = find_attention(program.graph)
    if not sites or misses or not all(site.fused for site in sites):
        raise BadCalibration(problem="the model's attention must be SDPA throughout; load it with attn_implementation='sdpa'")
    return program, sites, signature.state


def _channels(sites: tuple[AttentionRegion, ...], layout: Layout | None) -> list[tuple[int, int]]:
    widths = {int(shape(operands(site.out)[0])[3]) for site in sites}
    heads = {int(shape(operands(site.out)[0])[1]) for site in sites}
    if len(widths) > 1 or len(heads) > 1:
        raise BadCalibration(problem="its attentions differ in heads or width")
    width = widths.pop()
    if layout is not None:
        return pair_channels(width, layout, width)
    found = {rotary_layout(operands(site.out)[1]) for site in sites}
    if len(found) > 1 or None in found:
        raise BadCalibration(problem="its rotary embedding is not understood; give layout='half' or layout='interleaved'")
    kind, rotary = next(f for f in found if f is not None)
    return pair_channels(width, kind, rotary)


def rotary_layout(keys: fx.Node) -> tuple[Layout, int] | None:
    """How the keys of an attention were turned, and how many channels: by the negated slice that every rotary embedding takes."""
    seen, stack = {keys}, [keys]
    while stack:
        node = stack.pop()
        if op_name(node) == "neg" and op_name(operands(node)[0]) == "slice":
            part = operands(node)[0]
            width, start, step = int(shape(operands(part)[0])[-1]), argument(part, "start", 0), argument(part, "step", 1)
            return ("interleaved", width) if step == 2 else ("half", width) if start == width // 2 else None
        if op_name(node) in PROJECTIONS:
            continue
        stack += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return None
