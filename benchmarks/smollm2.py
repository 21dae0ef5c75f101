"""SmolLM2-135M, dense under plain Inductor against dyncc, on English text.

    python benchmarks/smollm2.py decode prefill distill --pairs 20 --write

decode   one token after 4,096 cached keys, with an all-ones mask and without, for a growing and a preallocated cache
prefill  prompts of 2,048 and 4,096 tokens, with an all-ones mask and without
distill  `promptdistill` on a prompt of 4,096: time to first token, and what 16 documents lose in quality

When K/V are expanded to all query heads (transformers 5.23, torch 2.13, `integrations/sdpa_attention.py`): `use_gqa_in_sdpa` passes
grouped keys on only where the attention gets no mask, so everything hangs on whether a mask is built.
- torch.compile with an all-ones mask: its values cannot be read while compiling, so a mask is built and keys are repeated.
- torch.compile without a mask: with a growing cache the attention is causal by flag and takes grouped keys; a preallocated cache needs a
  mask, and a prompt read without a cache gets one against packed sequences; both repeat keys.
- torch.export always builds a mask, given one or not, and repeats keys: unsqueeze, expand, reshape before each attention.
- Eager skips an all-ones mask; for a single query behind a mask it packs the query heads instead (`pack_gqa`).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from record import progress, write

from dyncc.bench import bench
from dyncc.bench_result import BenchResult
from dyncc.decoding import Decode, Prefill, StaticDecode, compare_continuations
from dyncc.models import english_tokens, load_smollm2

DISTILL = "simplify-mask promptdistill{layers=14 keep=1024} slice-last-token drop-repeat-kv"


def decode(model: Any, tokens: torch.Tensor, options: argparse.Namespace) -> list[BenchResult]:
    """One token after many cached keys, exact passes."""
    held = options.cached
    with torch.no_grad():
        _, *past = Prefill(model, keys=True)(tokens[:held][None])
    token, ones = tokens[held : held + 1][None], torch.ones(1, held + 1, dtype=torch.long)
    results = []
    for label, mask in (("all-ones mask", ones), ("no mask", None)):
        growing = f"decode, {held} keys, growing cache, {label}"
        results.append(_run(Decode(model), (token, mask, *past), growing, options))
        static = StaticDecode(model, past, capacity=held + 64)
        preallocated = f"decode, {held} keys, preallocated cache, {label}"
        results.append(_run(static, (token, mask), preallocated, options, prepare=static.rewind))
    return results


def prefill(model: Any, tokens: torch.Tensor, options: argparse.Namespace) -> list[BenchResult]:
    """Whole prompts, last position's logits only, exact passes."""
    results = []
    for length in options.lengths:
        ids = tokens[:length][None]
        for label, mask in (("all-ones mask", torch.ones_like(ids)), ("no mask", None)):
            results.append(_run(Prefill(model), (ids, mask), f"prefill, {length} tokens, {label}", options))
    return results


def distill(model: Any, tokens: torch.Tensor, options: argparse.Namespace) -> list[BenchResult]:
    """Prompt pruning from layer 14 on, by `dyncc.optimize`; the keys of all layers are returned."""
    ids = tokens[: options.prompt][None]
    ones = torch.ones_like(ids)
    results = []
    for label, mask in (("all-ones mask", ones), ("no mask", None)):
        title = f"time to first token, {options.prompt} tokens, {label}"
        result = _run(Prefill(model, keys=True), (ids, mask), title, options, passes=options.passes, door=2)
        results.append(result)
    runs = results[0].runs
    if "dyncc" in runs:
        found = _documents(model, runs, ones, tokens, options)
        results[0].quality["documents"] = found
        print(", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in found.items()))
    return results


def _documents(model: Any, runs: dict[str, Any], mask: torch.Tensor, tokens: torch.Tensor, options: argparse.Namespace) -> dict[str, float]:
    dense, pruned = runs.get("inductor", Prefill(model, keys=True)), runs["dyncc"]
    return compare_continuations(
        model,
        lambda prompt: dense(prompt, mask),
        lambda prompt: pruned(prompt, mask),
        tokens,
        options.prompt,
        options.ahead,
        options.documents,
        progress,
    )


BENCHMARKS = {"decode": decode, "prefill": prefill, "distill": distill}


def main(argv: list[str] | None = None) -> None:
    """Run the chosen benchmarks, print their tables, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", default=[], metavar="|".join(BENCHMARKS), help="what to run (all of them by default)")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--against", nargs="+", default=["inductor"], help="eager and any torch.compile backend")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cached", type=int, default=4096, help="keys in the cache of decode")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096], help="prompt lengths of prefill")
    parser.add_argument("--prompt", type=int, default=4096, help="prompt length of distill")
    parser.add_argument("--passes", default=DISTILL, help="pipeline of distill")
    parser.add_argument("--ahead", type=int, default=128, help="tokens after the prompt whose perplexity is measured")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/smollm2.json")
    options = parser.parse_args(argv)
    unknown = [name for name in options.which if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}")
    model, tokenizer = load_smollm2(getattr(torch, options.dtype))
    tokens = english_tokens(tokenizer)
    for name in options.which or BENCHMARKS:
        for result in BENCHMARKS[name](model, tokens, options):
            if options.write:
                write("smollm2", {f"{result.title}, {options.dtype}": result.to_dict()})


def _run(module: torch.nn.Module, args: tuple[Any, ...], title: str, options: argparse.Namespace, **more: Any) -> BenchResult:
    result = bench(module, args, pairs=options.pairs, against=options.against, title=title, progress=progress, **more)
    print(result, flush=True)
    return result


if __name__ == "__main__":
    main()
