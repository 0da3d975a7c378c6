"""`de3 serve`, with its own options and those that server.settings.Settings defines."""

import logging
import os
from math import isfinite
from typing import TYPE_CHECKING, Annotated, Any

import typer

from de3.commands.options import HelpAll, add_parameters
from de3.model_store.architecture import precision_of
from de3.runtime.settings import engine_option
from de3.server.settings import ORDER, OTHER_VARIABLES, SECRETS, Settings, unknown_variables, variable

if TYPE_CHECKING:
    from de3.model_store.store import Artifact

log = logging.getLogger("de3")


@add_parameters(Settings, variable=variable, order=ORDER)
def serve(
    context: typer.Context,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Models: names in the store, folders of models, folders or hub ids (id@revision) of Hugging Face "
            "classifiers, or .toml files of models with an upstream. The first answers requests that name none.",
        ),
    ] = None,
    demo: Annotated[bool, typer.Option("--demo", help="Serve the demo model, instead of a store.")] = False,
    quantize: Annotated[
        str, engine_option(help="Precision of Hugging Face classifiers: int8, or none for fp32.")
    ] = "int8",
    cache_gb: Annotated[
        float,
        engine_option(
            envvar="DE3_CACHE_GB",
            help="Size limit, in GB, of the cache of converted classifiers (in DE3_CACHE or ~/.cache/de3).",
            min=0,
        ),
    ] = 20.0,
    _: HelpAll = False,
    **values: Any,
) -> None:
    """Serve models over HTTP: POST /classify, GET /docs, /metrics, /ready.

    A Hugging Face classifier is served at full depth; de3 import gives it exits, which make it faster.

    Example: de3 serve my-org/my-classifier
    """
    from de3.model_store.store import NoModelsError
    from de3.runtime.upstream_settings import read_upstreams
    from de3.server import logs
    from de3.server.main import serve as run
    from de3.server.questions import read_questions

    logs.configure(values["log_format"])
    given = {name: value for name, value in values.items() if value is not None}
    if demo:
        from de3.library import DEMO

        source = context.get_parameter_source("store")
        if source is not None and source.name == "COMMANDLINE":
            raise ValueError("--demo: cannot be combined with --store; give one of them")
        given["store"], given["models"] = DEMO, given.get("models") or ["sst2"]
    for name in SECRETS:
        if (secret := os.environ.get(variable(name))) is not None:  # an empty one is not skipped but rejected
            given[name] = secret
    upstreams = [*read_upstreams(names or []), *read_questions(values["questions"]).upstreams]
    settings = Settings(**given, upstreams=upstreams)
    for name, similar in unknown_variables(os.environ).items():
        if similar is not None:  # ignoring a misspelled key file setting would leave the server open
            raise ValueError(f"{name}: unknown setting; did you mean {similar}?")
        hint = f"see de3 serve --help-all; {', '.join(OTHER_VARIABLES)} have other uses"
        log.warning("%s: unknown setting, ignored: %s", name, hint)
    try:
        run(settings, _artifacts(names or [], settings, quantize, cache_gb))
    except NoModelsError as error:
        raise ValueError(
            f"{error}, name another store with --store DIR, or serve the demo model with de3 serve --demo"
        ) from None


def _artifacts(names: list[str], settings: Settings, quantize: str, cache_gb: float) -> list["Artifact"]:
    """The artifacts with these names: models in the store, classifiers from folders or the hub, or .toml files.

    Raises ValueError if an option is invalid, or an artifact cannot be found or made.
    """
    precision_of(quantize)
    if not isfinite(cache_gb):
        raise ValueError(f"--cache-gb must be a number, got {cache_gb}")
    if not names:
        return []
    from de3.export.cache import cache_folder, evict
    from de3.library import artifact_of

    artifacts = [artifact_of(name, settings.store, quantize, settings.state_dir) for name in names]
    evict(cache_folder(), cache_gb)
    return artifacts
