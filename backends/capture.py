"""Capture a module with torch.export, and compare the capture with the module before anything is built on it.

A capture that succeeds may still be wrong: values of the host can be frozen into it, writes can be lost. So both are
run on the example inputs and on a second set, drawn again with the same statistics.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hasten.backends.collection import collection_off
from hasten.errors import HastenError, UsageError, VerificationError

if TYPE_CHECKING:
    import torch

CAPTURE_TOLERANCE = {"float64": 1e-12, "float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}
"""A capture runs the module's own kernels: what differs is the order of a threaded sum at most."""
REWRITE_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "float16": 1e-2, "bfloat16": 4e-2}
"""A rewritten graph rounds elsewhere. Both are largest error over largest magnitude, of each output."""

WHAT_TO_DO = (
    "a branch on values must become torch.cond or torch.where, and .item(), .numpy() and sizes that depend on "
    "values must leave forward"
)


@collection_off()
def capture(
    module: torch.nn.Module | torch.export.ExportedProgram,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    *,
    strict: bool = False,
) -> torch.export.ExportedProgram:
    """Export ``module`` in evaluation mode, not decomposed, and check that it computes what the module does.

    ``dynamic_shapes`` and ``strict`` are as `torch.export.export` takes them. An ExportedProgram is returned as it
    is. Raises `HastenError` if the module cannot be captured, draws random numbers, keeps state or writes to its
    inputs, and `VerificationError` if the capture computes something else.
    """
    import torch

    if isinstance(module, torch.export.ExportedProgram):
        if dynamic_shapes is not None:
            raise UsageError("dynamic_shapes: the source is an ExportedProgram, whose sizes are settled already")
        _refuse_writes(module, "the ExportedProgram")
        return module
    args, kwargs = _apart(tuple(args), dict(kwargs or {}))
    name = type(module).__name__
    # One stream of random numbers for all runs, so that none draws what another drew; the caller's stays as it is.
    with _evaluation_mode(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = _run(module, args, kwargs, name)
        try:
            program = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)
        except Exception as error:
            _refuse_changing(module, args, kwargs, expected, name)
            raise HastenError(f"cannot capture {name}: {_reason(error)}; {WHAT_TO_DO}") from error
        try:
            _refuse_writes(program, name)
            check_equal(
                module,
                program.module(check_guards=False),
                args,
                kwargs,
                what=f"the capture of {name}",
                tolerances=CAPTURE_TOLERANCE,
                expected=expected,
            )
        except HastenError as error:
            # Only then: a module that changes is not what was captured, and a large one takes its time.
            _refuse_changing(module, args, kwargs, expected, name)
            if not isinstance(error, VerificationError):
                raise
            raise VerificationError(f"{error}; a value of the host may be frozen into it: {WHAT_TO_DO}") from error
    return program


def check_equal(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    what: str = "the rewritten graph",
    tolerances: Mapping[str, float] = REWRITE_TOLERANCE,
    expected: Mapping[str, Any] | None = None,
) -> None:
    """Run both on the inputs given and on a second set; `VerificationError` names what differs and by how much.

    ``expected`` are the reference's outputs by name, as `output_names` has them, where they are known already.
    """
    import torch

    first = (tuple(args), dict(kwargs or {}))
    second = perturbed(*first)
    with torch.no_grad():
        expected = expected if expected is not None else _outputs(reference, *first)
        if problem := difference(expected, _outputs(candidate, *first), tolerances):
            raise VerificationError(f"{what} differs from the module on the example inputs: {problem}")
        try:
            expected = _outputs(reference, *second)
        except Exception:  # an index may have moved past a table; the indices stay then
            second = perturbed(*first, indices=False)
            expected = _outputs(reference, *second)
        if problem := difference(expected, _outputs(candidate, *second), tolerances):
            raise VerificationError(f"{what} differs from the module on a second set of inputs: {problem}")


