"""Resolves how models answer a request: all that does not depend on its texts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from de3.exits.kinds import Spans
from de3.exits.windows import MAX_WINDOWS, most_windows
from de3.model_store.manifest import Manifest
from de3.runtime.choice import Choice
from de3.runtime.engine.request import Entry, Request
from de3.runtime.engine.served import Served
from de3.runtime.errors import RequestError
from de3.runtime.options import NO_OPTIONS, Long

MAX_KEPT = 256  # plans of a model


@dataclass(frozen=True, slots=True)
class Plan:
    """How models answer a request.

    Attributes:
        entries: the exit options and the flag of each model, in the order of the request. choices: their exit rules.
        windows: maximum number of windows into which a long text is split.
        truncate: texts that are too long for their windows are truncated; if false, they raise RequestError.
        base: the first model's choice for requests without options, from which its choice follows.
        budget_s: the shortest latency budget of the models, seconds; None: no budget.
        has_codes: the kernels have the signal of every model.
        has_layouts: a token classifier needs the layout of the texts' tokens.
    """

    entries: Sequence[Entry]
    choices: Sequence[Choice]
    windows: int = 1
    truncate: bool = True
    base: Choice | None = None
    budget_s: float | None = field(init=False)
    has_codes: bool = field(init=False)
    has_layouts: bool = field(init=False)

    def __post_init__(self) -> None:
        budget_s, has_codes, has_layouts = None, True, False
        for choice in self.choices:
            if choice.budget_s is not None:
                budget_s = choice.budget_s if budget_s is None else min(budget_s, choice.budget_s)
            has_codes &= choice.rule.signal.code is not None
            has_layouts |= isinstance(choice.rule.kind, Spans)
        object.__setattr__(self, "budget_s", budget_s)
        object.__setattr__(self, "has_codes", has_codes)
        object.__setattr__(self, "has_layouts", has_layouts)


def plan_of(served: Sequence[Served], request: Request, level: int, tenant: str) -> Plan:
    """The plan of a request; raises RequestError if a model cannot answer it.

    Plans of requests without options to one model are kept with the model: whatever clients send, they are few. A kept
    plan holds as long as the choice from which it follows is in force.

    served: the models of the request's entries. request: as adapted to them, since for_model may set its flag. level:
    load level, which sets the default τ. tenant: see Rules.choose.
    """
    first, base, entries = served[0], served[0].rules.base(level, tenant), request.entries
    is_kept = len(served) == 1 and entries[0].options is NO_OPTIONS
    is_kept = is_kept and entries[0].flag is None and request.spans is None
    key = type(request), request.long, tenant
    kept: Plan | None = first.plans.get(key) if is_kept else None
    if kept is not None and kept.base is base:
        return kept
    plan = _plan(served, request, entries, base, level, tenant)
    if is_kept:
        if len(first.plans) >= MAX_KEPT:
            first.plans.clear()
        first.plans[key] = plan
    return plan


def _plan(
    served: Sequence[Served],
    request: Request,
    entries: Sequence[Entry],
    base: Choice,
    level: int,
    tenant: str,
) -> Plan:
    if len(served) > 1:
        _check_upstreams([one.model.manifest for one in served], entries)
    pairs = zip(served, entries, strict=True)
    choices = [_choice(one, request, entry, level, tenant) for one, entry in pairs]
    return Plan(entries, choices, *how_long(request, served), base)


def _choice(served: Served, request: Request, entry: Entry, level: int, tenant: str) -> Choice:
    try:
        choice = served.rules.choose(entry.options, level, tenant)
    except RequestError as error:
        raise error.inside(entry.where) from None
    choice = served.rules.with_flag(choice, entry.options, entry.flag)
    return with_spans(choice, request, served.model.manifest)


def _check_upstreams(manifests: Sequence[Manifest], entries: Sequence[Entry]) -> None:
    """Raise RequestError if a model with an upstream is named twice, as each text would then be sent twice."""
    first: dict[str, str] = {}
    for manifest, entry in zip(manifests, entries, strict=True):
        where = first.setdefault(manifest.name, entry.where)
        if manifest.upstream is not None and where != entry.where:
            raise RequestError(
                f"{entry.where}: {manifest.name}, which has an upstream, is already {where}", entry.where
            )


def check_spans(request: Request, served: Sequence[Served]) -> None:
    """Raise RequestError for span options that the models cannot have, and for a protocol that cannot return spans."""
    if request.takes_spans and request.spans is None:
        return
    manifests = [one.model.manifest for one in served]
    are_spans = [one.is_spans for one in manifests]
    if any(are_spans) and not request.takes_spans:
        name = manifests[are_spans.index(True)].full_name
        raise RequestError(
            f"model: {name} is a token classifier, and this protocol has no spans; use /classify", "model"
        )
    if request.spans is not None and not any(are_spans):
        given = zip(request.spans.names, request.spans.given, strict=True)
        field = next((name for name, is_given in given if is_given), request.spans.names[0])
        what = f"{manifests[0].full_name} is not a token classifier: it finds no spans"
        raise RequestError(f"{field}: {what}", field)


def how_long(request: Request, served: Sequence[Served]) -> tuple[int, bool]:
    """The number of windows for a long text, and whether a longer one is truncated; see Plan."""
    long = _long(request, served)
    if long != "windows":
        return 1, long == "truncate"
    most = (most_windows(one.model.manifest.max_tokens) for one in served)
    return min(MAX_WINDOWS, *most), request.says_unread and not request.is_private


def _long(request: Request, served: Sequence[Served]) -> Long:
    """How long texts are read: as the request says, the models' settings or, without either, the protocol.

    But a token classifier and a guard read the whole text, in windows; a guard does so even if the client of a protocol
    asks to truncate it. Other models may answer differently then, so a token classifier that shares a pass with them
    does not.
    """
    guards = [one for one in served if one.rules.flag is not None]
    if request.is_private:
        return "windows"
    if request.long == "may truncate":
        if not guards:
            return "truncate"
        served = guards
    elif request.long is not None:
        return request.long
    found = {
        one.rules.long
        or ("windows" if one.rules.flag is not None or one.model.manifest.is_spans else request.usual_long)
        for one in served
    }
    if len(found) == 1:
        return found.pop()
    return "windows" if guards else "truncate"


def with_spans(choice: Choice, request: Request, manifest: Manifest) -> Choice:
    """The choice, for a token classifier with the request's options for spans; redaction has no latency budget.

    The calibration covers only the spans that the model returns without options.
    """
    if request.spans is None or not isinstance(kind := manifest.kind, Spans):
        return choice
    spans = request.spans.rule_for(manifest)
    if spans != kind.rule:
        choice = replace(choice, certificate=None, expected=None)
    budget_s = None if request.is_private else choice.budget_s
    return replace(choice, rule=replace(choice.rule, kind=Spans(spans)), budget_s=budget_s)


def check_texts(request: Request, served: Served) -> None:
    """Raise RequestError for a single text if the model takes pairs, or vice versa."""
    takes = served.model.manifest.input
    if takes is None:
        return
    wants_pair = takes == "pair"
    for index, text in enumerate(request.texts):
        if (text.text_pair is not None) != wants_pair:
            wanted, given = ("pairs of texts", "a single text") if wants_pair else ("single texts", "a pair")
            name, model = request.name_of(index), served.model.full_name
            raise RequestError(f"{name}: {model} takes {wanted}, but this is {given}", name)
