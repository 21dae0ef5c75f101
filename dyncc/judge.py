"""The judge: what the passes of a pipeline did to values, found with as few runs as the graphs allow, and remembered on disk.

Exact rewrites must give what was there before; lossy ones are measured against the captured program. Programs run beside each other
(beside.py): one run of the captured program and the rewritten regions. There, exact rewrites are checked region by region on the captured
program's own values (an attention of many query rows on 128 of them, claims.py), and so are the outputs that they compute anew: the error
reported is a region's own, not what has built up at the outputs. Where values do not follow from operands alone (in-place writes, random
numbers) each program is run once as a whole, and outputs are compared.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from dyncc import verdicts
from dyncc.beside import Joint, joint
from dyncc.evidence import beyond_tolerance, out_of_tolerance, quality, run_isolated, sample
from dyncc.ir import GETITEM, Program, is_mutating, op_name, outputs
from dyncc.pipeline import render
from dyncc.rewrite import graph_text, promised_outputs
from dyncc.settings import Settings


@dataclass(frozen=True)
class Link:
    """A program, the positions of the passes that made it of the one before it, and whether all of them are exact."""

    program: Program
    positions: tuple[int, ...]
    exact: bool


@dataclass
class Found:
    """What was found of one link over all examples: figures (of exact ones the worst error, and how many `regions` or `outputs` were
    compared) and words about what is out of tolerance."""

    figures: dict[str, Any]
    words: str = ""


Seen = tuple[list[tuple[float, str, int]], list[list[Any] | None]]
"""Of one example: (error, words, values compared) of each link, and the outputs of the captured program and of each link where wanted."""


class Judge:
    """Keeps `measured`, the figures of each pass by its position, and `undone`, why a pass was taken out again."""

    def __init__(self, dense: Program, settings: Settings, examples: Sequence[list[Any]]):
        self.dense, self.settings, self.examples = dense, settings, list(examples)
        self.measured: dict[int, dict[str, Any]] = {}
        self.undone: dict[int, str] = {}
        self.seconds = 0.0
        self.states = {i for i, n in enumerate(outputs(dense.graph)) if _is_state(n)}
        self.mutates = any(is_mutating(n) for n in dense.graph.nodes)
        self.key = ""
        if settings.evidence != "off" and settings.passes:
            surroundings = f"{settings.evidence} {settings.engine} {dense.door} {dense.needs_grad}"
            text = f"{render(settings.passes)} {surroundings} {sample(self.examples)}"
            self.key = verdicts.key(graph_text(dense.graph), verdicts.sources(settings.passes), text)
        self.known = verdicts.get(self.key) if self.key and settings.metric is None else None

    def refused(self, position: int) -> str | None:
        """Why a pass must not run: it was undone, or an earlier process found a reason."""
        if position in self.undone:
            return self.undone[position]
        if self.known is None or position >= len(self.known["rewrites"]):
            return None
        entry: dict[str, Any] = self.known["rewrites"][position]
        self.measured[position] = entry["evidence"]
        return None if entry["applied"] else str(entry["reason"])

    def accepts(self, links: Sequence[Link]) -> bool:
        """Whether every exact pass kept the values; where one did not, it is noted in `undone`. One link a modified pass."""
        if self.settings.evidence == "off" or self.known is not None or not links:
            return True
        start = time.perf_counter()
        merged = _merged(links)
        found = self._find(merged)
        if any(f.words for f in found) and len(merged) < len(links):
            merged, found = list(links), self._find(links)
        self.undone |= {i: f"undone: {f.words}" for link, f in zip(merged, found, strict=True) for i in link.positions if f.words}
        for link, f in zip(merged, found, strict=True):
            self.measured |= dict.fromkeys(link.positions, f.figures)
        self.seconds += time.perf_counter() - start
        return not any(f.words for f in found)

    def remember(self, rewrites: Sequence[Any]) -> None:
        """Store what was found for the next process."""
        if self.key and self.known is None:
            rows = [{"applied": r.applied, "reason": r.reason, "evidence": r.evidence} for r in rewrites]
            verdicts.put(self.key, {"rewrites": rows})

    def _find(self, links: Sequence[Link]) -> list[Found]:
        lossy = [not link.exact for link in links]
        made = joint([self.dense, *(x.program for x in links)], [True, *(x.exact for x in links)], [any(lossy), *lossy])
        unit = "regions" if made else "outputs"
        found = [Found({"error": 0.0, unit: 0} if link.exact else {"examples": len(self.examples)}) for link in links]
        for values in self.examples:
            errors, outputs = _run_beside(made, values, len(links)) if made else self._run_whole(links, values)
            for link, f, (error, words, compared), now in zip(links, found, errors, outputs[1:], strict=True):
                if link.exact:
                    f.words = f.words or words
                    f.figures |= {"error": max(f.figures["error"], error), unit: compared}
                else:
                    self._measure(f.figures, outputs[0] or [], now or [])
        return found

    def _measure(self, figures: dict[str, Any], dense: list[Any], now: list[Any]) -> None:
        """What a lossy pass changes; the worst over the examples is kept. What a cache remembers for the next step is no result."""
        dense, now = ([x for i, x in enumerate(values) if i not in self.states] for values in (dense, now))
        measured = {"metric": self.settings.metric(dense, now)} if self.settings.metric else quality(dense, now)
        for name, value in measured.items():
            worse = max if name in ("error", "kl") else min
            figures[name] = worse(figures[name], value) if name in figures else value

    def _run_whole(self, links: Sequence[Link], values: list[Any]) -> Seen:
        before = dense = self._outputs(self.dense, values)
        errors: list[tuple[float, str, int]] = []
        kept: list[list[Any] | None] = [dense]
        for link in links:
            now = self._outputs(link.program, values)
            errors.append((*beyond_tolerance(before, now), len(now)) if link.exact else (0.0, "", 0))
            kept.append(None if link.exact else now)
            before = now
        return errors, kept

    def _outputs(self, program: Program, values: list[Any]) -> list[Any]:
        """The caller's outputs (and inputs, when the graph writes to them)."""
        results, _ = run_isolated(program.module, values, self.mutates)
        promised = promised_outputs(program)
        return [r for i, r in enumerate(results) if not promised <= i < promised + program.extra_outputs]


def _is_state(returned: Any) -> bool:
    return isinstance(returned, fx.Node) and returned.target is GETITEM and op_name(returned.args[0]) == "remembered"  # type: ignore[arg-type]


def _run_beside(made: Joint, values: list[Any], count: int) -> Seen:
    (errors, outputs), _ = run_isolated(made.module, values, False)
    seen: list[tuple[float, str, int]] = [(0.0, "", 0)] * count
    for claim, error in zip(made.claims, errors, strict=True):
        worst, words, compared = seen[claim.position - 1]
        words = words or out_of_tolerance(claim.what, error, claim.dtype)
        seen[claim.position - 1] = (max(worst, error), words, compared + 1)
    return seen, [None if o is None else list(o) for o in outputs]


def _merged(links: Sequence[Link]) -> list[Link]:
    """Exact passes in a row as one link."""
    merged: list[Link] = []
    for link in links:
        if merged and link.exact and merged[-1].exact:
            link = Link(link.program, merged.pop().positions + link.positions, True)
        merged.append(link)
    return merged
