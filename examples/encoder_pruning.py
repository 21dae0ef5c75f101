"""Prune tokens of a real sentence encoder, and see what it saves and what it costs.

    python examples/encoder_pruning.py --tokens 256

The sentence embedding is a mean over the rows. Zeros in place of the dropped rows make it the mean over the kept ones.
"""

from __future__ import annotations

import argparse

import dyncc
from dyncc.models import load_minilm
from dyncc.sentences import embedding_cosines, passages


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Prune MiniLM, print what was done, and return the cosines to the dense embeddings with the share of FLOPs left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", default="evit{keep=0.5 layers=2 fuse=false fill=zero}")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--engine", default="inductor")
    options = parser.parse_args(argv)
    model, tokenizer = load_minilm()
    batches = passages(tokenizer, options.tokens, batch=1, count=9)
    pruned = dyncc.optimize(model, (), batches[0], passes=options.passes, engine=options.engine, evidence="numeric")
    print(pruned.report)
    found = embedding_cosines(model, pruned, batches[1:])
    found["flops_left"] = pruned.flops / pruned.dense_flops
    print(f"FLOPs left: {found['flops_left']:.0%}; cosine to dense on other text: {found['mean_cosine']:.4f}")
    return found


if __name__ == "__main__":
    main()
