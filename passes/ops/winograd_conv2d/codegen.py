"""Winograd's transforms as straight-line C++: one struct a tile size, written from the exact matrices.

Points come in pairs +-p, whose rows differ in the signs of every second term: both are made from one even and one odd
sum. Factors of one cost nothing. The compiler contracts products and sums into fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from hasten.passes.ops.winograd_conv2d.transforms import POINTS, Matrix, Transform, transform


def header() -> str:
    """The whole generated header: ``F23``, ``F43``, … with ``M``, ``R``, ``T``, ``G``, ``input``, ``output``."""
    structs = (_struct(transform(m, r)) for m, r in POINTS)
    return "// Written by hasten.passes.ops.winograd_conv2d.codegen.\n#pragma once\n\n" + "\n".join(structs)


def _struct(f: Transform) -> str:
    return (
        f"struct F{f.m}{f.r} {{\n  static constexpr int M = {f.m}, R = {f.r}, T = {f.t};\n"
        f"  static constexpr double G[T][R] = {{{_table(f.g)}}};\n"
        f"  static inline void input(const vf* d, vf* y) {{\n{_body(_rows(f.bt))}  }}\n"
        f"  static inline void output(const vf* d, vf* y) {{\n{_body(_columns(f.at))}  }}\n}};\n"
    )


def _table(rows: Matrix) -> str:
    return ", ".join("{" + ", ".join(repr(float(x)) for x in row) + "}" for row in rows)


def _body(lines: Sequence[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)


def _rows(rows: Matrix) -> list[str]:
    """``y[i] = sum_j rows[i][j] d[j]``, two rows of opposite points from one even and one odd sum."""
    lines, done = [], set[int]()
    for i, row in enumerate(rows):
        if i in done:
            continue
        partner = next((k for k in range(i + 1, len(rows)) if k not in done and _mirrored(row, rows[k])), None)
        if partner is None:
            lines.append(f"y[{i}] = {_sum(row)};")
            continue
        done.add(partner)
        even = [c if j % 2 == 0 else Fraction(0) for j, c in enumerate(row)]
        odd = [c if j % 2 else Fraction(0) for j, c in enumerate(row)]
        first = next(j for j, c in enumerate(row) if c)
        plus = rows[partner][first] == row[first] if first % 2 == 0 else rows[partner][first] == -row[first]
        lines.append(f"const vf e{i} = {_sum(even)}, o{i} = {_sum(odd)};")
        lines.append(f"y[{i}] = e{i} + o{i};")
        lines.append(f"y[{partner}] = {f'e{i} - o{i}' if plus else f'o{i} - e{i}'};")
    return lines


def _mirrored(a: Sequence[Fraction], b: Sequence[Fraction]) -> bool:
    signs = {y / x * (-1) ** j for j, (x, y) in enumerate(zip(a, b, strict=True)) if x and y}
    same = all(bool(x) == bool(y) for x, y in zip(a, b, strict=True))
    return same and signs in ({Fraction(1)}, {Fraction(-1)}) and sum(map(bool, a)) > 1


def _columns(rows: Matrix) -> list[str]:
    """``y[i] = sum_j rows[i][j] d[j]``, with the sum and difference of opposite points' columns taken once."""
    width, lines, done = len(rows[0]), [], set[int]()
    columns = [[row[j] for row in rows] for j in range(width)]
    terms: list[dict[str, Fraction]] = [{} for _ in rows]
    for j, column in enumerate(columns):
        if j in done:
            continue
        partner = next((k for k in range(j + 1, width) if _mirrored(column, columns[k])), None)
        if partner is None:
            for i, c in enumerate(column):
                terms[i][f"d[{j}]"] = c
            continue
        done.add(partner)
        lines.append(f"const vf s{j} = d[{j}] + d[{partner}], m{j} = d[{j}] - d[{partner}];")
        for i, c in enumerate(column):
            terms[i][f"{'m' if i % 2 else 's'}{j}"] = c
    return [*lines, *(f"y[{i}] = {_linear(term)};" for i, term in enumerate(terms))]


def _sum(row: Sequence[Fraction]) -> str:
    return _linear({f"d[{j}]": c for j, c in enumerate(row)})


def _linear(terms: dict[str, Fraction]) -> str:
    """Terms of factor one first, so that every other one is a multiply-add onto them."""
    present = sorted(((v, c) for v, c in terms.items() if c), key=lambda item: abs(item[1]) != 1)
    text = ""
    for value, c in present:
        sign = "-" if c < 0 else "+"
        factor = value if abs(c) == 1 else f"{float(abs(c))!r}f * {value}"
        text = f"{text} {sign} {factor}" if text else (f"-({factor})" if c < 0 else factor)
    return text
