"""Measured choice: what is timed and how, what is chosen from it, and a file that anything may have happened to."""

import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch._subclasses.fake_tensor import FakeTensorMode

from hasten.backends import tuning_store
from hasten.backends.tuning import Store, TunedChooser, fastest_measured, measure
from hasten.backends.tuning_file import SCHEMA, Measurement, Timing
from hasten.backends.tuning_machine import NO_KERNELS, Machine, machine, native_kernels
from hasten.backends.tuning_runners import TorchRunners
from hasten.errors import HastenError, UsageError
from hasten.passes.choice import Candidate, Layer
from hasten.passes.ops import winograd_conv2d

LAYER = Layer("conv2d", 1, 32, 32, 8, 8)
DIRECT, F2, F4 = Candidate("direct", 4e-3), Candidate("winograd-f2", 2e-3, 100), Candidate("winograd-f4", 1e-3, 400)
HERE = Machine("some processor", "torch 1, kernels a")


def measured(failed=(), **milliseconds):
    """``measured(direct=2, f4=1)``."""
    names = {name: name if name == "direct" else f"winograd-{name}" for name in milliseconds}
    timings = {names[n]: Timing(ms / 1e3, ms / 1e3, ms / 1e3, 3) for n, ms in milliseconds.items()}
    return Measurement(timings, dict(failed), "2026-01-01T00:00:00+00:00")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cache" / "tuning.json", machines=lambda device: HERE)


def of(path, here=HERE):
    return Store(path, machines=lambda device: here)


@pytest.fixture
def warnings(caplog):
    """The text of every warning so far."""
    caplog.set_level(logging.WARNING, "hasten")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def sleeps(**milliseconds):
    def runners(layer, name):
        short = name.removeprefix("winograd-")
        if isinstance(milliseconds[short], Exception):
            raise milliseconds[short]
        return {"": lambda: time.sleep(milliseconds[short] / 1e3)}

    return runners


