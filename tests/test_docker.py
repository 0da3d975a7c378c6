"""The image and docker compose on a real engine; stand-ins replace base images that cannot be pulled."""

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.model_store.store import Store
from tests.fixtures import make_rows, save_encoder
from tests.hub import hub_of
from tests.serving import free_port, until

PROJECT, IMAGE = "de3-test", "de3-test/server"
SLOW = {"input": ["it is long and loud , and it has nothing at all to say to anyone " * 8] * 96, "tau": 0}


def _works() -> bool:
    if shutil.which("docker") is None or shutil.which("docker-compose") is None:
        return False
    try:
        done = subprocess.run(["docker", "info"], check=False, capture_output=True, timeout=10)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _works(), reason="no Docker engine runs here: tests/docker/packages.sh"),
]


def docker(*arguments: str) -> str:
    done = subprocess.run(["docker", *arguments], check=False, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def health(container: str) -> str:
    return docker("inspect", "--format", "{{.State.Health.Status}}", container)


class Compose:
    """The project's docker-compose.yml, as a separate project on free ports."""

    def __init__(self, images: dict[str, str]) -> None:
        self.images = images
        self.ports = {name: free_port() for name in ("SERVER_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")}
        self.url = f"http://127.0.0.1:{self.ports['SERVER_PORT']}"
        self.prometheus = f"http://127.0.0.1:{self.ports['PROMETHEUS_PORT']}"

    def __call__(self, *arguments: str, **environment: str) -> str:
        ports = {name: str(port) for name, port in self.ports.items()}
        done = subprocess.run(
            ["docker-compose", "--project-name", PROJECT, *arguments],
            env=os.environ | ports | self.images | environment,
            check=False,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def container(self, service: str) -> str:
        return self("ps", "--all", "--quiet", service)

    def up(self, **environment: str) -> None:
        """Start the server with these variables, and wait until it is healthy."""
        self("up", "--detach", "server", **environment)
        self._wait_until_healthy()

    def restart(self) -> None:
        self("restart", "server")
        self._wait_until_healthy()

    def _wait_until_healthy(self) -> None:
        try:
            until(lambda: health(self.container("server")) == "healthy", "the server to be healthy")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self('logs', 'server')[-3000:]}") from None


@pytest.fixture(scope="module")
def compose() -> Iterator[Compose]:
    make = "tests/docker/stand-ins.sh"
    made = subprocess.run([make], check=False, capture_output=True, text=True, timeout=900)
    if made.returncode != 0:
        pytest.skip(f"no base images: they can neither be pulled nor stood in for: {made.stderr[-500:]}")
    images = dict(line.split("=", 1) for line in made.stdout.splitlines())
    running = Compose(images | {"IMAGE": IMAGE})
    try:
        # There is no stand-in for Grafana's image: Debian has no package for it.
        running("up", "--detach", "--build", "server", "prometheus")
        running.up()
        yield running
    finally:
        running("--profile", "loadtest", "down", "--volumes", "--timeout", "5")


def test_the_image_is_small_and_without_torch(compose: Compose) -> None:
    assert int(docker("image", "inspect", "--format", "{{.Size}}", IMAGE)) < 600e6  # SciPy alone takes 110 MB
    server = compose.container("server")
    unwanted = "[m for m in ('pip', 'setuptools', 'torch') if u.find_spec(m)]"
    listed = docker("exec", server, "python3", "-c", f"import importlib.util as u; print({unwanted})")
    assert listed == "[]"
    assert docker("exec", server, "python3", "-c", "import de3.native.kernels; print(1)") == "1"
    demo = "import de3; print(de3.DEMO.resolve())"
    assert docker("exec", server, "python3", "-c", demo) == "/models"


def test_the_container_is_locked_down(compose: Compose) -> None:
    server = compose.container("server")
    assert docker("exec", server, "id", "-u") == "10001"
    for place in ("/", "/models", "/opt/de3", "/home"):
        with pytest.raises(AssertionError, match="Read-only file system"):
            docker("exec", server, "touch", f"{place}/x")
    found = json.loads(docker("inspect", "--format", "{{json .HostConfig}}", server))
    assert found["Memory"] == found["MemorySwap"] == 2**30 and found["PidsLimit"] == 512
    assert found["CapDrop"] == ["ALL"] and found["SecurityOpt"] == ["no-new-privileges:true"]


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that every user can read, with a stock classifier in model/, and texts.txt."""
    folder = tmp_path_factory.mktemp("stock")
    save_encoder(folder / "model", labels=2)
    (folder / "texts.txt").write_text("".join(f"{text}\n" for text, _ in make_rows(600, 3)))
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


def test_compose_serves_a_classifier_of_the_hub(compose: Compose, stock: Path) -> None:
    form = "{{range .NetworkSettings.Networks}}{{.Gateway}}{{end}}"
    gateway = docker("inspect", "--format", form, compose.container("server"))
    try:
        with hub_of(stock / "model", gateway) as (_, port):
            endpoint = f"http://{gateway}:{port}"
            compose.up(NAMES="org/model", HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0")
            (listed,) = httpx.get(compose.url + "/v1/models").json()["data"]
            assert (listed["id"], listed["source"]) == ("model:1", "org/model")
            answer = httpx.post(compose.url + "/classify", json={"input": "a good film"})
            assert answer.json()["data"][0]["exit"]["layer"] == 3
    finally:
        compose.up()


def test_the_image_imports(compose: Compose, stock: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    folders = ("--volume", f"{stock}:/stock:ro", "--volume", f"{tmp_path}:/data")
    command = "import /stock/model --texts /stock/texts.txt --name mine --store /data/models --work /data/w"
    docker("run", "--rm", "--read-only", *folders, IMAGE, *command.split())
    calibration = Store(tmp_path / "models").open("mine").manifest.calibration
    assert calibration is not None and calibration.self_labelled


def test_prometheus_sees_the_traffic_of_the_loadtest_profile(compose: Compose) -> None:
    def answered() -> float:
        query = {"query": 'sum(de3_requests_total{status="200"})'}
        found = httpx.get(compose.prometheus + "/api/v1/query", params=query).json()["data"]["result"]
        return float(found[0]["value"][1]) if found else 0.0

    rules = httpx.get(compose.prometheus + "/api/v1/rules").json()["data"]["groups"]
    assert {group["name"] for group in rules} == {"de3", "de3-alerts"}
    before = answered()
    compose("--profile", "loadtest", "up", "--detach", "loadtest")
    # Each of a hundred texts is first sent alone. Then the first wave starts.
    until(lambda: answered() > before + 200, "a wave of requests")
    compose("--profile", "loadtest", "stop", "--timeout", "5", "loadtest")


def waiting(compose: Compose) -> float:
    lines = httpx.get(compose.url + "/metrics").text.splitlines()
    return float(next(x for x in lines if x.startswith("de3_queue_texts ")).split()[1])


def test_a_restart_loses_neither_accepted_requests_nor_the_evidence_of_audits(compose: Compose) -> None:
    """The state is in a volume that the container's user can write to."""

    def long(number: int) -> int:
        return httpx.post(compose.url + "/classify", json=SLOW, timeout=180).status_code

    # On a busy machine, requests that take a second may take longer than the default limits.
    compose.up(DE3_GUARANTEE="0.1", DE3_TIMEOUT_S="150", STOP_GRACE="160s")
    path = compose.url + "/v1/models/sst2/audit"
    texts = [f"a lovely film , number {n}" for n in range(200)]
    httpx.post(compose.url + "/classify", json={"input": texts}, timeout=60)

    def are_done() -> bool:
        report = httpx.get(path).json()
        return report["tau"]["reason"] == "evidence" and report["pending"] == 0

    until(are_done, "the audits")
    before = httpx.get(path).json()
    with ThreadPoolExecutor(3) as pool:
        longs = [pool.submit(long, n) for n in range(3)]
        until(lambda: waiting(compose) > 96, "two long requests to be accepted")
        compose.restart()
        assert [done.result() for done in longs] == [200] * 3
    after = httpx.get(path).json()
    for name in ("tau", "audits", "since"):
        assert after[name] == before[name]
    compose.up()


def test_a_store_can_be_mounted(compose: Compose, store: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are readable by their owner only
        mounted = shutil.copytree(store, Path(folder) / "store")
        for path in (Path(folder), mounted):
            path.chmod(0o755)
        compose.up(MODELS=str(mounted), DE3_MODELS="tiny-int8")
    answer = httpx.post(compose.url + "/classify", json={"input": "a lovely film"})
    assert answer.json()["model"] == "tiny-int8:1"


def test_keys_come_in_files(compose: Compose) -> None:
    """As .env recommends, user 10001 can read the files, and other users of this machine cannot enter the folder."""
    key, admin_key = "alice-0123456789", "root-0123456789abc"
    with tempfile.TemporaryDirectory() as folder:
        assert Path(folder).stat().st_mode & 0o777 == 0o700
        keys, admin_keys = Path(folder, "keys"), Path(folder, "admin-keys")
        keys.write_text(f"alice sha256:{hashlib.sha256(key.encode()).hexdigest()}\n")
        admin_keys.write_text(f"root {admin_key}\n")
        for path in (keys, admin_keys):
            path.chmod(0o644)
        files = {"DE3_API_KEYS_FILE": str(keys), "DE3_ADMIN_KEYS_FILE": str(admin_keys)}
        compose.up(**files)

        def status(method: str, path: str, key: str | None = None, **body: Any) -> int:
            headers = {} if key is None else {"Authorization": f"Bearer {key}"}
            return httpx.request(method, compose.url + path, json=body, headers=headers).status_code

        assert status("POST", "/classify", input="a lovely film") == 401
        assert status("POST", "/classify", "alice-012345678x", input="a lovely film") == 401
        assert status("POST", "/classify", key, input="a lovely film") == 200
        assert status("POST", "/v1/models/no-such-model/unload", key) == 403
        assert status("POST", "/v1/models/no-such-model/unload", admin_key) == 404
        assert admin_key not in docker("inspect", compose.container("server"))

        with pytest.raises(AssertionError, match="use DE3_API_KEYS_FILE"):
            compose("up", "--detach", "server", DE3_API_KEYS=f"alice {key}")

    compose.up()  # without keys again
    answer = httpx.post(compose.url + "/classify", json={"input": "a lovely film"})
    assert answer.status_code == 200


def test_the_image_alone_serves_its_own_model(compose: Compose) -> None:
    port = free_port()
    name = docker("run", "--detach", "--rm", "--read-only", "--publish", f"127.0.0.1:{port}:8000", IMAGE)
    try:
        until(lambda: health(name) == "healthy", "the container to be healthy")
        answer = httpx.post(f"http://127.0.0.1:{port}/classify", json={"input": "a lovely film"})
        assert answer.json()["model"] == "sst2:1"
    finally:
        docker("stop", name)
