"""simplify-mask: an attention mask that hides nothing goes; one that is only causal becomes the flag.

Libraries build masks from positions in many steps even when the result is "everything" or "no later key". A mask that is handed to
attention as a tensor keeps the fastest kernels away (torch materialises it; 2,048 causal tokens: 73 ms with a bool mask, 40 with the flag
on one CPU). The mask is evaluated over abstract values, whatever the sizes (dyncc/analysis/mask_values.py). `dyncc::attend` also has a
window and a prefix that all rows see; SDPA has neither, and keeps such masks. Exact: the same rows and keys are seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from dyncc.analysis.attention import AttentionRegion
from dyncc.analysis.facts import Facts
from dyncc.analysis.mask_values import Abstract, Causal, Const, evaluate
from dyncc.ir import argument, refresh, shape, val
from dyncc.kernels.fused_attention import ATTEND
from dyncc.passes.mask_edges import edge_of
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class SimplifyMask(Pass):
    """Replace masks that hide nothing, or only later keys, by no mask or the causal flag."""

    name: ClassVar[str] = "simplify-mask"
    summary: ClassVar[str] = "drop attention masks that hide nothing; turn purely causal ones into the flag"
    exact: ClassVar[bool] = True
    keeps_gradients: ClassVar[bool] = True

    def run(self, program: Any, facts: Facts, context: Context) -> PassResult:
        """Rewrite every fused attention whose mask is understood; refuse when none is."""
        masked = [r for r in facts.attention if r.fused and r.mask is not None]
        if not masked:
            raise Refusal("no fused attention takes a mask")
        known: dict[fx.Node, Abstract] = {}
        done, misses = 0, []
        for region in masked:
            value = evaluate(region.mask, known)
            if _hides_nothing(region.mask, value) or _is_flag(region, value):
                _set_mask(region.out, value if isinstance(value, Causal) else None)
                done += 1
            else:
                misses.append(f"attention {region.index}: its mask depends on the inputs, or hides more than later keys")
        if not done:
            raise Refusal(misses[0])
        return PassResult(done, len(masked), misses=tuple(misses))


def _hides_nothing(mask: fx.Node, value: Abstract) -> bool:
    """True everywhere, or the same number added to every logit."""
    if not isinstance(value, Const):
        return False
    return value.value not in (math.inf, -math.inf) if val(mask).is_floating_point() else bool(value.value)


def _is_flag(region: AttentionRegion, value: Abstract) -> bool:
    edge = edge_of(value, region.mask, shape(region.q)[-2], shape(region.k)[-2])  # type: ignore[arg-type]
    return edge is not None and (region.out.target is ATTEND or not any(edge))


def _set_mask(sdpa: fx.Node, edge: Causal | None) -> None:
    kwargs = {k: v for k, v in sdpa.kwargs.items() if k not in ("attn_mask", "dropout_p", "is_causal")}
    causal = edge is not None or bool(argument(sdpa, "is_causal", False))
    kwargs |= {name: n for name in ("window", "prefix") if edge is not None and (n := getattr(edge, name))}
    dropout = argument(sdpa, "dropout_p", 0.0)
    sdpa.args = (*sdpa.args[:3], None, dropout, causal) if causal or dropout else tuple(sdpa.args[:3])
    sdpa.kwargs = kwargs
    refresh(sdpa)
