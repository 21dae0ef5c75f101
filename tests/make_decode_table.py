"""Writes docs/decoding.json and docs/decoding.md: on how many attentions of each decoder `select-kv` (a decoding step) and `evict-kv` (a
prompt whose keys are returned) apply.

Run it from the root of the repository: `python tests/make_decode_table.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from zoo_decoders import DECODERS
from zoo_model import LAYERS, Attn, ZooModel, relative_error

import dyncc
from dyncc.decoding import Decode, Prefill
from dyncc.passes.select_kv import SelectKV
from dyncc.rewrite import Context, apply_pass

DOCS = Path(__file__).parent.parent / "docs"
SELECT = "select-kv{budget=4 score=vote share=layer sinks=1 recents=1}"
EVICT = "evict-kv{budget=4 score=window window=2 recents=1}"
WINDOWED = ("mistral-last", "gemma2-last")
"""Their caches hold a window of their own, which `Decode` does not rebuild."""
CASES: tuple[tuple[ZooModel, Attn], ...] = tuple(
    (model, attn)
    for model in DECODERS
    if model.name.endswith("-last") and model.name not in WINDOWED
    for attn in model.attns
    if not model.left_out(attn)
)


def row(model: ZooModel, attn: Attn) -> dict[str, Any]:
    """Applied and expected attentions of one decoding step behind a padded past, and the reason when some are missing."""
    step, call = decoding_step(model, attn)
    made = dyncc.optimize(step, call, passes=SELECT, engine="reference", evidence="off")
    rewrite = made.report.rewrites[0]
    read = model.inputs(padding=True)[:2]
    prompt = dyncc.optimize(Prefill(step.model, keys=True), read, passes=EVICT, engine="reference", evidence="off")
    evict = prompt.report.rewrites[0]
    found = {"model": model.name, "attention": attn, "applied": rewrite.found, "evict": evict.found, "expected": LAYERS}
    return {**found, "reason": _reason(rewrite), "evict_reason": _reason(evict)}


def _reason(rewrite: Any) -> str:
    return "" if rewrite.found == LAYERS else rewrite.reason or "; ".join(rewrite.misses)


def decoding_step(model: ZooModel, attn: Attn) -> tuple[Decode, tuple[Any, ...]]:
    """A model's step as a module, and a call of it."""
    inner = model.build(attn).model
    ids, mask = model.inputs(padding=True)[:2]
    _, *past = Prefill(inner, keys=True)(ids, mask)
    return Decode(inner), (ids[:, -1:], torch.cat([mask, torch.ones_like(mask[:, :1])], 1), *past)


def error_with_all_keys(model: ZooModel, attn: Attn) -> float:
    """How far a budget of all keys is from eager; 0.0 where the pass refuses. (A pipeline would refuse what saves nothing.)"""
    step, call = decoding_step(model, attn)
    made = dyncc.optimize(step, call, passes="", engine="reference", evidence="off")
    applied = apply_pass(made._outcome.dense, SelectKV(budget=512, sinks=1, recents=1), Context())
    return relative_error(tuple(applied.program.module(*made._flat(call, {}))), step(*call)) if applied.applied else 0.0


def checked_in() -> list[dict[str, Any]]:
    """The rows of docs/decoding.json."""
    return json.loads((DOCS / "decoding.json").read_text())


def markdown(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; refusals follow as notes."""
    lines = [
        "# Decoding steps",
        "",
        f"Attentions of one decoding step (batch padded, growing cache) on which `{SELECT}` applies,",
        f"and of a padded prompt whose keys are returned on which `{EVICT}` applies, of the layers in the config.",
        "`python tests/make_decode_table.py` writes this file; a test fails when a number falls.",
        "",
        "| model | attention | select-kv | evict-kv |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['model']} | {r['attention']} | {r['applied']}/{r['expected']} | {r['evict']}/{r['expected']} |" for r in rows
    ]
    words = [(r, name, r[key]) for r in rows for name, key in (("select-kv", "reason"), ("evict-kv", "evict_reason"))]
    notes = [f"- {r['model']}, {r['attention']}, {name}: {reason}" for r, name, reason in words if reason]
    return "\n".join([*lines, "", "Refused:" if notes else "Nothing was refused.", "", *notes]).rstrip() + "\n"


def main() -> None:
    """Regenerate both files."""
    with torch.no_grad():
        rows = [row(model, attn) for model, attn in CASES]
    (DOCS / "decoding.json").write_text("[\n" + ",\n".join(json.dumps(r) for r in rows) + "\n]\n")
    (DOCS / "decoding.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
