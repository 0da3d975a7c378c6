"""A pytest plugin of `lab.mutate`: records the lines that each test covers, and runs chosen tests in a given order."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import coverage
import pytest

FOLDER = Path(os.environ["MUTATE_FOLDER"])
TESTS = FOLDER / "tests.json"  # the tests to run, in order; all of them if there is no such file
seconds: dict[str, float] = {}
fixtures: dict[str, float] = {}
failed: list[str] = []


def _record(context: str) -> None:
    """Record what runs from now on, here and in processes that are started now, as covered by this test or file."""
    os.environ["MUTATE_CONTEXT"] = context if "::" in context else f"{context}::"  # for the file coveragerc
    if current := coverage.Coverage.current():
        current.switch_context(context)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Record the lines of fixtures for the whole file, whose other tests may use them as well."""
    _record(item.nodeid.partition("::")[0])
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Record the lines of the test itself."""
    _record(item.nodeid)
    try:
        return (yield)
    finally:
        _record(item.nodeid.partition("::")[0])


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the durations, and the failures."""
    if report.when == "call" and report.passed:
        seconds[report.nodeid] = report.duration
    elif report.when != "call":
        file = report.nodeid.partition("::")[0]
        fixtures[file] = fixtures.get(file, 0.0) + report.duration
    if report.failed:
        failed.append(report.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Choose and order the tests; after conftest.py, which orders them by file."""
    if TESTS.exists():
        places = {name: place for place, name in enumerate(json.loads(TESTS.read_text()))}
        items[:] = sorted((item for item in items if item.nodeid in places), key=lambda i: places[i.nodeid])


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the results."""
    if not hasattr(session.config, "workerinput"):  # the workers' reports come here
        (FOLDER / "results.json").write_text(
            json.dumps({"seconds": seconds, "fixtures": fixtures, "failed": failed})
        )
