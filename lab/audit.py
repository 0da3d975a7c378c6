"""Audits of a real server over HTTP: a guarantee while the traffic changes, and the latency that audits cost."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import sleep
from typing import Any
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray

from de3.loadtest.capacity import capacity
from de3.loadtest.client import Target, ask_alone, quantile, send_traffic
from de3.loadtest.report import panels
from de3.loadtest.servers import ours, running
from de3.loadtest.texts import Sample

WARM_S, WINDOW_S, CAPACITY_S = 2.0, 2.0, 4.0
CONNECTIONS = 16
# Share of the throughput at full depth: audits need idle time.
LOAD = 0.7


def audit_of(url: str, model: str) -> dict[str, Any]:
    """A server's report on its audits; raises OSError if the request fails."""
    with urlopen(f"{url}/v1/models/{model}/audit", timeout=10) as answer:
        return dict(json.load(answer))


@dataclass(frozen=True)
class Truth:
    """The answers to each text at full depth and at every exit, from the server at τ = 0 with `explain`.

    Attributes:
        labels: label of each text at full depth.
        scores: score of each exit, (n, exits); NaN where the server reports none.
        differs: True where an exit's answer differs from full depth's, (n, exits).
    """

    labels: list[str]
    scores: NDArray[np.float64]
    differs: NDArray[np.bool_]

    @classmethod
    def ask(cls, url: str, samples: Sequence[Sample]) -> "Truth":
        """The answers of the server at this URL to the samples, each sent once."""
        target = Target(url, body=lambda text: {"input": text, "tau": 0, "explain": True}, label=json.dumps)
        rows = [json.loads(answer or "{}")["data"][0] for answer in ask_alone(target, list(samples))]
        exits = [row["layers"] for row in rows]
        scores = [[np.nan if e["score"] is None else e["score"] for e in row] for row in exits]
        differs = [[e["label"] != row["label"] for e in row["layers"]] for row in rows]
        return cls([row["label"] for row in rows], np.array(scores), np.array(differs))

    def rate(self, tau: float) -> float:
        """The rate of disagreement with full depth at a τ."""
        below = self.scores < tau
        below[:, -1] = True
        return float(self.differs[np.arange(len(below)), below.argmax(1)].mean())


@dataclass(frozen=True)
class Window:
    """A time window of a run: its traffic, and the server's report at its end.

    Attributes:
        phase: the kind of texts sent, home or away.
        texts: number of texts sent so far.
        audits: number of audits that count as evidence.
        tau, reason: the τ in force at the end of the window, and the server's reason for it.
        measured, lower, upper: disagreement by the server's audits, with its bounds; measured is None if there are no
            audits.
        seen: disagreement of the answers in this window with full depth, counted by the client.
        true: disagreement over all texts of the phase, at the τ in force at the end of the window.
        speedup: in layers, by the server's audits; None if there are no audits.
        p99_ms: latency (p99) of the requests in this window.
        resets: number of resets in the server's report, which lists the latest 20 of each tenant.
    """

    phase: str
    texts: int
    audits: int
    tau: float
    reason: str
    measured: float | None
    lower: float
    upper: float
    seen: float
    true: float
    speedup: float | None
    p99_ms: float
    resets: int


def story(
    store: Path,
    model: str,
    texts: tuple[list[Sample], list[Sample]],
    rate: float,
    share: float,
    windows: tuple[int, int],
    port: int,
    on_window: Callable[[Window], None] = lambda _: None,
) -> list[Window]:
    """Serve with a guarantee, send texts of one kind, then of another, and compare every answer with full depth's.

    texts, windows: samples and number of windows, for home and for away. rate: the guarantee. share: share of the texts
    that are audited.
    """
    told: list[Window] = []
    options = ["--guarantee", str(rate), "--audit-share", str(share)]
    with (
        TemporaryDirectory() as folder,
        running(ours(store, model, options=options), port, Path(folder) / "log") as server,
    ):
        sent, seed = 0, 0
        for phase, samples, count in zip(("home", "away"), texts, windows, strict=True):
            truth = Truth.ask(server.target.url, samples)
            full = Target(server.target.url, body=lambda text: {"input": text, "tau": 0})
            per_s = LOAD * send_traffic(full, samples, WARM_S, connections=CONNECTIONS).rate()
            order = np.random.default_rng(1)
            for _ in range(count):
                seed += 1
                picks = order.integers(len(samples), size=max(100, int(2 * per_s * WINDOW_S)))
                run = send_traffic(
                    server.target, [samples[k] for k in picks], WINDOW_S, rate=per_s, seed=seed
                )
                sent += len(run.answers)
                answered = [
                    (label, truth.labels[picks[answer.sample]])
                    for answer, label in zip(run.answers, run.labels, strict=True)
                    if answer.status == 200
                ]
                said = audit_of(server.target.url, model)
                measured = said["measured"]
                told.append(
                    Window(
                        phase,
                        sent,
                        said["audits"],
                        said["tau"]["tau"],
                        said["tau"]["reason"],
                        measured["disagreement"],
                        measured["lower"],
                        measured["upper"],
                        float(np.mean([a != b for a, b in answered])),
                        truth.rate(said["tau"]["tau"]),
                        measured["speedup"],
                        quantile(run.latencies_ms(), 0.99),
                        sum(len(row["resets"]) for row in said["tenants"]),
                    )
                )
                on_window(told[-1])
    return told


