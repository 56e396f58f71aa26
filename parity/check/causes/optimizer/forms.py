"""Optimizers by name: which form, with which constants, takes the steps that were seen.

Every form is run on the gradients that a side saw, and its constants are fitted to that side's
updates. A form explains a side when nothing but rounding is left, which only the right one does.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from scipy.optimize import OptimizeResult, least_squares

from parity.check.bounds import FORM_RESIDUAL, GRADIENT_ROUNDING, WEIGHT_ROUNDING
from parity.check.causes.fit import Number
from parity.check.causes.optimizer.step import Step

_SECONDS = 20.0  # of the processor, to look for the form of one side
_MOST = 256  # elements to fit
_ROUNDED = 1e-9  # error of a setting at least, of itself
_EPSILON = 1e-4  # what Adagrad is given as epsilon at most
_FAR = 1e30  # in units of rounding: where a form has no number

Settings = Mapping[str, float]
# (settings, gradients (T, N), weights before each step (T, N)) to the direction that is subtracted
Direction = Callable[[Settings, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Form:
    """One way to make updates.

    Attributes:
        family: what the optimizer is called.
        traits: how it differs from others of its family, each with what makes it like torch's.
        direction: what is subtracted, times the learning rate.
        starts: values of each setting to begin a fit with.
        limits: of settings; beyond them a form is but a special case of another.
    """

    family: str
    traits: Mapping[str, str]
    direction: Direction
    starts: Mapping[str, tuple[float, ...]]
    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A form and the settings, with the learning rate among them, that explain one side."""

    form: Form
    settings: Mapping[str, Number]


def explain_forms(
    flax: Sequence[Step], torch: Sequence[Step], names: tuple[str, str]
) -> str | None:
    """Describe how two optimizers differ; None where a form is unknown or nothing differs."""
    sides = [_observed(steps) for steps in (flax, torch)]
    found: list[Fit] = []
    for side in sides:
        fits = next(_fits(side), None)
        if fits is None:
            return None
        found.append(fits)
    # Inside the root, epsilon cannot be told from a first sum, and it is the likelier reading.
    inside = [_INSIDE in fit.form.traits for fit in found]
    if found[0].form is not found[1].form and inside[0] == inside[1]:
        # The simplest form of one side may be a special case of the other's.
        for form in (found[0].form, found[1].form):
            both = [_fit(form, side) for side in sides]
            if both[0] is not None and both[1] is not None:
                found = [both[0], both[1]]
                break
    return "; ".join(_differences(dict(zip(names, found, strict=True)))) or None


def _differences(sides: Mapping[str, Fit]) -> Iterator[str]:
    (name, ours), (other, theirs) = sides.items()
    if ours.form.family != theirs.form.family:
        yield f"{name} steps as {ours.form.family} and {other} as {theirs.form.family}"
        return
    for trait in dict.fromkeys((*ours.form.traits, *theirs.form.traits)):
        if (trait in ours.form.traits) != (trait in theirs.form.traits):
            side, fit = (name, ours) if trait in ours.form.traits else (other, theirs)
            yield f"in {side} alone {trait} ({fit.form.traits[trait]})"
    for setting in dict.fromkeys((*ours.settings, *theirs.settings)):
        a, b = (fit.settings.get(setting, Number(0.0, np.inf)) for fit in (ours, theirs))
        if a.differs(b):
            digits = 6 if _text(a) != _text(b) else 12
            words = f"{setting} is {_text(a, digits)} in {name} and {_text(b, digits)} in {other}"
            remedy = _REMEDIES.get(setting)
            if setting == _FIRST_SUM and not a.is_zero and abs(a.value - b.value) < _EPSILON:
                remedy = f"as {_INSIDE} makes it: {_TORCH_INSIDE['Adagrad']}"
            yield words + (f" ({remedy})" if remedy else "")


def _text(x: Number, digits: int = 6) -> str:
    return "0" if x.is_zero else f"{x.value:.{digits}g}"


