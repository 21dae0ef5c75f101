"""Folders and files that the user asks dyncc to write: made beside their place under a temporary name, put there in one step."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dyncc.errors import OutputNotWritable


def writable_folder(path: str | Path) -> Path:
    """Make the folder where needed and prove that a file can be written in it; else OutputNotWritable."""
    folder = Path(path).expanduser()
    try:
        _make(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".dyncc-"):
            return folder
    except OSError as error:
        raise OutputNotWritable(path=folder, problem=error.strerror or str(error)) from error


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error


def check_place(path: str | Path, ours: Callable[[Path], bool] | None = None) -> Path:
    """The absolute place of a file, or with `ours` of a folder, that may be written: nothing else stands there; else OutputNotWritable."""
    target = Path(path).expanduser().resolve()
    if ours is None and target.is_dir():
        raise OutputNotWritable(path=path, problem="a folder stands there; choose another name, or remove it")
    if ours is not None and target.exists() and not (target.is_dir() and (ours(target) or not any(target.iterdir()))):
        raise OutputNotWritable(path=path, problem="something else stands there; choose another name, or remove it")
    return target


@contextmanager
def replaced_folder(path: str | Path, ours: Callable[[Path], bool]) -> Iterator[Path]:
    """A new folder that takes the place of `path` when the block ends well, and goes when it does not.

    At every moment the old or the new folder is whole, under `path` or, between two renames, beside it as `set_aside(path)`.

    Args:
        ours: says whether a folder that stands there may be replaced.
    Raises:
        OutputNotWritable: the place cannot be written, or holds something else.
    """
    restore(Path(path).expanduser().resolve())
    target = check_place(path, ours)
    with _told(path), _beside(target) as fresh:
        yield fresh
        _sync(fresh)
        _swap(fresh, target)
        _sync_one(target.parent)


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """A temporary path of the same name; it, and what was written beside it, goes to `path` when the block ends well.

    Raises:
        OutputNotWritable: the place cannot be written.
    """
    target = check_place(path)
    with _told(path), _beside(target) as fresh:
        yield fresh / target.name
        _sync(fresh)
        for made in sorted(fresh.iterdir(), key=lambda made: made.name == target.name):
            os.replace(made, target.parent / made.name)
        _sync_one(target.parent)


def set_aside(target: Path) -> Path:
    """Where the old folder waits while the new one is put in its place."""
    return target.with_name(f".{target.name}.old")


def restore(target: Path) -> None:
    """Bring back a folder that a process killed between the two renames has left aside."""
    if not target.exists() and set_aside(target).is_dir():
        with _told(target):
            os.rename(set_aside(target), target)


def _swap(fresh: Path, target: Path) -> None:
    aside = set_aside(target)
    shutil.rmtree(aside, ignore_errors=True)
    if not target.exists():
        os.rename(fresh, target)
        return
    os.rename(target, aside)
    try:
        os.rename(fresh, target)
    except OSError:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    _make(target.parent)
    fresh = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-", suffix=".part"))
    try:
        yield fresh
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextmanager
def _told(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputNotWritable(path=path, problem=error.strerror or str(error)) from error


def _sync(folder: Path) -> None:
    """Write everything through to the disk, readable for whom the umask allows (temporary folders and safetensors are private)."""
    for place in [*folder.rglob("*"), folder]:
        place.chmod((0o777 if place.is_dir() else 0o666) & ~_umask())
        _sync_one(place)


def _sync_one(place: Path) -> None:
    handle = os.open(place, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
