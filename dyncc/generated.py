"""The kernels that are generated for a rewritten model: of which node, and which pass put it there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import fx

from dyncc.ir import Program, argument, fake_mode_of, hint, on_fakes, operands, shape, val
from dyncc.kernels.fused_attention import ATTEND
from dyncc.kernels.fused_attention.gpu import as_mask, spec_of
from dyncc.kernels.gated_delta_rule import GATED_DELTA_RULE
from dyncc.kernels.gated_linear_attention import GATED_LINEAR_ATTENTION
from dyncc.kernels.gated_linear_attention.op import SHORT
from dyncc.kernels.generator import KernelSpec
from dyncc.kernels.generator.kinds import LinearChunk, LinearStep
from dyncc.kernels.generator.spec import dtype_of


def generated(program: Program, differences: Mapping[str, str]) -> Iterator[tuple[KernelSpec, str]]:
    """Each kernel with its provenance: "node attend of fuse-attention".

    Args:
        differences: what each applied pass changed, by its text (`Report.difference`).
    Raises:
        BadKernelSpec: no kernel of a node's sizes can be made; the message names the field.
    """
    for node in program.graph.nodes:
        spec = SPECS[node.target](node) if node.op == "call_function" and node.target in SPECS else None
        if spec is not None:
            yield spec, f"node {node.name} of {_origin(node, differences)}"


def _origin(node: fx.Node, differences: Mapping[str, str]) -> str:
    """The last pass that wrote the node."""
    made = [text for text, lines in differences.items() if any(x.startswith(f"+{node.name} = ") for x in lines.splitlines())]
    return made[-1].split("{")[0] if made else "the model itself"


def _attend(node: fx.Node) -> KernelSpec | None:
    named = ("query", "key", "value", "attn_mask", "is_causal", "sinks", "cap", "window", "gate", "activation", "prefix", "slopes")
    *told, prefix, slopes = (val(argument(node, name)) for name in named)
    if prefix or slopes is not None:
        with on_fakes(fake_mode_of(node.graph)):
            told[3] = as_mask(told[0], told[1], told[3], told[4], told[7], prefix, slopes)
        told[4], told[7] = False, 0
    return spec_of(*told)


def _linear(node: fx.Node) -> KernelSpec:
    q, _, v = operands(node)[:3]
    delta, decay, state = node.target is GATED_DELTA_RULE, argument(node, "log_decay"), argument(node, "state")
    width, wide = (hint(shape(x)[3]) for x in (q, v))
    channels = decay is not None and not delta and shape(decay) and hint(shape(decay)[-1]) == width > 1
    told: dict[str, Any] = {"decay": "channel" if channels else "none" if decay is None else "head", "started": state is not None}
    told |= {"rule": "delta" if delta else "add", "dtype": dtype_of(val(q))}
    kind = LinearStep if hint(shape(q)[2]) <= SHORT else LinearChunk
    return kind(width, wide if wide != width else 0, **told)


SPECS = {ATTEND: _attend, GATED_LINEAR_ATTENTION: _linear, GATED_DELTA_RULE: _linear}
"""The kernel that is generated for a node of each op; None where the op's truth serves it."""
