"""Tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterable

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
