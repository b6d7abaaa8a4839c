"""Attention, however it is spelled -> one ``attention`` node.

``softmax(scale * Q K^T + mask) V`` (Vaswani et al., 1706.03762). One semantic matcher instead of a list of spellings:
the matrix products are read as contractions (matmul, bmm, baddbmm, einsum, any layout of batch and heads), and the
way from one to the other is walked: scales on either side, before or after, as product or quotient, become one
number; transposes and reshapes of the operands are folded; casts around the softmax are dropped, since the fused
operator's softmax is at least float32; max-subtraction, the guarded softmax of torch's own decomposition, masks
(added, filled, selected) are understood. `hasten.passes.rules.attention_scores` walks the scores,
`hasten.passes.rules.attention_masks` combines the masks.

Left alone, with the reason: probabilities or scores that somebody else reads; scales that are tensors; active
dropout; a softmax over another axis; a mask that does not fit the scores. A row that may attend to nothing gives 0
where the spelling with ``-inf`` gives NaN.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Generic

from hasten.passes.pattern import GraphView, Match, OpView, V, enter, inner_values, scalar, through
from hasten.passes.rule import Rule
from hasten.passes.rules.attention_masks import Masks, combine, of_fused
from hasten.passes.rules.attention_scores import Probabilities, enter_scores, follow_probabilities
from hasten.passes.rules.contraction import Contraction, contraction, same_heads


@dataclass(frozen=True)
class Operand(Generic[V]):
    """A query, key or value, and the axes order that makes it (batch…, rows, width).

    ``folded`` are the values between it and the product, which are not computed any more.
    """

    value: V
    perm: tuple[int, ...]
    folded: tuple[V, ...] = ()


@dataclass(frozen=True)
class Plan(Generic[V]):
    """What is to be emitted. ``out`` is the result's axes order; ``flat`` is its shape with heads merged again."""

    query: Operand[V]
    key: Operand[V]
    value: Operand[V]
    scale: float
    masks: Masks[V]
    causal: bool = False
    out: tuple[int, ...] = ()
    flat: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class SoftmaxAttention:
    """Matches the last product of an attention, or the reshape that takes its heads apart; binds ``plan``."""

    def search(self, view: GraphView[V], value: V | None, found: Match[V]) -> str | None:
        if value is None or (op := view.op(value)) is None:
            return "no node"
        root, apart = value, False
        if op.name == "reshape" and op.inputs[0] is not None:
            before, after = view.shape(op.inputs[0]), view.shape(value)
            if before is None or after is None or (len(before), len(after)) != (3, 4) or before[1:] != after[2:]:
                return "no product"
            found.edges[value, 0] = op.inputs[0]
            value, apart = enter(view, op.inputs[0], found), True
            op = view.op(value)
        if op is None or op.name not in ("matmul", "baddbmm", "einsum"):
            return "no product"
        last = contraction(view, op)
        if isinstance(last, str):
            return last
        if last.addend is not None or last.scale != 1:
            return "the last product adds or scales something"
        reason, deepest = "no operand of the last product is a softmax", 0
        for side, other in ((0, 1), (1, 0)):
            trial = found.copy()
            probabilities = follow_probabilities(view, value, last.sides[side], trial)
            if isinstance(probabilities, str):
                why: str | None = probabilities
            else:
                trial.edges[value, last.sides[other][0]] = last.sides[other][1]
                why = _plan(view, last, probabilities, last.sides[other], trial, apart, root)
            if why is None:
                found.take(trial)
                return None
            if "softmax" in trial.ops and len(trial.ops) > deepest and not apart:  # the product itself is tried next
                reason, found.ops, deepest = why, trial.ops, len(trial.ops)
        return reason


