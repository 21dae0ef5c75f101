"""A model folder -> the model and inputs of the kind it reads: tokens, pixels or audio features."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dyncc.errors import BadModelDirectory

SEED = 0
TOKENS = 64
_TEXT = "A compiler reads a program, finds out what it means, and writes another program that means the same and runs faster. "


def load_folder(path: Path) -> tuple[torch.nn.Module, tuple[Any, ...], dict[str, Any]]:
    """Load with transformers, offline and without code or pickles from the folder; BadModelDirectory where that fails."""
    try:
        import transformers
    except ImportError as error:
        raise BadModelDirectory(path=path, problem="transformers is not installed; pip install transformers") from error
    gguf = sorted(path.glob("*.gguf"))
    if not gguf and not (path / "config.json").is_file():
        raise BadModelDirectory(path=path, problem="it holds neither config.json nor a .gguf file")
    if len(gguf) > 1:
        raise BadModelDirectory(path=path, problem=f"it holds {len(gguf)} .gguf files; keep one")
    where: dict[str, Any] = {"local_files_only": True, **({"gguf_file": gguf[0].name} if gguf else {})}
    try:
        config = transformers.AutoConfig.from_pretrained(path, **where)
        kind = _class(transformers, config)
        weights = {} if gguf else {"use_safetensors": True}
        model = kind.from_pretrained(path, dtype=torch.float32, **where, **weights).eval()
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadModelDirectory(path=path, problem=f"{type(error).__name__}: {first}") from error
    return model, (), _inputs(path, model, where)


def _class(transformers: Any, config: Any) -> Any:
    names = getattr(config, "architectures", None) or []
    found = [getattr(transformers, name) for name in names if hasattr(transformers, name)]
    return found[0] if found else transformers.AutoModel


def _inputs(path: Path, model: Any, where: dict[str, Any]) -> dict[str, torch.Tensor]:
    config, main = model.config, model.main_input_name
    makers = {"input_ids": _tokens, "pixel_values": _pixels, "input_features": _features}
    if main not in makers:
        raise BadModelDirectory(path=path, problem=f"no example is known for its input {main!r}; write a factory and use module:factory")
    names = [main]
    if hasattr(config, "vision_config") and hasattr(config, "text_config"):
        names = ["input_ids", "pixel_values"]
    inputs: dict[str, torch.Tensor] = {}
    for name in names:
        inputs.update(makers[name](path, config, where))
    if getattr(config, "is_encoder_decoder", False):
        start = config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.full((1, 1), 0 if start is None else start)
    return inputs


def _tokens(path: Path, config: Any, where: dict[str, Any]) -> dict[str, torch.Tensor]:
    text = getattr(config, "text_config", config)
    length = min(TOKENS, getattr(text, "max_position_embeddings", TOKENS))
    if any(path.glob("tokenizer*.json")) or any(path.glob("vocab.*")):
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(path, **where)(_TEXT * 8)["input_ids"]
        return {"input_ids": torch.tensor([ids[:length]])}
    generator = torch.Generator().manual_seed(SEED)
    return {"input_ids": torch.randint(0, text.vocab_size, (1, length), generator=generator)}


def _pixels(path: Path, config: Any, where: dict[str, Any]) -> dict[str, torch.Tensor]:
    vision = getattr(config, "vision_config", config)
    size = vision.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    generator = torch.Generator().manual_seed(SEED)
    return {"pixel_values": torch.randn(1, getattr(vision, "num_channels", 3), height, width, generator=generator)}


def _features(path: Path, config: Any, where: dict[str, Any]) -> dict[str, torch.Tensor]:
    frames = 2 * config.max_source_positions
    generator = torch.Generator().manual_seed(SEED)
    return {"input_features": torch.randn(1, config.num_mel_bins, frames, generator=generator)}
