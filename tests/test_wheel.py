"""A release as a new user gets it: built from the tracked files, installed without a checkout."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import pytest

from tests.test_kernels import arm

ROOT = Path(__file__).parents[1]
# The environment variables of a new user: none of ours.
ENVIRONMENT = {name: v for name, v in os.environ.items() if not name.startswith(("DE3_", "PYTHONPATH"))}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout, so no list of tracked files"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler"),
]


def run(*command: str | Path, cwd: Path, env: Mapping[str, str] = ENVIRONMENT) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    return run("git", "ls-files", "-z", cwd=ROOT).rstrip("\0").split("\0")


@pytest.fixture(scope="module")
def dist(tracked: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built sdist and wheel."""
    checkout = tmp_path_factory.mktemp("checkout")
    reached = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "auditwheel"],
        cwd=tmp_path_factory.mktemp("index"),
        check=False,
        capture_output=True,
        text=True,
    )
    if reached.returncode != 0:
        pytest.skip(f"no package index: {reached.stderr[-200:]}")
    for name in tracked:
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout / name, follow_symlinks=False)
    run("deploy/release/build.sh", sys.executable, cwd=checkout)
    return checkout / "dist"


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (path,) = dist.glob("*x86_64.whl")
    return path


@pytest.fixture(scope="module")
def user(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with env, a virtual environment in which the wheel is installed, and output, the output of try.sh."""
    folder = tmp_path_factory.mktemp("user") / "home"
    program = (ROOT / "deploy/release/try.sh", wheel, sys.executable, folder)
    with socket.create_server(("127.0.0.1", 0)) as taken:  # by a server of the user, such as make serve's
        env = ENVIRONMENT | {"PORT": str(taken.getsockname()[1])}
        output = run(*program, cwd=wheel.parent, env=env)
    (folder / "output").write_text(output)
    return folder


def test_the_wheel_holds_modules_kernels_the_demo_model_and_no_more(wheel: Path, tracked: list[str]) -> None:
    assert re.fullmatch(r"de3-[0-9.]+-cp311-abi3-manylinux_\w+_x86_64\.whl", wheel.name)
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name and name[-1] != "/"}
        (licence,) = (name for name in archive.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        for name in tracked:
            if name.startswith("models/"):
                copy = archive.read(name.replace("models/", "de3/demo/", 1))
                assert sha256(copy).digest() == sha256((ROOT / name).read_bytes()).digest(), name
    code = {
        name if name.startswith("de3/") else f"de3/{name}"
        for name in tracked
        if name.endswith((".py", ".pyi", "py.typed", ".html", ".css", ".js"))
        and not name.startswith(("conftest.py", "tests/", "lab/", "deploy/grafana/", "examples/"))
    }
    demo = {n.replace("models/", "de3/demo/", 1) for n in tracked if n.startswith("models/")}
    files = {
        f"de3/{n}"
        for n in tracked
        if n.startswith(("deploy/prometheus/", "deploy/grafana/", "deploy/kubernetes/", "deploy/systemd/"))
        and not n.endswith((".py", ".env"))
    }
    assert names == code | demo | files | {"de3/native/kernels.abi3.so"}


def test_the_checksums_are_those_of_the_files(dist: Path) -> None:
    lines = run("sha256sum", "--check", "SHA256SUMS", cwd=dist).splitlines()
    assert len(lines) == 2 and all(line.endswith(": OK") for line in lines)


def test_a_new_user_gets_an_answer_from_the_kernels(user: Path) -> None:
    output = (user / "output").read_text()
    print(output)  # shows the timings with pytest -rP
    assert '"label":"positive"' in output
    assert re.search(r"^runtime: (native, \w+|onnxruntime)$", output, re.M)  # depends on the processor
    where = run(user / "env/bin/python", "-c", "import de3; print(de3.__file__)", cwd=user)
    assert where.startswith(str(user))
    assert "torch" not in run(user / "env/bin/pip", "list", cwd=user)


def test_the_sdist_installs_without_a_compiler(user: Path, dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    # Use the wheel's environment, as the dependencies are the same.
    again = ("install", "--quiet", "--no-deps", "--force-reinstall")
    run(user / "env/bin/pip", *again, sdist, cwd=user, env=ENVIRONMENT | {"CC": "/bin/false"})
    code = "import de3; print(de3.load('sst2', store=de3.DEMO).classify(['a warm , funny film'])[0].label)"
    assert run(user / "env/bin/python", "-c", code, cwd=user) == "positive\n"


@arm
def test_the_wheel_for_arm_has_kernels_that_run_in_an_emulator(dist: Path) -> None:
    print(run("deploy/release/cross.sh", sys.executable, cwd=dist.parent))
    (path,) = dist.glob("*-cp311-abi3-linux_aarch64.whl")
    if shutil.which("apt-get") is None:
        pytest.skip("no Debian, so no Python for Arm")
    emulate = (ROOT / "deploy/release/emulate.sh", path)
    done = subprocess.run(emulate, check=False, capture_output=True, text=True, timeout=300)
    if done.returncode == 2:
        pytest.skip(f"no packages for Arm: {done.stderr[-200:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["i8mm", "dotprod", "reference"]
