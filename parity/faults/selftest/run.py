"""Run all trials and check clean pairs, and tabulate the outcomes."""

import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor

import jax
import torch

from parity.check.check import check
from parity.check.levels.names import HORIZON
from parity.faults.selftest.fault import Changes, Fault
from parity.faults.selftest.trial import (
    PAIRS,
    Outcome,
    pair_module,
    port,
    right_rules,
    small_twins,
    trial,
)
from parity.pair.text import Corpus
from parity.report import Report
from parity.report.record import Verdict

_HEAD = """# What the check sees

Each line is a fault planted in one of two models that were the same function. The bound is the
smallest under which the fault would have passed, in the metric of the level that failed: any
tolerance as loose as that hides it. `parity self-test --markdown docs/self_test.md` writes this.
"""

# What the check must reach: all detected, none called by a wrong name, and these shares of them.
LOCATED, EXPLAINED = 0.95, 0.80
# Twins without a fault, by name: changes of their config, and their task.
_CLEAN_TWINS: Mapping[str, tuple[Changes, str]] = {
    "twins": ({}, "next-token"),
    "twins with dropout": ({"dropout": 0.1}, "next-token"),
    "rotary twins": ({"positions": "rotary", "num_kv_heads": 2, "head_dim": 6}, "next-token"),
    "ALiBi twins": ({"positions": "alibi", "num_kv_heads": 2}, "next-token"),
    "T5 twins": ({"positions": "t5", "window": 7}, "next-token"),
    "classifiers of tokens": ({}, "token-class"),
    "classifiers of sequences": ({}, "sequence-class"),
}
CLEAN = *_CLEAN_TWINS, *PAIRS

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class SelfTest:
    """The outcomes of all trials and of the checks of clean pairs.

    Attributes:
        outcomes: by fault.
        alarms: reports of clean pairs that did not pass, by pair and seed.
        clean: how many clean pairs were checked.
    """

    outcomes: tuple[Outcome, ...]
    alarms: dict[str, Report]
    clean: int

    @property
    def exit_code(self) -> int:
        """0 if the check reaches what it must, else 1."""
        count = len(self.outcomes)
        good = (
            all(x.detected for x in self.outcomes)
            and sum(x.located for x in self.outcomes) >= LOCATED * count
            and sum(x.explained for x in self.outcomes) >= EXPLAINED * count
            and not any(x.misled for x in self.outcomes)
            and not self.alarms
        )
        return 0 if good else 1

    @property
    def summary(self) -> str:
        """The counts in a sentence."""
        count = len(self.outcomes)
        parts = [
            f"{sum(getattr(x, name) for x in self.outcomes)} of {count} {name}"
            for name in ("detected", "located", "explained")
            if count
        ]
        misled = sum(x.misled for x in self.outcomes)
        parts.append(f"{misled} with a wrong cause")
        parts.append(f"{len(self.alarms)} false alarms over {self.clean} clean pairs")
        return ", ".join(parts) + "."

    def to_markdown(self) -> str:
        """Return the table for the docs."""
        kinds = Counter(x.fault.kind for x in self.outcomes)
        lines = [
            _HEAD,
            self.summary[:1].upper() + self.summary[1:],
            "",
            "Faults: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()) + ".",
            "",
            "| fault | in | kind | smallest bound that would pass | located at | cause named |",
            "|---|---|---|---|---|---|",
        ]
        for outcome in self.outcomes:
            found = outcome.report.divergence
            where = f"`{found.where}`" if found else ""
            where += "" if outcome.located else " (wrong)"
            cause = (found.cause or "") if found else ""
            cause += " (wrong)" if outcome.misled else ""
            fault = outcome.fault
            lines.append(
                f"| {fault.title} | {fault.subject} | {fault.kind} | {_tolerance(outcome)} | "
                f"{where} | {cause.replace('|', '/')} |"
            )
        return "\n".join(lines) + "\n"

    def to_json(self) -> str:
        """Return the outcomes as JSON."""
        document = {
            "schema": 1,
            "detected": sum(x.detected for x in self.outcomes),
            "located": sum(x.located for x in self.outcomes),
            "explained": sum(x.explained for x in self.outcomes),
            "misled": sum(x.misled for x in self.outcomes),
            "faults": [
                {
                    "title": x.fault.title,
                    "subject": x.fault.subject,
                    "kind": x.fault.kind,
                    "detected": x.detected,
                    "located": x.located,
                    "explained": x.explained,
                    "divergence": dataclasses.asdict(x.report.divergence)
                    if x.report.divergence
                    else None,
                }
                for x in self.outcomes
            ],
            "clean": self.clean,
            "false_alarms": sorted(self.alarms),
        }
        return json.dumps(document, indent=1) + "\n"


