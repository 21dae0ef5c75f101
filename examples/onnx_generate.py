"""Greedy decoding with nothing but onnxruntime and numpy, on the two files that `export` writes for a language model.

    python examples/onnx_generate.py            # exports SmolLM2 to a temporary folder, then generates from the files

`generate` needs neither torch nor dyncc. Keys and values live in buffers with room to grow: each step binds a buffer both as the past and
as the present, so that ONNX Runtime appends in place and nothing is copied.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def generate(folder: Path, prompt: list[int], tokens: int, room: int = 0, threads: int = 2) -> list[int]:
    """The greedy continuation of `prompt`: `folder` holds prefill.onnx and decode.onnx; `room` is how many keys the buffers hold."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    files = (folder / "prefill.onnx", folder / "decode.onnx")
    prefill, decode = (ort.InferenceSession(str(file), options, ["CPUExecutionProvider"]) for file in files)
    ids = np.array([prompt], dtype=np.int64)
    feed = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    logits, *cache = prefill.run(None, {v.name: feed[v.name] for v in prefill.get_inputs()})
    names = [v.name for v in prefill.get_outputs()][1:]
    buffers = {name: _roomy(array, max(room, len(prompt) + tokens)) for name, array in zip(names, cache, strict=True)}
    found = [int(logits[0, -1].argmax())]
    for length in range(len(prompt) + 1, len(prompt) + tokens):
        found.append(step(decode, buffers, found[-1], length))
    return found


def step(session: Any, buffers: dict[str, Any], token: int, length: int) -> int:
    """Read one token; `length` counts it and all keys before it. The buffers grow in place."""
    import onnxruntime as ort

    binding = session.io_binding()
    feed = {"input_ids": np.array([[token]], dtype=np.int64), "attention_mask": np.ones((1, length), dtype=np.int64)}
    for name, array in feed.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for name, buffer in buffers.items():
        binding.bind_ortvalue_input(name.replace("present.", "past_key_values."), buffer)
        binding.bind_ortvalue_output(name, buffer)
    binding.bind_output(session.get_outputs()[0].name)
    session.run_with_iobinding(binding)
    return int(binding.get_outputs()[-1].numpy()[0, -1].argmax())  # bound last


def _roomy(array: np.ndarray, room: int) -> Any:
    """A buffer for `room` keys that starts with those of `array` [1, heads, keys, width]."""
    import onnxruntime as ort

    buffer = np.zeros((*array.shape[:2], room, array.shape[3]), dtype=array.dtype)
    buffer[:, :, : array.shape[2]] = array
    return ort.OrtValue.ortvalue_from_numpy(buffer)


def export(model: Any, folder: Path, longest: int = 8192, passes: str | None = None) -> list[Any]:
    """Write prefill.onnx and decode.onnx of a transformers language model; `passes` go into the prefill. What was written is returned."""
    import torch
    from torch.export import Dim

    import dyncc
    from dyncc.decoding import Decode, Prefill, flatten_cache

    ids = torch.randint(3, 90, (1, 24), generator=torch.Generator().manual_seed(0))
    length, past = Dim("length", min=2, max=longest), Dim("past", min=2, max=longest - 1)
    sizes = ({1: length}, {1: length})
    options = {"engine": "reference", "evidence": "off"}
    prefill = dyncc.optimize(Prefill(model, keys=True), (ids, torch.ones_like(ids)), passes=passes, dynamic_shapes=sizes, **options)
    with torch.no_grad():
        cache = flatten_cache(model(input_ids=ids).past_key_values)
    step_sizes = ({}, {1: past + 1}, tuple({2: past} for _ in cache))
    mask = torch.ones(1, ids.shape[1] + 1, dtype=torch.long)
    decode = dyncc.optimize(Decode(model), (ids[:, :1], mask, *cache), dynamic_shapes=step_sizes, **options)
    return [prefill.export_onnx(folder / "prefill.onnx"), decode.export_onnx(folder / "decode.onnx")]


def main(argv: list[str] | None = None) -> list[int]:
    """Export SmolLM2, generate from the files, and compare with transformers."""
    from dyncc.models import load_smollm2

    words = " ".join(argv if argv is not None else sys.argv[1:]) or "The ocean is"
    model, tokenizer = load_smollm2()
    prompt = tokenizer(words)["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        for written in export(model, Path(folder)):
            print(f"{written.path.name}: {written.fused}")
        found = generate(Path(folder), prompt, tokens=64)
    print(tokenizer.decode(prompt + found))
    return found


if __name__ == "__main__":
    main()
