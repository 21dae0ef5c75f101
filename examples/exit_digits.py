"""Early exits in a 12-layer vision transformer that is trained here, on scikit-learn's digits among pieces of other digits.

Some canvases are easy and some are hard, so the layers that a row needs differ. Trains (minutes, the first time), fits a ridge map from the
class token's state behind each layer to the last layer's, chooses the threshold on digits of its own (Learn-then-Test, Angelopoulos et al.
2021), and prints accuracy, where rows leave, speed against the dense model and against static cuts with maps of their own, and whether the
promise of the threshold holds when the calibration digits are drawn again.

python examples/exit_digits.py --engines inductor,onnxruntime --batches 1,16 --write
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from digits.canvases import Canvases, joined, splits
from digits.classifier import LAYERS, STEPS, Classifier, trained
from digits.intervals import clustered, risk_held, words
from torch import Tensor
from torch.nn import functional as F

import dyncc
from dyncc.fitted import load_fitted
from dyncc.risk import exit_threshold, leaves
from dyncc.timing import paired

SITES, BUCKETS = (2, 7), (1, 2, 4, 8)
CONFIDENCE = 0.9


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, fit, choose, measure, print; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--times", type=int, default=26, help="canvases of each digit to test on")
    parser.add_argument("--risk", type=float, default=0.015, help="share of rows that may differ from the full model")
    parser.add_argument("--promised", type=float, default=0.02, help="the share whose promise is tried again and again")
    parser.add_argument("--engines", default="inductor,onnxruntime")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--cuts", default="2,3,4,5,6", help="layers behind which static cuts are timed")
    parser.add_argument("--fitted", type=int, default=3200, help="canvases that the maps are fitted on")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="that canvases are timed with; waking more takes longer than such a layer")
    parser.add_argument("--draws", type=int, default=20, help="calibration sets that the promise is tried on")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/exit_digits.json")
    options = parser.parse_args(argv)
    training, calibration, test = splits()
    print(f"a {LAYERS}-layer vision transformer on {len(training)} digits", flush=True)
    model = trained(training, options.steps)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found = report(model, training, calibration, test, Path(folder), options)
    if options.write:
        path = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "exit_digits.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
    return found


def report(
    model: Classifier, training: Canvases, calibration: Canvases, test: Canvases, folder: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Accuracy of the full model and of every cut, the promise, then exits in every engine."""
    again = Canvases(training.images, training.labels, seed=1)  # whoever trained has drawn from the other
    fitting = [(part,) for part in again.some(options.fitted).images.split(64)]
    maps = fit_maps(model, fitting, folder)
    drawn = calibration.each(1)
    behind = logits_behind(model, maps, drawn.images)
    chosen = exit_threshold([behind[i] for i in SITES], behind[-1], risk=options.risk, confidence=CONFIDENCE)
    print(f"\n{chosen}")
    drawn = test.each(options.times)
    behind = logits_behind(model, maps, drawn.images)
    right = [x.argmax(-1) == drawn.labels for x in behind]
    cuts = [clustered(cut, drawn.digits) for cut in right]
    for layer, cut in enumerate(cuts):
        print(f"cut behind layer {layer:2}: accuracy {words(cut)}{' (the full model)' if layer == LAYERS - 1 else ''}")
    picked = leaves(torch.stack([behind[i].softmax(-1).amax(-1) for i in SITES]), round(chosen.threshold, 4))
    histogram = [int((picked == site).sum()) for site in range(len(SITES) + 1)]
    for place, count in zip((*SITES, LAYERS - 1), histogram, strict=True):
        print(f"leave behind layer {place:2}: {count / len(picked):6.1%} {'#' * round(50 * count / len(picked))}")
    mean = sum(count * (place + 1) for place, count in zip((*SITES, LAYERS - 1), histogram, strict=True)) / len(picked)
    print(f"layers that a row runs: {mean:.2f} of {LAYERS}", flush=True)
    expected = torch.stack([*(behind[i] for i in SITES), behind[-1]])[picked, torch.arange(len(picked))]
    held = promise(model, maps, joined(calibration, test, seed=1), options)
    layers, buckets = (",".join(map(str, x)) for x in (SITES, BUCKETS))
    passes = f"exit-early{{layers={layers} threshold={chosen.threshold:.4f} buckets={buckets} file={folder}}}"
    found: dict[str, Any] = {"threshold": chosen.threshold, "layers": mean, "histogram": histogram, "promise": held, "cuts": cuts}
    cut_behind = list(map(int, options.cuts.split(",")))
    with threads(options.threads):
        for engine in options.engines.split(","):
            for batch in map(int, options.batches.split(",")):
                made = Engine(model, passes, cut_behind, folder, engine, batch)
                found[f"{engine}, batch {batch}"] = made.measure(drawn.images, drawn.labels, drawn.digits, right, expected, options.pairs)
    return found


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads in PyTorch, and in ONNX Runtime's sessions, which follow it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit_maps(model: Classifier, data: Sequence[tuple[Tensor]], folder: Path) -> list[tuple[Tensor, Tensor]]:
    """By `dyncc.fit`, for every layer but the last: weight [D, D] and bias [D]."""
    dyncc.fit(model, data=data, plan=f"exits{{layers={','.join(map(str, range(LAYERS - 1)))}}}", output=folder)
    given = load_fitted(folder)
    return [(given.take(f"exit.{i}.map.weight"), given.take(f"exit.{i}.map.bias")) for i in range(LAYERS - 1)]


