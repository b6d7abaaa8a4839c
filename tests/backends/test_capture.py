"""Capture, and the comparison of the capture with the module."""

import collections

import pytest
import torch
from torch import nn

from hasten.backends.capture import capture, check_equal, difference, output_names, perturbed
from hasten.errors import HastenError, UsageError, VerificationError

X = torch.linspace(-1, 1, 24).reshape(2, 3, 4)


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 1.5))
        self.drop = nn.Dropout(0.5)

    def forward(self, x, gain=1.0):
        return self.drop(x * self.weight * gain)


def forward_of(function):
    """A module called Model whose forward is ``function(self, ...)``."""
    return type("Model", (nn.Module,), {"forward": function})()


def refusal(function, *args, kind=HastenError, **kwargs):
    with pytest.raises(kind) as caught:
        capture(forward_of(function), args, kwargs)
    assert type(caught.value) is kind
    return str(caught.value)


def test_captures_in_evaluation_mode_and_leaves_the_module_as_it_was():
    module = Scale()
    module.drop.eval()
    program = capture(module, (X,), {"gain": 2.0})
    assert torch.equal(program.module()(X, gain=2.0), X * 3)
    assert (module.training, module.drop.training) == (True, False)


def test_one_tensor_given_twice_is_still_two_inputs():
    program = capture(forward_of(lambda self, x, y: x - 2 * y), (X, X))
    assert torch.equal(program.module()(X, torch.ones_like(X)), X - 2)


def test_an_exported_program_is_taken_as_it_is():
    program = capture(Scale(), (X,))
    assert capture(program) is program
    with pytest.raises(UsageError) as caught:
        capture(program, dynamic_shapes={"x": None})
    assert str(caught.value) == "dynamic_shapes: the source is an ExportedProgram, whose sizes are settled already"


def test_dynamic_sizes_stay_dynamic():
    program = capture(Scale(), (X,), dynamic_shapes={"x": {0: torch.export.Dim("b", max=8)}})
    assert program.module()(torch.ones(7, 3, 4)).shape == (7, 3, 4)


TO_DO = (
    "; a branch on values must become torch.cond or torch.where, and .item(), .numpy() and sizes that depend on "
    "values must leave forward"
)


def test_names_the_reason_when_the_sizes_depend_on_values():
    # as models do that trim padding by a mask
    def forward(self, x, mask):
        longest = int(mask.sum())
        return x[:, :longest] if longest > 1 else x

    message = refusal(forward, X, torch.tensor([True, True, False]))
    assert message.startswith("cannot capture Model: Could not ")
    assert message.endswith(TO_DO)
    assert "\n" not in message


def test_names_the_reason_when_the_module_leaves_torch():
    def forward(self, x):
        return x * float(x.detach().numpy().sum())

    message = refusal(forward, X)
    assert message.startswith("cannot capture Model: ")
    assert message.endswith(TO_DO)


def test_refuses_a_module_that_draws_its_own_noise():
    message = refusal(lambda self, x: x + torch.randn_like(x), X)
    assert message.startswith("cannot capture Model: two runs on the same inputs differ (output 'output' is off by ")
    assert message.endswith(
        "); it draws its own random numbers or keeps state between calls: pass the noise or the state as an input"
    )


def test_random_numbers_of_the_caller_are_not_used_up():
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    refusal(lambda self, x: x + torch.randn_like(x), X)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_refuses_a_module_that_writes_to_its_input():
    def forward(self, x):
        x[0] = 0
        return x * 2

    assert refusal(forward, X.clone()) == (
        "cannot capture Model: it writes to its input 'x', and an engine keeps no state; return the new value "
        "as an output instead"
    )


def test_refuses_a_module_that_writes_to_a_buffer():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return x * 2

    with pytest.raises(HastenError) as caught:
        capture(Model(), (X,))
    assert str(caught.value) == (
        "cannot capture Model: it writes to its buffer 'calls', and an engine keeps no state; return the new "
        "value as an output instead"
    )


def test_writing_to_values_of_its_own_is_nobodys_business():
    def forward(self, x):
        h = x * 2
        h[0] = 1
        parts = h.view(2, 12).split(6, dim=1)
        parts[1].add_(1)
        return torch.nn.functional.relu(h, inplace=True)

    capture(forward_of(forward), (X,))


def test_finds_a_write_through_views():
    def forward(self, x):
        x.view(2, 12).split(6, dim=1)[1].add_(1)
        return x * 2

    module = forward_of(forward)
    assert refusal(forward, X.clone()).startswith("cannot capture Model: it writes to its input 'x', ")
    with torch.no_grad():
        program = torch.export.export(module, (X.clone(),))
    with pytest.raises(HastenError, match=r"^cannot capture the ExportedProgram: it writes to its input 'x', "):
        capture(program)


def test_refuses_a_table_written_through_data():
    # a position table written with .data[...].copy_(): strict export loses the write, non-strict export refuses
    def forward(self, x):
        table = torch.zeros(3, 4)
        table.data[:2].copy_(torch.ones(2, 4))
        return x + table

    assert refusal(forward, X).startswith("cannot capture Model: ")


