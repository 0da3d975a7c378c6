"""Mutation testing: changes one statement at a time in a copy of the product, and runs the tests that cover it."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lab.mutants import Mutant, mutants

PATIENCE = 4.0  # the time limit of a mutant, relative to the normal duration of its tests
START_S = 60.0  # and what pytest may need besides
RUN = ("-m", "pytest", "-q", "-p", "mutate_plugin", "-p", "no:cacheprovider", "-m", "not slow")
ONE = ("-x", "-p", "no:xdist")
NOT_PASSED = ("PYTEST", "COVERAGE", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE")  # prefixes of variables
COVERAGE = """
[run]
branch = false
parallel = true
sigterm = true
concurrency = thread,multiprocessing
patch = _exit
core = ctrace
data_file = {data}
context = ${{MUTATE_CONTEXT-}}
include =
    {include}
"""


@dataclass(frozen=True)
class Covered:
    """Who covers what, without mutants.

    Attributes:
        lines: for each file and line, the tests and test files that run it. A file stands for all its tests: a fixture
            runs the line, or if the name ends in "::", a process that a fixture starts.
        seconds: duration of each test that passes, without its fixtures.
        fixtures: duration of the fixtures of each test file.
    """

    lines: dict[str, dict[int, list[str]]]
    seconds: dict[str, float]
    fixtures: dict[str, float]

    def limit(self, tests: list[str]) -> float:
        """Time limit of a run of these tests, seconds."""
        files = {test.partition("::")[0] for test in tests}
        normal = sum(self.seconds[test] for test in tests) + sum(self.fixtures[file] for file in files)
        return START_S + PATIENCE * normal

    def tests_of(self, mutant: Mutant) -> set[str]:
        """The tests that run the mutant's statement."""
        by = {name.removesuffix("::") for name in self._names(mutant)}
        return {test for test in self.seconds if test in by or test.partition("::")[0] in by}

    def is_in_fixture(self, mutant: Mutant) -> bool:
        """True if a fixture runs the mutant's statement in the process of the tests."""
        return any("::" not in name for name in self._names(mutant))

    def _names(self, mutant: Mutant) -> set[str]:
        """The tests and files that run the statement; for one that runs on import, any line of its file."""
        lines = self.lines.get(mutant.file, {})
        first, last = mutant.lines if mutant.lines != (0, 0) else (0, sys.maxsize)
        return {name for line, names in lines.items() if first <= line <= last for name in names}


@dataclass(frozen=True)
class Result:
    """A mutant and its end: "killed" (by the test `by`), "timeout", "survived", or "not covered" by any test."""

    mutant: Mutant
    outcome: str
    by: str = ""

    def __str__(self) -> str:
        place = f"{self.mutant.file}:{self.mutant.line}  {self.mutant.before} -> {self.mutant.after}"
        return f"{self.outcome:<11}  {place}" + (f"  [{self.by}]" if self.by else "")


