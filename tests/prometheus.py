"""A real Prometheus with the project's own configuration, which scrapes a test's server."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.serving import free_port, until

CONFIG = Path("deploy/prometheus")
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="no prometheus here: tests/docker/packages.sh",
)


class Prometheus:
    """A running Prometheus, which answers queries at `url`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The current samples of an expression; fails the test if Prometheus rejects it."""
        answer = httpx.get(self.url + "/api/v1/query", params={"query": expr}).json()
        assert answer["status"] == "success", (expr, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found


@contextmanager
def scraping(port: int, folder: Path) -> Iterator[Prometheus]:
    """Prometheus with the configuration of deploy/prometheus, except that it scrapes this port, once a second.

    folder: for its configuration, data and log.
    """
    config = yaml.safe_load((CONFIG / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str((CONFIG / name).resolve()) for name in config["rule_files"]]
    jobs = {job["job_name"]: job for job in config["scrape_configs"]}
    jobs["de3"]["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    own = free_port()
    jobs["prometheus"]["static_configs"] = [{"targets": [f"127.0.0.1:{own}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(
            [
                *("prometheus", f"--config.file={folder}/prometheus.yml"),
                *(f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{own}"),
            ],
            stderr=log,
        )
    try:
        found = Prometheus(f"http://127.0.0.1:{own}")

        def is_ready() -> bool:
            assert running.poll() is None, (folder / "log").read_text()
            try:
                return httpx.get(found.url + "/-/ready").status_code == 200
            except httpx.TransportError:
                return False

        until(is_ready, "Prometheus")
        yield found
    finally:
        running.terminate()
        running.wait(20)
