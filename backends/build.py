"""`build`: a source, a target, an engine directory.

A PyTorch source is captured, rewritten as an FX graph, and compiled by AOTInductor or exported to ONNX; an ONNX
source is rewritten as ONNX. Graphs are rewritten once, at the earliest form at hand; one report goes along into the
manifest.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.backends import build_checks
from hasten.backends.choosing import Choosing
from hasten.backends.collection import collection_off, let_go
from hasten.backends.decoder import Decoder
from hasten.backends.directory import WAIT_SECONDS, publish
from hasten.backends.engine import Engine, load
from hasten.backends.manifest import Manifest, TensorSpec, write_manifest
from hasten.backends.onnx_signature import Signature, check_dynamic, fix_shapes, rename, signature
from hasten.backends.sampling import Looping, Sampling, Second, looped
from hasten.backends.shapes import Profile, Shapes, check_profiles, evaluate, format_shape, parse_profiles
from hasten.backends.source import Origin, kind_of, origin_of
from hasten.backends.step_cache import Caching
from hasten.backends.target import Target, parse_target
from hasten.errors import UsageError

if TYPE_CHECKING:
    import onnx

    from hasten.backends.program import FlatProgram
    from hasten.passes.rule import Report

logger = logging.getLogger(__name__)

Progress = Callable[[str, float], None]
STAGES = ("capture", "optimize", "export", "compile", "write")
"""What ``progress`` is told, with the part of the build that is done before the stage (0 to 1)."""


def build(
    source: Any,
    *,
    target: str | Target,
    out: str | os.PathLike[str],
    example_inputs: Sequence[Any] | None = None,
    example_kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    shapes: Shapes | tuple[Shapes, Shapes, Shapes] | None = None,
    dtype: str | None = None,
    expect: Mapping[str, int] | None = None,
    fuel: int | None = None,
    skip: Iterable[str] = (),
    strict: bool = False,
    weights: str | os.PathLike[str] | None = None,
    options: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    choosing: Choosing | None = None,
    cache: str | None = None,
    cache_form: str | None = None,
    region: str | None = None,
    sampling: Sampling | None = None,
    overwrite: bool = False,
    wait: float = WAIT_SECONDS,
    progress: Progress | None = None,
) -> Engine:
    """Build an engine for ``target`` in the directory ``out``, and load it.

    ``source``: a module with ``example_inputs`` and ``example_kwargs``; an ExportedProgram or the path of a ``.pt2``
    file; an ONNX model or the path of an ``.onnx`` file; the name of a registered model (``weights`` as
    `models.registry.get` takes it), a diffusers directory, or an `Adapter`, whose sizes and names are taken.

    ``dynamic_shapes`` is as `torch.export.export` takes it, for modules. ``shapes`` are sizes by input name, for ONNX
    sources: one for fixed sizes, or three for the least, most frequent and greatest. ``dtype`` converts modules.
    ``expect``, ``fuel``, ``skip``, ``strict`` and, for modules, ``choosing`` are those of `optimize`. ``options`` are
    Inductor's (aoti).
    ``cache`` is a step cache, such as ``teacache:threshold=0.25,model=flux`` (`passes.steps.catalog`): the
    engine then has `Engine.start`. ``cache_form`` is ``conditional`` (one program with a branch in it) or
    ``straight`` (programs without one); ``region`` is FIRST:LAST, the blocks that a reused step leaves out.
    ``sampling`` puts a whole sampler around the network, whose engine `hasten.sampler` runs; its step cache is a
    branch in the loop, or, ``straight``, a known schedule whose rows stand one behind another without loop or branch.
    ``timeout`` bounds a TensorRT build, in seconds. ``overwrite`` replaces an existing engine; ``wait`` is for
    another build of the same output.

    Raises the `HastenError` that says what cannot be meant, captured, built or written; then nothing is left behind.
    """
    parsed = parse_target(target)
    if sampling is not None:
        build_checks.loops(parsed)
    build_checks.without_runtime(parsed)
    if dtype is not None:
        build_checks.check_dtype(dtype, parsed)
    if options and parsed.backend != "aoti":
        raise UsageError(f"options: Inductor's, for aoti targets; the target is {parsed}")
    kind = kind_of(source, weights)
    if kind == "onnx":
        build_checks.for_onnx(parsed, dtype, dynamic_shapes, example_inputs, example_kwargs)
    elif shapes is not None:
        raise UsageError("shapes: for ONNX sources; the sizes of a PyTorch source are those of its example inputs")
    job = _Job(
        parsed,
        {"expect": expect, "fuel": fuel, "skip": tuple(skip), "strict": strict},
        options,
        timeout,
        progress,
        choosing,
        Caching.of(cache, cache_form, region, looped=sampling is not None),
        sampling,
    )
    with publish(out, overwrite=overwrite, wait=wait) as folder:
        if kind == "onnx":
            job.trained_on("")
            manifest = job.from_onnx(source, shapes, folder)
        else:
            device = parsed.device if parsed.backend == "aoti" else "cpu"  # where the examples are run
            job.tell("capture", 0.0)
            origins = [origin_of(kind, source, example_inputs, example_kwargs, dynamic_shapes, dtype, weights, device)]
            job.trained_on(origins[0].name)
            manifest = job.from_torch(origins, folder)
        if sampling is not None and sampling.decoder is not None:
            manifest = job.decoded(manifest, sampling.decoder, folder)
        job.tell("write", 0.95)
        report = {**manifest.report, "seconds": {**manifest.report["seconds"], **job.seconds}}
        write_manifest(folder, replace(manifest, report=report, seconds=sum(job.seconds.values())))
    job.tell("write", 1.0)
    return load(out)


class _Job:
    """One build: its target and options, and how long each stage took."""

    def __init__(
        self,
        target: Target,
        rules: Mapping[str, Any],
        options: Mapping[str, Any] | None,
        timeout: float | None,
        progress: Progress | None,
        choosing: Choosing | None,
        caching: Caching | None,
        sampling: Sampling | None,
        name: str = "model",
    ) -> None:
        self.name = name
        self.sampling = sampling
        self.choosing = choosing
        self.caching = caching
        self.target = target
        self.rules = {**rules, "target": str(target)}
        self.options = options
        self.timeout = timeout
        self.progress = progress
        self.seconds: dict[str, float] = {}
        self._stage, self._since = "", 0.0

    def trained_on(self, name: str) -> None:
        """Let a registered model say what it was trained on, where the caller did not; then the solver must fit."""
        if self.sampling is None:
            return
        from hasten.models.processes import process_of, time_scale_of

        if self.sampling.process is None:
            self.sampling = replace(self.sampling, process=process_of(name))
        if self.sampling.time_scale is None:
            self.sampling = replace(self.sampling, time_scale=time_scale_of(name))
        _, table = self.sampling.table()
        if self.caching is not None:
            self.caching.check_calls(len(table))

    def decoded(self, manifest: Manifest, decoder: Decoder, folder: Path) -> Manifest:
        """Build a sampler's decoder by the same rules into ``folder``, and add it to the sampler's manifest."""
        from hasten.backends import decoder as decoding

        assert manifest.loop is not None
        self.tell("decoder", 0.8)
        rules = {key: value for key, value in self.rules.items() if key != "target"} | {"expect": None}
        job = _Job(self.target, rules, self.options, self.timeout, None, self.choosing, None, None, name=decoding.NAME)
        device = self.target.device if self.target.backend == "aoti" else "cpu"
        part = job.from_torch([decoding.origin(decoder, manifest.loop["latents"], device)], folder)
        return decoding.joined(manifest, part, decoder)

    def tell(self, stage: str, fraction: float) -> None:
        """Begin ``stage``."""
        now = time.monotonic()
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + now - self._since
        self._stage, self._since = stage, now
        if self.progress is not None:
            self.progress(stage, fraction)

    def from_torch(self, origins: list[Origin], folder: Path) -> Manifest:
        """Capture, rewrite and lower a PyTorch source into ``folder``.

        The source is taken out of ``origins``: what was made of it alone is let go before a builder wants the memory.
        """
        parts, assemble = self._parts(origins.pop(), folder)
        let_go()
        return assemble({name: finish() for name, finish in parts.items()})

    def _parts(
        self, origin: Origin, folder: Path
    ) -> tuple[Mapping[str, Callable[[], Manifest]], Callable[[Mapping[str, Manifest]], Manifest]]:
        """The source's programs by name, each with what is left to do for it, and how an engine is made of them."""
        from hasten.backends.capture import capture
        from hasten.backends.optimize import optimize
        from hasten.backends.program import dim_names, flatten
        from hasten.passes.fx.class_counts import class_counts

        program = capture(origin.module, origin.args, origin.kwargs, origin.dynamic_shapes)
        self.tell("optimize", 0.2)
        rewritten, report = optimize(
            program,
            origin.args,
            example_kwargs=origin.kwargs,
            source=origin.name,
            choosing=self.choosing,
            **self.rules,
        )
        if report.choices:
            report.notes.append(memory(report))
            logger.info("%s", report.notes[-1])
        flat = flatten(
            rewritten,
            program,
            output_names=origin.output_names,
            dim_names=dim_names(program, origin.dynamic_shapes),
        )
        if self.sampling is not None and self.sampling.second is not None:
            flat = self._with_second(flat, self.sampling.second, report)
        classes = class_counts(flat.module.graph, [spec.name for spec in flat.inputs])
        if self.caching is None:
            looping = self._looping(flat.inputs, flat.outputs, classes=classes)
            return {"model": self._lower_graph(flat, report, folder, self.name, looping)}, itemgetter("model")
        cached, described = self.caching.apply(flat, report)
        logger.info("%s", described["summary"])
        if self.sampling is not None:
            (step,) = cached.programs.values()
            looping = self._looping(step.inputs, step.outputs, cached.state, described, classes=classes)
            return {"model": self._lower_graph(step, report, folder, "model", looping)}, itemgetter("model")
        parts = {n: self._lower_graph(part, report, folder, n) for n, part in cached.programs.items()}
        return parts, partial(_assembled, state=cached.state, described=described)

    def _with_second(self, flat: FlatProgram, second: Second, report: Report) -> FlatProgram:
        """Both networks of a solver in one graph, the second rewritten by the same rules."""
        from hasten.backends.second_network import both

        if self.caching is not None:
            raise UsageError("a step cache keeps what one network found, and this solver asks two; leave one out")
        return both(flat, second, report, choosing=self.choosing, rules=self.rules)

    def _looping(
        self,
        given: Sequence[TensorSpec],
        made: Sequence[TensorSpec],
        state: Sequence[Mapping[str, Any]] = (),
        cache: Mapping[str, Any] | None = None,
        classes: Mapping[str, int] | None = None,
    ) -> Looping | None:
        """The sampler's loop around a network with these inputs and outputs; None where none was asked for.

        ``classes`` says how many an input chooses from, where that is known.
        """
        if self.sampling is None:
            return None
        build_checks.sizes_of_a_loop(given, self.target, self.sampling)
        unroll = self.caching is not None and self.caching.unrolls
        looping = Looping.of(self.sampling, given, made, state, cache, unroll=unroll)
        build_checks.sorted_in_a_loop(looping, self.target)
        return replace(looping, described={**looping.described, "classes": dict(classes or {})})

    def _lower_graph(
        self, flat: FlatProgram, report: Report, folder: Path, name: str, looping: Looping | None = None
    ) -> Callable[[], Manifest]:
        """Compile one rewritten graph, in its loop if there is one, into files whose names begin with ``name``.

        Returns what is left to do. Where a builder works outside this process that is the builder's part, which holds
        nothing of the graph; elsewhere it is all, so that one program is written before the next is exported.
        """
        from hasten.passes.fx import branch_rules

        branch_rules.require(flat.module, str(self.target))
        if self.target.opset is None:
            return partial(self._compiled, flat, report, folder, name, looping)
        if not self.target.needs_profiles:
            return lambda: self._exported(flat, report, folder, name, looping, None)()
        return self._exported(flat, report, folder, name, looping, folder / f"{name}.weights")

    def _exported(
        self,
        flat: FlatProgram,
        report: Report,
        folder: Path,
        name: str,
        looping: Looping | None,
        weights: Path | None,
    ) -> Callable[[], Manifest]:
        """Write a graph as ONNX, its large weights to the file ``weights`` if one is given; lowering it is left."""
        interface = Signature(flat.inputs, flat.outputs, flat.dims, flat.constants)
        model = self._export(flat, report, looping, weights)
        if looping is not None:
            interface = _around(model, looping, flat.dims, flat.constants)
        profiles = _profiles(flat) if self.target.needs_profiles and looping is None else {}
        return lambda: looped(self._lower(model, interface, profiles, report, folder, name), looping)

    def _compiled(
        self, flat: FlatProgram, report: Report, folder: Path, name: str, looping: Looping | None
    ) -> Manifest:
        """Compile a graph with a compiler of torch's own."""
        interface = Signature(flat.inputs, flat.outputs, flat.dims, flat.constants)
        self.tell("compile", 0.3)
        if looping is not None:
            from hasten.backends.sampling_fx import in_a_loop

            flat = in_a_loop(flat, looping)
            interface = Signature(flat.inputs, flat.outputs, flat.dims, flat.constants)
        if self.target.backend == "aoti":
            from hasten.backends import inductor

            files = inductor.package(
                flat.module,
                flat.example_inputs,
                flat.dynamic_shapes,
                self.target.device,
                folder,
                self.options,
                name=f"{name}.pt2",
            )
            return looped(self._manifest(interface, report, files[0], inductor.runtime_versions()), looping)
        from hasten.backends import torch_tensorrt

        files = torch_tensorrt.package(flat.module, flat.example_inputs, flat.dynamic_shapes, folder)
        return self._manifest(interface, report, files[0], torch_tensorrt.runtime_versions())

    def from_onnx(self, source: Any, shapes: Any, folder: Path) -> Manifest:
        """Rewrite and lower an ONNX source into ``folder``; ``shapes`` are in it before any rule looks."""
        from hasten.backends import onnx_step_cache
        from hasten.backends.optimize import optimize_onnx
        from hasten.passes import catalog
        from hasten.passes.onnx import io

        self.tell("optimize", 0.0)
        profiles = parse_profiles(shapes) if shapes is not None else {}
        read = io.read(source)
        model = read.model
        check_profiles(profiles, signature(model).inputs)
        if profiles and model is source:
            model = type(source)()
            model.CopyFrom(source)
        fix_shapes(model, profiles)
        later = self.caching is not None or self.sampling is not None
        rules = ",".join(name for name in catalog.default("onnx") if not later or name != "legalise")
        model, report = optimize_onnx(model, passes=rules, choosing=self.choosing, **self.rules)
        report.source = read.source
        found = signature(model)
        dims = dict(found.dims)
        for spec in found.inputs:
            for axis, size in enumerate(spec.shape):
                if isinstance(size, str) and size in dims and spec.name in profiles:
                    dims[size] = (profiles[spec.name].min[axis], profiles[spec.name].max[axis])
        found = replace(found, dims=dims)
        if self.caching is None and self.sampling is None:
            return self._lower(model, found, profiles, report, folder, "model")
        if self.caching is None:
            return self._lower_loop(model, self._looping(found.inputs, found.outputs), dims, report, folder)
        onnx_step_cache.take_sizes(model, read.model)
        sizes = onnx_step_cache.sizes_of(found, profiles)
        cached = onnx_step_cache.with_cache(self.caching, model, sizes, report)
        logger.info("%s", cached.described["summary"])
        if self.sampling is not None:
            (program,) = cached.programs.values()
            step = signature(program)
            looping = self._looping(step.inputs, step.outputs, cached.state, cached.described)
            return self._lower_loop(program, looping, dims, report, folder)
        built = {}
        for name, part in cached.programs.items():
            program, legalised = optimize_onnx(
                part, target=str(self.target), passes="legalise", skip=self.rules["skip"]
            )
            _merge(report, legalised)
            interface = replace(signature(program), dims=dims)
            bounds = onnx_step_cache.profiles_of(found, profiles, interface.inputs)
            built[name] = self._lower(program, interface, bounds, report, folder, name)
        return _assembled(built, cached.state, cached.described)

    def _lower_loop(
        self,
        model: onnx.ModelProto,
        looping: Looping | None,
        dims: Mapping[str, tuple[int, int | None]],
        report: Report,
        folder: Path,
    ) -> Manifest:
        """Put an ONNX denoiser into its loop, in the target's own operators, and lower that."""
        from hasten.backends.optimize import optimize_onnx

        assert looping is not None
        model = looping.around(model)
        model, legalised = optimize_onnx(model, target=str(self.target), passes="legalise", skip=self.rules["skip"])
        _merge(report, legalised)
        return looped(self._lower(model, _around(model, looping, dims), {}, report, folder, "model"), looping)

    @collection_off()
    def _export(
        self, flat: FlatProgram, report: Report, looping: Looping | None, weights: Path | None
    ) -> onnx.ModelProto:
        """Write a rewritten graph as ONNX, in the target's own operators; nothing is matched again."""
        from hasten.backends.optimize import optimize_onnx
        from hasten.passes.fx.to_onnx import onnx_from_graph
        from hasten.passes.onnx import winograd
        from hasten.passes.onnx.detached import WeightsFile

        assert self.target.opset is not None
        self.tell("export", 0.3)
        options: dict[str, Any] = {"skip": self.rules["skip"], "choosing": self.choosing}
        with WeightsFile(weights) if weights is not None else nullcontext() as file:
            model = onnx_from_graph(flat.module, flat.example_inputs, self.target.opset, flat.dynamic_shapes, file)
            rename(model, [t.name for t in flat.inputs], [t.name for t in flat.outputs])
            check_dynamic(flat.inputs, signature(model).inputs)
            if str(self.target) == winograd.TARGET:
                model, chosen = optimize_onnx(model, target=str(self.target), passes=winograd.NAME, **options)
                _merge(report, chosen)
            if looping is not None:
                model = looping.around(model)
        beside = weights.parent if weights is not None else None
        model, legalised = optimize_onnx(model, target=str(self.target), passes="legalise", weights=beside, **options)
        _merge(report, legalised)
        return model

    def _lower(
        self,
        model: onnx.ModelProto,
        interface: Signature,
        profiles: Mapping[str, Profile],
        report: Report,
        folder: Path,
        name: str,
    ) -> Manifest:
        from hasten.backends import onnxruntime as ort
        from hasten.passes.onnx import branch_rules, where_branch

        branch_rules.require(model, str(self.target))
        self.tell("compile", 0.6)
        if self.target.backend == "onnxruntime":
            if self.target.device == "cpu":
                where_branch.run(model)
            files = ort.save_model(model, folder, f"{name}.onnx")
            ort.check_loads(folder, self.target.device, files[0])
            return self._manifest(interface, report, files[0], ort.runtime_versions())
        from hasten.backends import tensorrt
        from hasten.backends.tensorrt_graph import prepare_for_tensorrt
        from hasten.passes.onnx import io

        dynamic = [spec for spec in interface.inputs if any(isinstance(size, str) for size in spec.shape)]
        for spec in dynamic:
            if spec.name not in profiles:
                raise UsageError(
                    f"target {self.target}: input {spec.name!r} has dynamic sizes {format_shape(spec.shape)}; give "
                    "shapes, three of them for min, opt and max, or one to fix them"
                )
        weights = io.weight_bytes(model)
        files = ort.save_model(prepare_for_tensorrt(model), folder, f"{name}.onnx")
        built = tensorrt.build_plan(
            folder / files[0],
            folder,
            self.target,
            {spec.name: profiles[spec.name] for spec in dynamic},
            timeout=self.timeout or tensorrt.TIMEOUT_SECONDS,
            name=f"{name}.plan",
        )
        for file in (*files, f"{name}.weights"):  # the plan holds the weights
            (folder / file).unlink(missing_ok=True)
        found = {
            **built.audit,
            "layers": dict(built.layers),
            "weight_bytes": weights,
            "peak_bytes": built.peak_bytes,
            "build_seconds": built.seconds,
        }
        return self._manifest(interface, report, f"{name}.plan", {self.target.backend: built.version}, found)

    def _manifest(
        self,
        interface: Signature,
        report: Report,
        artifact: str,
        runtime: Mapping[str, str],
        audit: Mapping[str, Any] | None = None,
    ) -> Manifest:
        return Manifest(
            target=str(self.target),
            artifact=artifact,
            inputs=interface.inputs,
            outputs=interface.outputs,
            dims=interface.dims,
            constants=interface.constants,
            versions=_versions(runtime),
            report=report.as_dict(),
            audit=audit,
            seconds=0.0,
        )


