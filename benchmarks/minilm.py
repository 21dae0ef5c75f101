"""all-MiniLM-L6-v2 at 256 tokens, dense under plain Inductor against token pruning in the manner of EViT, on English text.

    python benchmarks/minilm.py --pairs 40 --write

Quality is the cosine of the mean-pooled sentence embedding to the dense model's, over passages that were not timed. Dropped rows are
filled with zeros: the mean is then over the kept rows, whereas rows that stopped at an early layer would pull it away.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from record import progress, write

from dyncc.bench import bench
from dyncc.models import load_minilm
from dyncc.sentences import embedding_cosines, passages

PIPELINES = ["evit{keep=0.7 layers=2 fuse=false fill=zero}", "evit{keep=0.5 layers=2 fuse=false fill=zero}"]


def main(argv: list[str] | None = None) -> None:
    """Time each pipeline and print its table with the cosines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("passes", nargs="*", default=PIPELINES, help="pipelines to compare")
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--documents", type=int, default=32, help="batches whose embeddings are compared")
    parser.add_argument("--against", nargs="+", default=["eager", "inductor"])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/minilm.json")
    options = parser.parse_args(argv)
    model, tokenizer = load_minilm()
    batches = passages(tokenizer, options.tokens, options.batch, options.documents + 1)
    for passes in options.passes:
        found = _one(model, batches, passes, options)
        if options.write:
            write("minilm", {f"{options.batch} x {options.tokens} tokens, {passes}": found})


def _one(model: Any, batches: list[dict[str, torch.Tensor]], passes: str, options: argparse.Namespace) -> dict[str, Any]:
    title = f"MiniLM, {options.batch} x {options.tokens} tokens"
    result = bench(
        model, (), batches[0], passes=passes, pairs=options.pairs, against=options.against, door=2, title=title, progress=progress
    )
    print(result, flush=True)
    if "dyncc" in result.runs:
        cosines = embedding_cosines(model, result.runs["dyncc"], batches[1:])
        result.quality["documents"] = cosines
        print(", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in cosines.items()))
    return result.to_dict()


if __name__ == "__main__":
    main()
