"""Command-line options shared by several commands of `de3 loadtest` and of lab."""

from pathlib import Path
from typing import Annotated

import typer

Url = Annotated[str, typer.Argument(help="URL of the server, e.g. http://127.0.0.1:8000")]
Store = Annotated[Path, typer.Option(envvar="DE3_STORE", help="The model store.")]
Model = Annotated[str, typer.Option(help="Model, as name or name:version.")]
ModelName = Annotated[str, typer.Option(help="Model, without a version.")]
Stock = Annotated[
    Path | None,
    typer.Option(
        help="A stock sequence classifier with the same encoder, for the peers that support no other model: "
        "transformers, Infinity, CTranslate2. Default: omit these peers."
    ),
]
Texts = Annotated[Path, typer.Option(help="Texts to send: tsv, csv or jsonl with named columns, or txt.")]
TextColumn = Annotated[str, typer.Option(help="Column of the texts.")]
LabelColumn = Annotated[str, typer.Option(help="Column of the labels, for the accuracy; it may be missing.")]
LabelNames = Annotated[str, typer.Option(help="Comma-separated names of numeric labels.")]
Seconds = Annotated[float, typer.Option(help="Duration of one measurement.", min=0.5)]
Rounds = Annotated[
    int,
    typer.Option(
        help="Repetitions of the measurements of throughput and latency; the servers take turns.", min=1
    ),
]
SloP99 = Annotated[float, typer.Option(help="Latency objective (p99), ms.", min=1)]
Port = Annotated[int, typer.Option(help="Port of the started servers.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the results to this JSON file.")]
