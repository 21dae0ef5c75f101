"""Attention of a decoding step alone, on a CPU: SDPA against the generated kernel over all keys, and against policies that read fewer.

    python benchmarks/row_attention.py --pairs 20 --write

Thirty layers of SmolLM2's shape (9 heads, 3 groups, 64 channels), each with keys of its own, so that no cache holds them. The bound is the
bytes that must be read over the bandwidth of a plain sum, taken in the same rounds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from record import progress, write
from torch import Tensor

from dyncc.bench_result import environment
from dyncc.kernels.one_row import ATTEND_BEST_PAGES, ATTEND_ROW, SCORE_KEYS, SELECT_BEST
from dyncc.kernels.select_keys import near_bounds
from dyncc.timing import paired

LAYERS, HEADS, GROUPS, WIDTH = 30, 9, 3, 64
PAGE, SMALL = 16, 8
"""Keys of a page: where each head chooses for itself, and where a group's heads choose together."""
DENSE, KERNEL, SUM = "SDPA, all keys", "kernel, all keys", "plain sum"
Layer = tuple[Tensor, ...]
"""Queries, keys, values, and the bounds of pages and of small pages."""


def sdpa(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def whole(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor) -> Any:
    return ATTEND_ROW(q, k, v, None, None, 1, None)


def kept(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor, budget: int) -> Any:
    """What an evicting cache leaves."""
    return ATTEND_ROW(q, k[:, :, :budget], v[:, :, :budget], None, None, 1, None)


def tokens(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor, budget: int) -> Any:
    """TokenSelect: the soft vote over all keys, then the best."""
    at = SELECT_BEST(SCORE_KEYS(q, k, None, "vote", "layer", None), budget, None, 16, 64)
    return ATTEND_ROW(q, k, v, None, at, 1, None)


def pages(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor, budget: int) -> Any:
    """Quest: bounds of pages that the cache keeps, then the best pages of each head."""
    return ATTEND_BEST_PAGES(q, k, v, *bounds[:2], None, None, "head", budget // PAGE, 1, 2, PAGE, None)


def pages_of_groups(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor, budget: int) -> Any:
    """Bounds drawn towards the mean, of smaller pages, of which a group takes those that matter most to any of its heads."""
    return ATTEND_BEST_PAGES(q, k, v, *bounds[2:], None, None, "any", budget // SMALL, 1, 5, SMALL, None)


def plain_sum(q: Tensor, k: Tensor, v: Tensor, *bounds: Tensor) -> Any:
    return k.sum(), v.sum()


def share_read(name: str, keys: int) -> float:
    """Bytes that must be read, over those of all keys and values."""
    policy, _, budget = name.rpartition(" ")
    scores = {"tokenselect": 0.5, "quest": 1 / PAGE, "quest, any": 1 / SMALL, "evicted": 0.0}
    return scores[policy] + min(1.0, int(budget) / keys) if policy in scores else 1.0


def layers(batch: int, keys: int, dtype: torch.dtype) -> list[Layer]:
    made = []
    for _ in range(LAYERS):
        q, k, v = (torch.randn(batch, h, n, WIDTH).to(dtype) for h, n in ((HEADS, 1), (GROUPS, keys), (GROUPS, keys)))
        made.append((q, k, v, *near_bounds(k, PAGE, 1.0), *near_bounds(k, SMALL, 0.35)))
    return made


def ways(budget: int) -> dict[str, Callable[..., Any]]:
    chosen = {"evicted": kept, "tokenselect": tokens, "quest": pages, "quest, any": pages_of_groups}
    return {DENSE: sdpa, KERNEL: whole, SUM: plain_sum, **{f"{name} {budget}": partial(way, budget=budget) for name, way in chosen.items()}}


def through(way: Callable[..., Any], model: list[Layer]) -> None:
    for layer in model:
        way(*layer)


def measured(batch: int, keys: int, dtype: torch.dtype, budget: int, pairs: int) -> dict[str, Any]:
    """Milliseconds of all layers, ratios to dense SDPA and to the kernel over all keys, and the share of the bandwidth bound."""
    model, rows = layers(batch, keys, dtype), {}
    timings = paired({n: partial(through, way, model) for n, way in ways(budget).items()}, pairs=pairs, warmup=2, progress=progress)
    read = 1000 * timings.median(SUM)
    for name in timings.seconds:
        ms, bound = 1000 * timings.median(name), read * share_read(name, keys)
        ratios = {"times_sdpa": timings.ratio(DENSE, name).to_dict(), "times_kernel": timings.ratio(KERNEL, name).to_dict()}
        rows[name] = {"ms": ms, "bound_ms": bound, **ratios}
        told = f"{timings.ratio(DENSE, name)} times SDPA, {timings.ratio(KERNEL, name)} times the kernel over all keys"
        print(f"{batch} x {keys:6,} {name:18} {ms:7.1f} ms, {told}, bound {bound:.1f} ms")
    return rows


def break_even(found: dict[int, dict[str, Any]], name: str) -> int | None:
    """The least length measured from which on a policy is faster than the kernel over all keys, by its interval's lower end."""
    wins = [keys for keys, rows in found.items() if rows[name]["times_kernel"]["low"] > 1]
    return min((k for k in wins if all(other in wins for other in found if other >= k)), default=None)


def main(argv: list[str] | None = None) -> None:
    """Time all ways at several lengths, print break-even lengths, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, nargs="*", default=[1000, 2000, 4000, 8000, 16000])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--budget", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/row_attention.json")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    with torch.no_grad():
        dtype = getattr(torch, options.dtype)
        found = {n: measured(options.batch, n, dtype, options.budget, options.pairs) for n in options.keys}
    even = {name: break_even(found, name) for name in ways(options.budget) if name not in (DENSE, KERNEL, SUM)}
    for name, keys in even.items():
        print(f"{name}: faster than the kernel over all keys from {keys:,} keys on" if keys else f"{name}: never faster at these lengths")
    if options.write:
        title = f"batch {options.batch}, {options.dtype}, budget {options.budget}"
        write("row_attention", {title: {"keys": found, "break_even": even, "pairs": options.pairs, "environment": environment()}})


if __name__ == "__main__":
    main()
