"""What a network was trained on, whichever solver samples from it: against diffusers where it has an answer."""

import ast
from pathlib import Path

import numpy as np
import pytest
import solvers as table
import torch

import hasten
from hasten.errors import UsageError
from hasten.passes.solvers.catalog import build, names
from hasten.passes.solvers.dynamic_shift import DynamicShift
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.start import levels
from hasten.passes.solvers.table import SolverTable

diffusers = pytest.importorskip("diffusers")

FLUX = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "max_image_seq_len": 4096,
    "max_shift": 1.15,
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
}
MOCHI = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0, "invert_sigmas": True}
OF_FLOWS = ("flow-euler", "dpm++2m", "dpm++2s", "dpm++2m-sde", "unipc", "deis", "lms", "euler", "heun")


# the shift that depends on the picture's size


def test_a_dynamic_shift_must_be_told():
    for solver in (None, *OF_FLOWS):
        with pytest.raises(UsageError, match=r"\(use_dynamic_shifting\), and nothing says how far .*tokens=4096.*mu="):
            hasten.Sampling(solver, steps=4, process=FLUX).table()


def times(solver, process=FLUX, steps=4):
    return hasten.Sampling(solver, steps=steps, process=process).table()[1].time


def test_the_times_of_a_flux_pipeline():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(FLUX)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4), mu=1.15)
    assert np.round(theirs.timesteps).tolist() == [1000, 905, 760, 513]
    for text in ("mu=1.15,spacing=trailing", "tokens=4096,spacing=trailing", "mu=1.15,sigmas=1/0.75/0.5/0.25"):
        assert np.allclose(times(f"flow-euler:{text}"), theirs.timesteps, atol=2e-3)
    assert np.allclose(times(None, {**FLUX, "mu": 1.15, "use_dynamic_shifting": False}), times("flow-euler:mu=1.15"))
    theirs.set_timesteps(4, mu=1.15)
    assert np.allclose(times("flow-euler:mu=1.15"), theirs.timesteps, atol=2e-3)
    # a shift of one's own is an answer too: e^mu is what mu means
    text = "flow-euler:spacing=trailing,"
    assert np.allclose(times(text + "mu=0.7"), times(text + f"shift={np.exp(0.7)}"))


def theirs_of_flux():
    """A function of the pipeline's file, which alone needs none of the packages that the pipeline does."""
    path = Path(diffusers.__file__).parent / "pipelines" / "flux" / "pipeline_flux.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [part for part in tree.body if getattr(part, "name", None) == "calculate_shift"]
    found = {}
    exec(compile(tree, str(path), "exec"), found)
    return found["calculate_shift"]


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6032])
def test_tokens_are_turned_into_mu_as_the_pipelines_do(tokens):
    calculate_shift = theirs_of_flux()
    assert DynamicShift().at(tokens) == pytest.approx(calculate_shift(tokens), rel=1e-12)
    ltx = {**FLUX, "base_image_seq_len": 1024, "max_image_seq_len": 5000, "base_shift": 0.95, "max_shift": 2.05}
    mu = calculate_shift(tokens, 1024, 5000, 0.95, 2.05)
    assert np.allclose(times(f"unipc:tokens={tokens}", ltx), times(f"unipc:mu={mu}", ltx))


@pytest.mark.parametrize(
    ("kind", "solver"), [("UniPCMultistepScheduler", "unipc"), ("DPMSolverMultistepScheduler", "dpm++2m")]
)
def test_a_dynamic_shift_of_other_solvers(kind, solver):
    config = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}
    theirs = getattr(diffusers, kind)(**config)
    read = hasten.Sampling(f"{solver}:mu=0.8", steps=6, process=theirs).table()[1]
    probed = SolverTable.from_scheduler(theirs, 6, timesteps={"mu": 0.8})
    assert table.difference(probed.response(), read.response()) < 2e-5
    assert np.allclose(probed.time, read.time, atol=1e-3)


def test_a_scheduler_whose_solver_says_how_far_needs_no_mu():
    ours = hasten.Scheduler.from_config(FLUX, solver="flow-euler:tokens=4096,spacing=trailing")
    ours.set_timesteps(4)
    assert np.round(ours.timesteps).tolist() == [1000, 905, 760, 513]


