"""From the last product of attention back through the softmax to the first product.

Every step notes the operand slots it goes through, so that a value that somebody else reads stops the match.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic

from hasten.passes.pattern import Const, GraphView, Match, Op, V, Var, enter, scalar, through
from hasten.passes.rules.attention_masks import Masks
from hasten.passes.rules.contraction import Contraction, contraction

_EXP = Op(
    "exp", (Op("sub", (Var("logits"), Op("max", (Var("logits"),), attrs=(("keepdims", True),), binds=("axes",)))),)
)
_SPELLED_SOFTMAX = Op("div", (_EXP, Op("sum", (_EXP,), attrs=(("keepdims", True),), binds=("axes",))))
_NOT_A_NUMBER = Op("isnan", (Var("probabilities"),))
_NO_KEY = Op("logical_not", (Op("any", (Op("logical_not", (Op("eq", (Var("logits"), Const(float("-inf")))),)),)),))

_ALL_MASKED = Op("eq", (Op("max", (Var("mask"),), attrs=(("keepdims", True),), binds=("axes",)), Const(float("-inf"))))


@dataclass
class Scores(Generic[V]):
    """``factor * product + masks``: what the softmax is taken of."""

    product: Contraction[V]
    factor: float
    masks: Masks[V] = field(default_factory=Masks)


def keeps_rows(view: GraphView[V], value: V, source: V) -> bool:
    """Whether a reshape leaves the last two axes as they are: batch and heads are merged or split apart."""
    before, after = view.shape(source), view.shape(value)
    return before is not None and after is not None and len(before) > 1 and before[-2:] == after[-2:]


@dataclass(frozen=True)
class Probabilities(Generic[V]):
    """The softmax's input, and the letters that the last product gives to its axes."""

    logits: V
    letters: str


def follow_probabilities(
    view: GraphView[V], product: V, side: tuple[int, V, str], found: Match[V]
) -> Probabilities[V] | str:
    """From an operand of the last product to the softmax's input; or why there is none."""
    slot, value, letters = side
    found.edges[product, slot] = value
    while True:
        value = enter(view, value, found)
        op = view.op(value)
        if op is None:
            return f"{view.where(value)} is {view.describe(value)}, not a softmax"
        if op.name == "softmax":
            found.ops.append("softmax")
            shape = view.shape(value)
            if shape is None or op.attrs["axis"] != len(shape) - 1:
                return f"the softmax is over axis {op.attrs['axis']} of shape {shape}, not over the last"
            assert op.inputs[0] is not None
            found.edges[value, 0] = op.inputs[0]
            return Probabilities(op.inputs[0], letters)
        source = op.inputs[0] if op.inputs else None
        if source is not None and (op.name == "cast" or (op.name == "reshape" and keeps_rows(view, value, source))):
            found.edges[value, 0] = source
            value = source
        elif source is not None and op.name == "transpose" and len(op.attrs["perm"]) == len(letters):
            found.edges[value, 0] = source
            letters = "".join(letters[op.attrs["perm"].index(a)] for a in range(len(letters)))
            value = source
        elif op.name == "where" and (guarded := _guarded(view, value, found)) is not None:
            value = guarded
        elif op.name == "div" and (logits := _spelled(view, value, found)) is not None:
            found.ops.append("softmax")
            return Probabilities(logits, letters)
        else:
            return f"{view.where(value)} is {view.describe(value)}, not a softmax"


def _guarded(view: GraphView[V], value: V, found: Match[V]) -> V | None:
    """A safe softmax: rows that are NaN, or whose scores or added mask are all -inf, are replaced by zero."""
    op = view.op(value)
    assert op is not None
    condition, zero, probabilities = op.inputs
    if condition is None or probabilities is None or scalar(view, zero, filled=True) != 0:
        return None
    softmax = view.op(through(view, probabilities))
    trial: Match[V] = Match(values={}, edges=dict(found.edges))
    if softmax is None or softmax.name != "softmax" or softmax.inputs[0] is None:
        return None
    if _NOT_A_NUMBER.search(view, condition, trial) is None:
        if through(view, trial["probabilities"]) != through(view, probabilities):
            return None
    elif _NO_KEY.search(view, condition, trial) is None:
        if through(view, trial["logits"]) != through(view, softmax.inputs[0]):
            return None
    elif not _masks_whole_rows(view, condition, softmax.inputs[0], trial):
        return None
    trial.edges[value, 0], trial.edges[value, 2] = condition, probabilities
    if zero is not None:
        trial.edges[value, 1] = zero
        filled = view.op(zero)
        if filled is not None and filled.name == "filled" and filled.inputs[0] is not None:
            trial.edges[zero, 0] = filled.inputs[0]
    found.edges = trial.edges
    return probabilities


def _masks_whole_rows(view: GraphView[V], condition: V, logits: V, found: Match[V]) -> bool:
    """Whether ``condition`` holds for the rows where a mask that is added to the scores is -inf everywhere."""
    if _ALL_MASKED.search(view, condition, found) is not None:
        return False
    mask, added = found["mask"], view.op(through(view, logits))
    shape = view.shape(mask)
    if added is None or added.name != "add" or shape is None or found.attrs["axes"] != (len(shape) - 1,):
        return False
    return any(a is not None and through(view, a) == through(view, mask) for a in added.inputs)


