"""Settings are declared once: the command line, the variables and the deployment files agree with them."""

import re
from pathlib import Path

import httpx
import pytest
import yaml

from de3.server.settings import Settings, option, unknown_variables, variable
from tests.commands import de3
from tests.serving import process, url_when_ready

ROOT = Path(__file__).parents[1]
VARIABLES = {variable(name) for name in Settings.model_fields}
# Variables of the command `de3 serve NAME`, which uses them before the server starts.
OF_COMMAND = {"DE3_CACHE", "DE3_CACHE_GB"}


def test_every_setting_is_a_flag_and_a_variable_with_help() -> None:
    text = de3("serve --help")
    for name, field in Settings.model_fields.items():
        how = option(name)
        if how is None:
            assert name in ("api_keys", "admin_keys"), name  # secrets have no flags
            continue
        assert field.description, name
        assert (how.flag or "--" + name.replace("_", "-")) in text, name
        assert variable(name) in text, name


def test_unknown_variables_are_found() -> None:
    environment = dict.fromkeys((*VARIABLES, "DE3_ADMIN_KEY", "HOME", "DE3_TUA", "DE3_MAX_QUEU"), "1")
    assert unknown_variables(environment) == ["DE3_MAX_QUEU", "DE3_TUA"]


def test_the_start_warns_of_unknown_variables(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DE3_MODELS", "tiny-int8 tiny")
    monkeypatch.setenv("DE3_MAX_QUEU", "5")
    monkeypatch.setenv("DE3_MAX_TEXTS", "3")
    with process(store) as running:
        assert running.stderr is not None
        warning = next(line for line in running.stderr if "WARNING" in line)
        assert "DE3_MAX_QUEU: unknown setting, ignored" in warning
        url = url_when_ready(running)
        models = httpx.get(url + "/v1/models").json()["data"]
        assert [m["id"] for m in models] == ["tiny-int8:1", "tiny:1"]
        too_many = httpx.post(url + "/classify", json={"input": ["good"] * 4})
        assert "at most 3" in too_many.json()["error"]["message"]


def test_compose_offers_every_setting_and_no_other() -> None:
    project = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    offered = {entry.partition("=")[0] for entry in project["services"]["server"]["environment"]}
    # The image sets the address, the port and the store; keys come in files.
    fixed = {"DE3_HOST", "DE3_PORT", "DE3_STORE", "DE3_API_KEYS", "DE3_ADMIN_KEYS"}
    assert {name for name in offered if name.startswith("DE3_")} - OF_COMMAND == VARIABLES - fixed


@pytest.mark.parametrize("name", ["deploy/kubernetes/de3.yaml", "Dockerfile", ".env", "docker-compose.yml"])
def test_deployment_files_name_only_settings(name: str) -> None:
    assert set(re.findall(r"\bDE3_[A-Z0-9_]+", (ROOT / name).read_text())) <= VARIABLES | OF_COMMAND