def _plan(
    view: GraphView[V],
    last: Contraction[V],
    probabilities: Probabilities[V],
    right: tuple[int, V, str],
    found: Match[V],
    apart: bool,
    root: V,
) -> str | None:
    """Walk from the softmax's input to the first product, bring the operands to one layout, and bind the plan."""
    scores, letters = enter_scores(view, probabilities.logits, found), probabilities.letters
    if isinstance(scores, str):
        return scores
    first = scores.product
    batch, row, column = letters[:-2], letters[-2], letters[-1]
    if column in last.out or column not in right[2]:
        return "the softmax is not over the axis that the last product sums"
    width = set(right[2]) - set(batch) - {column}
    if len(width) != 1 or set(right[2]) != set(batch) | {column} | width or row in right[2]:
        return "the values do not have the batch axes of the probabilities"
    (channel,) = width
    sides = _query_and_key(first)
    if isinstance(sides, str):
        return sides
    masks = scores.masks
    if first.addend is not None:
        masks = masks.with_added(first.addend[1], scores.factor * first.weight)

    ranks = [len(letters), len(first.out), *(len(view.shape(m) or ()) for m in masks.values())]
    rank = max(4 if apart else 2, *ranks)
    if rank > 4:
        return f"{rank} axes; at most batch, heads, rows and width are fused"
    factor = scores.factor * first.scale
    operands = []
    for value, axes, wanted, scaled in (*sides, (right[1], right[2], (*batch, column, channel), False)):
        operand, number, refused = _operand(view, value, axes, wanted, rank, scaled)
        if operand is None:
            return refused
        operands.append(operand)
        factor *= number
    query, key, content = operands
    if (why := _other_batch(view, query, key, content)) is not None:
        return why
    shape = _scores_shape(view, query, key)
    if (why := masks.check(view, shape)) is not None:
        return why
    out: tuple[int, ...] = tuple((*batch, row, channel).index(c) for c in last.out)
    flat: tuple[Any, ...] | None = None
    if rank != len(letters):
        if out != tuple(range(len(out))):
            return "the result is transposed while its heads are merged"
        out = tuple(range(rank))
        result = (shape[-2], (view.shape(content.value) or ())[content.perm[-1]])
        if not apart:
            if not all(isinstance(d, int) for d in result):
                return "heads are merged into the batch axis, and the result's size is not static"
            flat = (-1, *result)
    elif apart:
        return "the product is taken apart into heads twice"
    plan = _ungroup(view, Plan(query, key, content, factor, masks, out=out, flat=flat))
    found.attrs["plan"] = plan
    folded = (*plan.query.folded, *plan.key.folded, *plan.value.folded)
    return view.obstacle((*inner_values(found, root), *folded), root)


def _other_batch(view: GraphView[V], query: Operand[V], key: Operand[V], content: Operand[V]) -> str | None:
    """Matrix products broadcast batch axes; the fused operator only takes one key head for all query heads."""
    q, k, v = ([(view.shape(o.value) or ())[a] for a in o.perm[:-2]] for o in (query, key, content))
    heads = len(q) == 2 and k[1] == v[1] == 1 and isinstance(q[1], int)
    if k != v or q[: 1 if heads else None] != k[: 1 if heads else None]:
        return f"the batch axes of queries {tuple(q)}, keys {tuple(k)} and values {tuple(v)} differ"
    return None


def _scores_shape(view: GraphView[V], query: Operand[V], key: Operand[V]) -> tuple[Any, ...]:
    """(batch…, rows, keys)."""
    q, k = view.shape(query.value) or (), view.shape(key.value) or ()
    return (*(q[a] for a in query.perm[:-1]), k[key.perm[-2]])


def _query_and_key(
    first: Contraction[V],
) -> tuple[tuple[V, str, tuple[str, ...], bool], tuple[V, str, tuple[str, ...], bool]] | str:
    """Which operand of the first product is the query: the one that has the scores' row axis."""
    batch, row, column = first.out[:-2], first.out[-2], first.out[-1]
    for query, key in (first.sides, first.sides[::-1]):
        shared = set(query[2]) & set(key[2]) - set(first.out)
        if len(shared) != 1:
            return "the first product does not sum over exactly one axis"
        (depth,) = shared
        if set(query[2]) == {*batch, row, depth} and set(key[2]) == {*batch, column, depth}:
            return (query[1], query[2], (*batch, row, depth), True), (key[1], key[2], (*batch, column, depth), True)
    return "the first product's operands do not share the scores' batch axes"