def _spelled(view: GraphView[V], value: V, found: Match[V]) -> V | None:
    """exp(s - max s) / sum(exp(s - max s)) over the last axis."""
    trial: Match[V] = Match(edges=dict(found.edges))
    if _SPELLED_SOFTMAX.search(view, value, trial) is not None:
        return None
    shape = view.shape(value)
    if shape is None or tuple(trial.attrs["axes"]) != (len(shape) - 1,):
        return None
    found.edges = trial.edges
    return trial["logits"]


def enter_scores(view: GraphView[V], value: V, found: Match[V]) -> Scores[V] | str:
    """From the softmax's input to the first product, gathering factors and masks; or why it is not reached."""
    scores = _walk(view, value, found, 1.0, Masks(), 16)
    return scores


def _walk(view: GraphView[V], value: V, found: Match[V], factor: float, masks: Masks[V], depth: int) -> Scores[V] | str:
    value = enter(view, value, found)
    op = view.op(value)
    if op is None or depth == 0:
        return f"{view.where(value)} is {view.describe(value)}, not a product of queries and keys"
    product = contraction(view, op)
    if not isinstance(product, str):
        for slot, operand, _ in product.sides:
            found.edges[value, slot] = operand
        if product.addend is not None:
            found.edges[value, product.addend[0]] = product.addend[1]
        found.ops.append(op.name)
        return Scores(product, factor, masks)
    if op.name in ("matmul", "baddbmm", "einsum"):
        return product
    steps = {"cast": _same, "reshape": _same, "mul": _scaled, "div": _scaled, "add": _added, "sub": _added}
    step = steps.get(op.name) or (_masked if op.name in ("where", "masked_fill") else None)
    if step is None:
        return f"{view.where(value)} is {view.describe(value)}, which no attention has between product and softmax"
    choices = step(view, value, factor, masks)
    if isinstance(choices, str):
        return choices
    reason = f"{view.where(value)} ({view.describe(value)}) is not made of a product of queries and keys"
    for inner, new_factor, new_masks in choices:
        trial = found.copy()
        if op.name == "sub" and op.inputs[1] is not None:
            _enter_row_maximum(view, op.inputs[1], trial)
        for index, read in enumerate(op.inputs):
            if read is not None:
                trial.edges[value, index] = read
        result = _walk(view, inner, trial, new_factor, new_masks, depth - 1)
        if not isinstance(result, str):
            found.take(trial)
            return result
        reason = result
    return reason


Choice = tuple[V, float, Masks[V]]


def _same(view: GraphView[V], value: V, factor: float, masks: Masks[V]) -> list[Choice[V]] | str:
    op = view.op(value)
    assert op is not None
    source = op.inputs[0]
    if source is None or (op.name == "reshape" and not keeps_rows(view, value, source)):
        return f"{view.where(value)} reshapes the scores' rows"
    return [(source, factor, masks)]


def _scaled(view: GraphView[V], value: V, factor: float, masks: Masks[V]) -> list[Choice[V]] | str:
    op = view.op(value)
    assert op is not None
    a, b = op.inputs[0], op.inputs[1]
    assert a is not None
    assert b is not None
    if (number := scalar(view, b)) is not None and number:
        return [(a, factor * number if op.name == "mul" else factor / number, masks)]
    if op.name == "mul" and (number := scalar(view, a)) is not None:
        return [(b, factor * number, masks)]
    return f"{view.where(value)} scales the scores by a tensor that is not a constant"


def _added(view: GraphView[V], value: V, factor: float, masks: Masks[V]) -> list[Choice[V]] | str:
    """A mask may be either operand; softmax does not see what is subtracted from a whole row."""
    op = view.op(value)
    assert op is not None
    a, b = op.inputs[0], op.inputs[1]
    assert a is not None
    assert b is not None
    sign = -1.0 if op.name == "sub" else 1.0
    shape = view.shape(value)
    row = view.op(through(view, b))
    if op.name == "sub" and row is not None and row.name == "max" and shape is not None:
        over_rows = row.attrs["axes"] == (len(shape) - 1,) and row.attrs["keepdims"]
        if over_rows:
            return [(a, factor, masks)]
    choices: list[Choice[V]] = []
    if view.shape(a) == shape:
        choices.append((a, factor, masks.with_added(b, factor * sign)))
    if op.name == "add" and view.shape(b) == shape:
        choices.append((b, factor, masks.with_added(a, factor)))
    return choices or f"{view.where(value)} adds a mask that is larger than the scores"


def _enter_row_maximum(view: GraphView[V], value: V, found: Match[V]) -> None:
    """The maximum reads the scores as well."""
    value = enter(view, value, found)
    op = view.op(value)
    if op is not None and op.name == "max" and op.inputs[0] is not None:
        found.edges[value, 0] = op.inputs[0]


def _masked(view: GraphView[V], value: V, factor: float, masks: Masks[V]) -> list[Choice[V]] | str:
    op = view.op(value)
    assert op is not None
    if op.name == "where":
        condition, a, b = op.inputs
        sides = [(a, b, False), (b, a, True)]
    else:
        a, condition, b = op.inputs
        sides = [(a, b, True)]
    assert condition is not None
    for kept, filler, negate in sides:
        number = scalar(view, filler, filled=True)
        if kept is None or number is None:
            continue
        if number * factor > -1e4:
            return f"{view.where(value)} fills masked scores with {number:g}; only -1e4 and below means no attention"
        if view.shape(kept) != view.shape(value):
            return f"{view.where(value)} selects with a mask that is larger than the scores"
        return [(kept, factor, masks.with_condition(condition, negate, number * factor))]
    return f"{view.where(value)} selects between two tensors, not between scores and a constant"
