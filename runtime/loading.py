"""Opens models, each with its rules, timing and monitor."""

from collections.abc import Callable

from de3.model_store.encoder import Encoders
from de3.model_store.manifest import Manifest
from de3.model_store.model import Model
from de3.model_store.store import Artifact, StoreError
from de3.native.network import Memory
from de3.runtime.engine.served import Served
from de3.runtime.engine.timing import Timing
from de3.runtime.errors import RequestError
from de3.runtime.ood import OodMonitor
from de3.runtime.rules import Rules
from de3.runtime.settings import RuntimeSettings


def by_depth(artifact: Artifact) -> int:
    """The order of loading: a model with fewer layers can share the encoder of one with more."""
    return -artifact.manifest.num_layers


def load(
    artifact: Artifact,
    settings: RuntimeSettings,
    check: Callable[[], None] = lambda: None,
    is_proved: bool = False,
    memory_of: Callable[[str], Memory | None] = lambda _: None,
    encoders: Encoders | None = None,
) -> Served:
    """Load a model and warm it up.

    check: called before each slow step; an exception from it aborts loading. is_proved, memory_of, encoders: see Model.
    Raises StoreError if the artifact is invalid or does not run, and ValueError if the model cannot meet the exit
    options in the settings.
    """
    manifest = artifact.manifest
    _check_upstream(manifest, settings)
    try:
        rules = Rules(manifest, settings)
    except RequestError as error:  # the error that a request with these options would get
        raise ValueError(f"a setting cannot be met: {error.message}") from None
    model = Model(artifact, settings.runtime, check, is_proved, memory_of, encoders, settings.special_tokens)
    try:
        return Served(model, Timing(model, check), rules, OodMonitor(manifest, settings.ood_policy))
    except StoreError:
        raise
    except Exception as error:  # onnxruntime raises its own classes, without a common base
        raise StoreError(f"{artifact.path}: loads, but does not run: {error}") from None


def _check_upstream(manifest: Manifest, settings: RuntimeSettings) -> None:
    """Raise ValueError unless the settings have the upstream of a model, if it has one."""
    known = {(of.name, of.hash) for of in settings.upstreams}
    if manifest.upstream is not None and (manifest.name, manifest.upstream) not in known:
        raise ValueError(
            f"{manifest.full_name} has an upstream, which is not the one in the .toml file of {manifest.name} that the "
            "server was started with"
        )
