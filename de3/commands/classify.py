"""`de3 classify`: classify texts, or files of texts, in process or with a running server."""

import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from de3.commands.models import StoreOption, check_url
from de3.commands.options import add_parameters, console, fields_of
from de3.data.tables import Columns, records
from de3.model_store.printable import printable
from de3.runtime.upstream_settings import read_upstreams

if TYPE_CHECKING:
    from de3.bulk.parts import Parts
    from de3.bulk.pool import Pool
    from de3.bulk.run import Summary
    from de3.client import Client, Row
    from de3.model_store.store import Artifact
    from de3.runtime.upstream.upstreams import Caller
    from de3.runtime.upstream_settings import UpstreamModel

TOO_MANY_REFUSED = 3  # exit code
IN_FLIGHT = 8  # concurrent requests to a server, for one file
SAMPLE_BYTES = 2**16  # number of bytes hashed at each end of a file
_file_option = partial(typer.Option, rich_help_panel="Files")
_span_option = partial(typer.Option, rich_help_panel="Token classifiers")


@add_parameters(Columns, without=["label"])
def classify(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts to classify.")] = None,
    file: Annotated[
        Path | None,
        _file_option(
            help="File of texts, or a folder of such files: .parquet, .csv or .tsv with columns; .jsonl, each line a "
            'text or an object; or .txt, one text per line. A column "text_pair" makes pairs. "-": standard input, as '
            ".jsonl if its first line is a JSON object, else one text per line."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        _file_option(
            help="Where to write the answers to --file: a .parquet, .csv, .tsv or .jsonl file, or a folder of parts. "
            'The same command continues a run that was interrupted. "-": standard output, as .jsonl or in --format.'
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model: name or name:version in the store, a folder or hub id of a Hugging Face classifier, or the "
            ".toml file of a model with an upstream; or several, separated by commas: those with the same encoder "
            "share a pass. Default: the store's only model; with --url, the server's default.",
        ),
    ] = None,
    store: StoreOption = Path("models"),
    demo: Annotated[bool, typer.Option("--demo", help="Use the demo model that comes with de3.")] = False,
    url: Annotated[
        str | None,
        typer.Option(envvar="DE3_URL", help="URL of a running server to use, instead of this process."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="DE3_API_KEY", help="API key, with --url.", show_envvar=True)
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(help="Exit at the first layer whose score is below τ; 0: never exit early."),
    ] = None,
    target_speedup: Annotated[
        float | None, typer.Option(help="Instead of --tau: the mean speed-up over full depth.")
    ] = None,
    max_disagreement: Annotated[
        float | None,
        typer.Option(help="Instead of --tau: the maximum rate of answers that differ from full depth."),
    ] = None,
    long: Annotated[
        str | None,
        typer.Option(
            help="How to handle texts longer than the model's limit: truncate (default), windows, or error."
        ),
    ] = None,
    redact: Annotated[
        bool,
        _span_option(
            "--redact",
            help="Answer with the texts, each span replaced by its label in brackets; the output does not have the "
            "original texts.",
        ),
    ] = False,
    labels: Annotated[
        str | None,
        _span_option(help="Labels of the spans to find, separated by commas.", show_default="all"),
    ] = None,
    min_score: Annotated[float | None, _span_option(help="Minimum score of a span, from 0 to 1.")] = None,
    aggregation: Annotated[
        str | None,
        _span_option(
            help="How tokens are grouped into spans: none, simple, first, average or max.",
            show_default="the model's",
        ),
    ] = None,
    keep: Annotated[
        str | None,
        _file_option(
            help="Columns of the input that the output repeats, separated by commas; none: no column.",
            show_default="all",
        ),
    ] = None,
    refused: Annotated[
        str,
        _file_option(
            help="Rows that cannot be classified: keep (in place, with the reason in the column error), or drop (list "
            "them in OUT.refused.jsonl instead)."
        ),
    ] = "keep",
    max_refused: Annotated[
        float | None,
        _file_option(
            min=0,
            max=1,
            help="Exit with code 3 if more than this share of all rows, from 0 to 1, cannot be classified. The output "
            "is complete all the same.",
        ),
    ] = None,
    prefix: Annotated[str, _file_option(help="Prefix of the names of the answers' columns.")] = "",
    part_rows: Annotated[
        int,
        _file_option(
            min=1,
            help="Rows per part, rounded up to whole slices of up to 2,048 rows; fewer if the texts are long.",
        ),
    ] = 65_536,
    output_format: Annotated[
        str | None,
        _file_option(
            "--format",
            help="Format of the parts in a folder, or of standard output: parquet, csv, tsv or jsonl. Default: the "
            "input's; jsonl for .txt and standard output.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Engine threads.", show_default="one per core")
    ] = None,
    **reading: Any,
) -> None:
    """Classify texts or files: in this process, or with a running server if --url or DE3_URL is given.

    Example: de3 classify "a fine film" --demo, or de3 classify --file in.parquet --out out.parquet --model sst2
    """
    if texts == ["-"]:
        texts, file, out = None, Path("-"), out or Path("-")
    _check(texts, file, out, refused)
    given = {
        "tau": tau,
        "target_speedup": target_speedup,
        "max_disagreement": max_disagreement,
        "long": long,
        "redact": redact or None,
        "labels": None if labels is None else names_in(labels),
        "min_score": min_score,
        "aggregation": aggregation,
    }
    # The engine checks them.
    options: Any = {name: value for name, value in given.items() if value is not None}
    models = names_in(model or "")
    if model is not None and Path(model).exists():  # its name may have a comma
        models = [model]
    with ExitStack() as stack:
        client = None if url is None else stack.enter_context(_client(url, key))
        upstreams = read_upstreams(models) if client is None else []
        artifacts = _artifacts(models, store, demo) if client is None else []
        if texts:
            _classify_texts(texts, client, artifacts, upstreams, models, options, threads)
            return
        assert file is not None and out is not None
        from de3.bulk.pages import READ_BYTES
        from de3.bulk.parts import Parts
        from de3.bulk.pool import RemotePool, server_errors
        from de3.bulk.run import PART_CHARS
        from de3.bulk.source import SLICE_CHARS, SLICE_ROWS, Source
        from de3.columns import pyarrow_module

        kept = None if keep is None else names_in(keep if keep != "none" else "")
        columns = Columns(**fields_of(Columns, reading), label=None)
        file, target = stack.enter_context(_files(file, out, output_format))
        source = Source(file, columns, kept, redact)
        reader = [pyarrow_module().__version__] if source.kind == ".parquet" else []
        what = {
            "version": [version("de3"), SLICE_ROWS, SLICE_CHARS, PART_CHARS, READ_BYTES, *reader],
            "input": [_identity(one) for one in source.files],
            "columns": [vars(columns), kept, prefix],
            "options": options,
            "part_rows": part_rows,
        }
        if client is None:
            from de3.columns import describe
            from de3.model_store.manifest import fingerprint

            what |= describe([one.manifest for one in artifacts])
            what["artifact"] = ",".join(fingerprint(one.manifest) for one in artifacts)
        else:
            with server_errors():
                what |= {"model": [url, model, sorted(str(row["id"]) for row in client.models())]}
        kind = target.suffix if str(out) == "-" else _kind(out, output_format, source.kind)
        parts = Parts(target, kind, what, refused == "drop")
        stack.callback(parts.close)
        if parts.is_complete:
            _say(f"{out} is complete: nothing to do")
        else:
            pool: Pool
            if client is None:
                pool, callers = _local_pool(artifacts, options, threads, upstreams, parts.upstream)
            else:
                pool, callers = RemotePool(client, models, options, IN_FLIGHT), []
            stack.enter_context(_interruptible(parts, str(out) != "-"))
            _run(source, pool, parts, prefix, part_rows, out, artifacts, options, callers)
    _check_refused(parts.summary, max_refused)


def names_in(option: str) -> list[str]:
    """The names in an option, which are separated by commas."""
    return [name.strip() for name in option.split(",") if name.strip()]


def _check(texts: list[str] | None, file: Path | None, out: Path | None, refused: str) -> None:
    """Raise ValueError for missing or conflicting arguments of the command."""
    if bool(texts) == (file is not None) or (file is None) != (out is None):
        missing = f"{'--out' if out is None else '--file'} is missing: " if file or out else ""
        raise ValueError(f"{missing}give texts, or --file and --out; see de3 classify --help")
    if refused not in ("keep", "drop") or (refused == "drop" and str(out) == "-"):
        raise ValueError(f"--refused: must be keep or, if --out is not -, drop; got {refused!r}")


def _check_refused(summary: Mapping[str, Any], limit: float | None) -> None:
    """Exit with TOO_MANY_REFUSED if more than this share of a complete output's rows was refused.

    summary: see Parts.
    """
    share = summary["refused"] / max(1, summary["rows"])
    if limit is not None and not share <= limit:
        _say(f"{share:.2%} of the rows cannot be classified, more than --max-refused {limit:g}", "red")
        raise typer.Exit(TOO_MANY_REFUSED)


@contextmanager
def _interruptible(parts: "Parts", is_kept: bool) -> Iterator[None]:
    """Exit with 130, or 143 after SIGTERM, and say what is kept. is_kept: what is done outlives this run."""
    from de3.progress import plural

    code = 130

    def end(number: int, _: object) -> None:  # as Ctrl+C does
        nonlocal code
        code = 128 + number
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # while the processes end
        if is_kept and parts.kept:
            _say(
                f"stopped; {plural(parts.kept, 'row')} kept; the same command continues after the last of them"
            )
        else:
            _say("stopped; no rows are kept yet: the same command starts again")
        raise typer.Exit(code) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str, style: str = "") -> None:
    console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)


