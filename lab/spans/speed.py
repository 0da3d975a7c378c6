"""Spans over HTTP: a server at full depth and with exits, and peers with the same weights."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from de3.export.full_depth import export_full_depth
from de3.loadtest.servers import Server, fingerprint, ours, peer, running
from de3.model_store.store import Store
from lab.learn import label_of
from lab.processes import MAX_TEXTS, SCRIPT, ratio, run_wrk
from lab.spans import Spans, percent, rates
from lab.spans.parity import ask

CONNECTIONS = 16
COMPARED = 500  # texts whose spans are compared with full depth's
WARM_UP_S = 2.0


@dataclass
class Side:
    """A measured server.

    Attributes:
        rates: requests/s of each round. p50_ms: median latency of each round.
        unlike, missed: against our full depth; see lab.spans.rates.
        tau: of its exits; None for a peer.
    """

    server: Server
    rates: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    unlike: float = 0.0
    missed: float = 0.0
    tau: float | None = None


def sides(store: Path, model: str, stock: Path | None, limits: Sequence[float], out: Path) -> list[Side]:
    """The servers to compare: ours at full depth, with exits at each limit on the disagreement, and the peers.

    stock: the checkpoint of the same weights, for Presidio; None: without it. out: folder for the peer's graph, kept.
    """
    artifact = Store(store).open(model)
    graph = (
        out / f"spans-{artifact.full_name.replace(':', '-')}-{fingerprint(artifact.path / 'manifest.json')}"
    )
    if not graph.exists():
        export_full_depth(artifact.path, graph, int8=True)
    found = [ours(store, model, tau=0.0), *(ours(store, model, max_disagreement=limit) for limit in limits)]
    found.append(peer("ONNX Runtime, int8, FastAPI", "spans_app", str(graph)))
    if stock is not None:
        engines = {
            "transformers": "Presidio, transformers engine",
            "huggingface": "Presidio, Hugging Face recognizer",
        }
        found += [
            peer(name, "presidio_app", str(stock), "--engine", engine) for engine, name in engines.items()
        ]
    return [Side(server) for server in found]


def measure(
    found: list[Side],
    texts: Sequence[str],
    rounds: int,
    seconds: int,
    port: int,
    show: Callable[[str], None],
) -> None:
    """Measure all sides in turn, each with the machine to itself, and store the results in them.

    A peer that cannot be prepared is removed. Raises ValueError if wrk is missing or requests fail.
    """
    for side in list(found):
        try:
            side.server.prepare()
        except ValueError as error:
            show(f"left out: {error}")
            found.remove(side)
    expected: list[Spans] = []
    with TemporaryDirectory() as folder:
        for number in range(rounds):
            for side in found:
                show(f"round {number + 1} of {rounds}: {side.server.name}")
                script = Path(folder) / "post.lua"
                bodies = [side.server.body(text) for text in texts[:MAX_TEXTS]]
                script.write_text(SCRIPT % ",\n".join(f"[==[{json.dumps(body)}]==]" for body in bodies))
                with running(side.server, port, Path(folder) / "log") as server:
                    run_wrk(server, script, CONNECTIONS, WARM_UP_S)
                    if not number:
                        given = [_row(one) for one in ask(server.target.url, bodies[:COMPARED])]
                        spans: list[Any] = [label_of(row) for row in given]
                        expected = expected or spans
                        side.unlike, side.missed = rates(expected, spans)
                        side.tau = given[0]["exit"]["tau"] if "exit" in given[0] else None
                    load = run_wrk(server, script, CONNECTIONS, seconds)
                side.rates.append(load.rate)
                side.p50_ms.append(load.p50_ms)


def _row(answer: dict[str, Any]) -> dict[str, Any]:
    """The row of the text in our answer or in a peer's."""
    return dict(answer["data"][0]) if "data" in answer else answer


def table(found: Sequence[Side]) -> tuple[list[str], list[list[str]]]:
    """The columns and rows of a table of medians. A ratio is the side's rate / ONNX Runtime's in the same round."""
    base = next((side for side in found if side.server.script == "spans_app"), found[0])
    columns = [
        "",
        "requests/s",
        f"/ {base.server.name}",
        "p50, ms",
        "unlike full depth",
        "with a span missed",
        "τ",
    ]
    return columns, [
        [
            *(side.server.name, f"{median(side.rates):.0f}", ratio(side.rates, base.rates)),
            *(f"{median(side.p50_ms):.2f}", percent(side.unlike), percent(side.missed)),
            "" if side.tau is None else f"{side.tau:g}",
        ]
        for side in found
    ]


def numbers(found: Sequence[Side]) -> list[dict[str, Any]]:
    """The results, for a JSON file."""
    return [asdict(side) | {"server": side.server.name} for side in found]
