"""The options of a request that decide where its texts exit, and their JSON fields."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from de3.exits.signals import MAX_LAM, SIGNALS, check_name

MAX_BUDGET_MS = 60_000
MAX_THRESHOLDS = 10_000
THRESHOLD = "a number above 0 and below 1"
EXCLUSIVE = ("tau", "target_speedup", "latency_budget_ms", "max_disagreement", "max_missed")  # also settings
CALIBRATED = ("target_speedup", "max_disagreement", "max_missed")  # options that choose τ by the calibration
# Options that have an effect only with early exits.
NEED_AN_EXIT = (*EXCLUSIVE, "signal", "max_layer", "lam")


# How a text beyond the model's limit is read: up to the limit, in windows, or not at all.
Long = Literal["truncate", "windows", "error"]
# "may truncate": a client of a protocol asks to truncate texts, without a thought of guards, which do not obey it.
AskedLong = Long | Literal["may truncate"]


def long_of(truncate: object) -> AskedLong | None:
    """How long texts are read, by a protocol's option to truncate them; None if it is not given."""
    return None if truncate is None else "may truncate" if truncate else "error"


@dataclass(frozen=True, slots=True)
class ExitOptions:
    """The exit options of a request, which `OptionFields` describes; None: not set.

    Raises ValueError for options that cannot be combined.
    """

    tau: float | None = None
    signal: str | None = None
    lam: float | None = None
    max_layer: int | None = None
    target_speedup: float | None = None
    latency_budget_ms: float | None = None
    max_disagreement: float | None = None
    max_missed: float | None = None
    best_effort: bool = False
    thresholds: float | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        is_entropy = self.lam == 0 and self.signal == "entropy"  # λ = 0 is entropy
        if self.lam is not None and self.signal not in (None, "edr") and not is_entropy:
            raise ValueError(f"lambda: is only valid with the signal edr, not with {self.signal}")
        asked = [name for name in EXCLUSIVE if getattr(self, name) is not None]
        if not asked:
            return
        if len(asked) > 1:
            raise ValueError(
                f"{asked[1]}: cannot be combined with {asked[0]}; give one of {', '.join(EXCLUSIVE)}"
            )
        if self.thresholds is not None and asked[0] in CALIBRATED:
            raise ValueError(
                f"thresholds: cannot be combined with {asked[0]}, which was calibrated with the model's own thresholds"
            )
        if asked != ["tau"] and self.max_layer is not None:
            raise ValueError(f"max_layer: is only valid with tau, not with {asked[0]}")


NO_OPTIONS = ExitOptions()


def _thresholds(value: Any) -> Any:
    """The value, if it is a threshold, an object of thresholds, or None; raises ValueError at the first invalid one."""
    if isinstance(value, dict):
        if len(value) > MAX_THRESHOLDS:
            raise ValueError(f"has {len(value)} labels; at most {MAX_THRESHOLDS} are allowed")
        for name, one in value.items():
            if not _is_threshold(one):
                raise ValueError(f"[{name[:100]!r}]: must be {THRESHOLD}")
    elif value is not None and not _is_threshold(value):
        raise ValueError(f"must be {THRESHOLD}, or an object of such numbers by label")
    return value


def _is_threshold(value: Any) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and 0 < value < 1


def _signal(value: Any) -> str:
    return check_name(value if isinstance(value, str) else "")


Threshold = Annotated[float, Field(gt=0, lt=1)]
SignalName = Annotated[
    str, BeforeValidator(_signal), Field(json_schema_extra=lambda schema: schema.update(enum=[*SIGNALS]))
]


class OptionFields(BaseModel):
    """The exit options, which are the same in the JSON of every protocol."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    tau: float | None = Field(
        None, ge=0, le=1, description="exit at the first layer whose score is below tau; 0: never exit early"
    )
    signal: SignalName | None = Field(
        None,
        description=f"signal compared with tau: {', '.join(SIGNALS)} (see docs/signals.md); default: the model's",
    )
    lam: float | None = Field(
        None,
        ge=0,
        le=MAX_LAM,
        alias="lambda",
        description="for the signal edr: weight of the distance ratio against entropy; 0: entropy alone",
    )
    max_layer: int | None = Field(None, ge=0, description="deepest layer to run")
    target_speedup: float | None = Field(
        None, ge=1, description="instead of tau: the mean speed-up over full depth, by the calibration"
    )
    latency_budget_ms: float | None = Field(
        None,
        gt=0,
        le=MAX_BUDGET_MS,
        description="instead of tau: answer within this time, at the deepest exit reached by then",
    )
    best_effort: bool = Field(
        False, description="with a budget that cannot be met: answer at the first exit instead of 503"
    )
    max_disagreement: float | None = Field(
        None,
        ge=0,
        le=1,
        description="instead of tau: maximum rate of answers that differ from full depth, at 95% confidence",
    )
    max_missed: float | None = Field(
        None,
        ge=0,
        le=1,
        description="instead of tau: maximum share of the texts that full depth flags that exit early as safe, at 95% "
        "confidence, for a model that was calibrated with a flag",
    )

    thresholds: Annotated[
        float | dict[str, float] | None,
        BeforeValidator(_thresholds, json_schema_input_type=Threshold | dict[str, Threshold] | None),
    ] = Field(
        None,
        description="for a multi-label model: probability above which a label is assigned, for all labels or by name",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "OptionFields":
        _ = self.options
        return self

    @cached_property
    def options(self) -> ExitOptions:
        """The exit options in these fields; raises ValueError for options that cannot be combined."""
        if self.model_fields_set.isdisjoint(OPTION_NAMES):
            return NO_OPTIONS
        return ExitOptions(**{name: getattr(self, name) for name in OPTION_NAMES})


OPTION_NAMES = frozenset(OptionFields.model_fields)
