"""The cost of learning: latency at half load, with and without a fit, in turn; and the time to keep states."""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import Request, urlopen

from de3.exits.rule import ExitRule
from de3.exits.signals import Entropy
from de3.export.classifier import Stock, convert
from de3.loadtest.client import Target, label_of, quantile, send_traffic
from de3.loadtest.servers import Server, running
from de3.loadtest.texts import Sample
from de3.model_store.forward import Decision, ForwardPass
from de3.model_store.model import Model
from de3.model_store.segments import Tokens
from de3.model_store.store import Store

KEY = "k" * 32
WARM_S = 5.0
Times = list[tuple[float, float]]  # p50 and p99 of each round, ms
NUM_TEXTS = 500  # in each round of `cost_of_states`


def measure(
    stock: Path, samples: list[Sample], rounds: int, seconds: float, port: int
) -> tuple[float, Times, Times]:
    """Measure latencies; returns the requests per second, and the latencies of each round without and with a fit.

    The requests per second are half of the throughput with 16 connections. Raises ValueError if a fit ends before the
    measurement taken during it is complete.
    """
    os.environ["DE3_ADMIN_KEYS"] = f"lab {KEY}"
    without, with_fit = list[tuple[float, float]](), list[tuple[float, float]]()
    with TemporaryDirectory(prefix="de3-lab-") as folder:
        options = ["--learn", "--guarantee", "0.02", "--state-dir", f"{folder}/state"]
        command = [sys.executable, "-m", "de3.cli", "serve", str(stock), *options, "--port", "{port}"]
        server = Server(
            "de3",
            command,
            ready="/ready",
            body=lambda text: {"input": text},
            label=label_of,
        )
        with running(server, port, Path(folder) / "log", in_session=True) as started:
            target = started.target
            with urlopen(f"{target.url}/v1/models") as response:
                name = json.loads(response.read())["data"][0]["name"]
            send_traffic(target, samples, WARM_S)
            _wait(target, name, "recording")
            run = send_traffic(target, samples, seconds)
            rate = len(run.latencies_ms()) / seconds / 2
            for seed in range(rounds):
                _wait(target, name, "recording")
                without.append(_latency(target, samples, seconds, rate, seed))
                _ask(target, name)
                _wait(target, name, "fitting")
                with_fit.append(_latency(target, samples, seconds, rate, seed))
                if _report(target, name)["phase"] != "fitting":
                    raise ValueError("the fit ended before the round: choose a smaller --seconds")
    return rate, without, with_fit


def cost_of_states(stock: Path, samples: list[Sample], rounds: int) -> dict[str, list[float]]:
    """Time of a text at full depth with its states kept, relative to without: a ratio for each round, by runtime.

    A round runs the texts one at a time, each with and without keeping its states.
    """
    ratios = dict[str, list[float]]()
    with TemporaryDirectory(prefix="de3-lab-") as folder:
        convert(Stock.open("stock", stock), Store(Path(folder)), "base", "int8")
        artifact = Store(Path(folder)).open("base")
        for runtime in ("auto", "onnxruntime"):
            model = Model(artifact, runtime)
            tokens = [model.tokenize(str(sample.text)) for sample in samples[:NUM_TEXTS]]
            if model.runtime in ratios:  # there are no kernels here
                continue
            ratios[model.runtime] = [_ratio(model, tokens) for _ in range(rounds + 1)][1:]
    return ratios


def _ratio(model: Model, tokens: list[Tokens]) -> float:
    spent = {False: 0.0, True: 0.0}
    for number, one in enumerate(tokens):
        for keeps in (False, True) if number % 2 else (True, False):
            started = time.perf_counter()
            states = model.empty_states() if keeps else None
            if model.encoder.forward is None:
                steps = model.full_depth(one)
                if states is not None:
                    for layer, step in enumerate(steps[:-1]):
                        states[layer] = model.pooling.mean(step.hidden)
            else:
                last = model.manifest.num_layers
                decision = Decision(model.exits, ExitRule(0.0, Entropy()), last, True, states=states)
                model.encoder.forward([ForwardPass(one, [decision])])
            spent[keeps] += time.perf_counter() - started
    return spent[True] / spent[False]


def _latency(
    target: Target, samples: list[Sample], seconds: float, rate: float, seed: int
) -> tuple[float, float]:
    times = send_traffic(target, samples, seconds, rate, seed=seed).latencies_ms()
    return quantile(times, 0.5), quantile(times, 0.99)


def _report(target: Target, name: str) -> dict[str, Any]:
    with urlopen(f"{target.url}/v1/models/{name}/learn") as response:
        return dict(json.loads(response.read()))


def _ask(target: Target, name: str) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    with urlopen(Request(f"{target.url}/v1/models/{name}/learn", b"", headers)):
        pass


def _wait(target: Target, name: str, phase: str) -> None:
    """Wait until the learner is in a phase, and 2 s longer if that phase is recording."""
    while _report(target, name)["phase"] != phase:
        time.sleep(0.1)
    if phase == "recording":
        time.sleep(2.0)


def table(without: Times, with_fit: Times) -> Iterator[str]:
    """Yield lines with the medians, and the median and range of the ratios by round."""
    for i, name in enumerate(("p50", "p99")):
        before, after = ([both[i] for both in times] for times in (without, with_fit))
        ratios = [b / a for a, b in zip(before, after, strict=True)]
        yield (
            f"{name}: {median(before):.2f} ms, while a fit runs {median(after):.2f} ms: {median(ratios):.2f}× "
            f"({min(ratios):.2f} … {max(ratios):.2f})"
        )
