"""Which model answers a question, and how: what a file binds (`de3 serve --questions`), and what labels fit."""

import logging
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isclose
from pathlib import Path
from typing import Annotated, Any, NoReturn, Self

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from de3.exits.flags import Flag
from de3.exits.kinds import Classes, Labels, Value
from de3.exits.reading import ClassReading, LabelsReading, Reading, ValueReading, sigmoid
from de3.model_store.manifest import Manifest
from de3.runtime.errors import RequestError
from de3.runtime.flags import DEFAULT_THRESHOLD, Wanted, flag_of
from de3.runtime.questions import MAX_OPTIONS, Kind, Option, Question
from de3.runtime.upstream_settings import Upstream, UpstreamOf, checked_file

log = logging.getLogger("de3")
CLIENTS_THRESHOLD = 0.7  # of LiteLLM's checks: a client compares a probability with it, and does not send it
MAX_NAMED = 20  # questions or labels in a message
MAX_NAME = 1000  # characters
UPSTREAM = "questions"  # the name of the decision server, in metrics and messages


class BoundOption(BaseModel):
    """A choice or a level in the file.

    Attributes:
        value: of a choice, or the label of a level.
        means: the model's label or, for a level of a regression model, its value; None: the label of this name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    value: str | bool = Field(validation_alias=AliasChoices("value", "label"))
    description: Any = None
    means: str | float | None = Field(None, alias="is")


class Binding(BaseModel):
    """A question in the file, and the model that answers it.

    Attributes:
        name: requests to /v1/decisions whose question has this name ask it. Other requests ask it if they have its
            instructions and options.
        criteria: of a predicate, what true and false mean, as in /v1/systemone.
        labels: of a predicate, the model's labels; None: those of its flag.
        threshold: of a predicate, the probability with which the client compares.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    type: Kind
    model: str = Field(min_length=1, max_length=500)
    name: str | None = Field(None, min_length=1, max_length=MAX_NAME)
    instructions: Any = None
    criteria: dict[str, Any] = Field({}, max_length=2)
    choices: list[str | bool | BoundOption] = Field([], max_length=MAX_OPTIONS)
    levels: list[str | BoundOption] = Field([], max_length=10)
    labels: list[str] | None = Field(None, min_length=1)
    threshold: Annotated[float, Field(gt=0, lt=1)] = CLIENTS_THRESHOLD

    @model_validator(mode="after")
    def _check(self) -> Self:
        own = {"predicate": "criteria", "choice": "choices", "score": "levels"}[self.type]
        if self.name is None and self.instructions is None and not getattr(self, own):
            raise ValueError("name: is required for a question without instructions and options")
        if surplus := [one for one in ("criteria", "choices", "levels") if one != own and getattr(self, one)]:
            raise ValueError(f"{surplus[0]}: a {self.type} has {own}")
        if self.type != "predicate" and (self.labels or "threshold" in self.model_fields_set):
            raise ValueError(f"labels, threshold: only a predicate has them, not a {self.type}")
        if self.criteria.keys() - {"true", "false"}:
            raise ValueError("criteria: must have true, false or both")
        if len(self.meanings) < len(self.choices or self.levels):
            raise ValueError(f"{own}: two are the same")
        return self

    @cached_property
    def question(self) -> Question:
        """The question as it is asked."""
        if self.type == "predicate":
            options = [
                Option(key == "true", means) for key, means in self.criteria.items() if means is not None
            ]
        else:
            options = [_option(one) for one in [*self.choices, *self.levels]]
        return Question(self.type, self.instructions, options, self.name)

    @cached_property
    def meanings(self) -> dict[str, str | float | None]:
        """What the options mean, by `_typed`; see BoundOption."""
        given = [*self.choices, *self.levels]
        return {_typed(_option(one)): one.means if isinstance(one, BoundOption) else None for one in given}


def _option(one: str | bool | BoundOption) -> Option:
    return Option(one.value, one.description) if isinstance(one, BoundOption) else Option(one)


def _typed(option: Option) -> str:
    """Tells true from "true"."""
    return f"{type(option.value).__name__} {option.key}"


