"""python -m lab tenants: what --guarantee costs with many tenants, and what a learned version gives them."""

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any
from urllib.request import Request, urlopen

import numpy as np
import typer

from de3.exits.guarantee import Audited
from de3.loadtest import options
from de3.loadtest.client import Target, ask_alone, send_traffic
from de3.loadtest.servers import Server, ours, running
from de3.loadtest.texts import Sample, read
from de3.model_store.manifest import Manifest
from de3.model_store.store import Store
from de3.runtime.rules import Rules
from de3.server.audit.ledger import Ledger
from de3.server.audit.tenant import Settled
from de3.server.learn.learners import CHECK_S
from de3.server.settings import Settings
from lab.attacks import WORDS
from lab.learn import WINDOW, Answer, send, truth
from lab.options import show
from lab.studies.copies import Attack, find_alike, stream
from lab.well_behaved import Phase, WellBehavedClient, authorized

BATCH = 256
RATE = 0.02  # the guarantee of `count` and `p99`
CLIENTS = 2  # of `p99`, which send batches

app = typer.Typer(no_args_is_help=True, help="The guarantee of many tenants: CPU time, latency, learning.")


def _key(tenant: int) -> str:
    return f"api-key-of-tenant-{tenant:04}"


def _with_keys(server: Server, tenants: int) -> Server:
    keys = ";".join(f"tenant-{tenant} {_key(tenant)}" for tenant in range(tenants))
    return replace(server, command=["env", f"DE3_API_KEYS={keys}", *server.command])


