"""Tile sizes, warps and stages that a device ran fastest: tried by `dyncc kernels --tune`, remembered on disk, used by launches there.

What was fastest on devices that dyncc was measured on comes with it (tuned.json, written by `tests/make_tuned.py`).
"""

from __future__ import annotations

import functools
import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dyncc.errors import BadKernelSpec, NoGPU
from dyncc.kernels.generator import store
from dyncc.kernels.generator.compiled import compiled
from dyncc.kernels.generator.samples import sample
from dyncc.kernels.generator.spec import KernelSpec
from dyncc.kernels.generator.targets import TARGETS

FILE = Path(__file__).parent / "tuned.json"
LARGE = {"batch": 1, "heads": 32, "groups": 8, "rows": 4096, "keys": 4096, "chosen": 128}
"""Sizes at which forms of a kernel are tried, where its kind names no others."""
ROUNDS = 2
"""How often each form is timed, in turns: a device is slow when it begins."""
THREADS = 8
"""Forms that are compiled side by side."""
Form = dict[str, Any]


@dataclass(frozen=True)
class Tuned:
    """The fastest `form` of a kernel, of how many that were `tried`; seconds of it and of the form that the spec has by itself."""

    name: str
    form: Form
    seconds: float
    before: float
    tried: int

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "form": self.form, "seconds": self.seconds, "before": self.before, "tried": self.tried}

    def __str__(self) -> str:
        told = " ".join(f"{name}={value}" for name, value in self.form.items()) or "as it is"
        gain = f"{self.before / self.seconds:.2f} times as fast as before"
        return f"{self.name}: {told} takes {1e6 * self.seconds:.0f} us, {gain} ({self.tried} tried)"


def forms(spec: KernelSpec) -> list[Form]:
    """What of its kind's choices makes a valid spec; first the form that it has by itself."""
    found: list[Form] = [{}]
    tried = spec.choices()
    for values in itertools.product(*tried.values()):
        form = dict(zip(tried, values, strict=True))
        if valid(spec, form) is not None:
            found.append(form)
    return found


def valid(spec: KernelSpec, form: Form) -> KernelSpec | None:
    try:
        return replace(spec, **form)
    except BadKernelSpec:
        return None


def fits(spec: KernelSpec, where: str) -> bool:
    """Whether its registers and its shared memory suffice on a target."""
    try:
        return compiled(spec, where).spills == 0
    except BadKernelSpec:
        return False


def tune(spec: KernelSpec) -> Tuned:
    """Try the forms of a kernel that fit this machine's GPU, on a large sample, and remember the fastest.

    Raises:
        NoGPU: there is none that kernels are compiled for.
    """
    from triton.testing import do_bench

    where = at_hand()
    if where is None:
        raise NoGPU()
    tried = [(form, replace(spec, **form)) for form in forms(spec)]
    with ThreadPoolExecutor(THREADS) as pool:
        fit = list(pool.map(lambda x: not x[0] or fits(x[1], where), tried))
    kept = [x for x, enough in zip(tried, fit, strict=True) if enough]
    given, more = sample(spec, "cuda", **{**LARGE, **spec.large})
    calls = [partial(x.run, *given, **more) for _, x in kept]
    rounds = [[do_bench(call, return_mode="median") / 1e3 for call in calls] for _ in range(ROUNDS)]
    seconds = [min(found) for found in zip(*rounds, strict=True)]
    best = min(range(len(kept)), key=seconds.__getitem__)
    file = store.path(_key(spec, where), ".json")
    file.unlink(missing_ok=True)
    store.kept(_key(spec, where), ".json", lambda: json.dumps(kept[best][0]))
    _formed.cache_clear()
    return Tuned(spec.alike().name, kept[best][0], seconds[best], seconds[0], len(kept))


def preferred(spec: KernelSpec, device: torch.device) -> KernelSpec:
    """The spec in the form that its device ran fastest, where that was tried; one that was given a form keeps it."""
    where = at_hand() if device.type == "cuda" else None
    return spec if where is None else _formed(spec, where)


@functools.cache
def _formed(spec: KernelSpec, where: str) -> KernelSpec:
    form = _remembered(spec, where) if spec == spec.formless() else None
    return (valid(spec, form) if form else None) or spec


def _remembered(spec: KernelSpec, where: str) -> Form | None:
    text = store.read(store.path(_key(spec, where), ".json"))
    found: Form | None = known().get(where, {}).get(spec.alike().name) if text is None else json.loads(text)
    return found


def _key(spec: KernelSpec, where: str) -> str:
    return store.key("tuned", spec.alike().name, where, torch.cuda.get_device_name() if torch.cuda.is_available() else "")


@functools.cache
def known() -> dict[str, dict[str, Form]]:
    """Forms by target and by kernel."""
    found: dict[str, dict[str, Form]] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


@functools.cache
def at_hand() -> str | None:
    """This machine's GPU as a target, None where there is none or one that kernels are not compiled for."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip is not None:
        name = f"hip:{torch.cuda.get_device_properties().gcnArchName.partition(':')[0]}"
    else:
        name = f"cuda:{torch.cuda.get_device_capability()[0]}0"
    return name if name in TARGETS else None