class Checkout:
    """A copy of a checkout with its own environment, in which `de3` can only be imported from the copy.

    Uncommitted changes and the built kernels are copied. The environment adds the copy and the packages of this
    interpreter's environment.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.folder = folder / "copy", folder
        listed = ("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        output = subprocess.run(listed, cwd=root, check=True, capture_output=True, text=True).stdout
        names = output.split("\0")
        names += [str(file.relative_to(root)) for file in root.glob("*/*.so")]
        digest = hashlib.sha256()
        for name in sorted(filter(None, set(names))):
            source, target = root / name, self.root / name
            if source.is_symlink() or source.is_file():  # not deleted
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
                content = os.fsencode(source.readlink()) if source.is_symlink() else source.read_bytes()
                if name.startswith(("lab/", "docs/")):  # they cover nothing of the product's tests
                    continue
                digest.update(f"{name}\0{len(content)}\0".encode() + content)
        self.state = digest.hexdigest()
        venv.create(folder / "venv", symlinks=True)
        self.python = folder / "venv/bin/python"
        (site,) = (folder / "venv/lib").glob("python3*/site-packages")
        packages = [path for path in sys.path if path.endswith("site-packages")]
        (site / "copy.pth").write_text("\n".join([str(self.root), *packages]))
        (site / "cover.pth").write_text(
            "import os; 'COVERAGE_PROCESS_START' in os.environ and __import__('coverage').process_startup()"
        )
        shutil.copy(Path(__file__).with_name("mutate_plugin.py"), site)
        (folder / "tmp").mkdir()
        self._made = folder / "made"
        self._made.mkdir()
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(NOT_PASSED)},
            **{"TMPDIR": str(folder / "tmp"), "MUTATE_FOLDER": str(folder)},
        }
        self._times = count(1)

    def pytest(self, *arguments: str, limit: float, **environment: str) -> tuple[int | None, dict[str, Any]]:
        """Run tests; returns the exit status (None: it took longer than the limit), and the plugin's results."""
        (results := self.folder / "results.json").unlink(missing_ok=True)
        with (self.folder / "output.txt").open("wb") as output:
            process = subprocess.Popen(
                [self.python, *RUN, *arguments],
                cwd=self.root,
                env=self._environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                self._kill_all()
                process.wait()
        found = (
            json.loads(results.read_text())
            if results.exists()
            else {"seconds": {}, "fixtures": {}, "failed": []}
        )
        return status, found

    def _kill_all(self) -> None:
        """Kill the processes of the copy's interpreter: servers and workers may outlive a killed pytest."""
        for file in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if file.read_bytes().startswith(os.fsencode(self.python)):
                    os.kill(int(file.parent.name), signal.SIGKILL)

    def cover(self, modules: list[str], tests: list[str], workers: int, limit: float) -> Covered:
        """Run the tests and record what they cover; raises ValueError if that takes too long or no test passes."""
        import coverage

        (data := self.folder / "coverage").mkdir()
        include = [f"{self.root}/{module}" + ("" if module.endswith(".py") else "/*") for module in modules]
        rc = self.folder / "coveragerc"
        rc.write_text(COVERAGE.format(data=data / "data", include="\n    ".join(include)))
        distribution = ("-n", str(workers), "--dist", "loadfile") if workers > 1 else ("-p", "no:xdist")
        status, found = self.pytest(*tests, *distribution, limit=limit, COVERAGE_PROCESS_START=str(rc))
        if status not in (0, 1) or not found["seconds"]:
            raise ValueError(f"the tests did not run: {(self.folder / 'output.txt').read_text()[-2000:]}")
        combined = coverage.Coverage(data_file=str(data / "data"), config_file=False)
        combined.combine([str(data)])
        by_file = combined.get_data()
        lines = {
            str(Path(file).relative_to(self.root)): {
                line: sorted(filter(None, names)) for line, names in by_file.contexts_by_lineno(file).items()
            }
            for file in by_file.measured_files()
        }
        for test in found["failed"]:
            found["seconds"].pop(test, None)
        return Covered(lines, found["seconds"], found["fixtures"])

    def run_changed(
        self, mutant: Mutant, tests: list[str], limit: float, apart: bool
    ) -> tuple[int | None, str]:
        """Run tests with a mutant; returns what `run` returns. Fixtures made with it are made again without it."""
        file, made = self.root / mutant.file, set(self._made.glob("shared-*"))
        before = file.read_text()
        self._write(file, mutant.source)
        try:
            ended = self.run(tests, limit, apart)
        finally:
            self._write(file, before)
        if changed := set(self._made.glob("shared-*")) - made:
            for path in changed:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.run(list({test.partition("::")[0]: test for test in reversed(tests)}.values()), limit)
        return ended

    def _write(self, file: Path, source: str) -> None:
        """Write a file with a time that it never had, in 1970: Python compares it with that of the compiled code."""
        file.write_text(source)
        os.utime(file, (at := next(self._times), at))

    def run(self, tests: list[str], limit: float, apart: bool = False) -> tuple[int | None, str]:
        """Run tests in this order until one fails; returns the exit status, and the test that failed.

        The fixtures that tests/fixtures.py makes once for all workers of pytest-xdist are made once for all runs, or
        again if the run is apart.
        """
        (order := self.folder / "tests.json").write_text(json.dumps(tests))
        files = dict.fromkeys(test.partition("::")[0] for test in tests)
        shared = {} if apart else {"PYTEST_XDIST_WORKER": "mutant"}  # what made_once asks for
        base = f"--basetemp={self._made / 'run'}"
        status, found = self.pytest(*files, *ONE, base, limit=limit, **shared)
        order.unlink()
        return status, next(iter(found["failed"]), "")


def mutate(
    root: Path,
    modules: list[str],
    tests: list[str],
    count: int,
    seed: int,
    minutes: float,
    tests_s: float,
    workers: int,
    say: Callable[[str], None],
) -> list[Result]:
    """Test a sample of the mutants of some modules; returns the results, which may be fewer than `count`.

    modules: folders and files below `root`. tests: test files, by default those that pytest finds in tests/. tests_s:
    maximum normal duration of a mutant's tests, of which the fastest are taken. minutes: stop then.
    """
    end = time.monotonic() + 60 * minutes
    with TemporaryDirectory(prefix="mutate-", ignore_cleanup_errors=True) as folder:
        checkout = Checkout(root, Path(folder).resolve())
        covered = _covered(checkout, modules, tests, workers, end, say)
        every = [mutant for module in modules for mutant in _mutants(checkout.root, module)]
        say(f"{len(every)} mutants, {len(covered.seconds)} tests")
        results, reliable = list[Result](), dict[str, bool]()
        for mutant in sample(every, count, seed):
            if (result := _test(checkout, mutant, covered, tests_s, end, reliable)) is None:
                break
            results.append(result)
            say(f"{len(results)}/{count}  {result}")
    return results


def sample(every: list[Mutant], count: int, seed: int) -> list[Mutant]:
    """A random mutant from each of `count` equal stretches of the list, shuffled: each file gets its share."""
    count, random_ = min(count, len(every)), random.Random(seed)
    chosen = [every[int((i + random_.random()) * len(every) / count)] for i in range(count)]
    random_.shuffle(chosen)
    return chosen


def table(results: list[Result], modules: list[str]) -> Iterator[list[str]]:
    """Yield a row for each module, and one for all: mutants, killed, timeouts, survivors, not covered, score."""
    for module in [*modules, ""]:
        ends = [result.outcome for result in results if result.mutant.file.startswith(module)]
        counts = [ends.count(outcome) for outcome in ("killed", "timeout", "survived", "not covered")]
        if ends:
            yield [
                module or "all",
                *map(str, (len(ends), *counts)),
                f"{100 * sum(counts[:2]) / len(ends):.0f}%",
            ]


def numbers(results: list[Result], seed: int) -> dict[str, Any]:
    """The results as JSON."""
    rows = [
        {
            **{name: getattr(result.mutant, name) for name in ("file", "line", "before", "after")},
            **{"outcome": result.outcome, "by": result.by},
        }
        for result in results
    ]
    return {"seed": seed, "mutants": rows}


def _mutants(root: Path, module: str) -> list[Mutant]:
    files = [root / module] if module.endswith(".py") else sorted((root / module).rglob("*.py"))
    return [m for file in files for m in mutants(str(file.relative_to(root)), file.read_text())]


def _covered(
    checkout: Checkout,
    modules: list[str],
    tests: list[str],
    workers: int,
    end: float,
    say: Callable[[str], None],
) -> Covered:
    """The coverage of this state of the checkout, from the cache if it is there."""
    key = hashlib.sha256(repr((checkout.state, modules, tests)).encode()).hexdigest()[:16]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = base / "de3-lab" / f"coverage-{key}.json"
    if file.exists():
        content = json.loads(file.read_text())
        lines = {
            name: {int(line): by for line, by in found.items()} for name, found in content["lines"].items()
        }
        return Covered(lines, content["seconds"], content["fixtures"])
    say("running the tests once, to see which lines they cover")
    covered = checkout.cover(modules, tests or ["tests"], workers, end - time.monotonic())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(asdict(covered)))
    return covered


