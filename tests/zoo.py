"""The zoo: every small random-weight transformers model of the tests."""

from __future__ import annotations

from zoo_decoders import DECODERS
from zoo_encoders import ENCODERS
from zoo_model import Attn, ZooModel
from zoo_vision import VISION

ZOO: tuple[ZooModel, ...] = (*ENCODERS, *VISION, *DECODERS)
CASES: tuple[tuple[ZooModel, Attn], ...] = tuple((model, attn) for model in ZOO for attn in model.attns)
CASE_NAMES: tuple[str, ...] = tuple(f"{model.name}-{attn}" for model, attn in CASES)


def by_name(name: str) -> ZooModel:
    """The zoo's model of that name."""
    return next(model for model in ZOO if model.name == name)
