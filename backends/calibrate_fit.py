"""From recorded runs to a policy's options: which numbers each policy needs, and what they are expected to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from hasten.backends.calibrate_search import computed_calls, guessed, kept
from hasten.errors import UsageError, nearest
from hasten.passes.steps import fitting_polynomial as polynomial
from hasten.passes.steps import fitting_schedule as schedule
from hasten.passes.steps.catalog import build, read
from hasten.passes.steps.fitting_threshold import Prediction, at, reaching
from hasten.passes.steps.options import Request
from hasten.passes.steps.policy import Policy
from hasten.passes.steps.simulate import idle

if TYPE_CHECKING:
    from hasten.backends.calibrate_file import Calibration

DEFAULT_SPEEDUP = 2.0
TABLE = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0)
"""Speed-ups whose thresholds are told beside the one that was asked for."""
_SOUGHT: Mapping[str, Mapping[str, Any]] = {
    "teacache": {"coefficients": (1.0, 0.0), "threshold": 1.0},
    "magcache": {"ratios": (1.0, 1.0)},
    "smoothcache": {"schedule": "1"},
    "mask": {"bits": "1"},
    "first-block": {},
    "dbcache": {},
    "easycache": {},
    "fora": {},
    "deepcache": {},
}
"""The policies that can be calibrated, with something in the place of what calibration finds."""
_OTHERS_NUMBERS = ("model", "coefficients", "ratios", "schedule", "computed", "computed_bins", "weights")


@dataclass(frozen=True)
class Wishes:
    """What is wanted of a fit: a ``speedup``, or for SmoothCache an error bound ``alpha``; a polynomial's ``order``.

    ``against``: what the polynomial estimates, the change of the ``residual`` or of the ``output``.
    """

    speedup: float | None = None
    alpha: float | None = None
    order: int = 4
    against: str = "residual"


@dataclass(frozen=True)
class Fitted:
    """Options that were found, the masks to expect (one a sample, or one for all), and what to tell about them."""

    options: Mapping[str, Any]
    masks: tuple[str, ...]
    fit: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def requested(text: str) -> tuple[Request, Policy]:
    """Read the policy to calibrate, and build it with something in the place of what is sought."""
    request = read(text)
    if request.name not in _SOUGHT:
        known = ", ".join(_SOUGHT)
        raise UsageError(
            f"{request.name} has nothing to calibrate; these have: {known}.{nearest(request.name, _SOUGHT)}"
        )
    if given := [key for key in _OTHERS_NUMBERS if request.options.get(key) is not None]:
        raise UsageError(f"{request.name}: {given[0]} was given, which is what calibration finds; leave it out")
    sought = {k: v for k, v in _SOUGHT[request.name].items() if request.options.get(k) is None}
    return request, build(Request(request.name, {**request.options, **sought}))


def is_recorded(name: str) -> bool:
    """Whether a policy's fit needs recorded runs."""
    return name not in ("fora", "deepcache")


def check_wishes(name: str, wishes: Wishes) -> None:
    """Refuse what does not go with the policy."""
    if wishes.alpha is not None and name != "smoothcache":
        raise UsageError(f"alpha is the error bound of smoothcache, and {name} was asked for; leave it out")
    if wishes.alpha is not None and wishes.speedup is not None:
        raise UsageError("alpha and speedup were given, and either decides the schedule; give one of them")
    if wishes.speedup is not None and wishes.speedup < 1:
        raise UsageError(f"speedup {wishes.speedup:g} was asked for; a cache makes nothing slower: give at least 1")


def fit(calibration: Calibration, wishes: Wishes) -> Fitted:
    """Fit the policy that was recorded for; `UsageError` where the recording or the model does not allow it."""
    request, _ = requested(calibration.request)
    check_wishes(request.name, wishes)
    if is_recorded(request.name) and not calibration.samples:
        raise UsageError("nothing is recorded yet, so nothing can be fitted; record at least one sample")
    options = {key: value for key, value in request.options.items() if value is not None}
    for sample in calibration.samples:
        sample.check_finite()
    return _FITS[request.name](calibration, wishes, options)


Options = dict[str, Any]


def _teacache(calibration: Calibration, wishes: Wishes, options: Options) -> Fitted:
    x, y = polynomial.points(calibration.samples, wishes.against)
    found = polynomial.fit(x, y, wishes.order)
    options |= {"coefficients": found.coefficients, "fitted": found.high}
    told = {"order": wishes.order, "against": wishes.against, **asdict(found)}
    fitted = _threshold(calibration, wishes, options, {"polynomial": told})
    concerns = polynomial.concerns(found, wishes.order) if options.get("sign", "signed") == "signed" else ()
    return Fitted(fitted.options, fitted.masks, fitted.fit, (*concerns, *fitted.notes))


