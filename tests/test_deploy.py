"""`de3 deploy`: the files for running a server, as a user gets them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import de3, refusal


def test_the_files_are_written_into_a_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    de3(f"deploy {folder}")
    written = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    tracked = subprocess.run(["git", "ls-files", "deploy"], capture_output=True, text=True, check=True).stdout
    wanted = {
        name.removeprefix("deploy/")
        for name in tracked.split()
        if name.endswith((".yml", ".yaml", ".json", ".service"))
    }
    assert written == wanted
    for name in written:
        for comment in re.findall(r"#.*", (folder / name).read_text()) if not name.endswith(".json") else ():
            for named in re.findall(r"[\w/.-]+\.(?:md|ya?ml|json)\b|Dockerfile|\b(?:docs|tests)/", comment):
                assert Path(named).name in {Path(other).name for other in written}, (name, named)
    assert "exists and is not an empty folder" in refusal(f"deploy {folder}")
    assert "exists and is not an empty folder" in refusal(f"deploy {folder}/systemd/de3@.service")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    text = Path("deploy/systemd/de3@.service").read_text()
    # A server without its environment file must not start, with the demo model or any other.
    assert {"AssertPathExists=/etc/de3/%i.env", "EnvironmentFile=/etc/de3/%i.env"} <= set(text.splitlines())
    unit = tmp_path / "de3@.service"
    text = text.replace("/opt/de3/bin/de3", str(Path(sys.executable).with_name("de3")))
    unit.write_text(text.replace("\n#Environment=", "\nEnvironment=").replace("\n#Load", "\nLoad"))
    for command in ("verify", "--offline=true --threshold=20 security"):
        done = subprocess.run(
            ["systemd-analyze", *command.split(), unit], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert command != "verify" or not done.stderr
