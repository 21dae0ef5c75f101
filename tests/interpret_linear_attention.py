"""Compares what the ops of linear attention do on a GPU with the recurrence in fp64, in Triton's interpreter, which has to be asked for
before Triton is imported: `TRITON_INTERPRET=1 python tests/interpret_linear_attention.py PART` prints how many were compared.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from interpret_kernels import poison
from test_gated_linear_attention import DECAYS, decays, drawn, judged
from torch import Tensor

from dyncc.kernels.gated_delta_rule import op as delta
from dyncc.kernels.gated_delta_rule.truth import step
from dyncc.kernels.gated_linear_attention import op as add

CLOSE = {torch.float32: 3e-5, torch.float16: 8e-3}
Results = tuple[Tensor, Tensor]


def close(got: Results, want: Results, dtype: torch.dtype, told: Any) -> None:
    assert got[0].dtype == dtype and got[1].dtype == torch.float32, told
    for one, other in zip(got, want, strict=True):
        least = CLOSE[dtype] * max(1.0, other.abs().max().item())
        torch.testing.assert_close(one.double(), other, rtol=CLOSE[dtype], atol=least, msg=lambda m: f"{told}: {m}")


def tensors(kind: str, tokens: int, widths: tuple[int, int], dtype: torch.dtype, by_tokens: bool) -> list[Any]:
    """q, k, v and decays of two sequences of three heads."""
    q, k, v, _ = (x.to(dtype) * x.shape[3] ** -0.5 for x in drawn(2, 3, tokens, *widths))
    rows = [x.transpose(1, 2).contiguous().transpose(1, 2) if by_tokens else x for x in (q, k, v)]
    return [*rows, decays(kind, (2, 3, tokens, widths[0]))]


def the_rule_add(kind: str, tokens: int, started: bool) -> None:
    values = tensors(kind, tokens, (24, 40), torch.float32, started)
    state = torch.randn(2, 3, 24, 40) if started else None
    assert add.spec_of(*values, state, "add") is not None
    close(add.on_gpu(*values, state, 0.5), judged(*values, state, scale=0.5), torch.float32, (kind, tokens, started))


def the_delta_rule(kind: str, tokens: int, started: bool) -> None:
    q, k, v, _ = tensors("none", tokens, (24, 40), torch.float32, started)
    beta, decay = torch.rand(2, 3, tokens), decays(kind, (2, 3, tokens, 1))
    fell = None if decay is None else decay.expand(2, 3, tokens, 1)[..., 0]
    k, state = torch.nn.functional.normalize(k, dim=-1), torch.randn(2, 3, 24, 40) if started else None
    want = step(*(None if x is None else x.double() for x in (q, k, v, beta, fell, state)))
    close(delta.on_gpu(q, k, v, beta, fell, state), want, torch.float32, ("delta", kind, tokens, started))


def bad_sizes() -> None:
    """What does not fit is told as on a CPU."""
    q, k, v, decay = tensors("mild", 20, (4, 3), torch.float32, False)
    beta = torch.rand(2, 3, 20)
    for given in ((q, k[:, :, :3], v, decay), (q, k, v, decay, torch.zeros(2, 3, 3, 4)), (q[0], k[0], v[0])):
        assert told(add.on_gpu, *given) == told(add.on_cpu, *given) != ""
    for given in ((q, k[:, :, :3], v, beta), (q, k, v, beta[:, :, :3]), (q, k, v, beta, None, torch.zeros(2, 3, 3, 4))):
        assert told(delta.on_gpu, *given) == told(delta.forward, *given) != ""


def told(call: Any, *given: Any) -> str:
    try:
        call(*given)
    except ValueError as error:
        return str(error)
    return ""


def cases(part: str) -> Iterator[tuple[Any, ...]]:
    yield (bad_sizes,)
    if part == "some":
        yield the_delta_rule, "one a token", 17, True
        yield the_rule_add, "forgets", 40, True
    if part == "ops":
        for kind, tokens, started in itertools.product(DECAYS, (1, 5, 40), (False, True)):
            yield the_rule_add, kind, tokens, started
            if kind not in ("one a head", "mixed"):
                yield the_delta_rule, kind, tokens, started


def main(part: str) -> None:
    poison()
    torch.manual_seed(0)
    count = 0
    for compare, *given in cases(part):
        compare(*given)
        count += 1
    print("compared", count)


if __name__ == "__main__":
    main(sys.argv[1])
