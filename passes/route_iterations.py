"""route-iterations: of a block that a model runs again and again, each token takes as many iterations as it needs.

    x[t] = block(x)[t]             where t runs this iteration, x[t] elsewhere;           combine=replace
    x[t] = x[t] + s[t] block(x)[t]  with the router's score s = alpha sigmoid(router x);   combine=add

Which run, among those that ran the iteration before: with `rule=count` the `keep` best-scored of each sequence (which ones depends on later
tokens: refused where an autoregressive model answers at all positions); with `rule=threshold` those whose sigmoid(router x) reaches the
threshold; with `rule=level` those whose level, the greatest of N logits of the state in front of the block, says so. The last two look at
nothing but the token itself; the first `keep` of a sequence run at most. With `rule=level combine=add` a token adds its last state once,
weighed by its level's share of the softmax. The block's iterations are found by the weights that they read again.

Keys are the model's own: where each iteration makes them anew, those of the tokens that run are read (recursion-wise caching); where later
iterations read the first one's, all are (recursive sharing). Decided in prompts; steps of one token are refused. Lossy.
Bae et al., Mixture-of-Recursions: Learning Dynamic Recursive Depths for Adaptive Token-Level Computation, 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from dyncc.analysis.facts import Facts
from dyncc.errors import BadOptionValue, BadParameterFile
from dyncc.fitted import Parameters, load_fitted
from dyncc.ir import Program, emit, shape
from dyncc.kernels.route_rows import router_scores
from dyncc.options import Keep, check_keep, settle
from dyncc.pass_tensors import brought, check_belongs
from dyncc.passes.autoregressive import refuse_looking_ahead
from dyncc.passes.iteration_rows import Chosen, best_rows, run_iteration, wanted_rows
from dyncc.passes.iterations import Iteration, find_iterations
from dyncc.passes.one_stack import one_stack
from dyncc.passes.padding import padding_input, real_rows
from dyncc.restrict import Refusal
from dyncc.rewrite import Context, Pass, PassResult


@dataclass(frozen=True)
class RouteIterations(Pass):
    """Run later iterations for the tokens that need them. `keep`: one value for all iterations behind the first, or one for each."""

    name: ClassVar[str] = "route-iterations"
    summary: ClassVar[str] = "tokens leave a block that is run again and again after as many iterations as they need"
    exact: ClassVar[bool] = False

    keep: Keep = 1.0
    rule: Literal["count", "level", "threshold"] = "count"
    threshold: float = 0.5
    combine: Literal["replace", "add"] = "replace"
    alpha: float = 1.0
    file: str | None = None

    def __post_init__(self) -> None:
        settle(self)
        check_keep(self.keep)
        if self.threshold < 0.0:
            raise BadOptionValue(option="threshold", value=str(self.threshold), problem="a probability; above 1 no token runs again")

    def _given(self) -> Parameters:
        if self.file is None:
            problem = "it takes the routers of the iterations, which dyncc.save_parameters writes; dyncc does not train them"
            raise BadOptionValue(option="file", value="none", problem=problem)
        return load_fitted(self.file)

    def tensors(self) -> Mapping[str, Tensor]:
        """Every router of the file."""
        found = self._given()
        return found.of(sorted(n for n in found.held.tensors if n.startswith("iteration.")))

    def run(self, program: Program, facts: Facts, context: Context) -> PassResult:
        """Say which tokens run each iteration, from the first on; then shorten the iterations, from the last on."""
        stack = one_stack(program, facts)
        if not stack.axis:
            raise Refusal("a step of one token has no tokens to choose from; route prompts")
        if stack.dim != 1:
            raise Refusal("the token axis is not dimension 1 of the residual stream")
        iterations = find_iterations(program, stack)
        keeps = self._keeps(len(iterations))
        check_belongs(self._given(), program, context.values, int(shape(stack.layers[0].start)[-1]))
        if self.rule == "count":
            refuse_looking_ahead(program, facts, stack)
        padding = padding_input([x.attention for x in stack.layers], facts.axes, stack.axis, stack.batch)
        chosen, weight = self._choose(program, iterations, keeps, padding)
        last = max(chosen, default=-1)
        for iteration in reversed(iterations):
            if iteration.number in chosen:
                behind = (iterations[0].before, weight) if weight is not None and iteration.number == last else None
                run_iteration(program, stack, iteration, chosen[iteration.number], behind)
        reason = "" if chosen else "every token runs every iteration: nothing to leave out"
        return PassResult(len(chosen), len(iterations), reason=reason)

    def _keeps(self, count: int) -> tuple[int | float, ...]:
        """The most that run each iteration."""
        each = self.keep if isinstance(self.keep, tuple) else (1.0, *[self.keep] * (count - 1))
        if len(each) != count:
            raise Refusal(f"keep names {len(each)} iterations, the model has {count}; give one for each, or one for all behind the first")
        return each

    def _choose(
        self, program: Program, iterations: tuple[Iteration, ...], keeps: tuple[int | float, ...], padding: fx.Node | None
    ) -> tuple[dict[int, Chosen], fx.Node | None]:
        """Which rows run the iterations that not all of them run, and what levels weigh [B, T]."""
        at = iterations[0].before
        real = alive = None if padding is None else real_rows(at.next, padding, at)
        level, weight = self._levels(program, iterations) if self.rule == "level" else (None, None)
        chosen: dict[int, Chosen] = {}
        for iteration, keep in zip(iterations, keeps, strict=True):
            number, before = iteration.number, _behind(iteration.before, alive, level)
            adds = self.combine == "add" and self.rule != "level"
            if not adds and ((self.rule == "count" and keep == 1.0) or (number == 0 and keep == 1.0)):
                continue
            score = self._score(program, iteration, before) if self.rule != "level" else None
            if self.rule == "count":
                made = best_rows(before, score, real, alive, keep)
            elif level is not None:
                made = wanted_rows(before, emit(before, lambda n, number=number: n >= number, level), alive, keep)
            else:
                sure = emit(before, lambda s, least=self.threshold if number else 0.0: torch.sigmoid(s) >= least, score)
                made = wanted_rows(before, sure, alive, keep)
            share = emit(before, lambda s, i: self.alpha * torch.sigmoid(s.gather(1, i)), score, made.index) if adds else None
            chosen[number], alive = Chosen(made.index, made.valid, made.alive, share), made.alive
        return chosen, weight if self.combine == "add" else None

    def _score(self, program: Program, iteration: Iteration, before: fx.Node) -> fx.Node:
        """[B, T], of the state that the iteration before gave."""
        parts = [self._brought(program, f"iteration.{iteration.number}.router.{part}") for part in ("weight", "bias")]
        score: fx.Node = emit(before, lambda x, w, b: router_scores(x, w, b, False), iteration.before, *parts)
        return score

    def _levels(self, program: Program, iterations: tuple[Iteration, ...]) -> tuple[fx.Node, fx.Node]:
        """The last iteration [B, T] of each token, and alpha times that level's share of the softmax."""
        found, count = self._given(), len(iterations)
        if (held := len(found.take("iteration.levels.weight"))) != count:
            raise BadParameterFile(path=found.path, problem=f"its levels are {held}, the model has {count} iterations")
        weight, bias = (self._brought(program, f"iteration.levels.{part}") for part in ("weight", "bias"))

        def levels(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            share = torch.softmax(torch.nn.functional.linear(x.float(), weight.float(), bias.float()), -1)
            return share.argmax(-1), self.alpha * share.amax(-1)

        state = iterations[0].before
        level, share = emit(state.next, levels, state, weight, bias)
        return level, share

    def _brought(self, program: Program, name: str) -> fx.Node:
        found = self._given()
        found.take(name)
        return brought(program, found.mark(name))


def _behind(state: fx.Node, *others: fx.Node | None) -> fx.Node:
    """The first node behind a state and what was computed for it."""
    order = {n: i for i, n in enumerate(state.graph.nodes)}
    made: Any = max([state, *[n for n in others if n is not None]], key=lambda n: order[n])
    return made.next  # type: ignore[no-any-return]
