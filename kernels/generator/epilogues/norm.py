"""weight * result / sqrt(mean(result^2) + eps), over the channels of a head."""

TENSORS: tuple[str, ...] = ("weight",)
NUMBERS: tuple[str, ...] = ("eps",)
EPILOGUES: dict[str, tuple[str, ...]] = {
    "norm": (
        "square = tl.sum(tl.where(kept, result * result, 0.0), axis=1) / WIDTH",
        "result = result * (1.0 / tl.sqrt(square + eps))[:, None] * weight_tile",
    ),
}
