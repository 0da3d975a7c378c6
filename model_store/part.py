"""The base class of a manifest's parts, and limits on their values."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

# A manifest is untrusted. Without limits, a list of a million wrong entries would give a million errors.
MAX_LAYERS, MAX_LABELS = 100, 10_000
MAX_LABEL = 1000  # characters
MAX_INT = 2**31 - 1  # also the maximum file size in bytes: protobuf reads no larger file
MAX_TOKENS = 2**15
MAX_WIDTH = 2**16

Share = Annotated[float, Field(ge=0, le=1)]
Layer = Annotated[int, Field(ge=0, lt=MAX_LAYERS)]
Width = Annotated[int, Field(ge=1, le=MAX_WIDTH)]


class ManifestPart(BaseModel):
    """A part of a manifest: immutable; refuses unknown fields, infinities and NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, validate_by_name=True, serialize_by_alias=True
    )


def first_error(error: ValidationError, whole: str = "") -> str:
    """The first error, with its field, or with `whole` if it concerns more than one field."""
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(str(part)[:100] for part in first['loc']) or whole}: {first['msg']}"
