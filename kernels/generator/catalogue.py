"""What `dyncc kernels` tells of each standard kernel."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyncc.kernels.generator import figures
from dyncc.kernels.generator.source import source
from dyncc.kernels.generator.spec import KernelSpec
from dyncc.kernels.generator.standard import STANDARD
from dyncc.kernels.generator.targets import target

if TYPE_CHECKING:
    from dyncc.kernels.generator.tune import Tuned


def rows(where: str = "", folder: Path | None = None, asked: Iterable[tuple[KernelSpec, str]] | None = None) -> list[dict[str, Any]]:
    """One row a kernel: its name and spec, with a target what it takes there, with a folder where its source was written.

    Args:
        asked: kernels and who asked for each, in place of the standard ones.
    Raises:
        UnknownTarget: there is no target of that name.
    """
    if where:
        target(where)
    told: dict[KernelSpec, list[str]] = {}
    for spec, provenance in ((spec, "") for spec in STANDARD) if asked is None else asked:
        told.setdefault(spec, []).append(provenance)
    return [_row(spec, where, folder, [x for x in by if x]) for spec, by in told.items()]


def tuned(asked: Iterable[tuple[KernelSpec, str]] | None = None) -> list[Tuned]:
    """The fastest form of each kernel, or of those asked for, on this machine's GPU.

    Raises:
        NoGPU: there is none.
    """
    from dyncc.kernels.generator.tune import tune

    specs = STANDARD if asked is None else tuple(spec for spec, _ in asked)
    return [tune(spec) for spec in {spec.alike(): spec.formless() for spec in specs}.values()]


def _row(spec: KernelSpec, where: str, folder: Path | None, asked: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": spec.name, "spec": str(spec)}
    if where:
        from dyncc.kernels.generator.compiled import compiled

        made = compiled(spec, where)
        row = {**made.to_dict(), "before": figures.before(made)}
    if asked:
        row["for"] = asked
    if folder is not None:
        path = folder / f"{spec.name}.py"
        more = f" and {len(asked) - 1} more" if len(asked) > 1 else ""
        path.write_text(source(spec, asked[0] + more if asked else ""), encoding="utf-8")
        row["path"] = str(path)
    return row


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    asked = "".join(f"\n  for {x}" for x in row.get("for", ()))
    if "target" not in row:
        return f"{row['name']}: {row['spec']}" + (f" -> {row['path']}" if "path" in row else "") + asked
    taken = f"{row['registers']} registers, {row['spills']} bytes spilled, {row['shared_memory']:,} bytes shared"
    work = f"{row['flops']:.3g} operations and {row['bytes']:.3g} bytes take at least {1e6 * row['seconds']:.3g} us"
    told = f"{row['name']} on {row['target']}: {taken}, occupancy {row['occupancy']:.2f}; {work}"
    changed = {name: value for name, value in (row["before"] or {}).items() if value != row[name]}
    return told + (" (before: " + ", ".join(f"{name} {value}" for name, value in changed.items()) + ")" if changed else "") + asked
