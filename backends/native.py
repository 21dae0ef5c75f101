"""Programs for Inductor on a CPU: what generated C++ kernels do faster by measurement goes to them.

Decoding steps read much and compute little, and Inductor hands their products and attentions to libraries that are made for many rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dyncc.backends import native_attention, native_linears, native_pages
from dyncc.ir import Program
from dyncc.kernels.native import problem
from dyncc.kernels.one_row import TRUTHS
from dyncc.own_ops import spelled_out


def with_native_kernels(program: Program) -> tuple[Program, list[str]]:
    """The program with kernels where they pay, and what to tell of it; where none can be built, what they compute is written out."""
    ours = any(n.target in TRUTHS for n in program.graph.nodes)
    attentions, linears = ([], []) if program.needs_grad else (native_attention.sites(program), native_linears.sites(program))
    if not ours and not attentions and not linears:
        return program, []
    if not all(_on_cpu(n) for n in program.graph.nodes if n.op == "placeholder"):
        return spelled_out(program, TRUTHS), []
    if problem():
        return spelled_out(program, TRUTHS), [problem()]
    found = [n for n in attentions if native_attention.pays(n)]
    groups = [(group, threads) for group in linears if (threads := native_linears.threads(group)) is not None]
    paged = native_pages.sites(program) if ours and not program.needs_grad else []
    if not found and not groups and not paged:
        return program, []
    lowered = program.copy()
    twin = dict(zip(program.graph.nodes, lowered.graph.nodes, strict=True))
    for node in found:
        native_attention.replace(twin[node])
    for node in paged:
        native_pages.replace(twin[node])
    for group, threads in groups:
        native_linears.replace([twin[n] for n in group], threads)
    lowered.graph.lint()
    lowered.module.recompile()
    return lowered, [*_notes(found, attentions, [group for group, _ in groups], linears), *_of_pages(paged)]


def _on_cpu(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.device.type == "cpu"


def _of_pages(paged: list[Any]) -> list[str]:
    return [f"{len(paged)} attentions score, choose and read their pages in one generated C++ kernel"] if paged else []


def _notes(found: list[Any], attentions: list[Any], groups: list[list[Any]], linears: list[list[Any]]) -> list[str]:
    notes = []
    if attentions:
        notes.append(f"{len(found)} of {len(attentions)} attentions of one row run as a generated C++ kernel, measured to be faster")
    if linears:
        done, all_of_them = (sum(len(g) for g in some) for some in (groups, linears))
        notes.append(f"{done} of {all_of_them} linear layers of few rows run as one in {len(groups)} calls, measured to be faster")
    return notes
