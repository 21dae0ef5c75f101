"""Early exits in a 12-layer vision transformer that was trained here, on scikit-learn's digits among fragments of other digits.

Some canvases are easy and some are hard, so the layers that a row needs differ. Trains (minutes), fits a ridge map from the class token's
state behind each layer to the last layer's, chooses the threshold on digits of its own (Learn-then-Test, Angelopoulos et al. 2021), and
prints accuracy, where rows leave, and speed against the dense model and against every static cut with its own map.

python examples/exit_digits.py --seconds 200 --engines inductor,onnxruntime
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dyncc
from dyncc.risk import exit_threshold
from dyncc.timing import paired

SIDE, LAYERS, WIDTH, HEADS = 64, 12, 96, 4
SITES, SUPERVISED = (4, 6, 8), {4: 0.3, 6: 0.3, 8: 0.3, 11: 1.0}
FRAGMENTS = 32


class Block(nn.Module):
    """A pre-norm layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.first(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.second(x))))


class Classifier(nn.Module):
    """Canvases [B, 1, 64, 64] -> logits [B, 10]; `states` gives the class token behind each layer, [B, L, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 8, 4, 2), nn.GELU(), nn.Conv2d(32, WIDTH, 4, 4))
        self.token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.places = nn.Parameter(0.02 * torch.randn(1, (SIDE // 16) ** 2 + 1, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def embed(self, images: Tensor) -> Tensor:
        patches = self.stem(images).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(patches.shape[0], -1, -1), patches], 1) + self.places

    def states(self, images: Tensor) -> Tensor:
        x, found = self.embed(images), []
        for block in self.blocks:
            x = block(x)
            found.append(x[:, 0])
        return torch.stack(found, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x[:, 0]))


class Canvases:
    """Digits of one split: each canvas holds one whole digit, 16 pixels wide, and up to FRAGMENTS pieces of others, 8 pixels wide."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int) -> None:
        self.images, self.labels = images, labels
        self.draw = torch.Generator().manual_seed(seed)

    def random(self, high: int, *sizes: int) -> Tensor:
        return torch.randint(0, high, sizes, generator=self.draw)

    def __call__(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Canvases [N, 1, 64, 64], labels [N], and which digit of the split stands on each, [N]."""
        canvas = torch.zeros(count, SIDE, SIDE)
        digit, many = self.random(len(self.images), count), self.random(FRAGMENTS + 1, count)
        for number in range(FRAGMENTS):
            y, x, other = self.random(5, count), self.random(5, count), self.random(len(self.images), count)
            rows, columns = y[:, None, None] + torch.arange(4)[:, None], x[:, None, None] + torch.arange(4)
            piece = self.images[other[:, None, None], rows, columns] * (number < many)[:, None, None]
            self._put(canvas, piece)
        self._put(canvas, self.images[digit])
        canvas += 0.1 * torch.randn(canvas.shape, generator=self.draw)
        return canvas[:, None], self.labels[digit], digit

    def _put(self, canvas: Tensor, piece: Tensor) -> None:
        wide = piece.repeat_interleave(2, 1).repeat_interleave(2, 2)
        size, count = wide.shape[1], len(canvas)
        y, x = self.random(SIDE - size, count), self.random(SIDE - size, count)
        where = (torch.arange(count)[:, None, None], y[:, None, None] + torch.arange(size)[:, None], x[:, None, None] + torch.arange(size))
        canvas[where] = torch.maximum(canvas[where], wide)


def splits() -> tuple[Canvases, Canvases, Canvases]:
    """Train, calibration and test canvases; no digit image is in two of them."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    images, labels = torch.tensor(found.images[order] / 16, dtype=torch.float32), torch.tensor(found.target[order])
    parts = [slice(0, 1000), slice(1000, 1300), slice(1300, None)]
    train, calibration, test = (Canvases(images[p], labels[p], seed) for seed, p in enumerate(parts))
    return train, calibration, test


def train(canvases: Canvases, seconds: float, steps: int | None = None, batch: int = 128) -> Classifier:
    """Train for so many seconds (or steps), with the head behind some layers too, less so behind early ones."""
    torch.manual_seed(0)
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    start, number = time.perf_counter(), 0
    while (done := number / steps if steps else (time.perf_counter() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, number / 100 + 0.01) * (0.5 + 0.5 * np.cos(np.pi * done))
        images, labels, _ = canvases(batch)
        states = model.states(images)
        losses = [weight * F.cross_entropy(model.head(model.norm(states[:, layer])), labels) for layer, weight in SUPERVISED.items()]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        number += 1
        if number % 100 == 0:
            print(f"  step {number}, loss {losses[-1].item():.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    return model.eval()


@torch.no_grad()
def all_states(model: Classifier, images: Tensor) -> Tensor:
    return torch.cat([model.states(part) for part in images.split(250)])


@torch.no_grad()
def fit_maps(model: Classifier, images: Tensor, path: Path) -> dict[int, tuple[Tensor, Tensor]]:
    """By ridge in float64, from the class token behind each layer to the last one's; written as `dyncc fit` writes them."""
    states = all_states(model, images).double()
    maps = {}
    for layer in range(LAYERS - 1):
        x, y = states[:, layer], states[:, -1]
        centred = x - x.mean(0)
        gram = centred.T @ centred
        gram += 1e-4 * gram.trace() / WIDTH * torch.eye(WIDTH, dtype=torch.float64)
        weight = torch.linalg.solve(gram, centred.T @ (y - y.mean(0))).T
        maps[layer] = weight.float(), (y.mean(0) - weight @ x.mean(0)).float()
    tensors = {f"exit.{layer}.map.{part}": t for layer, pair in maps.items() for part, t in zip(("weight", "bias"), pair, strict=True)}
    dyncc.save_parameters(model, tensors, path)
    return maps


@torch.no_grad()
def logits_of(model: Classifier, maps: dict[int, tuple[Tensor, Tensor]], images: Tensor) -> list[Tensor]:
    """What the head gives behind each layer, through its map: [N, 10] a layer."""
    states = all_states(model, images)
    mapped = [F.linear(states[:, layer], *maps[layer]) for layer in range(LAYERS - 1)]
    return [model.head(model.norm(row)) for row in (*mapped, states[:, -1])]


def clustered(right: Tensor, digits: Tensor, draws: int = 2000) -> tuple[float, float, float]:
    """Mean in points, and its 95 % interval when whole digits, with all their canvases, are drawn again."""
    sums = torch.zeros(int(digits.max()) + 1).index_add(0, digits, right.float())
    counts = torch.bincount(digits, minlength=len(sums)).float()
    drawn = torch.from_numpy(np.random.default_rng(0).integers(0, len(sums), (draws, len(sums))))
    means = 100 * sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means.numpy(), [2.5, 97.5])
    return 100 * right.float().mean().item(), float(low), float(high)


class Cycle:
    """Calls a model on `each` batches a call, going on where the last call ended: every variant sees the same batches."""

    def __init__(self, model: Callable[[Tensor], Tensor], batches: Sequence[Tensor], each: int) -> None:
        self.model, self.batches, self.each, self.at = model, batches, each, 0

    def __call__(self) -> None:
        with torch.no_grad():
            for _ in range(self.each):
                self.model(self.batches[self.at % len(self.batches)])
                self.at += 1


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Train, fit, choose, measure, print; returns the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=150, help="of training")
    parser.add_argument("--steps", type=int, help="of training, in place of --seconds")
    parser.add_argument("--canvases", type=int, default=10_000, help="to test on")
    parser.add_argument("--risk", type=float, default=0.02, help="share of rows that may differ from the full model")
    parser.add_argument("--engines", default="inductor,onnxruntime")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--pairs", type=int, default=15)
    options = parser.parse_args(argv)
    training, calibration, test = splits()
    print(f"training a {LAYERS}-layer vision transformer", flush=True)
    model = train(training, options.seconds, options.steps)
    with tempfile.TemporaryDirectory() as folder:
        return report(model, (training, calibration, test), Path(folder) / "maps.safetensors", options)


def report(model: Classifier, canvases: tuple[Canvases, Canvases, Canvases], file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Accuracy of the full model, of every cut and of exits; then speed."""
    training, calibration, test = canvases
    maps = fit_maps(model, training(4000)[0], file)
    behind = logits_of(model, maps, calibration(4000)[0])
    chosen = exit_threshold([behind[i] for i in SITES], behind[-1], score="max-prob", risk=options.risk, confidence=0.9)
    text = f"exit-early{{layers={','.join(map(str, SITES))} threshold={chosen.threshold:.4f} file={file}}}"
    images, labels, digits = test(options.canvases)
    behind = logits_of(model, maps, images)
    cuts = [(each.argmax(-1) == labels) for each in behind]
    example = images[:16]
    adaptive = dyncc.optimize(model, (example,), passes=text, engine="reference", evidence="off", strict=True)
    whole = images[: len(images) // 16 * 16]
    answers = torch.cat([adaptive(part) for part in whole.split(16)])
    right = answers.argmax(-1) == labels[: len(answers)]
    left = torch.stack([behind[i].softmax(-1).amax(-1) >= chosen.threshold for i in SITES] + [torch.ones(len(images), dtype=torch.bool)])
    histogram = torch.bincount(left.float().argmax(0), minlength=len(SITES) + 1).tolist()
    lost = clustered(cuts[-1][: len(right)].float() - right.float(), digits[: len(right)])
    print(f"\n{chosen}")
    for layer, cut in enumerate(cuts):
        full = " (the full model)" if layer == LAYERS - 1 else ""
        print(f"cut behind layer {layer:2}: accuracy {_interval(clustered(cut, digits))}{full}")
    print(f"exits:               accuracy {_interval(clustered(right, digits[: len(right)]))}, lost {_interval(lost)} points")
    for place, count in zip((*SITES, LAYERS - 1), histogram, strict=True):
        print(f"leave behind layer {place:2}: {100 * count / len(images):5.1f} % {'#' * round(50 * count / len(images))}")
    cases = [(engine, int(batch)) for engine in _words(options.engines) for batch in _words(options.batches)]
    speeds = {case: speed(model, text, file, images, *case, options.pairs) for case in cases}
    best = {key: _best_cut(found, cuts, digits) for key, found in speeds.items()}
    return {"cuts": [c.float().mean().item() for c in cuts], "exits": right.float().mean().item(), "lost": lost, "histogram": histogram,
            "speeds": speeds, "best": best, "threshold": chosen.threshold}


def speed(model: Classifier, text: str, file: Path, images: Tensor, engine: str, batch: int, pairs: int) -> dict[str, Any]:
    """Seconds of the dense model, of exits and of static cuts, interleaved, on the same batches."""
    batches = list(images.split(batch))[: 2000 // batch]
    passes = {"dense": "", "exits": text}
    passes |= {f"cut {layer}": f"exit-early{{layers={layer} realise=static file={file}}}" for layer in range(SITES[0], SITES[-1] + 1)}
    made = {name: dyncc.optimize(model, (batches[0],), passes=p, engine=engine, evidence="off", strict=True) for name, p in passes.items()}
    timings = paired({name: Cycle(m, batches, max(1, 32 // batch)) for name, m in made.items()}, pairs=pairs)
    found = {name: timings.ratio("dense", name) for name in made if name != "dense"}
    others = ", ".join(f"{name} {ratio.median:.2f}" for name, ratio in found.items() if name != "exits")
    print(f"{engine}, batch {batch}: exits {found['exits']} times dense; {others}", flush=True)
    return found


def _best_cut(found: dict[str, Any], cuts: list[Tensor], digits: Tensor) -> str:
    """The deepest cut that is at least as fast as exits."""
    fast = [int(name.split()[1]) for name, ratio in found.items() if name != "exits" and ratio.median >= found["exits"].median]
    words = f"behind layer {max(fast)}: accuracy {_interval(clustered(cuts[max(fast)], digits))}" if fast else "none of those measured"
    print(f"  best static cut of that speed: {words}")
    return words


def _interval(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.2f} [{found[1]:.2f}, {found[2]:.2f}]"


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


if __name__ == "__main__":
    main()
