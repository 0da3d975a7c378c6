"""The manifest of an artifact: its model, calibration and export, and the hash of every file."""

import hashlib
import re
from bisect import bisect_right
from functools import lru_cache
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from de3.exits import placement
from de3.exits.criteria import MISSED_LIMITS
from de3.exits.kinds import Kind, Spans, kind_of_text
from de3.exits.reading import Weights
from de3.exits.recorded import MAX_TOLERANCE, MIN_TOLERANCE
from de3.exits.reference import LEVELS, is_ascending
from de3.exits.signals import FEATURES, Entropy, ModelTraits, Risk, Signal, check_name, signal_of
from de3.exits.spans import Aggregation, SpanRule
from de3.model_store.architecture import Architecture
from de3.model_store.part import MAX_INT, MAX_LABELS, MAX_LAYERS, MAX_WIDTH, Layer, ManifestPart, Share

SCHEMA_VERSION: Literal[7] = 7
OLD_VERSION: Literal[6] = 6  # its exits are in its segments

EXITS, PROTOTYPES, TOKENIZER = "exits.safetensors", "prototypes.safetensors", "tokenizer.json"
FITTED = "fitted.safetensors"

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
VERSION = re.compile(r"[1-9][0-9]{0,8}")
LEARNED_FROM = 1_000_000  # numbers of learned versions start here, so that they differ from those in a store

MAX_ROWS = 5000
MAX_ATTEMPTS = 10**8  # number of fits of exits to live traffic

