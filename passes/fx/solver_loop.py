"""A denoiser inside ``torch.while_loop`` over the rows of a sampler's table: latents in, latents out, one graph.

The operator itself is called, with everything that its body reads handed to it: `torch.while_loop` would have Dynamo
trace the body first, which gives up at a conditional in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hasten.passes.fx import solver_row
from hasten.passes.solvers import loop, names
from hasten.passes.solvers.plan import NEGATIVE, LoopPlan, Shaped


class SolverLoop(nn.Module):
    """Inputs and outputs are those of `passes.solvers.names`, positional.

    ``denoiser`` maps tensors to a tuple of tensors; ``reads`` and ``writes`` name them. ``kept`` is the step cache's
    state in it, and ``controls`` its numbers.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        plan: LoopPlan,
        reads: Sequence[str],
        writes: Sequence[str],
        kept: Sequence[Shaped] = (),
        controls: Sequence[Shaped] = (),
    ) -> None:
        super().__init__()
        self.denoiser, self.plan, self.reads, self.writes = denoiser, plan, tuple(reads), tuple(writes)
        self.kept = tuple(s.name for s in kept)
        self.inputs = names.inputs(plan, kept, controls)
        given = [s.name for s in self.inputs]
        caches = [s.name for s in names.carried_cache(plan, kept)]
        self.carried = [names.STATE, *(n for n in (names.DECISIONS,) if n in given), *caches]
        self.outputs = names.outputs(plan, {s.name: s for s in self.inputs}, self.carried)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Do the rows from ``first`` to ``stop``."""
        given = dict(zip((s.name for s in self.inputs), tensors, strict=True))
        given |= self._network_inputs(given)
        held = [given.pop(name) for name in self.carried]
        first = given.pop(names.FIRST)
        weights = {f"weight/{name}": t for name, t in self.denoiser.state_dict(keep_vars=True).items()}
        read, carried = (*given, *weights), 2 + len(held)

        def going(index: Tensor, *others: Tensor) -> Tensor:
            return index < dict(zip(read, others[carried - 1 :], strict=True))[names.STOP]

        def row(index: Tensor, shown: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
            own = dict(zip(self.carried, others, strict=False))
            outer = dict(zip(read, others[carried - 2 :], strict=True))
            inner = {name.removeprefix("weight/"): outer[name] for name in weights}
            following, preview = self._row(outer, partial(functional_call, self.denoiser, inner), index, own, shown)
            return index + 1, preview, *(following[name] for name in self.carried)

        # shown before a row has said anything of the clean sample
        latents = held[0][0].clone()
        _, preview, *end = torch.ops.higher_order.while_loop(
            going, row, (first, latents, *held), (*given.values(), *weights.values())
        )
        # a loop without rows would return its inputs' own memory
        result = solver_row.finished(given[loop.PREFIX + "output"], end[0], self._painting(given))
        return result.clone(), preview.clone(), *(tensor.clone() for tensor in end)

    def _painting(self, given: dict[str, Tensor]) -> solver_row.Painting | None:
        return (given[names.MASK], given[names.KNOWN], given[names.KNOWN_NOISE]) if self.plan.inpaint else None

    def _network_inputs(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        """What stays the same from row to row, as the network takes it."""
        plan, found = self.plan, {}
        for c in plan.conditions if plan.doubled else ():
            found["both_" + c.name] = torch.cat([given[c.name], given[NEGATIVE + c.name]])
        if plan.scale is not None:
            found[plan.scale.name] = solver_row.spread(given[names.SCALE], given[names.STATE], plan.scale.dtype)
        return found

    def _row(
        self,
        given: dict[str, Tensor],
        network: Callable[[tuple[Tensor, ...]], Sequence[Tensor]],
        index: Tensor,
        held: dict[str, Tensor],
        shown: Tensor,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """One row, with ``network`` for the denoiser: what is carried to the next, and the preview."""
        plan, following, predictions, made = self.plan, dict(held), list[Tensor](), dict[str, Tensor]()
        rows = loop.Rows(*(given.get(loop.PREFIX + name) for name in loop.Rows._fields))
        row = solver_row.before(plan, rows, index, held[names.STATE], self._painting(given))
        *picked, seen, sample, time, which, beside = row
        for number, branch in enumerate(names.BRANCHES[: plan.calls]):
            fed = {**given, plan.sample.name: sample, plan.time.name: time, names.CACHE + "step": index}
            for c in plan.conditions:
                fed[c.name] = given[("both_" if plan.doubled else NEGATIVE if number else "") + c.name]
            fed |= {s.name: t for s, t in ((plan.which, which), (plan.beside, beside)) if s is not None}
            fed |= {name: held[name + branch] for name in self.kept}
            if names.FORCED in given:
                fed[names.CACHE + "force"] = given[names.FORCED].index_select(0, index.reshape(1))[0]
            if number and plan.follow:
                fed[names.CACHE + "force"] = made[names.CACHE + "computed"].to(torch.int64)
            returned = network(tuple(fed[name] for name in self.reads))
            made = dict(zip(self.writes, returned, strict=True))
            predictions.append(made[self.writes[0]])
            following |= {name + branch: made[names.NEXT + name] for name in self.kept if names.NEXT + name in made}
            if names.DECISIONS in held and not number:
                computed = made[names.CACHE + "computed"]
                following[names.DECISIONS] = solver_row.noted(plan, held[names.DECISIONS], computed, index)
        state, preview = solver_row.after(
            plan,
            loop.Row(*picked),
            held[names.STATE],
            seen,
            predictions,
            given.get(names.SCALE) if plan.guided else None,
            given.get(names.RESCALE),
            solver_row.noise_of(plan, given.get(names.NOISE, given.get(names.SEED)), index, seen),
            shown,
            [given[name] for name in names.HOOKS[plan.hook]],
        )
        following[names.STATE] = state
        # a loop's body must return memory of its own, laid out as what it was given
        own = {name: t.clone(memory_format=torch.contiguous_format) for name, t in following.items()}
        return own, preview.clone(memory_format=torch.contiguous_format)
