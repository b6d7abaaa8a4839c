"""From an ExportedProgram to a flat graph: tensors in, tuple of tensors out, each with a name, a dtype and sizes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.backends.manifest import Dim, TensorSpec
from hasten.backends.shapes import multiple
from hasten.errors import HastenError, UsageError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class FlatProgram:
    """A graph that every backend takes.

    ``module`` maps tensors, positionally, to a tuple of tensors. ``example_inputs`` are contiguous. ``dims`` gives
    the range of every symbol in the shapes, ``dynamic_shapes`` says the same to `torch.export.export` for ``module``.
    ``constants`` are the arguments that the capture froze.
    """

    module: torch.fx.GraphModule
    example_inputs: tuple[torch.Tensor, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, tuple[int, int | None]]
    dynamic_shapes: tuple[dict[int, Any] | None, ...] | None
    constants: Mapping[str, Any]


def flatten(
    module: torch.fx.GraphModule,
    program: torch.export.ExportedProgram,
    *,
    output_names: tuple[str, ...] | None = None,
    dim_names: Mapping[tuple[str, int], str] | None = None,
) -> FlatProgram:
    """Flatten ``module``: ``program``'s own or a rewritten one, with the same inputs and outputs in the same order.

    ``dim_names`` maps (input, axis) to what the symbol there is to be called in the manifest.
    """
    import torch
    from torch.fx.graph import CodeGen

    from hasten.backends.capture import output_names as name_outputs

    graph = torch.fx.Graph()
    values: dict[torch.fx.Node, torch.fx.Node] = {}
    flat_output = graph.graph_copy(module.graph, values)
    graph.output(tuple(v for v in _leaves(flat_output) if isinstance(v, torch.fx.Node)))
    user = _user_placeholders(program)
    mine = [n for n in graph.nodes if n.op == "placeholder"]
    examples = _example_leaves(program)
    if not len(user) == len(mine) == len(examples):
        raise HastenError(f"the rewritten graph has {len(mine)} inputs, the captured one {len(user)}")
    names = _Symbols(dim_names or {})
    inputs, tensors, constants, dynamic = [], [], {}, []
    for described, node, example in zip(user, mine, examples, strict=True):
        value = described.meta.get("val")
        if not isinstance(value, torch.Tensor):
            if node.users:
                raise HastenError(f"input {described.name!r} is a number that stays variable; pass it as a tensor")
            graph.erase_node(node)
            constants[described.name] = value
            continue
        shape = tuple(names.dim(size, described.name, axis) for axis, size in enumerate(value.shape))
        inputs.append(TensorSpec(described.name, str(value.dtype).removeprefix("torch."), shape))
        tensors.append(example.detach().contiguous())
        dynamic.append(value)
    graph.set_codegen(CodeGen())
    dims = {name: _bounds(program, symbol) for symbol, name in names.of_symbol.items()}
    _check_bound(inputs, dims)
    leaves = [_meta(n) for n in _output_leaves(program)]
    keys = name_outputs(program.call_spec.out_spec.unflatten(leaves))
    spelled = [(k, value) for k, value in zip(keys, leaves, strict=True) if isinstance(value, torch.Tensor)]
    if output_names is not None and len(output_names) != len(spelled):
        given = ", ".join(output_names)
        raise UsageError(f"{len(output_names)} output names given ({given}), the model has {len(spelled)} outputs")
    outputs = tuple(
        TensorSpec(
            output_names[i] if output_names is not None else name,
            str(value.dtype).removeprefix("torch."),
            tuple(names.dim(size, name, axis) for axis, size in enumerate(value.shape)),
        )
        for i, (name, value) in enumerate(spelled)
    )
    return FlatProgram(
        module=torch.fx.GraphModule(module, graph),
        example_inputs=tuple(tensors),
        inputs=tuple(inputs),
        outputs=outputs,
        dims=dims,
        dynamic_shapes=_dynamic_shapes(program, dynamic) if dims else None,
        constants=constants,
    )


def dim_names(program: torch.export.ExportedProgram, dynamic_shapes: Any) -> dict[tuple[str, int], str]:
    """Find the names that ``dynamic_shapes`` gives to sizes: (input, axis) -> name of the Dim, or of its root."""
    if isinstance(dynamic_shapes, Mapping):
        shapes = dict(dynamic_shapes)
    elif dynamic_shapes is None:
        return {}
    else:
        shapes = {n.name: s for n, s in zip(_user_placeholders(program), dynamic_shapes, strict=False)}
    found = {}
    for name, axes in shapes.items():
        for axis, dim in axes.items() if isinstance(axes, Mapping) else enumerate(axes or ()):
            label = getattr(getattr(dim, "root", dim), "__name__", None)
            if isinstance(axis, int) and isinstance(label, str):
                found[name, axis] = label
    return found


def load_program(path: str | os.PathLike[str]) -> torch.export.ExportedProgram:
    """Read a ``.pt2`` file that `torch.export.save` wrote, without unpickling anything but tensors.

    Refused: compiled packages (they are engines, not sources), older formats, and files that hold pickled objects.
    """
    import torch
    from torch.export.pt2_archive import constants
    from torch.export.pt2_archive._package import PT2ArchiveReader

    text = os.fspath(path)
    try:
        with PT2ArchiveReader(text) as archive:
            names = archive.get_file_names()
    except Exception as error:
        raise HastenError(f"'{text}' is no file that torch.export.save wrote") from error
    if any(n.startswith(constants.AOTINDUCTOR_DIR) for n in names):
        raise UsageError(f"'{text}' is a compiled package, not a source; run it with torch._inductor.aoti_load_package")
    if not any(n.startswith(constants.MODELS_DIR) for n in names):
        raise HastenError(f"'{text}' holds no ExportedProgram; write it again with torch.export.save")
    pickled = (constants.CUSTOM_OBJ_FILENAME_PREFIX, constants.OPAQUE_OBJ_FILENAME_PREFIX)
    if found := [n for n in names if any(p in n for p in pickled)]:
        raise HastenError(f"'{text}' holds the pickled object {found[0]!r}, which could run any code; it is not loaded")
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"  # torch falls back to a full unpickler otherwise
    try:
        return torch.export.load(text)
    except Exception as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise HastenError(f"'{text}' cannot be read: {first}") from error
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def _check_bound(inputs: list[TensorSpec], dims: Mapping[str, Any]) -> None:
    """Refuse sizes that a call could not be checked for: each symbol must follow from one input's size."""
    plain = {d if d in dims else (multiple(d) or (0, ""))[1] for spec in inputs for d in spec.shape}
    if missing := [name for name in dims if name not in plain]:
        raise HastenError(
            f"size {missing[0]!r} is no input's size nor a multiple of one; make that size itself dynamic"
        )


