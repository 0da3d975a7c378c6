"""A server with an upstream on a stream of texts: calls, cost and true disagreement; and TRACER on the same stream."""

import http.client
import json
import os
import random
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import numpy as np
from numpy.typing import NDArray

from de3.export.encoder import encoder_of
from de3.export.states import compute
from de3.library import load
from de3.loadtest.servers import Server, dependencies, environment, free_port, running
from de3.model_store.model import Model
from de3.model_store.store import Store
from lab.audit import audit_of
from lab.learn import WINDOW, recovery, report_of

NAME = "upstream-study"
KEY = "DE3_LAB_UPSTREAM_KEY"  # environment variable
CLIENTS = 4
PRICES = (0.15, 0.60)  # for a million tokens of input, and of output
PROMPT = "Which of {labels} is this text about? Answer with the label only.\n\n{text}"
CHECKPOINTS = 10
EARLIEST = 500  # texts after which the rate of disagreement must stay within the guarantee
SWITCHED = 0.3  # share of the labels that a switch permutes
STOPPED = 50  # texts without a local answer: local answers have stopped
REFITS = (500, 1000, 2000, 4000, 8000)  # texts after which TRACER is fitted
ATTEMPTS = 10  # of a client, for one text
MAX_WAIT_S = 10.0  # a client waits no longer before it tries again
MISBEHAVING = {"limited": 0.02, "errors": 0.02, "hangs": 0.002, "prose": 0.1}
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Plan:
    """The options of `python -m lab upstream`.

    Attributes:
        texts: the stream, in its order.
        folder: the stock classifier that plays the upstream.
        switch, then: number of texts before the upstream's model changes, and the folder of the next one (None: labels
            are permuted); switch 0: never.
        is_real: the upstream is a server of the classifier, not the stand-in.
        options: of de3 serve.
    """

    texts: Sequence[str]
    folder: Path
    encoder: str
    guarantee: float = 0.02
    kind: str = "chat"
    per_second: float = 30.0
    noise: float = 0.0
    latency_s: float = 0.0
    switch: int = 0
    then: Path | None = None
    is_misbehaving: bool = False
    is_real: bool = False
    through_litellm: bool = False
    options: Sequence[str] = ()

    def check(self) -> None:
        """Raise ValueError for options that cannot be combined."""
        if self.is_real and (self.kind == "chat" or self.switch or self.noise or self.is_misbehaving):
            raise ValueError("--real: needs --kind classify, without --noise, --switch and --misbehaving")
        if self.through_litellm and self.kind != "chat":
            raise ValueError("--through-litellm: needs --kind chat")
        if self.switch >= len(self.texts):
            raise ValueError(f"--switch: must be below the number of texts, {len(self.texts)}")
        if self.then is not None and not self.switch:
            raise ValueError("--then: needs --switch")


class Answer(NamedTuple):
    """The answer to text `text` of the stream; label None: none after ATTEMPTS."""

    text: int
    label: str | None
    reason: str = ""
    layer: int = -1


