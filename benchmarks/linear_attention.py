"""Gated linear attention on a CPU: its forms and softmax attention of the same width, all compiled by Inductor, in interleaved pairs.

    python benchmarks/linear_attention.py --tokens 2048 4096 --pairs 10 --write

`step` is a compiled block of 32 tokens that is called until all are done (a whole prompt unrolled does not compile). `dense` has one
decay a token and head, the easier case: with one a channel it would hold tokens x tokens x width numbers a head. `chunk` is
the op's truth compiled, which the Inductor engine runs at fixed sizes; `op` is the op's own kernel, which runs where sizes vary.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from record import progress, write
from torch import Tensor
from torch.nn import functional as F

from dyncc.bench_result import environment
from dyncc.evidence import relative_error
from dyncc.kernels.gated_linear_attention import GATED_LINEAR_ATTENTION, chunk, step
from dyncc.timing import paired

HEADS, WIDTH, BLOCK = 4, 64, 32


def dense(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Tensor:
    """(q k' * decays) v as people write it: one decay a token, sums subtracted."""
    since = decay.cumsum(2)
    between = (since - since.transpose(2, 3)).tril()
    return (q @ k.transpose(2, 3) * between.exp()).tril() @ v


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    made: Callable[..., Any] = torch.compile(function, dynamic=False)
    return made


def in_blocks(q: Tensor, k: Tensor, v: Tensor, decay: Tensor) -> Callable[[], Tensor]:
    block = compiled(step)
    parts = [tuple(x[:, :, at : at + BLOCK].contiguous() for x in (q, k, v, decay)) for at in range(0, q.shape[2], BLOCK)]

    def call() -> Tensor:
        state, outs = torch.zeros(q.shape[0], HEADS, WIDTH, WIDTH), []
        for part in parts:
            out, state = block(*part, state)
            outs.append(out)
        return torch.cat(outs, 2)

    return call


def measured(tokens: int, pairs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, HEADS, tokens, WIDTH) * WIDTH**-0.25
    decay = F.logsigmoid(torch.randn(1, HEADS, tokens, WIDTH)) / 16
    form, op, pairwise = (compiled(f) for f in (chunk, GATED_LINEAR_ATTENTION, dense))
    attend = compiled(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    calls = {
        "step": in_blocks(q, k, v, decay), "dense": lambda: pairwise(q, k, v, decay[..., :1]), "sdpa": lambda: attend(q, k, v),
        "op": lambda: op(q, k, v, decay)[0], "chunk": lambda: form(q, k, v, decay)[0],
    }  # fmt: skip
    timings = paired(calls, pairs=pairs, warmup=1, progress=progress)
    found: dict[str, Any] = {"ms": {n: 1000 * timings.median(n) for n in timings.seconds}, "failures": timings.failures, "pairs": pairs}
    found["error"] = {n: relative_error(calls["step"](), calls[n]()) for n in ("op", "chunk")}
    found["first_call_seconds"] = timings.first
    for way in ("op", "chunk"):
        for other in ("step", "dense", "sdpa"):
            ratio = timings.ratio(other, way)
            found[f"{way} against {other}"] = ratio.to_dict()
            print(f"{tokens} tokens, {way:5} against {other:5} {ratio}", flush=True)
    print(f"{tokens} tokens, ms {({n: round(x, 1) for n, x in found['ms'].items()})}, error {found['error']}", flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    """Time every length, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 4096])
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/linear_attention.json")
    options = parser.parse_args(argv)
    with torch.no_grad():
        found = {f"{tokens} tokens": {**measured(tokens, options.pairs), "environment": environment()} for tokens in options.tokens}
    if options.write:
        write("linear_attention", found)


if __name__ == "__main__":
    main()
