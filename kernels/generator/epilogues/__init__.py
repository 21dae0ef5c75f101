"""What a kernel does to its result before it is stored: one file an epilogue, composed in the order of the spec.

An epilogue gets the result tile `result` [rows, channels] in fp32 and leaves its own in it. It may read the tile of each of its tensors
(`gate_tile` of `gate`), its numbers, `kept` (which rows and channels are inside) and `WIDTH`, the number of channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from dyncc.kernels.generator.epilogues import gate, norm, residual


@dataclass(frozen=True)
class Epilogue:
    """`tensors`: arguments as they are broadcast to [B, H, T, channels], each with four strides; `numbers`: scalar arguments; `lines`."""

    tensors: tuple[str, ...]
    numbers: tuple[str, ...]
    lines: tuple[str, ...]


EPILOGUES: dict[str, Epilogue] = {
    name: Epilogue(module.TENSORS, module.NUMBERS, lines)
    for module in (gate, residual, norm)
    for name, lines in module.EPILOGUES.items()
}
"""Every epilogue by name."""


def load(name: str) -> list[str]:
    """The lines that load a tensor argument's tile in fp32."""
    tile = f"{name}_at + step[:, None] * {name}_row + lane[None, :] * {name}_lane"
    return [
        f"{name}_at = {name} + batch * {name}_batch + head * {name}_head + here * {name}_row",
        f"{name}_tile = tl.load({tile}, mask=kept, other=0.0).to(tl.float32)",
    ]
