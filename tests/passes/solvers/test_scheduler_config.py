"""The scheduler's configuration: frozen, checked, saved and loaded, alone and with a pipeline."""

import copy
import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import solvers as table
import torch
from scheduler_loop import NOISE, close, denoised

import hasten
from hasten.errors import UsageError
from hasten.passes.solvers.config_keys import OPTIONS
from hasten.passes.solvers.from_config import CLASSES

diffusers = pytest.importorskip("diffusers")


def test_the_configuration_is_frozen():
    ours = hasten.Scheduler.from_config(diffusers.UniPCMultistepScheduler())
    changes = [
        lambda c: c.update(solver_order=3),
        lambda c: c.__setitem__("solver_order", 3),
        lambda c: setattr(c, "solver_order", 3),
        lambda c: c.pop("solver_order"),
        lambda c: c.setdefault("x", 1),
    ]
    for change in changes:
        with pytest.raises(UsageError, match=r"cannot be changed; make another scheduler with Scheduler\.from_config"):
            change(ours.config)
    assert ours.config.solver_order == 2
    again = copy.deepcopy(ours)
    assert again.config == ours.config
    assert close(denoised(again, NOISE)[0], denoised(ours, NOISE)[0])


def test_a_pipeline_may_correct_the_configuration():
    """Stable Diffusion's sets ``steps_offset`` of old configurations so."""
    base = diffusers.PNDMScheduler(**table.STABLE_DIFFUSION, skip_prk_steps=True)
    ours = hasten.Scheduler.from_config(base)
    ours._internal_dict = {**ours.config, "steps_offset": 1}
    ours.set_timesteps(10)
    assert ours.config.steps_offset == 1
    assert int(ours.timesteps[-1]) == 1
    ours.register_to_config(steps_offset=2)
    ours.set_timesteps(10)
    assert int(ours.timesteps[-1]) == 2


def test_alphas_cumprod_and_compatibles():
    theirs = diffusers.DPMSolverMultistepScheduler(**table.STABLE_DIFFUSION)
    ours = hasten.Scheduler.from_config(theirs)
    assert torch.allclose(ours.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-5)
    assert set(ours.compatibles) == set(theirs.compatibles)
    assert isinstance(ours, diffusers.SchedulerMixin)
    assert hasten.Scheduler.from_config({"beta_schedule": "linear"}, solver="ddim").compatibles == []
    flow = hasten.Scheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler())
    assert not hasattr(flow, "alphas_cumprod")


def test_every_option_of_a_class_that_is_read_is_known():
    for name in CLASSES:
        given = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert set(given) - {"self", "kwargs", "args"} <= set(OPTIONS), name


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("DPMSolverMultistepScheduler", {"solver_type": "midpont"}, "'midpont' is none of midpoint, heun.*'midpoint'?"),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver+++"}, r"none of .*Did you mean 'dpmsolver\+\+'"),
        ("DPMSolverSinglestepScheduler", {"solver_type": "huen"}, "Did you mean 'heun'?"),
        (
            "UniPCMultistepScheduler",
            {"solver_type": "bh3"},
            "UniPCMultistepScheduler: solver_type 'bh3' is none of bh1",
        ),
        ("DEISMultistepScheduler", {"solver_type": "logroh"}, "'logroh' is none of logrho. Did you mean 'logrho'?"),
        ("DEISMultistepScheduler", {"algorithm_type": "dies"}, "algorithm_type 'dies' is none of deis. Did you mean"),
        (
            "UniPCMultistepScheduler",
            {"solvr_order": 3},
            "no scheduler has an option 'solvr_order'. Did you mean 'solver_o",
        ),
        (
            "DDIMScheduler",
            {"clip_smaple": False},
            "no scheduler has an option 'clip_smaple'. Did you mean 'clip_sample'",
        ),
    ],
)
def test_nonsense_is_refused_with_the_nearest_name(kind, given, message):
    config = {**getattr(diffusers, kind)().config, "_class_name": kind}
    with pytest.raises(UsageError, match=message):
        hasten.Scheduler.from_config(config, **given)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"),
        ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
        ("DPMSolverMultistepScheduler", "DEISMultistepScheduler"),
        ("DEISMultistepScheduler", "DPMSolverMultistepScheduler"),
    ],
)
def test_what_another_class_says_is_taken_as_diffusers_takes_it(one, other):
    base = getattr(diffusers, one)(**table.STABLE_DIFFUSION)
    takes = inspect.signature(getattr(diffusers, other).__init__).parameters
    spelt = {key: base.config[key] for key in ("solver_type", "algorithm_type") if key in base.config and key in takes}
    if "final_sigmas_type" in takes and "algorithm_type" in spelt:
        spelt["final_sigmas_type"] = "sigma_min"
    theirs = getattr(diffusers, other)(**table.STABLE_DIFFUSION, **spelt)
    ours = hasten.Scheduler.from_config({**table.STABLE_DIFFUSION, **spelt, "_class_name": other})
    assert close(denoised(ours, NOISE)[0], denoised(theirs, NOISE)[0])


def test_a_stored_key_that_nobody_knows_is_kept():
    ours = hasten.Scheduler.from_config({**diffusers.DDIMScheduler().config, "_class_name": "DDIMScheduler", "new": 1})
    assert ours.config["new"] == 1


