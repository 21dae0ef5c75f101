"""Tensors to run a kernel of each kind on: what `run` and `truth` take, of any sizes, laid out as models lay them out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dyncc.kernels.generator.epilogues import EPILOGUES
from dyncc.kernels.generator.spec import KernelSpec

Sample = tuple[tuple[Tensor, ...], dict[str, Any]]
PAGE = 8
"""Rows of a page."""
SIZES = {"batch": 2, "heads": 4, "groups": 2, "rows": 21, "keys": 37, "chosen": 5, "stretch": 1.0}


def sample(spec: KernelSpec, device: str = "cpu", **sizes: Any) -> Sample:
    """Positional and keyword arguments of `spec.run` and `spec.truth`; sizes as in SIZES, those that the kind has."""
    with torch.device(device):
        given, more, shape = MAKERS[spec.entry](spec, {**SIZES, **sizes})
        return given, more | _extras(spec, shape)


def beside_truth(spec: KernelSpec, device: str = "cpu", **sizes: Any) -> list[tuple[Tensor, Tensor]]:
    """What `run` and `truth` make of one sample, tensor by tensor."""
    given, more = sample(spec, device, **sizes)
    want = spec.truth(*given, **more)
    told = {**more, **({"out": more["out"].clone()} if "out" in more else {})}
    return tensor_pairs(spec.run(*given, **told), want)


def closeness(x: Tensor, close: float) -> dict[str, float]:
    """What `torch.testing.assert_close` may allow: `close`, one step where numbers were rounded to steps, and nothing for places."""
    return {"rtol": close, "atol": close} if x.is_floating_point() else {"rtol": 0.0, "atol": 1.0 if x.dtype == torch.int8 else 0.0}


def tensor_pairs(one: Any, other: Any) -> list[tuple[Tensor, Tensor]]:
    """Two results, of a tensor or a tuple of them each, tensor by tensor."""
    return list(zip(*(x if isinstance(x, tuple) else (x,) for x in (one, other)), strict=True))


def _extras(spec: KernelSpec, shape: tuple[int, ...]) -> dict[str, Any]:
    dtype = getattr(torch, spec.dtype)
    made: dict[str, Any] = {"gate": lambda: torch.randn(*shape[:3], 1).to(dtype), "residual": lambda: torch.randn(shape).to(dtype)}
    made |= {"weight": lambda: torch.randn(shape[3]).to(dtype), "eps": lambda: 1e-5}
    made |= {"steps": lambda: torch.rand(1, shape[1], 1, shape[3]).to(dtype) * 0.02 + 0.02, "page": lambda: PAGE}
    if spec.moves:
        each = -(-shape[2] // PAGE)
        made |= {"pages": lambda: torch.randperm(shape[0] * each + 3)[: shape[0] * each].view(shape[0], each)}
        made |= {"out": lambda: torch.zeros(1, shape[1], (shape[0] * each + 3) * PAGE, shape[3], dtype=getattr(torch, spec.stored))}
    names = [x for e in spec.epilogues for x in (*EPILOGUES[e].tensors, *EPILOGUES[e].numbers, *EPILOGUES[e].indices, *EPILOGUES[e].sizes)]
    names += ["out"] if spec.moves else []
    return {name: made.get(name, lambda: torch.randn(shape).to(dtype))() for name in names}


def _rows(spec: Any, batch: int, heads: int, rows: int, width: int) -> Tensor:
    """[B, H, T, D] laid out as [B, T, H, D]."""
    return torch.randn(batch, rows, heads, width).transpose(1, 2).to(getattr(torch, spec.dtype))


def _places(batch: int, count: int, below: int) -> Tensor:
    """`count` different places of each sequence, in order: [B, count]."""
    return torch.stack([torch.randperm(below)[:count].sort().values for _ in range(batch)])


def _attend(spec: Any, n: Mapping[str, Any]) -> Any:
    batch, heads, rows, keys = n["batch"], n["heads"], n["rows"], n["rows"] if spec.causal else n["keys"]
    q = _rows(spec, batch, heads, rows, spec.width) * n["stretch"]
    k, v = (_rows(spec, batch, n["groups"], keys, width) for width in (spec.width, spec.value_width))
    more: dict[str, Any] = {"sinks": torch.randn(heads).to(q.dtype)} if spec.sinks else {}
    if spec.packed:
        return _packed(spec, n)
    if spec.mask == "bool":
        more["mask"] = torch.rand(batch, 1, rows, keys) > 0.4
        more["mask"][:, :, rows // 2] = False  # a row that sees nothing
    elif spec.mask == "added":
        more["mask"] = torch.randn(1, heads, rows, keys).to(q.dtype)
        more["mask"][..., -1] = float("-inf")
    elif spec.mask == "blocks":
        tiles, blocks = -(-rows // spec.tile[0]), -(-keys // spec.tile[1])
        more["listed"] = torch.rand(batch, heads, tiles, blocks).argsort(-1)
        more["counts"] = torch.randint(0, blocks + 1, (batch, heads, tiles))
    return (q, k, v), more, (batch, heads, rows, spec.value_width)


def _packed(spec: Any, n: Mapping[str, Any]) -> Any:
    """A sequence of one token, an empty one, and others."""
    lengths = [1, 0, n["rows"], n["keys"]]
    total = sum(lengths)
    widths = ((n["heads"], spec.width), (n["groups"], spec.width), (n["groups"], spec.value_width))
    given = tuple(_rows(spec, 1, heads, total, width) for heads, width in widths)
    starts = torch.tensor([0, *itertools.accumulate(lengths)])
    more = {"sinks": torch.randn(n["heads"]).to(given[0].dtype)} if spec.sinks else {}
    return given, {"starts": starts, "longest": max(lengths), **more}, (1, n["heads"], total, spec.value_width)


def _attend_chosen(spec: Any, n: Mapping[str, Any]) -> Any:
    batch, heads, keys = n["batch"], n["heads"], n["keys"]
    q = _rows(spec, batch, heads, 1, spec.width) * n["stretch"]
    k, v = (_rows(spec, batch, n["groups"], keys, width) for width in (spec.width, spec.value_width))
    pages, choices = -(-keys // spec.page), n.get("choices", n["groups"])
    index = torch.stack([_places(choices, min(n["chosen"], pages), pages) for _ in range(batch)])
    return (q, k, v, index), {"visible": torch.rand(batch, keys) > 0.3} if spec.masked else {}, ()


def _join_parts(spec: Any, n: Mapping[str, Any]) -> Any:
    shape = (n["batch"], n["heads"], n["chosen"], n["rows"])
    most, mass = torch.randn(shape) * n["stretch"], torch.rand(shape) + 0.1
    gone = torch.rand(shape) > 0.7
    gone[:, :, :, 0] = True  # a row that saw no key in any part
    most, mass = most.masked_fill(gone, float("-inf")), mass.masked_fill(gone, 0.0)
    sums = torch.randn(*shape, spec.width).masked_fill(gone.unsqueeze(4), 0.0)
    return (most, mass, sums), {}, (n["batch"], n["heads"], n["rows"], spec.width)


def _linear(spec: Any, n: Mapping[str, Any]) -> Any:
    batch, heads, rows = n["batch"], n["heads"], n["rows"]
    q, k, v = (_rows(spec, batch, heads, rows, width) for width in (spec.width, spec.width, spec.value_width))
    more: dict[str, Any] = {"scale": spec.width**-0.5}
    if spec.decay != "none":
        more["log_decay"] = -torch.rand(batch, rows, heads, 1 if spec.decay == "head" else spec.width).transpose(1, 2) * n["stretch"]
        more["log_decay"][:, :, rows // 2] = float("-inf")  # a token that forgets all
    if getattr(spec, "rule", "add") == "delta":
        more["beta"] = torch.rand(batch, heads, rows, 1)
        k = torch.nn.functional.normalize(k.float(), dim=-1).to(k.dtype)
    if spec.started:
        more["state"] = torch.randn(batch, heads, spec.width, spec.value_width)
    return (q, k, v), more, (batch, heads, rows, spec.value_width)


def _whole_rows(spec: Any, n: Mapping[str, Any]) -> Any:
    x = _rows(spec, n["batch"], n["heads"], n["rows"], spec.width) * n["stretch"]
    return (x,), {}, tuple(x.shape)


def _gather_rows(spec: Any, n: Mapping[str, Any]) -> Any:
    x = _rows(spec, n["batch"], n["heads"], n["keys"], spec.width)
    return (x, _places(n["batch"], n["rows"], n["keys"])), {}, (n["batch"], n["heads"], n["rows"], spec.width)


def _scatter_rows(spec: Any, n: Mapping[str, Any]) -> Any:
    x, out = (_rows(spec, n["batch"], n["heads"], rows, spec.width) for rows in (n["rows"], n["keys"]))
    return (x, _places(n["batch"], n["rows"], n["keys"])), {"out": out.to(getattr(torch, spec.stored))}, tuple(out.shape)


def _merge_rows(spec: Any, n: Mapping[str, Any]) -> Any:
    x = _rows(spec, n["batch"], n["heads"], n["keys"], spec.width)
    target = torch.randint(0, n["rows"], (n["batch"], n["keys"]))
    size = torch.randint(1, 5, (n["batch"], n["keys"])).float()
    return (x, size, target), {"rows": n["rows"]}, (n["batch"], n["heads"], n["rows"], spec.width)


def _score_pages(spec: Any, n: Mapping[str, Any]) -> Any:
    q = _rows(spec, n["batch"], n["heads"], 1, spec.width)
    one, two = (_rows(spec, n["batch"], n["groups"], n["keys"], spec.width) for _ in range(2))
    low, high = torch.minimum(one, two), torch.maximum(one, two)
    low[:, :, 0], high[:, :, 0] = float("inf"), float("-inf")  # a page of hidden keys
    return (q, low, high), {}, ()


def _select_best(spec: Any, n: Mapping[str, Any]) -> Any:
    score = torch.randint(-9, 9, (n["batch"], n["heads"], n["keys"])) * n["stretch"]
    more = {"visible": torch.rand(n["batch"], n["keys"]) > 0.3} if spec.masked else {}
    return (score.to(getattr(torch, spec.dtype)),), {"budget": n["chosen"], **more}, ()


def _exit_confidence(spec: Any, n: Mapping[str, Any]) -> Any:
    dtype = getattr(torch, spec.dtype)
    x, head = torch.randn(n["rows"], spec.width) * n["stretch"], torch.randn(n["keys"], spec.width) * spec.width**-0.5
    return (x.to(dtype), head.to(dtype)), {}, ()


MAKERS: dict[str, Callable[..., Any]] = {
    "attend": _attend,
    "attend_chosen": _attend_chosen,
    "join_parts": _join_parts,
    "linear_chunk": _linear,
    "linear_step": _linear,
    "rows": _whole_rows,
    "gather_rows": _gather_rows,
    "scatter_rows": _scatter_rows,
    "merge_rows": _merge_rows,
    "score_pages": _score_pages,
    "select_best": _select_best,
    "exit_confidence": _exit_confidence,
}
"""For each kind its arguments, and the shape that epilogues see."""
