"""A generated kernel as a Python object: its text on disk (Triton reads kernels from files), imported."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from dyncc.kernels.generator import store
from dyncc.kernels.generator.source import source
from dyncc.kernels.generator.spec import KernelSpec


@functools.cache
def kernel(spec: KernelSpec) -> Any:
    """The jitted function of a spec; with TRITON_INTERPRET=1 set before triton is imported, the interpreted one."""
    text = source(spec)
    file = store.kept(store.key("source", text), ".py", lambda: text)
    name = f"dyncc_generated_{spec.name}"
    made = importlib.util.spec_from_file_location(name, file)
    assert made is not None and made.loader is not None
    module = importlib.util.module_from_spec(made)
    made.loader.exec_module(module)
    return getattr(module, spec.entry)
