"""What a pass makes of a model depends on no device: rewritten on "meta", where nothing is on the CPU, nothing comes to be there."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from graphs import program
from make_decode_table import CASES as STEPS
from make_decode_table import EVICT, SELECT, decoding_step
from spelled_mixers import MIXERS
from test_append_in_place import Step, step_inputs
from test_exit_early import fitted
from test_exit_steps import STEP, step
from test_route_iterations import LAST, Recursive, routers
from tiny import Tiny, inputs
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from zoo import ZOO
from zoo_model import Attn, ZooModel

import dyncc
from dyncc.capture import from_model
from dyncc.decoding import Prefill
from dyncc.ir import Program, aten, emit, op_name, outputs, val
from dyncc.pass_tensors import brought_by, with_tensors
from dyncc.passes import EXACT
from dyncc.pipeline import build
from dyncc.rewrite import Context, apply_pass, graph_text

pytestmark = pytest.mark.usefixtures("no_grad")

META = torch.device("meta")
SCORES = (
    "cls-attention", "last-attention", "last-logits", "last-window-attention", "received-attention", "hidden-norm", "key-norm", "random",
)  # fmt: skip
PRUNING = tuple(f"prune-tokens{{keep=0.5 layers=1 score={score}}}" for score in SCORES)
LEAVING = tuple(f"exit-early{{layers=1 score={score}}}" for score in ("max-prob", "margin", "entropy"))
REALISED = tuple(f"exit-early{{layers=1 score=saturation decay=4.0 realise={way}}}" for way in ("select", "cond", "compact", "static"))
WHOLE = (
    *EXACT, *PRUNING, *LEAVING, *REALISED, "evit{keep=0.5 layers=1}", "prune-tokens{keep=5 layers=1 site=attention sinks=1 fill=zero}",
    "drop-layers{layers=2}", "route-tokens{layers=1 fill=carry score=norm}",
)  # fmt: skip
SOME = (
    "prune-tokens{keep=0.5 layers=1}", "prune-tokens{keep=0.5 layers=1 score=received-attention}",
    "prune-tokens{keep=0.5 layers=1 score=last-window-attention}", "exit-early{layers=1}", "drop-layers{layers=2}",
    "exit-early{layers=1 score=saturation decay=4.0 realise=compact}", "route-tokens{layers=1 fill=carry score=norm}",
)  # fmt: skip
SELECTING = (
    SELECT, "select-kv{budget=4 score=logits share=head sinks=1 recents=1}", "select-kv{budget=4 score=recents sinks=1 recents=0}",
    "select-kv{budget=4 score=bound share=head page=2 sinks=1 recents=1}",
    "select-kv{budget=4 score=mean share=group page=2 sinks=1 recents=1}",
    "select-kv{budget=4 score=middle share=head page=4 branch=2 beam=4 sinks=1 recents=1}",
)  # fmt: skip
EVICTING = (
    EVICT, "evict-kv{budget=4 score=received decay=0.9 recents=1}", "evict-kv{budget=4 score=received temperature=1.0 seed=0 recents=1}",
    "evict-kv{budget=4 score=ahead window=2 pool=3 recents=0}", "evict-kv{budget=4 score=recents sinks=1 recents=0}",
)  # fmt: skip
FUSING = ("fuse-attention", "fuse-gated-attention", "fuse-linear-attention")


@dataclass(frozen=True)
class Captured:
    """A model's program on one device, and where its state ends among the inputs."""

    program: Program
    state: int


def captured(model: nn.Module, call: tuple[Any, ...], sizes: Any = None) -> Captured:
    made, signature = from_model(model, call, dynamic_shapes=sizes)
    return Captured(made, len(signature.state))


