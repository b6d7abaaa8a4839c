"""Run an engine that holds a whole sampler: noise and conditions in, latents out, with no Python between its steps.

The call has the shape of a diffusers pipeline's. The table of any solver is made on the host and given to the engine,
which was built for none in particular.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.backends import sampler_inputs as read
from hasten.backends.decoder import NAME as DECODER
from hasten.backends.engine import Engine, load
from hasten.backends.sampler_run import Chunk, Draw, Sampled, SamplerRun, whole
from hasten.backends.sampler_sizes import sized, sizes_of
from hasten.errors import UsageError, nearest
from hasten.passes.solvers import from_config, loop, names
from hasten.passes.solvers.hooks import Clip, Threshold
from hasten.passes.solvers.plan import NEGATIVE
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.seeds import of_run
from hasten.passes.solvers.start import begun, seen
from hasten.passes.solvers.table import SolverTable

if TYPE_CHECKING:
    import torch

    from hasten.passes.solvers.catalog import Request

UNGUIDED = 1.0


def sampler(engine: Engine | str | os.PathLike[str]) -> Sampler:
    """The sampler in ``engine``, or in the one in that directory; `UsageError` for one that was built without."""
    if isinstance(engine, (str, os.PathLike)):
        engine = load(engine)
    if not isinstance(engine, Engine):
        raise UsageError(f"sampler: {type(engine).__name__} given; give an engine (hasten.load) or its directory")
    return Sampler(engine)


class Sampler:
    """Call it with the network's conditions by name, and ``negative_…`` of each where it is guided.

    ``engine`` must come of a build with `Sampling`. Everything may change from call to call but the sizes: solver,
    steps, scale, start.
    """

    def __init__(self, engine: Engine) -> None:
        if engine.manifest.loop is None:
            raise UsageError(
                f"engine {engine.path.name!r} holds no sampler; build it with one (hasten build … --solver NAME)"
            )
        self.engine = engine
        self.loop: Mapping[str, Any] = engine.manifest.loop
        self.process = Process.of(self.loop["process"])
        self._inputs = {t.name: t for t in engine.inputs}
        self._interrupt = False

    @property
    def latents_shape(self) -> tuple[Any, ...]:
        """(B, ...): how many pictures a call makes, and the sizes of each; a name where the engine takes a range."""
        return tuple(self.loop["latents"])

    def table(self, solver: str | None = None, steps: int | None = None) -> SolverTable:
        """The table of a solver of the catalog, the engine's own unless named."""
        return self._request(solver).build(self.process, self._steps(steps))

    def _request(self, solver: Any) -> Request:
        if solver is not None and not isinstance(solver, str):
            raise UsageError(f"solver: {solver!r} is neither a solver's name nor a SolverTable; give 'unipc', for one")
        text = self.loop["solver"] if solver is None else solver
        return from_config.requested(text, self.loop["process"], self.process)

    def _steps(self, steps: Any) -> int:
        return int(self.loop["steps"]) if steps is None else read.whole("num_inference_steps", steps)

    def __call__(
        self,
        *,
        chunk: int | None = None,
        callback: Callable[[Chunk], object] | None = None,
        callback_on_step_end: Callable[[Any, int, float, dict[str, Any]], object] | None = None,
        decode: bool | None = None,
        **options: Any,
    ) -> Sampled:
        """Sample; ``options`` are those of `begin`.

        An engine with a decoder decodes once, behind the last row, unless ``decode`` is False; a callback may `decode`
        what it is shown.

        ``callback`` sees a `Chunk` after every ``chunk`` rows, of all rows together where it is None; what it raises
        ends the run. ``callback_on_step_end(sampler, row, time, {"latents": …})`` is diffusers', after every ``chunk``
        rows or every row: ``time`` is what the network was told in ``row``. The latents are to be looked at: the
        solver's state is more than they are, and `UsageError` says so where others come back. Where either sets
        ``sampler._interrupt = True``, as a diffusers pipeline's, the run ends there and returns what it has.
        """
        if decode:
            self._decoder()  # refuses before anything runs
        for what, called in (("callback", callback), ("callback_on_step_end", callback_on_step_end)):
            if called is not None and not callable(called):
                raise UsageError(f"{what}: {called!r} cannot be called; give a function")
        if callback_on_step_end is not None:
            chunk = 1 if chunk is None else chunk
        chunk = None if chunk is None else read.whole("chunk", chunk)
        run = self.begin(**options)
        self._interrupt = False
        while True:
            done = run.advance(chunk or run.rows)
            if callback is not None:
                callback(done)
            if callback_on_step_end is not None:
                given = {"latents": done.latents}
                returned = callback_on_step_end(self, done.done - 1, run.time(done.done - 1), given)
                if isinstance(returned, Mapping) and returned.get("latents") is not done.latents:
                    raise UsageError(
                        "callback_on_step_end returned other latents, and an engine keeps the solver's own state; "
                        "return those that it was given, or sample step by step with hasten.Scheduler"
                    )
            if run.done == run.rows or self._interrupt:
                has = self.loop.get(DECODER) is not None and decode is not False
                pixels = self.decode(done.latents) if has else None
                return Sampled(done.latents, done.preview, run.decisions, pixels)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels, float32, of latents or of a preview (B, ...), by the decoder in the engine.

        `UsageError` for an engine without one.
        """
        decoder = self._decoder()  # of fixed sizes
        given = read.fits("latents", read.tensor("latents", latents), tuple(self.loop["latents"]))
        made: torch.Tensor = decoder(latents=given.to(self.engine.target.device))["pixels"]
        return made

    def _decoder(self) -> Engine:
        if self.loop.get(DECODER) is None:
            raise UsageError(
                f"engine {self.engine.path.name!r} has no decoder; build it with one (hasten build … --decoder DIR)"
            )
        return self.engine.program(DECODER)

    def begin(
        self,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        solver: str | SolverTable | None = None,
        seed: int | Sequence[int] | None = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        noise: Sequence[torch.Tensor] | None = None,
        image: torch.Tensor | None = None,
        strength: float = 1.0,
        mask_image: torch.Tensor | None = None,
        mask: str | Sequence[int] | None = None,
        threshold: float | None = None,
        limit: int | None = None,
        **conditions: torch.Tensor,
    ) -> SamplerRun:
        """Begin a run, of which `SamplerRun.advance` does as many rows at a time as it is told.

        ``latents`` (B, ...) is unit noise, else drawn with ``generator`` (one, or one a picture), else with ``seed``:
        picture i's then depends on the seed and i alone. A list holds one seed a picture, each as if it were alone;
        None takes any. ``noise`` holds one unit-noise tensor for each row that adds noise, else it is drawn alike, or
        made in the engine. ``image`` (B, ...) are latents to start from with the last ``strength`` of the steps, where
        solvers that remember earlier values start anew; with ``mask_image`` (B, 1, ...), from 0 to 1, they are kept
        where it is 0. ``mask``, ``threshold`` and ``limit`` are the step cache's, as for `Engine.start`; from a picture
        it counts from the first row that is done, and schedules and ``mask`` say of each row what they say of it in a
        whole run. Tensors may be arrays or lists. Raises `UsageError` for what does not fit the engine.
        """
        import torch

        conditions = self._conditions(conditions)
        latents, image, mask_image = (
            None if value is None else read.tensor(name, value)
            for name, value in (("latents", latents), ("image", image), ("mask_image", mask_image))
        )
        seed, generator = read.seeds(seed), read.generators(generator)
        if isinstance(solver, SolverTable):
            table, anew, steps = solver, None, None
        else:
            request, steps = self._request(solver), self._steps(num_inference_steps)
            table = request.build(self.process, steps)

            def anew(row: int) -> SolverTable:
                return request.build(self.process, steps, first=row)

        start = None
        if image is not None and (mask_image is None or strength != 1):
            start = begun(table, self.process, read.number("strength", strength, 0, 1), anew, steps)
        elif image is None and (strength != 1 or mask_image is not None):
            raise UsageError("strength and mask_image say how much of an image is made anew; give the image")
        first, table = (0, table) if start is None else (start.row, start.table)
        rows = loop.padded(
            table,
            self.loop["rows"],
            self.loop["history"],
            time_scale=self.loop["time_scale"],
            levels=seen(table, self.process),
            networks=self.loop.get("networks", 1),
            conditioned=self.loop.get("beside", False),
            hook=self.loop.get("hook", "none"),
        )
        given = conditions | self._guidance(guidance_scale, guidance_rescale)
        for name, column in rows._asdict().items():
            if loop.PREFIX + name in self._inputs:
                given[loop.PREFIX + name] = torch.from_numpy(column)
        sizes = self._sizes({**conditions, "latents": latents, "image": image, "mask_image": mask_image}, generator)
        shape = sized(self.latents_shape, sizes, "what is made")
        draw = Draw(shape, seed, generator)
        unit = draw() if latents is None else read.fits("latents", latents, shape)
        state = unit * table.init
        if start is not None and image is not None:
            picture = read.fits("image", image, shape)
            state = (start.signal * picture + start.noise * unit) * start.scale
        given |= (
            self._noise(table, noise, seed, draw, shape) | self._painting(mask_image, image, unit) | self._hook(table)
        )
        others = (torch.zeros_like(state) for _ in range(self.loop["history"] - 1))
        held = {names.STATE: torch.stack([state, *others])}
        held |= self._cache(len(table), mask, threshold, limit, given, sizes, first)
        return SamplerRun(self.engine, first + len(table), first, held, given, self._idle(mask, threshold))

    def _sizes(self, given: Mapping[str, torch.Tensor | None], generator: Any) -> dict[str, int]:
        specs = {"image": self.latents_shape, **{name: t.shape for name, t in self._inputs.items()}}
        many = len(generator) if isinstance(generator, Sequence) else None
        return sizes_of({**specs, "latents": self.latents_shape}, given, many)

    def _conditions(self, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        wanted = [*self.loop["conditions"], *self.loop["shared"]]
        if self.loop["guidance"] in ("batched", "sequential"):
            wanted += [NEGATIVE + name for name in self.loop["conditions"]]
        for name in given:
            if name not in wanted:
                raise UsageError(
                    f"the sampler takes no {name!r}; it takes {', '.join(wanted) or 'no conditions'}."
                    f"{nearest(name, wanted)}"
                )
        for name in wanted:
            if name in given:
                continue
            if name.startswith(NEGATIVE):
                raise UsageError(
                    f"guidance needs {name!r}, what the network is told for no condition; give it, or use an engine "
                    "that was built without guidance"
                )
            raise UsageError(f"{name!r} is missing; the sampler takes {', '.join(wanted)}")
        told = read.tensors(given)
        counts = self.loop.get("classes") or {}
        read.classes(told, {p + name: n for name, n in counts.items() for p in ("", NEGATIVE)})
        return told

    def _guidance(self, scale: float | None, rescale: float) -> dict[str, torch.Tensor]:
        import torch

        form, found = self.loop["guidance"], {}
        scale = None if scale is None else read.number("guidance_scale", scale, 0)
        rescale = read.number("guidance_rescale", rescale, 0, 1)
        if form == "none" and scale not in (None, UNGUIDED):
            raise UsageError(
                f"guidance_scale {scale:g} was given to an engine without guidance; build it with --guidance {scale:g}"
            )
        if rescale and not self.loop["rescale"]:
            raise UsageError("guidance_rescale was given to an engine without it; build it with --rescale")
        if form != "none":
            found[names.SCALE] = torch.tensor(self.loop["scale"] if scale is None else scale)
        if self.loop["rescale"]:
            found[names.RESCALE] = torch.tensor(rescale)
        return found

    def _noise(
        self,
        table: SolverTable,
        noise: Sequence[torch.Tensor] | None,
        seed: int | tuple[int, ...],
        draw: Draw,
        shape: tuple[int, ...],
    ) -> dict[str, torch.Tensor]:
        import torch

        kind, noisy = self.loop["noise"], table.noisy
        if kind == "none" and noisy:
            raise UsageError(
                f"the solver adds noise in {len(noisy)} of {len(table)} rows, and the engine was built for solvers "
                "that add none; build it with --noise seed or --noise input"
            )
        if noise is not None and kind != "input":
            raise UsageError(f"noise was given to an engine whose noise is {kind!r}; build it with --noise input")
        if kind == "seed":
            if noisy and not isinstance(seed, int):
                raise UsageError(
                    f"seed: {len(seed)} given, and the loop makes the noise of all pictures from one; give one, or "
                    "build the engine with --noise input"
                )
            return {names.SEED: whole(of_run(seed) if isinstance(seed, int) else 0, "cpu")}
        if kind == "none":
            return {}
        if noise is not None and len(noise) != len(noisy):
            raise UsageError(
                f"the solver adds noise in {len(noisy)} of {len(table)} rows; {len(noise)} noise tensors were given"
            )
        stacked = torch.zeros((self.loop["rows"], *shape))
        for number, row in enumerate(noisy):
            stacked[row] = draw() if noise is None else read.fits("noise", read.tensor("noise", noise[number]), shape)
        return {names.NOISE: stacked}

    def _hook(self, table: SolverTable) -> dict[str, torch.Tensor]:
        """The numbers of the engine's hook on x0; any, where the solver leaves it as it is."""
        import torch

        hook, kind = table.hook, self.loop.get("hook", "none")
        if isinstance(hook, Threshold) and hook.ratio < self.loop["ratio"]:
            raise UsageError(
                f"the solver thresholds at the quantile {hook.ratio:g}, and the engine finds none below "
                f"{self.loop['ratio']:g}; build it for that (--solver NAME:threshold={hook.ratio:g})"
            )
        if kind == "none":
            return {}
        if kind == "clip":
            return {names.CLIP: torch.tensor(hook.limit if isinstance(hook, Clip) else 1.0)}
        most = float(np.finfo(np.float32).max)  # an engine takes no infinity
        numbers = (hook.ratio, min(hook.largest, most)) if isinstance(hook, Threshold) else (1.0, 1.0)
        return {name: torch.tensor(number) for name, number in zip(names.HOOKS[kind], numbers, strict=True)}

    def _painting(
        self, mask: torch.Tensor | None, image: torch.Tensor | None, unit: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        import torch

        if not self.loop["inpaint"]:
            if mask is not None:
                raise UsageError("mask_image was given to an engine that cannot inpaint; build it with --inpaint")
            return {}
        shape = tuple(unit.shape)
        whole_picture = torch.ones(shape[0], 1, *shape[2:])
        known = torch.zeros_like(unit) if image is None else read.fits("image", image, shape)
        return {
            names.MASK: whole_picture if mask is None else read.part_of_picture(mask, shape),
            names.KNOWN: known,
            names.KNOWN_NOISE: unit,
        }

    def _cache(
        self,
        rows: int,
        mask: str | Sequence[int] | None,
        threshold: float | None,
        limit: int | None,
        given: dict[str, torch.Tensor],
        sizes: Mapping[str, int],
        first: int,
    ) -> dict[str, torch.Tensor]:
        """The step cache's state at the start of ``rows`` rows behind the ``first``; its numbers go to ``given``."""
        import torch

        cache = self.loop["cache"]
        if cache is None:
            if mask is not None or threshold is not None or limit is not None:
                raise UsageError(
                    f"engine {self.engine.path.name!r} has no step cache; build it with one (--cache POLICY)"
                )
            return {}
        from hasten.passes.steps import controls
        from hasten.passes.steps.catalog import parse
        from hasten.passes.steps.forecast import Table
        from hasten.passes.steps.plan import planned_behind
        from hasten.passes.steps.policy import DECIDE

        bits = self.loop.get("unrolled")
        if bits is not None and (rows != len(bits) or any(told is not None for told in (mask, threshold, limit))):
            raise UsageError(
                f"engine {self.engine.path.name!r} was built for {len(bits)} evaluations, computed and reused as "
                f"{bits}: it takes no mask, threshold or limit, and this run has {rows}; build it with "
                "--cache-form conditional for what changes from run to run"
            )
        policy = parse(cache["policy"])
        decision = policy.decision
        if first and isinstance(policy.payload, Table):
            raise UsageError(
                f"{policy.name}'s forecasts were fitted call by call to whole runs, and this one begins at row "
                f"{first}; take an engine with another payload, or without a step cache"
            )
        forced = np.full(self.loop["rows"], DECIDE, np.int64)
        wanted = planned_behind(decision, first + rows, first, mask)
        forced[: len(wanted)] = wanted
        numbers = {
            names.FORCED: torch.from_numpy(forced),
            names.CACHE + "steps": whole(rows, "cpu"),
            names.CACHE + "threshold": torch.tensor(
                decision.threshold if threshold is None else controls.threshold(threshold)
            ),
            names.CACHE + "limit": whole(decision.limit if limit is None else controls.limit(limit), "cpu"),
        }
        given |= {name: number for name, number in numbers.items() if name in self._inputs}
        held = {
            s["name"]: torch.full(sized(s["shape"], sizes, s["name"]), s["start"], dtype=getattr(torch, s["dtype"]))
            for s in self.engine.manifest.state
        }
        decisions = torch.full((self.loop["rows"],), DECIDE)
        return {n: t for n, t in {names.DECISIONS: decisions, **held}.items() if n in self._inputs}

    def _idle(self, mask: str | Sequence[int] | None, threshold: float | None) -> Callable[[str], object] | None:
        """What tells of a threshold that never fires, or always, from the decisions of a whole run; None for no cache.

        Nor for a run that is told its decisions.
        """
        from hasten.backends.cached_run import warn_idle
        from hasten.passes.steps.catalog import parse

        if self.loop["cache"] is None or mask is not None:
            return None
        policy = parse(self.loop["cache"]["policy"])
        return partial(warn_idle, policy, policy.decision.threshold if threshold is None else float(threshold))
