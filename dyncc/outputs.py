"""Folders that the user asks dyncc to write to."""

from __future__ import annotations

import tempfile
from pathlib import Path

from dyncc.errors import OutputNotWritable


def writable_folder(path: str | Path) -> Path:
    """Make the folder where needed and prove that a file can be written in it; else OutputNotWritable."""
    folder = Path(path).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".dyncc-"):
            return folder
    except OSError as error:
        raise OutputNotWritable(path=folder, problem=error.strerror or str(error)) from error