def test_an_override_is_saved_and_read_again(tmp_path, caplog):
    base = diffusers.UniPCMultistepScheduler(**table.STABLE_DIFFUSION)
    ours = hasten.Scheduler.from_config(base, solver_order=3)
    ours.save_pretrained(tmp_path / "a")
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["scheduler_config.json"]
    assert diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path / "a").config.solver_order == 3
    assert diffusers.UniPCMultistepScheduler.from_config(ours.config).config.solver_order == 3
    again = hasten.Scheduler.from_pretrained(tmp_path, subfolder="a")
    assert again.request == ours.request
    assert hasten.Scheduler.from_pretrained(tmp_path / "a", solver_order=2).request.options["order"] == 2
    other = hasten.Scheduler.from_config(ours, solver="dpm++3m", trained_betas=np.linspace(1e-4, 2e-2, 50))
    other.save_pretrained(tmp_path / "b")
    again = hasten.Scheduler.from_pretrained(tmp_path / "b")
    assert again.request == other.request
    assert len(again) == 50
    assert hasten.Scheduler.from_config(again).request == other.request
    with caplog.at_level("WARNING", logger="diffusers"):
        diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path / "b")
    assert not caplog.records


def test_a_model_on_the_hub_is_found_by_diffusers(tmp_path, monkeypatch):
    asked = {}

    def load_config(name, **options):
        asked.update(name=name, **options)
        return {"_class_name": "DDIMScheduler"}

    monkeypatch.setattr(diffusers.DDIMScheduler, "load_config", load_config)
    ours = hasten.Scheduler.from_pretrained("owner/model", subfolder="scheduler", revision="main", clip_sample=False)
    assert asked == {"name": "owner/model", "subfolder": "scheduler", "revision": "main"}
    assert ours.config.clip_sample is False


def test_without_diffusers_there_are_schedulers_too(tmp_path):
    """A loop of one's own needs none."""
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import hasten\n"
        "s = hasten.Scheduler.from_config({'_class_name': 'DDIMScheduler', 'clip_sample': False})\n"
        f"s.save_pretrained({str(tmp_path)!r})\n"
        f"s = hasten.Scheduler.from_pretrained({str(tmp_path)!r})\n"
        "s.set_timesteps(3)\n"
        "print(s.timesteps.tolist())\n"
        "try:\n    hasten.Scheduler.from_pretrained('owner/model')\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "[666, 333, 0]",
        "diffusers is not installed: pip install 'hasten[diffusers]'",
    ]


def test_message_where_there_is_no_configuration(tmp_path):
    diffusers.DDIMScheduler().save_pretrained(tmp_path / "model" / "scheduler")
    with pytest.raises(UsageError, match=r"there is no scheduler_config.json in .*model.*; give subfolder='scheduler'"):
        hasten.Scheduler.from_pretrained(tmp_path / "model")
    with pytest.raises(UsageError, match="is no folder here, and diffusers found no scheduler there"):
        hasten.Scheduler.from_pretrained(tmp_path / "none", local_files_only=True)
    (tmp_path / "scheduler_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"scheduler_config.json is not JSON: "):
        hasten.Scheduler.from_pretrained(tmp_path)
    (tmp_path / "scheduler_config.json").write_text("[1]")
    with pytest.raises(UsageError, match=r"holds no configuration but \[1\]"):
        hasten.Scheduler.from_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match="from_config takes a scheduler or its configuration, not 'owner/model'; from_pre"
    ):
        hasten.Scheduler.from_config("owner/model")


def test_saved_configuration_is_read_by_diffusers(tmp_path):
    theirs = diffusers.UniPCMultistepScheduler(**table.STABLE_DIFFUSION, solver_order=3)
    hasten.Scheduler.from_config(theirs).save_pretrained(tmp_path)
    again = diffusers.UniPCMultistepScheduler.from_pretrained(tmp_path)
    assert again.config.solver_order == 3
    assert json.loads((tmp_path / "scheduler_config.json").read_text())["_class_name"] == "UniPCMultistepScheduler"


def test_a_pipeline_samples_with_it_unchanged_and_is_saved_with_it(tmp_path):
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        num_layers=1,
        sample_size=8,
        num_embeds_ada_norm=1000,
        out_channels=4,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), latent_channels=4, norm_num_groups=8)
    base = diffusers.DPMSolverMultistepScheduler(**table.STABLE_DIFFUSION)
    pipe = diffusers.DiTPipeline(transformer.eval(), vae.eval(), base)  # in training it drops labels at random
    pipe.set_progress_bar_config(disable=True)

    def pictures():
        generator = torch.Generator().manual_seed(1)
        return pipe([1, 2], num_inference_steps=6, generator=generator, output_type="np").images

    wanted = pictures()
    pipe.scheduler = hasten.Scheduler.from_config(pipe.scheduler)
    got = pictures()
    assert wanted.std() > 0.01
    assert np.abs(got - wanted).max() < 1e-4
    pipe.scheduler = hasten.Scheduler.from_config(base.config, solver="ddim:spacing=trailing")
    other = pictures()
    assert np.abs(other - wanted).max() > 1e-3
    pipe.save_pretrained(tmp_path)
    for given in ({}, {"scheduler": pipe.scheduler}):
        pipe = diffusers.DiTPipeline.from_pretrained(tmp_path, **given)
        pipe.set_progress_bar_config(disable=True)
        assert type(pipe.scheduler) is hasten.Scheduler
        assert np.abs(pictures() - other).max() < 1e-6
    assert diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path, subfolder="scheduler") is not None
