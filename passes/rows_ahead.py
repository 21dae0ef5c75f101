"""Rows behind a prompt, run through its graph beside it: the queries that are about to come, before they come.

Every node that holds rows of the prompt and leads to an attention's queries, keys or values gets a second one for P rows more. Positions
count on; content (token ids, embeddings) repeats the prompt's last rows, or is given; attention reads the prompt's keys and the P rows'
own, causally. The prompt's own nodes are not touched, so what it computes stays bit by bit, and nothing of the P rows reaches a cache.
Side conditions: attention is SDPA; every op on the way works row by row (its axis rule says so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.axes import Axes, Dim
from dyncc.ir import argument, emit, is_mutating, op_name, operands, refresh, same_size, shape
from dyncc.kernels.evict_keys import ahead_mask
from dyncc.passes.drop_repeat_kv import repeated
from dyncc.passes.next_rows import go_on, look_up, says_content
from dyncc.passes.token_inputs import SAME
from dyncc.passes.trained_rows import Given, adapted, embedded
from dyncc.restrict import Refusal, resize, where


@dataclass(frozen=True)
class Site:
    """An attention of the prompt, and the keys and values [B, G, T, D] that this call adds to it."""

    region: AttentionRegion
    keys: fx.Node
    values: fx.Node


@dataclass(frozen=True)
class Look:
    """What the rows ahead ask in one attention: `q` [B, H, P, D], `k` [B, G, N + P, D] and `mask` [B or 1, 1, P, N + P]; `out`, behind
    all three, is what they get."""

    q: fx.Node
    k: fx.Node
    mask: fx.Node
    out: fx.Node


class RowsAhead:
    """`count` rows behind the prompt, or those `given`; `looks` by the attention's node, after `run`."""

    def __init__(self, axes: Axes, sites: Sequence[Site], count: int, given: Given | None = None) -> None:
        self.axes, self.given = axes, given
        self.count = int(shape(given.rows)[0]) if given is not None else count
        self.sites = {site.region.out: site for site in sites}
        self.axis: Dim = axes.dims(sites[0].region.q)[2]
        self.made: dict[fx.Node, fx.Node] = {}
        self.content: set[fx.Node] = set()
        self.looks: dict[fx.Node, Look] = {}

    def run(self) -> dict[fx.Node, Look]:
        """Add the rows to the graph.

        Raises:
            Refusal: an op on the way cannot be continued by more rows; it is named, with its source line.
        """
        wanted = self._wanted()
        graph = next(iter(wanted)).graph
        for node in [n for n in graph.nodes if n in wanted]:
            if node in self.sites:
                self._attend(self.sites[node])
                continue
            made = self._more(node)
            if made is not None:
                self.made[node] = made
        return self.looks

    def _wanted(self) -> set[fx.Node]:
        """What queries and new keys and values are made from: through an attention only its queries, whose keys are among them."""
        stack = [n for s in self.sites.values() for n in (s.region.out, s.region.q, s.keys, s.values)]
        found: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            if node not in self.sites:
                stack += node.all_input_nodes
        return found

    def _more(self, node: fx.Node) -> fx.Node | None:
        """The node for the rows ahead; None where it holds none."""
        places, slots = self.axes.places(node, self.axis), operands(node)
        moved = any(s in self.made for s in slots)
        if op_name(node) == "sym_size" or not (moved or places):
            return None
        if not moved:
            return self._start(node, places[0])
        self._check(node, slots, places)
        if op_name(node) == "slice" and argument(node, "dim", 0) % len(shape(node)) in places:
            return self.made[slots[0]]
        if op_name(node) == "embedding" and not self._is_content(slots[1]):
            return look_up(node, slots[0], self.made[slots[1]])
        if op_name(node) == "embedding" and self.given is not None:
            return embedded(node, self.given.rows)
        made = self._copy(node, places)
        return adapted(node, made, self.given) if self.given is not None and op_name(node) == "linear" else made

    def _check(self, node: fx.Node, slots: list[fx.Node], places: list[int]) -> None:
        op = self.axes.ops.get(node)
        if op is None or not op.known or not places:
            raise Refusal(f"{where(node)} has no axis rule for rows, so the model cannot be continued behind the prompt")
        if is_mutating(node):
            raise Refusal(f"{where(node)} writes in place along the token axis")
        for read in op.reads:
            if slots[read.slot] in self.made and read.dim in self.axes.places(slots[read.slot], self.axis):
                raise Refusal(f"{where(node)} {read.why.replace('it', 'the token axis', 1)}, so it cannot run on rows behind the prompt")
        for c in op.contracts:
            if c.dim in self.axes.places(slots[c.slot], self.axis) and slots[c.slot] in self.made:
                raise Refusal(f"{where(node)} sums over the token axis outside of attention")

    def _copy(self, node: fx.Node, places: list[int]) -> fx.Node:
        with node.graph.inserting_before(node.next):
            made = node.graph.node_copy(node, lambda n: self.made.get(n, n))
        resize(made, self.axes.dims(node), places, self.axis, self.count, None)
        try:
            refresh(made)
        except Exception as error:
            raise Refusal(f"{where(node)} does not fit rows behind the prompt ({str(error).splitlines()[0]})") from error
        return made

    def _start(self, node: fx.Node, dim: int) -> fx.Node:
        made = go_on(node, dim, self.count)
        if says_content(node, dim):
            self.content.add(node)
        return made

    def _is_content(self, node: fx.Node) -> bool:
        while op_name(node) in SAME:
            node = operands(node)[0]
        return node in self.content

    def _attend(self, site: Site) -> None:
        region, count = site.region, self.count
        if any(n not in self.made for n in (region.q, site.keys, site.values)):
            raise Refusal(f"attention {region.index} has keys or values that do not come from the prompt's rows")
        q, k, v = self.made[region.q], repeated(region.k) or region.k, repeated(region.v) or region.v
        if not same_size(shape(k)[1], shape(site.keys)[1]):
            raise Refusal(f"attention {region.index} repeats its keys in a way that is not understood")
        before, scale = region.out.next, argument(region.out, "scale")
        mask = emit(before, lambda k, m: ahead_mask(m, k.shape[2], count, k.device), k, region.mask)
        keys, values = (emit(before, _behind, old, self.made[new]) for old, new in ((k, site.keys), (v, site.values)))
        grouped = not same_size(shape(q)[1], shape(k)[1])

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)

        self.made[region.out] = emit(before, attend, q, keys, values, mask)
        self.looks[region.out] = Look(q, keys, mask, self.made[region.out])


def _behind(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat([old, new], 2)
