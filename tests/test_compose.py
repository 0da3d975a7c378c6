"""docker-compose.yml as docker-compose reads it, without an engine; tests/test_docker.py runs it on one."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    shutil.which("docker-compose") is None, reason="no docker-compose here: tests/docker/packages.sh"
)


def config(**variables: str) -> dict[str, Any]:
    """The project's configuration with these variables and those of .env."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("DE3_", "GRAFANA_"))}
    done = subprocess.run(
        ["docker-compose", "--profile", "*", "config", "--format", "json"],
        env=inherited | variables,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "variable is not set" not in done.stderr, done.stderr
    project: dict[str, Any] = json.loads(done.stdout)
    return project


def test_every_service_has_limits() -> None:
    services = config()["services"]
    assert set(services) == {"server", "prometheus", "grafana", "loadtest"}
    for name, service in services.items():
        assert int(service["mem_limit"]) <= 2**30, name
        assert service["memswap_limit"] == service["mem_limit"], name  # no additional swap
        assert 0 < service["pids_limit"] <= 512, name
        # A tmpfs is kept in memory; its default limit is half of the machine's memory.
        assert all("size=" in tmpfs for tmpfs in service.get("tmpfs", [])), name
    assert int(services["server"]["mem_limit"]) == 2**30


@pytest.mark.parametrize("password", ["", "true love $5"])
def test_grafana_creates_an_admin_only_with_a_password(password: str) -> None:
    """Grafana's default, which an empty variable leaves unchanged, is the user admin with the password admin."""
    environment = config(GRAFANA_PASSWORD=password)["services"]["grafana"]["environment"]
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == ("false" if password else "true")
    assert environment["GF_AUTH_ANONYMOUS_ENABLED"] == "true"
    assert environment["GF_SECURITY_ADMIN_PASSWORD"].replace("$$", "$") == password


def test_without_key_files_the_server_gets_none() -> None:
    project = config()
    environment = project["services"]["server"]["environment"]
    assert environment["DE3_API_KEYS_FILE"] == environment["DE3_ADMIN_KEYS_FILE"] == ""
    for secret in project["secrets"].values():
        assert Path(secret["file"]).is_file()  # or `up` would fail


def test_key_files_are_mounted(tmp_path: Path) -> None:
    files = {f"DE3_{which}_KEYS_FILE": str(tmp_path / which) for which in ("API", "ADMIN")}
    project = config(**files)
    server = project["services"]["server"]
    mounted = {secret["source"]: secret["target"] for secret in server["secrets"]}
    for variable, file in files.items():
        secret = secret_of(variable.removesuffix("_FILE"))
        assert server["environment"][variable] == mounted[secret]
        assert project["secrets"][secret]["file"] == file


def secret_of(variable: str) -> str:
    return variable.removeprefix("DE3_").lower().replace("_", "-")


@pytest.mark.parametrize(
    ("variable", "value", "file"),
    [("DE3_API_KEYS", "alice 0123456789abcdef", ""), ("DE3_ADMIN_KEYS", "", "/etc/hostname")],
)
def test_keys_in_a_variable_prevent_the_start(variable: str, value: str, file: str) -> None:
    """docker inspect would show such keys, and a server that ignored the variable would be open."""
    project = config(**{variable: value, f"{variable}_FILE": file})
    assert "0123456789abcdef" not in json.dumps(project)
    secret = project["secrets"][secret_of(variable)]
    assert f"use {variable}_FILE" in secret["file"]
    assert not Path(secret["file"]).exists()  # `up` rejects this: tests/test_docker.py
