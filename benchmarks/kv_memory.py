"""SmolLM2: what a cache holds and what the process needs, after a long prompt and one step, for each cache in a process of its own.

    python benchmarks/kv_memory.py --prompt 8000 --write
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from record import write
from transformers import DynamicCache

import dyncc
from dyncc.bench_result import environment
from dyncc.models import english_tokens, load_smollm2

GROWING, WHOLE = "transformers' growing cache", "KVCache"
CACHES = [GROWING, WHOLE, "snapkv{budget=1024}", "h2o{budget=1024 recents=512 every=64}"]


def resident() -> int:
    """Bytes of this process in memory, after what is free was given back."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


@torch.no_grad()
def measure(name: str, length: int) -> dict[str, Any]:
    """Bytes of the cache, and how much more the process holds with it than without."""
    model, tokenizer = load_smollm2()
    model.compile(backend="dyncc", options={"engine": "reference", "evidence": "off"})
    ids = english_tokens(tokenizer)[: length + 2][None]
    cache = DynamicCache() if name == GROWING else dyncc.KVCache(None if name == WHOLE else name)
    for part in (ids[:, :length], ids[:, length : length + 1], ids[:, length + 1 :]):
        model(input_ids=part, past_key_values=cache, logits_to_keep=1)
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    torch._dynamo.reset()
    with_cache = resident()
    del cache
    return {"bytes": held, "resident": with_cache - resident()}


def main(argv: list[str] | None = None) -> None:
    """Measure every cache, print, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", nargs="*", default=CACHES)
    parser.add_argument("--prompt", type=int, default=8000)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/kv_memory.json")
    options = parser.parse_args(argv)
    if options.only:
        print(json.dumps(measure(options.only, options.prompt)))
        return
    rows = {}
    for name in options.caches:
        command = [sys.executable, __file__, "--only", name, "--prompt", str(options.prompt)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows[name] = json.loads(done.stdout.splitlines()[-1])
        first = rows[options.caches[0]]
        shares = (rows[name][key] / first[key] for key in ("bytes", "resident"))
        sizes = f"{rows[name]['bytes'] / 1e6:6.0f} MB held, {rows[name]['resident'] / 1e6:6.0f} MB of the process"
        print(f"{name:40} {sizes} ({', '.join(f'{share:.1%}' for share in shares)} of the first)", flush=True)
    if options.write:
        write("kv_memory", {f"{options.prompt} tokens, float32": {"caches": rows, "environment": environment()}})


if __name__ == "__main__":
    main()
