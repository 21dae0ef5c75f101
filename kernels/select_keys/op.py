"""The op `dyncc::partly_read`: a cache's mark on keys that a pass may read in part, with what it keeps of their
pages: nothing, their bounds, or their means.

It gives the keys as they are, so that a model which nobody rewrites attends to all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define("partly_read(Tensor(a) keys, Tensor[] pages, str policy) -> Tensor(a)")


def _partly_read(keys: Tensor, pages: list[Tensor], policy: str) -> Tensor:
    return keys.view_as(keys)


_library.impl("partly_read", _partly_read, "CompositeImplicitAutograd")
PARTLY_READ = torch.ops.dyncc.partly_read.default
