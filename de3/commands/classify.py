"""`de3 classify`: texts, or a file of them, by a running server."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from de3.commands.models import Url, check_url
from de3.exits.signals import SIGNALS

MAX_BATCH = 32


def classify(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to classify.")] = None,
    file: Annotated[
        Path | None,
        typer.Option(help='JSON lines to classify: a text, or an object with "text" (and "text_pair").'),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Where the answers of --file go, one line each; a started file is continued."),
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
        float | None, typer.Option(help="Or the mean speed-up over full depth.")
    ] = None,
    max_disagreement: Annotated[
        float | None, typer.Option(help="Or the rate of answers that may differ from full depth.")
    ] = None,
    latency_budget_ms: Annotated[
        float | None, typer.Option(help="Or the time within which to answer.")
    ] = None,
    long: Annotated[
        str | None,
        typer.Option(help="Texts longer than the model takes: truncate (the default), windows, or error."),
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, help="Requests of --file in flight.")] = 8,
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
            _classify_file(client, file, out, options, parallel)


def _ask(client: Any, inputs: list[Any], options: dict[str, Any]) -> list[dict[str, Any]]:
    import httpx

    from de3.client import ServerError

    try:
        return [row.raw for row in client.classify(inputs, **options).rows]
    except ServerError as error:
        raise ValueError(f"the server answers {error.status}: {error.message}") from None
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise ValueError(f"no answer from the server ({error}); is it running? de3 serve") from None


def _inputs(lines: TextIO, file: Path, skip: int) -> Iterator[Any]:
    """The inputs of a file from a line on; raises ValueError that names the line."""
    for number, line in enumerate(lines, 1):
        if number <= skip:
            continue
        try:
            value = json.loads(line)
        except ValueError:
            raise ValueError(
                f"{file}, line {number}: not JSON; one text in quotes, or one object, a line"
            ) from None
        if isinstance(value, dict) and "text" in value:
            pair = value.get("text_pair")
            value = value["text"] if pair is None else {"text": value["text"], "text_pair": pair}
        if not isinstance(value, str | dict):
            raise ValueError(f'{file}, line {number}: must be a text, or an object with "text"')
        yield value


def _classify_file(client: Any, file: Path, out: Path, options: dict[str, Any], parallel: int) -> None:
    """Answers in the order of the lines; what an earlier run wrote is kept."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done = _complete_lines(out)
    with file.open(encoding="utf-8") as lines:
        total = sum(1 for _ in lines)
    columns = (TextColumn("classifying"), MofNCompleteColumn(), TimeRemainingColumn())
    with (
        file.open(encoding="utf-8") as lines,
        out.open("a", encoding="utf-8") as answers,
        ThreadPoolExecutor(parallel) as pool,
        Progress(*columns) as progress,
    ):
        task = progress.add_task("", total=total, completed=done)
        inputs, pending = _inputs(lines, file, done), list[Future[list[dict[str, Any]]]]()
        while True:
            while len(pending) < 2 * parallel and (batch := list(islice(inputs, MAX_BATCH))):
                pending.append(pool.submit(_ask, client, batch, options))
            if not pending:
                return
            rows = pending.pop(0).result()
            answers.writelines(json.dumps(_line(row)) + "\n" for row in rows)
            answers.flush()
            progress.advance(task, len(rows))


def _line(row: dict[str, Any]) -> dict[str, Any]:
    """What the file says of a text."""
    names = ("label", "labels", "value", "probs", "exit", "windows")
    return {name: row[name] for name in names if name in row}


def _complete_lines(out: Path) -> int:
    """The number of answers in a file; an incomplete last line is cut off."""
    if not out.exists():
        return 0
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        out.write_bytes(whole)
    return whole.count(b"\n")