def logits_behind(model: Classifier, maps: Sequence[tuple[Tensor, Tensor]], images: Tensor) -> list[Tensor]:
    """What the head gives behind each layer, through its map, eagerly: [N, 10] a layer. What compiled exits are held against."""
    states = torch.cat([model.states(part)[0] for part in images.split(256)])
    return [model.answer(F.linear(states[:, i], *maps[i]) if i < LAYERS - 1 else states[:, i]) for i in range(LAYERS)]


def promise(model: Classifier, maps: Sequence[tuple[Tensor, Tensor]], held_out: Canvases, options: argparse.Namespace) -> dict[str, Any]:
    """Half of the digits that were not trained on, one canvas each, choose a threshold; the other half tell how many rows differ."""
    drawn = held_out.each(options.times)
    behind = logits_behind(model, maps, drawn.images)
    behind = [*(behind[i] for i in SITES), behind[-1]]
    found = risk_held(behind, drawn.digits, options.promised, CONFIDENCE, options.draws)
    print(f"risk of {options.promised:.1%} broken {found['broken']} times of {options.draws}; up to {found['bound']} are chance")
    print(f"  rows that differ: {', '.join(f'{x:.2%}' for x in found['differs'])}", flush=True)
    return found


class Engine:
    """The dense model, exits and static cuts, compiled by one engine for one batch size."""

    def __init__(self, model: Classifier, passes: str, layers: Sequence[int], folder: Path, engine: str, batch: int) -> None:
        self.model, self.engine, self.batch, self.layers = model, engine, batch, layers
        self.exits = passes
        self.cuts = {i: f"exit-early{{layers={i} realise=static file={folder}}}" for i in layers}

    def compiled(self, passes: str, images: Tensor) -> Callable[[Tensor], Tensor]:
        example = (images[: self.batch],)
        return dyncc.optimize(self.model, example, passes=passes, engine=self.engine, evidence="off", strict=True)

    def measure(
        self, images: Tensor, labels: Tensor, digits: Tensor, cuts: Sequence[Tensor], expected: Tensor, pairs: int
    ) -> dict[str, Any]:
        """Accuracy on all whole batches, and speed, interleaved, on the same batches."""
        whole = len(images) // self.batch * self.batch
        images, labels, digits = images[:whole], labels[:whole], digits[:whole]
        exits = self.compiled(self.exits, images)
        answers = torch.cat([exits(part) for part in images.split(self.batch)])
        right = answers.argmax(-1) == labels
        lost = clustered(cuts[-1][:whole].float() - right.float(), digits)
        elsewhere = int((answers - expected[:whole]).abs().amax(-1).gt(1e-3).sum())
        made = {"dense": self.compiled("", images), "exits": exits}
        made |= {f"cut {i}": self.compiled(passes, images) for i, passes in self.cuts.items()}
        order = torch.randperm(whole // self.batch, generator=torch.Generator().manual_seed(0))
        batches = [images[i * self.batch : (i + 1) * self.batch] for i in order[: 2048 // self.batch].tolist()]
        timings = paired({name: Cycle(call, batches, max(4, 64 // self.batch)) for name, call in made.items()}, pairs=pairs)
        ratios = {name: timings.ratio("dense", name) for name in made if name != "dense"}
        fast = [i for i in self.layers if ratios[f"cut {i}"].median >= ratios["exits"].median]
        print(f"\n{self.engine}, batch {self.batch}: exits {ratios['exits']} times dense; accuracy {words(clustered(right, digits))}, "
              f"lost {words(lost)} points; rows unlike the eager reference: {elsewhere} of {whole}")  # fmt: skip
        print("  " + ", ".join(f"{name} {ratio.median:.2f}" for name, ratio in ratios.items() if name != "exits"))
        best = max(fast, key=lambda i: cuts[i].float().mean().item(), default=None)
        ahead = None if best is None else clustered(right.float() - cuts[best][:whole].float(), digits)
        if best is not None and ahead is not None:
            print(f"  against the best cut that is as fast, behind layer {best}: {words(ahead)} points more")
        return {"ratios": {name: ratio.to_dict() for name, ratio in ratios.items()}, "accuracy": clustered(right, digits), "lost": lost,
                "elsewhere": elsewhere, "rows": whole, "best cut": best, "ahead": ahead}  # fmt: skip


class Cycle:
    """Calls a model on `each` batches a call, going on where the last call ended: every variant sees the same batches."""

    def __init__(self, model: Callable[[Tensor], Tensor], batches: Sequence[Tensor], each: int) -> None:
        self.model, self.batches, self.each, self.at = model, batches, each, 0

    def __call__(self) -> None:
        for _ in range(self.each):
            self.model(self.batches[self.at % len(self.batches)])
            self.at += 1


if __name__ == "__main__":
    main()
