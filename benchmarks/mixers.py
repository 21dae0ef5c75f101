"""Mixing layers on a CPU: plain Inductor on each as it is written, against Inductor on what dyncc's passes that fuse make of it.

    python benchmarks/mixers.py --pairs 10 --write

The layers and forms are those of docs/mixers.md that are applied, each at a size where it is at home. Loops are written out by a capture
and compiled by Inductor step for step: they are timed at what it compiles within a minute or so, whatever `--tokens` says. Rows that no
pass rewrites stand for what a loop or a product could become.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import progress, write
from torch import Tensor, nn

import dyncc
from dyncc.bench_result import environment
from dyncc.evidence import relative_error
from dyncc.layers.decay_mixer import DecayMixer
from dyncc.layers.differential_linear_attention import DifferentialLinearAttention
from dyncc.layers.feedback_attention import FeedbackAttention
from dyncc.layers.gated_delta_rule import GatedDeltaRule
from dyncc.layers.gated_linear_attention import GatedLinearAttention
from dyncc.layers.hybrid_memory import HybridMemory
from dyncc.layers.memory_read import MemoryRead
from dyncc.layers.pattention import Pattention
from dyncc.layers.two_way_linear_attention import TwoWayLinearAttention
from dyncc.timing import paired

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import spelled_mixers as spelled

PASSES = "fuse-attention fuse-gated-attention fuse-linear-attention"
WIDTH, HEADS = 256, 4
WAYS = ("inductor", "dyncc")
Made = tuple[nn.Module, tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """A layer with inputs of so many tokens, and the most tokens that it is timed at (0: any number)."""

    make: Callable[[int], Made]
    most: int = 0

    def tokens(self, asked: int) -> int:
        return min(asked, self.most or asked)


def of_pairs(function: Callable[..., Tensor]) -> Case:
    """A function of q, k, v and log decays of 4 heads of 64 channels."""

    def make(tokens: int) -> Made:
        q, k, v, decay = torch.randn(4, 1, HEADS, tokens, WIDTH // HEADS).unbind()
        return spelled.Written(function), (q * 0.1, k * 0.1, v, -decay.abs() / 64)

    return Case(make)


def of_tokens(layer: Callable[[], nn.Module], most: int = 0, width: int = WIDTH) -> Case:
    return Case(lambda tokens: (layer(), (torch.randn(1, tokens, width),)), most)


def feedback(layer: Callable[[int], nn.Module], width: int, most: int = 0) -> Case:
    return Case(lambda tokens: (layer(width), (torch.randn(1, tokens, width), torch.randn(1, tokens, width))), most)


CASES: dict[str, Case] = {
    "linear attention, pairs": of_pairs(spelled.causal_pairs),
    "linear attention, earlier pairs": of_pairs(spelled.earlier_pairs),
    "linear attention, normalised pairs": of_pairs(spelled.normalised_pairs),
    "RetNet, powers": of_pairs(spelled.power_pairs),
    "GLA, pairs, a decay a head": of_pairs(spelled.head_decays),
    "GLA, pairs, a decay a channel": of_pairs(spelled.channel_decays),
    "GLA, loop": of_tokens(lambda: GatedLinearAttention(WIDTH, HEADS), 64),
    "ViG, two loops": of_tokens(lambda: TwoWayLinearAttention(WIDTH, HEADS), 32),
    "LINA, pairs": Case(lambda tokens: (spelled.ImagePairs(WIDTH, tokens, HEADS), (torch.randn(1, tokens, WIDTH),))),
    "gated delta rule, loop": of_tokens(lambda: GatedDeltaRule(WIDTH, HEADS), 64),
    "NAtS-L, chunks and a loop": of_tokens(lambda: HybridMemory(WIDTH, HEADS, 16), 64),
    "SymbolicLight, powers": of_pairs(spelled.ema_pairs),
    "SymbolicLight, loop, 64 numbers": of_tokens(lambda: DecayMixer(64, HEADS), 128, 64),
    "SymbolicLight, loop, 512 numbers": of_tokens(lambda: DecayMixer(512, HEADS), 128, 512),
    "SymbolicLight, loop, 2048 numbers": of_tokens(lambda: DecayMixer(2048, HEADS), 128, 2048),
    "DyDiLA, pairs": of_tokens(lambda: DifferentialLinearAttention(WIDTH, HEADS)),
    "Sessa, triangular solve": feedback(FeedbackAttention, WIDTH),
    "Sessa, loop": feedback(spelled.FeedbackLoop, WIDTH, 64),
    "Sessa, long loop": feedback(spelled.FeedbackLoop, 64, 256),
    "Pattention, 2048 slots": of_tokens(lambda: Pattention(WIDTH, WIDTH, 2048)),
    "Pattention, 8192 slots": of_tokens(lambda: Pattention(WIDTH, WIDTH, 8192)),
    "MoVE, softmax written out": Case(
        lambda tokens: (spelled.WrittenBank(WIDTH, 3, HEADS), (torch.randn(1, tokens, WIDTH), torch.randn(3, WIDTH)))
    ),
    "GAM, memory read": of_tokens(lambda: MemoryRead(WIDTH)),
}


def compiled(module: nn.Module, way: str) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compile(module, backend=way, dynamic=False, options={"passes": PASSES} if way == "dyncc" else None)
    return made


def first(result: Any) -> Tensor:
    """A layer's tokens, where it returns its state too."""
    found: Tensor = result[0] if isinstance(result, tuple) else result
    return found


def applied(before: int) -> list[str]:
    """The passes that rewrote something in graphs that were compiled since there were `before` reports."""
    return sorted({r.name for report in dyncc.reports()[before:] for r in report.rewrites if r.applied})


def measured(name: str, tokens: int, pairs: int) -> dict[str, Any]:
    """Milliseconds of both ways, how many times faster dyncc is, and how far its results are from Inductor's."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    count, known = CASES[name].tokens(tokens), len(dyncc.reports())
    module, inputs = CASES[name].make(count)
    calls = {way: partial(compiled(module.eval(), way), *inputs) for way in WAYS}
    timings = paired(calls, pairs=pairs, warmup=1, progress=progress)
    if timings.failures:
        print(f"{name:36} {count:5} tokens, failed: {timings.failures}", flush=True)
        return {"tokens": count, "failures": timings.failures}
    error = relative_error(first(calls["inductor"]()), first(calls["dyncc"]()))
    ratio, took, passes = timings.ratio("inductor", "dyncc"), {way: 1000 * timings.median(way) for way in WAYS}, applied(known)
    print(f"{name:36} {count:5} tokens, {ratio} ms {took['inductor']:.2f} -> {took['dyncc']:.2f}, error {error:.1e}, "
          f"applied: {', '.join(passes) or 'nothing'}", flush=True)  # fmt: skip
    told = {"times_inductor": ratio.to_dict(), "ms": took, "error": error, "applied": passes, "first_call_seconds": timings.first}
    return {"tokens": count, **told, "pairs": pairs}


def main(argv: list[str] | None = None) -> None:
    """Time every layer, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(CASES), help="rows whose names begin so")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/mixers.json")
    options = parser.parse_args(argv)
    names = [name for name in CASES if name.startswith(tuple(options.only))]
    if not names:
        parser.error(f"no row begins with {' or '.join(options.only)}; there are: {'; '.join(CASES)}")
    with torch.no_grad():
        found = {name: {**measured(name, options.tokens, options.pairs), "environment": environment()} for name in names}
    if options.write:
        write("mixers", {f"{row['tokens']} tokens, {name}": row for name, row in found.items()})


if __name__ == "__main__":
    main()
