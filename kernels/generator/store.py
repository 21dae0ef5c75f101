"""Generated texts on disk: written aside and renamed, with a checksum in the first line, so that a damaged one is noticed and made anew."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from dyncc import verdicts

MARK = "# sha256 "


def key(*parts: str) -> str:
    """The name of an entry: everything that could change it, with the versions of torch, Triton and dyncc."""
    versions = [verdicts.version(name) for name in ("torch", "triton", "dyncc")]
    return hashlib.sha256("\0".join([*parts, *versions]).encode()).hexdigest()[:40]


def path(name: str, suffix: str) -> Path:
    """Where an entry is or would be."""
    return verdicts.folder() / "kernels" / f"{name}{suffix}"


def kept(name: str, suffix: str, make: Callable[[], str]) -> Path:
    """The file of an entry, made when it is not there or not what was written."""
    file = path(name, suffix)
    if read(file) is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        text = make()
        handle, aside = tempfile.mkstemp(dir=file.parent, prefix=".kernel-")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(f"{MARK}{_digest(text)}\n{text}")
        os.replace(aside, file)
    return file


def read(file: Path) -> str | None:
    """The text of an entry without its first line, or None where there is none or it is damaged."""
    try:
        first, _, text = file.read_text(encoding="utf-8").partition("\n")
    except (OSError, UnicodeDecodeError):
        return None
    return text if first == MARK + _digest(text) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