def count_ms(manifest: Manifest, tenants: int, share: float) -> float:
    """Median CPU time of counting a request of BATCH new texts, ms; `share` of them are audited.

    The tenants send requests in turn.
    """
    fields: dict[str, Any] = {"guarantee": RATE}
    rng, settings, exits = np.random.default_rng(1), Settings(**fields), len(manifest.exit_layers) - 1
    ledger = Ledger(manifest, Rules(manifest, settings), "", 1.0, settings)
    times = []
    for number in range(max(60, 3 * tenants)):
        name = f"tenant-{number % tenants}"
        settled = Settled(name, ledger.tenant(name).epoch, share, may_rise=True)
        for key in range(number * BATCH, (number + 1) * BATCH):
            if rng.random() < share:
                differs = (rng.random(exits) < RATE / 2).tolist()
                settled.add(key, Audited([*rng.random(exits).tolist(), None], [[*differs, False]]), False)
            else:
                settled.skipped += 1
        start = time.thread_time()
        ledger.count([settled])
        times.append(1000 * (time.thread_time() - start))
    return median(times[len(times) // 3 :])  # without the first request of each tenant


@dataclass(frozen=True)
class _Batches(Target):
    """A target of batches: a sample has a text on each line, and its group is the API key."""

    def request(self, sample: Sample) -> bytes:
        return authorized(super().request(sample), sample.group or "")


def beside_batches(
    store: Path, model: str, tenants: int, processes: int, seconds: float, port: int
) -> tuple[Phase, int]:
    """The answers to a client that sends single texts beside CLIENTS that send batches; and the number of batches.

    The clients that send batches use the keys of all other tenants in turn; if there are none, its own.
    """
    rng = random.Random(0)
    chosen = ["--guarantee", f"{RATE:g}", "--processes", str(processes)]
    with (
        TemporaryDirectory(prefix="de3-lab-") as folder,
        running(
            _with_keys(ours(store, model, options=chosen), tenants), port, Path(folder) / "log"
        ) as started,
    ):
        target = _Batches(started.target.url, body=lambda text: {"input": text.split("\n")})
        ask_alone(target, [Sample("good", group=_key(tenant)) for tenant in range(tenants)])
        samples = []
        for number in range(2 * BATCH):
            texts = [" ".join(rng.choices(WORDS, k=rng.randrange(8, 30))) for _ in range(BATCH)]
            key = _key(1 + number % (tenants - 1) if tenants > 1 else 0)
            samples.append(Sample("\n".join(texts), group=key))
        with WellBehavedClient(port, key=_key(0)) as client:
            start = time.monotonic()
            run = send_traffic(target, samples, seconds, connections=CLIENTS)
            end = time.monotonic()
        return Phase.of(client.between(start, end)), len(run.ok())


def versions(
    stock: Path, texts: list[str], tenants: int, rate: float, per_second: float, port: int
) -> tuple[list[Answer], list[dict[str, Any]]]:
    """The answers of a server that learns to texts that tenants send in turn, and the server's reports on its fits.

    After every WINDOW texts, no more are sent until the fit ends, so the result hardly depends on its duration. rate:
    the guarantee.
    """
    keys = [_key(tenant) for tenant in range(tenants)]
    with _learning(stock, tenants, rate, port) as url:
        return _taught(url, texts, keys, per_second)


@contextmanager
def _learning(stock: Path, tenants: int, rate: float, port: int) -> Iterator[str]:
    """The URL of a server that learns; without keys, if there are no tenants."""
    with TemporaryDirectory(prefix="de3-lab-") as folder:
        command = [sys.executable, "-m", "de3.cli", "serve", str(stock), "--port", "{port}", "--learn"]
        command += ["--guarantee", f"{rate:g}", "--state-dir", f"{folder}/state"]
        server = Server("de3", command, ready="/ready")
        with running(
            _with_keys(server, tenants) if tenants else server, port, Path(folder) / "log"
        ) as started:
            yield started.target.url


def _taught(
    url: str, texts: Sequence[str], keys: Sequence[str], per_second: float
) -> tuple[list[Answer], list[dict[str, Any]]]:
    """Send texts to a server that learns; after every WINDOW texts, wait until no fit runs.

    keys: used in turn. Returns the answers, and the server's reports on its fits.
    """
    answers = list[Answer]()
    report: dict[str, Any] = {}
    for start in range(0, len(texts), WINDOW):
        used = [keys[i % len(keys)] for i in range(start, start + WINDOW)]
        answers += send(url, texts[start : start + WINDOW], per_second, used)
        path = f"/v1/models/{answers[0].model.partition(':')[0]}/learn"
        request = Request(url + path, headers={"Authorization": f"Bearer {keys[0]}"})
        report = {"phase": "fitting"}
        while report["phase"] == "fitting":
            time.sleep(2 * CHECK_S)  # a fit that is due has begun after that
            with urlopen(request) as response:
                report = json.load(response)
    return answers, report["fits"]


def table(answers: Sequence[Answer], fits: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """The columns of a table, and a row for each version: its texts, and the speed-ups of the first and last WINDOW."""
    layers, names = np.array([answer.layer for answer in answers]), np.array([one.model for one in answers])
    served = {str(fit["version"]): fit for fit in fits if fit["outcome"] == "served"}
    rows = []
    for name in dict.fromkeys(names.tolist()):
        own, fit = layers[names == name], served.get(name.partition(":")[2])
        proved = [f"{fit.get('held_out', 0):,}", _proved(fit)] if fit else ["–", "–"]
        speedups = [f"{layers.max() / part.mean():.2f}×" for part in (own[:WINDOW], own[-WINDOW:])]
        rows.append([name, *proved, f"{len(own):,}", *speedups])
    columns = ["version", "tested on records", "proved", "texts"]
    return [*columns, f"first {WINDOW} texts", f"last {WINDOW} texts"], rows


@app.command()
def count(store: options.Store = Path("models"), model: options.Model = "sst2") -> None:
    """Measure the CPU time of counting the texts of one request of 256 texts.

    Example: python -m lab tenants count
    """
    manifest = Store(store).open(model).manifest
    rows = [
        [tenants, *(f"{count_ms(manifest, tenants, share):.2f}" for share in (1.0, 0.05))]
        for tenants in (1, 9, 256)
    ]
    show(["tenants", "all audited, ms", "5% audited, ms"], rows)


@app.command()
def p99(
    store: options.Store = Path("models"),
    model: options.ModelName = "sst2",
    seconds: options.Seconds = 15.0,
    port: options.Port = 8100,
) -> None:
    """Measure the latency of single texts, 20 a second, beside two clients that send batches of 256 texts.

    Example: python -m lab tenants p99
    """
    rows = []
    for processes in (1, 2):
        for tenants in (1, 256):
            found, batches = beside_batches(store, model, tenants, processes, seconds, port)
            answered = found.requests - found.refused - found.errors - found.unanswered
            rows.append([processes, tenants, found.p50_ms, found.p99_ms, answered, found.requests, batches])
    show(["processes", "tenants", "p50, ms", "p99, ms", "answered", "requests", "batches"], rows)


def _proved(fit: dict[str, Any]) -> str:
    """The speed-up that a fit proves, or why it failed."""
    proved = fit.get("proved_speedup")
    return str(fit.get("error")) if proved is None else f"{proved:.2f}×"


@app.command()
def copies(
    stock: Annotated[Path, typer.Argument(help="Folder of a stock classifier of transformers.")],
    texts: Annotated[Path, typer.Option(help="Texts that the classifier was not trained on.")],
    attack: Annotated[
        str, typer.Option(help='As "copies edit order sender [decoys]"; see lab/studies/copies.py.')
    ],
    guarantee: Annotated[float, typer.Option(help="The guaranteed rate of disagreement.")] = 0.05,
    own: Annotated[int, typer.Option(help="Texts of the victim before it is measured.", min=1)] = 1500,
    unseen: Annotated[int, typer.Option(help="Texts of the victim on which it is measured.", min=1)] = 1000,
    per_second: Annotated[float, typer.Option(help="Texts per second.", min=1)] = 100.0,
    text_column: options.TextColumn = "text",
    port: options.Port = 8100,
) -> None:
    """Attack the guarantee of a tenant of a real server with copies of its texts, then compare its next answers.

    Example: python -m lab tenants copies MODEL --texts texts.jsonl --attack "3 point ahead another"
    """
    chosen, found = Attack.of(attack), list(dict.fromkeys(one.text for one in read(texts, text_column)))
    rng = random.Random(1)
    rng.shuffle(found)
    next_texts = found[own : own + unseen]
    if chosen.edit == "synonym":
        find_alike(stock)
    sent = stream(chosen, found[:own], found[own + unseen :], rng)
    keys = ["", ""] if chosen.sender == "keyless" else [_key(0), _key(1)]
    with _learning(stock, 0 if chosen.sender == "keyless" else 2, guarantee, port) as url:
        _, fits = _taught(url, [text for _, text in sent], [keys[client] for client, _ in sent], per_second)
        answers = send(url, next_texts, per_second, keys[:1])
        labels = truth(url, next_texts, keys[0])
    layers, deepest = np.array([answer.layer for answer in answers]), max(answer.layer for answer in answers)
    differ = sum(answer.label != label for answer, label in zip(answers, labels, strict=True))
    outcomes = ", ".join(f"{fit['outcome']} ({_proved(fit)})" for fit in reversed(fits))
    show(
        ["attack", "texts", "fits, and what they prove", "of the next texts, early", "differ"],
        [[attack, len(sent), outcomes, f"{(layers < deepest).mean():.0%}", f"{differ / len(answers):.2%}"]],
    )


@app.command()
def version(
    stock: Annotated[Path, typer.Argument(help="Folder of a stock classifier of transformers.")],
    texts: Annotated[Path, typer.Option(help="Texts that the classifier was not trained on.")],
    tenants: Annotated[int, typer.Option(help="Number of tenants, which send texts in turn.", min=1)] = 20,
    guarantee: Annotated[float, typer.Option(help="The guaranteed rate of disagreement.")] = 0.05,
    per_second: Annotated[float, typer.Option(help="Texts per second.", min=1)] = 80.0,
    text_column: options.TextColumn = "text",
    port: options.Port = 8100,
    json_file: options.Json = None,
) -> None:
    """Serve a stock classifier with --learn, and measure the speed-up in layers with each version.

    --json writes the server's reports on its fits.

    Example: python -m lab tenants version runs/clinc/model --texts runs/clinc/texts.jsonl
    """
    found = list(dict.fromkeys(sample.text for sample in read(texts, text_column)))
    random.Random(1).shuffle(found)
    answers, fits = versions(stock, found, tenants, guarantee, per_second, port)
    show(*table(answers, fits), json_file, fits)
