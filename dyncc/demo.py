"""The main job on two real models: dense against dyncc on English text, with the quality beside the speed.

Nothing is downloaded: the models come from installed packages (dyncc/models.py), the text from Python's own documentation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dyncc.bench import bench
from dyncc.bench_result import BenchResult, environment
from dyncc.decoding import Decode, Prefill, compare_continuations
from dyncc.demo_report import Finding, summary, write_report
from dyncc.models import english_tokens, load_minilm, load_smollm2
from dyncc.sentences import embedding_cosines, passages
from dyncc.timing import Progress


@dataclass(frozen=True)
class Size:
    """How much the demo runs: prompt and sentence lengths, timed pairs, and documents whose quality is measured."""

    prompt: int
    keep: int
    sentence: int
    pairs: int
    decoder_documents: int
    encoder_batches: int
    ahead: int


FULL = Size(prompt=2048, keep=512, sentence=256, pairs=20, decoder_documents=12, encoder_batches=32, ahead=64)
QUICK = Size(prompt=512, keep=128, sentence=128, pairs=7, decoder_documents=6, encoder_batches=8, ahead=32)


def run(output: Path, quick: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Run every step, write `report.md` and `report.json` into `output`, and return what was found."""
    size = QUICK if quick else FULL
    start = time.perf_counter()
    if progress is not None:
        progress("loading the models", 0, 1)
    decoder, tokenizer = load_smollm2()
    tokens = english_tokens(tokenizer)
    steps: list[Callable[[], Finding]] = [
        lambda: _encoder(size, progress),
        lambda: _prefill(decoder, tokens, size, progress),
        lambda: _distill(decoder, tokens, size, progress),
    ]
    if not quick:
        steps.insert(2, lambda: _decode(decoder, tokens, size, progress))
    findings = [step() for step in steps]
    seconds = time.perf_counter() - start
    paths = write_report(output, findings, environment(), seconds)
    return {
        "text": summary(findings) + f"\n\nreport: {paths[0]}",
        "report": str(paths[0]),
        "data": str(paths[1]),
        "seconds": seconds,
        "quick": quick,
        "findings": [finding.to_dict() for finding in findings],
    }


def _prefill(model: Any, tokens: torch.Tensor, size: Size, progress: Progress | None) -> Finding:
    """Reading a prompt, exact passes through `torch.compile`."""
    ids = tokens[: size.prompt][None]
    result = _bench(Prefill(model), (ids, torch.ones_like(ids)), "SmolLM2 reads a prompt", size, progress)
    return Finding("SmolLM2 reads a prompt", f"{size.prompt} tokens, exact passes, torch.compile", result)


def _decode(model: Any, tokens: torch.Tensor, size: Size, progress: Progress | None) -> Finding:
    """Reading one token after a prompt, exact passes through `torch.compile`."""
    held = size.prompt
    with torch.no_grad():
        _, *past = Prefill(model, keys=True)(tokens[:held][None])
    mask = torch.ones(1, held + 1, dtype=torch.long, device=tokens.device)
    result = _bench(Decode(model), (tokens[held : held + 1][None], mask, *past), "SmolLM2 reads the next token", size, progress)
    return Finding("SmolLM2 reads the next token", f"{held} cached keys, exact passes, torch.compile", result)


def _distill(model: Any, tokens: torch.Tensor, size: Size, progress: Progress | None) -> Finding:
    """Dropping prompt rows half-way up, through `dyncc.optimize`."""
    passes = f"promptdistill{{layers=14 keep={size.keep}}}"
    ids = tokens[: size.prompt][None]
    module = Prefill(model, keys=True)
    mask = torch.ones_like(ids)  # `generate` always passes one
    result = _bench(module, (ids, mask), "SmolLM2 drops prompt rows", size, progress, passes=passes, door=2)
    finding = Finding("SmolLM2 drops prompt rows", f"{size.prompt} tokens, {passes}, dyncc.optimize", result)
    if "dyncc" not in result.runs:
        return finding
    dense, pruned = result.runs.get("inductor", module), result.runs["dyncc"]
    found = compare_continuations(
        model,
        lambda prompt: dense(prompt, mask),
        lambda prompt: pruned(prompt, mask),
        tokens,
        size.prompt,
        size.ahead,
        size.decoder_documents,
        progress,
    )
    return Finding(finding.name, finding.setting, result, found)


def _encoder(size: Size, progress: Progress | None) -> Finding:
    """Dropping a sentence encoder's rows, through `dyncc.optimize`."""
    passes = "evit{keep=0.5 layers=2 fuse=false fill=zero}"  # zeros, so that the mean is over the kept rows
    model, tokenizer = load_minilm()
    batches = passages(tokenizer, size.sentence, 1, size.encoder_batches + 1)
    result = _bench(model, (), "MiniLM drops rows", size, progress, kwargs=batches[0], passes=passes, door=2)
    found = embedding_cosines(model, result.runs["dyncc"], batches[1:]) if "dyncc" in result.runs else {}
    return Finding("MiniLM drops rows", f"{size.sentence} tokens, {passes}, dyncc.optimize", result, found)


def _bench(module: torch.nn.Module, args: tuple[Any, ...], title: str, size: Size, progress: Progress | None, **more: Any) -> BenchResult:
    def tell(what: str, done: int, total: int) -> None:
        if progress is not None:
            progress(f"{title}: {what}", done, total)

    return bench(module, args, pairs=size.pairs, against=("inductor",), title=title, progress=tell, **more)
