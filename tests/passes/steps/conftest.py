"""Policies run three ways on the same numbers: numpy, the traced torch graph, ONNX Runtime.

One graph holds a whole call of every policy it is made for, with both branches computed and selected, so that a test
file needs one export.
"""

import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree

from hasten.passes.steps.plan import planned
from hasten.passes.steps.policy import namespace
from hasten.passes.steps.retained import control_at
from hasten.passes.steps.simulate import fresh

ENGINES = ("numpy", "traced", "onnx")


def call(policies, states, signal, tap, before, after, control):
    xp = namespace(before, *control)
    result = {}
    for name, policy in policies.items():
        decision, payload = policy.decision, policy.payload
        own = {n: states[name][n] for n in decision.slots()}
        held = {n: states[name][n] for n in payload.slots()}
        decided, compute = decision.decide(own, signal if decision.signal else None, control)
        own |= decided
        observed = own | decision.observe(own, tap if decision.tap else None, before, after, control)
        stored = held | payload.store(held, before, after, control)
        kept = {n: xp.where(compute, observed[n], own[n]) for n in own}
        kept |= {n: xp.where(compute, stored[n], held[n]) for n in held}
        result[name] = kept, compute, xp.where(compute, after, payload.reuse(held, before, control))
    return result


class Compiled:
    """The policies' calls in three engines, for arrays of the given shapes."""

    def __init__(self, policies, *, signal=(4,), tap=(1, 2, 1), stream=(2,)):
        self.policies = policies
        self.like = {
            "signal": np.zeros(signal, np.float32),
            "tap": np.zeros(tap, np.float32),
            "before": np.zeros(stream, np.float32),
            "after": np.zeros(stream, np.float32),
        }
        self.fresh = {name: fresh(policy.slots(), self.like) for name, policy in policies.items()}
        leaves, self.spec = _pytree.tree_flatten(self._operands(self.fresh, control_at(0, 0)))
        examples = [torch.tensor(leaf) for leaf in leaves]
        self.traced = make_fx(self._flat, tracing_mode="fake")(*examples)
        self.names = [f"in_{i}" for i in range(len(examples))]
        # A compiled graph may hold nothing but the function's operands and numbers.
        assert not self.traced.graph.find_nodes(op="get_attr")
        self.traced.eval()
        program = torch.onnx.export(
            self.traced, tuple(examples), dynamo=True, verbose=False, input_names=self.names, optimize=True
        )
        stream = io.BytesIO()
        program.save(stream)
        self.session = onnxruntime.InferenceSession(stream.getvalue(), providers=["CPUExecutionProvider"])
        self.read = {i.name for i in self.session.get_inputs()}

    def _operands(self, states, control, **values):
        return states, *(values.get(n, self.like[n]) for n in ("signal", "tap", "before", "after")), control

    def _flat(self, *leaves):
        made, self.result = _pytree.tree_flatten(call(self.policies, *_pytree.tree_unflatten(leaves, self.spec)))
        return made

    def step(self, engine, states, control, **values):
        """One call: {policy: (state, compute, result)} as numpy arrays."""
        operands = self._operands(states, control, **values)
        if engine == "numpy":
            with np.errstate(all="ignore"):
                return call(self.policies, *operands)
        leaves = [np.asarray(leaf) for leaf in _pytree.tree_leaves(operands)]
        if engine == "traced":
            made = [t.numpy() for t in self.traced(*map(torch.tensor, leaves))]
        else:
            feed = {n: leaf for n, leaf in zip(self.names, leaves, strict=True) if n in self.read}
            made = self.session.run(None, feed)
        return _pytree.tree_unflatten(made, self.result)

    def run(self, engine, name, steps, *, threshold=None, limit=None, mask=None, known=True, reset=None, **values):
        """A run of policy ``name``: its mask, results and last state.

        ``values`` are sequences, one entry a call. ``known``: the calls know how many there are. ``reset``: state that
        is put in before each call.
        """
        policy = self.policies[name]
        decision = policy.decision
        force = planned(decision, steps, mask) if known or mask is not None else [-1] * steps
        states, bits, results = dict(self.fresh), "", []
        for i in range(steps):
            control = control_at(
                i,
                steps if known else 0,
                force=force[i],
                threshold=decision.threshold if threshold is None else threshold,
                limit=decision.limit if limit is None else limit,
            )
            states[name] = {**states[name], **(reset or {})}
            here = {n: np.broadcast_to(np.asarray(v[i], np.float32), self.like[n].shape) for n, v in values.items()}
            state, compute, result = self.step(engine, states, control, **here)[name]
            states[name] = state
            bits += str(int(compute))
            results.append(np.asarray(result))
        return bits, results, states[name]


@pytest.fixture(scope="session")
def compile_policies():
    """Compile policies by name; see `Compiled`."""
    return Compiled


@pytest.fixture(params=ENGINES)
def engine(request):
    """The name of an engine."""
    return request.param
