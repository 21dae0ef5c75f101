"""SmolLM2: what less depth costs and saves. Exits with and without fitted maps, layers left out, layers by position, routed tokens.

    python benchmarks/depth.py --calibration 24 --documents 4 --params DIR --write   # quality; each row is saved when it is measured
    python benchmarks/depth.py --calibration 24 --documents 4 --params DIR --write --timing-only   # speeds, on a quiet machine
    python benchmarks/depth.py --add 'exit at 0.9=exit-early{layers=15,23 threshold=0.9}'

Maps, surrogates, routers and the ranking of layers are fitted by `dyncc.fit` on the first batches of the text; agreement with the dense
model's first choice and perplexity are measured at all positions of other documents. `layers` is how many run a token on average. Speeds
are of the rewritten graph run eagerly, the median of a few interleaved runs: prompt tokens a second on a document, steps a second behind
one. Rows whose tokens are routed use a threshold, so that no token's way depends on later ones. A run that was stopped goes on behind the
last row that it wrote, where its settings are the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from depth_rows import Reader, Row, Rows, fitted, plan_rows
from record import RESULTS, progress, write
from torch import Tensor
from torch.nn import functional as F

from dyncc.models import english_tokens, load_smollm2

SETTINGS = ("length", "calibration", "ranking", "documents", "rank", "rates", "drop")


def measure_quality(rows: Rows, documents: list[Tensor], results: dict[str, Any], keep: bool) -> None:
    """Agreement and perplexity of every row that `results` does not hold, each written when it is known."""
    dense = [rows["dense"]().read(ids)[0].argmax(-1) for ids in documents]
    for done, (name, build) in enumerate(rows.items()):
        if "perplexity" not in results.get(name, {}):
            row = build()
            results[name] = {"layers": row.layers, **quality(row, documents, dense)}
            if keep:
                write("depth", results)
            print(line(name, results[name]), flush=True)
        progress("rows", done + 1, len(rows))


def quality(row: Row, documents: list[Tensor], dense: list[Tensor]) -> dict[str, float]:
    """Share of positions with the dense model's first choice, and perplexity, over documents [1, T]."""
    agreed, loss, count = 0.0, 0.0, 0
    for ids, first in zip(documents, dense, strict=True):
        found = row.read(ids)[0]
        agreed += (first == found.argmax(-1)).double().sum().item()
        loss += F.cross_entropy(found[:-1].float(), ids[0, 1:], reduction="sum").item()
        count += len(ids[0])
    return {"agreement": agreed / count, "perplexity": torch.tensor(loss / (count - len(documents))).exp().item()}


def measure_speed(rows: Rows, ids: Tensor, repeats: int, results: dict[str, Any], keep: bool) -> None:
    """Prompt tokens and steps a second of every row, interleaved; the first round is not counted."""
    made = {name: build() for name, build in rows.items()}
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(repeats + 1):
        for name, row in made.items():
            for kind, call in (("prompt", lambda row=row: row.read(ids)), ("steps", row.step)):
                if call is None:
                    continue
                start = time.perf_counter()
                call()
                if turn:
                    times.setdefault((name, kind), []).append(time.perf_counter() - start)
        progress("rounds", turn + 1, repeats + 1)
    for (name, kind), seconds in times.items():
        speed = (ids.shape[1] if kind == "prompt" else 1) / statistics.median(seconds)
        results.setdefault(name, {"layers": made[name].layers})[kind] = speed
    if keep:
        write("depth", results)


def line(name: str, row: dict[str, Any]) -> str:
    """One line of the table as Markdown; what was not measured is a dash."""
    forms = {"layers": "{:.1f}", "agreement": "{:.1%}", "perplexity": "{:.2f}", "prompt": "{:,.0f}", "steps": "{:.1f}"}
    return f"| {name} | " + " | ".join(form.format(row[k]) if k in row else "-" for k, form in forms.items()) + " |"


def table(results: dict[str, Any], names: list[str]) -> str:
    """The table as Markdown."""
    head = ["| | layers | agreement | perplexity | prompt tokens/s | steps/s |", "|---|---|---|---|---|---|"]
    return "\n".join(head + [line(name, results[name]) for name in names if name in results])


def known_results(settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run with the same settings wrote."""
    path = RESULTS / "depth.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    return known if known.get("settings") == settings else {}


def options_of(argv: list[str] | None) -> argparse.Namespace:
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
    parser.add_argument("--timing-only", action="store_true", help="measure speeds, not quality")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Fit, measure, print the table, and write JSON when asked."""
    options = options_of(argv)
    settings = {k: vars(options)[k] for k in SETTINGS}
    results = {**(known_results(settings) if options.write else {}), "settings": settings}
    model, tokenizer = load_smollm2()
    tokens, size = english_tokens(tokenizer), options.length
    first = len(tokens) - options.documents * size
    documents = [tokens[first + i * size : first + (i + 1) * size][None] for i in range(options.documents)]
    with TemporaryDirectory() as scratch, torch.no_grad():
        folder = options.params or Path(scratch)
        if not (folder / "ranking" / "parameters.safetensors").is_file():
            fitted(model, tokens, folder, options)
        _, *past = Reader(model, keys=True)(documents[0])
        rows = plan_rows(model, documents[0], past, folder, options)
        if options.timing_only:
            measure_speed(rows, documents[0], options.repeats, results, options.write)
        else:
            measure_quality(rows, documents, results, options.write)
    print(table(results, list(rows)))


if __name__ == "__main__":
    main()
