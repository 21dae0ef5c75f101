"""Passkey retrieval: a number hidden in a long text, asked for at its end, with caches that hold or read fewer keys.

    python examples/passkey.py --tokens 4096 --trials 5

Prints how often each cache leads to the number. The text is synthetic; the number stands at another depth in each trial.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import torch

import dyncc
from dyncc.models import load_smollm2

DENSE = "dense"
CACHES = [
    DENSE, "streamingllm{budget=1024}", "h2o{budget=1024 recents=512}", "a2sf{budget=1024}", "snapkv{budget=1024}",
    "quest{budget=512}", "tokenselect{budget=512 sinks=16 recents=64}", "snapkv{budget=2048} quest{budget=512}",
    "promptdistill{layers=14 keep=1024}", "promptdistill{layers=14 keep=1024} quest{budget=512}",
]  # fmt: skip
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def text_with_key(tokenizer: Any, tokens: int, depth: float, key: int) -> torch.Tensor:
    """Ids [1, `tokens` or some fewer] of a text that names the key after `depth` of it and asks for it at the end."""
    fact, question = f"The pass key is {key}. Remember it. {key} is the pass key. ", "What is the pass key? The pass key is"
    opening = "There is an important fact hidden inside a lot of irrelevant text. Find it and memorise it. "
    ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (opening, FILLER, fact, question)]
    lines = (tokens - len(ids[0]) - len(ids[2]) - len(ids[3])) // len(ids[1])
    before = round(lines * depth)
    return torch.tensor([ids[0] + ids[1] * before + ids[2] + ids[1] * (lines - before) + ids[3]])


def found(model: Any, tokenizer: Any, passes: str, tokens: int, trials: int) -> float:
    """The share of trials in which the next tokens are the key."""
    right, drawn = 0, random.Random(0)
    for trial in range(trials):
        key = drawn.randrange(10000, 99999)
        ids = text_with_key(tokenizer, tokens, (trial + 0.5) / trials, key)
        cache = dyncc.KVCache(None if passes == DENSE else passes)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, past_key_values=cache)
        right += tokenizer.decode(out[0, ids.shape[1] :]).strip().startswith(str(key))
    return right / trials


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Try every cache and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", nargs="*", default=CACHES, help="passes of dyncc.KVCache")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--trials", type=int, default=5)
    parser.add_argument("--engine", default="reference", help="the reference engine spares compiling")
    options = parser.parse_args(argv)
    model, tokenizer = load_smollm2()
    rates = {}
    for passes in options.caches:
        torch._dynamo.reset()
        model.compile(backend="dyncc", options={"engine": options.engine, "evidence": "off"})
        rates[passes] = found(model, tokenizer, passes, options.tokens, options.trials)
        print(f"{passes:50} {rates[passes]:6.0%} of {options.trials}", flush=True)
    return rates


if __name__ == "__main__":
    main()