@dataclasses.dataclass(frozen=True)
class _Observed:
    """Gradients, weights and updates (T, N) of one side, and the rounding of the updates."""

    gradients: np.ndarray
    weights: np.ndarray
    updates: np.ndarray
    noise: np.ndarray


def _observed(steps: Sequence[Step]) -> _Observed:
    names = [name for name in steps[0].gradient if steps[0].gradient[name].size]

    def joined(leaves: Callable[[Step], Mapping[str, np.ndarray]]) -> np.ndarray:
        return np.array([np.concatenate([leaves(step)[x] for x in names]) for step in steps])

    gradients, weights = joined(lambda step: step.gradient), joined(lambda step: step.before)
    updates = joined(lambda step: step.after) - weights
    sizes = np.max(np.abs(gradients), axis=1, keepdims=True)
    seen = np.all(np.abs(gradients) > 1e-6 * sizes, axis=0)
    kept = np.flatnonzero(seen)[:: -(-int(np.count_nonzero(seen)) // _MOST) or 1]
    gradients, weights, updates = (x[:, kept] for x in (gradients, weights, updates))
    relative = GRADIENT_ROUNDING * sizes / np.maximum(np.abs(gradients), 1e-300)
    noise = np.abs(updates) * np.maximum.accumulate(relative) + WEIGHT_ROUNDING * np.abs(weights)
    return _Observed(gradients, weights, updates, np.maximum(noise, 1e-300))


def _fits(side: _Observed) -> Iterator[Fit]:
    """Yield the forms that explain a side, the simplest first."""
    start = time.process_time()
    for form in FORMS:
        if time.process_time() - start > _SECONDS or not side.updates.size:
            return
        if fit := _fit(form, side):
            yield fit


def _fit(form: Form, side: _Observed) -> Fit | None:
    """Fit the settings of a form; None if it does not explain the side."""
    names = list(form.starts)
    target = side.updates / side.noise

    def predicted(x: np.ndarray) -> tuple[np.ndarray, float]:
        settings = {name: _value(name, y) for name, y in zip(names, x, strict=True)}
        with np.errstate(all="ignore"):
            direction = form.direction(settings, side.gradients, side.weights) / side.noise
            rate = -float(np.sum(direction * target) / np.sum(direction * direction))
        return direction, rate

    def residuals(x: np.ndarray) -> np.ndarray:
        direction, rate = predicted(x)
        left = target + rate * direction
        return np.nan_to_num(left, nan=_FAR, posinf=_FAR, neginf=-_FAR).ravel()

    # First what shapes the steps most, from every start, then all together from the best.
    core = np.array([name in _CORE for name in names])
    grid = [
        np.array([_unknown(name, y) for name, y in zip(names, values, strict=True)])
        for values in itertools.product(*form.starts.values())
    ]
    best = min((_search(residuals, x, core) for x in grid), key=lambda found: found.cost)
    found = _search(residuals, best.x, np.ones_like(core))
    left = float(np.sqrt(np.mean(found.fun**2)))
    fitted = {name: _value(name, y) for name, y in zip(names, found.x, strict=True)}
    if not left <= FORM_RESIDUAL or any(fitted[x] > limit for x, limit in form.limits.items()):
        return None
    rate = predicted(found.x)[1]
    settings = {"the learning rate": Number(rate, abs(rate) * _ROUNDED)}
    errors = _errors(found.jac, max(left, 1.0))
    for name, y, error in zip(names, found.x, errors, strict=True):
        slope = abs(_value(name, y + 1e-6) - fitted[name]) / 1e-6
        error = slope * error if np.isfinite(error) else np.inf
        settings[name] = Number(fitted[name], error + abs(fitted[name]) * _ROUNDED)
    return Fit(form, settings)


def _search(
    residuals: Callable[[np.ndarray], np.ndarray], start: np.ndarray, free: np.ndarray
) -> OptimizeResult:
    """Return the least squares from a start, to the last digit, over the unknowns that are free."""

    def placed(x: np.ndarray) -> np.ndarray:
        whole = start.copy()
        whole[free] = x
        return whole

    if not np.any(free):
        left = residuals(start)
        return OptimizeResult(x=start, fun=left, cost=float(left @ left) / 2.0)
    ends = dict.fromkeys(("ftol", "xtol", "gtol"), 4e-16)
    found = least_squares(lambda x: residuals(placed(x)), start[free], max_nfev=40, **ends)
    found.x = placed(found.x)
    return found


def _errors(jacobian: np.ndarray, scale: float) -> np.ndarray:
    """Return what rounding can do to each unknown; infinite where nothing depends on it."""
    sizes = np.linalg.norm(jacobian, axis=0)
    safe = np.where(sizes > 0.0, sizes, 1.0)
    _, singular, right = np.linalg.svd(jacobian / safe, full_matrices=False)
    singular = np.maximum(singular, 1e-10 * singular[0])
    errors = np.linalg.norm(right.T / singular, axis=1) / safe * scale
    return np.where(sizes > 1e-6 * scale, errors, np.inf)


def _unknown(name: str, value: float) -> float:
    """Return a setting as it is searched for, without limits."""
    if name == "epsilon":
        return float(np.log(value))
    return float(np.log(value / (1.0 - value))) if name in _SHARES else value


def _value(name: str, x: float) -> float:
    if name == "epsilon":
        return float(np.exp(min(x, 50.0)))
    if name in _SHARES:
        return float(0.5 + 0.5 * np.tanh(x / 2.0))
    return abs(float(x)) if name.startswith("the first") else float(x)


_SHARES = "alpha", "rho", "beta1", "beta2"
_CORE = {*_SHARES, "epsilon", "momentum"}


def _running(values: np.ndarray, keep: float, take: float, start: float = 0.0) -> np.ndarray:
    """Return keep * last + take * value at each step."""
    kept, last = np.empty_like(values), np.full_like(values[0], start)
    for step, value in enumerate(values):
        last = kept[step] = keep * last + take * value
    return kept


def _divisor(squares: np.ndarray, epsilon: float, inside: bool) -> np.ndarray:
    return np.sqrt(squares + epsilon) if inside else np.sqrt(squares) + epsilon


def _sgd(nesterov: bool, late: bool) -> Direction:
    def direction(s: Settings, g: np.ndarray, p: np.ndarray) -> np.ndarray:
        decay = s["weight decay"] * p
        d = g if late else g + decay
        taken = d * np.where(np.arange(len(d)) > 0, 1.0 - s["dampening"], 1.0)[:, None]
        buffer = _running(taken, s["momentum"], 1.0)
        made = d + s["momentum"] * buffer if nesterov else buffer
        return made + decay if late else made

    return direction


def _rmsprop(inside: bool, centered: bool) -> Direction:
    def direction(s: Settings, g: np.ndarray, p: np.ndarray) -> np.ndarray:
        d, alpha = g + s["weight decay"] * p, s["alpha"]
        squares = _running(d * d, alpha, 1.0 - alpha, s["the first second moment"])
        if centered:
            squares = squares - _running(d, alpha, 1.0 - alpha) ** 2
        return _running(d / _divisor(squares, s["epsilon"], inside), s["momentum"], 1.0)

    return direction


def _adagrad(inside: bool) -> Direction:
    def direction(s: Settings, g: np.ndarray, p: np.ndarray) -> np.ndarray:
        d = g + s["weight decay"] * p
        squares = _running(d * d, 1.0, 1.0, s.get(_FIRST_SUM, 0.0))
        rates = 1.0 / (1.0 + np.arange(len(d)) * s.get("decay of the rate", 0.0))
        return rates[:, None] * d / _divisor(squares, s.get("epsilon", 0.0), inside)

    return direction


def _adadelta(s: Settings, g: np.ndarray, p: np.ndarray) -> np.ndarray:
    d, rho, made = g + s["weight decay"] * p, s["rho"], np.empty_like(g)
    squares, deltas = _running(d * d, rho, 1.0 - rho), np.zeros_like(g[0])
    for step in range(len(d)):
        made[step] = np.sqrt((deltas + s["epsilon"]) / (squares[step] + s["epsilon"])) * d[step]
        deltas = rho * deltas + (1.0 - rho) * made[step] ** 2
    return made


def _moments(s: Settings, d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the first moment and the second with its bias corrected, and counts (T, 1)."""
    counts = np.arange(1, len(d) + 1)[:, None]
    first = _running(d, s["beta1"], 1.0 - s["beta1"])
    second = _running(d * d, s["beta2"], 1.0 - s["beta2"]) / (1.0 - s["beta2"] ** counts)
    return first, second, counts


def _adam(most: str = "", rectified: bool = False) -> Direction:
    def direction(s: Settings, g: np.ndarray, p: np.ndarray) -> np.ndarray:
        first, second, counts = _moments(s, g + s["weight decay"] * p)
        rest = 1.0 - s["beta2"] ** counts
        if most == "corrected":
            second = np.maximum.accumulate(second)
        elif most:
            second = np.maximum.accumulate(second * rest) / rest
        unbiased = first / (1.0 - s["beta1"] ** counts)
        made = unbiased / (np.sqrt(second) + s["epsilon"])
        if not rectified:
            return made
        end = 2.0 / (1.0 - s["beta2"]) - 1.0
        length = end - 2.0 * counts * (1.0 - rest) / rest
        factor = (length - 4) * (length - 2) * end / ((end - 4) * (end - 2) * length)
        return np.where(length > 5.0, np.sqrt(np.maximum(factor, 0.0)) * made, unbiased)

    return direction


def _nadam(scheduled: bool) -> Direction:
    def direction(s: Settings, g: np.ndarray, p: np.ndarray) -> np.ndarray:
        d, beta1 = g + s["weight decay"] * p, s["beta1"]
        first, second, counts = _moments(s, d)
        if scheduled:
            now, following = (
                beta1 * (1.0 - 0.5 * 0.96 ** (x * s["momentum_decay"]))
                for x in (counts, counts + 1)
            )
            product = np.cumprod(now, axis=0)
            made = (1 - now) / (1 - product) * d + following / (1 - product * following) * first
        else:
            made = beta1 * first / (1 - beta1 ** (counts + 1)) + (1 - beta1) * d / (
                1 - beta1**counts
            )
        return made / (np.sqrt(second) + s["epsilon"])

    return direction


def _adamax(s: Settings, g: np.ndarray, p: np.ndarray) -> np.ndarray:
    d = g + s["weight decay"] * p
    first, _, counts = _moments(s, d)
    largest, last = np.empty_like(d), np.zeros_like(d[0])
    for step, value in enumerate(np.abs(d) + s["epsilon"]):
        last = largest[step] = np.maximum(value, s["beta2"] * last)
    return first / (1.0 - s["beta1"] ** counts) / largest


def _lion(s: Settings, g: np.ndarray, p: np.ndarray) -> np.ndarray:
    kept = _running(g, s["beta2"], 1.0 - s["beta2"])
    before = np.concatenate([np.zeros_like(g[:1]), kept[:-1]])
    return np.sign(s["beta1"] * before + (1.0 - s["beta1"]) * g) + s["weight decay"] * p


_INSIDE, _FIRST_SUM = "epsilon is inside the root", "the first sum of squares"
_CENTERED = "the second moment is centered"
_NESTEROV = "momentum is that of Nesterov"
_LATE = "weight decay is added after the momentum"
_TORCH_INSIDE = {
    "RMSprop": "optax.rmsprop with eps_in_sqrt=False has it outside, as torch",
    "Adagrad": "torch divides by sqrt(sum) + eps, optax.adagrad by sqrt(sum + eps)",
}
_REMEDIES = {
    _FIRST_SUM: "initial_accumulator_value, 0 in torch and 0.1 in optax by default",
    "the first second moment": "initial_scale of optax.rmsprop; torch starts at 0",
    "dampening": "optax has none: use dampening=0",
    "alpha": "decay in optax: 0.9 by default, alpha in torch: 0.99",
}
_ADAM = {"beta1": (0.9,), "beta2": (0.999,), "epsilon": (1e-8, 1e-4), "weight decay": (0.0,)}


def _traits(**given: bool) -> dict[str, str]:
    words = {
        "nesterov": (_NESTEROV, "nesterov of torch.optim.SGD and of optax.sgd"),
        "late": (_LATE, "add_decayed_weights before the momentum is torch's order"),
        "centered": (_CENTERED, "centered of both"),
    }
    return {words[name][0]: words[name][1] for name, is_given in given.items() if is_given}


def _forms() -> Iterator[Form]:
    sgd = {"momentum": (0.0, 0.9), "dampening": (0.0,), "weight decay": (0.0,)}
    for nesterov, late in itertools.product((False, True), repeat=2):
        traits = _traits(nesterov=nesterov, late=late)
        yield Form("SGD", traits, _sgd(nesterov, late), sgd)
    rmsprop = {
        "alpha": (0.9, 0.99),
        "epsilon": (1e-8, 1e-3, 1e-1),
        "the first second moment": (0.0, 1.0),
        "momentum": (0.0,),
        "weight decay": (0.0,),
    }
    for inside, centered in ((False, False), (True, False), (False, True), (True, True)):
        traits = {_INSIDE: _TORCH_INSIDE["RMSprop"]} if inside else {}
        traits |= _traits(centered=centered)
        yield Form("RMSprop", traits, _rmsprop(inside, centered), rmsprop, {"epsilon": 10.0})
    # Inside the root, epsilon acts as a first sum.
    inside = {"epsilon": (1e-10, 1e-7), "weight decay": (0.0,)}
    traits, limits = {_INSIDE: _TORCH_INSIDE["Adagrad"]}, {"epsilon": _EPSILON}
    yield Form("Adagrad", traits, _adagrad(True), inside, limits)
    adagrad = {
        _FIRST_SUM: (0.0, 0.1),
        "weight decay": (0.0,),
        "decay of the rate": (0.0,),
    }
    yield Form("Adagrad", {}, _adagrad(False), adagrad)
    adagrad = {"epsilon": (1e-10, 1e-7)} | adagrad
    yield Form("Adagrad", {}, _adagrad(False), adagrad, {"epsilon": 10.0})
    adadelta = {"rho": (0.9,), "epsilon": (1e-6,), "weight decay": (0.0,)}
    yield Form("Adadelta", {}, _adadelta, adadelta)
    yield Form("Adam", {}, _adam(), _ADAM)
    yield Form("Adamax", {}, _adamax, _ADAM)
    yield Form("NAdam", {}, _nadam(False), _ADAM)
    words = "its momentum follows a schedule"
    remedy = "momentum_decay of torch.optim.NAdam; optax.nadam has none: write it or use Adam"
    scheduled = _ADAM | {"momentum_decay": (4e-3,)}
    yield Form("NAdam", {words: remedy}, _nadam(True), scheduled, {"momentum_decay": 50.0})
    yield Form("RAdam", {}, _adam(rectified=True), _ADAM)
    for most, words in (
        ("raw", "the largest second moment is taken before its bias is corrected"),
        ("corrected", "the largest second moment is taken after its bias is corrected"),
    ):
        remedy = "torch takes it before and optax.amsgrad after"
        yield Form("AMSGrad", {words: remedy}, _adam(most), _ADAM)
    yield Form("Lion", {}, _lion, {"beta1": (0.9,), "beta2": (0.99,), "weight decay": (0.0,)})


FORMS = tuple(_forms())
