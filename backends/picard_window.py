"""A sweep of Picard sampling over a window as one module, for `hasten.build`: no loop, no branch, explicit inputs.

The network on all rows of the window, guidance, the solver's rows, the running correction and how much each state has
changed are one graph; between two sweeps the host reads the changes alone. `picard_engine` runs what is built of it::

    window = PicardWindow(network, example_inputs, window=8, guided=True)
    engine = hasten.build(window, target="aoti:cpu", out="out/window", example_kwargs=window.examples())
    picard_engine(engine, table, x, tolerance=0.1, guidance_scale=3.0, class_labels=…, negative_class_labels=…)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from hasten.backends.manifest import TensorSpec
from hasten.backends.sampling import HISTORY, SAMPLES, SCALES, Sampling, plan_of
from hasten.errors import UsageError
from hasten.passes.solvers import loop, names
from hasten.passes.solvers import picard_window as arithmetic
from hasten.passes.solvers.flow_euler import flow_euler
from hasten.passes.solvers.plan import NEGATIVE

STATES = "states"
FOUND, CHANGES, MOVES = "found", "changes", "moves"


class PicardWindow(nn.Module):
    """``network`` (named tensors in, the prediction or a structure that begins with it out) within a sweep.

    ``example_inputs`` are those of one call of it for the B pictures that are sampled, of its own types; the module's
    are float32 but for the network's conditions. An engine of it serves any solver of one network, without a hook on x0
    and with at most ``history`` latents, and any number of steps, over windows of at most ``window`` rows. ``guided``:
    classifier-free guidance inside, with ``negative_…`` for each condition, or the network's own input of the scale.
    ``noise``: the window can add noise. ``time_scale`` multiplies the times that the network is told. ``sample`` and
    ``time`` name the network's inputs where their names do not tell.

    Inputs, in the order of `examples`: ``states`` (W + 1, K, B, ...), before each row and behind the last; conditions
    (B, ...); ``guidance_scale`` (); ``noise`` (W, B, ...); the table (``solver_…``, see `WindowRows`). Outputs:
    ``found`` (W, K, B, ...), the states behind each row; ``changes`` and ``moves`` (W, B), see
    `passes.solvers.picard_window.changes`. `UsageError` for a network or numbers that do not fit.
    """

    def __init__(
        self,
        network: nn.Module,
        example_inputs: Mapping[str, Tensor],
        *,
        window: int,
        history: int = HISTORY,
        guided: bool = False,
        noise: bool = False,
        time_scale: float = 1.0,
        sample: str | None = None,
        time: str | None = None,
    ) -> None:
        super().__init__()
        for what, number in (("window", window), ("history", history)):
            if number < 1:
                raise UsageError(f"picard: {what}: {number} given; a compiled window holds at least 1")
        self.network, self.window, self.noise, self.time_scale = network, window, noise, time_scale
        # one call for both halves is made of what two calls need: no pictures have to be paired for it
        form = "sequential" if guided and not example_inputs.keys() & set(SCALES) else None
        given = {name: _spec(name, tensor) for name, tensor in example_inputs.items()}
        # what it answers is looked at when the window is traced
        answer = given.get(sample or next((name for name in SAMPLES if name in given), ""))
        told = Sampling(history=history, form=form, sample=sample, time=time)
        made = [answer] if answer is not None else []
        self.plan = plan = plan_of(told, list(given.values()), made, "none", window)
        if plan.time.shape != plan.latents[:1]:
            raise UsageError(
                f"picard: the network's input {plan.time.name!r} has sizes {plan.time.shape}, and the rows of a window "
                "have times of their own; it must take one for each sample"
            )
        for s in (*plan.conditions, *plan.shared):
            if s.name in (STATES, names.NOISE, names.SCALE) or s.name.startswith(loop.PREFIX):
                raise UsageError(f"the network's input {s.name!r} has the name of one of the window's own; rename it")
        self._examples = self._drawn(example_inputs)

    def examples(self) -> dict[str, Tensor]:
        """One value for each input: what `hasten.build` takes as ``example_kwargs``."""
        return dict(self._examples)

    def _drawn(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        generator, plan = torch.Generator().manual_seed(0), self.plan

        def drawn(*sizes: int) -> Tensor:
            return torch.randn(*sizes, *self.plan.latents, generator=generator).to(given[plan.sample.name].device)

        found = {STATES: drawn(self.window + 1, plan.history)}
        for c in plan.conditions:
            found |= {c.name: given[c.name]} | ({NEGATIVE + c.name: given[c.name].roll(1, 0)} if plan.guided else {})
        found |= {s.name: given[s.name] for s in plan.shared}
        if plan.guidance != "none":
            found[names.SCALE] = torch.tensor(2.0)
        if self.noise:
            found[names.NOISE] = drawn(self.window)
        table = arithmetic.padded(flow_euler(self.window), self.window, plan.history)
        rows = arithmetic.rows_from(table, 0, self.window)._asdict()
        if not self.noise:
            del rows["kick"]
        found |= {loop.PREFIX + name: torch.from_numpy(column) for name, column in rows.items()}
        return {name: tensor.to(found[STATES].device) for name, tensor in found.items()}

    def forward(self, **given: Tensor) -> dict[str, Tensor]:
        """One sweep."""
        states = given[STATES]
        if states.dtype != torch.float32:
            raise UsageError(
                f"picard: {STATES!r} is {states.dtype}, and a solver's states are float32; give the network in the "
                "type that it shall have, and no dtype beside"
            )
        rows = arithmetic.WindowRows(*(given.get(loop.PREFIX + name) for name in arithmetic.WindowRows._fields))
        seen = arithmetic.seen_by_network(rows, states)
        predictions = self._predictions(rows.time, seen[:-1], given)
        found = torch.stack(arithmetic.swept(rows, states, predictions, given.get(names.NOISE)))
        changes, moves = arithmetic.changes(rows, states, seen, found)
        return {FOUND: found, CHANGES: changes, MOVES: moves}

    def _predictions(self, time: Tensor, seen: Tensor, given: Mapping[str, Tensor]) -> Tensor:
        """What the network says in each row, guided, (W, B, ...) float32."""
        plan, pictures = self.plan, self.plan.latents[0]

        def together(rows: Tensor) -> Tensor:
            """(W, B, ...) as one batch, twice where the network sees it twice."""
            batch = rows.reshape(-1, *rows.shape[2:])
            return torch.cat([batch, batch]) if plan.guided else batch

        def each(value: Tensor) -> Tensor:
            """(B, ...) once a row, as one batch."""
            return value.expand(self.window, *value.shape).reshape(-1, *value.shape[1:])

        times = (time * self.time_scale)[:, None].expand(self.window, pictures)
        fed = {
            plan.sample.name: together(seen).to(_dtype(plan.sample.dtype)),
            plan.time.name: together(times).to(_dtype(plan.time.dtype)),
        }
        for c in plan.conditions:
            told = each(given[c.name])
            fed[c.name] = torch.cat([told, each(given[NEGATIVE + c.name])]) if plan.guided else told
        fed |= {s.name: given[s.name] for s in plan.shared}
        if plan.scale is not None:
            scale = given[names.SCALE].reshape(1).expand(self.window * pictures)
            fed[plan.scale.name] = scale.to(_dtype(plan.scale.dtype))
        said: Tensor = _pytree.tree_leaves(self.network(**fed))[0].float()
        wanted = fed[plan.sample.name].shape
        if said.shape[1:2] > wanted[1:2]:  # networks that learn the variance return it behind the prediction
            said = said[:, : wanted[1]]
        if said.shape != wanted:
            raise UsageError(
                f"picard: the network was given {tuple(wanted)} and answered {tuple(said.shape)}; it must take any "
                "batch and answer in its shape"
            )
        if plan.guided:
            told, untold = said.split([len(said) // 2] * 2)
            said = loop.guided(told, untold, given[names.SCALE])
        return said.reshape(seen.shape)


def _spec(name: str, tensor: Tensor) -> TensorSpec:
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def _dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found
