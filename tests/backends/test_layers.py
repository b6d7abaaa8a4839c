"""Which convolutions of a graph are layers, and how layers are written."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hasten.backends.layers import is_layer, layer_word, layers_of, parse_layer
from hasten.errors import UsageError
from hasten.passes.choice import Layer


class Net(nn.Module):
    """Two layers that can be tuned, twice the first; a 1x1, a strided and a grouped one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(32, 48, 3, padding=1)
        self.back = nn.Conv2d(48, 32, 1)
        self.up = nn.Conv2d(48, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, groups=4, padding=1)

    def forward(self, x):
        y = self.first(self.back(self.first(x)))
        return self.grouped(self.down(self.up(F.interpolate(y, scale_factor=2.0, mode="nearest"))))


@pytest.fixture(scope="module")
def net():
    return Net().eval().requires_grad_(False)


def test_layers_of_a_program_in_order_with_repetitions(net):
    program = torch.export.export(net, (torch.randn(2, 32, 8, 6),))
    first = Layer("conv2d", 2, 32, 48, 8, 6, threads=3)
    assert layers_of(program, threads=3) == [first, first, Layer("upsample_conv2d", 2, 48, 16, 8, 6, threads=3)]


def test_a_size_that_may_change_is_the_examples(net):
    batch = torch.export.Dim("batch", min=1, max=8)
    program = torch.export.export(net, (torch.randn(2, 32, 8, 6),), dynamic_shapes={"x": {0: batch}})
    assert [layer.batch for layer in layers_of(program)] == [2, 2, 2]


def test_a_graph_module_is_read_as_it_is(net):
    program = torch.export.export(net, (torch.randn(1, 32, 8, 6),))
    found = layers_of(program.module())
    assert found[-1] == Layer("conv2d", 1, 48, 16, 16, 12)


@pytest.mark.parametrize(
    ("word", "layer"),
    [
        ("conv:320-320@64x48", Layer("conv2d", 1, 320, 320, 64, 48, threads=2)),
        ("upsample-conv:512-256@8x8,batch=4,threads=1", Layer("upsample_conv2d", 4, 512, 256, 8, 8)),
        ("conv:4-8@1x1,dtype=float16,device=cuda", Layer("conv2d", 1, 4, 8, 1, 1, "float16", "cuda", 2)),
    ],
)
def test_words(word, layer):
    assert is_layer(word)
    assert parse_layer(word, threads=2) == layer
    assert parse_layer(layer_word(layer)) == layer


def test_what_is_no_layer():
    assert not is_layer("sd15-unet")
    assert not is_layer("C:/models/unet.pt2")


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (
            "conv:320@64x64",
            "layer 'conv:320@64x64' is not written conv:CHANNELS-OUTPUTS@HEIGHTxWIDTH, as in "
            "conv:320-320@64x64,batch=2; upsample-conv:… is nearest 2x upsampling before it",
        ),
        ("conv:0-8@4x4", "layer 'conv:0-8@4x4': channels is '0', which is not a whole number from 1 up"),
        (
            "conv:8-8@4x4,batch=two",
            "layer 'conv:8-8@4x4,batch=two': batch is 'two', which is not a whole number from 1 up",
        ),
        (
            "conv:8-8@4x4,bacth=2",
            "layer 'conv:8-8@4x4,bacth=2': there is no 'bacth'; a layer takes batch, dtype, device, threads. "
            "Did you mean 'batch'?",
        ),
        ("conv:8-8@4x4,batch=2,batch=2", "layer 'conv:8-8@4x4,batch=2,batch=2': batch is given twice"),
        (
            "conv:8-8@4x4,dtype=float61",
            "layer 'conv:8-8@4x4,dtype=float61': dtype 'float61' is none of float32, float16, bfloat16. "
            "Did you mean 'float16'?",
        ),
    ],
)
def test_wrong_words_are_refused(word, message):
    with pytest.raises(UsageError) as caught:
        parse_layer(word)
    assert str(caught.value) == message
