"""Generation behind a `dyncc.KVCache` on a GPU: the tokens of the reference engine on a CPU, for each kind of policy."""

from __future__ import annotations

import pytest
import torch
from test_kv_cache import prompt, tiny_llama

import dyncc

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
POLICIES = [
    None, "tokenselect{budget=12 sinks=2 recents=4}", "quest{budget=16 page=4 dense=0}",
    "quest{budget=16 page=4 dense=0 share=any slack=0.4}", "hisa{budget=8 page=4 beam=3 sinks=1 recents=1}", "streamingllm{budget=12}",
    "snapkv{budget=12 window=4 recents=4}", "h2o{budget=12 recents=4}",
]  # fmt: skip


def tokens(passes: str | None, device: str, engine: str) -> torch.Tensor:
    """Prompt and 24 greedy tokens of two rows, the first with three pads."""
    torch._dynamo.reset()
    model = tiny_llama().to(device)
    model.compile(backend="dyncc", options={"engine": engine})
    known = len(dyncc.reports())
    call = {**{name: t.to(device) for name, t in prompt(2, 20, pads=3).items()}, "max_new_tokens": 24, "do_sample": False}
    with torch.no_grad():
        made: torch.Tensor = model.generate(**call, past_key_values=dyncc.KVCache(passes))
    assert not any(r.fallback for r in dyncc.reports()[known:])
    return made.cpu()


@pytest.mark.parametrize("engine", ["reference", "inductor"])
@pytest.mark.parametrize("passes", POLICIES)
def test_a_gpu_generates_what_the_cpu_does(passes: str | None, engine: str) -> None:
    assert torch.equal(tokens(passes, "cpu", "reference"), tokens(passes, "cuda", engine))
