"""The second network of a solver that asks two, captured and rewritten like the first, and put beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hasten.backends.manifest import TensorSpec
from hasten.backends.sampling import Second
from hasten.errors import UsageError
from hasten.passes.solvers.names import WHICH

if TYPE_CHECKING:
    from hasten.backends.choosing import Choosing
    from hasten.backends.program import FlatProgram
    from hasten.passes.rule import Report


def both(
    first: FlatProgram, second: Second, report: Report, *, choosing: Choosing | None, rules: Mapping[str, Any]
) -> FlatProgram:
    """The program of both networks: the first's inputs, what the second has beside, and which is asked.

    ``rules`` are those of the first network's rewriting, without what is expected of it. `UsageError` where inputs of
    one name differ in type or sizes.
    """
    import torch

    from hasten.backends.capture import capture
    from hasten.backends.optimize import optimize
    from hasten.backends.program import flatten
    from hasten.passes.fx.switch import switch

    device = first.example_inputs[0].device
    examples = {name: tensor.to(device) for name, tensor in second.example_inputs.items()}
    program = capture(second.module.to(device), (), examples)
    rewritten, own = optimize(program, (), example_kwargs=examples, choosing=choosing, **{**rules, "expect": None})
    other = flatten(rewritten, program)
    known = {spec.name: spec for spec in first.inputs}
    for spec in other.inputs:
        if spec.name in known and spec != known[spec.name]:
            mine = known[spec.name]
            raise UsageError(
                f"both networks have an input {spec.name!r}: {mine.dtype} {mine.shape} and {spec.dtype} {spec.shape}; "
                "inputs of one name are one input, so give them one type and size, or two names"
            )
    found = ", ".join(f"{rule.name} {rule.hits}" for rule in own.rules if rule.hits) or "nothing"
    report.notes.append(f"second network: {found} rewritten")
    report.choices.extend(own.choices)
    more = [(s, t) for s, t in zip(other.inputs, other.example_inputs, strict=True) if s.name not in known]
    module = switch(first.module, other.module, [[s.name for s in p.inputs] for p in (first, other)])
    which = TensorSpec(WHICH, "int64", ())
    return replace(
        first,
        module=module,
        example_inputs=(
            *first.example_inputs,
            *(tensor for _, tensor in more),
            torch.zeros((), dtype=torch.int64, device=device),
        ),
        inputs=(*first.inputs, *(spec for spec, _ in more), which),
        outputs=first.outputs[:1],
    )
