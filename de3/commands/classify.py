"""`de3 classify`: classify texts, or a file of texts, with a running server."""

import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from de3.commands.models import Url, check_url
from de3.commands.options import fields_of, with_fields
from de3.exits.signals import SIGNALS
from de3.tables import Columns, records, text_of

MAX_BATCH = 32
# Characters of a batch, unless its only text is longer: at 4 bytes each 1 MiB, the default limit of a server.
MAX_BATCH_CHARS = 2**18
CHUNK = 2**20


@with_fields(Columns, without=["label"])
def classify(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to classify.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            help='Texts to classify: .jsonl, each line a text or an object with "text" (and "text_pair"); .csv or '
            ".tsv with such columns; or .txt, one text per line."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="File for the answers to --file, one per line. The file of an interrupted run is continued."
        ),
    ] = None,
    url: Url = "http://127.0.0.1:8000",
    key: Annotated[str | None, typer.Option(envvar="DE3_API_KEY", help="API key.")] = None,
    model: Annotated[
        str | None, typer.Option(help="name, or name:version. Default: the server's default.")
    ] = None,
    tau: Annotated[
        float | None, typer.Option(help="Exit at the first layer whose score is below τ; 0: never early.")
    ] = None,
    signal: Annotated[
        str | None, typer.Option(help=f"The score: {', '.join(SIGNALS)}. Default: the model's.")
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="Instead of --tau: the mean speed-up over full depth.")
    ] = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(help="Instead of --tau: the largest rate of answers that differ from full depth."),
    ] = None,
    latency_budget_ms: Annotated[
        float | None, typer.Option(help="Instead of --tau: the latency budget, ms.")
    ] = None,
    long: Annotated[
        str | None,
        typer.Option(
            help="How to handle texts longer than the model's limit: truncate (default), windows, or error."
        ),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Number of requests in flight with --file.")] = 8,
    **reading: Any,
) -> None:
    """Classify texts with a running server.

    Example: de3 classify "a fine film" --tau 0.05, or de3 classify --file in.jsonl --out out.jsonl
    """
    from de3.client import Client

    if bool(texts) == (file is not None) or (file is None) != (out is None):
        raise ValueError("give texts, or --file and --out; see de3 classify --help")
    options = {
        "model": model,
        "tau": tau,
        "signal": signal,
        "target_speedup": target_speedup,
        "max_disagreement": max_disagreement,
        "latency_budget_ms": latency_budget_ms,
        "long": long,
    }
    with Client(check_url(url), key) as client:
        if texts:
            for text, row in zip(texts, _ask(client, texts, options), strict=True):
                label = ", ".join(row["labels"]) or "none" if "labels" in row else row["label"]
                number = row["value"] if "value" in row else max(row["probs"])
                print(f"{label}  {number:.3f}  layer {row['exit']['layer']}  {text}")
        elif file is not None and out is not None:
            _classify_file(
                client, file, Columns(**fields_of(Columns, reading), label=None), out, options, parallel
            )


def _ask(client: Any, inputs: list[Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    import httpx

    from de3.client import ServerError

    try:
        return [row.raw for row in client.classify(inputs, **options).rows]
    except ServerError as error:
        raise ValueError(f"the server answers {error.status}: {error.message}") from None
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ValueError(
            f"no answer from the server ({error}): start it with de3 serve, or give its address with --url"
        ) from None


def _inputs(file: Path, columns: Columns) -> Iterator[Any]:
    """The texts and pairs of a file, in the form of a request; raises ValueError, naming the line."""
    second = columns.text_pair or "text_pair"
    for where, record in records(file, columns):
        row = {columns.text: record} if isinstance(record, str) else record
        text = text_of(row, columns.text, where)
        if columns.text_pair is None and row.get(second) is None:
            yield text
        else:
            yield {"text": text, "text_pair": text_of(row, second, where, "--pair-column")}


def _classify_file(
    client: Any, file: Path, columns: Columns, out: Path, options: dict[str, Any], parallel: int
) -> None:
    """Write the answers in the order of the rows; answers of an earlier run are kept."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done, total = (
        _complete_lines(out),
        sum(1 for _ in _inputs(file, columns)),
    )  # reports an invalid row before any is sent
    bars = (TextColumn("classifying"), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        out.open("a", encoding="utf-8") as answers,
        ThreadPoolExecutor(parallel) as pool,
        Progress(*bars) as progress,
    ):
        task = progress.add_task("", total=total, completed=done)
        batches = _batches(islice(_inputs(file, columns), done, None))
        pending = deque[Future[list[dict[str, Any]]]]()
        while True:
            while len(pending) < 2 * parallel and (batch := next(batches, None)):
                pending.append(pool.submit(_ask, client, batch, options))
            if not pending:
                return
            rows = pending.popleft().result()
            answers.writelines(json.dumps(_line(row)) + "\n" for row in rows)
            answers.flush()
            progress.advance(task, len(rows))


def _batches(inputs: Iterator[Any]) -> Iterator[list[Any]]:
    """Texts and pairs in batches for one request each."""
    batch, chars = list[Any](), 0
    for one in inputs:
        size = len(one) if isinstance(one, str) else len(one["text"]) + len(one["text_pair"])
        if batch and (len(batch) == MAX_BATCH or chars + size > MAX_BATCH_CHARS):
            yield batch
            batch, chars = [], 0
        batch.append(one)
        chars += size
    if batch:
        yield batch


def _line(row: dict[str, Any]) -> dict[str, Any]:
    """The fields of an answer that are written to the file."""
    names = ("label", "labels", "value", "probs", "exit", "windows")
    return {name: row[name] for name in names if name in row}


def _complete_lines(out: Path) -> int:
    """The number of answers in a file; an incomplete last line is cut off."""
    if not out.exists():
        return 0
    lines, end, at = 0, 0, 0
    with out.open("rb+") as file:
        while chunk := file.read(CHUNK):  # the file may be larger than memory
            lines += chunk.count(b"\n")
            if b"\n" in chunk:
                end = at + chunk.rfind(b"\n") + 1
            at += len(chunk)
        if end < at:
            file.truncate(end)
    return lines
