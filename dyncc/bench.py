"""`bench`: a model as it is, under plain Inductor and under dyncc, timed in one run and in pairs, with the quality beside the speed.

The variants are built lazily, so that a variant's first call holds all it costs to get going: capture, passes, evidence, code
generation. Nothing global is configured; Dynamo's caches are emptied once at the start, because lengths that it saw before would make
it compile for symbolic sizes.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from dyncc import peers, pipeline, quality
from dyncc.bench_result import BenchResult, environment, rewrite_rows
from dyncc.options import check_engine, check_evidence
from dyncc.timing import Progress, paired

Build = Callable[[], Callable[..., Any]]


class Variant:
    """A way to run the model: built at the first call, then called with the same inputs again and again."""

    def __init__(self, build: Build, args: Sequence[Any], kwargs: Mapping[str, Any], prepare: Callable[[], None] | None = None) -> None:
        self.build = build
        self.args = tuple(args)
        self.kwargs = dict(kwargs)
        self.prepare = prepare or _nothing
        self.run: Callable[..., Any] | None = None

    def __call__(self) -> Any:
        if self.run is not None:
            return self.run(*self.args, **self.kwargs)
        with cold_caches():
            self.run = self.build()
            return self.run(*self.args, **self.kwargs)

    def output(self) -> Any:
        """One more call, prepared like the others, for its result."""
        self.prepare()
        return self()


class DynccVariant:
    """Builds the model through one of dyncc's doors and finds the reports of what was built."""

    def __init__(self, model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], door: int, options: dict[str, Any]) -> None:
        self.model, self.args, self.kwargs = model, tuple(args), dict(kwargs)
        self.door, self.options = door, options
        self.known = 0
        self.optimized: Any = None

    def build(self) -> Callable[..., Any]:
        """The callable of the chosen door."""
        if self.door == 2:
            self.optimized = _dyncc().optimize(self.model, self.args, self.kwargs, **self.options)
            return self.optimized
        self.known = len(_dyncc().reports())
        options = {name: value for name, value in self.options.items() if name != "dynamic_shapes"}
        return torch.compile(self.model, backend="dyncc", dynamic=_dynamic(self.options["dynamic_shapes"]), options=options)

    def reports(self) -> list[Any]:
        """What dyncc did, one report a graph."""
        if self.door == 2:
            return [self.optimized.report] if self.optimized is not None else []
        return list(_dyncc().reports()[self.known :])


def bench(
    model: torch.nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    passes: str | None = None,
    pairs: int = 20,
    warmup: int = 2,
    against: Sequence[str] = ("eager", "inductor"),
    engine: str = "inductor",
    dynamic_shapes: Any = None,
    door: int = 1,
    evidence: str = "numeric",
    metric: Callable[[Any, Any], Mapping[str, float]] | None = None,
    prepare: Callable[[], None] | None = None,
    title: str = "",
    progress: Progress | None = None,
    others: Mapping[str, Build] | None = None,
) -> BenchResult:
    """Time `model(*args, **kwargs)` eagerly, under plain Inductor (or other peers) and under dyncc, and compare their outputs.

    `door` 1 compiles with `backend="dyncc"`, 2 calls `dyncc.optimize`. `against` names peers (see `dyncc.peers`) or backends of
    torch.compile; `others` builds callables of the model's arguments to time beside them. `metric(dense, other)` replaces the comparison
    that is chosen by the kind of output. `prepare` is called before every call, unmeasured. A variant that fails is reported, not raised;
    only a mistake in what dyncc was asked for is.
    """
    if door not in (1, 2):
        raise ValueError(f"door={door}: choose 1 (torch.compile) or 2 (dyncc.optimize)")
    pipeline.build(passes)
    check_engine(engine)
    check_evidence(evidence)
    kwargs = dict(kwargs or {})
    options = {"passes": passes, "engine": engine, "evidence": evidence, "dynamic_shapes": dynamic_shapes}
    ours = DynccVariant(model, args, kwargs, door, options)
    builds: dict[str, Build] = {name: _peer(name, model, args, kwargs, dynamic_shapes) for name in against}
    builds |= {**(others or {}), "dyncc": ours.build}
    variants = {name: Variant(build, args, kwargs, prepare) for name, build in builds.items()}
    torch._dynamo.reset()
    with torch.no_grad():
        timings = paired(variants, pairs=pairs, warmup=warmup, progress=progress)
        dense = Variant(lambda: model, args, kwargs, prepare).output()
        measure = metric or _comparison(model)
        compared = {name: dict(measure(dense, variants[name].output())) for name in timings.seconds if name != "eager"}
    reports = ours.reports()
    return BenchResult(
        title=title or type(model).__name__,
        passes=passes,
        door=door,
        engine=engine,
        pairs=pairs,
        timings=timings,
        quality=compared,
        rewrites=rewrite_rows(reports),
        fallbacks=[report.fallback for report in reports if report.fallback],
        flops=_flops(reports),
        own=_own_seconds(reports),
        cached=any(report.cached for report in reports),
        environment=environment(),
        runs={name: variant.run for name, variant in variants.items() if name in timings.seconds and variant.run is not None},
    )


@contextmanager
def cold_caches() -> Iterator[None]:
    """Inductor's code caches and dyncc's verdicts empty inside, as they were after: a first call that finds work done measures nothing."""
    from torch._inductor.utils import fresh_cache

    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {"DYNCC_CACHE_DIR": folder}), fresh_cache():
        yield


def _peer(name: str, model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic_shapes: Any) -> Build:
    return lambda: peers.build(name, model, args, kwargs, dynamic_shapes)


def _dynamic(dynamic_shapes: Any) -> bool:
    """All variants compile for the given sizes, or all for symbolic ones."""
    return dynamic_shapes is not None


def _comparison(model: torch.nn.Module) -> Callable[[Any, Any], dict[str, float]]:
    sizes = (getattr(getattr(module, "config", None), "vocab_size", None) for module in model.modules())
    vocabulary = next((size for size in sizes if size is not None), None)
    return lambda dense, other: quality.compare(dense, other, vocabulary)


def _flops(reports: Sequence[Any]) -> dict[str, int]:
    """Counted FLOPs of one call, summed over the graphs."""
    total: dict[str, int] = {}
    for report in reports:
        for name, value in report.flops.items():
            if isinstance(value, int):
                total[name] = total.get(name, 0) + value
    return total


def _own_seconds(reports: Sequence[Any]) -> dict[str, float]:
    """Seconds of dyncc's stages, summed over the graphs."""
    total: dict[str, float] = {}
    for report in reports:
        for name, value in report.seconds.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _dyncc() -> Any:
    import dyncc

    return dyncc


def _nothing() -> None:
    """Nothing to prepare."""
