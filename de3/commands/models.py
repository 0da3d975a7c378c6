"""`de3 models`: inspect a model store, and change the models of a running server."""

import json
import os
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import typer
from rich.console import Console
from rich.markup import escape

from de3.exits.kinds import Spans
from de3.model_store.printable import printable

if TYPE_CHECKING:
    from de3.model_store.store import Artifact

app = typer.Typer(
    no_args_is_help=True,
    help="Inspect a model store (list, show, verify) and change a server's models (load, unload, rollback).",
)
README = "README.md"
StoreOption = Annotated[Path, typer.Option(envvar="DE3_STORE", help="Folder of the model store.")]


@app.command("list")
def models_list(store: StoreOption = Path("models")) -> None:
    """List the models and versions of a store."""
    from rich.table import Column, Table

    from de3.exits.calibration import times
    from de3.model_store.store import Store

    models = Store(store)
    model = Column("model", overflow="fold")  # instead of truncating it
    table = Table(model, "labels", "layers", "precision", "default τ", "accuracy", "speed-up")
    for name in models.names():
        base, _, version = name.partition(":")
        pinned = " (pinned)" if models.pin(base) == int(version) else ""
        try:
            m = models.open(name).manifest
        except Exception as error:  # a forged manifest may raise anything
            table.add_row(name + pinned, f"[red]{escape(_reason(error))}")
            continue
        names = m.kind.rule.names if isinstance(m.kind, Spans) else m.labels
        labels = ("spans: " if isinstance(m.kind, Spans) else "") + ", ".join(names[:4])
        labels += f" … ({len(names)})" if len(names) > 4 else ""
        labels = escape(printable(labels))
        c = m.calibration
        numbers = ["–", "–"]
        if c is not None:
            agree = " agree" if c.self_labelled else ""  # with full depth or the imported classifier
            numbers = [f"{100 * c.default.accuracy:.1f}%{agree}", times(c.default.speedup)]
        table.add_row(name + pinned, labels, str(m.num_layers), m.precision, f"{m.defaults.tau:g}", *numbers)
    Console().print(table)


@app.command("show")
def models_show(
    model: Annotated[str, typer.Argument(help="Model, as name, name:version or folder.")],
    store: StoreOption = Path("models"),
) -> None:
    """Print a model's manifest as JSON, without the calibration table, which has hundreds of rows, risk and
    label_risk."""
    manifest = _open(store, model).manifest
    text = manifest.model_dump_json(
        indent=2, exclude={"calibration": {"table"}, "risk": True, "label_risk": True}
    )
    print("\n".join(map(printable, text.split("\n"))))


@app.command("verify")
def models_verify(
    model: Annotated[
        str | None, typer.Argument(help="Model, as name, name:version or folder. Default: all.")
    ] = None,
    store: StoreOption = Path("models"),
) -> None:
    """Check the hash and the contents of every file of a model, and that it loads; exits with 1 on failure.

    A model runs only after it has been checked, and then in a separate process with limits.
    """
    from de3.model_store.store import Store
    from de3.runtime.prove import Prover

    failed = False
    for name in [model] if model else Store(store).names():
        try:
            artifact = _open(store, name)
            no_kernels = Prover().prove(artifact, "auto")
            if README in artifact.manifest.files:  # the server does not read it
                artifact.read(README)
            print(
                f"{artifact.full_name}  valid{no_kernels and f', without kernels: {printable(no_kernels)}'}"
            )
        except Exception as error:  # a forged artifact may raise anything; the next may be valid
            failed = True
            print(f"{printable(name)}  DAMAGED  {_reason(error)}")
    if failed:
        raise typer.Exit(1)


def _open(store: Path, model: str) -> "Artifact":
    """The artifact with this name, or in this folder; raises StoreError if there is none."""
    from de3.model_store.store import Store, UnknownModelError

    found = Store(store).find(model)
    if found is None and "/" in model:
        raise UnknownModelError(
            f"{model}: not the folder of a version or model; names are NAME or NAME:VERSION"
        )
    return found or Store(store).open(model)


def _reason(error: Exception) -> str:
    """The reason why an artifact is not valid, as one line."""
    from de3.model_store.store import StoreError

    return str(error if isinstance(error, StoreError) else StoreError(f"{type(error).__name__}: {error}"))


CHANGE_TIMEOUT_S = 600.0  # loading a model takes time
Url = Annotated[str, typer.Option(envvar="DE3_URL", help="URL of the running server.")]


