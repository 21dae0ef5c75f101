"""Steps over a `dyncc.KVCache(passes=...)`: its marks in the graph ask for passes, whatever the pipeline says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dyncc.errors import CacheNotServed
from dyncc.ir import Program, argument, op_name
from dyncc.pipeline import build, render
from dyncc.report import Report, Rewrite
from dyncc.rewrite import Context, apply_pass
from dyncc.settings import Settings

SERVED = {"spread": "layers behind the cut hold and read the tokens that stayed", "watched": "the cache drops keys by the scores"}
"""Marks without which a graph cannot run, in the order in which they are served, and what is done."""


def serve_caches(program: Program, settings: Settings, report: Report, values: Sequence[Any]) -> tuple[Program, Settings]:
    """The program that prunes the prompts of caches which hold its rows, with the scores that caches want computed beside its attention
    (always: they drop keys by them), and the settings with the passes that select keys in front.

    Args:
        values: the example's inputs, one a placeholder.
    Raises:
        CacheNotServed: an attention cannot be followed; the cache would hold other keys than it says.
    """
    for mark, words in SERVED.items():
        for text in _policies(program, mark):
            passed = build(text)[0]
            if passed.counts_layers and report.graph_break:
                problem = f"and a graph break splits the model, so its layers cannot be numbered: {report.graph_break}"
                raise CacheNotServed(passes=text, problem=problem)
            applied = apply_pass(program, passed, Context(values=values))
            if not applied.applied:
                raise CacheNotServed(passes=text, problem=f"and that cannot be followed here: {applied.reason}")
            found, expected = applied.result.found, applied.result.expected
            report.rewrites.append(Rewrite(passed.name, text, True, words, passed.exact, found, expected))
            program = applied.program
    known = {render([passed]) for passed in settings.passes}
    wanted = [build(text)[0] for text in _policies(program, "partly_read") if text not in known]
    return program, replace(settings, passes=(*wanted, *settings.passes))


def _policies(program: Program, mark: str) -> list[str]:
    return list(dict.fromkeys(str(argument(n, "policy")) for n in program.graph.nodes if op_name(n) == mark))
