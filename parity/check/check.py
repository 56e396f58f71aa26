"""Run the levels on a pair: are two models the same function, and if not, where do they diverge?"""

from collections.abc import Iterable
from types import ModuleType

from parity.check.levels import cache, gradients, logits, optimizer, tokens, trajectory, weights
from parity.check.levels.names import DTYPES, LEVELS
from parity.check.levels.run import Progress, run_levels
from parity.check.locate import gaps_by_module
from parity.check.pair_session import PairSession
from parity.pair.pair import Pair
from parity.report import Level, Report
from parity.report.plot_data import ModuleGaps
from parity.report.record import Record, error
from parity.system.devices import Devices, fingerprint, pinned_precision
from parity.system.random_state import kept_random_state

_MODULES: tuple[ModuleType, ...] = weights, logits, gradients, optimizer, trajectory, cache, tokens


@kept_random_state()
def check(
    pair: Pair,
    *,
    levels: Iterable[str] = LEVELS,
    dtypes: tuple[str, ...] = DTYPES,
    devices: Devices | None = None,
    seed: int = 0,
    steps: int = 100,
    plot_data: bool = False,
    progress: Progress = lambda level, fraction: None,
) -> Report:
    """Compare a pair, level by level; a level that fails blocks those after it.

    Args:
        pair: the models, the weight map and the inputs.
        levels: names from `LEVELS`; they run in its order.
        dtypes: float64 first, which decides; float32 is judged by it.
        devices: where to run; the CPU when None.
        seed: of the random weights.
        steps: of the trajectory.
        plot_data: keep the numbers for the plots of the report's page.
        progress: called with a level's name and the share of it that is done, from 0 to 1.

    Returns:
        A value that prints as a table and converts to JSON and to a page.

    Raises:
        ValueError: for a level that does not exist, or dtypes that do not start with float64.
    """
    wanted = set(levels)
    if unknown := wanted - set(LEVELS):
        raise ValueError(
            f"check: no level {', '.join(sorted(unknown))}. There are {', '.join(LEVELS)}."
        )
    if dtypes not in (DTYPES[:1], DTYPES):
        raise ValueError(
            f"check: dtypes {', '.join(dtypes)}. float64 is the truth that judges float32. "
            "Ask for float64, or for float64 and float32."
        )
    session = PairSession(pair, devices, dtypes=dtypes, seed=seed, steps=steps)
    modules = zip(LEVELS, _MODULES, strict=True)
    chosen = {name: (x.records, x.locate) for name, x in modules if name in wanted}

    def keep_gaps(level: Level) -> None:
        if plot_data and level.name == "logits":
            session.plot_data.modules = _module_gaps(session, level.records)

    with pinned_precision():
        finished, divergence = run_levels(chosen, session, progress, keep_gaps)
        environment = fingerprint(session.devices)
    subject = {
        "torch": pair.torch.name,
        "flax": pair.flax.name,
        "num_params": session.num_params,
        "config": dict(pair.config),
    }
    kept = session.plot_data if plot_data else None
    return Report(environment, subject, finished, divergence, kept)


def _module_gaps(session: PairSession, records: Iterable[Record]) -> ModuleGaps:
    """Measure all modules on the probe that failed or the first; an error changes no verdict."""
    probe, bound = logits.failed_probe(session, records), session.float64_bound
    try:
        gaps = gaps_by_module(session, session.pair.probes[probe])
    except Exception as exception:
        return ModuleGaps(probe, (), bound, note=error("modules", exception).note or "")
    return ModuleGaps(probe, tuple(gaps), bound)
