"""The clients of docs/decisions.md, installed for these tests, and jevcompat's suite."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from de3.library import DEMO
from de3.server.questions import read_questions
from tests.serving import Server, free_port, serving, until

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parent.parent / "docs" / "decisions.md"
# Exact versions, because others were published with malicious code.
PACKAGES = "litellm[proxy]==1.108.7 typesafe-sdk[zstd]==0.7.5 jevcompat==0.1.1 openai==3.63.0"
GOOD, BAD = "A wonderful film.", "A dreadful film."
WORDS = "a dreadful , awful , boring mess of a film that nobody should ever see , not even once"


def blocks(kind: str) -> list[str]:
    """The code of this kind on the page."""
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the clients."""
    folder = tmp_path_factory.mktemp("clients") / "venv"
    uv = str(Path(sys.executable).parent / "uv")
    done = subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder], check=False)
    command = [uv, "pip", "install", "--quiet", "--python", folder / "bin/python", *PACKAGES.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    if done.returncode:
        pytest.skip(f"the clients cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin"


@contextmanager
def program(*command: str | Path, ready: str, **environment: str) -> Iterator[None]:
    """A program that serves; ready: the URL that answers once it does."""
    with subprocess.Popen([*map(str, command)], env=os.environ | environment) as running:
        try:
            until(lambda: running.poll() is not None or _answers(ready), f"{command[0]}")
            assert running.poll() is None
            yield
        finally:
            running.terminate()
            running.wait(30)


def _answers(url: str) -> bool:
    try:
        return bool(httpx.get(url).status_code)
    except httpx.TransportError:
        return False


@contextmanager
def demo(folder: Path, more: str = "", **settings: Any) -> Iterator[Server]:
    """The server of the page. more: appended to its file of questions."""
    path = folder / "questions.toml"
    path.write_text(blocks("toml")[0] + more)
    upstreams, flags = read_questions(path).upstreams, ["sst2=negative@0.7"]
    with serving(
        DEMO, models=["sst2"], questions=path, upstreams=upstreams, flags=flags, **settings
    ) as server:
        yield server


def test_the_clients_of_the_page(clients: Path, tmp_path: Path) -> None:
    with demo(tmp_path) as server:
        asked = {"input": BAD, "questions": [{"type": "predicate", "name": "complaint"}]}
        probability = httpx.post(server.url + "/v1/decisions", json=asked).json()["answers"][0]["probability"]
        for code in (one.replace("http://localhost:8000", server.url) for one in blocks("python")):
            assert f"{probability}" in printed(clients, code)
        printed(clients, code_of_a_long_state(server))


def printed(clients: Path, code: str) -> str:
    """What a program prints."""
    done = subprocess.run(
        [clients / "python", "-c", code],
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def code_of_a_long_state(server: Server) -> str:
    """TypeSafe's client compresses long bodies, lists models, and raises for errors by their status."""
    return f"""
from typesafe_sdk import Noul, TypeSafeClient, TypeSafeUnprocessableEntityError
with TypeSafeClient(base_url={server.url!r}, api_key="none") as client:
    asked = {{"a": Noul(instructions="Is the review negative?")}}
    long = client.system_one(model="sst2", state={{"review": [{BAD!r}] * 100}}, questions=asked)
    assert long.answers["a"].noul > 0.7
    assert client.models.list().models[0].name == "sst2:1"
    try:
        client.system_one(model="sst2", state="a", questions={{"a": Noul(instructions="Is it long?")}})
        raise SystemExit("answered")
    except TypeSafeUnprocessableEntityError as error:
        assert "no model is bound" in str(error)
"""


MORE = """
  - model_name: small
    litellm_params: {model: openai/none, api_key: none, mock_response: "the small model"}
  - model_name: large
    litellm_params: {model: openai/none, api_key: none, mock_response: "WORDS"}
  - model_name: gone
    litellm_params: {model: openai/sst2, api_base: "http://localhost:1/v1", api_key: none}
guardrails:
  - guardrail_name: log
    litellm_params: {guardrail: decision_model, mode: pre_call, decision_model: de3, checks: [LOG]}
  - guardrail_name: closed
    litellm_params: {guardrail: decision_model, mode: pre_call, decision_model: gone, checks: [CHECK]}
  - guardrail_name: open
    litellm_params:
      guardrail: decision_model
      mode: pre_call
      decision_model: gone
      checks: [CHECK]
      unreachable_fallback: fail_open
"""
CHECK = '{name: complaint, instructions: "Is the review negative?", action: %s}'


def test_the_proxy_of_litellm(clients: Path, tmp_path: Path) -> None:
    """Its guardrail blocks or logs, also a stream, and as it is told if the server is gone; its router chooses."""
    port = free_port()
    with demo(tmp_path) as server:
        (config,) = blocks("yaml")
        more = MORE.replace("WORDS", WORDS).replace("CHECK", CHECK % "block").replace("LOG", CHECK % "log")
        config = config.replace("guardrails:\n", more).replace("http://localhost:8000", server.url)
        (tmp_path / "config.yaml").write_text(config)
        command = [clients / "litellm", "--config", tmp_path / "config.yaml", "--port", str(port)]
        url = f"http://127.0.0.1:{port}"
        environment = dict.fromkeys(
            ("LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY", "LITELLM_LOCAL_MODEL_COST_MAP"), "True"
        )
        with program(*command, ready=url + "/health/liveliness", **environment):

            def chat(model: str, text: str, guard: str = "", stream: bool = False) -> httpx.Response:
                body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": stream}
                more = {"guardrails": [guard]} if guard else {}
                return httpx.post(url + "/v1/chat/completions", json=body | more)

            assert chat("small", GOOD, "complaints").status_code == 200
            blocked = chat("small", BAD, "complaints")
            assert blocked.status_code == 400 and "complaint" in blocked.text
            assert chat("small", BAD, "log").status_code == 200
            assert chat("small", GOOD, "closed").status_code == 502
            assert chat("small", GOOD, "open").status_code == 200
            streamed = chat("large", GOOD, "complaints", stream=True).text
            assert "Violated decision model guardrail policy" in streamed and "even once" not in streamed
            assert "the small model" in chat("auto", GOOD).text
            assert WORDS in chat("auto", BAD).text


def test_every_requirement_of_jevcompat_that_is_a_must(clients: Path, tmp_path: Path) -> None:
    """One is for servers without keys. Not JSON is 400, as in every protocol, which should be 422."""
    port = free_port()
    upstream = f'[upstream]\nkind = "systemone"\nmodel = "jev-latest"\nurl = "http://127.0.0.1:{port}/v1/systemone"\n'
    key = "alice-has-a-long-key"
    with program(
        clients / "jevcompat", "mock", "--port", str(port), ready=f"http://127.0.0.1:{port}/v1/models"
    ):
        settings = {"aliases": ["jev-latest=sst2"], "api_keys": f"alice {key}"}
        with demo(tmp_path, upstream, **settings) as server:
            command = [clients / "jevcompat", "test", server.url, "--key", key]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stdout
            assert "MUST 32/32, SHOULD 14/15" in done.stdout, done.stdout


def test_the_page_is_short_and_its_upstream_is_valid(tmp_path: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(prose.split()) <= 500
    path = tmp_path / "questions.toml"
    path.write_text("".join(blocks("toml")))
    assert read_questions(path).upstreams
