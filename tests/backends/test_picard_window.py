"""A sweep of Picard sampling as one compiled graph: it does what the sweeps of `picard` do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from loop_net import LABELS, NEGATIVE, SHAPE, Net, eager, examples, table, unit_noise
from torch import nn

import hasten
from hasten.backends.engine import Engine
from hasten.backends.manifest import Manifest, TensorSpec
from hasten.backends.picard_engine import picard_engine
from hasten.backends.picard_window import PicardWindow
from hasten.errors import HastenError, UsageError
from hasten.passes.solvers.catalog import build as solver
from hasten.passes.solvers.picard import picard
from hasten.passes.solvers.process import Process
from hasten.passes.solvers.sample import sample
from hasten.passes.solvers.table import SolverTable

TOLD = {"class_labels": LABELS, "negative_class_labels": NEGATIVE, "guidance_scale": 3.0}
CLOSE = {"rtol": 2e-5, "atol": 2e-5}
WINDOW, HISTORY = 4, 4


def window_of(net: nn.Module | None = None, **options: Any) -> PicardWindow:
    given = {"window": WINDOW, "history": HISTORY, "guided": True, "noise": True, **options}
    return PicardWindow(net or Net().eval(), examples(SHAPE[0]), **given)


def built(target: str, out: Path, **options: int) -> Engine:
    window = window_of(**options)
    return hasten.build(window, target=target, out=out, example_kwargs=window.examples())


@pytest.fixture(scope="module")
def onnx_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return built("onnxruntime:cpu", tmp_path_factory.mktemp("onnx") / "window")


@pytest.fixture(scope="module")
def aoti_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return built("aoti:cpu", tmp_path_factory.mktemp("aoti") / "window", window=3, history=2)


class Eager:
    """Runs a window in torch, where a test asks nothing of a compiler; counts the sweeps."""

    def __init__(self, window: PicardWindow) -> None:
        self.window, self.sweeps = window, 0

    def run_torch(self, inputs: list[torch.Tensor], /) -> list[torch.Tensor]:
        self.sweeps += 1
        with torch.no_grad():
            return list(self.window(**dict(zip(self.window.examples(), inputs, strict=True))).values())

    def run_numpy(self, inputs: list[Any], /) -> list[Any]:
        raise NotImplementedError


def in_eager(window: PicardWindow) -> Engine:
    def specs(given: dict[str, torch.Tensor]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in given.items())

    with torch.no_grad():
        sides = specs(window.examples()), specs(window(**window.examples()))
    manifest = Manifest("onnxruntime:cpu", "", *sides, versions={}, report={}, seconds=0.0)
    return Engine(Path("eager"), manifest, Eager(window))


def uncompiled(found: SolverTable, net: nn.Module | None = None, **options: Any) -> Any:
    """`picard` on the guided network in eager, from `unit_noise`."""
    net = net or Net().eval()

    def denoise(y: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        told, untold = (net(y, t, labels.repeat(len(y) // len(labels))) for labels in (LABELS, NEGATIVE))
        return untold + TOLD["guidance_scale"] * (told - untold)

    x, *noise = unit_noise(1 + len(found.noisy))
    with torch.no_grad():
        return picard(denoise, found, x, **{"noise": noise, **options})


def compiled(engine: Engine, found: SolverTable, **options: Any) -> Any:
    x, *noise = unit_noise(1 + len(found.noisy))
    return picard_engine(engine, found, x, **{"noise": noise, **TOLD, **options})


# one engine of each runtime for solvers of one, two and four latents; some end in a window that is not full
@pytest.mark.parametrize(
    ("runtime", "name", "steps"),
    [
        ("onnx_engine", "ddim", 9),
        ("onnx_engine", "ddim", 3),
        ("onnx_engine", "dpm++2m-sde", 7),
        ("onnx_engine", "unipc:order=3", 8),
        ("aoti_engine", "ddim", 8),
        ("aoti_engine", "dpm++2m-sde", 5),
    ],
)
def test_one_engine_does_what_the_uncompiled_sweeps_do(
    runtime: str, name: str, steps: int, request: pytest.FixtureRequest
) -> None:
    engine, found = request.getfixturevalue(runtime), table(name, steps)
    whole = {"window": engine.inputs[0].shape[0] - 1}
    for options in ({"tolerance": 0.1}, {"tolerance": 0.01, "acceleration": 2}, {"tolerance": 0.1, "window": 2}):
        expected, got = uncompiled(found, **whole | options), compiled(engine, found, **options)
        torch.testing.assert_close(got.result, expected.result, **CLOSE)
        assert got[1:] == expected[1:]
    exact = compiled(engine, found, tolerance=0)
    torch.testing.assert_close(exact.result, eager(found, scale=TOLD["guidance_scale"]), **CLOSE)
    assert exact.sweeps <= len(found)
    assert engine.check_inputs


def test_neither_loop_nor_branch_nor_a_product_of_matrices_but_the_networks(onnx_engine: Engine) -> None:
    window = window_of()
    targets = [str(node.target) for node in torch.export.export(window, (), window.examples()).graph.nodes]
    assert not [target for target in targets if "higher_order" in target]
    products = [target for target in targets if any(word in target for word in ("linear", "mm", "mul", "ein", "dot"))]
    assert set(products) == {"aten.linear.default", "aten.mul.Tensor"}
    assert products.count("aten.linear.default") == 1  # the network's
    graph = onnx.load(onnx_engine.path / "model.onnx").graph
    counts = Counter(n.op_type for n in graph.node)
    assert counts.keys().isdisjoint({"Loop", "Scan", "If"})
    assert counts["Conv"] == 2
    spelled = [n for n in graph.node if n.op_type in ("Gemm", "MatMul", "Einsum")]
    # sums over kept latents are products where a CPU computes them, in float32
    target = ("hasten.target", "onnxruntime:cpu")
    sums = [n for n in spelled if target in [(p.key, p.value) for p in n.metadata_props]]
    assert len(spelled) - len(sums) == 1
    weights = {tensor.name for tensor in graph.initializer}
    assert weights.isdisjoint(name for n in sums for name in n.input)
    assert [spec.name for spec in onnx_engine.outputs] == ["found", "changes", "moves"]


def test_a_tensorrt_rtx_plan_can_be_captured(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="pip install 'hasten[tensorrt-rtx]'")
    audit = built("tensorrt-rtx:sm89", tmp_path / "window", window=2, history=2).manifest.audit
    assert audit is not None
    assert audit["stream_capturable"]
    assert audit["counts"]["cjmp"] == 0


class Flow(nn.Module):
    """Of any type, with a time that need not be doubled, in a dictionary, and told nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.into, self.out = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> dict[str, torch.Tensor]:
        told = torch.sin(4 * t)[:, None, None, None].to(x.dtype)
        return {"velocity": self.out(torch.tanh(self.into(x) + told)), "other": x}  # the variance is behind it


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_network_of_another_type_and_without_conditions(dtype: torch.dtype) -> None:
    net = Flow().to(dtype).eval()
    given = {"x": torch.randn(SHAPE).to(dtype), "t": torch.rand(2)}
    engine = in_eager(PicardWindow(net, given, window=5, history=1, time_scale=0.001))
    found, (x,) = solver("flow-euler", Process.flow(), 8), unit_noise(1)
    found_by = picard_engine(engine, found, x, tolerance=0)
    assert found_by.result.dtype == torch.float32

    def denoise(y: torch.Tensor, t: Any) -> torch.Tensor:
        t = torch.as_tensor(t, dtype=torch.float32).expand(len(y))
        return net(y.to(dtype), 0.001 * t)["velocity"][:, :4]

    with torch.no_grad():
        expected = sample(denoise, found, x)
    # a network in bfloat16 may round a batch otherwise than its parts
    close = CLOSE if dtype == torch.float32 else {"rtol": 0, "atol": 2e-2}
    torch.testing.assert_close(found_by.result, expected, **close)