def _local_pool(
    artifacts: "list[Artifact]",
    options: Any,
    threads: int | None,
    upstreams: "list[UpstreamModel]",
    folder: Path,
) -> "tuple[Pool, list[Caller]]":
    """The processes that classify, and the callers of upstreams. folder: of upstreams."""
    from de3.bulk.pool import LocalPool

    if not upstreams:
        return LocalPool(artifacts, options, threads), []
    from de3.bulk.upstream import UpstreamPool  # imports httpx

    pool = UpstreamPool(artifacts, options, threads, upstreams, folder, partial(_say, style="yellow"))
    return pool, pool.callers


@contextmanager
def _files(file: Path, out: Path, output_format: str | None) -> Iterator[tuple[Path, Path]]:
    """The paths of --file and --out; for "-", of a copy of standard input, and of a file to copy to standard output."""
    if "-" not in (str(file), str(out)):
        yield file, out
        return
    with TemporaryDirectory(prefix="de3-") as folder:
        if str(file) == "-":
            file = Path(folder) / "stdin.jsonl"
            with file.open("xb") as copy:
                shutil.copyfileobj(sys.stdin.buffer, copy)
            _, first = next(records(file, Columns(label=None), keeps_bad=True), ("", None))
            if not isinstance(first, dict):
                file = file.rename(file.with_suffix(".txt"))
        answers = out
        if str(out) == "-":
            answers = Path(folder) / f"stdout{_kind(Path(folder), output_format or 'jsonl', '')}"
        try:
            yield file, answers
        except ValueError as error:
            raise ValueError(str(error).replace(f"{folder}/{file.name}", "standard input")) from None
        if answers is not out:
            with answers.open("rb") as copy:
                shutil.copyfileobj(copy, sys.stdout.buffer)