def test_what_mu_means_is_the_models():
    linear = {**FLUX, "time_shift_type": "linear"}
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(linear)
    theirs.set_timesteps(5, mu=1.7)
    assert np.allclose(times("flow-euler:mu=1.7", linear, 5), theirs.timesteps, atol=2e-3)
    assert not np.allclose(times("flow-euler:mu=1.7,time_shift=exponential", linear, 5), theirs.timesteps, atol=1)
    assert np.allclose(times("unipc:mu=1.7", linear, 5), times("unipc:shift=1.7", linear, 5))


@pytest.mark.parametrize(
    ("solver", "process", "message"),
    [
        ("unipc:mu=1,tokens=64", FLUX, "both mu and tokens were given, .*; give one of them"),
        ("flow-euler:tokens=64", {"shift": 3.0}, "tokens is for models whose shift depends on the picture's size"),
        ("unipc:tokens=64", {"beta_schedule": "linear"}, "option tokens is for flows, and this model is a diffusion"),
        ("flow-euler:tokens=0", FLUX, "flow-euler: tokens: 0 was given; it goes from 1"),
        ("flow-euler:spacing=leading", {"shift": 3.0}, "spacing: 'leading' is none of linspace, trailing"),
        ("unipc:mu=1", {**FLUX, "max_image_seq_len": 256}, "base_image_seq_len and max_image_seq_len are both 256"),
        ("unipc:mu=1", {**FLUX, "base_image_seq_len": "x"}, "base_image_seq_len: 'x' is not a whole number"),
        ("unipc:mu=1", {**FLUX, "time_shift_type": "cubic"}, "'cubic' is none of exponential, linear"),
    ],
)
def test_message_says_what_is_wrong(solver, process, message):
    with pytest.raises(UsageError, match=message):
        hasten.Sampling(solver, steps=4, process=process).table()


# networks that are told 1 - s and predict x0 - eps


def test_an_inverted_flow_is_told_the_times_of_diffusers():
    theirs = diffusers.FlowMatchEulerDiscreteScheduler.from_config(MOCHI)
    probed = SolverTable.from_scheduler(theirs, 7)
    for solver in (None, "flow-euler", "flow-euler:invert=true"):
        ours = hasten.Sampling(solver, steps=7, process=MOCHI).table()[1]
        assert np.allclose(probed.time, ours.time, atol=1e-3)
        assert table.difference(probed.response(), ours.response()) < 2e-6


@pytest.mark.parametrize("solver", OF_FLOWS)
def test_any_solver_samples_an_inverted_flow(solver):
    """The same network in other words: told the rest of the time, it says the opposite."""

    def network(y, t):
        return np.tanh(y) + t / 1000

    plain = build(solver, Process.flow(2.0), 6)
    x, z = np.linspace(-1, 1, 6), [np.cos(np.arange(6) + i) for i in plain.noisy]
    for text, process in (
        (solver, Process.of({**MOCHI, "shift": 2.0})),
        (f"{solver}{',' if ':' in solver else ':'}invert=true", Process.flow(2.0)),
    ):
        made = build(text, process, 6)
        got = sample(lambda y, t: -network(y, 1000 - t), made, x, noise=z)
        assert np.allclose(got, sample(network, plain, x, noise=z), rtol=1e-12, atol=1e-12)
        assert np.array_equal(made.level, plain.level)
        assert np.allclose(made.time, 1000 - plain.time)
    inverted = Process.of(MOCHI)
    assert np.allclose(levels(inverted, np.array([0.0, 250, 1000])), [[0, 1], [0.25, 0.75], [1, 0]])


def test_z_image_is_sampled_as_its_pipeline_does():
    """It tells the network (1000 - t) / 1000, and takes the negative of its answer for the velocity."""

    def network(y, told):
        return torch.tanh(y) - told

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(5)
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)
    wanted = x
    for t in theirs.timesteps:
        wanted = theirs.step(-network(wanted, (1000 - t) / 1000), t, wanted).prev_sample
    made = build("flow-euler:invert=true", theirs, 5)
    got = sample(lambda y, told: network(y, told * 0.001), made, x)  # Sampling(time_scale=0.001)
    assert (got - wanted).abs().max() < 1e-5


