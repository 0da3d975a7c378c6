"""Mutation testing of a tiny package, whose tests check one function well and the other badly."""

import subprocess
from pathlib import Path

import pytest

from lab.mutate import mutate, table

SOURCE = '''"""A docstring with 1 number."""

LIMIT = 2


def strong(a: int, b: int = 1) -> int:
    """Subtract 1 from 2."""
    return a - b


def weak(a: int) -> bool:
    return a > LIMIT


def untested(a: int) -> int:
    return a + 1


def endless(a: int) -> int:
    while True:
        break
    return a
'''
TESTS = """
import subprocess
import sys

from tiny.code import endless, strong


def test_strong():
    assert strong(3) == 2 and strong(5, 2) == 3


def test_weak_in_another_process():
    code = "from tiny.code import weak; raise SystemExit(weak(9) is None)"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd="/")


def test_that_fails_anyway():
    assert False


def test_endless():
    assert endless(3) == 3
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with the package `tiny`, linked to its folder `real`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("lab.mutate.START_S", 30.0)
    root = tmp_path / "checkout"
    for name, text in (("real/__init__.py", ""), ("real/code.py", SOURCE), ("tests/test_code.py", TESTS)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "tiny").symlink_to("real")
    (root / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    subprocess.run(["git", "init", "--quiet"], cwd=root, check=True)
    return root


def files_of(root: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}


def test_mutants_that_a_test_notices_are_killed(checkout: Path) -> None:
    before, said = files_of(checkout), list[str]()
    results = mutate(checkout, ["real"], [], 100, 1, 10.0, 60.0, 1, said.append)
    assert files_of(checkout) == before
    ends = {(result.mutant.line, result.mutant.after): (result.outcome, result.by) for result in results}
    strong, weak = (f"tests/test_code.py::test_{name}" for name in ("strong", "weak_in_another_process"))
    assert ends == {
        (3, "LIMIT = 3"): ("survived", ""),
        (3, "LIMIT = 1"): ("survived", ""),
        (6, "def strong(a: int, b: int = 2) -> int:"): ("killed", strong),
        (6, "def strong(a: int, b: int = 0) -> int:"): ("killed", strong),
        (8, "return (a + b)"): ("killed", strong),
        (8, "return None"): ("killed", strong),
        (12, "return (a >= LIMIT)"): ("survived", ""),
        (12, "return None"): ("killed", weak),
        **{(16, f"return {code}"): ("not covered", "") for code in ("None", "(a - 1)", "a + 2", "a + 0")},
        (20, "while False:"): ("survived", ""),
        (21, "continue"): ("timeout", ""),
        (22, "return None"): ("killed", "tests/test_code.py::test_endless"),
    }
    assert list(table(results, ["real"]))[-1] == ["all", "15", "6", "1", "4", "4", "47%"]
    said.clear()
    assert mutate(checkout, ["real"], [], 1, 1, 10.0, 60.0, 1, said.append)
    assert "running the tests" not in said[0]  # their coverage is known
