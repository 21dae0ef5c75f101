"""Steps over a `dyncc.KVCache(passes=...)`: the cache's own pass runs first, whatever the pipeline, and cannot be left out."""

from __future__ import annotations

from typing import Any

from dyncc.errors import CacheNotServed
from dyncc.ir import Program, argument, op_name
from dyncc.pipeline import build
from dyncc.report import Report, Rewrite
from dyncc.rewrite import Context, apply_pass


def serve_caches(program: Program, report: Report) -> Program:
    """The program with every mark of a cache replaced by what the cache wants to know.

    Raises:
        CacheNotServed: an attention cannot be followed; the cache would drop keys blindly.
    """
    for text in dict.fromkeys(argument(n, "policy") for n in program.graph.nodes if op_name(n) == "watched"):
        passed = build(text)[0]
        applied = apply_pass(program, passed, Context())
        if not applied.applied:
            raise CacheNotServed(passes=text, problem=f"and that cannot be followed here: {applied.reason}")
        report.rewrites.append(_record(passed, text, applied.result))
        program = applied.program
    return program


def _record(passed: Any, text: str, result: Any) -> Rewrite:
    return Rewrite(passed.name, text, True, "the cache drops keys by it", passed.exact, result.found, result.expected, ())