def on_meta(model: nn.Module, call: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    return model.to(META), pytree.tree_map_only(Tensor, lambda x: x.to(META), call)


def told(of: Captured, text: str, values: Sequence[Any]) -> tuple[Any, Program, Program]:
    """What a pass says of a program, the dense program and the rewritten one."""
    (passed,) = build(text)
    tensors = brought_by((passed,), of.program)
    dense = with_tensors(of.program, tensors, of.state)
    applied = apply_pass(dense, passed, Context(values=[*values[: of.state], *tensors.values(), *values[of.state :]]))
    reason = re.sub(r"_\d+", "", applied.reason)  # the numbers of nodes
    return (applied.applied, applied.modified, reason, applied.result.found, applied.result.expected), dense, applied.program


def ops_more(dense: Program, made: Program) -> dict[Any, int]:
    """Which ops there are more of, or fewer, than in the dense program, but those that PyTorch leaves out where memory is laid out well."""
    found = Counter(n.target for n in made.graph.nodes if n.op == "call_function")
    found.subtract(n.target for n in dense.graph.nodes if n.op == "call_function")
    return {op: count for op, count in found.items() if count and op not in (aten.contiguous.default, aten.lift_fresh_copy.default)}


def on_cpu(of: Program) -> Iterator[tuple[str, Tensor]]:
    """Tensors on the CPU by the names of their nodes, those of branches among them."""
    for name, module in of.module.named_modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            for leaf in pytree.tree_leaves(node.meta.get("val")):
                if isinstance(leaf, Tensor) and leaf.device.type == "cpu":
                    yield f"{name}/{node.name}", leaf


UNIT = {
    "down.weight": (3, 16), "up.weight": (16, 3), "bias": (16,), "router.weight": (1, 16), "router.bias": (1,), "router.quantiles": (101,),
}  # fmt: skip
"""What stands in for a layer of 16 channels at rank 3, and what chooses its tokens."""


def alike(model: nn.Module, call: tuple[Any, ...], passes: Sequence[str], sizes: Any = None) -> set[str]:
    """The passes of these that apply; each says and does on "meta" what it does on the CPU, and brings no tensor from there."""
    here = captured(model, call, sizes)
    values = [*model.parameters(), *[None] * 1000][: len(here.program.inputs)]
    there = captured(*on_meta(model, call), sizes)
    applied = set()
    for text in passes:
        (words, plain, made), (other, dense, moved) = told(here, text, values), told(there, text, values)
        assert words == other, text
        assert ops_more(plain, made) == ops_more(dense, moved), text
        known = {name for name, tensor in on_cpu(dense) if tensor.dim() == 0}
        assert not {name for name, tensor in on_cpu(moved) if name not in known or tensor.dim()}, text
        applied |= {text} if words[0] else set()
    return applied


TINIES = (
    Tiny(returns="first"), Tiny(returns="all", norm="post", fused=False), Tiny(kind="decoder", returns="last", positions="rope"),
    Tiny(kind="decoder", returns="last", causal="flag"), Tiny(returns="picked"), Tiny(kind="decoder", returns="last", fused=False),
)  # fmt: skip


def test_what_a_function_makes_lies_beside_what_it_gets() -> None:
    """Sizes that vary, constants, numbers, and tensors that are placed by name."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        at = torch.arange(x.shape[1])
        return x * at + torch.ones(x.shape[1]), torch.where(x > 0, x, 2.0), torch.zeros(2, device="cpu")

    for device in ("cpu", "meta"):
        made = program(lambda x: x.exp(), torch.randn(2, 7, device=device), dynamic=({1: torch.export.Dim("length", min=2)},))
        node = outputs(made.graph)[0]
        found = emit(node.next, function, node)
        assert [val(n).device.type for n in found] == [device] * 2 + ["cpu"]
        (arange,) = [n for n in made.graph.nodes if op_name(n) == "arange"]
        assert val(arange).device.type == device and isinstance(val(arange).shape[0], torch.SymInt)


def test_a_verdict_is_of_one_device() -> None:
    texts = [graph_text(program(lambda x: x.exp(), torch.randn(2, 7, device=device)).graph) for device in ("cpu", "meta")]
    assert texts[1].replace(" meta", "") == texts[0] != texts[1]


def test_a_function_of_sizes_alone_makes_tensors_where_the_graphs_inputs_are() -> None:
    made = program(lambda x: x + x.shape[1], torch.randn(2, 7, device=META), dynamic=({1: torch.export.Dim("length", min=2)},))
    (size,) = [n for n in made.graph.nodes if op_name(n) == "sym_size"]
    assert val(emit(size.next, torch.arange, size)).device == META


@pytest.mark.parametrize("passes", ["quick", pytest.param("all", marks=pytest.mark.full)])
def test_a_small_encoder(passes: str) -> None:
    some = ("evit{keep=0.5 layers=1}", "exit-early{layers=1 score=saturation decay=4.0 realise=compact}")
    chosen = some if passes == "quick" else WHOLE
    applied = alike(TINIES[0].build(), inputs(TINIES[0], 4, 11), chosen)
    assert applied >= {*some, *PRUNING, *LEAVING, *REALISED} & {*chosen}


def compare(tiny: Tiny, passes: Sequence[str], device: str) -> None:
    """A rewritten model on a device gives what it gives on the CPU."""
    values = inputs(tiny, 4, 11, True)
    there = tuple(x.to(device) for x in values)
    for text in passes:
        made = dyncc.optimize(tiny.build(), values, passes=text, engine="reference", evidence="numeric")
        moved = dyncc.optimize(tiny.build().to(device), there, passes=text, engine="reference", evidence="numeric")
        assert [(r.applied, r.found, r.reason) for r in made.report.rewrites] == [
            (r.applied, r.found, r.reason) for r in moved.report.rewrites
        ], text
        found = moved(*there)
        assert found.device.type == device and not moved.report.fallback
        torch.testing.assert_close(found.cpu(), made(*values), rtol=1e-3, atol=1e-4, msg=lambda words, text=text: f"{text}: {words}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("tiny", TINIES)
def test_a_gpu_computes_what_the_cpu_does(tiny: Tiny) -> None:
    compare(tiny, WHOLE, "cuda")


@pytest.mark.full
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("tiny", TINIES)
def test_small_models(tiny: Tiny, padded: bool) -> None:
    assert len(alike(tiny.build(), inputs(tiny, 4, 11, padded), WHOLE)) > len(WHOLE) // 3


@pytest.mark.full
def test_sizes_that_vary() -> None:
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=64)
    for padded in (False, True):
        values = inputs(TINIES[2], 4, 11, padded)
        assert alike(TINIES[2].build(), values, WHOLE, tuple({0: batch, 1: length} for _ in values)) > {*LEAVING}


@pytest.mark.full
@pytest.mark.parametrize(("model", "attn"), [pytest.param(m, m.able[i % len(m.able)], id=m.name) for i, m in enumerate(ZOO) if m.able])
def test_the_zoo(model: ZooModel, attn: Attn) -> None:
    """Every model in one form of attention, padded where it takes a mask; the small models above see every pass."""
    assert alike(model.build(attn), model.inputs(padding=model.has_mask), (*EXACT, *SOME))


@pytest.mark.full
@pytest.mark.parametrize(("model", "attn"), [pytest.param(m, a, id=f"{m.name}-{a}") for i, (m, a) in enumerate(STEPS) if i % 4 in (0, 3)])
def test_steps_and_prompts_of_the_zoo(model: ZooModel, attn: Attn) -> None:
    made, call = decoding_step(model, attn)
    applied = alike(made, call, SELECTING) | alike(Prefill(model.build(attn).model, keys=True), model.inputs(padding=True)[:2], EVICTING)
    assert applied or attn == "eager"


def test_a_step_that_appends_to_its_keys() -> None:
    grows = {2: torch.export.Dim.DYNAMIC}
    assert alike(Step(), step_inputs(), ("append-in-place",), ({}, grows, grows))


@pytest.mark.full
def test_steps_that_leave_early() -> None:
    assert alike(STEP.build(), step(), (*LEAVING, *REALISED)) == {*LEAVING, *REALISED}


@pytest.mark.full
@pytest.mark.parametrize(("layer", "form"), list(MIXERS))
def test_mixing_layers(layer: str, form: str) -> None:
    torch.manual_seed(0)
    module, call = MIXERS[layer, form]()
    alike(module.eval(), call, FUSING)


@pytest.mark.full
def test_what_trained_tensors_decide(tmp_path: Path) -> None:
    """Maps and probes of exits, routers of tokens and of iterations."""
    tiny = Tiny(layers=4)
    model, values = tiny.build(), inputs(tiny, 4)
    file, _ = fitted(model, tmp_path / "exits", (1,))
    assert len(alike(model, values, (f"exit-early{{layers=1 score=probe file={file}}}",))) == 1
    recursive, draw = Recursive(LAST), torch.Generator().manual_seed(3)
    file, _ = routers(recursive, tmp_path)
    rules = ("rule=count combine=add", "rule=count", "rule=level combine=add", "rule=level", "rule=threshold")
    texts = [f"route-iterations{{keep=1.0,0.7,0.4 {rule} file={file}}}" for rule in rules]
    assert alike(recursive, inputs(LAST, 3, 12), texts) == {*texts}
    units = {f"unit.{n}.{name}": torch.randn(sizes, generator=draw) for n in range(4) for name, sizes in UNIT.items()}
    file = dyncc.save_parameters(tiny.build(), units, tmp_path / "units")
    fills = ("fill=affine", "fill=carry", "fill=carry weigh=true rate=0.3", "fill=affine rule=threshold capacity=0.5")
    texts = [f"route-tokens{{layers=1 {fill} file={file}}}" for fill in fills]
    assert alike(tiny.with_(returns="all").build(), inputs(tiny, 4, 11, True), texts) == {*texts}
