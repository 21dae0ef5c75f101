"""SmolLM2: what less depth costs and saves. Exits with and without fitted maps, layers left out, layers by position, routed tokens.

    python benchmarks/depth.py --calibration 24 --documents 4 --write
    python benchmarks/depth.py --add 'exit at 0.9=exit-early{layers=15,23 threshold=0.9}'

Maps, surrogates, routers and the ranking of layers are fitted by `dyncc.fit` on the first batches of the text; agreement with the dense
model's first choice and perplexity are measured at all positions of other documents. `layers` is how many run a token on average. Speeds
are of the rewritten graph run eagerly, the median of a few interleaved runs: prompt tokens a second on a document, steps a second behind
one. Rows whose tokens are routed use a threshold, so that no token's way depends on later ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from record import progress, write
from torch import Tensor, nn
from torch.nn import functional as F

import dyncc
from dyncc.decoding import Decode, flatten_cache, grow_from
from dyncc.fitted import load_fitted
from dyncc.fitting.calibration import Batch
from dyncc.fitting.subject import subject_of
from dyncc.models import english_tokens, load_smollm2
from dyncc.position_levels import plan_levels

EXITS = (8, 16, 23, 24)
EAGER = {"engine": "reference", "evidence": "off", "strict": True}
Read = Callable[[Tensor], Tensor]


class Reader(nn.Module):
    """Token ids [B, T] and a past -> logits at all positions and, when asked, the cache."""

    def __init__(self, model: nn.Module, keys: bool = False) -> None:
        super().__init__()
        self.model, self.keys = model, keys

    def forward(self, input_ids: Tensor, *past: Tensor) -> Any:
        given = {"past_key_values": grow_from(past)} if past else {}
        out = self.model(input_ids=input_ids, use_cache=self.keys, **given)
        return (out.logits, *flatten_cache(out.past_key_values)) if self.keys else out.logits


@dataclass
class Row:
    """One line of the table; `read` gives the logits of a document, `step` runs one decoding step."""

    name: str
    read: Read
    layers: float
    step: Callable[[], Any] | None = None
    agreement: float = 0.0
    perplexity: float = 0.0
    prompt: float = 0.0
    steps: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("read", "step", "name")}


def fitted(model: nn.Module, tokens: Tensor, folder: Path, options: argparse.Namespace) -> Path:
    """Exit maps and surrogates from many batches; the ranking, which runs the model once a layer, from few."""
    size = options.length
    batches = [{"input_ids": tokens[i * size : (i + 1) * size][None]} for i in range(options.calibration)]
    plan = f"exits{{layers={','.join(map(str, EXITS))}}} units{{rank={options.rank}}}"
    print(dyncc.fit(Reader(model), data=batches, plan=plan, output=folder, progress=progress))
    print(dyncc.fit(Reader(model), data=batches[: options.ranking], plan="drops", output=folder / "ranking", progress=progress))
    return folder


def pipeline(model: nn.Module, ids: Tensor, name: str, passes: str, layers: float, past: Sequence[Tensor] = ()) -> Row:
    """A row of any pipeline, on whole documents and, given a past, on steps."""
    made = dyncc.optimize(Reader(model), (ids,), passes=passes, **EAGER)
    step = dyncc.optimize(Decode(model), (ids[:, -1:], None, *past), passes=passes, **EAGER) if past else None
    return Row(name, made, layers, step and (lambda: step(ids[:, -1:], None, *past)))


def exits(model: nn.Module, ids: Tensor, file: Path) -> list[Row]:
    """Every token leaves behind one layer, with the head as it is and behind a fitted map."""
    found, subject = load_fitted(file), subject_of(Reader(model), Batch((ids,), {}))

    def read(layer: int, mapped: bool) -> Read:
        def run(ids: Tensor) -> Tensor:
            known, node, last = subject.inputs(Batch((ids,), {}), 0), subject.states[layer + 1], subject.states[-1]
            state = subject.run(known, [node])[node]
            if mapped:
                state = F.linear(state, found.take(f"exit.{layer}.map.weight"), found.take(f"exit.{layer}.map.bias"))
            output: Tensor = subject.run({**known, last: state}, [subject.output])[subject.output]
            return output

        return run

    words = {False: "plain head", True: "fitted map"}
    return [Row(f"exit behind layer {layer}, {words[m]}", read(layer, m), layer + 1) for layer in EXITS for m in (False, True)]


def routed(model: nn.Module, ids: Tensor, file: Path, rate: float, fill: str) -> Row:
    """Tokens run the middle layers by a threshold that lets `rate` of the calibration tokens through."""
    total = model.config.num_hidden_layers
    inner = total - 4
    text = f"route-tokens{{layers=2:{total - 2} rate={rate} capacity={min(1.0, rate + 0.2):.2f} rule=threshold fill={fill} file={file}}}"
    return pipeline(model, ids, f"route {rate:.0%} of tokens, {'surrogate' if fill == 'affine' else 'carried'}", text, 4 + inner * rate)


def by_position(model: nn.Module, ids: Tensor, least: int, levels: int) -> Row:
    """SkipDecode: a document in pieces, each at its level over what was read before."""
    total, length = model.config.num_hidden_layers, ids.shape[1]
    planned = plan_levels(total, least, length, levels)
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
    return Row(f"by position, {total} to {least} layers, {len(planned)} levels", read, mean)


def measure(rows: list[Row], documents: list[Tensor], repeats: int) -> None:
    """Quality on every document, then speeds, interleaved."""
    for row in rows:
        agreed, loss, count = 0.0, 0.0, 0
        for ids in documents:
            dense, found = rows[0].read(ids)[0], row.read(ids)[0]
            agreed += (dense.argmax(-1) == found.argmax(-1)).double().sum().item()
            loss += F.cross_entropy(found[:-1].float(), ids[0, 1:], reduction="sum").item()
            count += len(ids[0])
        row.agreement, row.perplexity = agreed / count, torch.tensor(loss / (count - len(documents))).exp().item()
        progress(f"quality of {row.name}", len(documents), len(documents))
    times: dict[tuple[int, str], list[float]] = {}
    for _ in range(repeats):
        for i, row in enumerate(rows):
            for kind, call in (("prompt", lambda row=row: row.read(documents[0])), ("steps", row.step)):
                if call is not None:
                    start = time.perf_counter()
                    call()
                    times.setdefault((i, kind), []).append(time.perf_counter() - start)
    for (i, kind), seconds in times.items():
        setattr(rows[i], kind, (len(documents[0][0]) if kind == "prompt" else 1) / statistics.median(seconds))


def table(rows: list[Row]) -> str:
    """The table as Markdown."""
    lines = ["| | layers | agreement | perplexity | prompt tokens/s | steps/s |", "|---|---|---|---|---|---|"]
    for row in rows:
        steps = f"{row.steps:.1f}" if row.steps else "-"
        lines.append(f"| {row.name} | {row.layers:.1f} | {row.agreement:.1%} | {row.perplexity:.2f} | {row.prompt:,.0f} | {steps} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Fit, measure, print the table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=512, help="tokens of a document and of a calibration batch")
    parser.add_argument("--calibration", type=int, default=24, help="batches that maps and surrogates are fitted on")
    parser.add_argument("--ranking", type=int, default=2, help="batches that layers are ranked on")
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--rank", type=int, default=32, help="of the surrogates")
    parser.add_argument("--rates", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--drop", type=int, nargs="+", default=[2, 4, 8], help="how many layers are left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--add", nargs="*", default=[], metavar="NAME=PIPELINE", help="more rows, such as exit-early ones")
    parser.add_argument("--params", type=Path, help="keep the fitted parameters here, or take those that are there")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/depth.json")
    options = parser.parse_args(argv)
    model, tokenizer = load_smollm2()
    tokens, size = english_tokens(tokenizer), options.length
    first = len(tokens) - options.documents * size
    documents = [tokens[first + i * size : first + (i + 1) * size][None] for i in range(options.documents)]
    with TemporaryDirectory() as scratch, torch.no_grad():
        folder = options.params or Path(scratch)
        if not (folder / "ranking" / "parameters.safetensors").is_file():
            fitted(model, tokens, folder, options)
        ids, total = documents[0], model.config.num_hidden_layers
        _, *past = Reader(model, keys=True)(ids)
        rows = [pipeline(model, ids, "dense", "", total, past)]
        rows += exits(model, ids, folder)
        for count in options.drop:
            text = f"drop-layers{{count={count} file={folder / 'ranking'}}}"
            rows.append(pipeline(model, ids, f"{count} least missed layers left out", text, total - count, past))
        rows += [by_position(model, ids, least, 4) for least in (total - 8, total // 2)]
        rows += [routed(model, ids, folder, rate, "affine") for rate in options.rates]
        rows.append(routed(model, ids, folder, options.rates[0], "carry"))
        for name, _, text in (entry.partition("=") for entry in options.add):
            rows.append(pipeline(model, ids, name, text, float("nan")))
        measure(rows, documents, options.repeats)
    print(table(rows))
    if options.write:
        settings = {k: v for k, v in vars(options).items() if k not in ("write", "params", "add")}
        write("depth", {"settings": settings, **{row.name: row.to_dict() for row in rows}})


if __name__ == "__main__":
    main()
