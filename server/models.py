"""The models that a server has loaded, by name."""

from model_store.model import Model
from model_store.store import Artifact, Store, StoreError
from server.errors import ApiError


def find(store: Store, wanted: list[str]) -> list[Artifact]:
    """The artifacts to serve, manifests checked: those wanted, or the newest of every model in the store."""
    names = wanted or list(store.versions())
    if not names:
        raise StoreError(f"{store.path} holds no model; make one with de3 export")
    return [store.open(name) for name in names]


class Models:
    """Loaded models; the first is the one that answers a request that names none."""

    def __init__(self, models: list[Model]) -> None:
        self.all = models
        self._by_name: dict[str, Model] = {}
        for model in sorted(models, key=lambda m: m.manifest.version):
            self._by_name[model.manifest.name] = model  # the newest wins
            self._by_name[model.full_name] = model

    def get(self, name: str | None) -> Model:
        """The model of a request; raises ApiError 404 for one that is not served."""
        if name is None:
            return self.all[0]
        try:
            return self._by_name[name]
        except KeyError:
            served = ", ".join(m.full_name for m in self.all)
            raise ApiError(
                404,
                f"model: no model {name[:100]!r} is served; there are: {served}",
                "model",
                "unknown_model",
            ) from None


def warm_up(model: Model) -> None:
    """Run every layer on a short and on the longest text, so that no request pays for first runs."""
    for text in ("warm", "warm " * model.manifest.max_tokens):
        model.full_depth(model.tokenize(text))
