"""dyncc: a compiler that makes existing transformer models do less work for easy inputs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dyncc.artefact import load
    from dyncc.calibrate import calibrate_pairs
    from dyncc.catalogue import PassInfo, list_passes
    from dyncc.errors import DynccError, DynccUsageError, RefusedError
    from dyncc.fitted import save_parameters
    from dyncc.fitting.run import fit
    from dyncc.given_weights import save_attention_gates, save_gates, save_lookahead
    from dyncc.kv_cache import KVCache
    from dyncc.position_levels import PositionLevels, optimize_by_position
    from dyncc.report import Region, Report, Rewrite, reports
    from dyncc.runtime import Optimized, explain, optimize

_PLACES = {
    "DynccError": "errors",
    "DynccUsageError": "errors",
    "KVCache": "kv_cache",
    "RefusedError": "errors",
    "Optimized": "runtime",
    "PassInfo": "catalogue",
    "PositionLevels": "position_levels",
    "Region": "report",
    "Report": "report",
    "calibrate_pairs": "calibrate",
    "Rewrite": "report",
    "explain": "runtime",
    "fit": "fitting.run",
    "list_passes": "catalogue",
    "load": "artefact",
    "optimize": "runtime",
    "optimize_by_position": "position_levels",
    "reports": "report",
    "save_attention_gates": "given_weights",
    "save_gates": "given_weights",
    "save_lookahead": "given_weights",
    "save_parameters": "fitted",
}

__version__ = "0.1.0"
__all__ = [
    "DynccError", "DynccUsageError", "KVCache", "Optimized", "PassInfo", "PositionLevels", "RefusedError", "Region", "Report", "Rewrite",
    "calibrate_pairs", "explain", "fit", "list_passes", "load", "optimize", "optimize_by_position", "reports", "save_attention_gates",
    "save_gates", "save_lookahead", "save_parameters",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: importing dyncc alone is fast."""
    if name not in _PLACES:
        raise AttributeError(f"module 'dyncc' has no attribute {name!r}")
    return getattr(importlib.import_module(f"dyncc.{_PLACES[name]}"), name)