Count = Annotated[int, Field(ge=1, le=MAX_INT)]
Threshold = Annotated[float, Field(gt=0, lt=1)]
SignalName = Annotated[str, AfterValidator(check_name)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(ManifestPart):
    """Hash and size of one file."""

    sha256: Sha256
    bytes: int = Field(ge=0, le=MAX_INT)


class _Signal(ManifestPart):
    """A signal, whose score is compared with τ, and its λ if it is edr."""

    signal: SignalName
    # λ is `lambda` in JSON and `lam` in Python, where lambda is a keyword.
    lam: Annotated[Annotated[float, Field(ge=0, le=100)] | None, Field(alias="lambda")] = None

    @model_validator(mode="after")
    def _has_lambda(self) -> Self:
        if (self.signal == "edr") != bool(self.lam):
            raise ValueError("lambda must be above 0 for the signal edr, and null for other signals")
        return self


class Defaults(_Signal):
    """The exit rule for requests that do not set one."""

    tau: Share


class TradeOff(_Signal):
    """Accuracy and cost of one signal and τ on the certifying samples.

    Attributes:
        accuracy: share of correct answers; `accuracy_interval` is its 95% Wilson interval.
        loss: accuracy at full depth minus accuracy; `loss_interval` is its paired 95% interval.
        disagreement: share of answers that differ from full depth; `disagreement_bound` is an upper bound on
            the true rate with 95% confidence (exits.bound; 98% if `cross_fitted`).
        speedup: num_layers / mean exit layer, at most 1000.
        histogram: share of samples at each exit, in the order of `exit_layers`.
    """

    tau: Share
    accuracy: Share
    accuracy_interval: tuple[Share, Share]
    loss: float
    loss_interval: tuple[float, float]
    disagreement: Share
    disagreement_bound: Share
    mean_exit_layer: float = Field(ge=0)
    speedup: float = Field(ge=0)
    histogram: list[Share] = Field(max_length=MAX_LAYERS)


class RiskWeights(ManifestPart):
    """Weights of exits.signals.Risk at one exit: those of its features, and of the state, if it weighs that."""

    layer: Layer
    weights: list[Annotated[float, Field(ge=-1e6, le=1e6)]] = Field(
        min_length=FEATURES, max_length=FEATURES + MAX_WIDTH, fail_fast=True
    )


class Reference(ManifestPart):
    """Distribution of the certifying samples' signals at one exit, as quantiles at exits.reference.LEVELS.

    Attributes:
        entropy: None in a regression model.
        distance_ratio: None at an exit without prototypes.
        nearest: distance to the nearest prototype; None at an exit without prototypes.
    """

    layer: Layer
    entropy: list[float] | None
    distance_ratio: list[float] | None
    nearest: list[float] | None

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        for name in ("entropy", "distance_ratio", "nearest"):
            values = getattr(self, name)
            if values is not None and not is_ascending(values):
                raise ValueError(f"{name} must have {len(LEVELS)} ascending values")
        return self


class Calibration(ManifestPart):
    """The choice of the defaults, and the accuracy and cost of every certified signal.

    Attributes:
        tune_size: number of tuning samples, which determine the signal.
        certify_size: number of certifying samples, from which all results are computed.
        groups: number of groups of related samples among the certifying ones.
        cross_fitted: true if the certifying samples were also fitted to: each is scored by exits and a risk that were
            fitted without it.
        max_loss: largest accuracy loss allowed at the default τ, as a fraction.
        self_labelled: true if the labels are the original model's answers, or full depth's if `original_disagreement`
            is None. Accuracy is then agreement with those answers.
        original_disagreement: share of samples on which full depth differs from the original model (before
            quantization or fine-tuning). If it is set, every disagreement is counted against the original.
        exit_accuracy: accuracy of each exit on all certifying samples, in the order of `exit_layers`.
        default: trade-off of the defaults.
        table: trade-offs of every certified signal.
        references: one entry per exit.
        tokens: quantiles of the certifying samples' lengths in tokens, at exits.reference.LEVELS; None if unknown.
    """

    tune_size: Count
    certify_size: Count
    groups: Count
    cross_fitted: bool = False
    max_loss: float
    self_labelled: bool = False
    original_disagreement: Share | None = None
    exit_accuracy: list[Share] = Field(max_length=MAX_LAYERS)
    default: TradeOff
    table: list[TradeOff] = Field(max_length=MAX_ROWS)
    references: list[Reference] = Field(max_length=MAX_LAYERS)
    tokens: list[float] | None = None

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if self.tokens is not None and not is_ascending(self.tokens):
            raise ValueError(f"tokens must have {len(LEVELS)} ascending values")
        return self


class Missed(ManifestPart):
    """What a calibration says about the flagged texts that early exits miss, for the default signal.

    Attributes:
        labels, threshold, is_below: the flag by the names of labels; see de3.runtime.flags.Wanted.
        flagged: number of independent certifying samples that full depth flags.
        taus: ascending from 0.
        bounds: by τ, the upper bound on the true rate with 95% confidence (exits.bound).
    """

    labels: list[str] = Field(max_length=MAX_LABELS)
    threshold: float | None
    is_below: bool
    flagged: int = Field(ge=0, le=MAX_INT)
    taus: list[Share] = Field(min_length=1, max_length=MAX_ROWS)
    bounds: list[Share] = Field(min_length=1, max_length=MAX_ROWS)

    def row_within(self, most: float) -> int:
        """The index of the largest τ at which at most this share is missed, as certified."""
        return bisect_right(self.bounds, most) - 1

    @property
    def limit(self) -> float | None:
        """The first of MISSED_LIMITS that is certified for a τ above 0; None if there is none."""
        return next((limit for limit in MISSED_LIMITS if self.row_within(limit)), None)

    @property
    def uncertified(self) -> "Missed":
        """The flag alone, for other exits or another calibration: only τ = 0 misses nothing."""
        return self.model_copy(update={"flagged": 0, "taus": [0.0], "bounds": [0.0]})

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.taus) != len(self.bounds) or self.taus[0] != 0 or self.bounds[0] != 0:
            raise ValueError("missed needs a bound for each τ, and begins with 0 and 0")
        if any(a >= b for a, b in pairwise(self.taus)) or any(a > b for a, b in pairwise(self.bounds)):
            raise ValueError("missed needs ascending values of τ, and bounds that do not decrease")
        return self


class Learned(ManifestPart):
    """Origin of exits that were fitted to records of live traffic.

    Attributes:
        base: hash of the model that the exits were fitted for; see `base_of`.
        attempt: number of the fit, from 1. A guarantee divides its error probability among the attempts.
        records: number of records that the fit used, including held-out ones.
        cut: position in the traffic of the last text that the fit could read: only later ones are evidence about the
            exits. None in versions of earlier releases.
    """

    base: Sha256
    attempt: Annotated[int, Field(ge=1, le=MAX_ATTEMPTS)]
    records: Count
    cut: Annotated[int, Field(ge=0, le=2**53)] | None = None


