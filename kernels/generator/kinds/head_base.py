"""What kinds share whose heads have keys and values: two widths, queries of the width of keys, and a scale of their products."""

from __future__ import annotations

from dataclasses import dataclass

from dyncc.kernels.generator.spec import WIDEST, KernelSpec, check, check_width, power


@dataclass(frozen=True)
class HeadKernel(KernelSpec):
    """A kernel of heads with `width` channels of keys and `wide` of values (0: as many)."""

    width: int
    wide: int = 0

    @property
    def value_width(self) -> int:
        return self.wide or self.width

    @property
    def lanes(self) -> tuple[int, int]:
        """Channels of keys and of values as tiles hold them."""
        return power(self.width), power(self.value_width)

    def numbers(self) -> tuple[str, ...]:
        return ("scale",)

    def sized(self) -> str:
        return f"w{self.width}" + (f"x{self.wide}" if self.wide else "")


def check_widths(width: int, wide: int) -> None:
    """Of attention."""
    check_width(width)
    check(0 <= wide <= WIDEST, "wide", wide, f"a value has 1 to {WIDEST} channels, or 0 for as many as a key")


def query_tile(width: int, lanes: int) -> list[str]:
    """The lines behind those of `tile`: keys and channels of a program, and the queries of its rows, `width` channels in `lanes`."""
    return [
        f"hop, channel = tl.arange(0, KEYS), tl.arange(0, {lanes})",
        f"filled = channel < {width}",
        "q_tile = tl.load(",
        "    q + batch * q_batch + head * q_head + here * q_row + step[:, None] * q_row + channel[None, :],",
        "    mask=(at < rows)[:, None] & filled[None, :], other=0.0,",
        ")",
    ]