def check_url(url: str) -> str:
    """The server's URL, with any trailing slash removed; raises ValueError if it is invalid."""
    import httpx

    if not url.startswith(("http://", "https://")):
        raise ValueError(f"--url: must begin with http:// or https://; did you mean http://{url}?")
    try:
        httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"--url: {error}") from None
    return url.rstrip("/")


@app.command("load")
def models_load(
    model: Annotated[
        str,
        typer.Argument(
            help="Model, as name:version, or as name: the newest in the server's store, or learned from it; unpinned."
        ),
    ],
    url: Url = "http://127.0.0.1:8000",
    canary: Annotated[
        float | None,
        typer.Option(
            help="Load it as a canary that answers this share of the requests that do not name a version.",
            min=0.001,
            max=0.999,
        ),
    ] = None,
    shadow: Annotated[
        bool,
        typer.Option(
            "--shadow",
            help="Load it as a shadow: it runs copies of the same texts, and answers that differ are counted.",
        ),
    ] = False,
    only_load: Annotated[
        bool,
        typer.Option(
            "--only-load", help="Keep the current version; this one answers only requests that name it."
        ),
    ] = False,
) -> None:
    """Load or reload a version on a running server. By default, it becomes current once it is warmed up, and is pinned:
    later starts serve it, too. Without a version, the pin is lifted.

    Needs an admin key in DE3_ADMIN_KEY and a server with admin keys.

    Example: de3 models load sst2:4 --canary 0.1
    """
    if (canary is not None) + shadow + only_load > 1:
        raise ValueError("give at most one of --canary, --shadow and --only-load")
    role = "canary" if canary is not None else "shadow" if shadow else "loaded" if only_load else "current"
    body: dict[str, Any] = {"role": role} | ({} if canary is None else {"share": canary})
    done = _change(url, model, "load", body)
    print(f"{done['model']} is {done['role']} ({done['runtime']})")
    _say_next_start(done)


@app.command("unload")
def models_unload(
    model: Annotated[str, typer.Argument(help="Model, as name:version, or as name for all versions.")],
    url: Url = "http://127.0.0.1:8000",
) -> None:
    """Unload a version, or all versions of a model, from a server. Needs an admin key in DE3_ADMIN_KEY."""
    done = _change(url, model, "unload", {})
    for name in done["unloaded"]:
        print(f"{name} is unloaded")
    _say_next_start(done)


@app.command("rollback")
def models_rollback(
    model: Annotated[str, typer.Argument(help="Model, without a version.")],
    url: Url = "http://127.0.0.1:8000",
) -> None:
    """Make the previous version current again, and pin it. Needs an admin key in DE3_ADMIN_KEY."""
    done = _change(url, model, "rollback", {})
    print(f"{done['model']} is current again ({done['runtime']})")
    _say_next_start(done)


def _say_next_start(done: dict[str, Any]) -> None:
    """Print what the next start of a server will serve, from its answer; earlier releases do not say."""
    if "next_start" in done:
        one, why = done["next_start"], done["reason"]
        start = f"the next start serves {one} ({why}), unless its command line names another"
        if why.startswith("command line"):
            start = f"its command line names {one}, so a restart with the same command line serves {one}"
            start += why.removeprefix("command line")
        print(printable(start))


def _change(url: str, model: str, action: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send an admin request and return its answer; raises ValueError with the server's error message."""
    key = os.environ.get("DE3_ADMIN_KEY")
    if not key:
        raise ValueError("set DE3_ADMIN_KEY to an admin key of the server (de3 serve --admin-keys-file)")
    name, colon, version = model.partition(":")
    if colon:
        if not version.isdecimal() or action == "rollback":
            raise ValueError(
                f"{model!r}: must be a name" + ("" if action == "rollback" else " or name:version")
            )
        body = body | {"version": int(version)}
    request = Request(
        f"{check_url(url)}/v1/models/{quote(name, safe='')}/{action}",
        json.dumps(body).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    try:
        with urlopen(request, timeout=CHANGE_TIMEOUT_S) as answer:
            result: dict[str, Any] = json.load(answer)
            return result
    except HTTPError as error:
        try:
            message = json.load(error)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"HTTP {error.code}"
        if error.code == 404 and "no such path" in message:
            message = "the server has no admin keys, so its models cannot be changed"
        raise ValueError(message) from None
    except (OSError, HTTPException) as error:
        raise ValueError(f"{url}: {getattr(error, 'reason', error)}") from None
