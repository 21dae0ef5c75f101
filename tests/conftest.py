"""Makes the test helpers beside this file importable (`from zoo import ZOO`), names the marker of long tests, keeps verdicts to one run.

Whole files ask for its fixtures by `pytestmark = pytest.mark.usefixtures(...)`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: test processes that run side by side have one thread each
    os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    """`-m "not full"` is `make test`; everything is `make test-full`."""
    config.addinivalue_line("markers", "full: takes minutes; part of `make test-full` only")
    if config.option.markexpr == "not full":
        os.environ["DYNCC_TEST_QUICK"] = "1"


@pytest.fixture(scope="session", autouse=True)
def own_verdicts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No verdict of an earlier run decides a test."""
    os.environ["DYNCC_CACHE_DIR"] = str(tmp_path_factory.mktemp("verdicts"))


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """torch.compile knows no graph before a test and keeps none behind it."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of benchmarks/ can be imported in a test."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))


@pytest.fixture
def no_grad() -> Iterator[None]:
    """Gradients are off in a test."""
    import torch

    with torch.no_grad():
        yield
