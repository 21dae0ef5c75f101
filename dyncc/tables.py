"""What commands show on a terminal: the table of passes, and what a conversion wrote."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table

from dyncc.catalogue import PassInfo


def passes_table(passes: Iterable[PassInfo]) -> Table:
    """One row a name: what it is, what it does, its options with their defaults."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("name", "kind", "does", "options"):
        table.add_column(heading, no_wrap=heading in ("name", "kind"), ratio=None if heading in ("name", "kind") else 1)
    for info in passes:
        options = " ".join(f"{option.name}={option.default}" for option in info.options)
        words = info.summary if not info.citation else f"{info.summary} [{info.needs}; {info.citation}]"
        table.add_row(info.name, _kind(info), words.replace("[", r"\["), options)
    return table


def _kind(info: PassInfo) -> str:
    if info.kind == "recipe":
        return f"recipe of {info.configures}"
    return ("exact" if info.exact else "lossy") + (", default" if info.default else "")


def written_text(result: dict[str, Any]) -> str:
    """What `convert_model` wrote and how it was verified."""
    lines = [f"{result['path']}: {result['kind']}, {result['bytes']:,} bytes, {result['seconds']:.1f} s"]
    lines += [f"  {text}: {state}" for state in ("applied", "refused") for text in result[state]]
    lines.append(f"  holds for: {result['holds_for']}")
    found = result["verified"]
    if found is None:
        lines.append("  not verified")
    elif "parity" in found:
        lines += [f"  fused: {', '.join(f'{n} {name}' for name, n in found['fused'].items() if n) or 'nothing'}"]
        lines += [f"  fusions undone: {found['undone']}"] if found["undone"] else []
        lines += [f"  {_parity(row)}" for row in found["parity"]]
    else:
        lines.append(f"  verified: {found}")
    return "\n".join(lines)


def _parity(row: dict[str, Any]) -> str:
    dense = "" if row["dense"] is None else f", to the dense model {row['dense']:.1e}"
    return f"{row['output']} at {row['sizes']}: error {row['error']:.1e} of {row['limit']:.0e}{dense}"
