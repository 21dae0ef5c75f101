"""Linear attention one token after the other, with the state in registers: what a decoding step runs.

    S_t = diag(exp(a_t)) S_{t-1} + k_t' v_t             o_t = scale q_t S_t        gated linear attention (Yang et al. 2023)
    S_t = S' + b_t k_t' (v_t - k_t S'), S' = exp(a_t) S_{t-1}                      the gated delta rule (Yang et al. 2024)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dyncc.kernels.generator.frame import OUT, TILE, Operand
from dyncc.kernels.generator.kinds.head_base import HeadKernel
from dyncc.kernels.generator.launch import broadcast, launch, results, side_by_side, stored
from dyncc.kernels.generator.spec import check

DECAYS = ("none", "head", "channel")
RULES = ("add", "delta")
WIDEST_STATE = 256
"""Channels of keys or values above which a state no longer fits one program's registers."""


@dataclass(frozen=True)
class LinearStep(HeadKernel):
    """`width` channels of keys, `wide` of values (0: as many); one decay a head, one a channel of the keys, or none.

    `started`: there is a state in front of the first token.
    """

    entry: ClassVar[str] = "linear_step"
    title: ClassVar[str] = "Linear attention token by token"
    in_order: ClassVar[bool] = False

    decay: str = "channel"
    rule: str = "add"
    started: bool = True

    def __post_init__(self) -> None:
        check_state(self)
        super().__post_init__()

    @property
    def team(self) -> int:
        """A warp for 2048 numbers of the state."""
        return self.warps or max(1, min(16, self.lanes[0] * self.lanes[1] // 2048))

    def operands(self) -> tuple[Operand, ...]:
        return recurrent_operands(self)

    def told(self) -> list[str]:
        return recurrent_told(self)

    def work(self) -> tuple[int, int]:
        """One token of 32 heads."""
        state = self.width * self.value_width
        decays = {"none": 0, "head": 1, "channel": self.width}[self.decay] * 4
        channels = 2 * self.width + self.value_width * (2 + len(self.epilogues))
        flops = 32 * state * (4 + (self.decay != "none") + 2 * (self.rule == "delta"))
        return flops, 32 * (state * 4 * (1 + self.started) + channels * self.itemsize + decays)

    def body(self, ending: list[str]) -> list[str]:
        fell = {
            "none": [],
            "head": ["held = held * tl.exp(tl.load(decay_at))"],
            "channel": ["held = held * tl.exp(tl.load(decay_at + channel, mask=filled, other=0.0))[:, None]"],
        }
        wrong = ["v_tile = tl.load(beta_at) * (v_tile - tl.sum(held * k_tile[:, None], axis=0))"]
        rows = recurrent_rows(self)
        inner = [
            "q_tile = tl.load(q_at + channel, mask=filled, other=0.0).to(tl.float32)",
            "k_tile = tl.load(k_at + channel, mask=filled, other=0.0).to(tl.float32)",
            "v_tile = tl.load(v_at + lane, mask=lane < WIDTH, other=0.0).to(tl.float32)",
            *fell[self.decay],
            *(wrong if self.rule == "delta" else []),
            "held += k_tile[:, None] * v_tile[None, :]",
            "result = tl.sum(held * q_tile[:, None], axis=0)[None, :] * scale",
            *ending,
            *(f"{name}_at += {name}_row" for name in rows),
            "here += 1",
        ]
        return [
            f"WIDTH: tl.constexpr = {self.value_width}",
            "which = tl.program_id(0)",
            "batch, head = (which // HEADS).to(tl.int64), (which % HEADS).to(tl.int64)",
            f"channel, lane, step = tl.arange(0, {self.lanes[0]}), tl.arange(0, {self.lanes[1]}), tl.arange(0, 1)",
            f"filled, kept = channel < {self.width}, (lane < WIDTH)[None, :]",
            *(f"{name}_at = {name} + batch * {name}_batch + head * {name}_head" for name in rows),
            *state_lines(self.width, self.lanes, self.started),
            "here = tl.full([], 0, dtype=tl.int64)",
            "for _ in range(0, rows):",
            *(f"    {line}" for line in inner),
            "tl.store(last + held_at, held, mask=held_in)",
        ]

    def run(self, *given: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        """Results [B, H, T, wide] and the state [B, H, width, wide] in float32 behind the last token.

        Args:
            given: q and k [B, H, T, width], v [B, H, T, wide].
            more: `log_decay` broadcastable to [B, H, T, width] (or [B, H, T, 1] for one a head); `beta` [B, H, T, 1] of the delta rule;
                `state` [B, H, width, wide] where the spec is started; `scale`; what the epilogues read.
        """
        return run_recurrent(self, (given[0].shape[0] * given[0].shape[1],), given, more)

    def truth(self, *given: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        return recurrent_truth(self, given, more)


def check_state(spec: Any) -> None:
    check(0 < spec.width <= WIDEST_STATE, "width", spec.width, f"a state has 1 to {WIDEST_STATE} channels of keys")
    wide = f"a state has 1 to {WIDEST_STATE} channels of values, or 0 for as many as of keys"
    check(0 <= spec.wide <= WIDEST_STATE, "wide", spec.wide, wide)
    check(spec.decay in DECAYS, "decay", spec.decay, f"choose one of {', '.join(DECAYS)}")
    check(spec.rule in RULES, "rule", spec.rule, f"choose one of {', '.join(RULES)}")


def recurrent_rows(spec: Any) -> list[str]:
    """The operands that have a row a token."""
    return [*"qkv", *(["decay"] if spec.decay != "none" else []), *(["beta"] if spec.rule == "delta" else [])]


def recurrent_told(spec: Any) -> list[str]:
    return [f"decay_{spec.decay}", *(["delta"] if spec.rule == "delta" else []), *(["started"] if spec.started else [])]


def recurrent_operands(spec: Any) -> tuple[Operand, ...]:
    told = [Operand(name, TILE, "given" if name in "qkv" else "float") for name in recurrent_rows(spec)]
    told += [Operand("state", (), "float")] if spec.started else []
    return (*told, Operand("last", (), "float"), OUT)


def state_lines(width: int, lanes: tuple[int, int], started: bool) -> list[str]:
    """`held` [lanes of keys, lanes of values] in front of the first token."""
    first = "tl.load(state + held_at, mask=held_in, other=0.0)" if started else f"tl.zeros([{lanes[0]}, {lanes[1]}], dtype=tl.float32)"
    return [
        f"held_at = ((batch * HEADS + head) * {width} + channel)[:, None] * WIDTH + lane[None, :]",
        "held_in = filled[:, None] & (lane < WIDTH)[None, :]",
        f"held = {first}",
    ]


def run_recurrent(spec: Any, grid: tuple[int, ...], given: tuple[Tensor, ...], more: dict[str, Any]) -> tuple[Tensor, Tensor]:
    told = dict(more)
    q, k, v = (side_by_side(x) for x in given)
    batch, heads, rows, width = q.shape
    shape = (batch, heads, rows, spec.value_width)
    decay, beta, state = (told.pop(name, None) for name in ("log_decay", "beta", "state"))
    if decay is not None:
        decay = side_by_side(decay.float().expand(batch, heads, rows, 1 if spec.decay == "head" else width))
    out, scale = told.pop("out", None), told.pop("scale", 1.0)
    out = results(spec, v, shape, out)
    last = q.new_empty((batch, heads, width, spec.value_width), dtype=torch.float32)
    tensors = {"q": q, "k": k, "v": v, "decay": decay, "beta": None if beta is None else beta.float(), "last": last, "out": out}
    tensors["state"] = None if state is None else state.float().contiguous()
    launch(spec, grid, tensors, {"rows": rows, "scale": scale}, {"HEADS": heads}, broadcast(spec, told, shape))
    return out, last


def recurrent_truth(spec: Any, given: tuple[Tensor, ...], more: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written, in float32."""
    told = dict(more)
    q, k, v = (x.float() for x in given)
    decay, beta, state, scale, _ = (told.pop(name, default) for name, default in DEFAULTS.items())
    kept = q.new_ones(1, 1, 1, 1) if decay is None else decay.float().exp()
    kept = kept.expand(*q.shape[:3], kept.shape[3])
    held = q.new_zeros((*q.shape[:2], q.shape[3], v.shape[3])) if state is None else state.float()
    outs = []
    for t in range(q.shape[2]):
        held = held * kept[:, :, t, :, None]
        value = v[:, :, t, None] if beta is None else beta[:, :, t, None].float() * (v[:, :, t, None] - k[:, :, t, None] @ held)
        held = held + k[:, :, t, :, None] * value
        outs.append(scale * q[:, :, t, None] @ held)
    return stored(spec, torch.cat(outs, 2), told), held


DEFAULTS: dict[str, Any] = {"log_decay": None, "beta": None, "state": None, "scale": 1.0, "out": None}
