"""A guard under --guarantee-missed: throughput beside full depth and ONNX Runtime, and what it misses."""

import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import numpy as np

from de3.loadtest.servers import Server, ours, peer, peer_models, running
from de3.model_store.store import Store
from lab.processes import SCRIPT, Load, run_wrk

SEED, BATCH, STREAM_BATCH, CONNECTIONS = 5, 20, 50, 16
EVIDENCE = 400  # flagged texts that are sent before measuring
SHARE = 0.02  # of flagged texts while measuring
WINDOW = 300  # words that fit into a window
NAMES = ("exits", "full depth", "ONNX Runtime int8, windows in a loop")


def texts_of(safe: Sequence[str], flagged: Sequence[str], words: int, count: int, share: float) -> list[str]:
    """Texts of at least this many words, joined from safe sentences; a share of them has a window of flagged ones.

    words: 0: single sentences.
    """
    rng = random.Random(SEED)

    def joined(sentences: Sequence[str], least: int) -> list[str]:
        found = [rng.choice(sentences)]
        while sum(len(one.split()) for one in found) < least:
            found.append(rng.choice(sentences))
        return found

    texts = []
    for number in range(count):
        found = joined(safe, words)
        if number < share * count:
            attack = joined(flagged, min(words, WINDOW))
            at = rng.randrange(len(found))
            found = [*found[:at], *attack, *found[at:]] if words > WINDOW else attack
        texts.append(" ".join(found))
    rng.shuffle(texts)
    return texts


def measure(
    store: Path,
    model: str,
    label: str,
    limit: float,
    sentences: Sequence[str],
    words: int,
    rounds: int,
    seconds: float,
    port: int,
) -> Iterator[str]:
    """Yield lines about the three servers, measured in turn; raises ValueError if wrk is missing or requests fail."""
    with TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        int8, _, _ = peer_models(Store(store).open(model), list(sentences), folder)
        flag = ["--flag", label]
        guard = ours(store, model, options=[*flag, "--guarantee-missed", str(limit)])
        sides: list[Server] = [guard, ours(store, model, options=[*flag, "--tau", "0"])]
        sides.append(peer(NAMES[2], "fused_app", str(int8), "--windows"))
        sides[2].prepare()
        started = [
            stack.enter_context(running(side, port + i, folder / f"{i}.log")) for i, side in enumerate(sides)
        ]
        client, full = (
            stack.enter_context(httpx.Client(base_url=s.target.url, timeout=600)) for s in started[:2]
        )
        is_flagged = _flagged(full, sentences)
        safe, flagged = (
            [text for text, is_one in zip(sentences, is_flagged, strict=True) if is_one is of]
            for of in (False, True)
        )
        evidence = texts_of(safe, flagged, words, 2 * EVIDENCE, 0.5)
        for start in range(0, len(evidence), BATCH):
            body = {"input": evidence[start : start + BATCH], "long": "windows"}
            client.post("/classify", json=body).raise_for_status()
        time.sleep(2)
        yield f"τ = {_report(client, model)['tau']['tau']:g} after {EVIDENCE} flagged texts"
        texts = texts_of(safe, flagged, words, 1000 if words <= WINDOW else 200, SHARE)
        found: list[list[Load]] = [[] for _ in sides]
        for number in range(2):  # the peer ignores no field
            fields: dict[str, Any] = {} if number else {"long": "windows"}
            bodies = (f"[==[{json.dumps({'input': text} | fields)}]==]" for text in texts)
            (folder / f"{number}.lua").write_text(SCRIPT % ",\n".join(bodies))
        for _ in range(rounds):
            for i, (loads, server) in enumerate(zip(found, started, strict=True)):
                loads.append(run_wrk(server, folder / f"{i // 2}.lua", CONNECTIONS, seconds))
        for side, loads in zip(NAMES, found, strict=True):
            ratios = [ours.rate / one.rate for ours, one in zip(found[0], loads, strict=True)]
            rate, p99 = median(one.rate for one in loads), median(one.p99_ms for one in loads)
            yield (
                f"{side}: {rate:,.1f} requests/s, p99 {p99:,.1f} ms; exits / this: {median(ratios):.2f} "
                f"({min(ratios):.2f} … {max(ratios):.2f})"
            )
        measured = _report(client, model)["measured"]
        yield f"in layers {measured['speedup']:.2f}×, missed {100 * measured['missed_flagged']:.2f}% of the flagged"


def _flagged(client: httpx.Client, sentences: Sequence[str]) -> list[bool]:
    found = list[bool]()
    for start in range(0, len(sentences), 200):
        answer = client.post("/classify", json={"input": sentences[start : start + 200]}).json()
        found += [row["flag"]["flagged"] for row in answer["data"]]
    return found


def _report(client: httpx.Client, model: str) -> dict[str, Any]:
    return dict(client.get(f"/v1/models/{model}/audit").json())


def stream(
    store: Path, model: str, label: str, limit: float, texts: Sequence[str], port: int
) -> Iterator[str]:
    """Send texts once, with audits running, and compare the flags with full depth's; yield lines about them.

    Texts must fit into one window.
    """
    flag = ["--flag", label]
    options = ([*flag, "--guarantee-missed", str(limit)], [*flag, "--tau", "0"])
    answers = list[list[tuple[bool, float]]]()  # flagged, share of the layers run
    with TemporaryDirectory() as name:
        for side in options:
            with (
                running(ours(store, model, options=side), port, Path(name) / "log") as started,
                httpx.Client(base_url=started.target.url, timeout=600) as client,
            ):
                answers.append(
                    [
                        (row["flag"]["flagged"], row["exit"]["layer"] / row["exit"]["num_layers"])
                        for start in range(0, len(texts), STREAM_BATCH)
                        for row in client.post(
                            "/classify", json={"input": texts[start : start + STREAM_BATCH]}
                        )
                        .raise_for_status()
                        .json()["data"]
                    ]
                )
    (flagged, shares), (full, _) = (np.array(one).T for one in answers)
    early, last = np.flatnonzero(shares < 1), slice(-max(1, len(texts) // 10), None)
    yield (
        f"{len(texts):,} texts, {full.mean():.1%} flagged; first early exit after "
        f"{int(early[0]) + 1 if len(early) else len(texts):,}; in the last tenth "
        f"{1 / max(shares[last].mean(), 1e-3):.2f}× in layers"
    )
    missed, added = (int((one > other).sum()) for one, other in ((full, flagged), (flagged, full)))
    yield f"missed {missed} of {int(full.sum())}; false alarms added: {added}"