def _test(
    checkout: Checkout,
    mutant: Mutant,
    covered: Covered,
    tests_s: float,
    end: float,
    reliable: dict[str, bool],
) -> Result | None:
    """Run a mutant's tests; None if there was no time left.

    A failing test only counts if it passes alone without the mutant, which `reliable` holds for those tried so far; and
    a timeout only if the tests end in time without it.
    """
    while True:
        tests = {test for test in covered.tests_of(mutant) if reliable.get(test, True)}
        chosen = _chosen(tests, covered.seconds, tests_s)
        if not chosen:
            return Result(mutant, "not covered")
        limit, left = covered.limit(chosen), end - time.monotonic()
        if left <= 0:
            return None
        apart = covered.is_in_fixture(mutant)
        status, failed = checkout.run_changed(mutant, chosen, min(limit, left), apart)
        if status is None:
            if limit > left:
                return None
            is_slow_anyway = checkout.run(chosen, limit, apart)[0] is None
            return Result(mutant, "survived" if is_slow_anyway else "timeout")
        if status in (0, 5):  # passed, or the tests have other names now
            return Result(mutant, "survived")
        witness = failed or chosen[0]  # none failed if even the import of a test file did
        if witness not in reliable:
            reliable[witness] = checkout.run([witness], 5 * limit)[0] == 0
        if reliable[witness]:
            return Result(mutant, "killed", failed or "no test can be imported")


def _chosen(tests: set[str], seconds: dict[str, float], most_s: float) -> list[str]:
    """The fastest tests, as many as run within this time, at least one; file by file, each in its own order."""
    chosen, total = set[str](), 0.0
    for test in sorted(tests, key=seconds.__getitem__):
        total += seconds[test]
        if chosen and total > most_s:
            break
        chosen.add(test)
    files = defaultdict[str, list[str]](list)
    for test in seconds:  # in the order of the files
        if test in chosen:
            files[test.partition("::")[0]].append(test)
    durations = {file: sum(map(seconds.__getitem__, names)) for file, names in files.items()}
    return [test for file in sorted(files, key=durations.__getitem__) for test in files[file]]