def _around(
    model: onnx.ModelProto,
    looping: Looping,
    dims: Mapping[str, tuple[int, int | None]],
    constants: Mapping[str, Any] | None = None,
) -> Signature:
    """The signature of a model with a loop in it, with the ranges of its network's sizes, ``dims``."""
    found = signature(model)
    bounds = {name: b for name, b in looping.bounds(dims).items() if name in found.dims}
    return replace(found, constants=constants or {}, dims={**found.dims, **bounds})


def memory(report: Report) -> str:
    """What the chosen implementations hold beside what the graph had, said before anything is compiled."""
    weights = sum(c["weight_bytes"] for c in report.choices)
    workspace = max((c["workspace_bytes"] for c in report.choices), default=0)
    return f"convolutions hold {weights / 1e6:.1f} MB of transformed weights and {workspace / 1e6:.1f} MB of workspace"


def _profiles(flat: FlatProgram) -> dict[str, Profile]:
    """Sizes of captured inputs: the bounds of their symbols, the example's between them."""
    least = {name: low for name, (low, _) in flat.dims.items()}
    most = {name: high for name, (_, high) in flat.dims.items() if high is not None}
    found = {}
    for spec, tensor in zip(flat.inputs, flat.example_inputs, strict=True):
        low, high = [], []
        for size, here in zip(spec.shape, tensor.shape, strict=True):
            smallest, greatest = evaluate(size, least), evaluate(size, most)
            if smallest is None or greatest is None:
                raise UsageError(f"input {spec.name!r}: size {size} has no upper bound; give its Dim a max")
            low.append(min(smallest, here))
            high.append(max(greatest, here))
        found[spec.name] = Profile(tuple(low), tuple(tensor.shape), tuple(high))
    return found


def _assembled(
    built: Mapping[str, Manifest], state: tuple[Mapping[str, Any], ...], described: Mapping[str, Any]
) -> Manifest:
    """The manifest of an engine with a step cache: the main program's, with all of them in it."""
    programs = {name: part.as_program() for name, part in built.items()}
    first = next(iter(built.values()))
    return replace(first, state=state, cache={**described, "programs": programs})


def _merge(report: Report, later: Report) -> None:
    """Continue a report with what legalising did."""
    for rule in later.rules:
        report.add(rule)
    report.ops_after = later.ops_after
    report.notes.extend(later.notes)
    report.choices.extend(later.choices)
    for stage, seconds in later.seconds.items():
        report.seconds[stage] = report.seconds.get(stage, 0.0) + seconds


def _versions(runtime: Mapping[str, str]) -> dict[str, str]:
    from importlib.metadata import version

    import hasten

    return {"hasten": hasten.__version__, "torch": version("torch"), "onnx": version("onnx"), **runtime}
