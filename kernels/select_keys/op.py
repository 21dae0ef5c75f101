"""The op `dyncc::partly_read`: a cache's mark on keys that a pass may read in part, with what it keeps of their
pages: nothing, their bounds, or their means. And `dyncc::remembered`: what such a pass left in the cache at the step before.

They give the keys and the state as they are, so that a model which nobody rewrites attends to all keys and remembers nothing new.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("dyncc", "FRAGMENT")
_library.define("partly_read(Tensor(a) keys, Tensor[] pages, str policy) -> Tensor(a)")
_library.define("remembered(Tensor keys, Tensor[] state, str policy) -> Tensor[]")


def _partly_read(keys: Tensor, pages: list[Tensor], policy: str) -> Tensor:
    return keys.view_as(keys)


def _remembered(keys: Tensor, state: list[Tensor], policy: str) -> list[Tensor]:
    return [x.clone() for x in state]


_library.impl("partly_read", _partly_read, "CompositeImplicitAutograd")
PARTLY_READ = torch.ops.dyncc.partly_read.default
_library.impl("remembered", _remembered, "CompositeImplicitAutograd")
REMEMBERED = torch.ops.dyncc.remembered.default
"""The state of a cache layer whose marked keys are the first operand; the pass puts the next step's in its place."""