def test_a_diffusion_process_is_not_inverted():
    with pytest.raises(UsageError, match="option invert is for flows, and this model is a diffusion process"):
        build("unipc:invert=true", Process.diffusion(), 4)


# the signal-to-noise ratio of CogVideoX


@pytest.mark.parametrize("kind", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_shift_of_the_signal_to_noise_ratio(kind, scale, zero_snr):
    theirs = getattr(diffusers, kind)(snr_shift_scale=scale, rescale_betas_zero_snr=zero_snr)
    ours = Process.of(theirs)
    assert np.allclose(ours.bars, theirs.alphas_cumprod, rtol=1e-5, atol=1e-9)
    made = Process.diffusion(beta_start=0.00085, beta_end=0.012, snr_shift=scale, zero_snr=zero_snr)
    assert np.allclose(ours.bars, made.bars, rtol=1e-12)


def test_cogvideox_sampled_by_its_own_method():
    theirs = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False
    )
    assert float(Process.of(theirs).bars[500]) == pytest.approx(0.0953281, rel=1e-4)
    ours = hasten.Sampling("ddim:spacing=trailing", steps=12, process=theirs).table()[1]
    probed = SolverTable.from_scheduler(theirs, 12)
    assert np.array_equal(probed.time, ours.time)
    assert table.difference(probed.response(), ours.response()) < 2e-6


# what no solver of the catalog is for


@pytest.mark.parametrize("solver", [None, "unipc", "euler"])
def test_a_network_that_is_told_its_noise_level_is_refused(solver):
    config = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
    svd = diffusers.EulerDiscreteScheduler(**config, sigma_min=0.002, sigma_max=700.0)
    with pytest.raises(UsageError, match=r"timestep_type='continuous'.*SolverTable.from_scheduler takes the scheduler"):
        hasten.Sampling(solver, steps=3, process=svd).table()
    with pytest.raises(UsageError, match="timestep_type='continuous'"):
        hasten.Scheduler.from_config(svd, solver=solver)
    assert SolverTable.from_scheduler(svd, 3).time[0] == pytest.approx(0.25 * np.log(700), rel=1e-4)


def test_a_schedule_that_one_solver_knows_is_refused_to_others():
    theirs = diffusers.IPNDMScheduler()
    for solver in (None, "ipndm"):
        assert hasten.Sampling(solver, steps=5, process=theirs).table()[0].startswith("ipndm")
    for call in (
        lambda: hasten.Sampling("unipc", steps=5, process=theirs).table(),
        lambda: hasten.Scheduler.from_config(theirs, solver="unipc"),
    ):
        with pytest.raises(UsageError, match="angles of a schedule of its own, and unipc does not know it; take ipndm"):
            call()


def test_a_scheduler_without_levels_that_are_known_is_named():
    with pytest.raises(UsageError, match=r"EDMEulerScheduler says neither beta_schedule nor shift.*from_scheduler"):
        hasten.Sampling("unipc", steps=3, process=diffusers.EDMEulerScheduler()).table()


@pytest.mark.parametrize("end", ["sigma_min", "sigma_max"])
@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_levels_between_ends_of_their_own_are_refused(kind, end):
    theirs = getattr(diffusers, kind)(use_karras_sigmas=True, **{end: 5.0})
    with pytest.raises(UsageError, match=f"{kind}: {end}=5 moves the ends of karras levels, which has no option here"):
        hasten.Sampling(steps=3, process=theirs).table()
    plain = getattr(diffusers, kind)(**{end: 5.0})  # ignored there, and so here
    probed = SolverTable.from_scheduler(plain, 5)
    assert np.allclose(hasten.Sampling(steps=5, process=plain).table()[1].time, probed.time, atol=1e-3)


def test_every_solver_of_a_flow_takes_what_is_a_property_of_the_flow():
    of_flows = [n for n in names() if n not in ("ddim", "plms", "pndm", "ipndm", "guided", "caf", "euler-ancestral")]
    of_flows = [n for n in of_flows if not n.startswith(("ltsp", "stsp"))]
    for name in of_flows:
        text = name + ("," if ":" in name else ":") + "tokens=1024"
        assert build(text, {**FLUX, "invert_sigmas": True}, 6).time[0] < 10, name