def _probed(calibration: Calibration, wishes: Wishes, options: Options) -> Fitted:
    # Distances over more calls were not recorded; an EasyCache slope spans one call more than the reuses before it.
    most = calibration.distance - (calibration.kind == "easycache")
    if options["limit"] < 0 or options["limit"] > most:
        options["limit"] = most
    return _threshold(calibration, wishes, options, {})


def _threshold(calibration: Calibration, wishes: Wishes, options: Options, told: Mapping[str, Any]) -> Fitted:
    asked = options.get("threshold") if wishes.speedup is None and _given(calibration, "threshold") else None
    policy = complete(calibration.kind, {**options, "threshold": 1.0})  # the one that is meant comes with each question
    samples, share = calibration.samples, calibration.share
    if asked is not None:
        found = at(policy, samples, share, asked)
    else:
        found = reaching(policy, samples, share, wishes.speedup or DEFAULT_SPEEDUP)
    fit = {**told, "thresholds": [_row(p) for p in _sweep(policy, calibration)]}
    word = idle(policy, found.masks[0], found.threshold)
    notes = () if word is None else (f"the first run is predicted so: {word}",)
    return Fitted({**options, "threshold": found.threshold}, found.masks, fit, notes)


def _sweep(policy: Policy, calibration: Calibration) -> list[Prediction]:
    """The thresholds of round speed-ups, as far as they can be reached."""
    rows = [_reached(policy, calibration, wanted) for wanted in TABLE]
    return [row for row in rows if row is not None]


def _reached(policy: Policy, calibration: Calibration, wanted: float) -> Prediction | None:
    try:
        return reaching(policy, calibration.samples, calibration.share, wanted)
    except UsageError:
        return None


def _row(found: Prediction) -> Mapping[str, Any]:
    return {
        "threshold": found.threshold,
        "speedup": found.speedup,
        "computed": found.computed,
        "mask": found.masks[0],
    }


def _magcache(calibration: Calibration, wishes: Wishes, options: Options) -> Fitted:
    options["ratios"] = schedule.mean_ratios(calibration.samples)
    policy = complete("magcache", options)
    if wishes.speedup is None and _given(calibration, "threshold"):
        mask = _mask(policy, calibration.steps)
    else:
        wanted = wishes.speedup or DEFAULT_SPEEDUP
        options["threshold"], mask = schedule.magnitude_reaching(policy, wanted, calibration.share, calibration.steps)
    return Fitted(options, (mask,), {"ratios": list(options["ratios"])})


def _smoothcache(calibration: Calibration, wishes: Wishes, options: Options) -> Fitted:
    errors = schedule.mean_errors(calibration.samples)
    if wishes.alpha is not None:
        found = schedule.smooth(errors, wishes.alpha)
    else:
        found = schedule.smooth_reaching(errors, wishes.speedup or DEFAULT_SPEEDUP, calibration.share)
    told = {"alpha": found.alpha, "masks": dict(found.masks)}
    return Fitted({**options, "schedule": found.merged}, (found.merged,), told)


def _interval(calibration: Calibration, wishes: Wishes, options: Options) -> Fitted:
    policy = complete(calibration.kind, options)
    wanted = wishes.speedup or DEFAULT_SPEEDUP
    interval, mask = schedule.interval_reaching(policy, wanted, calibration.share, calibration.steps)
    return Fitted({**options, "interval": interval}, (mask,), {"interval": interval})


def _without_trial(calibration: Calibration, wishes: Wishes, options: Options) -> Fitted:
    """The best of the masks that were tried so far, else the one that recorded distances speak for."""
    wanted = wishes.speedup or DEFAULT_SPEEDUP
    computed = computed_calls(wanted, calibration.steps, calibration.share, options.get("bits"))
    tried = {mask: error for mask, error in calibration.tried.items() if mask.count("1") == computed}
    moves = [kept(sample, options["payload"]) for sample in calibration.samples]
    mask = min(tried, key=tried.__getitem__) if tried else guessed(moves, computed, "sum")
    note = (
        "the mask was not tried here; name the model instead of --merge, with this file as -o, to search a better one"
    )
    return Fitted({**options, "bits": mask}, (mask,), {"computed": computed}, (note,))


def _mask(policy: Policy, steps: int) -> str:
    mask = policy.decision.mask(steps)
    assert mask is not None
    return "".join(str(int(bit)) for bit in mask)


def _given(calibration: Calibration, option: str) -> bool:
    """Whether the text that was asked for names an option, rather than leaving it at its default."""
    return f"{option}=" in calibration.request


def complete(name: str, options: Mapping[str, Any]) -> Policy:
    """Build a policy from some of its options, the others at their defaults."""
    return build(Request(name, {**read(name).options, **options}))


_FITS: Mapping[str, Callable[[Calibration, Wishes, Options], Fitted]] = {
    "teacache": _teacache,
    "first-block": _probed,
    "dbcache": _probed,
    "easycache": _probed,
    "magcache": _magcache,
    "smoothcache": _smoothcache,
    "fora": _interval,
    "deepcache": _interval,
    "mask": _without_trial,
}
