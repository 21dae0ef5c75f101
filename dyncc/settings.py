"""The settings of one compilation, checked once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dyncc.errors import UnknownSetting, near
from dyncc.options import check_engine, check_evidence
from dyncc.pipeline import build

NAMES = ("passes", "engine", "strict", "evidence", "dump_dir")


@dataclass(frozen=True)
class Settings:
    """`passes` is the built pipeline; `metric(dense_outputs, outputs) -> float` replaces the default quality figures."""

    passes: tuple[Any, ...]
    engine: str = "inductor"
    strict: bool = False
    evidence: str = "numeric"
    dump_dir: str | None = None
    trace: bool = False
    metric: Callable[[list[Any], list[Any]], float] | None = None


def settings_from(options: dict[str, Any] | None) -> Settings:
    """Settings from the `options` of torch.compile.

    Raises:
        DynccUsageError: an option, engine, evidence or pipeline text is not known; the message suggests what was meant.
    """
    given = dict(options or {})
    for name in given:
        if name not in NAMES:
            raise UnknownSetting(name=name, near=near(name, NAMES), known=", ".join(NAMES))
    return Settings(
        build(given.get("passes")),
        check_engine(given.get("engine", "inductor")),
        bool(given.get("strict", False)),
        check_evidence(given.get("evidence", "numeric")),
        given.get("dump_dir"),
    )
