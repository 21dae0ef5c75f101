"""What `dyncc kernels` tells of each standard kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dyncc.kernels.generator import figures
from dyncc.kernels.generator.source import source
from dyncc.kernels.generator.standard import STANDARD
from dyncc.kernels.generator.targets import target


def rows(where: str = "", folder: Path | None = None) -> list[dict[str, Any]]:
    """One row a kernel: its name and spec, with a target what it takes there, with a folder where its source was written.

    Raises:
        UnknownTarget: there is no target of that name.
    """
    if where:
        target(where)
    return [_row(spec, where, folder) for spec in STANDARD]


def _row(spec: Any, where: str, folder: Path | None) -> dict[str, Any]:
    row = {"name": spec.name, "spec": str(spec)}
    if where:
        from dyncc.kernels.generator.compiled import compiled

        made = compiled(spec, where)
        row = {**made.to_dict(), "before": figures.before(made)}
    if folder is not None:
        path = folder / f"{spec.name}.py"
        path.write_text(source(spec), encoding="utf-8")
        row["path"] = str(path)
    return row


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    if "target" not in row:
        return f"{row['name']}: {row['spec']}" + (f" -> {row['path']}" if "path" in row else "")
    taken = f"{row['registers']} registers, {row['spills']} bytes spilled, {row['shared_memory']:,} bytes shared"
    told = f"{row['name']} on {row['target']}: {taken}, occupancy {row['occupancy']:.2f}, at least {1e6 * row['seconds']:.3g} us"
    changed = {name: value for name, value in (row["before"] or {}).items() if value != row[name]}
    return told + (" (before: " + ", ".join(f"{name} {value}" for name, value in changed.items()) + ")" if changed else "")