class TestMeasure:
    def test_medians_tell_implementations_apart(self):
        found = measure(LAYER, ["direct", "winograd-f4"], sleeps(direct=6, f4=1), rounds=3, min_seconds=0)
        direct, f4 = found.timings["direct"], found.timings["winograd-f4"]
        assert f4.seconds < 5e-3 < direct.seconds
        assert direct.p20 <= direct.seconds <= direct.p80
        assert direct.rounds == 3
        assert found.failed == {}

    def test_the_order_rotates_after_two_warm_calls_each(self):
        calls = []
        runners = lambda layer, name: {"": lambda: calls.append(name) or time.sleep(1e-3)}  # noqa: E731
        measure(LAYER, ["a", "b", "c"], runners, rounds=3, min_seconds=0)
        assert "".join(calls) == "aabbcc" + "abc" + "bca" + "cab"

    def test_short_calls_are_repeated(self):
        calls = []
        runners = lambda layer, name: {"": lambda: calls.append(name) or time.sleep(1e-3)}  # noqa: E731
        found = measure(LAYER, ["a"], runners, rounds=1, min_seconds=10e-3)
        assert 3 <= len(calls) <= 2 + 10
        assert found.timings["a"].seconds >= 1e-3

    def test_the_budget_ends_the_rounds_but_the_least(self):
        assert measure(LAYER, ["a"], sleeps(a=2), rounds=50, min_seconds=0, budget=0).timings["a"].rounds == 3
        assert measure(LAYER, ["a"], sleeps(a=2), rounds=2, min_seconds=0, budget=0).timings["a"].rounds == 2

    def test_the_fastest_form_counts_and_is_named(self):
        ways = {"phases": lambda: time.sleep(1e-3), "upsampled": lambda: time.sleep(8e-3)}
        found = measure(LAYER, ["direct"], lambda layer, name: ways, rounds=3, min_seconds=0)
        assert found.timings["direct"].way == "phases"

    def test_what_raises_is_recorded_with_the_reason(self):
        state = {"calls": 0}

        def later():
            state["calls"] += 1
            if state["calls"] > 3:
                raise ValueError
            time.sleep(1e-3)

        def runners(layer, name):
            if name == "built":
                raise RuntimeError("no kernel\nfor this")
            return {"": later} if name == "later" else sleeps(direct=1)(layer, name)

        found = measure(LAYER, ["direct", "built", "later"], runners, rounds=3, min_seconds=0)
        assert list(found.timings) == ["direct"]
        assert found.failed == {"built": "RuntimeError: no kernel for this", "later": "ValueError"}

    def test_a_form_that_fails_leaves_the_others(self):
        def broken():
            raise RuntimeError("no")

        ways = {"prepacked": broken, "channels-last": lambda: time.sleep(1e-3)}
        found = measure(LAYER, ["direct"], lambda layer, name: ways, rounds=2, min_seconds=0)
        assert found.timings["direct"].way == "channels-last"
        assert found.failed == {}

    def test_threads_are_the_layers_and_restored_even_after_an_interruption(self):
        before = torch.get_num_threads()
        seen = []

        def look():
            seen.append((torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
            if len(seen) > 2:
                raise KeyboardInterrupt

        layer = Layer("conv2d", 1, 32, 32, 8, 8, threads=before + 1)
        with torch.autocast("cpu"), pytest.raises(KeyboardInterrupt):
            measure(layer, ["direct"], lambda layer, name: {"": look}, min_seconds=0)
        assert set(seen) == {(before + 1, False, False)}
        assert torch.get_num_threads() == before

    def test_fake_tensors_of_a_compilation_do_not_get_in(self):
        with FakeTensorMode():
            found = measure(LAYER, ["direct"], TorchRunners(), rounds=1, min_seconds=0)
        assert found.failed == {}


class TestRunners:
    @pytest.mark.parametrize("op", ["conv2d", "upsample_conv2d"])
    def test_every_form_computes_the_layer(self, op):
        layer = Layer(op, 2, 32, 48, 9, 7)
        runners = TorchRunners()
        state = torch.random.get_rng_state()
        names = ["winograd-f2", "winograd-f4"] if op == "conv2d" else ["winograd-phases-f2", "winograd-phases-f4"]
        with torch.no_grad():
            direct = {way: call() for way, call in runners(layer, "direct").items()}
            others = {name: runners(layer, name)[""]() for name in names}
        assert torch.equal(torch.random.get_rng_state(), state)
        expected = direct.pop("channels-last")
        assert expected.shape == ((2, 48, 9, 7) if op == "conv2d" else (2, 48, 18, 14))
        assert set(direct) == ({"prepacked"} if op == "conv2d" else {"prepacked", "phases"})
        for result in (*direct.values(), *others.values()):
            torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)

    def test_other_layers_and_implementations_are_refused(self):
        with pytest.raises(UsageError, match="tuning: no layer 'conv3d'; layers: conv2d, upsample_conv2d"):
            TorchRunners()(Layer("conv3d", 1, 4, 4, 4, 4), "direct")
        with pytest.raises(UsageError, match="tuning: no implementation 'winograd-f9' of a 3x3 convolution"):
            TorchRunners()(LAYER, "winograd-f9")


class TestChoice:
    @pytest.mark.parametrize(
        ("found", "name", "reason"),
        [
            (measured(direct=71.8, f2=40, f4=25.1), "winograd-f4", "measured 25.1 ms against 71.8 ms direct"),
            (measured(direct=100, f2=97), "winograd-f2", "measured 97 ms against 100 ms direct"),
            (
                measured(direct=100, f4=97.1),
                "direct",
                "measured 100 ms direct against 97.1 ms winograd-f4, which does not save 3%",
            ),
            (
                measured(direct=1, f2=3, f4=2),
                "direct",
                "measured 1 ms direct against 2 ms winograd-f4, which does not save 3%",
            ),
            (measured({"winograd-f4": "E: x"}, direct=2, f2=1), "winograd-f2", "measured 1 ms against 2 ms direct"),
            (
                measured({"winograd-f2": "E: y", "winograd-f4": "E: x"}, direct=2),
                "direct",
                "winograd-f2 failed when timed (E: y); winograd-f4 failed when timed (E: x)",
            ),
            (
                measured({"direct": "E: x"}, f4=1),
                "direct",
                "direct failed when it was timed (E: x): nothing can be compared",
            ),
            (measured(direct=1, f6=0.5), "winograd-f4", "fastest by the roofline model"),
            (measured({"winograd-f4": "E: x"}, direct=1), "winograd-f2", "fastest by the roofline model"),
        ],
    )
    def test_rules(self, found, name, reason):
        choice = fastest_measured(LAYER, [DIRECT, F2, F4], found)
        assert (choice.name, choice.reason) == (name, reason)
        if choice.measured_seconds:
            assert choice.saved_seconds >= 0

    def test_only_what_the_limits_left_is_compared(self):
        choice = fastest_measured(LAYER, [DIRECT, F2], measured(direct=4, f2=2, f4=1))
        assert choice.name == "winograd-f2"
        assert choice.measured_seconds == {"direct": 4e-3, "winograd-f2": 2e-3}

    def test_the_form_of_an_upsampled_direct_is_named(self):
        timings = {
            "direct": Timing(2e-3, 2e-3, 2e-3, 3, "phases"),
            "winograd-f4": Timing(1e-3, 1e-3, 1e-3, 3),
        }
        layer = Layer("upsample_conv2d", 1, 32, 32, 8, 8)
        choice = fastest_measured(layer, [DIRECT, F4], Measurement(timings, {}, ""))
        assert choice.reason == "measured 1 ms against 2 ms direct (phases)"

    def test_modes(self, store):
        runners = sleeps(direct=4, f2=1, f4=8)
        every = [DIRECT, F2, F4]
        cached, off, on = (TunedChooser(store, mode, runners=runners, rounds=2) for mode in ("cached", "off", "on"))
        assert cached(LAYER, every).reason == "fastest by the roofline model"
        assert not store.path.exists()
        assert on(LAYER, every).name == "winograd-f2"
        assert cached(LAYER, every).name == "winograd-f2"
        assert off(LAYER, every).name == "winograd-f4"
        assert TunedChooser(of(store.path))(LAYER, every).name == "winograd-f2"

    def test_nothing_is_timed_where_there_is_no_choice(self, store):
        choice = TunedChooser(store, "on", runners=sleeps())(LAYER, [DIRECT])
        assert (choice.name, choice.reason) == ("direct", "nothing else is allowed")

    def test_what_is_known_is_not_timed_again_unless_something_is_missing(self, store):
        calls = []

        def runners(layer, name):
            calls.append(name)
            return {"": lambda: time.sleep(1e-3)}

        chooser = TunedChooser(store, "on", runners=runners, rounds=1)
        store.put(LAYER, measured({"winograd-f2": "E: x"}, direct=2, f4=1))
        chooser(LAYER, [DIRECT, F2, F4])
        assert calls == []
        chooser(LAYER, [DIRECT, Candidate("winograd-f6", 1e-3)])
        assert sorted(calls) == ["direct", "winograd-f2", "winograd-f4", "winograd-f6"]
        calls.clear()
        TunedChooser(store, runners=runners, rounds=1).fill(LAYER, ["direct"], again=True)
        assert len(calls) == 4

    def test_times_of_a_busy_machine_are_told_of_and_taken_again_once(self, store, warnings, monkeypatch):
        count = iter(range(0, 10**9, 10**6))
        monkeypatch.setattr("hasten.backends.tuning_measure._interruptions", lambda: next(count))
        chooser = TunedChooser(store, "on", runners=sleeps(direct=2, f2=1), rounds=1)
        first = chooser.fill(LAYER, ["direct", "winograd-f2"])
        assert first.busy
        assert chooser.fill(LAYER, ["direct", "winograd-f2"]) == first
        assert len(warnings()) == 1
        assert warnings()[0].endswith(
            "interruptions a second while conv2d 32-32@8x8, batch 1, float32, cpu, 1 thread was timed): the times say "
            "little; stop other work and run `hasten tune`, which times such layers again"
        )
        monkeypatch.setattr("hasten.backends.tuning_measure._interruptions", lambda: 0)
        assert not TunedChooser(store, runners=chooser.runners).fill(LAYER, ["direct"]).busy

    def test_an_unknown_mode_is_refused(self, store):
        with pytest.raises(UsageError, match=r"tune: 'cache' is none of off, cached, on. Did you mean 'cached'\?"):
            TunedChooser(store, "cache")


class TestStore:
    def test_reads_back_what_was_put(self, store):
        found = Measurement({"direct": Timing(2e-3, 1e-3, 3e-3, 7, "prepacked")}, {"winograd-f4": "E: x"}, "now", 4.5)
        store.put(LAYER, found)
        assert of(store.path).get(LAYER) == found
        assert of(store.path).here() == {LAYER: found}
        content = json.loads(store.path.read_text())
        assert content["schema"] == SCHEMA
        assert content["entries"][0]["layer"]["layout"] == "channels-last"
        assert sorted(p.name for p in store.path.parent.iterdir()) in (
            ["tuning.json"],
            ["tuning.json", "tuning.json.lock"],
        )

    @pytest.mark.parametrize("field", ["batch", "channels", "outputs", "height", "width", "threads"])
    def test_every_size_is_part_of_the_key(self, store, field):
        store.put(LAYER, measured(direct=1))
        other = Layer(**{**vars(LAYER), field: 99})
        assert store.get(other) is None

    def test_another_machine_or_version_has_entries_of_its_own(self, store):
        store.put(LAYER, measured(direct=1))
        for other in (Machine("other", HERE.versions), Machine(HERE.name, "torch 2")):
            theirs = of(store.path, other)
            assert theirs.get(LAYER) is None
            assert theirs.foreign() >= 1
            theirs.put(LAYER, measured(direct=2))
        assert store.get(LAYER) == measured(direct=1)
        assert (len(store.here()), store.foreign()) == (1, 2)

    def test_two_stores_keep_each_others_entries(self, store):
        second, other = of(store.path), Layer("conv2d", 1, 64, 64, 8, 8)
        assert second.get(LAYER) is None
        store.put(LAYER, measured(direct=1))
        second.put(other, measured(direct=2))
        store.put(LAYER, measured(direct=3))
        assert second.get(LAYER) == measured(direct=3)
        assert store.get(other) == measured(direct=2)

    def test_concurrent_processes_lose_nothing(self, store):
        script = textwrap.dedent(
            """
            import sys
            from pathlib import Path
            from hasten.backends.tuning_store import Store
            from hasten.backends.tuning_file import Measurement, Timing
            from hasten.backends.tuning_machine import Machine
            from hasten.passes.choice import Layer
            store = Store(Path(sys.argv[1]), machines=lambda device: Machine("some processor", "torch 1, kernels a"))
            for size in range(1, 11):
                layer = Layer("conv2d", int(sys.argv[2]), 32, 32, size, size)
                store.put(layer, Measurement({"direct": Timing(1.0, 1.0, 1.0, 1)}, {}, ""))
            assert "torch" not in sys.modules
            """
        )
        running = [subprocess.Popen([sys.executable, "-c", script, str(store.path), str(batch)]) for batch in (1, 2, 3)]
        assert [p.wait() for p in running] == [0, 0, 0]
        assert len(store.here()) == 30

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            ("{", "it is not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))"),
            ("[" * 200_000, "it is not JSON (maximum recursion depth exceeded"),
            ("", "it is not JSON (Expecting value: line 1 column 1 (char 0))"),
            ("[]", "its schema is None, and this version of hasten reads 1"),
            ('{"schema": 2}', "its schema is 2, and this version of hasten reads 1"),
            ('{"schema": 1}', "an entry is damaged (KeyError: 'entries')"),
            ('{"schema": 1, "entries": [3]}', "an entry is damaged (TypeError: "),
        ],
    )
    def test_a_damaged_file_is_told_of_once_and_kept_aside(self, store, warnings, content, reason):
        store.path.parent.mkdir()
        store.path.write_text(content)
        chooser = TunedChooser(store)
        for _ in range(2):
            assert chooser(LAYER, [DIRECT, F4]).reason == "fastest by the roofline model"
        assert of(store.path).get(LAYER) is None
        (told,) = warnings()
        assert told.startswith(f"cannot read the measured times in {store.path}: {reason}")
        assert told.endswith(
            "; the roofline model chooses instead: remove the file with `hasten tune --clear`, and measure again"
        )
        assert store.path.read_text() == content
        store.put(LAYER, measured(direct=1))
        assert of(store.path).get(LAYER) == measured(direct=1)
        assert (store.path.parent / "tuning.json.corrupt").read_text() == content
        assert len(warnings()) == 1

    @pytest.mark.parametrize(
        ("field", "value", "reason"),
        [
            ("seconds", float("nan"), "ValueError: 0.001, nan, 0.001 are no percentiles of a time"),
            ("seconds", "fast", "ValueError: could not convert string to float: 'fast'"),
            ("p20", -1, "ValueError: -1.0, 0.001, 0.001 are no percentiles of a time"),
            ("batch", "1", "TypeError: batch is '1'"),
            ("layout", "contiguous", "ValueError: layout is not channels-last"),
            ("stride", 2, "ValueError: the layer has "),
        ],
    )
    def test_a_damaged_entry_is_named(self, store, warnings, field, value, reason):
        store.put(LAYER, measured(direct=1))
        content = json.loads(store.path.read_text())
        entry = content["entries"][0]
        (entry["timings"]["direct"] if field in ("seconds", "p20") else entry["layer"])[field] = value
        store.path.write_text(json.dumps(content))
        assert of(store.path).get(LAYER) is None
        assert f": an entry is damaged ({reason}" in warnings()[0]

    def test_a_file_that_may_not_be_written_is_left_and_this_process_remembers(self, store, warnings):
        store.put(LAYER, measured(direct=1))
        before = store.path.read_bytes()
        store.path.chmod(0o444)
        other = Layer("conv2d", 1, 64, 64, 8, 8)
        store.put(other, measured(direct=2))
        store.put(LAYER, measured(direct=3))
        assert store.path.read_bytes() == before
        assert of(store.path).here() == {LAYER: measured(direct=3), other: measured(direct=2)}
        assert warnings() == [
            f"cannot write {store.path}: the file is read-only; what is measured serves this process only: make the "
            "file and its folder writable, or set HASTEN_CACHE_DIR to another folder"
        ]
        store.path.chmod(0o644)
        store.put(other, measured(direct=4))
        assert len(json.loads(store.path.read_text())["entries"]) == 2

    def test_a_folder_that_cannot_be_is_no_obstacle(self, tmp_path, warnings):
        (tmp_path / "file").write_text("")
        store = of(tmp_path / "file" / "tuning.json")
        assert store.get(LAYER) is None
        store.put(LAYER, measured(direct=1))
        assert store.get(LAYER) == measured(direct=1)
        (told,) = warnings()
        assert told.startswith(f"cannot write {store.path}: ")

    def test_a_full_disk_leaves_the_file_whole(self, store, warnings, monkeypatch):
        store.put(LAYER, measured(direct=1))

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        store.put(LAYER, measured(direct=2))
        monkeypatch.undo()
        assert json.loads(store.path.read_text())["entries"][0]["timings"]["direct"]["seconds"] == 1e-3
        assert [p.name for p in store.path.parent.iterdir() if p.name.endswith(".new")] == []
        assert "No space left on device" in warnings()[0]

    def test_a_lock_that_is_held_is_waited_for_and_then_told_of(self, store, warnings, monkeypatch):
        monkeypatch.setattr(tuning_store, "WAIT_SECONDS", 0.05)
        store.path.parent.mkdir()
        with FileLock(f"{store.path}.lock"):
            store.put(LAYER, measured(direct=1))
        assert store.get(LAYER) == measured(direct=1)
        assert f"another process holds {store.path}.lock" in warnings()[0]

    def test_what_a_killed_process_left_is_removed(self, store):
        store.path.parent.mkdir()
        left = store.path.parent / ".tuning.json.0123abcd.new"
        left.write_text("half")
        store.put(LAYER, measured(direct=1))
        assert not left.exists()

    def test_clear(self, store):
        assert store.clear() == (0, [])
        store.put(LAYER, measured(direct=1))
        aside = store.path.parent / "tuning.json.corrupt"
        aside.write_text("{")
        assert store.clear() == (1, [store.path, aside])
        assert not store.path.exists()
        assert store.get(LAYER) is None

    def test_clear_of_what_cannot_be_removed(self, store):
        store.path.mkdir(parents=True)
        with pytest.raises(HastenError, match=f"cannot remove {store.path}: .*; remove it by hand"):
            store.clear()

    def test_where_the_file_is(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path))
        assert Store().path == tmp_path / "tuning.json"
        monkeypatch.delenv("HASTEN_CACHE_DIR")
        assert Store().path.parent.name == "hasten"


