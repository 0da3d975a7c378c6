"""The models that a server has loaded, by name."""

from dataclasses import dataclass

from model_store.model import Model
from model_store.store import Artifact, Store, StoreError
from server.errors import ApiError
from server.timing import Timing


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
    """A loaded model and how long it takes on this machine."""

    model: Model
    timing: Timing

    @property
    def together_s(self) -> float:
        """Texts that are predicted to take no longer may share a call; 0: one a call."""
        return 0.0 if self.model.through is None else TOGETHER_S


def load(artifact: Artifact, runtime: str) -> Served:
    """Load a model and warm it up, so that no request pays for first runs; raises StoreError."""
    model = Model(artifact, runtime)
    try:
        return Served(model, Timing(model))
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
            names = ", ".join(s.model.full_name for s in self.all)
            raise ApiError(
                404,
                f"model: no model {name[:100]!r} is served; there are: {names}",
                "model",
                "unknown_model",
            ) from None
