"""The passes, one file each, and the one tuple that holds their order. Nothing is imported before it is asked for."""

from __future__ import annotations

import importlib

PASSES: tuple[tuple[str, str], ...] = (
    ("fuse-attention", "fuse_attention:FuseAttention"),
    ("simplify-mask", "simplify_mask:SimplifyMask"),
    ("slice-last-token", "slice_last_token:SliceLastToken"),
    ("drop-repeat-kv", "drop_repeat_kv:DropRepeatKV"),
    ("fuse-gated-attention", "fuse_gated_attention:FuseGatedAttention"),
    ("fuse-linear-attention", "fuse_linear_attention:FuseLinearAttention"),
    ("append-in-place", "append_in_place:AppendInPlace"),
    ("prune-tokens", "prune_tokens:PruneTokens"),
    ("select-kv", "select_kv:SelectKV"),
    ("evict-kv", "evict_kv:EvictKV"),
    ("drop-layers", "drop_layers:DropLayers"),
    ("exit-early", "exit_early:ExitEarly"),
    ("route-tokens", "route_tokens:RouteTokens"),
    ("route-iterations", "route_iterations:RouteIterations"),
)
"""Name and place of every pass, in their default order."""

EXACT: tuple[str, ...] = ("fuse-attention", "simplify-mask", "slice-last-token", "drop-repeat-kv")
"""What runs when no pipeline is given."""


def names() -> tuple[str, ...]:
    """The names of all passes, in default order."""
    return tuple(name for name, _ in PASSES)


def load_pass(name: str) -> type:
    """The pass class of that name; KeyError for an unknown one."""
    module, _, kind = dict(PASSES)[name].partition(":")
    loaded: type = getattr(importlib.import_module(f"{__name__}.{module}"), kind)
    return loaded