@lru_cache(maxsize=64)  # a property of the manifest that is cached would be copied with it, to other labels
def _kind_of(
    labels: tuple[str, ...],
    aggregation: Aggregation | None,
    thresholds: tuple[float, ...] | None,
    tolerance: float | None,
) -> Kind:
    if aggregation is not None:
        return Spans(SpanRule(labels, aggregation))
    return kind_of_text(thresholds, tolerance)


class Manifest(Architecture):
    """manifest.json of an artifact.

    Attributes:
        thresholds: probability above which a multi-label model assigns each label; None for other models.
        tolerance: for a regression model, the largest difference between answers that count as equal, in the model's
            units. Such a model has one label, the name of its value, and only the signal risk. None for other models.
        source: hub id or folder of the stock classifier that was converted unchanged; None for other models.
        input: the kind of texts that the model was trained on; if None, it is unknown, and the model takes both kinds.
        learned: origin of exits that were fitted to live traffic (`de3 serve --learn`); None for other exits.
        aggregation: how a token classifier's spans are made, unless a request says otherwise; None for other models.
        upstream: hash of another service whose answers are the model's full depth, after the last layer (see
            runtime.upstream); None: full depth is the last layer.
        risk: weights of the signal risk, for every exit but the last, or for every exit if there is an upstream; None
            if the model does not have this signal.
        missed: the certificate of missed texts, if the calibration had a flag.
        label_risk: for every exit, weights that estimate the probability that its answer differs from the text's
            label; an upstream gives labels, too. None if unknown.
        export: results of the export's checks: parity with PyTorch, unless the weights are those of an unchanged
            stock classifier; for int8, the accuracy by exit in fp32 and int8, and the share of samples with the same
            exit and answer. Empty without such checks.
    """

    schema_version: Literal[6, 7]
    name: str = Field(pattern=f"^{NAME.pattern}$")
    version: int = Field(ge=1, le=999_999_999)
    created: int = Field(ge=0, lt=2**40, description="Unix time, seconds")
    thresholds: Annotated[list[Threshold], Field(max_length=MAX_LABELS)] | None = None
    tolerance: Annotated[float, Field(ge=MIN_TOLERANCE, le=MAX_TOLERANCE)] | None = None
    source: Annotated[str, Field(max_length=200)] | None = None
    input: Literal["text", "pair"] | None = None
    learned: Learned | None = None
    aggregation: Aggregation | None = None
    upstream: Sha256 | None = None
    defaults: Defaults
    risk: Annotated[list[RiskWeights], Field(max_length=MAX_LAYERS)] | None = None
    label_risk: Annotated[list[RiskWeights], Field(max_length=MAX_LAYERS)] | None = None
    missed: Missed | None = None
    calibration: Calibration | None
    export: dict[str, Any]
    files: dict[str, FileEntry] = Field(max_length=2 * MAX_LAYERS)

    @property
    def full_name(self) -> str:
        """The name and version, as name:version."""
        return f"{self.name}:{self.version}"

    @property
    def exit_cost(self) -> float:
        """About how long an exit takes, in layers."""
        encoder, labels = self.encoder, len(self.labels)
        return placement.exit_cost(
            encoder.hidden_size, encoder.inner, labels, self.metric_dim or 0, self.is_spans
        )

    @property
    def exit_costs(self) -> list[int]:
        """Cost of an answer at each exit, and at full depth: layers or, with an upstream, calls.

        With an upstream, they have one more entry than `exit_layers`.
        """
        return self.exit_layers if self.upstream is None else [*([0] * len(self.exit_layers)), 1]

    @property
    def num_states(self) -> int:
        """Number of layers, from layer 0 on, whose states exits are fitted to: all below full depth."""
        return self.num_layers + (self.upstream is not None)

    @property
    def architecture(self) -> Architecture:
        """The fields that determine the segments' graphs."""
        return Architecture.model_validate({name: getattr(self, name) for name in Architecture.model_fields})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_kind()
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        required = self.required_files()
        if extra := self.files.keys() - {*required, "README.md"}:  # so no path leads out of the folder
            raise ValueError(f"files must not contain {min(extra)!r}")
        if missing := [name for name in required if name not in self.files]:
            raise ValueError(f"files must include {missing[0]!r}")
        return self

    def _check_kind(self) -> None:
        """Raise ValueError unless labels, thresholds, tolerance and prototypes belong to the same kind of model."""
        if (len(self.labels) == 1) != (self.tolerance is not None):
            raise ValueError("labels must be two or more, or exactly one if there is a tolerance")
        if self.tolerance is not None and self.thresholds is not None:
            raise ValueError("thresholds and tolerance must not both be set")
        if self.thresholds is not None and len(self.thresholds) != len(self.labels):
            raise ValueError("thresholds must have one entry for each label")
        if self.upstream is not None and not (self.thresholds is None and self.tolerance is None):
            raise ValueError("upstream needs a model with mutually exclusive classes")
        if self.is_spans != (self.aggregation is not None):
            raise ValueError("aggregation must be set if, and only if, pooling is none")
        if self.is_spans:
            if (self.thresholds, self.tolerance, self.upstream) != (None, None, None):
                raise ValueError("thresholds, tolerance and upstream must be null in a token classifier")
        elif self.tolerance is None and self.thresholds is None:
            if self.prototype_layers not in (self.exit_layers, self.exit_layers[:-1]):
                raise ValueError("prototype_layers must be the exit layers, with or without the last")
        elif self.prototype_layers:
            kind = "multi-label" if self.tolerance is None else "regression"
            raise ValueError(f"prototype_layers must be empty in a {kind} model")

    @model_validator(mode="after")
    def _calibrated(self) -> Self:
        exits = self.exit_layers
        references = self.calibration.references if self.calibration else []
        if self.calibration and [r.layer for r in references] != exits:
            raise ValueError("calibration.references must have one entry for each exit layer")
        if any((r.nearest is None) == (r.layer in self.prototype_layers) for r in references):
            raise ValueError(
                "calibration.references: nearest must be set at the exits with prototypes, and only there"
            )
        if any((r.entropy is None) == self.has_classes for r in references):
            raise ValueError("calibration.references: entropy must be set if, and only if, there are classes")
        self._check_risk()
        signals = self.trade_offs()
        traits = self.traits
        for key in signals:
            signal_of(*key, traits)  # raises ValueError
        _ = self.default_signal
        if self.calibration and (self.defaults.signal, self.defaults.lam) not in signals:
            raise ValueError("calibration.table must have rows of the default signal")
        for rows in signals.values():
            if rows[0].tau != 0:
                raise ValueError("calibration.table must have τ = 0 for every signal")
            if any(
                b.speedup < a.speedup or b.disagreement_bound < a.disagreement_bound
                for a, b in pairwise(rows)
            ):
                raise ValueError("calibration.table: speedup and disagreement_bound must ascend with τ")
        return self

    def _check_risk(self) -> None:
        """Raise ValueError unless risk and label_risk have entries and weights that belong to the exits."""
        exits = self.exit_layers
        risk = None if self.risk is None else [r.layer for r in self.risk]
        if risk not in (None, exits[:-1]) and not (self.upstream and risk == exits):
            raise ValueError("risk must have one entry for each exit layer but the last")
        if self.label_risk is not None and [r.layer for r in self.label_risk] != exits:
            raise ValueError("label_risk must have one entry for each exit layer")
        if any(
            len(r.weights) not in (FEATURES, FEATURES + self.kind.sees_state * self.hidden_size)
            for r in self.risk or []
        ):
            raise ValueError(
                f"risk must have {FEATURES} weights for each exit or, with exclusive classes, {self.hidden_size} more"
            )
        if any(len(r.weights) != FEATURES for r in self.label_risk or []):
            raise ValueError(f"label_risk must have {FEATURES} weights for each exit")
        if self.tolerance is not None and any(w != 0 for r in self.risk or [] for w in r.weights[3:]):
            raise ValueError("risk: the last two weights must be 0 in a regression model")
        weights = [*(self.risk or []), *(self.label_risk or [])]
        if not self.is_spans and any(
            r.weights[FEATURES - 1] != 0 for r in weights if r.layer not in self.prototype_layers
        ):
            raise ValueError("risk: the weight of log DR must be 0 at an exit without prototypes")

    def trade_offs(self) -> dict[tuple[str, float | None], list[TradeOff]]:
        """Rows of the calibration by signal and λ, each by ascending τ; only certified signals have rows."""
        rows_of: dict[tuple[str, float | None], list[TradeOff]] = {}
        for row in sorted(self.calibration.table if self.calibration else [], key=lambda r: r.tau):
            rows_of.setdefault((row.signal, row.lam), []).append(row)
        return rows_of

    @property
    def traits(self) -> ModelTraits:
        """The properties that determine which signals the model has."""
        weights: list[Weights | None] = [None] * (self.num_layers + 1)
        for row in self.risk or []:
            weights[row.layer] = tuple(row.weights)
        return ModelTraits(
            name=self.full_name,
            kind=self.kind,
            risk=None if self.risk is None else tuple(weights),
        )

    def signal(self, name: str, lam: float | None = None) -> Signal:
        """A signal of this model; raises ValueError if the model has no such signal, or if λ is invalid."""
        return signal_of(name, lam, self.traits)

    @property
    def default_signal(self) -> Signal:
        """The signal of the default exit rule."""
        if self.defaults.tau == 0 and self.defaults.signal == "entropy":
            # The default of an export without calibration, for any kind of model: at τ = 0 it has no effect.
            return Entropy() if self.has_classes else Risk((None,) * (self.num_layers + 1))
        return self.signal(self.defaults.signal, self.defaults.lam)

    @property
    def kind(self) -> Kind:
        """What an answer is, without a request's options."""
        labels = () if self.aggregation is None else tuple(self.labels)
        thresholds = None if self.thresholds is None else tuple(self.thresholds)
        return _kind_of(labels, self.aggregation, thresholds, self.tolerance)

    @property
    def has_classes(self) -> bool:
        """True if an answer is a class or several labels, not a value or spans."""
        return self.tolerance is None and self.aggregation is None

    def required_files(self) -> list[str]:
        """Files that the artifact must have."""
        exits = [] if self.has_old_exits else [EXITS]
        is_learned = self.learned is not None and self.learned.cut is not None
        fitted = [FITTED] if is_learned or FITTED in self.files else []
        return [*self.segment_files(), *exits, PROTOTYPES, TOKENIZER, *fitted]

    @property
    def has_old_exits(self) -> bool:
        """True if the exits' weights are in the segments, as in schema 6."""
        return self.schema_version == OLD_VERSION