def test_not_a_number_on_the_way_does_not_last() -> None:
    class Fails(Net):
        calls = 0

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
            said, Fails.calls = super().forward(sample, timestep, class_labels), Fails.calls + 1
            if Fails.calls == 2:  # the first makes the engine
                said[2 * SHAPE[0] : WINDOW * SHAPE[0]] = torch.nan  # from the third row on
            return said

    engine, found = in_eager(window_of(Fails().eval())), table("ddim", 6)
    got = compiled(engine, found, tolerance=0)
    assert Fails.calls - 1 == got.sweeps <= len(found)
    torch.testing.assert_close(got.result, eager(found, scale=TOLD["guidance_scale"]), **CLOSE)
    with pytest.raises(UsageError, match="NaN or infinity"):  # what it starts from is looked at
        picard_engine(engine, found, unit_noise(1)[0] * torch.nan, tolerance=0, **TOLD)
    assert engine.check_inputs


@pytest.fixture(scope="module")
def guided() -> Engine:
    return in_eager(window_of(history=2))


@pytest.fixture(scope="module")
def plain() -> Engine:
    return in_eager(window_of(guided=False, noise=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 5}, r"the window is 5, and engine 'eager' was built for 4 rows; give at most that, or build"),
        ({"window": 0}, "the window is 0; it holds at least 1 row"),
        ({"table": "unipc:order=3"}, "carries 4 latents and the window was built for 2; take another solver, or build"),
        ({"table": "ddim:clip=1"}, "asks to clip x0, and a compiled window leaves it as it is; run it with"),
        ({"guidance_scale": None}, "guidance_scale is missing; the window was built with guidance"),
        ({"guidance_scale": -1}, "guidance_scale: -1 given"),
        ({"negative_class_labels": None}, "'negative_class_labels' is missing, what the network is told for no cond"),
        ({"class_labels": None}, "'class_labels' is missing; give class_labels, negative_class_labels"),
        ({"labels": LABELS}, "the network takes no 'labels'; it takes class_labels, negative_class_labels"),
        ({"x": torch.zeros(1, 4, 8, 8)}, r"x is \(1, 4, 8, 8\), and the engine makes \(2, 4, 8, 8\)"),
        ({"noise": [torch.zeros(SHAPE)]}, "adds noise in 0 of 6 rows; 1 noise arrays were given"),
        ({"tolerance": -1}, "the tolerance is -1"),
    ],
)
def test_refusals(guided: Engine, options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"x": unit_noise(1)[0], "tolerance": 0.1, **TOLD, **options}
    given = {name: value for name, value in given.items() if value is not None}
    found = table(given.pop("table", "ddim"), 6)
    runner: Any = guided._runner
    before = runner.sweeps
    with pytest.raises(UsageError, match=message):
        picard_engine(guided, found, given.pop("x"), **given)
    assert runner.sweeps == before


