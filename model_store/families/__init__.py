"""The encoder families. They share the interface in encoder.py, and other code uses only this interface."""

from typing import Annotated, Any, get_args

from pydantic import Field

from de3.model_store.families.bert import Bert, Electra, Roberta
from de3.model_store.families.deberta import Deberta
from de3.model_store.families.distilbert import DistilBert
from de3.model_store.families.encoder import Config, Encoder
from de3.model_store.families.modernbert import ModernBert
from de3.model_store.families.mpnet import MPNet

AnyEncoder = Annotated[
    Bert | Roberta | DistilBert | Electra | MPNet | Deberta | ModernBert, Field(discriminator="type")
]
FAMILIES: dict[str, type[Encoder]] = {
    name: kind
    for kind in get_args(get_args(AnyEncoder)[0])
    for name in get_args(kind.model_fields["type"].annotation)
}


def family(config: Config) -> type[Encoder]:
    """The family of the encoder in a configuration; raises ValueError if the encoder cannot be exported."""
    known = family_named(config.get("model_type"))
    known.check(config)
    return known


def family_named(name: Any) -> type[Encoder]:
    """The family of a transformers model type; raises ValueError if its encoders cannot be exported."""
    known = FAMILIES.get(name) if isinstance(name, str) else None
    if known is None:
        raise ValueError(
            f"encoders of type {name!r:.100} cannot be exported; supported: {', '.join(FAMILIES)}"
        )
    return known
