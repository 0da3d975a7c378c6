"""Questions over HTTP: one and several on one pass beside /classify, and LiteLLM's guardrail that asks them."""

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import httpx

from de3.loadtest.client import quantile
from de3.loadtest.servers import ours, running
from de3.model_store.store import Store
from lab.processes import SCRIPT, ratio, run_wrk

CONNECTIONS = (1, 16)
Body = Mapping[str, object]
PROXY_S = 120.0  # for the start of the proxy
# The proxy's own models answer at once, so that the guardrail's time is what differs.
CONFIG = """
model_list:
  - model_name: chat
    litellm_params: {model: openai/none, api_key: none, mock_response: answered}
  - model_name: de3
    litellm_params: {model: openai/%s, api_base: "%s/v1", api_key: none}
guardrails:
  - guardrail_name: checks
    litellm_params: {guardrail: decision_model, mode: pre_call, decision_model: de3, checks: %s}
"""


@dataclass
class Side:
    """A way to ask.

    Attributes:
        path: of its requests. bodies: `per_text` for each text.
        rates: texts/s of each round, by number of connections.
    """

    name: str
    path: str
    bodies: Sequence[Body]
    per_text: int = 1
    rates: dict[int, list[float]] = field(default_factory=dict)


def questions_of(store: Path, models: Sequence[str], kind: str) -> list[Body]:
    """A question for each model, by whose name it is bound: a choice of its labels, or a predicate about the first."""
    found = list[Body]()
    for name in models:
        labels = [{"value": label} for label in Store(store).open(name).manifest.labels]
        what: Body = {"name": f"{name} check"} if kind == "predicate" else {"name": name, "choices": labels}
        found.append({"type": kind, "instructions": f"What does {name} say of the message?", **what})
    return found


def flags_of(store: Path, models: Sequence[str]) -> list[str]:
    """Options of de3 serve with the first label of each model as its flag."""
    flags = [f"{name}={Store(store).open(name).manifest.labels[0]}@0.5" for name in models]
    return [part for flag in flags for part in ("--flag", flag)]


def bindings(store: Path, models: Sequence[str]) -> str:
    """The file of these questions, and of a predicate about each model's first label, for its flag at 0.5."""
    lines = []
    for name in models:
        labels = Store(store).open(name).manifest.labels
        choice = f'type = "choice"\nname = {json.dumps(name)}\nchoices = {json.dumps(labels)}'
        named = json.dumps(f"{name} check")
        check = f'type = "predicate"\nname = {named}\nlabels = {json.dumps(labels[:1])}\nthreshold = 0.5'
        lines += [f"[[questions]]\nmodel = {json.dumps(name)}\n{one}\n" for one in (choice, check)]
    return "\n".join(lines)


def measure(
    store: Path,
    models: Sequence[str],
    texts: Sequence[str],
    kind: str,
    rounds: int,
    seconds: float,
    port: int,
) -> list[Side]:
    """All ways to ask one server, in turn; raises ValueError if wrk is missing or requests fail."""
    asked = questions_of(store, models, kind)
    single = [{"input": text, "questions": [one]} for text in texts for one in asked]
    found = [
        Side("/classify, one model", "/classify", [{"input": text, "model": models[0]} for text in texts]),
        Side("one question", "/v1/decisions", [{"input": text, "questions": asked[:1]} for text in texts]),
        Side("/classify, all", "/classify", [{"input": text, "models": [*models]} for text in texts]),
        Side("all questions", "/v1/decisions", [{"input": text, "questions": asked} for text in texts]),
        Side("a call for each", "/v1/decisions", single, len(models)),
    ]
    with TemporaryDirectory() as folder:
        file, script = Path(folder) / "questions.toml", Path(folder) / "post.lua"
        file.write_text(bindings(store, models))
        options = [part for name in models[1:] for part in ("--model", name)]
        options += flags_of(store, models) if kind == "predicate" else []
        server = ours(store, models[0], options=[*options, "--questions", str(file)])
        with running(server, port, Path(folder) / "log") as started:
            for number in range(-1, rounds):  # round −1 warms up
                for side in found:
                    bodies = ",\n".join(f"[==[{json.dumps(body)}]==]" for body in side.bodies)
                    script.write_text((SCRIPT % bodies).replace('"/classify"', f'"{side.path}"'))
                    for connections in CONNECTIONS:
                        rate = run_wrk(started, script, connections, seconds).rate / side.per_text
                        if number >= 0:
                            side.rates.setdefault(connections, []).append(rate)
    return found


