"""``hasten tune``: times the implementations of a model's convolutions and keeps what was found."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hasten.backends.layers import is_layer, layer_word, layers_of, parse_layer
from hasten.errors import UsageError
from hasten.tools.arguments import DTYPES, one_of, source_options, whole
from hasten.tools.bench_machine import pinned
from hasten.tools.console import Console, duration, quantity, table
from hasten.tools.source import MODEL, PROGRAM, resolve

if TYPE_CHECKING:
    from hasten.backends.tuning_file import Measurement
    from hasten.backends.tuning_store import Store
    from hasten.passes.choice import Choice, Layer

SUMMARY = "Time the implementations of a model's 3x3 convolutions on this machine, and keep the times for later builds."
EXAMPLES = (
    "hasten tune sd15-unet --threads 2",
    "hasten tune conv:320-320@64x64,batch=2 upsample-conv:512-512@64x64",
    "hasten tune --show",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="*",
        help=".pt2 file, model name, diffusers directory, or a layer, as in conv:320-320@64x64,batch=2",
    )
    parser.add_argument("--show", action="store_true", help="show what is kept for this machine; time nothing")
    parser.add_argument("--clear", action="store_true", help="remove the file of times, other machines' included")
    parser.add_argument("--again", action="store_true", help="time layers that are kept already as well")
    parser.add_argument("--threads", type=whole(1), metavar="N", help="threads of a layer (default: torch's number)")
    parser.add_argument("--rounds", type=whole(1), metavar="N", help="time each implementation at most so often")
    parser.add_argument("--dtype", type=one_of(DTYPES), help="convert named models first")
    source_options(parser)


def run(args: argparse.Namespace, console: Console) -> int:
    """Time what is missing, or show or remove what there is."""
    _check(args)
    from hasten.backends.tuning_machine import native_kernels
    from hasten.backends.tuning_store import Store

    if args.clear:
        return _clear(Store(native=""), console)  # which kernels the times are of does not matter
    if args.show:
        return _show(Store(native=native_kernels(load=False)), console)
    sites = Counter(_layers(args, console))
    store = Store(native=_kernels(sites, console))
    rows = _tune(store, sites, args, console)
    if rows:
        failures = _failures((layer, known) for layer, (_, known) in rows.items())
        console.show(_table(rows, sites), *failures, "", _sum(rows, sites))
    else:
        console.show("there is no 3x3 convolution with stride 1 and known sizes: nothing to choose")
    console.document(
        {
            "file": str(store.path),
            "layers": [
                {
                    **choice.as_dict(),
                    "layer": layer_word(layer),
                    "sites": sites[layer],
                    "measurement": _as_dict(measurement),
                }
                for layer, (choice, measurement) in rows.items()
            ],
        }
    )
    return 0


Rows = dict["Layer", tuple["Choice", "Measurement | None"]]


def _check(args: argparse.Namespace) -> None:
    if args.show and args.clear:
        raise UsageError("--show and --clear were given; give one of them")
    for option, given in (("--show", args.show), ("--clear", args.clear)):
        if given and args.sources:
            raise UsageError(f"{option} takes no source, and '{args.sources[0]}' was given")
    if not (args.sources or args.show or args.clear):
        raise UsageError(
            "no source was given; name a model, or a layer as in conv:320-320@64x64,batch=2; --show shows what is kept"
        )


def _layers(args: argparse.Namespace, console: Console) -> list[Layer]:
    found: list[Layer] = []
    models = []
    for word in args.sources:  # what is wrong with a later word is told before an earlier one is captured
        if not is_layer(word):
            kinds = (PROGRAM, MODEL)
            models.append(resolve(word, kinds=kinds, reduced=args.reduced, weights=args.weights))
    if args.threads is not None:
        pinned(args.threads)  # refuses more threads than processors
    threads = args.threads or _torch_threads()
    found += [parse_layer(word, threads=threads) for word in args.sources if is_layer(word)]
    for option, given in (("--reduced", args.reduced), ("--weights", args.weights), ("--dtype", args.dtype)):
        if given and not models:
            raise UsageError(f"{option} is for named models, and only layers were given")
    for source in models:
        with console.progress(source.text) as tell:
            tell("capture", 0.0)
            program = source.program(args.dtype)
            tell("find convolutions", 0.5)
            found += layers_of(program, threads=threads)
    return found


def _kernels(layers: Iterable[Layer], console: Console) -> str:
    """The fingerprint of the C++ kernels; says so where layers would use them and there are none."""
    from hasten.backends.tuning_machine import NO_KERNELS, native_kernels
    from hasten.passes.ops.native import build

    found = native_kernels()
    if found == NO_KERNELS and any(layer.device == "cpu" for layer in layers):
        console.note(f"builds for the CPU keep the library's convolutions, whatever is timed now, since {build.load()}")
    return found


def _torch_threads() -> int:
    import torch

    return int(torch.get_num_threads())


def _tune(store: Store, sites: Counter[Layer], args: argparse.Namespace, console: Console) -> Rows:
    """Time every form of every layer, then choose within the default limits."""
    from hasten.backends.tuning import TunedChooser
    from hasten.backends.tuning_measure import ROUNDS
    from hasten.passes.choice import Limits
    from hasten.passes.ops.winograd_conv2d.select import candidates

    chooser = TunedChooser(store, rounds=args.rounds or ROUNDS)
    rows: Rows = {}
    with console.progress("timing") as tell:
        for count, layer in enumerate(sites):
            tell(f"{layer_word(layer)}, {count + 1} of {len(sites)}", count / len(sites))
            every, _ = candidates(layer, Limits(max_error=None))
            known = chooser.fill(layer, [c.name for c in every], again=args.again) if len(every) > 1 else None
            rows[layer] = chooser(layer, candidates(layer, Limits())[0]), known
    return rows


def _table(rows: Rows, sites: Counter[Layer]) -> Any:
    columns = _columns(known for _, known in rows.values())
    shown = table("layer", ">sites", "chosen", ">predicted", *(f">{c}" for c in columns), ">more weights")
    for layer, (choice, known) in rows.items():
        extra = quantity(choice.candidate.weight_bytes, "B") if choice.candidate.weight_bytes else ""
        predicted = duration(choice.candidate.predicted_seconds)
        times = _times(known, columns)
        shown.add_row(layer_word(layer), str(sites[layer]), choice.name, predicted, *times, extra)
    return shown


def _columns(measurements: Iterable[Measurement | None]) -> list[str]:
    """``direct``, and the tiles that any layer has; ``f4`` stands for both of its forms."""
    return sorted({_column(name) for m in measurements if m is not None for name in m.names})


def _column(name: str) -> str:
    return name.rpartition("-")[2]


def _times(known: Measurement | None, columns: list[str]) -> list[str]:
    cells = dict.fromkeys(columns, "")
    if known is not None:
        for name in known.names:
            timing = known.timings.get(name)
            way = f" ({timing.way})" if timing is not None and timing.way == "phases" else ""
            cells[_column(name)] = "failed" if timing is None else f"{duration(timing.seconds)}{way}"
    return list(cells.values())


def _failures(known: Iterable[tuple[Layer, Measurement | None]]) -> list[str]:
    return [
        f"{name} of {layer_word(layer)} failed: {reason}"
        for layer, measurement in known
        if measurement is not None
        for name, reason in measurement.failed.items()
    ]


def _sum(rows: Rows, sites: Counter[Layer]) -> str:
    timed = [(choice, sites[layer]) for layer, (choice, _) in rows.items() if choice.measured_seconds]
    if not timed:
        return "nothing was timed: no layer has more than one implementation"
    direct = sum(choice.measured_seconds["direct"] * count for choice, count in timed)
    chosen = direct - sum(choice.saved_seconds * count for choice, count in timed)
    total = sum(count for _, count in timed)
    return (
        f"{total} timed site{'s' if total != 1 else ''}: {duration(direct)} direct, {duration(chosen)} as chosen "
        f"({direct / chosen:.2f} times as fast)"
    )


def _show(store: Store, console: Console) -> int:
    kept, foreign = store.here(), store.foreign()
    columns = _columns(kept.values())
    shown = table("layer", *(f">{c}" for c in columns), "date")
    for layer, measurement in kept.items():
        shown.add_row(layer_word(layer), *_times(measurement, columns), measurement.date)
    if kept:
        console.show(shown, *_failures(kept.items()), "")
    console.show(summary(store))
    console.document(
        {
            "file": str(store.path),
            "layers": [{"layer": layer_word(layer), "measurement": _as_dict(m)} for layer, m in kept.items()],
            "foreign": foreign,
        }
    )
    return 0


def summary(store: Store) -> str:
    """Where the file is, and what it holds."""
    here, foreign = len(store.here()), store.foreign()
    return (
        f"{store.path}: {here} layer{'s' if here != 1 else ''} timed on this machine, "
        f"{foreign} of other machines or versions"
    )


def _clear(store: Store, console: Console) -> int:
    count, removed = store.clear()
    if removed:
        console.show(f"removed {' and '.join(map(str, removed))}: {_layers_in_words(count)}")
    else:
        console.show(f"there is no {store.path}: nothing to remove")
    console.document({"removed": [str(path) for path in removed], "layers": count})
    return 0


def _layers_in_words(count: int) -> str:
    return f"{count} timed layer{'s' if count != 1 else ''}"


def _as_dict(measurement: Measurement | None) -> dict[str, Any] | None:
    return None if measurement is None else asdict(measurement)
