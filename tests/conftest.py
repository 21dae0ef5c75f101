"""Makes the test helpers beside this file importable (`from zoo import ZOO`) and names the marker of long tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_configure(config: pytest.Config) -> None:
    """`-m "not full"` is `make test`; everything is `make test-full`."""
    config.addinivalue_line("markers", "full: takes minutes; part of `make test-full` only")
