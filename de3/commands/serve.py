"""`de3 serve`: its options are --demo and the fields of server.settings.Settings."""

import os
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

import typer

from de3.commands.options import declare
from de3.server.settings import OTHER_VARIABLES, Settings, option, unknown_variables, variable

DEMO_MODEL = "sst2"


def serve(context: typer.Context, demo: bool, **values: Any) -> None:
    """Serve models over HTTP: POST /classify, GET /docs, /metrics, /ready.

    Example: de3 serve --store models --port 8000
    """
    from de3.model_store.store import NoModelsError
    from de3.server.main import serve as run

    given = {name: value for name, value in values.items() if value is not None}
    if demo:
        source = context.get_parameter_source("store")
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError("--demo: cannot be combined with --store; give one of them")
        given["store"], given["models"] = demo_store(), given.get("models") or [DEMO_MODEL]
    for name in Settings.model_fields:
        # An empty secret is not skipped, because Settings rejects it.
        if option(name) is None and (secret := os.environ.get(variable(name))) is not None:
            given[name] = secret
    try:
        run(Settings(**given), _warnings())
    except NoModelsError as error:
        raise ValueError(
            f"{error}, name another store with --store DIR, or serve the demo model with de3 serve --demo"
        ) from None


def demo_store() -> Path:
    """The store of the demo model; in a checkout de3/demo is a link to models/."""
    return Path(__file__).parents[1] / "demo"


def _warnings() -> list[str]:
    """Warnings about environment variables that look like settings but are not."""
    hint = f"see de3 serve --help; {', '.join(OTHER_VARIABLES)} are for clients"
    return [f"{name}: unknown setting, ignored: {hint}" for name in unknown_variables(os.environ)]


def _parameter(name: str) -> Parameter | None:
    """A field of Settings as a parameter of the command; None for a secret."""
    field, how = Settings.model_fields[name], option(name)
    if how is None:
        return None
    kind: Any = str if get_origin(field.annotation) is Literal else field.annotation  # Settings checks it
    default = field.get_default()
    if get_origin(kind) is list:
        kind, default = list[str] | None, default or None
    flag = how.flag or "--" + name.replace("_", "-")
    # The description of the field states its default if it is None.
    info = typer.Option(
        flag,
        envvar=variable(name),
        help=field.description,
        rich_help_panel=how.panel,
        show_default=default is not None,
    )
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


_demo = typer.Option("--demo", help="Serve the demo model that is part of de3, instead of a store.")
_parameters = [
    Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context),
    Parameter("demo", Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, _demo]),
    *(parameter for name in Settings.model_fields if (parameter := _parameter(name)) is not None),
]
declare(serve, _parameters)
