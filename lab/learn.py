"""A server that learns from a stream of texts whose kind changes once, compared with an offline import."""

import http.client
import json
import random
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from subprocess import run
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray

from de3.data.examples import Example
from de3.exits.calibration import FINE_TAUS
from de3.exits.guarantee import profiles
from de3.export.record import record
from de3.loadtest.servers import Server, process_tree, running
from de3.model_store.model import Model
from de3.model_store.store import Store, StoreError

CONNECTIONS = 8
WINDOW = 500  # texts in each window of the rates over time
BATCH = 64  # texts in a request at full depth
UNSEEN = 2000  # maximum number of texts held back for the speed-ups in hindsight

Label = str | frozenset[tuple[int, int, str]]


@dataclass
class Answer:
    """The answer to a text of the stream.

    label: of a token classifier, its set of spans. model_ms: model time, without queue time. model: as name:version.
    """

    layer: int
    label: Label
    model_ms: float
    model: str = ""


@dataclass
class Story:
    """One stream through one server.

    Attributes:
        rate: the guaranteed rate of disagreement.
        num_texts: number of texts of the first kind; the texts of the second kind follow.
        first_early: number of texts before the first early exit; None if there was none.
        disagreement: rates over the whole stream, before the switch, and after it.
        speedup: speed-up in layers over the last quarter of the first kind.
        model_speedup, with_audits: speed-up in model time over all texts of the first kind, without and with the time
            of audits.
        recovery: number of texts of the second kind after which the rate of the latest WINDOW texts stays within the
            guarantee; 0 if the rate never exceeds the guarantee, and all of these texts if it exceeds it at the end.
        learned, imported: speed-ups in hindsight on unseen texts: of the version that was served before the switch, and
            of an offline import from as many texts as were recorded.
        records: number of records before the switch.
        windows: for each window of the stream, its end, speed-up in layers, and rate of disagreement.
        memory_mb: peak memory (PSS) of the server and its fits.
        fits: the server's reports on its fits.
    """

    rate: float
    num_texts: int
    first_early: int | None = None
    disagreement: tuple[float, float, float] = (0.0, 0.0, 0.0)
    speedup: float = 1.0
    model_speedup: float = 1.0
    with_audits: float = 1.0
    recovery: int = 0
    learned: float = 1.0
    imported: float = 1.0
    records: int = 0
    memory_mb: float = 0.0
    windows: list[tuple[int, float, float]] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)


def send(url: str, texts: Sequence[str], per_second: float, keys: Sequence[str] = ("",)) -> list[Answer]:
    """Send texts in their order at `per_second`, one per request. Raises the first error of a request.

    keys: API keys, used in turn; empty: none.
    """
    answers: list[Answer | None] = [None] * len(texts)
    numbers, lock, start = iter(range(len(texts))), threading.Lock(), time.monotonic()
    errors: list[Exception] = []

    def work() -> None:
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        try:
            while not errors:
                with lock:
                    i = next(numbers, None)
                if i is None:
                    return
                time.sleep(max(0.0, start + i / per_second - time.monotonic()))
                answers[i] = _one(connection, texts[i], keys[i % len(keys)])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [answer for answer in answers if answer is not None]


def _one(connection: http.client.HTTPConnection, text: str, key: str) -> Answer:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection.request("POST", "/classify", json.dumps({"input": text}), headers)
    response = connection.getresponse()
    data = json.loads(response.read())
    if response.status != 200:
        raise ValueError(f"status {response.status}: {data}")
    stages = response.headers["server-timing"].split(",")
    model_ms = next(float(stage.split("dur=")[1]) for stage in stages if stage.strip().startswith("model"))
    row = data["data"][0]
    return Answer(row["exit"]["layer"], label_of(row), model_ms, data["model"])


def label_of(row: Mapping[str, Any]) -> Label:
    """The label in the row of a text; the set of spans, as (start, end, label), in that of a token classifier."""
    if "spans" in row:
        return frozenset((span["start"], span["end"], span["label"]) for span in row["spans"])
    return str(row["label"])


def truth(url: str, texts: Sequence[str], key: str = "") -> list[Label]:
    """The label of each text at full depth. key: API key; empty: none."""
    connection, labels = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120), list[Label]()
    for i in range(0, len(texts), BATCH):
        body = json.dumps({"input": list(texts[i : i + BATCH]), "tau": 0})
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        connection.request("POST", "/classify", body, headers)
        data = json.loads(connection.getresponse().read())
        labels += [label_of(row) for row in data["data"]]
    return labels