def _identity(file: Path) -> list[str | int]:
    """Name, size and hash of both ends of a file: enough to notice most changes, and equal for a copy."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        digest = blake2b(opened.read(SAMPLE_BYTES), digest_size=16)
        opened.seek(max(0, size - SAMPLE_BYTES))
        digest.update(opened.read(SAMPLE_BYTES))
    return [file.name, size, digest.hexdigest()]


def _artifacts(names: list[str], store: Path, demo: bool) -> "list[Artifact]":
    """The artifacts with these names; without names, the demo model if `demo`, else the store's only model.

    Raises ValueError if there is no such artifact, or if no name is given and the store has several models.
    """
    from de3.library import DEMO, artifact_of
    from de3.model_store.store import NoModelsError, Store

    if demo:
        store, names = DEMO, names or ["sst2"]
    if names:
        return [artifact_of(name, store.absolute()) for name in names]
    try:
        found = list(Store(store).versions())
    except NoModelsError as error:
        raise ValueError(
            f"{error}; or choose a classifier with --model, --demo, or a server with --url"
        ) from None
    if len(found) != 1:
        raise ValueError(f"--model is required, because {store} has several models: {', '.join(found)}")
    return [Store(store).open(found[0])]


def _kind(out: Path, wanted: str | None, kind: str) -> str:
    """The suffix of the output's files; raises ValueError if --out or --format is invalid.

    wanted: the value of --format. kind: suffix of the input, the default for a folder (.jsonl for .txt).
    """
    from de3.bulk.formats import KINDS

    if out.suffix in KINDS and not out.is_dir():
        if wanted is not None:
            raise ValueError("--format: only for a folder; the suffix of --out sets the format of a file")
        return out.suffix
    if out.suffix and not out.is_dir():
        raise ValueError(
            f"--out {out}: expected {', '.join(KINDS)}, or a folder (create it if its name has a dot)"
        )
    if wanted is None:
        return ".jsonl" if kind == ".txt" else kind
    if f".{wanted}" not in KINDS:
        raise ValueError(f"--format must be parquet, csv, tsv or jsonl, got {wanted!r}")
    return f".{wanted}"


@contextmanager
def _client(url: str, key: str | None) -> "Iterator[Client]":
    from de3.client import Client

    with Client(check_url(url), key) as client:
        yield client


def _classify_texts(
    texts: list[str],
    client: "Client | None",
    artifacts: "list[Artifact]",
    upstreams: "list[UpstreamModel]",
    models: list[str],
    options: Any,
    threads: int | None,
) -> None:
    """Classify and print texts. client: of a server; None: classify with the artifacts, in this process."""
    if client is None:
        from de3.library import Classifier, Classifiers

        if len(artifacts) == 1:  # which can redact
            with Classifier(artifacts[0], threads, upstreams=upstreams) as single:
                _print(texts, [single.name], [single.classify(texts, **options)])
        else:
            with Classifiers(artifacts, threads, upstreams=upstreams) as several:
                _print(texts, several.names, several.classify(texts, **options))
        return
    from de3.bulk.pool import ask, server_errors

    with server_errors():
        answers = ask(client, texts, models, options)
    _print(texts, [one.model for one in answers], [one.rows for one in answers])


def _print(texts: list[str], models: list[str], results: "list[list[Row]]") -> None:
    """Print the answers to each text, one from each model."""
    for text, *rows in zip(texts, *results, strict=True):
        for model, row in zip(models, rows, strict=True):
            name = f"{model.partition(':')[0]}: " if len(models) > 1 else ""
            print(f"{name}{_answer(row)}  layer {row.exit.layer}  {text if row.text is None else row.text}")
    if truncated := sum(row.truncated for row in results[0]):
        _say(f"{truncated} of {len(texts)} texts were truncated to the model's limit; see --long", "yellow")


def _answer(row: "Row") -> str:
    if row.spans is not None:
        parts = (f"{one.label}{f' {one.text!r}' if one.text else ''} {one.score:.3f}" for one in row.spans)
        return ", ".join(map(printable, parts)) or "no spans"
    label = row.label if row.labels is None else ", ".join(row.labels) or "none"
    return f"{label}  {max(row.probs) if row.value is None else row.value:.3f}"


def _run(
    source: Any,
    pool: "Pool",
    parts: Any,
    prefix: str,
    part_rows: int,
    out: Path,
    artifacts: "list[Artifact]",
    options: dict[str, Any],
    callers: "list[Caller]",
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from de3.bulk.report import report
    from de3.bulk.run import classify as run
    from de3.progress import LOG_EVERY_S, duration, plural

    bars = (
        TextColumn("classifying"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    total, started, printed = source.rows(), perf_counter(), perf_counter()
    earlier = 0
    with closing(pool), Progress(*bars, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, rate="")

        def advance(so_far: "Summary") -> None:
            nonlocal printed, earlier
            done, now = so_far.rows, perf_counter()
            if done > so_far.earlier > earlier:
                earlier = so_far.earlier
                _say(f"resumed after the first {plural(earlier, 'row')}, which an earlier run has written")
            rate = (done - so_far.earlier) / (now - started)
            progress.update(task, completed=done, rate=f"{rate:,.0f} rows/s")
            if rate and not console.is_terminal and now - printed >= LOG_EVERY_S:
                printed, left = now, duration(max(0, total - done) / rate)
                _say(f"  classifying: {done:,} of {total:,} rows, {rate:,.0f} rows/s, about {left} left")

        summary = run(source, pool, parts, lambda name: prefix + name, part_rows, advance)
        progress.update(task, total=summary.rows, completed=summary.rows)
    dropped = parts.finish(summary.parts, summary.json())
    written = [] if str(out) == "-" else [f"written: {out}"]
    for line in [*report(summary, artifacts, options, callers), *written]:
        _say(line)
    if summary.refused:
        where = dropped or f"{prefix}error has the reasons"
        _say(f"{plural(summary.refused, 'row')} cannot be classified: {where}", "yellow")
        for reason, count in summary.reasons.most_common(5):
            _say(f"  {count:,}: {reason}")
