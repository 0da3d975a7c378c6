"""The exits of a token classifier on texts that nothing was fitted on: speed-up, both rates, and recall."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

import numpy as np

from de3.data.examples import Example
from de3.exits.calibration import FINE_TAUS
from de3.exits.guarantee import profiles
from de3.exits.recorded import RecordedSpans
from de3.exits.rule import exit_index
from de3.exits.trade_offs import TradeOffs
from de3.export.record import record
from de3.loadtest.servers import Server, running
from de3.model_store.model import Model
from lab.learn import report_of, send, truth
from lab.spans import percent, rates, recall


@dataclass(frozen=True)
class Outcome:
    """Exits with one τ, on one stream, compared with full depth.

    Attributes:
        share: of the texts, those into which details were put.
        limit: on both rates. way: how τ was chosen.
        differ, missed, recall: see lab.spans.
    """

    share: float
    limit: float
    way: str
    tau: float
    speedup: float
    differ: float
    missed: float
    recall: float


def outcomes(model: Model, texts: Sequence[str], share: float, limits: Sequence[float]) -> Iterator[Outcome]:
    """Yield, for each limit, the outcome of the best τ in hindsight, and of the τ that the calibration certifies.

    In hindsight is the largest τ up to which both rates are within the limit on these texts.
    """
    recorded = record(model, [Example(text, 0) for text in texts], "unseen texts")
    assert isinstance(recorded, RecordedSpans)
    manifest = model.manifest
    scores = manifest.signal("risk").scores(recorded)
    taus = np.unique(FINE_TAUS)
    kinds = [
        profiles(scores[rows], differs, recorded.exit_layers, taus)[0]
        for differs, rows in recorded.failures()
    ]
    worst = np.maximum.reduce([differing.mean(0) for differing in kinds if len(differing)])
    certified = TradeOffs(manifest.trade_offs()["risk", None])
    for limit in limits:
        above = np.flatnonzero(worst > limit)
        hindsight = float(taus[(above[0] if len(above) else len(taus)) - 1])
        for way, tau in (
            ("in hindsight", hindsight),
            ("certified", float(certified.within_disagreement(limit).tau)),
        ):
            index = exit_index(scores, tau)
            expected, given = (
                recorded.spans[:, -1].tolist(),
                recorded.spans[np.arange(len(index)), index].tolist(),
            )
            layers = np.array(recorded.exit_layers)[index].mean()
            speedup = manifest.num_layers / max(float(layers), 0.01)
            yield Outcome(
                *(share, limit, way, tau, speedup, *rates(expected, given)), recall(expected, given)
            )


def table(found: Sequence[Outcome]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a table."""
    columns = [
        "with details",
        "limit",
        "τ",
        "",
        "speed-up",
        "texts that differ",
        "with a span missed",
        "recall",
    ]
    return columns, [
        [
            *(
                f"{100 * one.share:g}%",
                f"{100 * one.limit:g}%",
                one.way,
                f"{one.tau:.4g}",
                f"{one.speedup:.2f}×",
            ),
            *map(percent, (one.differ, one.missed, one.recall)),
        ]
        for one in found
    ]


@dataclass
class Learned:
    """A server that learned from a stream.

    Attributes:
        first_early: number of texts before the first early exit; None if there was none.
        speedup: in layers, over the last tenth.
        last: both rates over the last tenth. whole: over the whole stream.
        recall: of characters, over the last tenth.
        report: the server's report on its learning.
    """

    share: float
    guarantee: float
    texts: int
    first_early: int | None
    speedup: float
    last: tuple[float, float]
    whole: tuple[float, float]
    recall: float
    wall_s: float
    report: dict[str, Any]


def learn(
    folder: Path,
    texts: Sequence[str],
    share: float,
    guarantee: float,
    per_second: float,
    port: int,
    options: Sequence[str] = (),
) -> Learned:
    """Serve a checkpoint with --learn and a guarantee, and send it the texts. options: of de3 serve.

    Raises ValueError if the server does not start or refuses a text.
    """
    with TemporaryDirectory(prefix="de3-lab-") as place:
        settings = ["--learn", "--guarantee", f"{guarantee:g}", "--state-dir", f"{place}/state", *options]
        command = [sys.executable, "-P", "-m", "de3.cli", "serve", str(folder.absolute()), *settings]
        server = Server("de3", [*command, "--port", "{port}"], ready="/ready")
        with running(server, port, Path(place) / "log") as started:
            url, began = started.target.url, time.monotonic()
            answers = send(url, texts, per_second)
            wall_s = time.monotonic() - began
            name = json.loads(urlopen(f"{url}/v1/models").read())["data"][0]["name"]
            report = report_of(url, name)
            expected: list[Any] = truth(url, texts)
    given: list[Any] = [answer.label for answer in answers]
    layers = np.array([answer.layer for answer in answers])
    early, last = np.flatnonzero(layers < layers.max()), slice(-max(1, len(texts) // 10), None)
    return Learned(
        *(share, guarantee, len(texts), int(early[0]) if len(early) else None),
        float(layers.max()) / max(float(layers[last].mean()), 0.01),
        rates(expected[last], given[last]),
        rates(expected, given),
        recall(expected[last], given[last]),
        wall_s,
        report,
    )


def learn_table(found: Sequence[Learned]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a table; where two rates are given, of texts that differ and of a span missed."""
    columns = ["with details", "guarantee", "texts", "first exit after", "speed-up in the last tenth"]
    return [*columns, "rates in the last tenth", "in all", "recall in the last tenth"], [
        [
            *(f"{100 * one.share:g}%", f"{100 * one.guarantee:g}%", f"{one.texts}"),
            "–" if one.first_early is None else f"{one.first_early}",
            f"{one.speedup:.2f}×",
            *(", ".join(map(percent, both)) for both in (one.last, one.whole)),
            percent(one.recall),
        ]
        for one in found
    ]
