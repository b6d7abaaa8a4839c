"""The clips' model can be captured: exported whole, in another batch as well, rewritten with 18 attentions."""

import pytest
import torch

import hasten
from hasten.models.registry import get


@pytest.fixture(scope="module")
def video():
    adapter = get("scenes-video")
    return adapter, adapter.module()


def test_the_export_computes_what_the_module_does(video):
    adapter, module = video
    program = torch.export.export(module, (), kwargs=adapter.example_inputs(), strict=False).module()
    for seed in (0, 1):
        inputs = adapter.example_inputs(seed=seed)
        assert torch.equal(program(**inputs), module(**inputs))


def test_one_export_serves_every_batch(video):
    adapter, module = video
    shapes = adapter.dynamic_shapes("batch")
    program = torch.export.export(module, (), adapter.example_inputs(), dynamic_shapes=shapes, strict=False).module()
    inputs = adapter.example_inputs(batch=5, seed=1)
    output = program(**inputs)
    assert output.shape == (5, 12, 8, 16, 16)
    torch.testing.assert_close(output, module(**inputs))


def test_every_attention_is_found_and_the_output_stays(video):
    adapter, module = video
    rewritten, report = hasten.optimize(module, example_kwargs=adapter.example_inputs(), expect=adapter.expected)
    assert len(next(rule for rule in report.rules if rule.name == "attention").sites) == 18
    inputs = adapter.example_inputs(seed=2)
    torch.testing.assert_close(rewritten(**inputs), module(**inputs))
    with pytest.raises(hasten.HastenError, match="attention"):
        hasten.optimize(module, example_kwargs=adapter.example_inputs(), expect={"attention": 8})
