"""What an engine checks of the arrays it is called with."""

import re

import numpy as np
import pytest
import torch

from hasten.backends.engine import Engine
from hasten.backends.manifest import Manifest, TensorSpec
from hasten.errors import UsageError


class Doubling:
    """Returns twice its first input, and remembers the strides that it saw."""

    def run_torch(self, inputs, /):
        self.seen = inputs
        return [inputs[0] * 2]

    def run_numpy(self, inputs, /):
        self.seen = inputs
        return [inputs[0] * 2]


def engine(tmp_path, *, dtype="float32", target="aoti:cpu", shape=("b", 4, "h", 16), t=("b",), constants=()):
    manifest = Manifest(
        target=target,
        artifact="model.pt2",
        inputs=(TensorSpec("sample", dtype, shape), TensorSpec("t", "int64", t)),
        outputs=(TensorSpec("out", dtype, shape),),
        versions={},
        report={},
        seconds=0.0,
        dims={"b": (1, 8), "h": (4, None)},
        constants=dict(constants),
    )
    return Engine(tmp_path / "unet", manifest, Doubling())


def arrays(kind, **changes):
    made = {"sample": torch.ones(2, 4, 8, 16), "t": torch.ones(2, dtype=torch.int64), **changes}
    return {k: v.numpy() if kind == "numpy" and isinstance(v, torch.Tensor) else v for k, v in made.items()}


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_output_is_of_the_same_kind_as_the_inputs(tmp_path, kind):
    out = engine(tmp_path)(**arrays(kind))
    assert list(out) == ["out"]
    assert isinstance(out["out"], torch.Tensor if kind == "torch" else np.ndarray)
    assert float(out["out"].sum()) == 2 * 4 * 8 * 16 * 2


@pytest.mark.parametrize("kind", ["torch", "numpy"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampel": torch.ones(1)},
            "engine 'unet': there is no input 'sampel'; inputs: sample, t. Did you mean 'sample'?",
        ),
        (
            {"sample": torch.ones(4, 8, 16)},
            "engine 'unet', input 'sample': expected 4 dimensions (b, 4, h, 16), found 3: (4, 8, 16)",
        ),
        (
            {"sample": torch.ones(2, 4, 8, 15)},
            "engine 'unet', input 'sample': dimension 3 is 15, expected 16 of (b, 4, h, 16)",
        ),
        (
            {"sample": torch.ones(9, 4, 8, 16)},
            "engine 'unet', input 'sample': dimension 0 (b) is 9, expected 1 to 8",
        ),
        (
            {"sample": torch.ones(2, 4, 3, 16)},
            "engine 'unet', input 'sample': dimension 2 (h) is 3, expected 4 or more",
        ),
        (
            {"t": torch.ones(3, dtype=torch.int64)},
            "engine 'unet', input 't': dimension 0 (b) is 3, and 2 in input 'sample'",
        ),
        (
            {"sample": torch.ones(2, 4, 8, 16, dtype=torch.float64)},
            "engine 'unet', input 'sample': expected float32, found float64; convert it first",
        ),
        (
            {"t": torch.ones(2, dtype=torch.int32)},
            "engine 'unet', input 't': expected int64, found int32; convert it first",
        ),
        (
            {"sample": torch.full((2, 4, 8, 16), torch.nan)},
            "engine 'unet', input 'sample': 1024 of 1024 values are NaN or infinity; check_inputs=False lets them pass",
        ),
        ({"t": 1.0}, "engine 'unet', input 't': expected a torch tensor or numpy array, found float"),
        ({"t": None}, "engine 'unet', input 't': expected a torch tensor or numpy array, found NoneType"),
    ],
)
def test_message_for_an_input_that_does_not_fit(tmp_path, kind, changes, message):
    with pytest.raises(UsageError) as caught:
        engine(tmp_path)(**arrays(kind, **changes))
    assert str(caught.value) == message
    assert caught.value.exit_code == 2


