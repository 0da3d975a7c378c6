"""de3 models: look into a model store, and change what a running server serves."""

import json
import os
from pathlib import Path
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote
from urllib.request import Request, urlopen

import typer
from rich.console import Console
from rich.markup import escape

from model_store.printable import printable

app = typer.Typer(
    no_args_is_help=True,
    help="Look into a model store: list, show, verify. Change what a server serves: load, unload, rollback.",
)
README = "README.md"
StoreOption = Annotated[Path, typer.Option(envvar="DE3_STORE", help="Folder of the model store.")]


@app.command("list")
def models_list(store: StoreOption = Path("models")) -> None:
    """List the models and versions of a store."""
    from rich.table import Table

    from model_store.store import Store

    found = Store(store)
    table = Table()
    for column in ("model", "labels", "layers", "precision", "default τ", "accuracy", "speed-up"):
        table.add_column(column)
    for name, versions in found.versions().items():
        for version in versions:
            try:
                m = found.open(f"{name}:{version}").manifest
            except Exception as error:  # whatever a forged manifest may cause
                table.add_row(f"{name}:{version}", f"[red]{escape(_reason(error))}")
                continue
            labels = ", ".join(m.labels[:4]) + (f" … ({len(m.labels)})" if len(m.labels) > 4 else "")
            labels = escape(printable(labels))
            c = m.calibration
            numbers = (f"{100 * c.default.accuracy:.1f}%", f"{c.default.speedup:.1f}×") if c else ("–", "–")
            table.add_row(
                f"{name}:{version}", labels, str(m.num_layers), m.precision, f"{m.defaults.tau:g}", *numbers
            )
    Console().print(table)


@app.command("show")
def models_show(
    model: Annotated[str, typer.Argument(help="name, or name:version.")],
    store: StoreOption = Path("models"),
    table: Annotated[bool, typer.Option(help="Include the whole calibration table.")] = False,
) -> None:
    """Print a model's manifest as JSON."""
    from model_store.store import Store

    manifest = Store(store).open(model).manifest
    without = None if table else {"calibration": {"table"}}
    text = manifest.model_dump_json(indent=2, exclude=without)
    print("\n".join(map(printable, text.split("\n"))))


@app.command("verify")
def models_verify(
    model: Annotated[
        str | None, typer.Argument(help="name or name:version. [default: all]", show_default=False)
    ] = None,
    store: StoreOption = Path("models"),
) -> None:
    """Check every file of a model against its hash, what is in it, and that it loads; exits with 1 if one is
    not sound.

    Nothing of a model runs before it was checked, and then in a process of its own, with limits.
    """
    from model_store.store import Store
    from server.prove import Prover

    found = Store(store)
    names = [model] if model else [f"{n}:{v}" for n, versions in found.versions().items() for v in versions]
    bad = 0
    for name in names:
        try:
            artifact = found.open(name)
            no_kernels = Prover().prove(artifact, "auto")
            if README in artifact.manifest.files:  # which no server reads
                artifact.read(README)
            print(
                f"{artifact.full_name}  sound{no_kernels and f', without kernels: {printable(no_kernels)}'}"
            )
        except Exception as error:  # whatever a forged artifact may cause: the next may be sound
            bad += 1
            print(f"{printable(name)}  NOT SOUND  {_reason(error)}")
    if bad:
        raise typer.Exit(1)


def _reason(error: Exception) -> str:
    """Why an artifact is not sound."""
    from model_store.store import StoreError

    return str(error if isinstance(error, StoreError) else StoreError(f"{type(error).__name__}: {error}"))


CHANGE_S = 600.0  # longest wait for a server to load a model
Url = Annotated[str, typer.Option(envvar="DE3_URL", help="The running server.")]


@app.command("load")
def models_load(
    model: Annotated[
        str, typer.Argument(help="name (its newest version in the server's store) or name:version.")
    ],
    url: Url = "http://127.0.0.1:8000",
    canary: Annotated[
        float | None,
        typer.Option(
            help="Let it answer this share of the requests that name no version.",
            min=0.001,
            max=0.999,
            show_default=False,
        ),
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Let it run the same texts, and count other labels.")
    ] = False,
    beside: Annotated[
        bool, typer.Option("--beside", help="Let it answer requests that name its version only.")
    ] = False,
) -> None:
    """Let a running server load a version, or load it anew. Once it is warm it answers for its name.

    Needs an admin key in DE3_ADMIN_KEY, and a server that has admin keys.
    """
    if (canary is not None) + shadow + beside > 1:
        raise ValueError("give at most one of --canary, --shadow and --beside")
    role = "canary" if canary is not None else "shadow" if shadow else "beside" if beside else "current"
    body: dict[str, Any] = {"role": role} | ({} if canary is None else {"share": canary})
    done = _change(url, model, "load", body)
    print(f"{done['model']} is {done['role']}, by {done['runtime']}")


@app.command("unload")
def models_unload(
    model: Annotated[str, typer.Argument(help="name:version, or name: every version.")],
    url: Url = "http://127.0.0.1:8000",
) -> None:
    """Let a server serve a version, or all of a name, no longer. Needs an admin key in DE3_ADMIN_KEY."""
    for name in _change(url, model, "unload", {})["unloaded"]:
        print(f"{name} is unloaded")


@app.command("rollback")
def models_rollback(
    model: Annotated[str, typer.Argument(help="name, without a version.")],
    url: Url = "http://127.0.0.1:8000",
) -> None:
    """Let the version answer again that was current before. Needs an admin key in DE3_ADMIN_KEY."""
    done = _change(url, model, "rollback", {})
    print(f"{done['model']} is current again, by {done['runtime']}")


def _change(url: str, model: str, what: str, body: dict[str, Any]) -> dict[str, Any]:
    """Ask a server for a change; raises ValueError with what it says."""
    key = os.environ.get("DE3_ADMIN_KEY")
    if not key:
        raise ValueError("set DE3_ADMIN_KEY to an admin key of the server (de3 serve --admin-keys-file)")
    name, colon, version = model.partition(":")
    if colon:
        if not version.isdecimal() or what == "rollback":
            raise ValueError(
                f"{model!r}: must be a name" + ("" if what == "rollback" else " or name:version")
            )
        body = body | {"version": int(version)}
    request = Request(
        f"{url.rstrip('/')}/v1/models/{quote(name, safe='')}/{what}",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urlopen(request, timeout=CHANGE_S) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except HTTPError as error:
        try:
            said = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            said = f"HTTP {error.code}"
        if error.code == 404 and "no such path" in said:
            said = "the server has no admin keys, so its models cannot be changed"
        raise ValueError(said) from None
    except URLError as error:
        raise ValueError(f"{url}: {error.reason}") from None