def table(found: Sequence[Side]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| | " + " | ".join(f"{c} connections, texts/s" for c in CONNECTIONS) + " |"
    yield "| --- |" + " --- |" * len(CONNECTIONS)
    for side in found:
        yield f"| {side.name} | " + " | ".join(f"{median(side.rates[c]):,.0f}" for c in CONNECTIONS) + " |"
    classify, one, classify_all, together, each = found
    for above, below in ((one, classify), (together, classify_all), (together, each)):
        ratios = (ratio(above.rates[c], below.rates[c]) for c in CONNECTIONS)
        yield f"{above.name} / {below.name}: {', '.join(ratios)}"


def guardrail(
    store: Path, models: Sequence[str], texts: Sequence[str], proxy: Path, rounds: int, port: int
) -> dict[str, list[list[float]]]:
    """Latencies of a chat through LiteLLM's proxy, ms, by round: without a guardrail; with one that asks a predicate of
    each model, which exits early; and the same with all layers.

    proxy: the program litellm. Chats are sent one after another, in turn to each.
    """
    checks = [
        {"name": f"{name} check", "instructions": name, "threshold": 0.5, "action": "log"} for name in models
    ]
    shared = flags_of(store, models)
    shared += [part for name in models[1:] for part in ("--model", name)]
    asked, found = json.dumps(checks), dict[str, list[list[float]]]()
    with TemporaryDirectory() as folder:
        file = Path(folder) / "questions.toml"
        file.write_text(bindings(store, models))
        options = [*shared, "--questions", str(file)]
        early = ours(store, models[0], options=options)
        full = ours(store, models[0], options=[*options, "--tau", "0"])
        with (
            running(early, port, Path(folder) / "early.log") as first,
            running(full, port + 1, Path(folder) / "full.log") as second,
            _proxy(
                proxy,
                Path(folder) / "1",
                CONFIG % (models[0], first.target.url, asked),
                port + 2,
            ) as a,
            _proxy(
                proxy,
                Path(folder) / "2",
                CONFIG % (models[0], second.target.url, asked),
                port + 3,
            ) as b,
            httpx.Client(timeout=60) as client,
        ):
            sides: dict[str, tuple[str, list[str]]] = {
                "no guardrail": (a, []),
                "guardrail": (a, ["checks"]),
                "guardrail, full depth": (b, ["checks"]),
            }
            for number in range(-1, rounds):
                for name, (url, guardrails) in sides.items():
                    times = []
                    for text in texts:
                        body = {"model": "chat", "messages": [{"role": "user", "content": text}]}
                        began = time.perf_counter()
                        answer = client.post(
                            url + "/v1/chat/completions", json=body | {"guardrails": guardrails}
                        )
                        times.append(1000 * (time.perf_counter() - began))
                        if answer.status_code != 200:
                            raise ValueError(f"the proxy answered {answer.status_code}: {answer.text[:300]}")
                    if number >= 0:
                        found.setdefault(name, []).append(times)
    return found


@contextmanager
def _proxy(program: Path, folder: Path, config: str, port: int) -> Iterator[str]:
    """LiteLLM's proxy with this configuration; its URL."""
    folder.mkdir()
    (folder / "config.yaml").write_text(config)
    variables = dict.fromkeys(
        ("LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY", "LITELLM_LOCAL_MODEL_COST_MAP"), "True"
    )
    command = [str(program), "--config", str(folder / "config.yaml"), "--port", str(port)]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | variables, stdout=log, stderr=subprocess.STDOUT)
    url, ends = f"http://127.0.0.1:{port}", time.monotonic() + PROXY_S
    try:
        while not _is_up(url):
            if process.poll() is not None or time.monotonic() > ends:
                raise ValueError(f"the proxy does not start:\n{(folder / 'log').read_text()[-2000:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(30)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(url + "/health/liveliness").status_code == 200
    except httpx.TransportError:
        return False


def table_of_guardrail(found: Mapping[str, list[list[float]]]) -> Iterator[str]:
    """Yield the lines of a Markdown table: medians over the rounds, and what the guardrail adds."""
    yield "| | p50, ms | p99, ms | added at p50 | added at p99 |"
    yield "| --- | --- | --- | --- | --- |"
    at = {
        name: [median(quantile(times, q) for times in rounds) for q in (0.5, 0.99)]
        for name, rounds in found.items()
    }
    base = at["no guardrail"]
    for name, both in at.items():
        added = [f"{one - without:.2f}" for one, without in zip(both, base, strict=True)]
        yield f"| {name} | " + " | ".join(f"{one:.2f}" for one in both) + f" | {' | '.join(added)} |"