def test_a_module_that_does_not_run_is_not_called_a_capture_failure():
    assert refusal(lambda self, x: x @ x, X) == (
        "Model does not run on its example inputs: Expected size for first two dimensions of batch2 tensor to "
        "be: [2, 4] but got: [2, 3]"
    )


def test_a_capture_that_computes_something_else_is_found_on_the_first_inputs():
    def forward(self, x):
        return x * 2 if torch.compiler.is_exporting() else x

    assert refusal(forward, X, kind=VerificationError) == (
        "the capture of Model differs from the module on the example inputs: output 'output' is off by 1, its "
        "largest value is "
        "1; 1e-06 of that is allowed; a value of the host may be frozen into it" + TO_DO.replace("; a", ": a", 1)
    )


def test_a_frozen_host_value_is_found_on_the_second_inputs():
    def forward(self, x, t):
        return {"sample": x * (0.5 if torch.compiler.is_exporting() else float(t))}

    message = refusal(forward, X, torch.tensor(0.5), kind=VerificationError)
    assert message.startswith(
        "the capture of Model differs from the module on a second set of inputs: output 'sample' is off by "
    )


def test_the_second_set_is_drawn_like_the_first():
    torch.manual_seed(0)
    x, mask = 3 + 2 * torch.randn(4000), torch.tensor([[True, True, False]])
    bias = torch.tensor([[0.0, 0.0, -torch.inf]])
    ids, t, zero = torch.arange(10), torch.tensor([500, 500]), torch.tensor([0])
    (x2, mask2, bias2, ids2, t2, zero2), kwargs = perturbed(
        (x, mask, bias, ids, t, zero), {"time": torch.tensor(0.5), "none": None, "half": x.half()}
    )
    assert abs(float(x2.mean()) - 3) < 0.2
    assert abs(float(x2.std()) - 2) < 0.2
    assert not torch.equal(x2, x)
    assert mask2.sum() == 2
    assert bias2.isinf().sum() == 1
    assert sorted(ids2.tolist()) == list(range(10))
    assert ids2.tolist() != list(range(10))
    assert (t2.tolist(), zero2.tolist()) == ([499, 499], [1])
    assert float(kwargs["time"]) == 0.375
    assert kwargs["none"] is None
    assert kwargs["half"].dtype == torch.float16
    (same,), _ = perturbed((ids,), {}, indices=False)
    assert torch.equal(same, ids)


def test_an_index_past_a_table_is_not_taken_for_a_difference():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(1, 4)

        def forward(self, x, label):
            return x + self.table(label)

    capture(Model(), (X, torch.tensor([0])))


Pair = collections.namedtuple("Pair", ["left", "right"])


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (X, ["output"]),
        ((X,), ["output"]),
        ([X, X], ["output_0", "output_1"]),
        ({"sample": X, "aux": X}, ["sample", "aux"]),
        ({"sample": (X, X)}, ["sample_0", "sample_1"]),
        (Pair(X, X), ["left", "right"]),
        ((X, {"a": X}), ["output_0", "output_1_a"]),
    ],
)
def test_output_names(outputs, names):
    assert output_names(outputs) == names


@pytest.mark.parametrize(
    ("want", "got", "message"),
    [
        ({"a": X}, {"b": X}, "outputs b instead of a"),
        ({"a": X}, {"a": X.double()}, "output 'a' is torch.float64 (2, 3, 4) instead of torch.float32 (2, 3, 4)"),
        ({"a": X}, {"a": X[0]}, "output 'a' is torch.float32 (3, 4) instead of torch.float32 (2, 3, 4)"),
        ({"a": X}, {"a": X * torch.nan}, "output 'a' is off by inf, its largest value is 1; 0.0001 of that is allowed"),
        ({"a": X}, {"a": X + 0.5}, "output 'a' is off by 0.5, its largest value is 1; 0.0001 of that is allowed"),
        (
            {"a": torch.tensor([5])},
            {"a": torch.tensor([6])},
            "output 'a' is off by 1, its largest value is 5; 0 of that is allowed",
        ),
        ({"a": torch.tensor([torch.inf])}, {"a": torch.tensor([-torch.inf])}, None),
        ({"a": 3}, {"a": 4}, "output 'a' is 4 instead of 3"),
    ],
)
def test_difference_names_the_output_and_the_error(want, got, message):
    found = difference(want, got)
    if message is None:
        assert found is not None
    else:
        assert found == message


def test_equal_outputs_have_no_difference():
    holes = X.clone()
    holes[0, 0, 0], holes[0, 0, 1] = torch.nan, -torch.inf
    assert difference({"a": holes, "e": X[:0]}, {"a": holes.clone(), "e": X[:0]}) is None
    check_equal(lambda x: x, lambda x: x * (1 + 1e-6), (X,))
    with pytest.raises(
        VerificationError, match=r"^the rewritten graph differs from the module on the example inputs: "
    ):
        check_equal(lambda x: x, lambda x: x * 1.01, (X,))
