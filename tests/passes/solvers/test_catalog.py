"""Solvers by name: what is read, what is written back, and what is said about mistakes."""

import doctest
import subprocess
import sys

import numpy as np
import pytest

from hasten.errors import UsageError
from hasten.passes.solvers import catalog
from hasten.passes.solvers.catalog import PRESETS, build, canonical, default, entry, names, parse
from hasten.passes.solvers.classifier_guidance import classifier_guided
from hasten.passes.solvers.ddim import ddim
from hasten.passes.solvers.flow_euler import flow_euler
from hasten.passes.solvers.process import Process

EPSILON, FLOW = Process.diffusion(), Process.flow(3.0)
V = Process.diffusion(prediction="v_prediction")


@pytest.mark.parametrize("name", names())
def test_canonical_text_reads_back_to_the_same_table(name):
    process = FLOW if name.startswith("flow") else V
    text = canonical(name)
    assert canonical(text) == text
    assert str(parse(text)) == text
    one, other = build(name, process, 6), build(text, process, 6)
    assert np.array_equal(one.response(), other.response())
    assert np.array_equal(one.time, other.time)


def test_every_option_is_explained():
    for name in names():
        if name not in PRESETS:
            assert entry(name).summary
            assert all(option.meaning for option in entry(name).options.values())


def test_presets_take_further_options():
    assert parse("dpm++2m:order=3").options["order"] == 3
    assert parse("dpm++2m-karras").options["levels"] == "karras"
    assert str(parse("dpm++2m")).startswith("dpm-solver:order=2,form=data,")


def test_a_table_is_that_of_its_builder():
    built = build("ddim:spacing=trailing,compat=none,eta=0.5", EPSILON, 9)
    made = ddim(9, spacing="trailing", compat=None, eta=0.5)
    assert np.array_equal(built.response(), made.response())
    assert np.array_equal(build("flow-euler", FLOW, 9).response(), flow_euler(9, shift=3.0).response())
    assert np.array_equal(build("flow-euler:shift=5", FLOW, 9).response(), flow_euler(9, shift=5.0).response())


def test_a_guided_solver_takes_its_options_with_strokes_between():
    made = build("guided:weight=2,solver=unipc:order=3/spacing=trailing", V, 5)
    plain = classifier_guided(build("unipc:order=3,spacing=trailing", V, 5), V, 2.0)
    assert np.array_equal(made.response(), plain.response())
    assert build("guided", V, 5).time.tolist() == [t for t in (999, 799, 599, 399, 199) for _ in range(2)]


def test_times_and_sigmas_of_the_caller():
    table = build("unipc:times=900/500/100", EPSILON, 3)
    assert table.time.tolist() == [900, 500, 100]
    table = build("euler:sigmas=10/3/0.5", EPSILON, 3)
    assert (table.level[:, 1] / table.level[:, 0]).tolist() == pytest.approx([10, 3, 0.5, 0], rel=1e-12)
    assert build("plms:times=999/10", EPSILON, 2).time.tolist() == [999, 10, 10]
    assert build("flow-euler:sigmas=1/0.5,shift=1", FLOW, 2).time.tolist() == [1000, 500]
    table = build("flow-euler:times=1000/400,shift=2", FLOW, 2)  # told as given, moved as levels
    assert table.time.tolist() == [1000, 400]
    assert table.level[:, 1].tolist() == pytest.approx([1, 0.8 / 1.4, 0])


def test_specifications_of_bundled_models_and_configurations_are_read():
    unet = {"objective": "v_prediction", "schedule": "squaredcos_cap_v2"}
    ours = build(default(Process.of(unet)), unet, 20)
    theirs = ddim(20, schedule="squaredcos_cap_v2", prediction="v_prediction", spacing="trailing", compat=None)
    assert np.array_equal(ours.response(), theirs.response())
    video = {"objective": "flow_prediction", "schedule": "linear_flow", "shift": 5}
    assert np.array_equal(build(default(Process.of(video)), video, 20).response(), flow_euler(20, shift=5).response())
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    assert np.array_equal(Process.of(config).bars, Process.diffusion(beta_start=0.00085, beta_end=0.012).bars)
    trained = Process.of({"trained_betas": [0.1, 0.2], "beta_schedule": "linear"})
    assert trained.bars.tolist() == pytest.approx([0.9, 0.72])
    assert Process.of({"use_flow_sigmas": True, "flow_shift": 5.0}).shift == 5