def difference(
    expected: Mapping[str, Any], found: Mapping[str, Any], tolerances: Mapping[str, float] = REWRITE_TOLERANCE
) -> str | None:
    """Compare outputs by name; None if they agree, else the output and the error."""
    import torch

    if list(expected) != list(found):
        return f"outputs {', '.join(found)} instead of {', '.join(expected)}"
    for name, want in expected.items():
        got = found[name]
        if not isinstance(want, torch.Tensor):
            if want != got:
                return f"output {name!r} is {got!r} instead of {want!r}"
            continue
        if want.shape != got.shape or want.dtype != got.dtype:
            return f"output {name!r} is {got.dtype} {tuple(got.shape)} instead of {want.dtype} {tuple(want.shape)}"
        error, scale = _error(want, got)
        limit = tolerances.get(str(want.dtype).removeprefix("torch."), 0.0)
        if not error <= limit * scale:
            return (
                f"output {name!r} is off by {error:.3g}, its largest value is {scale:.3g}; {limit:g} of that is allowed"
            )
    return None


def output_names(outputs: Any) -> list[str]:
    """Name what a forward returns: by a dict's keys; ``output_0``, ``output_1``, …; ``output`` for one tensor."""
    return list(_named(outputs))


def perturbed(
    args: Sequence[Any], kwargs: Mapping[str, Any], *, indices: bool = True
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Make a second set of inputs.

    Floats are drawn again with the same mean and deviation (one value alone, such as a time, is moved); integers are
    permuted, or moved within their range, unless ``indices`` is False; booleans are rolled. Everything else stays.
    """
    import torch
    from torch.utils import _pytree

    generator = torch.Generator().manual_seed(20)

    def again(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.numel() == 0:
            return value
        if value.dtype == torch.bool:
            return torch.roll(value, 1, dims=-1) if value.ndim else value
        if value.is_floating_point():
            return _floats_again(value, generator)
        if value.is_complex() or not indices:
            return value
        return _integers_again(value, generator)

    return _pytree.tree_map(again, tuple(args)), _pytree.tree_map(again, dict(kwargs))


def _floats_again(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    import torch

    exact = value.double().cpu()
    if not bool(torch.isfinite(exact).all()):  # a mask of zeros and -inf
        return torch.roll(value, 1, dims=-1) if value.ndim else value
    spread = float(exact.std(correction=0))
    if spread == 0:  # times and scales: all rows the same
        return torch.where(value == 0, torch.full_like(value, 0.5), value * 0.75)
    drawn = float(exact.mean()) + spread * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    return drawn.to(value.dtype).to(value.device)


def _integers_again(value: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    import torch

    flat = value.reshape(-1)
    if int(flat.min()) == int(flat.max()):
        step = -1 if int(flat[0]) > 0 else 1
        return value + step
    order = torch.randperm(flat.numel(), generator=generator).to(value.device)
    moved = flat[order].reshape(value.shape)
    return moved if not torch.equal(moved, value) else torch.roll(flat, 1).reshape(value.shape)


def _apart(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give every input a tensor of its own: export would wire two uses of one tensor object to one input for good."""
    import torch
    from torch.utils import _pytree

    seen: set[int] = set()

    def own(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in seen:
            return value.clone()
        seen.add(id(value))
        return value

    return _pytree.tree_map(own, args), _pytree.tree_map(own, kwargs)


def _run(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the outputs of a module on its examples."""
    try:
        return _outputs(module, args, kwargs)
    except Exception as error:
        raise HastenError(f"{name} does not run on its example inputs: {_reason(error)}") from error


def _refuse_changing(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], first: dict[str, Any], name: str
) -> None:
    """Refuse a module that does not give its outputs ``first`` again."""
    try:
        second = _run(module, args, kwargs, name)
    except HastenError:  # the capture itself left something in it; what was found before says more
        return
    problem = difference(first, second, CAPTURE_TOLERANCE)
    if problem is not None:
        raise HastenError(
            f"cannot capture {name}: two runs on the same inputs differ ({problem}); it draws its own random "
            "numbers or keeps state between calls: pass the noise or the state as an input"
        )


def _refuse_writes(program: torch.export.ExportedProgram, name: str) -> None:
    """Refuse a graph that writes to an input, a buffer or a parameter: by its signature, or in place."""
    signature = program.graph_signature
    held = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    written = [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]
    for node in program.graph.nodes:
        for argument in _overwritten(node):
            source = _storage(argument)
            if source.op == "placeholder":
                written.append(source.name)
    if written:
        kind, label = (
            ("buffer", held.get(written[0], written[0]))
            if written[0] in {*held, *held.values()}
            else ("input", written[0])
        )
        raise HastenError(
            f"cannot capture {name}: it writes to its {kind} {label!r}, and an engine keeps no state; return the "
            "new value as an output instead"
        )


def _overwritten(node: torch.fx.Node) -> Iterator[torch.fx.Node]:
    for argument, spelled in _with_schema(node):
        if spelled.alias_info is not None and spelled.alias_info.is_write and hasattr(argument, "op"):
            yield argument


def _storage(node: torch.fx.Node) -> torch.fx.Node:
    """Follow views and in-place results back to the value whose memory they share."""
    while node.op == "call_function":
        if node.target is operator.getitem:
            node = node.args[0]
            continue
        shared = [a for a, spelled in _with_schema(node) if spelled.alias_info is not None and hasattr(a, "op")]
        if not shared or not any(r.alias_info is not None for r in node.target._schema.returns):
            return node
        node = shared[0]
    return node


def _with_schema(node: torch.fx.Node) -> list[tuple[Any, Any]]:
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None:
        return []
    by_name = {a.name: a for a in schema.arguments}
    return [
        *zip(node.args, schema.arguments, strict=False),
        *((value, by_name[key]) for key, value in node.kwargs.items() if key in by_name),
    ]


def _outputs(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Run on copies, so that a module which writes to its inputs is compared on the same ones."""
    import torch
    from torch.utils import _pytree

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) else value

    return _named(function(*_pytree.tree_map(copy, tuple(args)), **_pytree.tree_map(copy, dict(kwargs))))


def _named(outputs: Any) -> dict[str, Any]:
    from torch.utils import _pytree

    leaves, spec = _pytree.tree_flatten(outputs)
    if spec.is_leaf():
        return {"output": outputs}
    named: dict[str, Any] = {}
    for path, leaf in zip(_paths(outputs), leaves, strict=True):
        name = "_".join(path)
        named[name if not name[:1].isdigit() else f"output_{name}"] = leaf
    return {"output": leaves[0]} if list(named) == ["output_0"] else named


def _paths(outputs: Any) -> Iterator[tuple[str, ...]]:
    """Walk as pytree flattens: dicts (and the output classes made of them) by key, lists and tuples by index."""
    from torch.utils import _pytree

    children: Any
    if isinstance(outputs, Mapping):
        children = outputs.items()
    elif isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        children = zip(outputs._fields, outputs, strict=True)
    elif isinstance(outputs, (list, tuple)):
        children = enumerate(outputs)
    else:
        leaves, spec = _pytree.tree_flatten(outputs)
        if spec.is_leaf():
            yield ()
        else:
            yield from ((str(i),) for i in range(len(leaves)))
        return
    for key, child in children:
        for rest in _paths(child):
            yield (str(key), *rest)


def _error(want: torch.Tensor, got: torch.Tensor) -> tuple[float, float]:
    """Return the largest absolute error and the largest magnitude; NaN and infinity must stand in the same places."""
    import torch

    if want.numel() == 0:
        return 0.0, 1.0
    a, b = want.double(), got.double()
    if not torch.equal(torch.isnan(a), torch.isnan(b)) or not torch.equal(torch.isinf(a), torch.isinf(b)):
        return math.inf, float(torch.nan_to_num(a, posinf=0, neginf=0).abs().max())
    finite = torch.isfinite(a)
    if not bool((a == b)[torch.isinf(a)].all()):
        return math.inf, 1.0
    if not bool(finite.any()):
        return 0.0, 1.0
    return float((a - b)[finite].abs().max()), float(a[finite].abs().max())


@contextmanager
def _evaluation_mode(module: torch.nn.Module) -> Iterator[None]:
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        yield
    finally:
        for m in training:
            m.training = True


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".;:") if lines else type(error).__name__
