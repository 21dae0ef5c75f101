"""Trained weights that some evictions need: safetensors files that name the model they were trained for.

`save_lookahead` writes what the recipe `lookaheadkv` takes (LookaheadKV, Ahn et al., ICLR 2026), `save_gates` what `trim-kv` takes
(TRIM-KV, Bui et al., 2025), `save_attention_gates` what `attention-gate` takes (Attention-Gate, Zeng et al., 2024). The training is not
dyncc's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from dyncc.errors import BadWeightFile, BadWeights, OutputNotWritable
from dyncc.stamped_file import Stamped, digest, read_stamped, write_stamped

LOOKAHEAD, GATES, ATTENTION_GATES = "dyncc lookahead rows 1", "dyncc retention gates 1", "dyncc attention gates 1"
ATTENTION_GATE = ("q", "k", "v", "outer", "bias")
Activation = Literal["silu", "gelu", "relu"]


@dataclass(frozen=True, eq=False)
class Lookahead:
    """`rows` [P, C] in place of embeddings; `adapters`: by the digest of a linear layer's weight [out, in] its `down` [r, in] and
    `up` [out, r], whose product times `scale` is added to it for those rows alone."""

    rows: Tensor
    adapters: Mapping[str, tuple[Tensor, Tensor]]
    scale: float
    model: Stamped
    path: Path

    def of_layer(self, number: int) -> list[Tensor]:
        """What the cache hands to the graph at its layer `number`: everything at the first."""
        return [] if number else [self.rows, *(t for pair in self.adapters.values() for t in pair)]


@dataclass(frozen=True, eq=False)
class Gates:
    """A gate for each attention: tensors of which the first has the width C of what keys are made from, and the last is a bias [G]."""

    gates: Sequence[tuple[Tensor, ...]]
    model: Stamped
    path: Path

    def of_layer(self, number: int) -> list[Tensor]:
        """What the cache hands to the graph at its layer `number`."""
        return list(self.gates[number]) if number < len(self.gates) else []


@dataclass(frozen=True, eq=False)
class FadingGates(Gates):
    """`inner` [R, C], `outer` [G, R], `bias` [G]; log(beta) = logsigmoid(outer act(inner x) + bias)."""

    activation: Activation


@dataclass(frozen=True, eq=False)
class AttentionGates(Gates):
    """`q`, `k`, `v` [R, C], `outer` [G, R], `bias` [G]: sigmoid(outer attention(q x, k x, v x) + bias), the attention of `heads` heads."""

    heads: int


def save_lookahead(
    model: nn.Module, rows: Tensor, path: str | Path, adapters: Mapping[str, tuple[Tensor, Tensor]] | None = None, scale: float = 1.0
) -> Path:
    """Write the file that `evict-kv{score=ahead file=...}` and the recipe `lookaheadkv` take; returns its path.

    Args:
        model: the model that the weights were trained for, in the precision it will run in.
        rows: [P, C], embeddings of the rows that stand behind a prompt.
        adapters: by names of linear layers, such as "model.layers.0.mlp.up_proj": `down` [r, in] and `up` [out, r].
        scale: what adapters are multiplied by, alpha / r.
    Raises:
        BadWeights: a name or a size does not fit the model.
        OutputNotWritable: the file cannot be written.
    """
    if rows.dim() != 2 or not rows.is_floating_point():
        raise BadWeights(problem=f"rows are {rows.dtype}{list(rows.shape)}; embeddings [rows, width] are wanted")
    modules, tensors, digests = dict(model.named_modules()), {"rows": rows}, list[str]()
    for number, (name, (down, up)) in enumerate((adapters or {}).items()):
        weight = getattr(modules.get(name), "weight", None)
        if not isinstance(modules.get(name), nn.Linear) or weight is None:
            raise BadWeights(problem=f"the model has no linear layer named {name!r}")
        if down.dim() != 2 or up.dim() != 2 or (up.shape[0], down.shape[1]) != tuple(weight.shape) or up.shape[1] != down.shape[0]:
            sizes = f"{list(up.shape)} times {list(down.shape)}"
            raise BadWeights(problem=f"the adapter of {name} is {sizes}, which does not add to its weight {list(weight.shape)}")
        digests.append(digest(weight))
        tensors |= {f"down.{number}": down, f"up.{number}": up}
    if len(set(digests)) < len(digests):
        raise BadWeights(problem="two of the layers have the same weight, so their adapters cannot be told apart")
    return _write(model, path, LOOKAHEAD, tensors, {"weights": digests, "scale": scale})


def save_gates(
    model: nn.Module, gates: Sequence[tuple[Tensor, Tensor, Tensor]], path: str | Path, activation: Activation = "silu"
) -> Path:
    """Write the file that `evict-kv{score=fade file=...}` and the recipe `trim-kv` take; returns its path.

    Args:
        model: the model that the gates were trained for, in the precision it will run in.
        gates: for each attention in order `inner` [R, C], `outer` [G, R] and `bias` [G], C the width of what its keys are made from and
            G its key heads.
        activation: what stands between the two layers of a gate.
    Raises:
        BadWeights: the sizes of a gate do not fit each other.
        OutputNotWritable: the file cannot be written.
    """
    tensors = dict[str, Tensor]()
    for number, (inner, outer, bias) in enumerate(gates):
        if inner.dim() != 2 or outer.dim() != 2 or outer.shape[1] != inner.shape[0] or bias.shape != outer.shape[:1]:
            sizes = f"{list(inner.shape)}, {list(outer.shape)} and {list(bias.shape)}"
            raise BadWeights(problem=f"gate {number} is {sizes}; [rank, width], [key heads, rank] and [key heads] are wanted")
        tensors |= {f"inner.{number}": inner, f"outer.{number}": outer, f"bias.{number}": bias}
    if not tensors:
        raise BadWeights(problem="no gate is given")
    return _write(model, path, GATES, tensors, {"activation": activation, "gates": len(gates)})


def save_attention_gates(model: nn.Module, gates: Sequence[tuple[Tensor, ...]], path: str | Path, heads: int = 1) -> Path:
    """Write the file that `evict-kv{score=gate file=...}` and the recipe `attention-gate` take; returns its path.

    Args:
        model: the model that the gates were trained for, in the precision it will run in.
        gates: for each attention in order `q`, `k` and `v` [R, C], `outer` [G, R] and `bias` [G], C the width of what its keys are made
            from and G its key heads.
        heads: into how many heads a gate's own attention splits R.
    Raises:
        BadWeights: the sizes of a gate do not fit each other.
        OutputNotWritable: the file cannot be written.
    """
    tensors = dict[str, Tensor]()
    for number, gate in enumerate(gates):
        sizes = [tuple(t.shape) for t in gate]
        rank = sizes[0][0] if sizes and len(sizes[0]) == 2 else 0
        key_heads = sizes[-1][0] if sizes and len(sizes[-1]) == 1 else 0
        if sizes != [*sizes[:1] * 3, (key_heads, rank), (key_heads,)] or heads < 1 or rank % heads:
            wanted = "three of [rank, width], [key heads, rank] and [key heads] are wanted, the rank a multiple of the heads"
            raise BadWeights(problem=f"gate {number} is {', '.join(str(list(s)) for s in sizes)} in {heads} heads; {wanted}")
        tensors |= {f"{part}.{number}": tensor for part, tensor in zip(ATTENTION_GATE, gate, strict=True)}
    if not tensors:
        raise BadWeights(problem="no gate is given")
    return _write(model, path, ATTENTION_GATES, tensors, {"heads": heads, "gates": len(gates)})


def load_lookahead(path: Path) -> Lookahead:
    """The rows and adapters in a file.

    Raises:
        BadWeightFile: there is no such file, or it is damaged, or is something else.
    """
    found = _read(path, LOOKAHEAD, "lookahead rows", "dyncc.save_lookahead")
    pairs = [(found.tensors[f"down.{i}"], found.tensors[f"up.{i}"]) for i in range(len(found.told["weights"]))]
    return Lookahead(found.tensors["rows"], dict(zip(found.told["weights"], pairs, strict=True)), found.told["scale"], found, path)


def load_gates(path: Path) -> FadingGates:
    """The gates in a file.

    Raises:
        BadWeightFile: there is no such file, or it is damaged, or is something else.
    """
    found = _read(path, GATES, "retention gates", "dyncc.save_gates")
    return FadingGates(_gates(found, ("inner", "outer", "bias")), found, path, found.told["activation"])


def load_attention_gates(path: Path) -> AttentionGates:
    """The gates in a file.

    Raises:
        BadWeightFile: there is no such file, or it is damaged, or is something else.
    """
    found = _read(path, ATTENTION_GATES, "attention gates", "dyncc.save_attention_gates")
    return AttentionGates(_gates(found, ATTENTION_GATE), found, path, found.told["heads"])


def _gates(found: Stamped, parts: Sequence[str]) -> list[tuple[Tensor, ...]]:
    return [tuple(found.tensors[f"{part}.{number}"] for part in parts) for number in range(found.told["gates"])]


def _write(model: nn.Module, path: str | Path, form: str, tensors: Mapping[str, Tensor], told: dict[str, Any]) -> Path:
    kept = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    try:
        write_stamped(Path(path), form, Stamped(kept, told, frozenset(digest(p) for p in model.parameters())))
    except OSError as error:
        raise OutputNotWritable(path=path, problem=error) from error
    return Path(path)


def _read(path: Path, form: str, what: str, writer: str) -> Stamped:
    try:
        return read_stamped(path, form, what)
    except ValueError as error:
        raise BadWeightFile(path=path, problem=error, writer=writer) from error
