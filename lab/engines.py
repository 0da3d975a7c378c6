"""Throughput at full depth on one core, in process: our kernels and the engines of lean peers, on the same texts."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from time import perf_counter
from typing import Any

import numpy as np
from rich.table import Table

from de3.exits.kinds import Spans
from de3.exits.rule import ExitRule
from de3.exits.signals import Entropy
from de3.loadtest import report
from de3.loadtest.compare import cpu_name
from de3.loadtest.servers import Server
from de3.model_store.forward import Decision, ForwardPass
from de3.model_store.model import Model
from de3.model_store.segments import Tokens
from de3.model_store.store import Artifact
from lab.layers import weights_of

GROUPS = (1, 4, 16)
MEASURE_S = 600.0  # timeout of a peer's round
BUFFER_BYTES = 2**28  # size of each of two buffers, larger than any cache


@contextmanager
def pinned(core: int) -> Iterator[None]:
    """Keep this thread, and the threads and processes that it starts, on one core.

    Raises ValueError if this process may not run on that core.
    """
    before = os.sched_getaffinity(0)
    if core not in before:
        raise ValueError(f"--core {core}: this process may run on {', '.join(map(str, sorted(before)))}")
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@dataclass
class Engines:
    """Runs our kernels and the peers' engines in turn, on one core.

    Attributes:
        artifact: an int8 model that the kernels can run.
        peers: lean peers; those that cannot be prepared or do not run are left out, with a note.
        out: folder for results.json.
        seconds: minimum duration of one measurement.
        core: number of the core on which everything runs.
        show: called with each line of progress.
    """

    artifact: Artifact
    peers: list[Server]
    texts: list[str]
    out: Path
    seconds: float
    rounds: int
    core: int
    show: Callable[[str], None]
    results: dict[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Measure everything and write results.json.

        Raises StoreError if the kernels cannot run the model, and ValueError if this process may not run on the core.
        """
        self.peers = [
            replace(p, name=p.name.replace("fused graph, FastAPI", "ONNX Runtime")) for p in self.peers
        ]
        self.results["machine"] = {"cpu": cpu_name(), "core": self.core, "python": platform.python_version()}
        self.results["notes"] = {peer.name: peer.note for peer in self.peers if peer.note}
        self.results["rounds"] = {}
        self.results["logits_difference"] = {}
        file = self.out / "texts.json"
        file.write_text(json.dumps(self.texts))
        for peer in list(self.peers):
            self.show(f"preparing {peer.name}")
            try:
                peer.prepare()
            except ValueError as error:
                self._leave_out(peer, error)
        with pinned(self.core):
            self._measure(file)
        self.results["compared"] = compared(self.results)
        text = json.dumps(self.results, indent=1, ensure_ascii=False)
        (self.out / "results.json").write_text(text + "\n")
        return self.results

    def _leave_out(self, peer: Server, error: ValueError) -> None:
        self.show(f"left out: {error}")
        self.results["notes"][peer.name] = f"left out: {str(error).splitlines()[-1]}"
        self.results["rounds"].pop(peer.name, None)
        self.peers.remove(peer)

    def _measure(self, file: Path) -> None:
        model = Model(self.artifact, "native")
        from de3.native import kernels  # importable, or the line above would have raised

        tokens = [model.tokenize(text) for text in self.texts]
        logits = _logits(model, tokens)
        weights = layer_weights(self.artifact)
        self.results |= {
            "instructions": kernels.supported(),
            "texts": len(tokens),
            "tokens": mean(len(t) for t in tokens),
            "weights": weights,
            "multiply_adds": mean(multiply_adds(self.artifact, weights, len(t)) for t in tokens),
            "peak_multiply_adds_per_s": [],
            "read_bytes_per_s": [],
            "ours": [name_of(size) for size in GROUPS],
            "calls": {name_of(size): -(-len(tokens) // size) for size in GROUPS},
        }
        rates = self.results["rounds"]
        for number in range(self.rounds):
            self.show(f"round {number + 1} of {self.rounds}: our kernels")
            self.results["peak_multiply_adds_per_s"].append(kernels.peak())
            self.results["read_bytes_per_s"].append(read_bandwidth())
            for size in GROUPS:
                rates.setdefault(name_of(size), []).append(our_rate(model, tokens, size, self.seconds))
            for peer in list(self.peers):
                self.show(f"round {number + 1} of {self.rounds}: {peer.name}")
                try:
                    measured = peer_measured(peer, file, self.seconds)
                except ValueError as error:
                    self._leave_out(peer, error)
                    continue
                rates.setdefault(peer.name, []).append(measured["texts_per_s"])
                both = zip(measured["logits"], logits, strict=True)
                difference = max(float(np.abs(np.array(theirs) - mine).max()) for theirs, mine in both)
                self.results["logits_difference"][peer.name] = difference


def name_of(size: int) -> str:
    """The name of our engine with `size` texts per call."""
    return "de3, one text a call" if size == 1 else f"de3, {size} texts a call"


def _passes(model: Model, tokens: Sequence[Tokens]) -> list[ForwardPass]:
    manifest = model.manifest
    signal = manifest.default_signal if isinstance(manifest.kind, Spans) else Entropy()
    rule = ExitRule(0.0, signal, kind=manifest.kind)
    return [
        ForwardPass(t, [Decision(model.exits, rule, manifest.num_layers, layout=t.layout)]) for t in tokens
    ]


def _logits(model: Model, tokens: Sequence[Tokens]) -> list[Any]:
    """Logits of each text at full depth, (num_labels,); of a token classifier, (T, num_labels)."""
    forward, passes = model.encoder.forward, _passes(model, tokens)
    assert forward is not None
    for each in passes:
        forward([each])
    return [each.decisions[0].logits[-1] for each in passes]


def our_rate(model: Model, tokens: Sequence[Tokens], size: int, seconds: float) -> float:
    """Texts per second at full depth with `size` texts per call, over whole passes through the texts, as for peers."""
    forward = model.encoder.forward
    assert forward is not None
    calls = [tokens[i : i + size] for i in range(0, len(tokens), size)]
    for call in calls:
        forward(_passes(model, call))
    start, passes, elapsed = perf_counter(), 0, 0.0
    while elapsed < seconds:
        for call in calls:
            forward(_passes(model, call))
        passes += 1
        elapsed = perf_counter() - start
    return passes * len(tokens) / elapsed


def peer_measured(peer: Server, file: Path, seconds: float) -> dict[str, Any]:
    """A lean peer's own measurement: texts_per_s, passes and logits.

    Raises ValueError if the peer fails, takes longer than MEASURE_S or prints no results.
    """
    command = peer.measuring(file, seconds)
    try:
        done = subprocess.run(command, check=True, capture_output=True, timeout=MEASURE_S)
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except subprocess.CalledProcessError as error:
        raise ValueError(f"{peer.name}: {error.stderr.decode(errors='replace')[-2000:].strip()}") from None
    except (subprocess.TimeoutExpired, json.JSONDecodeError, IndexError) as error:
        raise ValueError(f"{peer.name} does not measure itself: {error}") from None


def layer_weights(artifact: Artifact) -> int:
    """Number of weights of all encoder layers, without exits; in int8 also the number of bytes that a call reads."""
    return sum(weights_of(artifact.read(file)) for file in artifact.manifest.segment_files()[1:])


def multiply_adds(artifact: Artifact, weights: int, tokens: int) -> int:
    """Multiply-adds of all encoder layers for a text of this length: with weights, and within attention (float32).

    weights: number of weights of all encoder layers.
    """
    manifest = artifact.manifest
    return tokens * weights + 2 * tokens * tokens * manifest.hidden_size * manifest.num_layers


def read_bandwidth(size: int = BUFFER_BYTES) -> float:
    """Bytes per second that one core reads from memory: the best of five dot products of two float32 arrays.

    Reading two arrays is up to 1.4 times as fast as summing one. `dot` may use several threads; `einsum` does not.

    size: bytes of each array.
    """
    left, right = np.ones(size // 4, np.float32), np.ones(size // 4, np.float32)
    times = []
    for _ in range(5):
        start = perf_counter()
        np.einsum("i,i->", left, right)
        times.append(perf_counter() - start)
    return 2 * size / min(times)


def compared(results: dict[str, Any]) -> dict[str, Any]:
    """Medians and ranges of all rates; for our engines also the shares of peak and bandwidth, and the ratios to peers.

    `best_int8` is the faster of ONNX Runtime and OpenVINO in int8; None if neither was measured.
    """
    rounds, ours = results["rounds"], results["ours"]
    peers = [name for name in rounds if name not in ours]
    rivals = [name for name in peers if name.endswith("int8") and not name.startswith("CTranslate2")]
    best = max(rivals, key=lambda name: median(rounds[name]), default=None)
    rows: dict[str, Any] = {name: {"texts_per_s": _spread(rates, 1)} for name, rates in rounds.items()}
    for name in ours:
        rates, calls = rounds[name], results["calls"][name] / results["texts"]
        work = [results["multiply_adds"] * rate for rate in rates]
        read = [results["weights"] * calls * rate for rate in rates]
        rows[name] |= {
            "of_peak": report.spread(_ratios(work, results["peak_multiply_adds_per_s"])),
            "of_bandwidth": report.spread(_ratios(read, results["read_bytes_per_s"])),
            "against": {peer: report.spread(_ratios(rates, rounds[peer])) for peer in peers},
        }
    return {"best_int8": best, "engines": rows}


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def _spread(values: Sequence[float], digits: int) -> str:
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} … {max(values):.{digits}f})"


def tables(results: dict[str, Any]) -> list[Table]:
    """Two tables: the rates of all engines with the ratios of ours to them, and our shares of the core's limits."""
    engines, ours = results["compared"]["engines"], results["ours"]
    best = results["compared"]["best_int8"]
    title = f"{results['texts']} texts of {results['tokens']:.0f} tokens on average, full depth, one core"
    rates = Table("engine", "texts/s", *(f"{name} / it" for name in ours), "logits differ by", title=title)
    rates.caption = f"the faster of ONNX Runtime and OpenVINO in int8: {best}" if best else None
    for name, row in engines.items():
        ratios = [engines[mine]["against"].get(name, "") for mine in ours]
        difference = results["logits_difference"].get(name)
        rates.add_row(name, row["texts_per_s"], *ratios, "" if difference is None else f"{difference:.2g}")
    peak, read = (median(results[key]) for key in ("peak_multiply_adds_per_s", "read_bytes_per_s"))
    title = (
        f"peak of the core: {peak / 1e12:.2f}e12 int8 multiply-adds/s ({results['instructions']}); it reads "
        f"{read / 1e9:.1f} GB/s of memory, and the layers' weights are {results['weights'] / 1e6:.1f} MB"
    )
    shares = Table("engine", "of the peak", "of the reading bandwidth", title=title)
    for name in ours:
        shares.add_row(name, engines[name]["of_peak"], engines[name]["of_bandwidth"])
    return [rates, shares]
