"""The table of step caches: what is put together from measured lines, and which settings there are to measure."""

import json

import pytest
from cache_render import BEGIN, END, merged, render
from cache_settings import MASKS, settings

from hasten.passes.steps.catalog import parse


def line(kind, library, setting, form, **more):
    cells = {"model": "scenes-dit", "library": library, "method": "some", "setting": setting, "form": form}
    return {"kind": kind, **cells, **more}


def quality(library, setting, psnr, count=32, right=0.9):
    form = "engine" if library == "hasten" else "eager"
    marks = {"psnr_db": psnr, "ssim": 0.9, "accuracy": right, "uncached_accuracy": 0.9}
    return line("quality", library, setting, form, count=count, computed=10, **marks)


def timing(library, setting, form, gain):
    return line(
        "time", library, setting, form, computed=10, seconds=2 / gain, uncached_seconds=2, gain=gain, p20=gain, p80=gain
    )


LINES = [
    quality("hasten", "a", 38.0),
    quality("hasten", "a", 37.0, count=256),
    timing("hasten", "a", "engine", 4.5),
    quality("hasten", "fast", 31.0, right=0.7),
    timing("hasten", "fast", "engine", 7.0),
    quality("diffusers", "b", 36.0),
    timing("diffusers", "b", "eager", 3.0),
    timing("diffusers", "b", "compile", 2.0),
    line("quality", "cache-dit", "c", "eager", count=32, error="ValueError: no | such block"),
]


def test_quality_is_that_of_most_pictures_and_goes_with_every_form():
    rows = {(r["setting"], r["form"]): r for r in merged(LINES)}
    assert set(rows) == {("a", "engine"), ("fast", "engine"), ("b", "eager"), ("b", "compile"), ("c", "eager")}
    assert rows["a", "engine"]["psnr_db"] == 37.0
    assert rows["b", "compile"]["psnr_db"] == 36.0
    assert rows["b", "compile"]["gain"] == 2.0


def test_the_table_says_who_is_faster_at_the_same_quality(tmp_path, capsys):
    jsonl, into = tmp_path / "caches.jsonl", tmp_path / "page.md"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in LINES))
    into.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert render(jsonl, into, None) == 0
    text = into.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| 30 dB | 7.00 (some, fast) | 3.00 (diffusers some, b, eager) | 2.33 |" in text
    assert "| 35 dB | 4.50 (some, a) | 3.00 (diffusers some, b, eager) | 1.50 | 0.444 | 0.667 (eager) | 1.50 |" in text
    assert "| 40 dB | none |" in text
    assert "Fastest within one point of accuracy: 4.50 times, some, a: 37.0 dB, 90.0% of 256 right" in text
    assert "ValueError: no   such block" in text
    capsys.readouterr()


def test_nothing_measured_is_no_table(tmp_path, capsys):
    jsonl = tmp_path / "caches.jsonl"
    jsonl.write_text(json.dumps(quality("hasten", "a", 38.0)) + "\n")
    assert render(jsonl, None, None) == 1
    assert "no setting has both its quality and its time" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["scenes-dit", "scenes-unet", "scenes-video"])
def test_every_setting_can_be_asked_for_and_is_told_apart(name, tmp_path):
    made = settings(name, 50, tmp_path)
    assert len({(s.method, s.setting) for s in made}) == len(made) > 10
    for setting in made:
        policy = parse(setting.build)
        assert (setting.mask is None) == (policy.decision.mask(50) is None)
        assert setting.mask is None or len(setting.mask) == 50


MASK_FILES = sorted(MASKS.glob("*.json"))


@pytest.mark.parametrize("path", MASK_FILES, ids=lambda path: path.stem)
def test_a_mask_that_is_kept_is_what_its_name_says(path, tmp_path):
    model, _, payload, computed = path.stem.rsplit("-", 3)
    policy = parse(str(path))
    assert sum(policy.decision.mask(50)) == int(computed)
    assert policy.payload.name == {"fitted": "table"}.get(payload, payload)
    assert path.stat().st_size < 8000
    told = f"{computed} of 50, output, {payload}"
    assert [s.method for s in settings(model, 50, tmp_path) if s.setting == told] == ["searched mask"]


def test_own_calibrations_go_before_masks_that_are_kept(tmp_path):
    path = MASK_FILES[0]
    found = json.loads(path.read_text())
    (tmp_path / path.name).write_text(json.dumps({**found, "steps": 40}))
    model, *_ = path.stem.rsplit("-", 3)
    own, kept = (
        {s.setting for s in settings(model, 50, folder) if s.method == "searched mask"}
        for folder in (tmp_path, tmp_path / "none")
    )
    assert len(own) == len(kept) - 1
