"""Several classifiers of one encoder on one pass, compared with the deepest alone, with a request for each, and with a
copy of the encoder for each."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from de3.library import Classifier, Classifiers
from de3.loadtest.servers import Server, ours, running
from de3.model_store.store import MANIFEST, Store
from lab.processes import SCRIPT, run_wrk

CONNECTIONS = (1, 16)
TOGETHER, DEEPEST, EACH, COPIES = "one pass", "the deepest alone", "a request for each", "an encoder for each"


@dataclass
class Side:
    """A way to ask the models.

    Attributes:
        bodies: of the requests, `per_text` for each text.
        rates: texts/s of each round, by number of connections.
        memory_mb: memory (PSS) of the server at the end.
    """

    name: str
    server: Server
    bodies: Sequence[Mapping[str, object]]
    per_text: int = 1
    rates: dict[int, list[float]] = field(default_factory=dict)
    memory_mb: float = 0.0


def sides(
    store: Path, models: Sequence[str], texts: Sequence[str], options: Sequence[str], work: Path
) -> list[Side]:
    """The ways to compare. The deepest model of a text is the one whose answer takes the most layers.

    options: of de3 serve. work: folder for a store in which the models do not share their encoder. Raises ValueError if
    a model answers differently on one pass.
    """
    artifacts, alone_rows = [Store(store).open(name) for name in models], []
    for artifact in artifacts:
        with Classifier(artifact) as model:
            alone_rows.append(model.classify(texts))
    with Classifiers(artifacts) as together:
        if together.classify(texts) != alone_rows:
            raise ValueError("a model's answers on one pass differ from those that it gives alone")
    layers = [[row.exit.layer for row in rows] for rows in alone_rows]
    deepest = [models[max(range(len(models)), key=lambda i: layers[i][t])] for t in range(len(texts))]
    several = [one for name in models[1:] for one in ("--model", name)]
    shared = ours(store, models[0], options=[*several, *options])
    alone = ours(store, models[0], options=options)
    separate = ours(_separated(store, models, work), models[0], options=[*several, *options])
    each = [{"input": text, "model": name} for text in texts for name in models]
    return [
        Side(TOGETHER, shared, [{"input": text, "models": list(models)} for text in texts]),
        Side(
            DEEPEST,
            shared,
            [{"input": text, "model": name} for text, name in zip(texts, deepest, strict=True)],
        ),
        Side(EACH, shared, each, len(models)),
        Side(COPIES, separate, each, len(models)),
        Side("one model", alone, [{"input": text} for text in texts]),
    ]


def _separated(store: Path, models: Sequence[str], work: Path) -> Path:
    """A copy of the models, each with another maximum length, so that none shares its encoder."""
    for number, name in enumerate(models):
        artifact = Store(store).open(name)
        folder = work / artifact.path.parent.name / artifact.path.name
        shutil.copytree(artifact.path, folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["max_tokens"] -= number
        (folder / MANIFEST).write_text(json.dumps(manifest))
    return work


def measure(found: list[Side], rounds: int, seconds: float, port: int) -> None:
    """Measure all sides in turn, each with the machine to itself, and store the results in them.

    Raises ValueError if wrk is missing or requests fail.
    """
    with TemporaryDirectory() as folder:
        for _ in range(rounds):
            for side in found:
                script = Path(folder) / "post.lua"
                script.write_text(SCRIPT % ",\n".join(f"[==[{json.dumps(body)}]==]" for body in side.bodies))
                with ExitStack() as stack:
                    server = stack.enter_context(running(side.server, port, Path(folder) / "log"))
                    run_wrk(server, script, CONNECTIONS[-1], 2.0)
                    for connections in CONNECTIONS:
                        rate = run_wrk(server, script, connections, seconds).rate
                        side.rates.setdefault(connections, []).append(rate / side.per_text)
                    side.memory_mb = server.memory_mb()


def table(found: list[Side]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield "| | " + " | ".join(f"{c} connections, texts/s" for c in CONNECTIONS) + " | memory, MB |"
    yield "| --- |" + " --- |" * (len(CONNECTIONS) + 1)
    for side in found:
        rates = (
            f"{median(side.rates[c]):.0f} ({min(side.rates[c]):.0f} … {max(side.rates[c]):.0f})"
            for c in CONNECTIONS
        )
        yield f"| {side.name} | {' | '.join(rates)} | {side.memory_mb:.0f} |"
    by_name = {side.name: side for side in found}
    for name in (DEEPEST, EACH, COPIES):
        ratios = [
            median(a / b for a, b in zip(by_name[name].rates[c], by_name[TOGETHER].rates[c], strict=True))
            for c in CONNECTIONS
        ]
        yield f"{TOGETHER} takes {' and '.join(f'{ratio:.2f}' for ratio in ratios)} × the time of {name}"
    alone, together = found[-1].memory_mb, by_name[TOGETHER].memory_mb
    yield f"memory: {together / alone:.2f} × that of one model; cores: {len(os.sched_getaffinity(0))}"
