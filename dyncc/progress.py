"""What is being done, on stderr: a bar on a terminal, a line for each new step elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def progress(console: Console | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """A function to call with the step, how many parts of it are done, and how many there are."""
    console = console or Console(stderr=True, highlight=False)
    show = _bar(console) if console.is_terminal else _lines(console)
    with show as tell:
        yield tell


@contextlib.contextmanager
def _bar(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def tell(what: str, done: int = 0, total: int = 0) -> None:
            bar.update(task, description=what, completed=done, total=total or None)

        yield tell


@contextlib.contextmanager
def _lines(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    last = ""

    def tell(what: str, done: int = 0, total: int = 0) -> None:
        nonlocal last
        if what != last:
            console.print(what, markup=False, soft_wrap=True)
        last = what

    yield tell
