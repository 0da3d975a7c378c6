"""Replicas behind nginx, with the configuration of docs/scaling.md."""

import re
import shutil
import socket
import subprocess
import textwrap
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.server import manager
from de3.server.service import Service
from de3.server.settings import Settings
from tests.serving import CERTIFICATES, Server, free_port, until

pytestmark = pytest.mark.skipif(
    shutil.which("nginx") is None, reason="no nginx here: tests/docker/packages.sh"
)


def configuration(folder: Path, port: int, replicas: list[Server]) -> str:
    """The configuration of the documentation, for these replicas; nginx listens on the port."""
    (block,) = re.findall(r"```nginx\n(.*?)```", Path("docs/scaling.md").read_text(), re.DOTALL)
    block = block.replace("listen 80;", f"listen 127.0.0.1:{port};")
    for address, replica in zip(("10.0.0.11:8000", "10.0.0.12:8000"), replicas, strict=True):
        assert address in block
        block = block.replace(address, f"127.0.0.1:{replica.port}")
    places = "".join(
        f"{kind}_temp_path {folder};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    http = f"access_log off; {places}\n{textwrap.dedent(block)}"
    return f"daemon off; master_process off; pid {folder}/pid; events {{}}\nhttp {{ {http} }}"


def test_requests_are_answered_while_a_replica_loads_or_stops(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gates, load = {1: threading.Event(), 2: threading.Event()}, manager.load

    def gated(artifact: Any, settings: Settings, *others: Any) -> Any:
        gates[settings.threads].wait(60)
        return load(artifact, settings, *others)

    monkeypatch.setattr(manager, "load", gated)
    one, other = (Server(Service(Settings(store=store, port=0, models=["tiny"], threads=n))) for n in gates)
    port = free_port()

    def classify() -> tuple[int, str]:
        body = {"input": "good"}
        answer = httpx.post(f"http://127.0.0.1:{port}/classify", json=body, verify=CERTIFICATES, timeout=60)
        return answer.status_code, answer.json().get("error", {}).get("message", "")

    def listens() -> bool:
        with suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            return True
        return False

    with ExitStack() as stack:
        for replica in (one, other):
            replica.start()
            stack.callback(replica.stop)
        for gate in gates.values():
            stack.callback(gate.set)
        (tmp_path / "nginx.conf").write_text(configuration(tmp_path, port, [one, other]))
        command = ["nginx", "-p", str(tmp_path), "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
        nginx = stack.enter_context(subprocess.Popen(command))
        stack.callback(nginx.terminate)
        until(lambda: listens() or nginx.poll() is not None, "nginx")
        # Both load: nginx passes their 503 on, again and again, and excludes neither.
        assert [classify() for _ in range(4)] == [(503, "the models are still loading")] * 4
        gates[1].set()
        until(lambda: one.service.state == "ready", "a replica")
        loading = other.metric("de3_rejected_total", cause="loading")
        assert [classify() for _ in range(8)] == [(200, "")] * 8
        assert other.metric("de3_rejected_total", cause="loading") > loading
        gates[2].set()
        until(lambda: other.service.state == "ready", "the other replica")
        one.stop()
        assert [classify() for _ in range(8)] == [(200, "")] * 8
        assert httpx.get(f"http://127.0.0.1:{port}/metrics", verify=CERTIFICATES).status_code == 404
