"""act(gate) * result (Qiu et al. 2025)."""

TENSORS: tuple[str, ...] = ("gate",)
NUMBERS: tuple[str, ...] = ()
EPILOGUES: dict[str, tuple[str, ...]] = {
    "gate-sigmoid": ("result = result * tl.sigmoid(gate_tile)",),
    "gate-silu": ("result = result * gate_tile * tl.sigmoid(gate_tile)",),
}
