"""Published systems as settings of a pass: a recipe names the parts, and can be used wherever a pass name can.

`evit{keep=0.5}` is the pass of the recipe `evit` with its options, `keep` replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """A system: the pass it configures, the texts of that pass's options, and where it was published."""

    name: str
    pass_name: str
    options: Mapping[str, str]
    citation: str
    needs: Literal["training-free", "fitting", "trained weights"]
    note: str
    confidence: Literal["high", "medium", "low"]

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))


EVIT = Recipe(
    name="evit",
    pass_name="prune-tokens",
    options={"keep": "0.7", "layers": "3,6,9", "score": "cls-attention", "site": "attention", "fuse": "true"},
    citation="Liang et al., Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations, ICLR 2022",
    needs="training-free",
    note="made for encoders with a class token; the authors fine-tune for their best figures; dropped rows become one fused row",
    confidence="high",
)

PROMPTDISTILL = Recipe(
    name="promptdistill",
    pass_name="prune-tokens",
    options={"keep": "1024", "layers": "13", "score": "last-logits"},
    citation="Jin et al., PromptDistill: Query-based Selective Token Retention in Intermediate Layers for Efficient LLM Inference, 2025",
    needs="training-free",
    note="layer 13 of 32 and 1,024 rows are the paper's values for an 8B decoder; scores are the last token's raw q.k, mean over heads",
    confidence="high",
)

LAZYLLM = Recipe(
    name="lazyllm",
    pass_name="prune-tokens",
    options={"keep": "0.7,0.5,0.3", "layers": "25%,50%,75%", "score": "last-attention"},
    citation="Fu et al., LazyLLM: Dynamic Token Pruning for Efficient Long Context LLM Inference, 2024",
    needs="training-free",
    note="prefill only, without the revival of pruned tokens; three stages with falling keep, ratios as third parties report them",
    confidence="medium",
)

TOKENSELECT = Recipe(
    name="tokenselect",
    pass_name="select-kv",
    options={"budget": "2688", "score": "vote", "share": "layer", "sinks": "128", "recents": "512"},
    citation="Wu et al., TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV Cache "
    "Selection, 2024",
    needs="training-free",
    note="decoding steps only: 2,048 voted keys between 128 first and 512 last ones; each step selects anew (no selection cache)",
    confidence="high",
)

SINK_WINDOW = Recipe(
    name="sink-window",
    pass_name="select-kv",
    options={"budget": "2048", "score": "recents", "share": "layer", "sinks": "4", "recents": "0"},
    citation="Xiao et al., Efficient Streaming Language Models with Attention Sinks, ICLR 2024",
    needs="training-free",
    note="StreamingLLM's choice of keys at their original positions; the cache stays whole, so memory is not bounded",
    confidence="high",
)

RECIPES: tuple[Recipe, ...] = (EVIT, PROMPTDISTILL, LAZYLLM, TOKENSELECT, SINK_WINDOW)
"""Every recipe; the tuple is the list that `dyncc passes` prints."""
