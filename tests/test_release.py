"""A release: its version is the same everywhere, and its workflows pin the actions that they run."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import de3

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
WORKFLOWS = sorted(Path(".github/workflows").glob("*.yml"))


def test_de3_prints_its_version() -> None:
    assert de3("--version") == f"de3 {VERSION}\n"


def test_the_changelog_and_the_readme_have_the_version() -> None:
    headings = re.findall(r"^## (.+)$", Path("CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(VERSION)}\] - \d{{4}}-\d\d-\d\d", headings[1])
    assert set(re.findall(r"de3-(\d+\.\d+\.\d+)", Path("README.md").read_text())) <= {VERSION}


def test_install_commands_work_without_a_package_index() -> None:
    pages = [page.read_text() for page in (Path("README.md"), *Path("docs").glob("*.md"))]
    commands = [
        one for page in pages for one in re.findall(r"pip install(?:\s-e)? '([^']*)\[([^']+)\]'", page)
    ]
    assert len(commands) >= 7
    assert all(package == "." and extra in PROJECT["optional-dependencies"] for package, extra in commands)


def steps(workflow: Any) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_pin_their_actions_and_may_only_read(file: Path) -> None:
    workflow = yaml.safe_load(file.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    used = [step for step in steps(workflow) if "uses" in step]
    assert used
    for step in used:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]), step
        if step["uses"].startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
    assert all("timeout-minutes" in job for job in workflow["jobs"].values())