def test_refusals_of_an_engine_that_was_built_for_less(plain: Engine) -> None:
    call: dict[str, Any] = {"tolerance": 0.1, "class_labels": LABELS}
    x, *noise = unit_noise(7)
    with pytest.raises(UsageError, match=r"guidance_scale 2\.0 was given for a window without guidance"):
        picard_engine(plain, table("ddim", 6), x, guidance_scale=2.0, **call)
    found = table("ddim:eta=1", 6)
    with pytest.raises(UsageError, match=r"adds noise in 5 rows, and the window was built for solvers that add none"):
        picard_engine(plain, found, x, noise=noise[: len(found.noisy)], **call)
    caf = solver("caf", Process.flow(), 4)
    with pytest.raises(UsageError, match="asks two networks, and a compiled window has one"):
        picard_engine(plain, caf, x, **call)
    other = Engine(plain.path, Manifest("aoti:cpu", "", (), (), {}, {}, 0.0), plain._runner)
    with pytest.raises(UsageError, match="engine 'eager' holds no window; build one of a `PicardWindow`"):
        picard_engine(other, table("ddim", 6), x, **call)


class Odd(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, **given: torch.Tensor) -> torch.Tensor:
        said: torch.Tensor = self.answer(given["sample"])
        return said


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ({}, {"window": 0}, "window: 0 given; a compiled window holds at least 1"),
        ({}, {"history": 0}, "history: 0 given"),
        ({"timestep": torch.tensor(5.0)}, {}, r"'timestep' has sizes \(\), and the rows of a window have times of"),
        ({}, {"guided": True}, "guidance needs an input to leave out, and the network has none"),
        ({"states": torch.ones(2)}, {}, "input 'states' has the name of one of the window's own; rename it"),
        ({}, {"sample": "y"}, "sample: there is no input 'y'"),
    ],
)
def test_a_window_that_cannot_be(given: dict[str, torch.Tensor], options: dict[str, Any], message: str) -> None:
    inputs = {"sample": torch.ones(2, 3), "timestep": torch.ones(2), **given}
    with pytest.raises(UsageError, match=message):
        PicardWindow(Odd(torch.sin), inputs, **{"window": 2, **options})


