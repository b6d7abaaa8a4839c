"""Choose by measurement between implementations of a layer, and keep what was measured.

Another implementation than the library's own is taken only where it is clearly faster. What is timed is the plain
convolution, the library's in its best form; what is fused around it, on either side, is not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from hasten.backends.choosing import MODES
from hasten.backends.tuning_file import Measurement
from hasten.backends.tuning_measure import ROUNDS, Runners, measure
from hasten.backends.tuning_store import Store
from hasten.errors import UsageError, nearest
from hasten.passes.choice import DIRECT, Candidate, Choice, Layer, fastest_predicted

__all__ = ["MARGIN", "MODES", "Store", "TunedChooser", "fastest_measured", "measure"]

logger = logging.getLogger(__name__)

MARGIN = 0.03
"""Part of the library's own time that another implementation must save to be taken: about what repeated runs differ."""


class TunedChooser:
    """A chooser (`hasten.passes.choice.Chooser`) that goes by measurement, in one of `MODES`.

    ``runners`` is by default `hasten.backends.tuning_runners.TorchRunners`; ``rounds`` is at most how often each
    implementation is timed.
    """

    def __init__(
        self, store: Store, mode: str = "cached", *, runners: Runners | None = None, rounds: int = ROUNDS
    ) -> None:
        if mode not in MODES:
            raise UsageError(f"tune: {mode!r} is none of {', '.join(MODES)}.{nearest(mode, MODES)}")
        self.store, self.mode, self.runners, self.rounds = store, mode, runners, rounds
        self._timed: set[Layer] = set()
        self._told = False

    def __call__(self, layer: Layer, candidates: Sequence[Candidate]) -> Choice:
        """Choose among ``candidates``, of which the first is ``direct``."""
        if self.mode == "off":
            return fastest_predicted(layer, candidates)
        if len(candidates) == 1:
            return Choice(layer, candidates[0], "nothing else is allowed", candidates[0].predicted_seconds)
        found = self.fill(layer, [c.name for c in candidates]) if self.mode == "on" else self.store.get(layer)
        return fastest_predicted(layer, candidates) if found is None else fastest_measured(layer, candidates, found)

    def fill(self, layer: Layer, names: Iterable[str], *, again: bool = False) -> Measurement:
        """The measurement of ``layer`` with all of ``names`` in it: the stored one, or a new one, which is stored.

        What was stored is timed again beside what is missing, since times of two runs are not compared; so is, once by
        each chooser, what was stored of a busy machine.
        """
        known = self.store.get(layer)
        wanted = dict.fromkeys(names)
        if known is not None:
            stale = layer not in self._timed and (again or known.busy)
            if not stale and known.names.issuperset(wanted):
                return known
            wanted.update(dict.fromkeys(known.names))
        logger.info("timing %s", layer)
        made = measure(layer, wanted, self.runners or _torch_runners(), rounds=self.rounds)
        for name, reason in made.failed.items():
            logger.info("%s of %s could not be timed: %s", name, layer, reason)
        self._timed.add(layer)
        self.store.put(layer, made)
        if made.busy and not self._told:
            self._told = True
            logger.warning(
                "the machine is busy (%.0f interruptions a second while %s was timed): the times say little; stop "
                "other work and run `hasten tune`, which times such layers again",
                made.interruptions,
                layer,
            )
        return made


def _torch_runners() -> Runners:
    from hasten.backends.tuning_runners import TorchRunners

    return TorchRunners()


def fastest_measured(layer: Layer, candidates: Sequence[Candidate], found: Measurement) -> Choice:
    """The fastest candidate by ``found``, ``direct`` unless another saves `MARGIN` of its time.

    The roofline model answers where ``found`` says nothing of the candidates beside ``direct``.
    """
    direct, *others = candidates
    timed = {c.name: found.timings[c.name].seconds for c in candidates if c.name in found.timings}

    def choice(candidate: Candidate, reason: str) -> Choice:
        return Choice(layer, candidate, reason, direct.predicted_seconds, timed if DIRECT in timed else {})

    if DIRECT in found.failed:
        return choice(direct, f"direct failed when it was timed ({found.failed[DIRECT]}): nothing can be compared")
    working = [c for c in others if c.name not in found.failed]
    if not working:
        return choice(direct, "; ".join(f"{c.name} failed when timed ({found.failed[c.name]})" for c in others))
    known = [c for c in working if c.name in timed]
    if DIRECT not in timed or not known:
        return fastest_predicted(layer, [direct, *working])
    best = min(known, key=lambda c: timed[c.name])
    mine, own = milliseconds(timed[best.name]), milliseconds(timed[DIRECT])
    way = found.timings[DIRECT].way
    own += f" direct ({way})" if layer.op == "upsample_conv2d" and way else " direct"
    if timed[best.name] <= (1 - MARGIN) * timed[DIRECT]:
        return choice(best, f"measured {mine} against {own}")
    return choice(direct, f"measured {own} against {mine} {best.name}, which does not save {MARGIN:.0%}")


def milliseconds(seconds: float) -> str:
    """Three digits.

    >>> milliseconds(0.02512)
    '25.1 ms'
    """
    return f"{seconds * 1e3:.3g} ms"
