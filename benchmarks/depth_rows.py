"""The rows of the table of less depth (depth.py): SmolLM2 that leaves early, leaves layers out, or routes tokens.

Every row is built when it is asked for, so that a run may stop between two of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import progress
from torch import Tensor, nn
from torch.nn import functional as F

import dyncc
from dyncc.decoding import Decode, flatten_cache, grow_from
from dyncc.fitted import load_fitted
from dyncc.fitting.calibration import Batch
from dyncc.fitting.subject import subject_of
from dyncc.position_levels import plan_levels

EXITS = (8, 16, 23, 24)
EAGER = {"engine": "reference", "evidence": "off", "strict": True}


class Reader(nn.Module):
    """Token ids [B, T] and a past -> logits at all positions and, when asked, the cache."""

    def __init__(self, model: nn.Module, keys: bool = False) -> None:
        super().__init__()
        self.model, self.keys = model, keys

    def forward(self, input_ids: Tensor, *past: Tensor) -> Any:
        given = {"past_key_values": grow_from(past)} if past else {}
        out = self.model(input_ids=input_ids, use_cache=self.keys, **given)
        return (out.logits, *flatten_cache(out.past_key_values)) if self.keys else out.logits


@dataclass(frozen=True)
class Row:
    """One line of the table; `read` gives the logits of a document, `step` runs one decoding step, `layers` run a token on average."""

    read: Callable[[Tensor], Tensor]
    layers: float
    step: Callable[[], Any] | None = None


Rows = dict[str, Callable[[], Row]]


def fitted(model: nn.Module, tokens: Tensor, folder: Path, options: argparse.Namespace) -> None:
    """Exit maps and surrogates from many batches; the ranking, which runs the model once a layer, from few."""
    size = options.length
    batches = [{"input_ids": tokens[i * size : (i + 1) * size][None]} for i in range(options.calibration)]
    plan = f"exits{{layers={','.join(map(str, EXITS))}}} units{{rank={options.rank}}}"
    print(dyncc.fit(Reader(model), data=batches, plan=plan, output=folder, progress=progress))
    print(dyncc.fit(Reader(model), data=batches[: options.ranking], plan="drops", output=folder / "ranking", progress=progress))


def plan_rows(model: nn.Module, ids: Tensor, past: Sequence[Tensor], folder: Path, options: argparse.Namespace) -> Rows:
    """All rows by name, the dense one first; `ids` [1, T] is a document and `past` its keys and values."""
    total = model.config.num_hidden_layers
    rows: Rows = {"dense": lambda: pipeline(model, ids, "", total, past)}
    rows |= exits(model, ids, folder)
    for count in options.drop:
        text = f"drop-layers{{count={count} file={folder / 'ranking'}}}"
        rows[f"{count} least missed layers left out"] = partial(pipeline, model, ids, text, total - count, past)
    for least in (total - 8, total // 2):
        rows[f"by position, {total} to {least} layers, 4 levels"] = partial(by_position, model, ids, least, 4)
    for rate in options.rates:
        rows[f"route {rate:.0%} of tokens, surrogate"] = partial(routed, model, ids, folder, rate, "affine")
    rows[f"route {options.rates[0]:.0%} of tokens, carried"] = partial(routed, model, ids, folder, options.rates[0], "carry")
    for name, _, text in (entry.partition("=") for entry in options.add):
        rows[name] = partial(pipeline, model, ids, text, float("nan"))
    return rows


def pipeline(model: nn.Module, ids: Tensor, passes: str, layers: float, past: Sequence[Tensor] = ()) -> Row:
    """A row of any pipeline, on whole documents and, given a past, on steps."""
    made = dyncc.optimize(Reader(model), (ids,), passes=passes, **EAGER)
    step = dyncc.optimize(Decode(model), (ids[:, -1:], None, *past), passes=passes, **EAGER) if past else None
    return Row(made, layers, step and (lambda: step(ids[:, -1:], None, *past)))


def exits(model: nn.Module, ids: Tensor, file: Path) -> Rows:
    """Every token leaves behind one layer, with the head as it is and behind a fitted map."""
    found, subject = load_fitted(file), subject_of(Reader(model), Batch((ids,), {}))

    def read(layer: int, mapped: bool, ids: Tensor) -> Tensor:
        known, node, last = subject.inputs(Batch((ids,), {}), 0), subject.states[layer + 1], subject.states[-1]
        state = subject.run(known, [node])[node]
        if mapped:
            state = F.linear(state, found.take(f"exit.{layer}.map.weight"), found.take(f"exit.{layer}.map.bias"))
        output: Tensor = subject.run({**known, last: state}, [subject.output])[subject.output]
        return output

    words = {False: "plain head", True: "fitted map"}
    pairs = [(layer, mapped) for layer in EXITS for mapped in (False, True)]
    return {f"exit behind layer {x}, {words[m]}": partial(Row, partial(read, x, m), x + 1) for x, m in pairs}


def routed(model: nn.Module, ids: Tensor, file: Path, rate: float, fill: str) -> Row:
    """Tokens run the middle layers by a threshold that lets `rate` of the calibration tokens through."""
    total = model.config.num_hidden_layers
    inner = total - 4
    text = f"route-tokens{{layers=2:{total - 2} rate={rate} capacity={min(1.0, rate + 0.2):.2f} rule=threshold fill={fill} file={file}}}"
    return pipeline(model, ids, text, 4 + inner * rate)


def by_position(model: nn.Module, ids: Tensor, least: int, levels: int) -> Row:
    """SkipDecode: a document in pieces, each at its level over what was read before."""
    total, length = model.config.num_hidden_layers, ids.shape[1]
    planned = plan_levels(total, least, length, levels)
    planned = tuple(level for level in planned if level.first < length)
    ends = [level.first for level in planned[1:]] + [length]
    graphs: list[Any] = []

    def read(ids: Tensor) -> Tensor:
        past: tuple[Tensor, ...] = ()
        logits = []
        for i, (level, end) in enumerate(zip(planned, ends, strict=True)):
            call = (ids[:, level.first : end], *past)
            if i == len(graphs):
                passes = f"drop-layers{{active={level.active}}}" if level.active < total else ""
                graphs.append(dyncc.optimize(Reader(model, keys=True), call, passes=passes, **EAGER))
            found, *kept = graphs[i](*call)
            past = tuple(kept)
            logits.append(found)
        assert all(k.shape[2] == length for k in past), "every layer holds every token"
        return torch.cat(logits, 1)

    mean = sum((end - level.first) * level.active for level, end in zip(planned, ends, strict=True)) / length
    return Row(read, mean)
