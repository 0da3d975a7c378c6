"""The models that a server has loaded, by name."""

from dataclasses import dataclass

from model_store.model import Model
from model_store.store import Artifact, Store, StoreError
from server.errors import ApiError
from server.rules import Rules
from server.settings import Settings
from server.timing import Timing
from server.watch import Watch


def find(store: Store, wanted: list[str]) -> list[Artifact]:
    """The artifacts to serve, manifests checked: those wanted, or the newest of every model in the store."""
    names = wanted or list(store.versions())
    if not names:
        raise StoreError(f"{store.path} holds no model; make one with de3 export")
    return [store.open(name) for name in names]


# A shared call saves thread switches and trips to memory, but gives no way to more urgent texts.
TOGETHER_S = 0.004


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded model, how long it takes here, how its τ is chosen, and how its texts are watched."""

    model: Model
    timing: Timing
    rules: Rules
    watch: Watch

    @property
    def together_s(self) -> float:
        """Texts that are predicted to take no longer may share a call; 0: one a call."""
        return 0.0 if self.model.through is None else TOGETHER_S


def load(artifact: Artifact, settings: Settings) -> Served:
    """Load a model and warm it up, so that no request pays for first runs.

    Raises StoreError, or ValueError for a wish in the settings that the model cannot fulfil.
    """
    manifest = artifact.manifest
    try:
        rules = Rules(manifest, settings)
    except ApiError as error:  # as a request would be told that asked for it
        raise ValueError(f"a setting cannot be fulfilled: {error.message}") from None
    model = Model(artifact, settings.runtime)
    try:
        return Served(model, Timing(model), rules, Watch(manifest, settings.ood_policy))
    except Exception as error:  # onnxruntime raises its own classes, without a common base
        raise StoreError(f"{artifact.path}: loads, but does not run: {error}") from None


class Models:
    """Loaded models; the first is the one that answers a request that names none."""

    def __init__(self, served: list[Served]) -> None:
        self.all = served
        self._by_name: dict[str, Served] = {}
        for one in sorted(served, key=lambda s: s.model.manifest.version):
            self._by_name[one.model.manifest.name] = one  # the newest wins
            self._by_name[one.model.full_name] = one

    def get(self, name: str | None) -> Served:
        """The model of a request; raises ApiError 404 for one that is not served."""
        if name is None:
            return self.all[0]
        try:
            return self._by_name[name]
        except KeyError:
            raise unknown_model(name, [s.model.full_name for s in self.all]) from None


def unknown_model(name: str, served: list[str]) -> ApiError:
    """The answer to a name that is not served."""
    return ApiError(
        404,
        f"model: no model {name[:100]!r} is served; there are: {', '.join(served)}",
        "model",
        "unknown_model",
    )
