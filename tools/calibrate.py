"""``hasten calibrate``: records runs of a model, fits a step cache to them, and writes what ``--cache`` reads."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten.errors import UsageError
from hasten.tools.arguments import DTYPES, number, one_of, positive, source_options, whole
from hasten.tools.console import Console, quantity, table
from hasten.tools.files import check_output
from hasten.tools.source import MODEL, resolve

if TYPE_CHECKING:
    from hasten.backends.calibrate import Subject
    from hasten.backends.calibrate_file import Calibration
    from hasten.backends.calibrate_fit import Fitted, Wishes
    from hasten.backends.calibrate_runs import Draw

SUMMARY = "Record a model's runs, fit a step cache's numbers to them or search a mask, and write a file for --cache."
EXAMPLES = (
    "hasten calibrate scenes-dit --cache teacache --speedup 2 -o teacache.json",
    "hasten calibrate scenes-dit --cache mask --speedup 3 --budget 200 -o mask.json",
    "hasten calibrate --merge first.json second.json --speedup 3 -o both.json",
)
PLOTS = (".png", ".svg", ".pdf")
SAMPLES, DISTANCE = 8, 12


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("source", metavar="SOURCE", nargs="?", help="model name or diffusers directory")
    parser.add_argument(
        "--cache",
        metavar="POLICY",
        help="teacache, magcache, smoothcache, first-block, dbcache, easycache, fora, deepcache, or mask, which is "
        "searched; with options as in mask:granularity=deep",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.json", help="the calibration file")
    parser.add_argument("--region", metavar="FIRST:LAST", help="the blocks that a reused step leaves out")
    runs = parser.add_argument_group("recorded runs (a file that an interrupted recording left is gone on with)")
    runs.add_argument("--steps", type=whole(3), default=50, metavar="N", help="steps of a run (default 50)")
    runs.add_argument("--samples", type=whole(1), default=SAMPLES, metavar="N", help=f"runs (default {SAMPLES})")
    runs.add_argument(
        "--labels", type=_labels, metavar="N,…", help="classes of a bundled model, instead of all in turn"
    )
    runs.add_argument(
        "--seed", type=whole(0), default=0, metavar="S", help="of the first run, then S + 1, … (default 0)"
    )
    runs.add_argument("--guidance", type=number, metavar="G", help="of a bundled model (default 2; 1: none)")
    runs.add_argument(
        "--distance", type=whole(1), metavar="K", help=f"calls over which changes are measured (default {DISTANCE})"
    )
    runs.add_argument("--dtype", type=one_of(DTYPES), default="float32", help="convert the model first")
    runs.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="put recordings together, and fit them all")
    wishes = parser.add_argument_group("what is wanted")
    wishes.add_argument(
        "--speedup", type=positive, metavar="X", help="predicted from the operations left out (default 2)"
    )
    wishes.add_argument("--alpha", type=number, metavar="E", help="smoothcache: the error bound, instead of a speed-up")
    wishes.add_argument(
        "--order", type=whole(1), default=4, metavar="N", help="teacache: of the polynomial (default 4)"
    )
    wishes.add_argument(
        "--against",
        type=one_of(("residual", "output")),
        default="residual",
        help="teacache: what the polynomial estimates the change of (default residual)",
    )
    search = parser.add_argument_group("search of a mask (mask:… tries nothing but two first guesses without these)")
    search.add_argument(
        "--budget", type=whole(0), default=0, metavar="N", help="masks to try by annealing and climbing"
    )
    search.add_argument("--seconds", type=positive, default=float("inf"), metavar="S", help="and how long at most")
    search.add_argument(
        "--segments", type=whole(0), default=0, metavar="K", help="try each segment of up to K reuses first"
    )
    search.add_argument(
        "--tries", type=whole(1), default=4, metavar="N", help="runs that a mask is tried on (default 4)"
    )
    search.add_argument(
        "--check", type=whole(0), default=4, metavar="N", help="runs, on other seeds, that the result is tried on"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw the recorded curves and the fit (.png, .svg, .pdf)"
    )
    source_options(parser)


def _labels(text: str) -> list[int]:
    words = text.split(",")
    if not all(w.isdecimal() for w in words):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of classes, as in 0,5,10")
    return [int(w) for w in words]


def run(args: argparse.Namespace, console: Console) -> int:
    """Record or merge, fit or search, check, write."""
    from hasten.backends.calibrate import check, find_mask, finished, record, resume
    from hasten.backends.calibrate_fit import check_wishes, fit, is_recorded, requested
    from hasten.backends.calibrate_search import Bounds

    check_output(args.output, ".json")
    if args.plot is not None:
        from hasten.tools.calibrate_plot import require

        require()
        check_output(args.plot, *PLOTS)
    wishes = _wishes(args)
    if args.merge is not None:
        return _merge(args, wishes, console)
    if args.source is None or args.cache is None:
        raise UsageError("give a model and --cache POLICY to record, or --merge FILE… to fit what was recorded")
    request, _ = requested(args.cache)
    check_wishes(request.name, wishes)
    _check_search(args, request.name)
    resolve(args.source, kinds=(MODEL,), reduced=args.reduced, weights=args.weights)
    with console.progress(f"calibrating {args.source}") as tell:
        tell("capturing", 0.0)
        subject = _subject(args, DISTANCE if args.distance is None else args.distance)
        calibration = resume(subject.blank, args.output)
        draws = subject.runs.draws(args.samples, args.seed, args.labels)
        others = subject.runs.draws(args.check, args.seed + 10_000, args.labels)
        tries = draws[: args.tries]
        draws = draws if is_recorded(request.name) else []
        console.note(_before(subject, calibration, draws))
        if draws:
            calibration = record(subject, calibration, draws, args.output, tell)
        if request.name == "mask":
            bounds = Bounds(args.budget, args.seconds, args.segments, args.seed)
            calibration, fitted = find_mask(subject, calibration, tries, wishes, bounds, args.output, tell)
        else:
            fitted = fit(calibration, wishes)
        checked = check(subject, request.name, fitted, others, tell) if others else None
    calibration = finished(calibration, fitted, checked)
    calibration.write(args.output)
    return _tell(calibration, fitted, args, console)


def _merge(args: argparse.Namespace, wishes: Wishes, console: Console) -> int:
    from hasten.backends.calibrate import finished
    from hasten.backends.calibrate_file import merge, read
    from hasten.backends.calibrate_fit import fit, requested

    for option, given in (("a model", args.source), ("--region", args.region), ("--labels", args.labels)):
        if given:
            raise UsageError(f"--merge fits what was recorded, and {option} was given: {given!r}; leave it out")
    calibration = merge([read(path) for path in args.merge], [str(path) for path in args.merge])
    if args.cache is not None:
        request, _ = requested(args.cache)
        if request.name != calibration.kind:
            raise UsageError(f"--cache {args.cache}: the files are recordings for {calibration.kind}")
        calibration = replace(calibration, request=args.cache)
    fitted = fit(calibration, wishes)
    calibration = finished(calibration, fitted, None)
    calibration.write(args.output)
    return _tell(calibration, fitted, args, console)


def _subject(args: argparse.Namespace, distance: int) -> Subject:
    from hasten.backends.calibrate import subject

    source = resolve(args.source, kinds=(MODEL,), reduced=args.reduced, weights=args.weights)
    adapter = source.adapter()
    return subject(
        adapter,
        args.cache,
        steps=args.steps,
        guidance=args.guidance,
        dtype=args.dtype,
        region=args.region,
        distance=distance,
        weights=str(args.weights or ("its own" if adapter.trained else "random")),
    )


def _wishes(args: argparse.Namespace) -> Wishes:
    from hasten.backends.calibrate_fit import Wishes

    return Wishes(args.speedup, args.alpha, args.order, args.against)


def _check_search(args: argparse.Namespace, name: str) -> None:
    given = {"--budget": args.budget, "--segments": args.segments}
    for option, value in given.items():
        if value and name != "mask":
            raise UsageError(
                f"{option} is for the search of a mask, and {name} is fitted; leave it out, or --cache mask"
            )


def _before(subject: Subject, calibration: Calibration, draws: Sequence[Draw]) -> str:
    """What is about to happen."""
    blank = subject.blank
    cost = (
        f"{blank.model}: {subject.found.summary}; a reused call costs {1 - blank.share:.1%} of a call, and the cache "
        f"carries {quantity(blank.state_bytes, 'B')} at a batch of {blank.shape[0]}"
    )
    if not draws:
        return f"{cost}; nothing needs to be recorded"
    have = {(s.seed, s.label) for s in calibration.samples}
    missing = sum((draw.seed, draw.label) not in have for draw in draws)
    return f"{cost}; recording {missing} of {len(draws)} runs, {missing * blank.steps} calls: {blank.how}"


def _tell(calibration: Calibration, fitted: Fitted, args: argparse.Namespace, console: Console) -> int:
    for note in fitted.notes:
        console.note(note)
    if args.plot is not None:
        from hasten.tools.calibrate_plot import write

        write(calibration, args.plot)
    console.document(_document(calibration, args))
    console.show(*_lines(calibration), "", f"wrote {args.output}, which --cache takes")
    return 0


def _document(calibration: Calibration, args: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "steps", "dtype", "guidance", "region", "share", "state_bytes", "policy", "options", "fit")
    return {
        **{name: getattr(calibration, name) for name in names},
        "samples": len(calibration.samples),
        "outputs": [str(path) for path in (args.output, args.plot) if path is not None],
    }


def _lines(calibration: Calibration) -> list[Any]:
    fit = calibration.fit
    lines: list[Any] = [f"{calibration.model}, {calibration.kind}, {calibration.steps} steps: {calibration.region}"]
    if calibration.samples:
        lines.append(f"{len(calibration.samples)} recorded runs: {calibration.how}")
    if found := fit.get("polynomial"):
        lines.append(
            f"polynomial of order {found['order']} against the {found['against']}: R^2 {found['r2']:.3f}, residual "
            f"{found['residual']:.3g}, fitted on {found['points']} distances from {found['low']:.3g} to "
            f"{found['high']:.3g}"
        )
        lines.append("coefficients, highest power first: " + " ".join(f"{c:.6g}" for c in found["coefficients"]))
    if rows := fit.get("thresholds"):
        shown = table(">threshold", ">speed-up", ">computed", "mask of the first run")
        for row in rows:
            cells = (f"{row['threshold']:.4g}", f"{row['speedup']:.2f}x", f"{row['computed']:.1f}")
            shown.add_row(*cells, row["mask"])
        lines += ["", shown, ""]
    if stages := fit.get("stages"):
        shown = table("search", ">mean squared error", "mask")
        for name, stage in stages.items():
            shown.add_row(name, f"{stage['error']:.4g}", stage["mask"])
        lines += ["", shown, ""]
    for key in ("alpha", "interval"):
        if key in fit:
            lines.append(f"{key} {fit[key]:.4g}")
    predicted = fit["predicted"]
    lines.append(
        f"predicted: {predicted['mask']}, {predicted['computed']:.3g} of {calibration.steps} calls computed, "
        f"{predicted['speedup']:.2f} times as fast, {quantity(calibration.state_bytes, 'B')} of state"
    )
    if checked := fit.get("checked"):
        count = len(checked["seeds"])
        quality = f"error {checked['relative_rms_error']:.3g} of the result"
        if checked["psnr_db"] is not None:
            quality = f"PSNR {checked['psnr_db']:.2f} dB to uncached, {quality}"
        lines.append(
            f"checked on {count} other seed{'s' if count != 1 else ''}: {quality}; {checked['computed']:.3g} calls "
            f"computed, {checked['speedup']:.2f} times as fast"
        )
    return lines