@dataclass
class Result:
    """The answers of one system to the stream, in order, and their cost.

    Attributes:
        is_local, differs: for each answer; an answer of the upstream never differs.
        switch: number of answers before the upstream's model changed; 0: it did not.
        calls: number of paid calls at the end.
        cost, full_cost: price of the calls, and of a call for every text.
        noise: share of the upstream's answers that are not those of its model.
        unanswered: texts without an answer.
        checkpoints: for each tenth of the stream, the number of answers and of calls by kind.
        report: the server's report on its upstream, or TRACER's fits.
    """

    name: str
    guarantee: float
    is_local: Flags
    differs: Flags
    switch: int = 0
    calls: int = 0
    cost: float = 0.0
    full_cost: float = 0.0
    noise: float = 0.0
    unanswered: int = 0
    wall_s: float = 0.0
    checkpoints: list[tuple[int, Mapping[str, int]]] = field(default_factory=list)
    report: Any = None

    def numbers(self) -> dict[str, Any]:
        """The numbers of the table, by name."""
        count = len(self.is_local)
        rates = np.cumsum(self.differs) / np.arange(1, count + 1)
        first = np.flatnonzero(self.is_local)
        tenth = max(1, count // 10)
        found = {
            "texts": count,
            "unanswered": self.unanswered,
            "calls": self.calls,
            "calls_share": self.calls / count,
            "local": float(self.is_local.mean()),
            "local_last_tenth": float(self.is_local[-tenth:].mean()),
            "calls_last_tenth": self._last_calls() / tenth,
            "first_local": int(first[0]) if len(first) else None,
            "guarantee": self.guarantee,
            "differ": float(rates[-1]),
            "differ_last_half": float(self.differs[count // 2 :].mean()),
            "differ_local": float(self.differs[first].mean()) if len(first) else None,
            "worst_after_500": float(rates[EARLIEST:].max()) if count > EARLIEST else None,
            "noise": self.noise,
            "cost": self.cost,
            "full_cost": self.full_cost,
            "wall_s": self.wall_s,
        }
        if self.switch:
            local, wrong = self.is_local[self.switch :], self.differs[self.switch :]
            found |= {
                "local_before_switch": float(self.is_local[max(0, self.switch - tenth) : self.switch].mean()),
                "stopped_after": stopped(local),
                "differ_before_switch": float(rates[self.switch - 1]),
                "differ_after_switch": float(wrong.mean()),
                "within_again_after": recovery(wrong, self.guarantee) if len(wrong) >= WINDOW else None,
            }
        return found

    def _last_calls(self) -> int:
        ends = [sum(calls.values()) for _, calls in self.checkpoints]
        return ends[-1] - ends[-2] if len(ends) > 1 else 0


def stopped(is_local: Flags) -> int | None:
    """Number of texts before the first STOPPED ones in a row without a local answer; None if there are none."""
    if len(is_local) < STOPPED:
        return None
    without = np.flatnonzero(np.convolve(is_local, np.ones(STOPPED), "valid") < 0.5)
    return int(without[0]) if len(without) else None


def models_of(plan: Plan) -> tuple[list[str], list[dict[str, list[float]]]]:
    """The labels, and the probabilities that each of the upstream's models gives each text.

    Raises ValueError if the models have different labels.
    """
    texts = list(dict.fromkeys(plan.texts))

    def probs_of(folder: Path) -> tuple[list[str], dict[str, list[float]]]:
        with load(folder) as model:
            rows = model.classify(texts, tau=0)
            return model.labels, {
                t: [round(p, 7) for p in row.probs] for t, row in zip(texts, rows, strict=True)
            }

    labels, first = probs_of(plan.folder)
    if not plan.switch:
        return labels, [first]
    if plan.then is not None:
        others, second = probs_of(plan.then)
        if sorted(others) != sorted(labels):
            raise ValueError(f"--then: the labels of {plan.then} are not those of {plan.folder}")
        order = [others.index(label) for label in labels]
    else:
        order = permuted(len(labels))
        second = first
    return labels, [first, {text: [probs[i] for i in order] for text, probs in second.items()}]


def permuted(count: int) -> list[int]:
    """The numbers below count, of which a share of SWITCHED (two at least) have changed places in a circle."""
    order = list(range(count))
    moved = random.Random(0).sample(order, max(2, round(SWITCHED * count)))
    for a, b in zip(moved, [*moved[1:], moved[0]], strict=True):
        order[a] = b
    return order


def run_de3(
    plan: Plan, labels: Sequence[str], truth: Sequence[str], models: Sequence[Any], place: Path
) -> Result:
    """Send the stream to a server with the upstream. truth: the label that the upstream's model gives each text.

    place: folder for the files. Raises ValueError if a server does not start.
    """
    with ExitStack() as stack:
        url, standin = _start_upstream(plan, labels, models, place, stack)
        settings = _settings(plan, labels, url, place / f"{NAME}.toml")
        options = ["--guarantee", f"{plan.guarantee:g}", "--learn", "--state-dir", str(place / "state")]
        command = [sys.executable, "-P", "-m", "de3.cli", "serve", str(settings), *options, *plan.options]
        server = Server("de3", [*command, "--port", "{port}"], ready="/ready")
        started = stack.enter_context(running(server, free_port(), place / "de3.log"))
        answers, checkpoints = list[Answer](), list[tuple[int, Mapping[str, int]]]()
        began = time.monotonic()
        switch = 0
        for end in ends_of(len(plan.texts), plan.switch):
            last = checkpoints[-1][0] if checkpoints else 0
            answers += send(started.target.url, plan.texts, range(last, end), plan.per_second)
            checkpoints.append((end, _upstream(started.target.url)["calls"]))
            if end == plan.switch:
                urlopen(Request(f"{standin}/switch", method="POST")).close()
                switch = sum(answer.label is not None for answer in answers)
        wall_s = time.monotonic() - began
        report = _settled(started.target.url)
        checkpoints[-1] = (checkpoints[-1][0], report["calls"])
        if standin:
            report["received"] = json.loads(urlopen(f"{standin}/health").read())["calls"]
        report["learn"] = report_of(started.target.url, NAME)
    result = result_of(plan, answers, truth, report)
    result.switch, result.wall_s, result.checkpoints = switch, wall_s, checkpoints
    return result


def result_of(
    plan: Plan, answers: Sequence[Answer], truth: Sequence[str], report: Mapping[str, Any]
) -> Result:
    """Compare the answers with the truth, the label that the upstream's model gives each text of the stream.

    report: the server's report on its upstream.
    """
    answered = [answer for answer in answers if answer.label is not None]
    is_local = np.array([answer.reason != "upstream" for answer in answered])
    wrong = np.array([answer.label != truth[answer.text] for answer in answered])
    calls = sum(report["calls"].values())
    # Calls that failed cost nothing, unless the upstream replied.
    paid = calls - sum(count for why, count in report["failures"].items() if why != "reply")
    return Result(
        "DE3",
        plan.guarantee,
        is_local,
        wrong & is_local,
        calls=calls,
        cost=report["cost"],
        full_cost=report["cost"] / max(1, paid) * len(plan.texts),
        noise=_mean(wrong[~is_local]),
        unanswered=len(answers) - len(answered),
        report=report,
    )


def _mean(flags: Flags) -> float:
    return float(flags.mean()) if len(flags) else 0.0


def ends_of(count: int, switch: int) -> list[int]:
    """The numbers of texts after which calls are counted: each tenth of the stream, and the switch."""
    return sorted({count * i // CHECKPOINTS for i in range(1, CHECKPOINTS + 1)} | ({switch} - {0}))


def _start_upstream(
    plan: Plan, labels: Sequence[str], models: Sequence[Any], place: Path, stack: ExitStack
) -> tuple[str, str]:
    """Start the upstream; returns the URL to call, and that of the stand-in, which is empty for --real."""
    if plan.is_real:
        command = [sys.executable, "-P", "-m", "de3.cli", "serve", str(plan.folder.absolute()), "--tau", "0"]
        server = Server("the upstream", [*command, "--port", "{port}"], ready="/ready")
        started = stack.enter_context(running(server, free_port(), place / "upstream.log"))
        return f"{started.target.url}/classify", ""
    table = place / "table.json"
    table.write_text(json.dumps({"labels": labels, "models": models}))
    faults = MISBEHAVING if plan.is_misbehaving else {}
    options = {"noise": plan.noise, "latency": plan.latency_s, **faults}
    command = [sys.executable, "-m", "lab.standin", str(table), "--port", "{port}"]
    command += [f"--{name}={value:g}" for name, value in options.items()]
    started = stack.enter_context(
        running(Server("the stand-in", command), free_port(), place / "standin.log")
    )
    standin = started.target.url
    if plan.kind == "classify":
        return f"{standin}/classify", standin
    if plan.through_litellm:
        url = stack.enter_context(_litellm(standin, place))
        return f"{url}/v1/chat/completions", standin
    return f"{standin}/v1/chat/completions", standin


@contextmanager
def _litellm(standin: str, place: Path) -> Iterator[str]:
    """Start LiteLLM's proxy, with its default settings, in front of the stand-in; yields its URL."""
    python, config = environment("litellm", ["litellm[proxy]"]), place / "litellm.yaml"
    model = {"model": "openai/standin", "api_base": f"{standin}/v1", "api_key": "none"}
    os.environ[KEY] = key = f"sk-{secrets.token_hex(16)}"  # LiteLLM does not start without one
    content = {
        "model_list": [{"model_name": "standin", "litellm_params": model}],
        "general_settings": {"master_key": key},
    }
    config.write_text(json.dumps(content))
    command = ["env", "LITELLM_LOCAL_MODEL_COST_MAP=True", str(python.with_name("litellm"))]
    command += ["--config", str(config), "--host", "127.0.0.1", "--port", "{port}"]
    server = Server("LiteLLM", command, ready="/health/liveliness")
    with running(server, free_port(), place / "litellm.log") as started:
        yield started.target.url


def _settings(plan: Plan, labels: Sequence[str], url: str, path: Path) -> Path:
    """Write the .toml file of the model."""
    upstream: dict[str, Any] = {"kind": plan.kind, "url": url, "timeout_s": 5 + 2 * plan.latency_s}
    upstream["price_per_million_tokens"] = PRICES
    if plan.kind == "chat":
        upstream |= {"model": "standin", "prompt": PROMPT}
    if plan.through_litellm:
        upstream["api_key_env"] = KEY
    lines = [f"{name} = {json.dumps(value)}" for name, value in upstream.items()]
    head = f'name = "{NAME}"\nencoder = {json.dumps(plan.encoder)}\nlabels = {json.dumps(labels)}\n'
    path.write_text("\n".join([head, "[upstream]", *lines]))
    return path


def send(url: str, texts: Sequence[str], numbers: Sequence[int], per_second: float) -> list[Answer]:
    """Send the texts with these numbers at most at `per_second`, one per request; the answers, in their order.

    A client that is refused waits as Retry-After says, and sends the text again. Raises ValueError for a status that is
    neither 200 nor 5xx.
    """
    answers: list[Answer] = []
    pending, lock, start = enumerate(numbers), threading.Lock(), time.monotonic()
    errors: list[Exception] = []

    def work() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
        try:
            while not errors:
                with lock:
                    position, number = next(pending, (None, -1))
                if position is None:
                    return
                time.sleep(max(0.0, start + position / per_second - time.monotonic()))
                answer = _ask(connection, texts[number], number)
                with lock:
                    answers.append(answer)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return answers


def _ask(connection: http.client.HTTPConnection, text: str, number: int) -> Answer:
    for _ in range(ATTEMPTS):
        connection.request(
            "POST", "/classify", json.dumps({"input": text}), {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        data = json.loads(response.read())
        if response.status == 200:
            row = data["data"][0]
            return Answer(number, row["label"], row["exit"]["reason"], row["exit"]["layer"])
        if response.status < 500:
            raise ValueError(f"status {response.status}: {data}")
        time.sleep(min(float(response.headers["Retry-After"] or 1), MAX_WAIT_S))
    return Answer(number, None)


def _upstream(url: str) -> dict[str, Any]:
    return dict(audit_of(url, NAME)["upstream"])


def _settled(url: str) -> dict[str, Any]:
    """The report on the upstream, once no audits are pending."""
    before: dict[str, Any] = {}
    while (report := _upstream(url))["calls"] != before.get("calls"):
        before = report
        time.sleep(2.0)
    return report


def run_tracer(
    plan: Plan,
    labels: Sequence[str],
    truth: Sequence[str],
    paid: float,
    schedules: Sequence[Sequence[int]],
    place: Path,
) -> list[Result]:
    """Run TRACER on the stream, once for each schedule; see lab/tracer_peer.py for its settings.

    truth: as for run_de3. paid: price of a call. schedules: numbers of texts after which it is fitted. Raises
    ValueError if TRACER fails.
    """
    noisy = random.Random(0)
    teacher = [
        noisy.choice([other for other in labels if other != label]) if noisy.random() < plan.noise else label
        for label in truth
    ]
    stream, vectors, out = place / "stream.json", place / "embeddings.npy", place / "tracer.json"
    content = {"texts": list(plan.texts), "teacher": teacher, "target": 1 - plan.guarantee}
    stream.write_text(json.dumps({**content, "schedules": schedules}))
    np.save(vectors, embeddings(plan.encoder, plan.texts, place))
    script = Path(__file__).with_name("tracer_peer.py")
    python = environment("tracer_peer", dependencies(script))
    command = [str(python), "-P", str(script), str(stream), str(vectors), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"TRACER failed: {done.stderr[-2000:]}")
    wrong, results = np.array([a != b for a, b in zip(teacher, truth, strict=True)]), []
    for ends, found in zip(schedules, json.loads(out.read_text()), strict=True):
        pairs = list(zip(found["labels"], truth, strict=True))
        is_local = np.array([label is not None for label, _ in pairs])
        differs = np.array([label not in (None, true) for label, true in pairs])
        name = f"TRACER, fitted after {', '.join(map(str, ends))}"
        calls = int((~is_local).sum())
        result = Result(name, plan.guarantee, is_local, differs, plan.switch, calls, calls * paid)
        result.full_cost, result.noise = len(plan.texts) * paid, _mean(wrong[~is_local])
        for end in ends_of(len(plan.texts), plan.switch):
            result.checkpoints.append((end, {"deferred": int((~is_local[:end]).sum())}))
        result.report = found["fits"]
        result.wall_s = sum(fit["seconds"] for fit in result.report)
        results.append(result)
    return results


def embeddings(encoder: str, texts: Sequence[str], place: Path) -> NDArray[np.float32]:
    """The embeddings of texts by an encoder in fp32, pooled as it says, with length 1: (texts, hidden)."""
    with encoder_of(encoder, Store(Path("models")), "fp32") as (artifact, poolings):
        computed = compute(Model(artifact, "auto"), list(texts), place, "stream", poolings[:1])
        states = computed.states(poolings[0], artifact.manifest.num_layers)
    return np.asarray(states / np.linalg.norm(states, axis=1, keepdims=True), np.float32)


def study(plan: Plan, schedules: Sequence[Sequence[int]]) -> list[Result]:
    """Run the stream with DE3, and with TRACER for each schedule.

    Raises ValueError for options that cannot be used, or if a server or TRACER fails.
    """
    plan.check()
    labels, models = models_of(plan)
    best = [{text: labels[probs.index(max(probs))] for text, probs in one.items()} for one in models]
    switch = plan.switch or len(plan.texts)
    truth = [best[int(i >= switch)][text] for i, text in enumerate(plan.texts)]
    with TemporaryDirectory(prefix="de3-lab-") as folder:
        results = [run_de3(plan, labels, truth, models, Path(folder))]
        if schedules:
            paid = results[0].full_cost / len(plan.texts)
            results += run_tracer(plan, labels, truth, paid, schedules, Path(folder))
    return results


def checkpoint_table(result: Result) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a table: calls so far by kind, and shares within each part of the stream."""
    kinds = list(result.checkpoints[0][1])
    columns = ["texts", *kinds, "calls", "of the texts", "local in this part", "differ in this part"]
    rows, start = [], 0
    for end, calls in result.checkpoints:
        part, total = slice(start, end), sum(calls.values())
        shares = total / end, result.is_local[part].mean(), result.differs[part].mean()
        rows.append([f"{end}", *(f"{calls[kind]}" for kind in kinds), f"{total}", *map(_percent, shares)])
        start = end
    return columns, rows


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}%"


def table(results: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a table: one column for each system."""
    numbers = [result.numbers() for result in results]

    def count(value: int | None) -> str:
        return "–" if value is None else f"{value}"

    def within(value: float | None) -> str:
        said = "" if value is None else " within" if value <= results[0].guarantee else " NOT within"
        return _percent(value) + said

    names: list[tuple[str, str, Callable[[Any], str]]] = [
        ("texts answered", "texts", count),
        ("texts without an answer", "unanswered", count),
        ("calls", "calls", count),
        ("calls, of the texts", "calls_share", _percent),
        ("calls in the last tenth, of its texts", "calls_last_tenth", _percent),
        ("answered locally", "local", _percent),
        ("answered locally in the last tenth", "local_last_tenth", _percent),
        ("first local answer after", "first_local", count),
        ("differ, of all answers", "differ", within),
        ("differ, of the last half", "differ_last_half", within),
        (f"highest rate so far, after {EARLIEST} texts", "worst_after_500", within),
        ("differ, of the local answers", "differ_local", _percent),
        ("the upstream's own noise", "noise", _percent),
        (
            f"cost, at {PRICES[0]:.2f} and {PRICES[1]:.2f} per million tokens",
            "cost",
            lambda value: f"{value:.4f}",
        ),
        ("cost of a call for every text", "full_cost", lambda value: f"{value:.4f}"),
        ("wall time (TRACER: of its fits), s", "wall_s", lambda value: f"{value:.0f}"),
    ]
    if results[0].switch:
        names += [
            ("before the switch: local", "local_before_switch", _percent),
            ("before the switch: differ", "differ_before_switch", within),
            (f"after it: local answers stop ({STOPPED} without) after", "stopped_after", count),
            ("after it: differ", "differ_after_switch", within),
            (f"after it: the latest {WINDOW} are within again after", "within_again_after", count),
        ]
    rows = [[what, *(show(one[name]) for one in numbers)] for what, name, show in names]
    return [f"guarantee {_percent(results[0].guarantee)}", *(result.name for result in results)], rows