def _operand(
    view: GraphView[V], value: V, letters: str, wanted: tuple[str, ...], rank: int, scaled: bool
) -> tuple[Operand[V] | None, float, str]:
    """Fold transposes (and factors, if ``scaled``) into the axes order; take merged heads apart if ``rank`` asks."""
    value, letters, factor, folded = _fold(view, value, letters, scaled)
    if len(letters) < rank:
        source = same_heads(view, value)
        if source is None or len(letters) != 3 or letters[0] != wanted[0]:
            return None, factor, "heads are merged into the batch axis in a way that cannot be undone"
        wanted, merged = ("P", "Q", *wanted[1:]), value
        value, letters, more, apart = _fold(view, source, "PQ" + letters[1:], scaled)
        factor, folded = factor * more, (*folded, merged, through(view, merged), *apart)
    return Operand(value, tuple(letters.index(c) for c in wanted), folded), factor, ""


def _fold(view: GraphView[V], value: V, letters: str, scaled: bool) -> tuple[V, str, float, tuple[V, ...]]:
    """Look through transposes and identities, and, if ``scaled``, through constant factors and widening casts."""
    factor, folded = 1.0, []
    while (op := view.op(value)) is not None and op.inputs and (inner := op.inputs[0]) is not None:
        if op.name == "transpose":
            perm = op.attrs["perm"]
            letters = "".join(letters[perm.index(a)] for a in range(len(letters)))
        elif scaled and op.name in ("mul", "div"):
            number, other = scalar(view, op.inputs[1]), op.inputs[1]
            if number is None and op.name == "mul" and other is not None and scalar(view, inner) is not None:
                inner, number = other, scalar(view, inner)
            if not number or view.shape(inner) != view.shape(value):
                break
            factor = factor * number if op.name == "mul" else factor / number
        elif scaled and op.name == "cast":
            if op.attrs["to"] != "float32" or view.dtype(inner) not in ("float16", "bfloat16"):
                break
        elif op.name != "identity":
            break
        folded.append(value)
        value = inner
    return value, letters, factor, tuple(folded)


def _ungroup(view: GraphView[V], plan: Plan[V]) -> Plan[V]:
    """Grouped queries: keys and values repeated over query heads are read unrepeated, where both are."""
    if len(plan.key.perm) != 4:
        return plan
    read = [_unrepeated(view, o) for o in (plan.key, plan.value)]
    if read[0] is None or read[1] is None or read[0][1] != read[1][1]:
        return plan
    return replace(plan, key=read[0][0], value=read[1][0])


def _unrepeated(view: GraphView[V], operand: Operand[V]) -> tuple[Operand[V], int] | None:
    op = view.op(operand.value)
    if op is None or op.name != "repeat" or op.inputs[0] is None or operand.perm[1] != op.attrs["axis"]:
        return None
    value, letters, _, apart = _fold(view, op.inputs[0], "".join("abcd"[a] for a in range(4)), scaled=False)
    folded = (*operand.folded, operand.value, *apart)
    return Operand(value, tuple(letters.index("abcd"[a]) for a in operand.perm), folded), op.attrs["times"]