def test_a_build_that_cannot_be(tmp_path: Path) -> None:
    inputs = {"sample": torch.ones(2, 3), "timestep": torch.ones(2)}
    for answer, dtype, message in (
        (lambda y: y[:1], None, r"was given \(4, 3\) and answered \(1, 3\); it must take any batch"),
        (torch.sin, "float16", "'states' is torch.float16, and a solver's states are float32"),
    ):
        window = PicardWindow(Odd(answer), inputs, window=2)
        with pytest.raises(HastenError, match=message):
            hasten.build(
                window,
                target="onnxruntime:cpu",
                out=tmp_path / "window",
                example_kwargs=window.examples(),
                dtype=dtype,
            )
    assert not (tmp_path / "window").exists()


@pytest.mark.slow
def test_scenes_dit(tmp_path: Path) -> None:
    """The bundled transformer, guided, with two solvers: the sampler's loop in the plain order."""
    from hasten.models.registry import get
    from hasten.models.scenes.adapters import specification
    from hasten.models.scenes.generate import initial_noise
    from hasten.models.scenes.subject import subject

    adapter = get("scenes-dit")
    net = adapter.module()
    window = PicardWindow(net, adapter.example_inputs(2), window=4, history=2, guided=True)
    engine = hasten.build(window, target="onnxruntime:cpu", out=tmp_path / "dit", example_kwargs=window.examples())
    x, name = initial_noise(adapter, 2, 0), adapter.inputs[2].name
    labels = torch.tensor([1, 2])
    null = torch.full_like(labels, subject(specification(adapter.name)).null_class)

    def denoise(y: torch.Tensor, t: Any) -> torch.Tensor:
        t = torch.as_tensor(t, dtype=torch.float32).expand(len(y))
        told, untold = (net(y, t, c.repeat(len(y) // 2)) for c in (labels, null))
        return untold + 2 * (told - untold)

    for solver_name, steps in (("flow-euler", 10), ("dpm++2m", 7)):
        found = solver(solver_name, Process.flow(), steps)
        told = {name: labels, "negative_" + name: null, "guidance_scale": 2.0}
        with torch.no_grad():
            expected, exact = picard(denoise, found, x, window=4, tolerance=0.1), sample(denoise, found, x)
        got = picard_engine(engine, found, x, tolerance=0.1, **told)
        assert got[1:] == expected[1:]
        torch.testing.assert_close(got.result, expected.result, **CLOSE)
        torch.testing.assert_close(picard_engine(engine, found, x, tolerance=0, **told).result, exact, **CLOSE)
