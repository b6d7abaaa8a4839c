"""The plots of ``hasten calibrate``: what was recorded, call by call, and what was fitted to it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.errors import need
from hasten.tools.files import replace

if TYPE_CHECKING:
    from hasten.backends.calibrate_file import Calibration

_ONE, _FIT = "#94a3b8", "#c2410c"


def require() -> None:
    """Raise `MissingPackageError` where there is no matplotlib; before anything is recorded, not after."""
    need("matplotlib", extra="bench")


def write(calibration: Calibration, path: Path) -> None:
    """Draw a panel for everything that was recorded and fitted, and the mask below."""
    need("matplotlib", extra="bench")
    from matplotlib.figure import Figure

    samples = calibration.samples
    panels: dict[Callable[[Any, Calibration], None], bool] = {
        _changes: bool(samples),
        _polynomial: "polynomial" in calibration.fit,
        _ratios: any(len(s.ratios) for s in samples),
        _errors: any(s.errors for s in samples),
        _mask: True,
    }
    draw = [panel for panel, there in panels.items() if there]
    figure = Figure(figsize=(7, 2.6 * len(draw)), layout="constrained")
    figure.suptitle(f"{calibration.model}, {calibration.kind}, {len(calibration.samples)} runs", fontsize=9)
    for axes, panel in zip(figure.subplots(len(draw), 1, squeeze=False).flatten(), draw, strict=True):
        panel(axes, calibration)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
        axes.xaxis.label.set_size(7)
        axes.yaxis.label.set_size(7)
    replace(path, lambda partial: figure.savefig(partial, dpi=150))


def _changes(axes: Any, calibration: Calibration) -> None:
    """Relative distance of each call from the one before, averaged over the runs."""
    for name in ("signal", "residual", "value", "output"):
        curves = [s.values[name].to_next()[1:] for s in calibration.samples if name in s.values]
        if curves:
            axes.plot(range(1, calibration.steps), np.mean(curves, axis=0), label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="relative L1 change", yscale="log")
    axes.legend(fontsize=6)


def _polynomial(axes: Any, calibration: Calibration) -> None:
    found = calibration.fit["polynomial"]
    for sample in calibration.samples:
        x, y = (sample.values[name].to_next()[1:] for name in ("signal", found["against"]))
        axes.scatter(x, y, s=3, color=_ONE)
    grid = np.linspace(found["low"], found["high"], 200)
    axes.plot(grid, np.polyval(found["coefficients"], grid), color=_FIT, linewidth=1)
    axes.set(xlabel="change of the signal", ylabel=f"change of the {found['against']}")
    axes.set_title(f"order {found['order']}, R^2 {found['r2']:.3f}", fontsize=7, loc="left")


def _ratios(axes: Any, calibration: Calibration) -> None:
    for sample in calibration.samples:
        axes.plot(range(1, calibration.steps), sample.ratios[1:], color=_ONE, linewidth=0.5)
    mean = np.mean([s.ratios[1:] for s in calibration.samples], axis=0)
    axes.plot(range(1, calibration.steps), mean, color=_FIT, linewidth=1)
    axes.set(xlabel="step", ylabel="|R_n| / |R_n-1|")


def _errors(axes: Any, calibration: Calibration) -> None:
    for kind in calibration.samples[0].errors:
        rows = np.mean([s.errors[kind] for s in calibration.samples], axis=0)
        for apart, row in enumerate(rows[:3], 1):
            axes.plot(range(calibration.steps), row, label=f"{kind}, {apart} later", linewidth=1)
    axes.set(xlabel="step", ylabel="relative L1 error")
    axes.legend(fontsize=6)


def _mask(axes: Any, calibration: Calibration) -> None:
    bits = calibration.fit["predicted"]["mask"]
    axes.bar(range(len(bits)), [int(b) for b in bits], color=_FIT, width=0.8)
    axes.set(xlabel="step", ylabel="computed", yticks=[0, 1])
