"""Bulk classification: a large file compared with the same engine fed from memory, and a run killed and continued."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from filecmp import cmp
from pathlib import Path
from statistics import median

import pyarrow as arrow
from pyarrow import parquet

from de3.bulk.pool import LocalPool
from de3.bulk.run import PART_ROWS
from de3.bulk.source import SLICE_ROWS
from de3.client import Options
from de3.columns import Answers
from de3.library import Classifier
from de3.loadtest.servers import dependencies, environment, process_tree, pss_mb
from de3.model_store.store import Artifact

MEMORY_TEXTS = 200_000
SAMPLE_S = 0.5
KILLED_AT = 0.4  # share of the parts after which the run is killed


def distinct_texts(texts: Sequence[str], count: int, seed: int = 1) -> list[str]:
    """`count` distinct texts, shuffled: the given ones, and as many recombined ones as are needed.

    A recombined text is the start of one given text, joined to the end of another.
    """
    rng, words = random.Random(seed), [text.split() for text in texts]
    found = dict.fromkeys(text for text in texts if text.strip())
    while len(found) < count:
        one, other = rng.choice(words), rng.choice(words)
        mixed = " ".join(one[: rng.randint(0, len(one))] + other[rng.randint(0, len(other)) :])
        if mixed:
            found.setdefault(mixed)
    result = list(found)[:count]
    rng.shuffle(result)
    return result


@dataclass
class Bulk:
    """The result of a run of `de3 classify --file`.

    Attributes:
        seconds: duration, including the time to start the interpreter and load the model.
        memory_mb: memory (PSS) of all its processes, sampled every SAMPLE_S.
    """

    rows: int
    seconds: float
    memory_mb: list[float]

    @property
    def rate(self) -> float:
        """Throughput of the run, rows/s."""
        return self.rows / self.seconds

    def memory(self) -> tuple[float, float]:
        """Peak memory in the second quarter of the run, and in the last, MB."""
        quarter = max(1, len(self.memory_mb) // 4)
        return max(self.memory_mb[quarter : 2 * quarter]), max(self.memory_mb[-quarter:])


def from_memory(artifact: Artifact, texts: list[str]) -> dict[str, float]:
    """Texts/s from a list in memory to results in memory, by the library's threads and by the command's processes."""
    rates = {}
    with Classifier(artifact) as classifier:
        classifier.classify(texts[:SLICE_ROWS], as_arrow=True)
        started = time.perf_counter()
        classifier.classify(texts, as_arrow=True)
        rates["library, one process"] = len(texts) / (time.perf_counter() - started)
    rates["processes"] = _pool_rate(artifact, texts, {})
    return rates


def _pool_rate(artifact: Artifact, texts: list[str], options: Options) -> float:
    """Texts/s of the command's processes, from a list in memory."""
    pool = LocalPool([artifact], options)
    try:
        for future in [pool.submit(texts[:SLICE_ROWS]) for _ in range(2 * pool.size)]:
            future.result()
        started = time.perf_counter()
        pending = deque[Future[Answers]]()
        for start in range(0, len(texts), SLICE_ROWS):
            pending.append(pool.submit(texts[start : start + SLICE_ROWS]))
            if len(pending) > 2 * pool.size:
                pending.popleft().result()
        for future in pending:
            future.result()
        return len(texts) / (time.perf_counter() - started)
    finally:
        pool.close()


def run(command: list[str], rows: int, ends_at: Callable[[], bool] = lambda: False) -> Bulk:
    """Run the command; kill it and its processes once `ends_at()` is true. Raises ValueError if the command fails.

    rows: number of rows that the command classifies.
    """
    started, memory = time.perf_counter(), []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        time.sleep(SAMPLE_S)
        memory.append(pss_mb(process.pid))
        if ends_at():
            for pid in process_tree(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()
            return Bulk(rows, time.perf_counter() - started, memory)
    assert process.stderr is not None
    if process.returncode:
        raise ValueError(process.stderr.read()[-2000:])
    return Bulk(rows, time.perf_counter() - started, memory)


def study(artifact: Artifact, store: Path, texts: Sequence[str], rows: int, folder: Path) -> Iterator[str]:
    """Run the study, and yield the lines of its report as they are measured.

    rows: number of texts in the file. folder: for the files, which are kept; the results of an earlier run are deleted.
    """
    source = folder / "texts.parquet"
    for old in folder.glob("whole.*"), folder.glob("halves.*"):
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    if not source.exists() or parquet.read_metadata(source).num_rows != rows:
        made = distinct_texts(texts, rows)
        parquet.write_table(arrow.table({"id": arrow.array(range(rows)), "text": made}), source)
    made = parquet.read_table(source, columns=["text"]).column("text")[:MEMORY_TEXTS].to_pylist()
    rates = from_memory(artifact, made)
    for name, rate in rates.items():
        yield f"from a list in memory, {name}: {rate:,.0f} texts/s"
    model = ["--store", str(store), "--model", artifact.full_name]
    command = [sys.executable, "-m", "de3.cli", "classify", *model, "--file", str(source), "--out"]
    whole = folder / "whole.parquet"
    bulk = run([*command, str(whole)], rows)
    early, late = bulk.memory()
    yield f"parquet to parquet: {bulk.rows:,} rows in {bulk.seconds:.1f} s: {bulk.rate:,.0f} rows/s"
    yield ", ".join(f"{bulk.rate / rate:.2f} of {name}" for name, rate in rates.items())
    yield f"memory (PSS, largest): second quarter {early:.0f} MB, last quarter {late:.0f} MB"
    halves = folder / "halves.parquet"
    parts = folder / "halves.parquet.parts"
    total = -(-rows // PART_ROWS)
    run([*command, str(halves)], rows, lambda: len(list(parts.glob("part-*"))) >= KILLED_AT * total)
    yield f"killed after {len(list(parts.glob('part-*')))} of {total} parts"
    run([*command, str(halves)], rows)
    yield f"continued: the same bytes: {cmp(whole, halves, shallow=False)}"


def peers(artifact: Artifact, stock: Path, folder: Path, count: int, rounds: int) -> Iterator[str]:
    """Yield lines with the texts/s of the command's processes and of peers.

    stock: the Hugging Face classifier from which the artifact was made. folder: where `study` wrote the texts.
    count: number of texts to classify, from the start of the file.
    """
    texts = parquet.read_table(folder / "texts.parquet", columns=["text"]).column("text")[:count].to_pylist()
    file = folder / "texts.json"
    file.write_text(json.dumps(texts))
    script = Path(__file__).with_name("bulk_peers.py")
    python = environment("bulk_peers", dependencies(script))
    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        for tau in (None, 0.0):
            name = "de3, full depth" if tau == 0 else "de3, default"
            found.setdefault(name, []).append(
                _pool_rate(artifact, texts, {} if tau is None else {"tau": tau})
            )
        command = [str(python), str(script), str(stock), str(file), str(folder / "peers")]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for name, one in json.loads(output.splitlines()[-1]).items():
            found.setdefault(f"{name}, batches of {one['batch']}", []).append(one["texts_per_s"])
    for name, rates in found.items():
        yield f"{name}: {median(rates):,.0f} texts/s ({min(rates):,.0f} … {max(rates):,.0f})"
