"""result + residual."""

TENSORS: tuple[str, ...] = ("residual",)
NUMBERS: tuple[str, ...] = ()
EPILOGUES: dict[str, tuple[str, ...]] = {"residual": ("result = result + residual_tile",)}