def test_message_for_a_missing_input(tmp_path):
    with pytest.raises(UsageError) as caught:
        engine(tmp_path)(sample=torch.ones(2, 4, 8, 16))
    assert str(caught.value) == "engine 'unet': input 't' is missing; inputs: sample, t"


def test_message_for_a_mixture(tmp_path):
    with pytest.raises(UsageError) as caught:
        engine(tmp_path)(sample=torch.ones(2, 4, 8, 16), t=np.ones(2, dtype=np.int64))
    assert str(caught.value) == ("engine 'unet': inputs must be all torch or all numpy, found sample: torch, t: numpy")


def test_message_for_a_tensor_on_another_device(tmp_path):
    with pytest.raises(UsageError) as caught:
        engine(tmp_path, target="aoti:cuda")(**arrays("torch"))
    assert str(caught.value) == "engine 'unet', input 'sample': expected on cuda, found on cpu"


def test_a_mask_of_minus_infinity_passes_and_checks_can_be_left_out(tmp_path):
    made = engine(tmp_path)
    made(**arrays("torch", sample=torch.full((2, 4, 8, 16), -torch.inf)))
    with pytest.raises(UsageError, match=re.escape("1024 of 1024 values are NaN or infinity")):
        made(**arrays("torch", sample=torch.full((2, 4, 8, 16), torch.inf)))
    made.check_inputs = False
    assert bool(made(**arrays("torch", sample=torch.full((2, 4, 8, 16), torch.inf)))["out"].isinf().all())


def test_bfloat16_is_for_torch_only(tmp_path):
    made = engine(tmp_path, dtype="bfloat16")
    out = made(**arrays("torch", sample=torch.ones(2, 4, 8, 16, dtype=torch.bfloat16)))
    assert out["out"].dtype == torch.bfloat16
    with pytest.raises(UsageError) as caught:
        made(**arrays("numpy"))
    assert str(caught.value) == (
        "engine 'unet', input 'sample': is bfloat16, which numpy does not have; call the engine with torch tensors"
    )


def test_the_runner_sees_contiguous_arrays(tmp_path):
    made = engine(tmp_path)
    made(**arrays("torch", sample=torch.ones(2, 4, 16, 8).transpose(2, 3)))
    assert made._runner.seen[0].is_contiguous()
    made(**arrays("numpy", sample=torch.ones(2, 4, 16, 8).transpose(2, 3)))
    assert made._runner.seen[0].flags.c_contiguous
    made(**arrays("torch", sample=torch.ones(2, 4, 8, 16, requires_grad=True)))
    assert not made._runner.seen[0].requires_grad


def test_a_big_endian_array_is_another_dtype(tmp_path):
    with pytest.raises(UsageError, match=r"expected float32, found >f4; convert it first$"):
        engine(tmp_path)(**arrays("numpy", sample=np.ones((2, 4, 8, 16), dtype=">f4")))


def test_multiples_and_expressions_of_sizes(tmp_path):
    made = engine(tmp_path, shape=("b", 4, "8*h", 16), t=("h + 1",))
    made(sample=torch.ones(2, 4, 40, 16), t=torch.ones(6, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"input 'sample': dimension 2 is 41, expected a multiple of 8$"):
        made(sample=torch.ones(2, 4, 41, 16), t=torch.ones(6, dtype=torch.int64))
    with pytest.raises(UsageError, match=r"input 't': dimension 0 is 7, expected h \+ 1 = 6$"):
        made(sample=torch.ones(2, 4, 40, 16), t=torch.ones(7, dtype=torch.int64))


def test_frozen_arguments_may_be_repeated_but_not_changed(tmp_path):
    made = engine(tmp_path, constants={"return_dict": False, "scale": 2.0}.items())
    made(**arrays("torch"), return_dict=False, scale=2.0)
    for value in (3.0, 2, None):
        with pytest.raises(UsageError) as caught:
            made(**arrays("torch"), scale=value)
        assert str(caught.value) == (
            f"engine 'unet': 'scale' was frozen to 2.0 when the engine was built, {value!r} given; build another "
            "engine for it"
        )
