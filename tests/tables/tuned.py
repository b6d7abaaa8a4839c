"""Whether a measured choice is ever slower than the library's own convolution, over the layers of registered models.

``python tests/tables/tuned.py [--threads N] [MODEL …]`` tunes every distinct 3x3 layer of the models, in a store of
its own, and then times what was chosen against the library once more, in another run. Exit code 3 where a choice is
more than 3 % slower the second time too.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from hasten.backends.layers import layer_word, layers_of
from hasten.backends.tuning import TunedChooser
from hasten.backends.tuning_machine import native_kernels
from hasten.backends.tuning_measure import measure
from hasten.backends.tuning_runners import TorchRunners
from hasten.backends.tuning_store import Store
from hasten.models.registry import get
from hasten.passes.choice import DIRECT, Layer, Limits
from hasten.passes.ops.winograd_conv2d.select import candidates

MODELS = ("sd15-unet", "sd15-vae-decoder", "sdxl-unet", "scenes-unet")
WORST = 1.03


def layers(name: str, threads: int) -> Counter[Layer]:
    """Count a model's distinct layers; its weights, gigabytes of them, are not made for that."""
    adapter = get(name)
    inputs = {key: value.to("meta") for key, value in adapter.example_inputs().items()}
    program = torch.export.export(adapter.skeleton(), (), inputs, strict=False)
    return Counter(replace(layer, device="cpu") for layer in layers_of(program, threads=threads))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    slower = []
    with tempfile.TemporaryDirectory() as folder:
        chooser = TunedChooser(Store(Path(folder) / "tuning.json", native=native_kernels()), mode="on")
        for name in args.models:
            sites = layers(name, args.threads)
            chosen: Counter[str] = Counter()
            ratios = {}
            for layer in sites:
                choice = chooser(layer, candidates(layer, Limits())[0])
                chosen[choice.name] += sites[layer]
                if choice.name == DIRECT:
                    continue
                again = measure(layer, [DIRECT, choice.name], TorchRunners()).timings
                ratios[layer] = again[choice.name].seconds / again[DIRECT].seconds
            over = {layer: ratio for layer, ratio in ratios.items() if ratio > WORST}
            slower += [(name, layer, ratio) for layer, ratio in over.items()]
            worst = max(ratios.values(), default=1.0)
            total = ", ".join(f"{count} {form}" for form, count in chosen.most_common())
            print(
                f"{name:20} {sum(sites.values()):3} sites, {len(sites):2} distinct: {total}; "
                f"slowest choice {worst:.2f} of the library's time",
                flush=True,
            )
    for name, layer, ratio in slower:
        print(f"SLOWER {name} {layer_word(layer)}: {ratio:.3f}")
    return 3 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
