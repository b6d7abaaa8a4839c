"""``winograd-conv2d`` for both kinds of graph: one name in the catalog, two ways to write the same algorithm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError, nearest
from hasten.passes.ops.winograd_conv2d import select

if TYPE_CHECKING:
    from hasten.passes.pipeline import Context
    from hasten.passes.rule import RuleReport

NAME = "winograd-conv2d"


class WinogradConv2d:
    """The pass; options are ``form`` (one implementation for all sites, ``winograd-f4``) and, in FX, ``fuse``."""

    name = NAME

    def run(self, graph: Any, context: Context) -> RuleReport:
        _check_options(dict(context.options.get(NAME, {})))
        if graph.ir == "fx":
            from hasten.passes.fx import winograd as in_fx

            return in_fx.run(graph, context)
        from hasten.passes.onnx import winograd as in_onnx

        return in_onnx.run(graph, context)


def _check_options(options: dict[str, Any]) -> None:
    forced = options.pop("form", None)
    options.pop("fuse", None)
    if options:
        raise UsageError(f"passes: {NAME} has no option {next(iter(options))!r}; options: form, fuse")
    known = [name for op in select.TILES for name in select.names(op)]
    if forced is not None and forced not in known:
        raise UsageError(f"passes: {NAME} has no form {forced!r}; forms: {', '.join(known)}.{nearest(forced, known)}")


WINOGRAD_CONV2D = WinogradConv2d()
