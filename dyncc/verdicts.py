"""Verdicts on disk: what evidence found once for a graph, its passes, versions, CPU and GPU need not be measured again.

The cache never fails its caller: a damaged entry counts as absent, a folder that cannot be written is reported once.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_FORMAT = 1


def folder() -> Path:
    """$DYNCC_CACHE_DIR, else the user's cache folder of this platform."""
    chosen = os.environ.get("DYNCC_CACHE_DIR")
    return Path(chosen).expanduser() if chosen else _user_cache() / "dyncc"


def _user_cache() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


@functools.cache
def cpu_model() -> str:
    """The CPU's name: timings on one say nothing about another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else f"{platform.processor()} {platform.machine()}".strip()


@functools.cache
def gpu_model() -> str:
    """The GPU's name, or ""."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else ""


@functools.cache
def version(package: str) -> str:
    """The installed version of a package, or "none"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _own_code() -> str:
    """A digest of dyncc's own files: a verdict that other analyses led to says nothing about these."""
    specs = (importlib.util.find_spec(name) for name in ("dyncc", "dyncc.passes", "dyncc.kernels"))
    roots = {Path(place) for spec in specs if spec is not None for place in spec.submodule_search_locations or ()}
    files = sorted({file for root in roots for file in root.rglob("*.py")})
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def sources(passes: Iterable[object]) -> tuple[str, ...]:
    """The text of the file of each pass, in order, and digests of the files that options name: an edited pass is a new pass."""
    found = []
    for passed in passes:
        own, named = sys.modules[type(passed).__module__].__file__, getattr(passed, "file", None)
        found.append(Path(own).read_text(encoding="utf-8") if own else "")
        if named is not None and Path(named).is_file():
            found.append(hashlib.sha256(Path(named).read_bytes()).hexdigest())
    return tuple(found)


def key(graph: str, pass_sources: Iterable[str], options: str) -> str:
    """The name of a verdict: everything that could change it, hashed."""
    versions = [version("torch"), version("dyncc"), _own_code()]
    parts = [_FORMAT, graph, list(pass_sources), options, versions, cpu_model(), gpu_model()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def get(name: str) -> dict[str, Any] | None:
    """The verdict stored under a key, or None; a damaged entry counts as absent."""
    try:
        entry = json.loads(_path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(entry, dict) or entry.get("key") != name or not isinstance(entry.get("verdict"), dict):
        return None
    verdict: dict[str, Any] = entry["verdict"]
    return verdict


def put(name: str, verdict: dict[str, Any]) -> bool:
    """Store a verdict in one step (write aside, then rename); False where the folder cannot be written."""
    text = json.dumps({"key": name, "verdict": verdict})
    try:
        folder().mkdir(parents=True, exist_ok=True)
        _replace(_path(name), text)
    except OSError as error:
        _warn_once(str(folder()), error.strerror or str(error))
        return False
    return True


def _replace(path: Path, text: str) -> None:
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".verdict-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(aside, path)
    except OSError:
        Path(aside).unlink(missing_ok=True)
        raise


@functools.cache
def _warn_once(where: str, problem: str) -> None:
    warnings.warn(f"dyncc cannot keep verdicts in {where}: {problem}; set DYNCC_CACHE_DIR to another folder", UserWarning, stacklevel=3)


def _path(name: str) -> Path:
    return folder() / f"{name}.json"


def _files() -> Iterator[Path]:
    return (path for path in folder().glob("*.json") if len(path.stem) == 64)


def entries() -> dict[str, dict[str, Any]]:
    """Every readable verdict by key."""
    found = {path.stem: get(path.stem) for path in sorted(_files())}
    return {name: verdict for name, verdict in found.items() if verdict is not None}


def size() -> int:
    """Bytes that the stored verdicts take."""
    return sum(path.stat().st_size for path in _files())


def clear() -> int:
    """Remove every verdict and nothing else; the number removed."""
    doomed = list(_files())
    for path in doomed:
        path.unlink(missing_ok=True)
    return len(doomed)
