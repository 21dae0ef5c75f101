"""The zoo: every small random-weight transformers model of the tests."""

from __future__ import annotations

from typing import Any

import pytest
from zoo_decoders import DECODERS
from zoo_encoders import ENCODERS
from zoo_model import Attn, ZooModel
from zoo_vision import VISION

ZOO: tuple[ZooModel, ...] = (*ENCODERS, *VISION, *DECODERS)
CASES: tuple[tuple[ZooModel, Attn], ...] = tuple((model, attn) for model in ZOO for attn in model.attns)


def by_name(name: str) -> ZooModel:
    """The zoo's model of that name."""
    return next(model for model in ZOO if model.name == name)


def every_case() -> list[Any]:
    """Each model in each form of attention, as pytest parameters."""
    return [pytest.param(model, attn, id=f"{model.name}-{attn}", marks=skipped(model, attn)) for model, attn in CASES]


def alternating(start: int, *more: Any, dynamic: bool = False) -> list[Any]:
    """`every_case`, but one form of attention a model in the quick tests (the form alternates, the first model takes form `start`)."""
    return [
        pytest.param(
            model, attn, *more, id="-".join([model.name, attn, *more]), marks=[*skipped(model, attn, dynamic), *_full(model, attn, start)]
        )
        for model, attn in CASES
    ]


def skipped(model: ZooModel, attn: Attn, dynamic: bool = False) -> list[Any]:
    """The mark of a case that the installed libraries cannot do."""
    reason = model.left_out(attn, dynamic)
    return [pytest.mark.skip(reason=reason)] if reason else []


def _full(model: ZooModel, attn: Attn, start: int) -> list[Any]:
    return [] if attn == model.able[(start + ZOO.index(model)) % len(model.able)] else [pytest.mark.full]
