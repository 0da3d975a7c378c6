"""Runs a fuzzer for a given time: Hypothesis generates inputs, and searches for those with higher scores."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from time import monotonic, thread_time
from traceback import format_exception
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings, target
from hypothesis.database import InMemoryExampleDatabase
from hypothesis.errors import HypothesisWarning
from hypothesis.strategies import SearchStrategy

from lab.fuzzers import NAMES

BATCH = 200  # examples per seed; the next batch begins with those of the highest scores
MAX_CPU_S = 2.0  # limit for one example; the slowest valid ones take a tenth of this
PHASES = (Phase.reuse, Phase.generate, Phase.target)


class Finding(AssertionError):
    """An input that is handled wrongly; the message says how."""


class _TimeIsUp(BaseException):
    """Raised between two inputs when the time of a run is up."""


@dataclass(frozen=True)
class Fuzzer:
    """A fuzzer of one reader of untrusted input.

    Attributes:
        inputs: strategy that generates the inputs.
        check: handles an input as the product does. It raises an exception for a finding, and returns scores by name,
            which Hypothesis tries to increase, and the outcome, which is counted.
        prepare: creates the data that inputs are derived from.
    """

    inputs: SearchStrategy[Any]
    check: Callable[[Any], tuple[dict[str, float], str]]
    prepare: Callable[[], object] = lambda: None


@dataclass
class Report:
    """Result of one fuzzer.

    Attributes:
        seconds: duration.
        inputs: number of inputs.
        outcomes: number of inputs by outcome, such as "accepted" and "refused".
        best: highest scores, by name.
        findings: the traceback of each finding.
        input: the input of the finding, after shrinking; None if there are no findings.
    """

    name: str
    seconds: float = 0.0
    inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    best: dict[str, float] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    input: Any = None


def fuzz_all(names: Iterable[str], seconds: float, first_seed: int) -> Iterator[Report]:
    """Run fuzzers one after the other; raises ValueError for an unknown name."""
    os.environ.setdefault("RUST_BACKTRACE", "0")  # no backtraces: panics of tokenizers are expected
    names = list(names)
    if unknown := set(names) - set(NAMES):
        raise ValueError(f"no fuzzer {min(unknown)!r}; there are: {', '.join(NAMES)}")
    for name in names:
        yield fuzz(name, import_module(f"lab.fuzzers.{name}").FUZZER, seconds, first_seed)


def fuzz(
    name: str, fuzzer: Fuzzer, seconds: float, first_seed: int = 1, reduces: bool = True, at_least: int = 1
) -> Report:
    """Run a fuzzer until it has a finding, or the time is up.

    Args:
        reduces: shrink the input of the finding.
        at_least: number of inputs to try even if the time is up.
    """
    fuzzer.prepare()
    report, started, database = Report(name), monotonic(), InMemoryExampleDatabase()

    def time_is_up() -> bool:
        return monotonic() - started > seconds and report.inputs >= at_least

    def example(value: Any) -> None:
        if time_is_up() and not failed:
            raise _TimeIsUp
        report.inputs += 1
        cpu_s = thread_time()
        try:
            scores, outcome = fuzzer.check(value)
            cpu_s = thread_time() - cpu_s
            if cpu_s > MAX_CPU_S:
                raise Finding(f"it took {cpu_s:.1f} s of CPU time")
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failed.append(True)
            report.input = value  # the last failing input that Hypothesis tries is the smallest
            if isinstance(error, Exception):
                raise
            raise Finding(f"{type(error).__name__}, which is no Exception: {error}") from error
        report.outcomes[outcome] += 1
        for label, score in scores.items():
            target(score, label=label)
            report.best[label] = max(score, report.best.get(label, score))

    failed: list[bool] = []
    number = first_seed
    while not time_is_up() and not report.findings:
        run = given(fuzzer.inputs)(example)
        run = seed(number)(_settings(database, reduces)(run))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", HypothesisWarning)  # about large inputs
                run()
        except _TimeIsUp:
            break
        except Exception as error:
            report.findings += _findings(error)
        number += 1
    report.seconds = monotonic() - started
    return report


def _settings(database: InMemoryExampleDatabase, reduces: bool) -> settings:
    return settings(
        max_examples=BATCH,
        database=database,
        deadline=None,
        phases=(*PHASES, Phase.shrink) if reduces else PHASES,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )


def _findings(error: Exception) -> list[str]:
    """The traceback of each distinct failure of a run."""
    errors = error.exceptions if isinstance(error, ExceptionGroup) else [error]
    return ["".join(format_exception(each)).strip() for each in errors]
