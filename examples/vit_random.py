"""Prune patches of a small vision transformer with random weights: the structure is what matters, and nothing has to be trained.

python examples/vit_random.py --passes "evit{keep=0.5 layers=1,3 fuse=false}"
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import ViTConfig, ViTModel

import dyncc


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Prune the model, print what was done, and return both outputs' shapes and the FLOPs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", default="evit{keep=0.5 layers=1,3 fuse=false}")
    parser.add_argument("--engine", default="inductor")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=192, num_hidden_layers=6, num_attention_heads=3, intermediate_size=768, image_size=224, patch_size=16)
    model = ViTModel(config, add_pooling_layer=False).eval()
    images = torch.randn(2, 3, 224, 224)
    pruned = dyncc.optimize(model, (images,), passes=options.passes, engine=options.engine, evidence="numeric")
    with torch.no_grad():
        dense_rows, pruned_rows = (run(images).last_hidden_state for run in (model, pruned))
    print(pruned.report)
    print(f"class token, cosine to dense: {torch.cosine_similarity(dense_rows[:, 0], pruned_rows[:, 0]).mean():.4f}")
    print(f"FLOPs: {pruned.dense_flops / 1e9:.2f} G dense, {pruned.flops / 1e9:.2f} G pruned")
    return {"dense": dense_rows, "pruned": pruned_rows, "flops": pruned.flops, "dense_flops": pruned.dense_flops, "report": pruned.report}


if __name__ == "__main__":
    main()
