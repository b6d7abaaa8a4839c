"""Arrays from and to files: .npz and .npy in; .npz and PNG out. Pickled arrays are never read."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hasten.errors import UsageError
from hasten.tools.files import replace


def read_inputs(words: Sequence[str | Path]) -> dict[str, Any]:
    """``inputs.npz`` and ``NAME=FILE.npy`` (or an .npz with one array) -> tensors by name."""
    found: dict[str, Any] = {}
    for word in words:
        name, equals, file = str(word).partition("=")
        arrays = _load(Path(file if equals else str(word)))
        if equals:
            if len(arrays) != 1:
                raise UsageError(f"{file} holds {len(arrays)} arrays ({', '.join(arrays)}); {name}= takes one")
            arrays = {name: next(iter(arrays.values()))}
        elif "" in arrays:
            raise UsageError(f"{word} holds one array without a name; write NAME={word}")
        for key, array in arrays.items():
            if key in found:
                raise UsageError(f"input {key!r} is given twice")
            found[key] = array
    return found


def _load(path: Path) -> dict[str, Any]:
    import numpy as np
    import torch

    if not path.is_file():
        raise UsageError(f"inputs '{path}': there is no such file; give an .npz file, or NAME=FILE.npy")
    if path.suffix.lower() not in (".npz", ".npy"):
        raise UsageError(
            f"inputs '{path}': the name must end in .npz or .npy, as numpy.savez and numpy.save write them"
        )
    try:
        loaded = np.load(path, allow_pickle=False)
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, KeyError) as error:
        if "allow_pickle" in str(error):
            reason = "it holds Python objects (a pickle), which are never loaded; save plain arrays"
        else:
            reason = "it is not a whole numpy file; write it again"
        raise UsageError(f"cannot read inputs '{path}': {reason}") from error
    for key, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise UsageError(f"inputs '{path}': {key or 'the array'} is {array.dtype}, which is no tensor's type")
    return {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}


def check_finite(tensors: Mapping[str, Any]) -> None:
    """Refuse NaN and +infinity, as engines do; -infinity passes, masks are made of it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool((tensor < float("inf")).all()):
            bad = int((~(tensor < float("inf"))).sum())
            raise UsageError(f"input {name!r}: {bad} of {tensor.numel()} values are NaN or infinity")


def write_outputs(tensors: Mapping[str, Any], path: Path) -> None:
    """Write all tensors as .npz (bfloat16, which numpy lacks, as float32), or the one picture among them as PNG."""
    if path.suffix.lower() == ".png":
        from hasten.models.scenes.generate import write_grid

        pictures = picture(tensors)
        replace(path, lambda partial: write_grid(pictures, partial))
        return
    import numpy as np
    import torch

    arrays = {n: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for n, t in tensors.items()}

    def write(partial: Path) -> None:
        with partial.open("wb") as file:
            np.savez(file, **arrays)

    replace(path, write)


def picture(tensors: Mapping[str, Any]) -> Any:
    """The one output that is pictures: (B, 3, H, W) or (B, 1, H, W), floats in [-1, 1]; `UsageError` otherwise."""
    images = {n: t for n, t in tensors.items() if t.ndim == 4 and t.shape[1] in (1, 3) and t.is_floating_point()}
    if len(images) != 1:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in tensors.items())
        raise UsageError(
            f"a PNG shows one output of shape (B, 3, H, W) or (B, 1, H, W); the outputs are {shapes}; "
            "write .npz instead"
        )
    image = next(iter(images.values())).float()
    return image.expand(-1, 3, -1, -1)
