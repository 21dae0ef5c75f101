"""SmolLM2, teacher-forced decoding behind a long prompt: `select-kv` against the exact passes, quality and speed in one run.

    python benchmarks/select_kv.py --prompt 7744 --ahead 256 --documents 8 --write

Every token is read by all variants in turns, each with a `dyncc.KVCache` of its own and the true text before it. Reported are the
perplexity of the tokens ahead against dense, the median of paired ratios of the time of a step, and their 95 % intervals (documents are
resampled for the first, steps for the second).
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from typing import Any

import numpy as np
import torch
from record import progress, write
from torch import Tensor
from torch.nn import functional as F

import dyncc
from dyncc.bench_result import environment
from dyncc.models import english_tokens, load_smollm2
from dyncc.timing import paired_ratio

DENSE = "exact passes"
PIPELINES = [
    "select-kv{budget=512 score=vote share=layer sinks=4 recents=32}",
    "select-kv{budget=256 score=logits share=head sinks=0 recents=0}",
    "sink-window{budget=512}",
]


def main(argv: list[str] | None = None) -> None:
    """Read the documents with every pipeline, print the table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("passes", nargs="*", default=PIPELINES, help="pipelines to compare with the exact passes")
    parser.add_argument("--prompt", type=int, default=1536)
    parser.add_argument("--ahead", type=int, default=512)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/select_kv.json")
    options = parser.parse_args(argv)
    model, tokenizer = load_smollm2(getattr(torch, options.dtype))
    span = options.prompt + options.ahead
    documents = english_tokens(tokenizer)[: options.documents * span].view(options.documents, span)
    exact = "simplify-mask slice-last-token drop-repeat-kv"
    runs: dict[str, Any] = {DENSE: _compiled(model, exact)}
    runs |= {text: _compiled(model, f"simplify-mask slice-last-token {text} drop-repeat-kv") for text in options.passes}
    losses: dict[str, list[float]] = {name: [] for name in runs}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number, document in enumerate(documents):
        _read(model, runs, document, options.prompt, losses, seconds)
        progress("documents", number + 1, options.documents)
    rows = {name: _row(losses, seconds, name) for name in runs}
    for name, row in rows.items():
        low, high = row["perplexity_change_interval"]
        change = f"perplexity {row['perplexity']:.3f} ({row['perplexity_change']:+.2%} [{low:+.2%}, {high:+.2%}])"
        print(f"{name}\n  {change}, {row['ms']:.1f} ms a token, {row['ratio_text']} times as fast as exact")
    for report in dyncc.reports():
        found = [f"{r.name} {r.found} of {r.expected}" for r in report.rewrites if r.applied]
        print(f"graph {report.number}: {', '.join(found) or 'no rewrite'}{f'; fallback {report.fallback}' if report.fallback else ''}")
    if options.write:
        title = f"{options.documents} x {options.prompt} + {options.ahead} tokens, {options.dtype}"
        write("select_kv", {title: {"variants": rows, "environment": environment()}})


def _compiled(model: Any, passes: str) -> Any:
    return torch.compile(model, backend="dyncc", options={"passes": passes, "evidence": "off"}, dynamic=True)


@torch.no_grad()
def _read(
    model: Any, runs: dict[str, Any], document: Tensor, prompt: int, losses: dict[str, list[float]], seconds: dict[str, list[float]]
) -> None:
    """Read one document; every token goes through all variants before the next."""
    first = dyncc.KVCache()
    logits = model(input_ids=document[None, :prompt], past_key_values=first, logits_to_keep=1).logits
    caches = {name: copy.deepcopy(first) for name in runs}
    total = dict.fromkeys(runs, F.cross_entropy(logits[0].float(), document[prompt : prompt + 1]).item())
    names = list(runs)
    for step, position in enumerate(range(prompt, len(document) - 1)):
        for name in names[step % len(names) :] + names[: step % len(names)]:
            start = time.perf_counter()
            out = runs[name](input_ids=document[None, position : position + 1], past_key_values=caches[name], logits_to_keep=1)
            if step >= 4:  # the first steps compile
                seconds[name].append(time.perf_counter() - start)
            total[name] += F.cross_entropy(out.logits[0].float(), document[position + 1 : position + 2]).item()
    for name in names:
        losses[name].append(total[name] / (len(document) - prompt))


def _row(losses: dict[str, list[float]], seconds: dict[str, list[float]], name: str) -> dict[str, Any]:
    change = np.asarray(losses[name]) - np.asarray(losses[DENSE])
    drawn = np.random.default_rng(0).integers(0, len(change), size=(2000, len(change)))
    low, high = np.percentile(np.exp(change[drawn].mean(1)) - 1, [2.5, 97.5])
    ratio = paired_ratio(seconds[DENSE], seconds[name])
    return {
        "perplexity": math.exp(np.mean(losses[name])),
        "perplexity_change": math.exp(change.mean()) - 1,
        "perplexity_change_interval": (float(low), float(high)),
        "ms": 1000 * float(np.median(seconds[name])),
        "ratio": ratio.to_dict(),
        "ratio_text": str(ratio),
        "steps": len(seconds[name]),
    }


if __name__ == "__main__":
    main()