def self_test(
    faults: Sequence[Fault],
    seeds: int,
    jobs: int = 1,
    progress: Progress = lambda title, done, total: None,
) -> SelfTest:
    """Plant every fault, and check clean pairs.

    Args:
        faults: to plant.
        seeds: of clean pairs, shared out among `CLEAN`.
        jobs: processes that share the work out.
        progress: called with what was tried last, how many are done and how many there are.

    Returns:
        The outcomes, in the order of the faults.
    """
    pairs = [(CLEAN[seed % len(CLEAN)], seed) for seed in range(seeds)]
    titles = [fault.title for fault in faults] + [f"clean {x}, seed {seed}" for x, seed in pairs]
    done = itertools.count(1)
    progress("starting", 0, len(titles))
    with _workers(jobs) as workers:
        trials = [workers.submit(_trial, fault) for fault in faults]
        checks = [workers.submit(_clean, *pair) for pair in pairs]
        for future, title in zip([*trials, *checks], titles, strict=True):
            future.add_done_callback(
                lambda _, title=title: progress(title, next(done), len(titles))
            )
        outcomes = tuple(future.result() for future in trials)
        reports = [future.result() for future in checks]
    named = zip(titles[len(faults) :], reports, strict=True)
    alarms = {title: report for title, report in named if report.verdict is not Verdict.PASS}
    return SelfTest(outcomes, alarms, seeds)


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[Executor]:
    """Start processes that share compiled programs: half of each pair is the same in all trials."""
    with tempfile.TemporaryDirectory(prefix="parity-") as programs:
        workers = ProcessPoolExecutor(
            jobs,
            # Not forked: a copy of a process that has threads waits for what they will never do.
            multiprocessing.get_context("spawn"),
            _prepare,
            (programs,),
        )
        try:
            yield workers
        except BaseException:
            workers.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        finally:
            workers.shutdown()


def _prepare(programs: str) -> None:
    """Set up a worker."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    torch.set_num_threads(1)
    jax.config.update("jax_compilation_cache_dir", programs)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def _trial(fault: Fault) -> Outcome:
    return trial(fault, Corpus.load())


def _clean(subject: str, seed: int) -> Report:
    return clean(subject, seed, Corpus.load())


def clean(subject: str, seed: int, corpus: Corpus) -> Report:
    """Check a pair without a fault: all levels, float64 and float32.

    Args:
        subject: one of `CLEAN`.
        seed: of weights and inputs.
        corpus: the text of the twins' probes.

    Returns:
        The report of the check.
    """
    if subject in _CLEAN_TWINS:
        changes, task = _CLEAN_TWINS[subject]
        pair = small_twins(corpus, changes, task=task, seed=seed)
        return check(pair, seed=seed, steps=HORIZON)
    with pair_module(subject) as module:
        return check(port(module, right_rules(subject), seed), seed=seed, steps=HORIZON)


def _tolerance(outcome: Outcome) -> str:
    """Return the smallest bound under which the fault would have passed its level."""
    bad = [
        record
        for level in outcome.report.levels
        for record in level.records
        if record.verdict is Verdict.FAIL and record.value is not None
    ]
    if not bad:
        return ""
    metric, dtype = bad[0].metric, bad[0].dtype
    values = [x.value or 0.0 for x in bad if (x.metric, x.dtype) == (metric, dtype)]
    return f"{max(values):.1e} ({metric.replace('_', ' ')})"
