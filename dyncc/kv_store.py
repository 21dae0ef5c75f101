"""Keys and values in buffers with room to grow: appending writes the new rows and copies nothing that is already there.

Of the stores that share a buffer one may go on in place: the one that wrote its last row and still ends there. Any other, because it was
cropped or came from sharing, moves to a buffer of its own first. So no continuation ever overwrites rows that another one, or a view
handed out earlier, still reads. (The mark is a flag, not a length: a compiled step would compare two sizes that are always equal, and
Inductor of torch 2.13 then forgets to define one of them.)
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dyncc.kernels.select_keys import take_keys

ROOM = 512
"""How many more rows a buffer has than it needs when it is made; a quarter of a large past."""


class Buffer:
    """Keys [B, G, N, D] and values [B, G, N, Dv]."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values


class KVStore:
    """The first `length` rows of a buffer, which other stores may share; `newest` while its last row is the last written."""

    def __init__(self) -> None:
        self.buffer: Buffer | None = None
        self.length = 0
        self.newest = False

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows [B, G, T, D] behind the last one; returns all keys and values, as views of the buffer."""
        end = self.length + keys.shape[2]
        buffer = self.buffer
        if buffer is None:
            buffer = self.buffer = Buffer(_room(keys, end), _room(values, end))
        elif not self.newest or end > buffer.keys.shape[2]:
            buffer = self.buffer = self._moved(buffer, end)
        buffer.keys[:, :, self.length : end] = keys
        buffer.values[:, :, self.length : end] = values
        self.length, self.newest = end, True
        return buffer.keys[:, :, :end], buffer.values[:, :, :end]

    def view(self) -> tuple[Tensor, Tensor]:
        """All keys and values. They stay as they are: what is written later stands behind them, or in another buffer."""
        assert self.buffer is not None, "nothing was appended yet"
        return self.buffer.keys[:, :, : self.length], self.buffer.values[:, :, : self.length]

    def crop(self, rows: int) -> None:
        """Forget the last `rows` rows. The next ones go to a buffer of their own."""
        if rows:
            self.length, self.newest = max(0, self.length - rows), False

    def change(self, edit: Callable[[Tensor], Tensor]) -> None:
        """Put `edit(keys)` and `edit(values)` in place of all rows: another batch, or a choice of rows ([B, G, S, D])."""
        if self.buffer is not None:
            keys, values = map(edit, self.view())
            self.buffer, self.length, self.newest = Buffer(keys, values), keys.shape[2], False

    def gather(self, index: Tensor, room: int = 0) -> None:
        """Keep rows `index` [B, G, S] of each head, in that order; the memory of the others is given back. `room` is for that many more."""
        assert self.buffer is not None, "nothing was appended yet"
        count = index.shape[2]
        self.buffer = Buffer(*(_gathered(rows, index, count + room) for rows in self.view()))
        self.length, self.newest = count, True

    def __copy__(self) -> KVStore:
        """Another store of the same rows; it moves to its own buffer when it is appended to."""
        other = KVStore()
        other.buffer, other.length = self.buffer, self.length
        return other

    @property
    def bytes(self) -> int:
        """Bytes of the rows held, without the room behind them."""
        return sum(t.numel() * t.element_size() for t in self.view()) if self.buffer is not None else 0

    def _moved(self, buffer: Buffer, end: int) -> Buffer:
        keys, values = _room(buffer.keys, end), _room(buffer.values, end)
        keys[:, :, : self.length] = buffer.keys[:, :, : self.length]
        values[:, :, : self.length] = buffer.values[:, :, : self.length]
        return Buffer(keys, values)


def _gathered(rows: Tensor, index: Tensor, size: int) -> Tensor:
    new = rows.new_zeros(rows.shape[0], rows.shape[1], size, rows.shape[3])
    new[:, :, : index.shape[2]] = take_keys(rows, index)
    return new


def _room(like: Tensor, rows: int) -> Tensor:
    batch, heads, _, width = like.shape
    return like.new_zeros(batch, heads, rows + max(ROOM, rows // 4), width)  # zeros: whoever compares two runs compares the room too
