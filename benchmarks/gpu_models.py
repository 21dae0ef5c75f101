"""Whole models on a GPU (random weights): Inductor against dyncc in Inductor, bf16, interleaved pairs.

    python benchmarks/gpu_models.py --pairs 20 --write

soft cap  a decoder whose attention has a soft cap and a window in every other layer (Gemma 2's form), which SDPA has no words for: exact
prompt    a decoder that keeps a quarter of its prompt from half of its depth on
encoder   an encoder that keeps half of its tokens from a third of its depth on
vision    a vision transformer that does the same

Without a GPU it says so and returns 2.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu import NO_GPU
from record import progress, write
from torch import Tensor, nn

import dyncc
from dyncc.bench_result import environment
from dyncc.evidence import relative_error
from dyncc.timing import paired


@dataclass(frozen=True)
class Case:
    """A model, its inputs, the passes (None: the exact ones of torch.compile) and whether the result must be the dense one."""

    model: nn.Module
    inputs: tuple[Tensor, ...]
    passes: str | None
    exact: bool


class LastToken(nn.Module):
    """A decoder's logits [B, 1, words] behind ids [B, T]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        return logits


class Rows(nn.Module):
    """An encoder's rows [B, T, width]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, given: Tensor) -> Tensor:
        rows: Tensor = self.model(given).last_hidden_state
        return rows


def soft_cap(size: int, device: str) -> Case:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        hidden_size=16 * size, intermediate_size=64 * size, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=2 * size, query_pre_attn_scalar=2 * size, sliding_window=16 * size, vocab_size=32000, attn_implementation="eager",
    )  # fmt: skip
    return Case(LastToken(_half(Gemma2ForCausalLM(config), device)), (_ids(1, 64 * size, device),), None, True)


def prompt(size: int, device: str) -> Case:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32 * size, intermediate_size=128 * size, num_hidden_layers=16, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=128 * size,
    )  # fmt: skip
    passes = f"promptdistill{{layers=8 keep={32 * size}}} simplify-mask slice-last-token drop-repeat-kv"
    return Case(LastToken(_half(LlamaForCausalLM(config), device)), (_ids(1, 128 * size, device),), passes, False)


def encoder(size: int, device: str) -> Case:
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=12 * size, intermediate_size=48 * size, num_attention_heads=12)
    model = _half(BertModel(config, add_pooling_layer=False), device)
    return Case(Rows(model), (_ids(size, 512, device),), "prune-tokens{keep=0.5 layers=3}", False)


def vision(size: int, device: str) -> Case:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=12 * size, intermediate_size=48 * size)
    images = torch.randn(size, 3, 224, 224, device=device, dtype=torch.bfloat16)
    return Case(Rows(_half(ViTModel(config, add_pooling_layer=False), device)), (images,), "prune-tokens{keep=0.5 layers=3}", False)


CASES: dict[str, Callable[[int, str], Case]] = {"soft cap": soft_cap, "prompt": prompt, "encoder": encoder, "vision": vision}
SIZE = 64


def _half(model: nn.Module, device: str) -> nn.Module:
    return model.to(device, torch.bfloat16).eval()


def _ids(batch: int, tokens: int, device: str) -> Tensor:
    return torch.randint(0, 30000, (batch, tokens), device=device)


def measured(name: str, size: int, device: str, pairs: int) -> dict[str, Any]:
    """Milliseconds dense and by dyncc, how many times faster it is, and how far its result is from the dense one."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    case = CASES[name](size, device)
    dense = torch.compile(case.model, dynamic=False)
    less = dyncc.optimize(case.model, case.inputs, passes=case.passes, evidence="numeric")
    error = relative_error(less(*case.inputs), dense(*case.inputs))
    ways = {"inductor": lambda: _done(dense(*case.inputs)), "dyncc": lambda: _done(less(*case.inputs))}
    timings = paired(ways, pairs=pairs, warmup=3, progress=progress)
    ratio = timings.ratio("inductor", "dyncc")
    row = {way: {"ms": 1e3 * timings.median(way)} for way in ways} | {"times_faster": ratio.to_dict(), "error": error}
    applied = [str(x).strip() for x in str(less.report).splitlines() if ": applied" in x]
    took = f"{row['inductor']['ms']:.2f} ms, dyncc {row['dyncc']['ms']:.2f} ms"
    print(f"{name}: {took}, {ratio} times faster, error {error:.1e}; {'; '.join(applied)}")
    return {**row, "applied": applied}


def _done(result: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main(argv: list[str] | None = None) -> int:
    """0, or 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/gpu_models.json")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    for name in options.only:
        with torch.no_grad():
            found = measured(name, SIZE, "cuda", options.pairs)
        if options.write:
            row = {**found, "pairs": options.pairs, "environment": environment()}
            write("gpu_models", {f"{name}, {torch.cuda.get_device_name()}": row})
    return 0


if __name__ == "__main__":
    sys.exit(main())
