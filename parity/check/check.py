"""Climbs the levels: are these two models the same function, and if not, where do they part?"""

from collections.abc import Iterable
from types import ModuleType

from parity.check.levels import cache, gradients, logits, optimizer, tokens, trajectory, weights
from parity.check.levels.run import Progress, error_record, run_levels
from parity.check.locate import gaps_by_module
from parity.check.pair_session import PairSession
from parity.pair.pair import Pair
from parity.report import Level, Report
from parity.report.plot_data import ModuleGaps
from parity.report.record import Record
from parity.system.devices import Devices, choose_devices, fingerprint, pinned_precision

# All levels by name, in the order in which they run.
LEVELS: dict[str, ModuleType] = {
    "weights": weights,
    "logits": logits,
    "gradients": gradients,
    "optimizer": optimizer,
    "trajectory": trajectory,
    "cache": cache,
    "tokens": tokens,
}


def check(
    pair: Pair,
    *,
    levels: Iterable[str] = tuple(LEVELS),
    dtypes: tuple[str, ...] = ("float64", "float32"),
    devices: Devices | None = None,
    seed: int = 0,
    steps: int = 100,
    evidence: bool = False,
    progress: Progress = lambda level, fraction: None,
) -> Report:
    """Compares a pair, level by level; a level that fails blocks those after it.

    Args:
        pair: the models, the weight map and the inputs.
        levels: names from `LEVELS`; climbed in the order of the ladder.
        dtypes: float64 first, which decides; float32 is judged by it.
        devices: where to run; the CPU when None.
        seed: of the random weights.
        steps: of the trajectory.
        evidence: keep the numbers that the plots of the report's page are made of.
        progress: called with a level's name and how far it is, from 0 to 1.

    Returns:
        A value that prints as a table and goes to JSON and to a page.

    Raises:
        ValueError: for a level that does not exist, or dtypes that do not start with float64.
    """
    wanted = set(levels)
    if unknown := wanted - set(LEVELS):
        raise ValueError(
            f"check: no level {', '.join(sorted(unknown))}. There are {', '.join(LEVELS)}."
        )
    if dtypes not in (("float64",), ("float64", "float32")):
        raise ValueError(
            f"check: dtypes {', '.join(dtypes)}. float64 is the truth that judges float32. "
            "Ask for float64, or for float64 and float32."
        )
    devices = devices or choose_devices("cpu")
    session = PairSession(pair, devices, dtypes=dtypes, seed=seed, steps=steps)
    rungs = {
        name: (module.records, module.locate) for name, module in LEVELS.items() if name in wanted
    }

    def done(level: Level) -> None:
        if evidence and level.name == "logits":
            session.evidence.modules = _module_gaps(session, level.records)

    with pinned_precision():
        finished, divergence = run_levels(rungs, session, progress, done)
        environment = fingerprint(devices)
    about = {
        "torch": pair.torch.name,
        "flax": pair.flax.name,
        "num_params": session.num_params,
        "config": dict(pair.config),
    }
    seen = session.evidence if evidence else None
    return Report(environment, about, finished, divergence, seen)


def _module_gaps(session: PairSession, records: Iterable[Record]) -> ModuleGaps:
    """On the probe that failed or the first one; what cannot be captured changes no verdict."""
    probe, bound = logits.failed_probe(session, records), logits.float64_bound(session)
    try:
        gaps = gaps_by_module(session, session.pair.probes[probe])
    except Exception as error:
        return ModuleGaps(probe, (), bound, note=error_record("modules", error).note)
    return ModuleGaps(probe, tuple(gaps), bound)