class QuestionsFile(BaseModel):
    """The file.

    Attributes:
        upstream: a decision server, which answers questions that no model is bound to.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    questions: list[Binding] = Field([], max_length=10_000)
    upstream: Upstream | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        one = self.upstream
        if not self.questions and one is None:
            raise ValueError("it has neither questions nor upstream")
        if one is not None and (
            one.form is None or one.prompt is not None or one.criteria or one.ask != "choice"
        ):
            raise ValueError(
                "upstream.kind: must be decisions or systemone, without prompt, criteria and ask"
            )
        return self


class Questions:
    """The questions that are bound to models.

    Attributes:
        upstreams: that of the file, if it has one.
        forms: kept for parsers: questions as clients send them, and what they ask.
    """

    def __init__(self, bindings: Sequence[Binding] = (), upstream: Upstream | None = None) -> None:
        """Raises ValueError for two bindings of one question."""
        self.bindings, self.forms = bindings, dict[str, Any]()
        self.upstreams = [] if upstream is None else [UpstreamOf(name=UPSTREAM, upstream=upstream)]
        self._by_name: dict[str | None, Binding] = {one.name: one for one in bindings if one.name is not None}
        self._by_identity = {one.question.identity: one for one in bindings if _has_content(one)}
        for i, one in enumerate(bindings):
            if one not in (self._by_name.get(one.name), None) and one.name is not None:
                raise ValueError(f"questions.{i}.name: another question has the name {one.name!r}, too")
            if _has_content(one) and self._by_identity[one.question.identity] is not one:
                raise ValueError(f"questions.{i}: another one has these instructions and options, too")

    def of(self, question: Question) -> Binding | None:
        """The binding of a question: that of its name or, without one, of what it asks; None if it has none.

        Raises RequestError if a question of another type has its name.
        """
        found = None if question.name is None else self._by_name.get(question.name)
        if found is not None and found.type != question.kind:
            _refuse(f"{question.where}.type", f"{found.name!r} is a {found.type} on this server")
        return found or self._by_identity.get(question.identity)

    def shown(self) -> str:
        """The bound questions, for a message."""
        some = [
            f"{b.type} {str(b.name or b.instructions or '')[:50]!r} ({b.model})"
            for b in self.bindings[:MAX_NAMED]
        ]
        return ", ".join([*some, *["…"] * (len(self.bindings) > MAX_NAMED)]) or "none"

    def check(self, manifests: Mapping[str, tuple[Manifest, Wanted | None]]) -> None:
        """Raise ValueError for a binding to a model that is not served, or that cannot answer; warn of slow ones.

        manifests: with their flags, by each name under which they are served.
        """
        for i, one in enumerate(self.bindings):
            if one.model not in manifests:
                raise ValueError(
                    f"questions.{i}.model: {one.model} is not served; served are {', '.join(sorted(manifests))}"
                )
            manifest, own = manifests[one.model]
            try:
                source = source_of(one.question, one, manifest, own)
            except RequestError as error:
                raise ValueError(f"questions.{i}: {error.message.removeprefix('.')}") from None
            if not source.keeps and len(manifest.exit_layers) > 1:
                fix = (
                    f"; to exit early, serve it with --flag {manifest.name}={source.wanted}"
                    if source.wanted
                    else ""
                )
                log.warning(
                    "questions.%d: %s answers it at full depth, as its exits are for other answers%s",
                    *(i, manifest.name, fix),
                )


def _has_content(one: Binding) -> bool:
    return one.instructions is not None or bool(one.question.options)


def read_questions(path: Path | None) -> Questions:
    """The questions in a .toml file; raises ValueError, which names the file and the field, and OSError."""
    if path is None:
        return Questions()
    found = checked_file(path, QuestionsFile)
    try:
        return Questions(found.questions, found.upstream)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


@dataclass(frozen=True, slots=True)
class Source:
    """How a model answers a question.

    Attributes:
        labels: of a choice or a score, the number of each option's label.
        points: of a score by a regression model, the value of each level, ascending.
        flag: of a predicate, what it asks about.
        wanted: the flag that the request needs for it; None: the model's own, if it has one.
        keeps: what is promised of early exits holds for this question: its answer differs only if the model's does. If
            false, all layers run.
    """

    labels: Sequence[int] = ()
    points: Sequence[float] = ()
    flag: Flag | None = None
    wanted: Wanted | None = None
    keeps: bool = True

    def probabilities(self, reading: Reading) -> list[float]:
        """The probability of a predicate, or of each option."""
        if isinstance(reading, ValueReading):
            return _between(reading.value, self.points)
        assert isinstance(reading, ClassReading | LabelsReading)
        if self.flag is not None:
            return [min(1.0, self.flag.prob(reading))]
        return [reading.probs[k] for k in self.labels]


def _between(value: float, points: Sequence[float]) -> list[float]:
    """Probabilities of points, so that their mean is the value, which is clamped; only the two nearest have any."""
    value = min(max(value, points[0]), points[-1])
    right = min(bisect_right(points, value), len(points) - 1)
    share = (value - points[right - 1]) / (points[right] - points[right - 1])
    probs = [0.0] * len(points)
    probs[right - 1], probs[right] = 1.0 - share, share
    return probs


def _refuse(where: str, problem: str) -> NoReturn:
    raise RequestError(f"{where}: {problem}", where)


def source_of(question: Question, binding: Binding, manifest: Manifest, own: Wanted | None) -> Source:
    """How a model answers a bound question; raises RequestError if it cannot. own: the model's flag."""
    if question.kind == "predicate":
        return _predicate(question, binding.labels, binding.threshold, manifest, own)
    if question.kind == "score" and isinstance(manifest.kind, Value):
        return _points(question, binding)
    means = {key: means for key, means in binding.meanings.items() if means is not None}
    names = [str(means.get(_typed(one), one.key)) for one in question.options]
    source = _labels(question, names, manifest, own)
    if source is None:
        field = "choices" if question.kind == "choice" else "levels"
        some = ", ".join(manifest.labels[:MAX_NAMED])
        _refuse(
            f"{question.where}.{field}",
            f"must be the labels of {manifest.name}, each once: {some}; where names differ, the file says which label "
            "an option is",
        )
    return source


