"""What exits gain by the clock: CPU time of a request over HTTP at full depth, at several τ, and at the first exit."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory

from de3.loadtest.servers import ours, running
from lab.processes import MAX_TEXTS, SCRIPT, cpu_us, ratio, run_wrk
from lab.spans.parity import ask

CONNECTIONS = 16


@dataclass
class Setting:
    """Requests with one τ; at τ = 1, every text leaves at the first exit that is used.

    Attributes:
        rates: requests/s of each round.
        cpu_us: CPU time per request in each round, µs.
        loop_us: the event loops' part of it: HTTP, JSON, queueing.
        layers, weighted: mean exit layer of the texts, each counted once, and each by its tokens.
    """

    tau: float
    rates: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    loop_us: list[float] = field(default_factory=list)
    layers: float = 0.0
    weighted: float = 0.0


def measure(
    store: Path,
    model: str,
    texts: Sequence[str],
    taus: Sequence[float],
    rounds: int,
    seconds: float,
    port: int,
) -> list[Setting]:
    """The settings, the first of which is full depth and the last τ = 1; they take turns on one server.

    In each turn the texts are sent from the first on, so they are in a random order: a slow setting does not reach all.
    """
    settings = [Setting(tau) for tau in (0.0, *taus, 1.0)]
    chosen = random.Random(0).sample(texts, min(len(texts), MAX_TEXTS))
    with TemporaryDirectory() as name, running(ours(store, model), port, Path(name) / "log") as server:
        scripts = []
        for i, setting in enumerate(settings):
            bodies = [{"input": text, "tau": setting.tau} for text in chosen]
            answers = list(ask(server.target.url, bodies))
            layers = [answer["data"][0]["exit"]["layer"] for answer in answers]
            tokens = [answer["usage"]["prompt_tokens"] for answer in answers]
            setting.layers = mean(layers)
            setting.weighted = sum(n * t for n, t in zip(layers, tokens, strict=True)) / sum(tokens)
            scripts.append(Path(name) / f"{i}.lua")
            scripts[-1].write_text(SCRIPT % ",\n".join(f"[==[{json.dumps(body)}]==]" for body in bodies))
        for number in range(-1, rounds):  # round −1 warms up
            for setting, script in zip(settings, scripts, strict=True):
                before = cpu_us(server, loops_only=True)
                load = run_wrk(server, script, CONNECTIONS, seconds)
                if number >= 0:
                    setting.rates.append(load.rate)
                    setting.cpu_us.append(load.cpu_us)
                    setting.loop_us.append((cpu_us(server, loops_only=True) - before) / load.requests)
    return settings


def ceiling(settings: Sequence[Setting], one: Setting) -> list[float]:
    """The gain in CPU time if exits took nothing, in each round: full depth / (what is not layers + layers by tokens).

    What is not layers: the event loop, as measured at this τ, and the engine's part at τ = 1, which is scaled by how
    much longer the event loop takes than at τ = 1.
    """
    full, first = settings[0], settings[-1]
    found = []
    for i, full_us in enumerate(full.cpu_us):
        scale = first.cpu_us[i] / first.loop_us[i]
        layers_us = (full_us - scale * full.loop_us[i]) * one.weighted / full.weighted
        found.append(full_us / (scale * one.loop_us[i] + layers_us))
    return found


def table(settings: Sequence[Setting]) -> Iterator[str]:
    """Yield lines of a Markdown table: medians over the rounds, and for ratios within a round also the range."""
    full = settings[0]
    yield "| τ | layer | in layers | by tokens | CPU µs: event loop, rest | gain: CPU time | requests/s | ceiling |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for one in settings:
        rest = [a - b for a, b in zip(one.cpu_us, one.loop_us, strict=True)]
        cells = [f"{one.tau:g}", f"{one.layers:.2f}"]
        cells += [
            f"{f / o:.2f}×" if o else "–"
            for f, o in ((full.layers, one.layers), (full.weighted, one.weighted))
        ]
        cells += [f"{median(one.loop_us):.0f}, {median(rest):.0f}", ratio(full.cpu_us, one.cpu_us)]
        cells += [f"{median(one.rates):,.0f}: {ratio(one.rates, full.rates)}"]
        cells += [f"{median(ceiling(settings, one)):.2f}×"]
        yield f"| {' | '.join(cells)} |"
