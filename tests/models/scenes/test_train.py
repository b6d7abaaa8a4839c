"""Training: a run that was stopped goes on as if it had not been, and what it leaves can be loaded."""

import csv
import json
from types import SimpleNamespace

import pytest
import torch

from hasten.models.scenes import adapters, stacking, train
from hasten.models.scenes.adapters import specification

SMALL = {
    "unet": {"block_out_channels": [16, 16], "norm_num_groups": 4, "attention_head_dim": 8},
    "dit": {"num_layers": 1, "num_attention_heads": 1, "attention_head_dim": 16},
    "video": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32},
}


@pytest.fixture(params=SMALL)
def small(request, tmp_path, monkeypatch):
    """A small model's configuration where train.py and adapters.py look for it."""
    name = request.param
    spec = specification(f"scenes-{name}")
    spec["config"].update(SMALL[name])
    if "stacked" in spec:
        spec["stacked"] = {"layers": 1, "until": 1}
    (tmp_path / f"{name}.json").write_text(json.dumps(spec))
    monkeypatch.setattr(train, "HERE", tmp_path)
    monkeypatch.setattr(adapters, "FOLDER", tmp_path)
    return name


def test_a_stopped_run_goes_on_as_if_it_had_not_been(small, tmp_path, monkeypatch):
    options = {"steps": 103, "batch": 2, "rate": 1e-3, "threads": 1}
    weights = train.train(small, run=tmp_path / "whole", **options)
    whole = weights.read_bytes()
    seen, loss_at = [], train.loss_at

    def stopping(model, spec, step, batch):
        seen.append(step)
        if seen.count(101) == 1 and step == 101:
            raise KeyboardInterrupt
        return loss_at(model, spec, step, batch)

    monkeypatch.setattr(train, "loss_at", stopping)
    with pytest.raises(KeyboardInterrupt):
        train.train(small, run=tmp_path / "parts", **options)
    weights.unlink()
    assert train.train(small, run=tmp_path / "parts", **options).read_bytes() == whole
    assert seen == [*range(102), *range(100, 103)]
    rows = list(csv.DictReader((tmp_path / f"{small}_loss.csv").open(newline="")))
    assert [int(row["step"]) for row in rows] == [100, 103]
    assert float(rows[-1]["loss"]) < 3


def test_what_training_leaves_is_the_mean_in_half_precision(small, tmp_path):
    train.train(small, steps=2, batch=2, rate=1e-3, run=tmp_path / "run", threads=1)
    saved = torch.load(tmp_path / "run" / f"{small}.pt", weights_only=True)
    assert saved["step"] == 2
    loaded = adapters.load(f"scenes-{small}").state_dict()
    for key, value in saved["mean"].items():
        assert torch.equal(loaded[key], value.half().float() if value.is_floating_point() else value)
    assert any(not torch.equal(saved["mean"][k], v) for k, v in saved["model"].items())
    # Asked for no more steps than there are, it writes what it has.
    (tmp_path / f"{small}.safetensors").unlink()
    train.train(small, steps=1, batch=2, rate=1e-3, run=tmp_path / "run", threads=1)
    assert torch.equal(adapters.load(f"scenes-{small}").state_dict()[key], loaded[key])


def test_batches_are_functions_of_their_number_and_labels_are_dropped(small):
    model, spec = train.network(small)
    model.eval()  # as train does
    told = []

    class Watched(torch.nn.Module):
        def forward(self, noisy, time, condition):
            told.append((noisy, time, condition))
            return model.forward(noisy, time, condition)

    losses = [train.loss_at(Watched(), spec, step, 64).item() for step in (4, 4, 8)]
    assert losses[0] == losses[1] != losses[2]
    assert all(torch.equal(a, b) for a, b in zip(*told[:2], strict=True))
    assert not torch.equal(told[0][0], told[2][0])
    drawn = train.subject(spec)
    null = drawn.condition(torch.tensor([drawn.null_class]))[0]
    dropped = sum(int((c == null).reshape(64, -1).all(1).sum()) for _, _, c in told[1:])
    assert 4 <= dropped <= 24  # of 128, one in ten


def test_of_four_batches_of_clips_three_are_stills():
    spec = specification("scenes-video")
    told = []

    def network(noisy, time, condition, **options):
        told.append((tuple(noisy.shape[:3]), options, time.mean().item() / 1000))
        return SimpleNamespace(sample=torch.zeros_like(noisy))

    for step in range(4):
        train.loss_at(network, spec, step, 8)
    shapes, options, times = zip(*told, strict=True)
    assert shapes == ((8, 12, 8), *[(64, 12, 1)] * 3)
    assert options == ({}, *[{"enable_temporal_attentions": False}] * 3)
    assert times[0] > max(times[1:])  # one picture shows less through noise than eight


def test_matrices_of_blocks_take_orthogonalised_steps():
    model, spec = train.network("video")
    adam, muon = train._optimizers(model, spec, 1e-3)
    assert all(p.ndim == 2 for p in muon.param_groups[0]["params"])
    assert sum(p.numel() for g in (adam, muon) for p in g.param_groups[0]["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    assert isinstance(muon, torch.optim.Muon)
    assert len(train._optimizers(*train.network("unet"), 1e-3)) == 1


def test_a_stacked_network_computes_what_the_shallow_one_did():
    torch.manual_seed(1)
    shallow, _ = train.network("video", 2)
    for parameter in shallow.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    deep, _ = train.network("video", 6)
    weights = stacking.stacked(shallow.state_dict(), 6)
    assert (stacking.depth(shallow.state_dict()), stacking.depth(weights)) == (2, 6)
    deep.load_state_dict(weights)
    told = (torch.randn(2, 12, 8, 16, 16), torch.tensor([300.0, 700.0]), torch.randn(2, 3, 12))
    assert torch.equal(shallow(*told).sample, deep(*told).sample)
    deep(*told).sample.square().mean().backward()
    new = deep.transformer_blocks[1]
    assert new.attn1.to_out[0].weight.grad.any()
    assert new.ff.net[2].weight.grad.any()


def test_only_to_a_multiple_of_its_blocks():
    shallow, _ = train.network("video", 2)
    for layers in (0, 1, 3):
        with pytest.raises(ValueError, match=f"a network of 2 blocks was to be stacked to {layers}"):
            stacking.stacked(shallow.state_dict(), layers)


def test_training_goes_on_from_the_shallow_network(tmp_path, monkeypatch):
    spec = specification("scenes-video")
    spec["config"].update(SMALL["video"])
    spec["stacked"] = {"layers": 1, "until": 2}
    (tmp_path / "video.json").write_text(json.dumps(spec))
    monkeypatch.setattr(train, "HERE", tmp_path)
    monkeypatch.setattr(adapters, "FOLDER", tmp_path)
    options = {"batch": 2, "rate": 1e-3, "run": tmp_path / "run", "threads": 1}
    train.train("video", 2, **options)
    kept = torch.load(tmp_path / "run" / "video.pt", weights_only=True)
    assert (stacking.depth(kept["model"]), kept["step"]) == (1, 2)
    written = adapters.load("scenes-video").state_dict()
    assert not written["transformer_blocks.1.ff.net.2.weight"].any()
    train.train("video", 4, **options)
    kept = torch.load(tmp_path / "run" / "video.pt", weights_only=True)
    assert (stacking.depth(kept["model"]), kept["step"]) == (2, 4)
    assert adapters.load("scenes-video").state_dict()["transformer_blocks.1.ff.net.2.weight"].any()
    assert [step for step, _ in kept["curve"]] == [2, 4]