def fitting(question: Question, manifest: Manifest, own: Wanted | None) -> Source | None:
    """How a model answers a question that no file binds, by its labels; None if it does not fit. See rows_of."""
    if question.kind == "predicate":
        wanted = _named(question.name, manifest, own) or _named(question.instructions, manifest, own)
        if wanted is not None:
            (least,) = {*flag_of(wanted, manifest, manifest.kind).thresholds}
            return _predicate(question, wanted.labels, least, manifest, own)
    if question.kind == "choice":
        return _labels(question, [one.key for one in question.options], manifest, own)
    return None


def _named(name: Any, manifest: Manifest, own: Wanted | None) -> Wanted | None:
    """The flag that a predicate of this name asks about: the model's or, without one, a label; None: there is none.

    A label is one of two, or one of a multi-label model.
    """
    kind = manifest.kind
    if own is not None:
        if not isinstance(kind, Classes | Labels) or name != ",".join(own.labels):
            return None
        is_one = len({*flag_of(own, manifest, kind).thresholds}) == 1  # clients compare with one number
        return own if is_one else None
    is_alone = isinstance(kind, Labels) or (isinstance(kind, Classes) and len(manifest.labels) == 2)
    return (
        Wanted([name])
        if is_alone and len(manifest.labels) <= MAX_OPTIONS and name in manifest.labels
        else None
    )


def rows_of(manifest: Manifest, own: Wanted | None) -> list[dict[str, Any]]:
    """The questions that a model answers without a file, as GET /v1/models lists them.

    They are one choice of its labels, and predicates: its flag or, without one, each of two labels, or of a multi-label
    model. A predicate is asked by its name or, in /v1/systemone, by instructions that are its name.
    """
    kind, names = manifest.kind, manifest.labels
    rows = list[dict[str, Any]]()
    for name in names[: MAX_OPTIONS + 1] if own is None else [",".join(own.labels)]:
        if (wanted := _named(name, manifest, own)) is not None:
            (least,) = {*flag_of(wanted, manifest, kind).thresholds}
            rows.append(
                {"type": "predicate", "name": name, "labels": list(wanted.labels), "threshold": least}
            )
    if isinstance(kind, Classes) and 2 <= len(names) <= MAX_OPTIONS:
        rows.append({"type": "choice", "choices": names})
    return rows


def _predicate(
    question: Question, labels: Iterable[str] | None, threshold: float, manifest: Manifest, own: Wanted | None
) -> Source:
    kind = manifest.kind
    if not isinstance(kind, Classes | Labels):
        what = "a regression model" if isinstance(kind, Value) else "a token classifier"
        _refuse(f"{question.where}.type", f"{manifest.name} is {what}: it answers no predicate")
    if labels is None and own is None:
        _refuse(f"{question.where}.labels", f"are required, as {manifest.name} has no flag")
    wanted = Wanted(list(labels or (() if own is None else own.labels)), threshold)
    flag = flag_of(wanted, manifest, kind)
    mine = None if own is None else flag_of(own, manifest, kind)
    if mine is not None:
        if mine.labels == flag.labels and _are_close(mine.thresholds, flag.thresholds):
            return Source(flag=mine)
    elif isinstance(kind, Labels):
        if _are_close([sigmoid(kind.logits[k]) for k in flag.labels], flag.thresholds):
            return Source(flag=flag)
    elif len(manifest.labels) == 2 and threshold == DEFAULT_THRESHOLD:
        return Source(flag=flag)
    return Source(flag=flag, wanted=wanted, keeps=False)


def _are_close(some: Sequence[float], others: Sequence[float]) -> bool:
    return all(isclose(a, b) for a, b in zip(some, others, strict=True))


def _labels(
    question: Question, names: Sequence[str], manifest: Manifest, own: Wanted | None
) -> Source | None:
    """The labels that these names are, if each is one of mutually exclusive labels, and all are; otherwise None.

    The exits of a model with a flag are for that flag, which says what the most probable label is only if there are
    two.
    """
    numbers = {name: k for k, name in enumerate(manifest.labels)}
    if not isinstance(manifest.kind, Classes) or len(names) != len(numbers) or numbers.keys() != {*names}:
        return None
    is_half = own is None or (len(names) == 2 and own.threshold in (None, DEFAULT_THRESHOLD))
    return Source([numbers[name] for name in names], keeps=is_half)


def _points(question: Question, binding: Binding) -> Source:
    means, points = binding.meanings, [float(i) for i in range(len(question.options))]
    if means:
        where = f"{question.where}.levels"
        if [*means] != [_typed(one) for one in question.options]:
            _refuse(where, f"must be {', '.join(one.key for one in binding.question.options)}")
        given = [one for one in means.values() if isinstance(one, float)]
        if given and (len(given) < len(points) or given != sorted({*given})):
            _refuse(where, "each must have a number, is, or none, and a larger one than that before")
        points = given or points
    return Source(points=points)
