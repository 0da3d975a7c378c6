"""Settings are declared once: the command line, the variables and the deployment files agree with them."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from de3.cli import app
from de3.model_store.store import Store
from de3.server.settings import FROM_FILES, SECRETS, Settings, unknown_variables, variable
from tests.commands import de3, refusal

ROOT = Path(__file__).parents[1]
OPTIONS = [name for name in Settings.model_fields if name not in FROM_FILES]
VARIABLES = {variable(name) for name in OPTIONS}
# Variables of the command `de3 serve NAME`, which uses them before the server starts.
OF_COMMAND = {"DE3_CACHE", "DE3_CACHE_GB"}


def test_every_setting_is_a_flag_and_a_variable_with_help() -> None:
    command: Any = get_command(app)
    by_variable = {option.envvar: option for option in command.commands["serve"].params}
    for name in OPTIONS:
        assert (variable(name) in by_variable) != (name in SECRETS), name
        assert name in SECRETS or by_variable[variable(name)].help, name


def test_help_is_short_unless_all_is_wanted() -> None:
    short, everything = de3("serve --help"), de3("serve --help-all")
    assert len(short.splitlines()) <= 40
    for text in ("--guarantee", "Limits", "--help-all"):
        assert text in short and text in everything
    for text in ("--max-queue", "DE3_PORT"):
        assert text not in short and text in everything


def test_unknown_variables_are_found() -> None:
    similar = {"DE3_API_KEY_FILE": "DE3_API_KEYS_FILE", "DE3_MAX_QUEU": "DE3_MAX_QUEUE", "DE3_TUA": "DE3_TAU"}
    links = ["PORT_8000_TCP", "PORT_8000_TCP_ADDR", "SERVICE_HOST", "SERVICE_PORT", "WEB_SERVICE_HOST"]
    others = dict.fromkeys([*(f"DE3_{name}" for name in links), "DE3_WEB_PORT"])
    environment = dict.fromkeys((*VARIABLES, "DE3_ADMIN_KEY", "HOME", *similar, *others), "1")
    environment["DE3_WEB_PORT"] = "tcp://10.0.0.1:80"  # as Kubernetes sets it
    assert unknown_variables(environment) == similar | others


def test_variables_are_settings_and_unknown_ones_warn(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name, value in (("MODELS", "tiny-int8 tiny"), ("SERVICE_PORT", "5"), ("MAX_TEXTS", "3")):
        monkeypatch.setenv(f"DE3_{name}", value)
    started: list[Settings] = []
    monkeypatch.setattr("de3.server.main.serve", lambda settings, *_: started.append(settings))
    de3(f"serve --store {store}")
    assert "DE3_SERVICE_PORT: unknown setting, ignored" in caplog.text
    monkeypatch.setenv("DE3_STORE", str(tmp_path))
    monkeypatch.delenv("DE3_MODELS")
    de3("serve --demo --port 8001")  # whatever the variable says
    given, demo = started
    assert (given.store, given.models, given.max_texts) == (store, ["tiny-int8", "tiny"], 3)
    assert Store(demo.store).open(demo.models[0]).full_name == "sst2:1" and demo.port == 8001
    monkeypatch.setenv("DE3_API_KEY_FILE", "keys")
    said = "DE3_API_KEY_FILE: unknown setting; did you mean DE3_API_KEYS_FILE?"
    assert refusal(f"serve --store {store}") == said
    assert len(started) == 2


def test_compose_offers_every_setting_and_no_other() -> None:
    project = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    offered = {entry.partition("=")[0] for entry in project["services"]["server"]["environment"]}
    # The image sets the address, the port and the store; keys come in files.
    fixed = {"DE3_HOST", "DE3_PORT", "DE3_STORE", "DE3_API_KEYS", "DE3_ADMIN_KEYS"}
    assert {name for name in offered if name.startswith("DE3_")} - OF_COMMAND == VARIABLES - fixed


@pytest.mark.parametrize("name", ["deploy/kubernetes/de3.yaml", "Dockerfile", ".env", "docker-compose.yml"])
def test_deployment_files_name_only_settings(name: str) -> None:
    assert set(re.findall(r"\bDE3_[A-Z0-9_]+", (ROOT / name).read_text())) <= VARIABLES | OF_COMMAND