class _Symbols:
    """Readable names for torch's symbols: those given, else that of the input and axis where one is met first."""

    def __init__(self, given: Mapping[tuple[str, int], str]) -> None:
        self.given = given
        self.of_symbol: dict[Any, str] = {}

    def dim(self, size: Any, tensor: str, axis: int) -> Dim:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        if expression.is_Integer:
            return int(expression)
        unnamed = [s for s in expression.free_symbols if s not in self.of_symbol]
        if len(unnamed) == 1:
            self.of_symbol[unnamed[0]] = self.given.get((tensor, axis), f"{tensor}_{axis}")
        return str(
            expression.subs(
                {symbol: type(symbol)(name, integer=True, positive=True) for symbol, name in self.of_symbol.items()}
            )
        )


def _bounds(program: torch.export.ExportedProgram, symbol: Any) -> tuple[int, int | None]:
    found = program.range_constraints.get(symbol)
    if found is None:
        return 1, None
    return max(1, int(found.lower)), None if str(found.upper) in ("oo", "int_oo") else int(found.upper)


def _dynamic_shapes(program: torch.export.ExportedProgram, values: list[Any]) -> tuple[dict[int, Any] | None, ...]:
    from torch.export import Dim

    shapes = []
    for value in values:
        axes = {}
        for axis, size in enumerate(value.shape):
            if isinstance(size, int) or size.node.expr.is_Integer:
                continue
            if size.node.expr.is_Symbol:
                low, high = _bounds(program, size.node.expr)
                axes[axis] = Dim.AUTO(min=low, max=high)
            else:
                axes[axis] = Dim.AUTO
        shapes.append(axes or None)
    return tuple(shapes)


def _user_placeholders(program: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    wanted = {s.arg.name for s in program.graph_signature.input_specs if s.kind.name == "USER_INPUT"}
    return [n for n in program.graph.nodes if n.op == "placeholder" and n.name in wanted]


def _example_leaves(program: torch.export.ExportedProgram) -> list[Any]:
    from torch.utils import _pytree

    if program.example_inputs is None:
        raise UsageError("the ExportedProgram has no example inputs; export it again and keep them")
    args, kwargs = program.example_inputs
    return _pytree.tree_leaves((args, kwargs), is_leaf=lambda v: v is None)


def _output_leaves(program: torch.export.ExportedProgram) -> list[Any]:
    return list(program.graph.find_nodes(op="output")[0].args[0])


def _meta(value: Any) -> Any:
    return value.meta["val"] if hasattr(value, "meta") else value


def _leaves(value: Any) -> list[Any]:
    from torch.utils import _pytree

    return _pytree.tree_leaves(value, is_leaf=lambda v: v is None)