def summary(told: list[Window], rate: float) -> dict[str, Any]:
    """Summary of a run: disagreement as the client counted it, and the highest true rates.

    `texts_to_restore` is the number of texts from the switch to the end of the last window whose true rate is above the
    guarantee; 0 if there is none.
    """
    away = [w for w in told if w.phase == "away"]
    before = max((w.texts for w in told if w.phase == "home"), default=0)
    breached = [w for w in away if w.true > rate]
    return {
        "guaranteed": rate,
        "seen_mean": float(np.mean([w.seen for w in told])),
        "true_highest": max(w.true for w in told),
        "home_highest": max((w.true for w in told if w.phase == "home"), default=None),
        "breached_windows": len(breached),
        "texts_to_restore": breached[-1].texts - before if breached else 0,
        "resets": told[-1].resets,
    }


def plot(path: Path, told: list[Window], rate: float) -> None:
    """Plot the measured rate with its bounds, the true rate, and τ, against the number of texts."""
    figure, axes = panels(2, f"A guarantee of {100 * rate:g}% over HTTP", "texts")
    x = [w.texts for w in told]
    switch = max(w.texts for w in told if w.phase == "home")
    axes[0].fill_between(
        x, [100 * w.lower for w in told], [100 * min(w.upper, 3 * rate) for w in told], alpha=0.2
    )
    axes[0].plot(
        x, [float("nan") if w.measured is None else 100 * w.measured for w in told], label="measured"
    )
    axes[0].plot(x, [100 * w.true for w in told], label="true")
    axes[0].axhline(100 * rate, linestyle=":", color="black", label="guaranteed")
    axes[0].set_ylabel("differ from full depth, %")
    axes[0].legend(fontsize=8)
    axes[1].step(x, [w.tau for w in told], where="post")
    axes[1].set_ylabel("τ")
    for axis in axes:
        axis.axvline(switch, linestyle="--", color="gray")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


@dataclass(frozen=True)
class Round:
    """One round: latencies without and with audits, ms; share of audited texts; number of audits pending at the end."""

    p50: float
    p99: float
    audited_p50: float
    audited_p99: float
    share: float
    pending: int


def cost(
    store: Path,
    model: str,
    samples: list[Sample],
    share: float,
    load: float,
    slo_ms: float,
    rounds: int,
    seconds: float,
    port: int,
    on_round: Callable[[Round], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure latency without and with audits, in turn, at the same rate: `load` × the capacity.

    The capacity is the highest rate of Poisson arrivals whose p99 is within slo_ms, without audits. `p50` and `p99` in
    the result are medians over the rounds of the ratio with audits / without.

    share: share of the texts that are audited.
    """
    options: tuple[list[str], list[str]] = [], ["--audit-share", str(share)]
    done: list[Round] = []
    with (
        TemporaryDirectory() as folder,
        running(ours(store, model, options=options[0]), port, Path(folder) / "without") as without,
        running(ours(store, model, options=options[1]), port + 1, Path(folder) / "with") as audited,
    ):
        send_traffic(audited.target, samples, WARM_S, connections=CONNECTIONS)
        most = capacity(without.target, samples, slo_ms, CAPACITY_S)
        rate = load * most
        for number in range(rounds):
            before = audit_of(audited.target.url, model)
            pair = (without, audited) if number % 2 == 0 else (audited, without)
            found = []
            for server in pair:
                while audit_of(audited.target.url, model)["pending"]:
                    sleep(0.1)  # else audits would slow down the other server, too
                run = send_traffic(server.target, samples, seconds, rate=rate, seed=number)
                found.append(run.latencies_ms())
            plain, other = found if number % 2 == 0 else found[::-1]
            after = audit_of(audited.target.url, model)
            texts = after["texts"] - before["texts"]
            done.append(
                Round(
                    quantile(plain, 0.5),
                    quantile(plain, 0.99),
                    quantile(other, 0.5),
                    quantile(other, 0.99),
                    (after["audits"] - before["audits"]) / max(1, texts),
                    after["pending"],
                )
            )
            on_round(done[-1])
    return {
        "capacity": most,
        "rate": rate,
        "p50": median(r.audited_p50 / r.p50 for r in done),
        "p99": median(r.audited_p99 / r.p99 for r in done),
        "share": median(r.share for r in done),
        "rounds": [asdict(r) for r in done],
    }