class TestMachine:
    def test_cpu_with_versions(self, monkeypatch):
        here = machine("cpu", "abc")
        assert here.versions.startswith(f"torch {torch.__version__}, oneDNN ")
        assert here.versions.endswith(", kernels abc")
        for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
            with monkeypatch.context() as patch:
                patch.setenv(name, "AVX2")
                assert machine("cpu", "abc").name == f"{here.name} {name}=AVX2"

    def test_a_gpu_s_versions_change_with_the_sources_of_its_kernels(self, monkeypatch, tmp_path):
        folder = Path(winograd_conv2d.__file__).parent
        for name in ("triton.py", "transforms.py", "weights.py"):
            (tmp_path / name).write_bytes((folder / name).read_bytes())
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some GPU")
        before = machine("cuda", "abc")
        assert before.name == "some GPU"
        assert ", Triton " in before.versions
        monkeypatch.setattr(winograd_conv2d, "__file__", str(tmp_path / "__init__.py"))
        assert machine("cuda", "abc") == before
        with (tmp_path / "triton.py").open("a") as file:
            file.write("# changed\n")
        assert machine("cuda", "abc") != before

    def test_a_device_that_is_not_there(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert machine("cuda", "abc").name == "no cuda device"

    def test_kernels_turned_off(self, monkeypatch):
        monkeypatch.setenv("HASTEN_NATIVE", "0")
        assert native_kernels() == NO_KERNELS
