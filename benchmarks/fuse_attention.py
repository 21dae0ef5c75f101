"""Attention that is spelled out, on a CPU: plain Inductor on it as it is, against Inductor on what dyncc's exact passes make of it.

    python benchmarks/fuse_attention.py --pairs 10 --write

One layer of attention at 4,096 tokens in several spellings, each in a process of its own, so that the most memory that a way takes can be
told (Linux): what a call adds to the process's memory at its highest. A matrix of rows x keys for all heads is 512 MB here.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import progress, write
from torch import Tensor
from torch.nn import functional as F

import dyncc
from dyncc.bench_result import environment
from dyncc.evidence import relative_error
from dyncc.timing import paired

HEADS, GROUPS, WIDTH = 8, 2, 64
LEAST = torch.finfo(torch.float32).min


def hidden(q: Tensor, k: Tensor) -> Tensor:
    """Causal, as libraries build it: from positions, then added."""
    rows, keys = torch.arange(q.shape[2], device=q.device), torch.arange(k.shape[2], device=q.device)
    return torch.where(keys[None, :] <= rows[:, None], 0.0, LEAST)[None, None]


def repeated(x: Tensor) -> Tensor:
    batch, groups, tokens, width = x.shape
    return x[:, :, None].expand(batch, groups, HEADS // groups, tokens, width).reshape(batch, HEADS, tokens, width)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k' / sqrt d) v: a form that Inductor's own patterns know."""
    k, v = repeated(k), repeated(v)
    return torch.softmax(q @ k.transpose(2, 3) / math.sqrt(WIDTH), -1) @ v


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The eager attention of a language model."""
    k, v = repeated(k), repeated(v)
    weights = torch.softmax(q @ k.transpose(2, 3) * WIDTH**-0.5 + hidden(q, k), dim=-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = repeated(k), repeated(v)
    logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * WIDTH**-0.5
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(logits.masked_fill(hidden(q, k) != 0, -1e9), -1), v)


def soft_cap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = repeated(k), repeated(v)
    logits = torch.tanh(q @ k.transpose(2, 3) * WIDTH**-0.5 / 50.0) * 50.0
    return torch.softmax(logits + hidden(q, k), dim=-1, dtype=torch.float32).to(q.dtype) @ v


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Soft cap over the last 1,024 keys."""
    rows, keys = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    seen = (keys[None] <= rows[:, None]) & (keys[None] > rows[:, None] - 1024)
    k, v = repeated(k), repeated(v)
    logits = torch.tanh(q @ k.transpose(2, 3) * WIDTH**-0.5 / 50.0) * 50.0
    return torch.softmax(logits + torch.where(seen, 0.0, LEAST), dim=-1) @ v


def sinks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = repeated(k), repeated(v)
    sink = torch.linspace(-1, 1, HEADS).reshape(1, -1, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    logits = torch.cat([q @ k.transpose(2, 3) * WIDTH**-0.5 + hidden(q, k), sink], -1)
    return torch.softmax(logits - logits.max(-1, keepdim=True).values, -1)[..., :-1] @ v


def alibi(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows, keys = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    k, v = repeated(k), repeated(v)
    slopes = (2.0 ** -torch.arange(1, HEADS + 1)).view(HEADS, 1, 1)
    return torch.softmax(q @ k.transpose(2, 3) * WIDTH**-0.5 + slopes * (keys[None] - rows[:, None]) + hidden(q, k), dim=-1) @ v


def prefix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All rows see the first 1,024 keys."""
    rows, keys = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    k, v = repeated(k), repeated(v)
    logits = q @ k.transpose(2, 3) * WIDTH**-0.5
    return torch.softmax(logits.masked_fill((keys[None] > rows[:, None]) & (keys >= 1024), LEAST), dim=-1) @ v


def over_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exponentials over their sum, divided behind the product."""
    k, v = repeated(k), repeated(v)
    logits = q @ k.transpose(2, 3) * WIDTH**-0.5 + hidden(q, k)
    weights = torch.exp(logits - logits.amax(-1, keepdim=True))
    return (weights @ v) / weights.sum(-1, keepdim=True)


def gated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A gate behind SDPA; the queries stand for its projection."""
    out = F.scaled_dot_product_attention(q, repeated(k), repeated(v), is_causal=True)
    return out.transpose(1, 2).flatten(2) * torch.sigmoid(q.transpose(1, 2).flatten(2))


def gated_spelled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return causal(q, k, v).transpose(1, 2).flatten(2) * torch.sigmoid(q.transpose(1, 2).flatten(2))


FORMS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (plain, causal, einsum, soft_cap, window, sinks, alibi, prefix, over_sum, gated, gated_spelled)
}
GATES = "fuse-attention simplify-mask drop-repeat-kv fuse-gated-attention"
"""Passes for forms with gates; the others run what is on by default."""
WAYS = ("inductor", "dyncc")


def inputs(tokens: int, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(1, heads, tokens, WIDTH).to(dtype) for heads in (HEADS, GROUPS, GROUPS)]


def peak_mb(call: Callable[[], Any]) -> float:
    """What a call adds to the process's memory at its highest, MB."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


def compiled(form: str, way: str) -> Callable[..., Tensor]:
    options = {"passes": GATES} if way == "dyncc" and form.startswith("gated") else None
    made: Callable[..., Tensor] = torch.compile(FORMS[form], backend=way, dynamic=False, options=options)
    return made


def one_peak(form: str, way: str, tokens: int, dtype: torch.dtype) -> float:
    """In this process, after a call that compiles."""
    call, values = compiled(form, way), inputs(tokens, dtype)
    with torch.no_grad():
        call(*values)
        return peak_mb(lambda: call(*values))


def peaks(form: str, tokens: int, dtype: str) -> dict[str, float]:
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--peak", form, way, "--tokens", str(tokens), "--dtype", dtype]
        found[way] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    return found


def measured(form: str, tokens: int, dtype: str, pairs: int) -> dict[str, Any]:
    values = inputs(tokens, getattr(torch, dtype))
    torch._dynamo.reset()
    calls = {way: partial(compiled(form, way), *values) for way in WAYS}
    timings = paired(calls, pairs=pairs, warmup=1, progress=progress)
    error = relative_error(calls["inductor"](), calls["dyncc"]())
    ratio, took = timings.ratio("inductor", "dyncc"), {way: 1000 * timings.median(way) for way in WAYS}
    memory = peaks(form, tokens, dtype)
    applied = [r.name for r in dyncc.reports()[-1].rewrites if r.applied]
    print(f"{form:13} {ratio} ms {took['inductor']:.0f} -> {took['dyncc']:.0f}, peak MB {memory['inductor']:.0f} -> {memory['dyncc']:.0f}, "
          f"error {error:.1e}, applied: {', '.join(applied) or 'nothing'}", flush=True)  # fmt: skip
    return {"times_inductor": ratio.to_dict(), "ms": took, "peak_mb": memory, "error": error, "applied": applied, "pairs": pairs}


def main(argv: list[str] | None = None) -> None:
    """Time every spelling, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--forms", nargs="*", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--peak", nargs=2, metavar=("FORM", "WAY"), help="print the peak of one way, MB, and stop")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/fuse_attention.json")
    options = parser.parse_args(argv)
    if options.peak:
        print(one_peak(*options.peak, options.tokens, getattr(torch, options.dtype)))
        return
    with torch.no_grad():
        found = {form: measured(form, options.tokens, options.dtype, options.pairs) for form in options.forms}
    if options.write:
        write("fuse_attention", {f"{options.tokens} tokens, {options.dtype}": {"forms": found, "environment": environment()}})


if __name__ == "__main__":
    main()