def test_the_process_rescaled_to_zero_terminal_snr_has_no_signal_at_its_end():
    process = Process.diffusion(prediction="v_prediction", zero_snr=True)
    assert process.bars[-1] == 0
    assert process.bars[0] == pytest.approx(EPSILON.bars[0])
    assert build("ddim:spacing=trailing", process, 5).level[0].tolist() == [0, 1]


def test_doctests():
    assert doctest.testmod(catalog).failed == 0


def test_the_catalog_imports_no_torch():
    code = (
        "import sys; from hasten.passes.solvers.catalog import build, names; from hasten.passes.solvers.process import "
        "Process; p = Process.diffusion(prediction='v_prediction'); f = Process.flow();"
        "[build(n, f if n.startswith('flow') else p, 5) for n in names()]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unipcc", "no solver named 'unipcc'; solvers: ddim, plms, .*Did you mean 'unipc'?"),
        ("dpm++2", "Did you mean 'dpm\\+\\+2s'?|Did you mean 'dpm\\+\\+2m'?"),
        ("", "no solver named ''; solvers: ddim"),
        ("unipc:ordr=2", "unipc has no option 'ordr'; its options: order, variant.*Did you mean 'order'?"),
        ("unipc:order", "unipc: option 'order' is not written key=value"),
        ("unipc:order=2,order=3", "unipc: option 'order' is given twice"),
        ("unipc:order=9", r"unipc: order: 9 was given; it goes from 1 to 3 \(the method's order\)"),
        ("unipc:order=two", "unipc: order: 'two' is not a whole number"),
        ("unipc:variant=bh3", "unipc: variant: 'bh3' is none of bh1, bh2."),
        ("dpm-solver:form=datas", "form: 'datas' is none of data, noise, sde-data, sde-noise. Did you mean 'data'?"),
        ("deis:end=zero", "deis has no option 'end'"),
        ("euler:spacing=trail", "spacing: 'trail' is none of leading, trailing, linspace. Did you mean 'trailing'?"),
        ("euler:levels=karas", "levels: 'karas' is none of .*Did you mean 'karras'?"),
        ("ddim:eta=nan", "ddim: eta: 'nan' is not a number"),
        ("ddim:eta=-1", "ddim: eta: -1 was given; it goes from 0"),
        ("unipc:shift=3", "option shift is for flows, and this model is a diffusion process; leave it out"),
        ("flow-euler", "flow-euler is for flows, and this model is a diffusion process; take euler or ddim"),
        ("guided:solver=unipk", "no solver named 'unipk'; solvers: .*Did you mean 'unipc'?"),
        ("guided:solver=unipc:ordr=2", "unipc has no option 'ordr'"),
        ("guided:solver=stsp", "classifier guidance is for solvers of one network"),
        ("ipndm", "ipndm is for networks that predict v on its own sine schedule; take plms"),
    ],
)
def test_message_says_what_is_wrong(text, message):
    with pytest.raises(UsageError, match=message):
        build(text, EPSILON, 5)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "ddim",
            "ddim is for diffusion processes, and this model is a flow; take flow-euler, which is the same method",
        ),
        ("plms", "plms is for diffusion processes, and this model is a flow; take lms"),
        ("euler-ancestral", "it is for diffusion; flow-euler:stochastic=true draws noise for a flow"),
        ("stsp", "it is for diffusion; guide a flow's velocity inside its network instead"),
    ],
)
def test_what_is_not_for_flows_says_so(text, message):
    with pytest.raises(UsageError, match=message):
        build(text, FLOW, 5)
