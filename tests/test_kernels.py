"""Compares every kernel with the reference, in C: on this machine's instruction sets, and on others in QEMU."""

import platform
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures import made_once

ROOT = Path(__file__).parents[1]
CROSS, QEMU = "aarch64-linux-gnu-gcc", "qemu-aarch64"


def builds_and_runs_arm() -> bool:
    if shutil.which(CROSS) is None or shutil.which(QEMU) is None:
        return False
    library = subprocess.run([CROSS, "-print-file-name=libc.a"], check=True, capture_output=True, text=True)
    return Path(library.stdout.strip()).is_absolute()  # otherwise the compiler has no C library


arm = pytest.mark.skipif(
    not builds_and_runs_arm(), reason=f"no {CROSS}, its C library or {QEMU} here: tests/docker/packages.sh"
)


def build(compiler: str, to: Path, *flags: str) -> Path:
    """Compile tests/native/compare.c to a program, with the sources and flags of the extension; returns its path."""
    (extension,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    sources = [source for source in extension["sources"] if not source.endswith("python.c")]
    flags = (*extension["extra-compile-args"], "-Wall", "-Werror", *flags)
    command = [compiler, *flags, "tests/native/compare.c", *sources, "-o", to, "-lm", "-lpthread"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return to


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def for_arm() -> Path:
    return made_once("kernels-arm", lambda folder: build(CROSS, folder / "compare", "-static")) / "compare"


@pytest.fixture(scope="module")
def native() -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("no C compiler")
    # -O3 takes longer to compile.
    return made_once("kernels", lambda folder: build("gcc", folder / "compare", "-O2")) / "compare"


@pytest.mark.parametrize("lengths", [["few"], pytest.param([], marks=pytest.mark.slow)])
def test_native_kernels_match_the_reference(native: Path, lengths: list[str]) -> None:
    names = run(native).split()
    assert names[-1] == "reference"
    for name in names:
        assert run(native, name, *lengths) == f"{name}: 0 differences\n"


def test_the_program_for_emulators_runs_on_this_machine(kernels: Any) -> None:
    lines = run(sys.executable, "tests/native/layer.py", ROOT).splitlines()
    assert [line.partition(":")[0] for line in lines] == kernels.implementations()


def assert_emulated(program: Path, emulator: str, processor: str, *names: str) -> None:
    """Check that an emulated processor supports exactly these kernels; the first must agree with the reference."""
    emulated = (emulator, "-cpu", processor, program)
    assert run(*emulated).split() == [*names, "reference"]
    for name in names[:1]:
        assert run(*emulated, name, "emulated") == f"{name}: 0 differences\n"


@pytest.mark.slow
@arm
@pytest.mark.parametrize(
    ("processor", "names"), [("cortex-a72", ""), ("neoverse-n1", "dotprod"), ("max", "i8mm dotprod")]
)
def test_arm_kernels_match_the_reference(for_arm: Path, processor: str, names: str) -> None:
    assert_emulated(for_arm, QEMU, processor, *names.split())


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("qemu-x86_64") is None or platform.machine() != "x86_64",
    reason="no qemu-x86_64 here, or another processor: tests/docker/packages.sh",
)
@pytest.mark.parametrize(("processor", "names"), [("Nehalem", ""), ("Haswell", "avx2")])
def test_x86_processors_without_avx512(native: Path, processor: str, names: str) -> None:
    assert_emulated(native, "qemu-x86_64", processor, *names.split())