def tell(
    stock: Path,
    first: Sequence[str],
    then: Sequence[str],
    rate: float,
    per_second: float,
    port: int,
    seed: int,
) -> Story:
    """Send one stream to a new server; returns its story.

    first: texts of the first kind; UNSEEN random ones, or a fifth if that is fewer, are not sent. then: texts of the
    second kind. rate: the guarantee. seed: of the order of the texts.
    """
    texts = list(first)
    random.Random(seed).shuffle(texts)
    count = len(texts) - min(UNSEEN, len(texts) // 5)
    texts, unseen = texts[:count], texts[count:]
    others = random.Random(seed).sample(list(then), len(then))
    story = Story(rate, count)
    with TemporaryDirectory(prefix="de3-lab-") as folder:
        place = Path(folder)
        options = ["--learn", "--guarantee", f"{rate:g}", "--state-dir", str(place / "state")]
        command = [sys.executable, "-m", "de3.cli", "serve", str(stock), *options, "--port", "{port}"]
        server = Server(
            "de3", command, ready="/ready", body=lambda text: {"input": text}, label=lambda row: ""
        )
        with running(server, port, place / "log") as started:
            url = started.target.url
            name = json.loads(urlopen(f"{url}/v1/models").read())["data"][0]["name"]
            peak = _Peak(started.process.pid)
            answers = send(url, texts, per_second)
            audits_ms = 1000 * _metric(url, "de3_audit_seconds_total")
            report = report_of(url, name)
            version, story.records = report["serving"], report["records"]
            answers += send(url, others, per_second)
            story.memory_mb = peak.stop()
            labels = truth(url, [*texts, *others])
            story.fits = report_of(url, name)["fits"]
            _measure(story, answers, labels, count, audits_ms)
            try:
                learned = Store(place / "state/learned/versions").open(f"{name}:{version}")
                story.learned = hindsight(Model(learned), unseen, rate)
            except StoreError:  # full depth is served
                story.learned = 1.0
        story.imported = hindsight(_imported(stock, texts[: story.records], place), unseen, rate)
    return story


def _measure(
    story: Story, answers: list[Answer], labels: Sequence[Label], count: int, audits_ms: float
) -> None:
    layers = np.array([answer.layer for answer in answers])
    deepest = int(layers.max())
    differs = np.array([answer.label != label for answer, label in zip(answers, labels, strict=True)])
    early = np.flatnonzero(layers < deepest)
    story.first_early = int(early[0]) if len(early) else None
    parts = (differs, differs[:count], differs[count:])
    story.disagreement = tuple(float(part.mean()) if len(part) else 0.0 for part in parts)  # type: ignore[assignment]
    story.speedup = deepest / float(layers[3 * count // 4 : count].mean())
    full_ms = float(np.mean([answer.model_ms for answer in answers[: story.first_early or count]]))
    spent = sum(answer.model_ms for answer in answers[:count])
    story.model_speedup = full_ms * count / spent
    story.with_audits = full_ms * count / (spent + audits_ms)
    after = differs[count:]
    if len(after) >= WINDOW:
        story.recovery = recovery(after, story.rate)
    for end in range(WINDOW, len(answers) + 1, WINDOW):
        part = slice(end - WINDOW, end)
        mean = max(float(layers[part].mean()), 0.01)
        story.windows.append((end, deepest / mean, float(differs[part].mean())))


def recovery(differs: NDArray[np.bool_], rate: float) -> int:
    """Number of texts after which the rate of the latest WINDOW texts stays within `rate`.

    0 if it never exceeds the rate, and all texts if it exceeds it at the end.
    """
    above = np.flatnonzero(np.convolve(differs, np.ones(WINDOW) / WINDOW, "valid") > rate)
    return int(above[-1]) + WINDOW if len(above) else 0


def _imported(stock: Path, texts: Sequence[str], place: Path) -> Model:
    file = place / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = [
        sys.executable,
        "-m",
        "de3.cli",
        "import",
        str(stock),
        "--texts",
        str(file),
        "--name",
        "offline",
    ]
    command += ["--store", str(place / "store"), "--work", str(place / "work"), "--max-loss", "5"]
    done = run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"de3 import failed: {done.stdout[-500:]}{done.stderr[-500:]}")
    return Model(Store(place / "store").open("offline"))


def hindsight(model: Model, texts: Sequence[str], rate: float) -> float:
    """The speed-up in layers at the largest τ up to which the rate of disagreement on the texts is within `rate`."""
    recorded = record(model, [Example(text, 0) for text in texts], "unseen texts")
    taus = np.unique(FINE_TAUS)
    scores = model.manifest.signal("risk").scores(recorded)
    differing, layers = profiles(scores, recorded.differs, recorded.exit_layers, taus)
    wrong = np.flatnonzero(differing.mean(0) > rate)
    index = (wrong[0] if len(wrong) else len(taus)) - 1
    return model.manifest.num_layers / max(float(layers[:, index].mean()), 0.01)


def report_of(url: str, name: str) -> dict[str, Any]:
    """A server's report on its learning; raises OSError if the request fails."""
    with urlopen(f"{url}/v1/models/{name}/learn") as response:
        return dict(json.loads(response.read()))


def _metric(url: str, name: str) -> float:
    with urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


class _Peak:
    """Peak memory (PSS) of a process and its descendants, in MB, sampled every 0.5 s until `stop`."""

    def __init__(self, pid: int) -> None:
        self._pid, self._most, self._over = pid, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._over.wait(0.5):
            self._most = max(self._most, sum(_pss_mb(pid) for pid in process_tree(self._pid)))

    def stop(self) -> float:
        self._over.set()
        self._thread.join()
        return self._most


def _pss_mb(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:")), 0.0)


def table(stories: Sequence[Story]) -> tuple[list[str], list[list[str]]]:
    """The columns of a table, and its rows: one for each story, and one of medians."""
    columns = [
        "",
        "first exit after",
        "speed-up at the end",
        "in model time",
        "with audits",
        "of the import's",
    ]
    columns += [
        "in hindsight: learned",
        "imported",
        "differ: all",
        "first kind",
        "then",
        "within again after",
    ]
    rows = []
    for i, one in enumerate(stories, 1):
        rows.append([str(i), *_cells(one)])
    middle = Story(stories[0].rate, stories[0].num_texts)
    for name in ("speedup", "model_speedup", "with_audits", "recovery", "learned", "imported"):
        setattr(middle, name, median(getattr(one, name) for one in stories))
    middle.first_early = int(median(one.first_early or one.num_texts for one in stories))
    parts = zip(*(one.disagreement for one in stories), strict=True)
    middle.disagreement = tuple(median(part) for part in parts)
    return columns, [*rows, ["median", *_cells(middle)]]


def _cells(one: Story) -> list[str]:
    return [
        "–" if one.first_early is None else f"{one.first_early} texts",
        *(f"{value:.2f}×" for value in (one.speedup, one.model_speedup, one.with_audits)),
        f"{one.speedup / one.imported:.2f}",
        f"{one.learned:.2f}×",
        f"{one.imported:.2f}×",
        *(f"{100 * value:.2f}%" for value in one.disagreement),
        f"{one.recovery:.0f} texts",
    ]


def write(stories: Sequence[Story], out: Path) -> None:
    """Write learn.json and learn.png into out."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    (out / "learn.json").write_text(json.dumps([asdict(one) for one in stories], indent=1))
    figure = Figure(figsize=(8, 4.5))
    upper, lower = figure.subplots(2, sharex=True)
    for one in stories:
        ends = [end for end, _, _ in one.windows]
        upper.plot(ends, [speedup for _, speedup, _ in one.windows], linewidth=1)
        lower.plot(ends, [100 * rate for _, _, rate in one.windows], linewidth=1)
    for axes in (upper, lower):
        axes.axvline(stories[0].num_texts, color="gray", linestyle=":")
        axes.set_ylim(0)
    lower.axhline(100 * stories[0].rate, color="gray", linestyle="--")
    upper.set_ylabel("speed-up in layers")
    lower.set_ylabel("differ from full depth, %")
    lower.set_xlabel(f"texts (means of {WINDOW}; the traffic changes at the dotted line)")
    figure.tight_layout()
    figure.savefig(out / "learn.png", dpi=90)
