"""The configuration of a checkpoint, read from its config.json without PyTorch."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError, model_validator

from de3.model_store.families import family, family_named
from de3.model_store.families.encoder import Encoder
from de3.model_store.part import first_error
from de3.model_store.sizes import check_sizes, read_config

MODEL_TYPE = "de3-bert"
Layers = Annotated[list[int], Field(min_length=1)]


class CheckpointConfig(BaseModel):
    """The configuration of a checkpoint, with the fields and defaults of training.model.De3Config."""

    encoder: dict[str, Any]
    exit_layers: Layers = [0]  # replaced by 1…M if omitted
    pooling: Literal["mean", "cls"] = "mean"
    metric_dim: int | None = None
    last_prototypes: bool = False
    thresholds: list[float] | None = None
    gamma: float = 0.01
    max_tokens: int = 512
    input: Literal["text", "pair"] | None = None
    id2label: dict[int, str] = {0: "LABEL_0", 1: "LABEL_1"}

    @classmethod
    def of(cls, name: str, raw: Any) -> Self:
        """The configuration in `raw`, the parsed JSON of a config.json.

        Raises ValueError, whose message begins with `name`, if it is invalid.
        """
        if not isinstance(raw, dict) or not isinstance(raw.get("encoder"), dict):
            raise ValueError(f"{name}: its config.json is not that of a checkpoint from de3 train")
        check_sizes(name, raw)
        check_sizes(name, raw["encoder"])
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            wrong = first_error(error, "encoder")
            raise ValueError(f"{name}: its config.json has an invalid value: {wrong}") from None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        self.encoder = dict(family_named(self.encoder.get("model_type")).complete(self.encoder))
        if "exit_layers" not in self.model_fields_set:
            self.exit_layers = list(range(1, self.num_layers + 1))
        if sorted(self.id2label) != list(range(len(self.id2label))):
            raise ValueError(f"id2label must have the keys 0 to {len(self.id2label) - 1}")
        return self

    @property
    def family(self) -> type[Encoder]:
        """The model family of the encoder."""
        return family(self.encoder)

    @property
    def num_layers(self) -> int:
        """Number of encoder layers."""
        return self.family.of(self.encoder, False).num_layers

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return self.family.of(self.encoder, False).hidden_size

    @property
    def label_names(self) -> list[str]:
        """The label names in the order of the logits."""
        return [self.id2label[k] for k in range(len(self.id2label))]

    @property
    def prototype_layers(self) -> list[int]:
        """Layers of the exits with a prototype space: all exits but the last, or all with `last_prototypes`.

        Empty for multi-label models.
        """
        if self.thresholds is not None:
            return []
        return self.exit_layers if self.last_prototypes else self.exit_layers[:-1]


def model_type(folder: Path) -> str | None:
    """The model_type in a folder's config.json; None if the file or the field is missing.

    Raises ValueError if the file cannot be read, is too large, or is not JSON.
    """
    try:
        config = read_config(folder / "config.json")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{folder / 'config.json'}: cannot be read: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    return None if kind is None else str(kind)


def looks_like_path(name: str) -> bool:
    """True if a name is treated as a path, and not looked up on the Hugging Face hub, which could take minutes."""
    return (
        name.startswith((".", "/", "~"))
        or name.count("/") > 1
        or ("/" in name and Path(name).parent.is_dir())
    )