def encoder_hashes(manifest: Manifest) -> list[str]:
    """For each layer, a hash of the encoder up to it, with its tokenizer, maximum length and precision.

    The last identifies the encoder. A model with fewer layers can run on another's encoder if its last hash is among
    the other's hashes.
    """
    hashes: list[str] = []
    for layer, name in enumerate(manifest.segment_files()):
        start = f"{manifest.files[TOKENIZER].sha256} {manifest.max_tokens} {manifest.has_old_exits}"
        start += " special tokens" if manifest.special_tokens else ""
        before = hashes[-1] if hashes else start
        encoder = manifest.encoder.up_to(layer).model_dump_json()
        parts = (before, manifest.precision, encoder, manifest.files[name].sha256)
        hashes.append(hashlib.sha256(" ".join(parts).encode()).hexdigest())
    return hashes


def base_of(manifest: Manifest) -> str:
    """Hash that identifies a model's weights and tokenizer; versions with exits learned for the model share it."""
    if manifest.learned is not None:
        return manifest.learned.base
    exits = [] if manifest.has_old_exits else [EXITS]
    files = [manifest.files[name].sha256 for name in (*manifest.segment_files(), *exits, TOKENIZER)]
    files += [] if manifest.upstream is None else [manifest.upstream]
    files += ["special tokens"] if manifest.special_tokens else []
    return hashlib.sha256("".join(files).encode()).hexdigest()


def unset_fields(manifest: Manifest) -> set[str]:
    """The fields that are left out while they have their default, because earlier releases did not have them."""
    return {
        name
        for name in ("upstream", "label_risk", "aggregation", "missed", "special_tokens")
        if not getattr(manifest, name)
    }


def fingerprint(manifest: Manifest) -> str:
    """Hash of a manifest; identifies the model's files, as the manifest has the hash of each."""
    unset = unset_fields(manifest) | ({"learned"} if manifest.learned is None else set())
    return hashlib.sha256(manifest.model_dump_json(exclude=unset).encode()).hexdigest()