@dataclass(frozen=True)
class FusedAttention:
    """Matches an operator that already is attention (torch's SDPA, ONNX Attention); binds ``plan``."""

    def search(self, view: GraphView[V], value: V | None, found: Match[V]) -> str | None:
        op: OpView[V] | None = view.op(value) if value is not None else None
        if value is None or op is None or op.name != "sdpa":
            return "no attention operator"
        found.ops.append("sdpa")
        query, key, content, mask = op.inputs
        assert query is not None
        assert key is not None
        assert content is not None
        shapes = [view.shape(v) for v in (query, key, content)]
        if any(s is None or not 2 <= len(s) <= 4 for s in shapes):
            return f"operands of shapes {shapes}; 2 to 4 axes are fused"
        if len({len(s) for s in shapes if s is not None}) != 1:
            return f"operands of shapes {shapes} have different numbers of axes"
        width = (shapes[0] or ())[-1]
        scale = op.attrs.get("scale")
        if scale is None:
            if not isinstance(width, int):
                return f"the scale is 1/sqrt(width), and the width {width} is not static"
            scale = width**-0.5
        if not isinstance(scale, (int, float)):
            return "the scale is not a number"
        axes = tuple(range(len(shapes[0] or ())))
        masks: Masks[V] = Masks() if mask is None else of_fused(view, mask)
        q, k, v = (Operand(o, axes) for o in (query, key, content))
        shape = (*(shapes[0] or ())[:-1], (shapes[1] or ())[-2])
        if (why := masks.check(view, shape)) is not None:
            return why
        if any(a[:-2] != b[:-2] for a, b in ((shapes[1] or (), shapes[2] or ()),)):
            return f"keys {shapes[1]} and values {shapes[2]} differ in batch or heads"
        if len(shape) > 2 and (shapes[0] or ())[0] != (shapes[1] or ())[0]:
            return f"queries {shapes[0]} and keys {shapes[1]} differ in batch"
        if len(shape) == 4:
            few, many = (shapes[1] or ())[1], (shapes[0] or ())[1]
            if few != many and not (isinstance(few, int) and isinstance(many, int) and few and many % few == 0):
                return f"{many} heads of queries do not divide into {few} of keys"
        found.attrs["plan"] = Plan(q, k, v, float(scale), masks, bool(op.attrs["causal"]), axes)
        return None


def _bring(view: GraphView[V], operand: Operand[V], dtype: str | None, root: V) -> V:
    """Emit the operand as (B, H, rows, width) of type ``dtype``."""
    value = operand.value
    if operand.perm != tuple(range(len(operand.perm))):
        value = view.emit("transpose", [value], {"perm": operand.perm}, at=root)
    if dtype is not None and view.dtype(value) != dtype:
        value = view.emit("cast", [value], {"to": dtype}, at=root)
    for _ in range(4 - len(operand.perm)):
        value = view.emit("unsqueeze", [value], {"axes": (0,)}, at=root)
    return value


def _widest(dtypes: Iterable[str | None]) -> str | None:
    """The type to compute in: no operand is rounded, and neither is the product that casts led to."""
    known = {d for d in dtypes if d is not None}
    for wide in ("float64", "float32"):
        if wide in known:
            return wide
    return known.pop() if len(known) == 1 else "float32" if known else None


def _replace(view: GraphView[Any], found: Match[Any], root: Any) -> Any:
    plan: Plan[Any] = found.attrs["plan"]
    dtype = _widest(view.dtype(v) for v in (root, plan.query.value, plan.key.value, plan.value.value))
    query, key, value = (_bring(view, o, dtype, root) for o in (plan.query, plan.key, plan.value))
    mask = combine(view, plan.masks, query, root)
    attrs = {"scale": plan.scale, "causal": plan.causal or mask.causal}
    result = view.emit("attention", [mask.query, key, value, mask.value], attrs, at=root)
    for _ in range(4 - len(plan.query.perm)):
        result = view.emit("squeeze", [result], {"axes": (0,)}, at=root)
    if plan.out != tuple(range(len(plan.out))):
        result = view.emit("transpose", [result], {"perm": plan.out}, at=root)
    if plan.flat is not None:
        result = view.emit("reshape", [result], {"shape": plan.flat}, at=root)
    if (wanted := view.dtype(root)) is not None and wanted != view.dtype(result):
        result = view.emit("cast", [result], {"to": wanted}, at=root)
    return result


def _variant(found: Match[Any]) -> str:
    plan: Plan[Any] = found.attrs["plan"]
    return "causal" if plan.causal else "masked" if plan.masks else "plain"


ATTENTION = Rule(
    name="attention",
    spellings=(("operator", FusedAttention()), ("softmax", SoftmaxAttention())),
    replace=_replace,
    anchors=frozenset({"softmax", "sdpa"}),
    variant=_variant,
)
