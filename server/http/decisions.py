"""Questions about a text, each answered by a model that knows the answer: POST /v1/decisions and /v1/systemone.

Both accept a body in OpenAI's format, which has an input, and in System One's, which has a state. The exit options are
an extension, as are the fields of answers that begin with x_: the layer of the exit, the model, and whether the text
was truncated.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import orjson
from pydantic import ConfigDict, Field

from de3.model_store.manifest import Manifest
from de3.runtime.engine.job import Job
from de3.runtime.engine.request import Entry, Request, Text
from de3.runtime.engine.served import Served
from de3.runtime.errors import RequestError
from de3.runtime.fields import LARGE_BODY_BYTES, check_fields, is_blank, known_fields, load_json
from de3.runtime.flags import Wanted
from de3.runtime.options import ExitOptions, Long, OptionFields
from de3.runtime.questions import MAX_OPTIONS, NOUL, Form, Option, Question, canonical
from de3.runtime.upstream.client import Asked
from de3.server.http.errors import STATUSES, TYPES
from de3.server.http.protocol import Call, Protocol
from de3.server.questions import MAX_NAME, Binding, Questions, Source, fitting, source_of

EXAMPLE = (
    '{"input": "a text", "questions": [{"type": "choice", "instructions": "Its tone?", "choices": '
    '[{"value": "negative"}, {"value": "positive"}]}]}'
)
SYSTEMONE_EXAMPLE = (
    '{"state": "a text", "questions": {"tone": {"type": "choice", "criteria": '
    '{"negative": "blame", "positive": "praise"}}}}'
)
MAX_QUESTIONS, MAX_ENTRIES = 400, 64  # entries: models, each counted once for each of its flags and options
MOST = {"choice": MAX_OPTIONS, "score": 10}  # options; at least 2
# Fields of options in OpenAI's form, of their values, and allowed values.
CHOICES, LEVELS = ("choices", "value", "a text or a boolean"), ("levels", "label", "a text")
PARTS = {
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "input_json": "data",
}  # fields by type
MAX_FORM, MAX_FORMS = 2**14, 256  # characters of a form that is kept; number of forms
NONE = Questions()
# A choice of τ by the client, which also holds for questions whose answers no exit promises.
CLIENTS_CHOICE = ("tau", "target_speedup", "latency_budget_ms", "max_layer")


@dataclass(slots=True, eq=False)
class Resolved:
    """Which models answer the questions of a request, and the answers of others.

    Attributes:
        entries: the models. sources: for each question that one answers, by its index, the index of its entry, and how.
        replies: the answers of the decision server to the other questions, by their indices: probabilities; None: it
            refuses. Empty until it has answered.
    """

    entries: Sequence[Entry] = ()
    sources: Mapping[int, tuple[int, Source]] = field(default_factory=dict)
    replies: dict[int, list[float] | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class DecisionRequest(Request):
    """Questions about a text.

    Long texts are split into windows, because a guard's finding may be anywhere in a text, and refused if they do not
    fit into them.

    Attributes:
        state: what the questions are about: any JSON.
        bound: the bindings of the questions; None: a question has none. known: all bindings.
        names: those of the models that may answer, and the first question of each; first, that which `model` names.
        kept: the last models that answered, and what was resolved for them; shared by all requests that ask this.
        resolved: filled in by served() and ask_others().
    """

    usual_long: ClassVar[Long] = "windows"

    form: Form = "decisions"
    state: Any = None
    questions: Sequence[Question] = ()
    bound: Sequence[Binding | None] = ()
    known: Questions = NONE
    names: Mapping[str | None, str] = field(default_factory=dict)
    kept: list[Any] = field(default_factory=list)
    resolved: Resolved = field(default_factory=Resolved)

    @property
    def weight(self) -> int:
        """One text for each question."""
        return len(self.questions)

    @property
    def entries(self) -> list[Entry]:
        """The models that are to answer."""
        return list(self.resolved.entries)

    def served(self, get: Callable[..., Served]) -> list[Served]:
        """The models that answer; raises RequestError if a question has none. get: see Request.served.

        What clients ask is often the same for many texts, so what it means is kept as long as the models are.
        """
        found = []
        for name, where in self.names.items():
            try:
                found.append(get(name))
            except RequestError as error:
                raise error.inside(where) from None
        numbers = [one.number for one in found]  # the models themselves would stay in memory
        if not self.kept or self.kept[0] != numbers:
            self.kept[:] = numbers, *self._resolved(dict(zip(self.names, found, strict=True)))
        _, which, self.resolved.entries, self.resolved.sources = self.kept
        return [found[k] for k in which]

    def _resolved(
        self, found: Mapping[str | None, Served]
    ) -> tuple[list[int], list[Entry], dict[int, tuple[int, Source]]]:
        """For each entry, the index of its model in `names`; the entries; and the sources. found: models by name."""
        indices, sources = dict[Any, int](), dict[int, tuple[int, Source]]()
        entries, which, numbers = list[Entry](), list[int](), {name: i for i, name in enumerate(found)}
        for number, (question, binding) in enumerate(zip(self.questions, self.bound, strict=True)):
            name = self.model if binding is None else binding.model
            manifest, flag = found[name].model.manifest, found[name].rules.flag
            if binding is not None:
                source: Source | None = source_of(question, binding, manifest, flag)
            else:
                source = fitting(question, manifest, flag)
            if source is None:
                self._check_others(question, manifest)
                continue
            options = self._options_for(source)
            key = manifest.full_name, options, source.wanted and str(source.wanted)
            if (index := indices.setdefault(key, len(entries))) == len(entries):
                entries.append(Entry(manifest.full_name, options, question.where, source.wanted))
                which.append(numbers[name])
            sources[number] = index, source
        problem = (
            f"need {len(entries)} models, or flags of one; at most {MAX_ENTRIES} are allowed in a request"
        )
        _check(len(entries) <= MAX_ENTRIES, "questions", problem)
        return (which, entries, sources) if entries else ([0], [Entry(None)], sources)

    def for_model(self, manifest: Manifest, flag: Wanted | None = None) -> Self:
        """The same request, without the text if no model answers a question."""
        return self if self.resolved.sources else replace(self, texts=[])

    def _check_others(self, question: Question, manifest: Manifest) -> None:
        """Raise RequestError if a question that no model answers cannot be asked of a decision server."""
        _check(
            self.known.upstreams,
            question.where,
            f"no model is bound to it, and it does not fit {manifest.name} (see questions in GET /v1/models); bound "
            f"are: {self.known.shown()}; the server's operator can bind it with --questions",
        )
        keys = {one.key for one in question.options}
        _check(
            len(keys) == len(question.options), question.where, "has a boolean and a text of the same name"
        )

    @property
    def others(self) -> int:
        """Number of the questions that no model answers."""
        return len(self.questions) - len(self.resolved.sources)

    async def ask_others(self, ask: Callable[[Any], Awaitable[Any]]) -> None:
        """Have the decision server answer the other questions; raises RequestError."""
        left = [i for i in range(len(self.questions)) if i not in self.resolved.sources]
        reply = await ask(Asked(self.state, [self.questions[i] for i in left]))
        self.resolved.replies.update(zip(left, reply.answers, strict=True))

    def _options_for(self, source: Source) -> ExitOptions:
        """The exit options for a question: full depth if no promise of exits holds for it, unless the client asks."""
        options = self.options
        if source.keeps or any(getattr(options, name) is not None for name in CLIENTS_CHOICE):
            return options
        return ExitOptions(tau=0.0)


class _Fields(OptionFields):
    model: str | None = Field(None, description="name, name:version or alias; default: the server's")
    questions: Any
    long: Long | None = None


class DecisionFields(_Fields):
    """The body of a request in OpenAI's format; the exit options and `long` are extensions."""

    input: Any
    safety_identifier: Any = Field(None, description="accepted and ignored")
    prompt_cache_key: Any = Field(None, description="accepted and ignored")
    prompt_cache_options: Any = Field(None, description="accepted and ignored")
    prompt_cache_retention: Any = Field(None, description="accepted and ignored")
    metadata: Any = Field(None, description="accepted and ignored")
    user: Any = Field(None, description="accepted and ignored")


class SystemOneFields(_Fields):
    """The body of a request in System One's format, whose other fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    state: Any


def _parse(call: Call, usual: Form) -> DecisionRequest:
    """The request in a call; raises RequestError if it is invalid. usual: its form, if its body does not show it."""
    value = load_json(call.body)
    form, example = usual, EXAMPLE if usual == "decisions" else SYSTEMONE_EXAMPLE
    if isinstance(value, dict) and ("state" in value) != ("input" in value):
        form = "systemone" if "state" in value else "decisions"
    field, read = ("input", _text_of_input) if form == "decisions" else ("state", _canonical)
    if not isinstance(value, dict) or len(call.body) > LARGE_BODY_BYTES or field not in value:
        request = _request(form, value, example, call.questions)
    else:
        # repr tells 1, 1.0 and true apart.
        rest = repr({name: given for name, given in value.items() if name != field})
        kept = call.questions.forms.get(rest)
        if kept is None or kept.form != form:
            kept = _request(form, value, example, call.questions)
            if len(call.questions.forms) >= MAX_FORMS:
                call.questions.forms.clear()
            if len(rest) <= MAX_FORM:
                call.questions.forms[rest] = kept
        request = kept
    state = value[field]
    text = read(state, field)
    _check(not is_blank(text), field, "must not be empty, or only white space or invisible characters")
    return replace(
        request, texts=[Text(text)], state=state if form == "systemone" else text, resolved=Resolved()
    )


def _request(form: Form, value: Any, example: str, known: Questions) -> DecisionRequest:
    """The request without its text; what clients ask is often the same for many texts."""
    fields: _Fields
    if form == "decisions":
        fields = check_fields(DecisionFields, value, example)
        questions = _decisions(fields.questions)
    else:
        known_names = known_fields(SystemOneFields)
        some = (
            {name: value[name] for name in known_names if name in value} if isinstance(value, dict) else value
        )
        fields = check_fields(SystemOneFields, some, example)
        questions = _systemone(fields.questions)
    _check(fields.thresholds is None, "thresholds", "is that of the model, or of the file of questions")
    bound = [known.of(question) for question in questions]
    names: dict[str | None, str] = {} if fields.model is None and all(bound) else {fields.model: ""}
    for question, binding in zip(questions, bound, strict=True):
        if binding is not None:
            names.setdefault(binding.model, question.where)
    return DecisionRequest(
        *([], fields.options, fields.model, fields.long),
        form=form,
        questions=questions,
        bound=bound,
        known=known,
        names=names,
    )


def _check(is_valid: object, where: str, problem: str) -> None:
    """Raise RequestError for a value that is not valid. where: its place in the body."""
    if not is_valid:
        raise RequestError(f"{where}: {problem}", where)


ANY = "a text, an object or an array"
KINDS: dict[str, Any] = {"a text": str, "an object or an array": dict | list, ANY: str | dict | list}


def _canonical(value: Any, where: str, expected: str = ANY) -> str:
    _check(isinstance(value, KINDS[expected]), where, f"must be {expected}")
    try:
        return canonical(value)
    except (TypeError, ValueError):  # which orjson cannot write
        problem = "has an integer of more than 64 bits, or too many levels"
        raise RequestError(f"{where}: {problem}", where) from None


def _text_of_input(value: Any, where: str) -> str:
    """The text in an input: a string, or those of messages, with a blank line between two."""
    if not isinstance(value, list):
        return _canonical(value, where, "a text")
    return "\n\n".join(_message(one, f"{where}[{i}]") for i, one in enumerate(value))


def _message(value: Any, where: str) -> str:
    is_message = isinstance(value, dict) and value.get("type", "message") == "message" and "content" in value
    _check(
        is_message,
        where,
        'must be a message, {"role": "user", "content": "a text"}; tool calls cannot be read',
    )
    return _content(value["content"], f"{where}.content")


def _content(value: Any, where: str) -> str:
    """A string, or the texts of parts, with a blank line between two."""
    if not isinstance(value, list):
        return _canonical(value, where, "a text")
    return "\n\n".join(_part(one, f"{where}[{i}]") for i, one in enumerate(value))


def _part(value: Any, where: str) -> str:
    field = PARTS.get(str(value.get("type"))) if isinstance(value, dict) else None
    _check(field, f"{where}.type", "must be input_text, output_text or input_json; images cannot be read")
    return _canonical(
        value.get(field), f"{where}.{field}", "a text" if field != "data" else "an object or an array"
    )


def _decisions(value: Any) -> list[Question]:
    """The questions in OpenAI's form."""
    _check(isinstance(value, list), "questions", "must be a list of questions")
    _check_count("questions", value, 1, MAX_QUESTIONS)
    questions, names = list[Question](), dict[str, str]()
    for i, row in enumerate(value):
        where = f"questions[{i}]"
        kind = _kind(row, where, "predicate")
        name, instructions, options = row.get("name"), row.get("instructions"), list[Option]()
        if name is not None:
            is_name = isinstance(name, str) and 0 < len(name) <= MAX_NAME
            _check(is_name, f"{where}.name", f"must be a text of 1 to {MAX_NAME} characters")
            first = names.setdefault(name, where)
            _check(first == where, f"{where}.name", f"{name[:100]!r} is that of {first}, too")
        if instructions is not None:
            instructions = _content(instructions, f"{where}.instructions")
        if kind != "predicate":
            options = _options(row, kind, where)
        questions.append(Question(kind, instructions, options, name, where))
    return questions


def _kind(row: Any, where: str, predicate: str) -> Any:
    """The kind of a question. predicate: its name of a predicate."""
    _check(isinstance(row, dict), where, "must be an object")
    kind = row.get("type")
    _check(kind in (predicate, "choice", "score"), f"{where}.type", f"must be {predicate}, choice or score")
    return "predicate" if kind == predicate else kind


def _check_count(where: str, values: Sized, least: int, most: int) -> None:
    count = len(values)
    _check(least <= count <= most, where, f"has {count}; {least} to {most} are allowed")


def _options(row: dict[str, Any], kind: str, where: str) -> list[Option]:
    """The choices or the levels of a question in OpenAI's form."""
    field, key, expected = CHOICES if kind == "choice" else LEVELS
    where, given = f"{where}.{field}", row.get(field)
    _check(isinstance(given, list), where, "must be a list")
    assert isinstance(given, list)
    _check_count(where, given, 2, MOST[kind])
    options, seen = list[Option](), dict[Any, int]()
    for i, one in enumerate(given):
        _check(isinstance(one, dict), f"{where}[{i}]", f"must be an object with {key}")
        value, description = one.get(key), one.get("description")
        is_valid = (isinstance(value, str) and value) or (kind == "choice" and isinstance(value, bool))
        _check(is_valid, f"{where}[{i}].{key}", f"must be {expected}")
        _check(isinstance(description, str | None), f"{where}[{i}].description", "must be a text")
        first = seen.setdefault((type(value), value), i)
        _check(first == i, f"{where}[{i}].{key}", f"is that of {where}[{first}], too")
        options.append(Option(value, description))
    return options


def _systemone(value: Any) -> list[Question]:
    """The questions in System One's form."""
    _check(isinstance(value, dict), "questions", "must be an object of questions by id")
    _check_count("questions", value, 1, MAX_QUESTIONS)
    questions = []
    for key, row in value.items():
        _check(key, "questions", "has an empty id")
        where = f"questions.{key[:100]}"
        kind, instructions = _kind(row, where, NOUL), row.get("instructions")
        if instructions is not None:
            _canonical(instructions, f"{where}.instructions")
        options = _criteria(row.get("criteria"), kind, f"{where}.criteria")
        questions.append(Question(kind, instructions, options, None, where, key))
    return questions


def _criteria(value: Any, kind: str, where: str) -> list[Option]:
    if kind == "score":
        _check(isinstance(value, list), where, "must be a list of levels")
        options = [Option(one) for one in value]
    elif kind == "choice":
        _check(isinstance(value, dict), where, "must be an object of options")
        options = [Option(key, means) for key, means in value.items()]
    else:
        given = {} if value is None else value
        is_valid = isinstance(given, dict) and given.keys() <= {"true", "false"}
        _check(is_valid, where, "must be an object with true, false or both")
        options = [Option(key == "true", means) for key, means in given.items() if means is not None]
    if kind != "predicate":
        _check_count(where, options, 2, MOST[kind])
    for i, one in enumerate(options):
        place = f"{where}[{i}]" if kind == "score" else f"{where}.{one.key[:100]}"
        if kind == "score" or one.description is not None:
            _canonical(one.value if kind == "score" else one.description, place)
    return options


def serialize(_: str, job: Job) -> bytes:
    """The answers to the questions, in their order and in the form in which they were asked."""
    request = job.request
    assert isinstance(request, DecisionRequest)
    rows = [_answer(job, request, i) for i in range(len(request.questions))]
    body: dict[str, Any] = {"model": request.model or job.first.model.full_name}
    usage: dict[str, Any] = {"input_tokens": job.tokens, "output_tokens": 0}
    if request.form == "systemone":
        answers = {question.id: row for question, row in zip(request.questions, rows, strict=True)}
        return orjson.dumps(body | {"answers": answers, "usage": usage})
    usage |= {"input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0}}
    usage |= {"output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": job.tokens}
    return orjson.dumps(body | {"answers": rows, "usage": usage})


def _answer(job: Job, request: DecisionRequest, number: int) -> dict[str, Any]:
    """The answer to one question."""
    question = request.questions[number]
    if number in request.resolved.replies:
        if (probs := request.resolved.replies[number]) is None:
            return {"type": "refusal"} | ({"name": question.name} if request.form == "decisions" else {})
        return answer_row(request.form, question, probs) | {
            "x_exit": {"reason": "upstream"},
            "x_truncated": False,
        }
    index, source = request.resolved.sources[number]
    part = job.parts[index]
    (outcome,) = part.outcomes()
    row = answer_row(request.form, question, source.probabilities(outcome.reading))
    manifest = part.model.manifest
    row["x_model"] = manifest.full_name
    row["x_exit"] = {"layer": outcome.layer, "num_layers": manifest.num_layers, "reason": outcome.reason}
    row["x_truncated"] = outcome.truncated
    return row


def answer_row(form: Form, question: Question, probs: Sequence[float]) -> dict[str, Any]:
    """An answer with these probabilities: that of a predicate, or of each option."""
    is_systemone, kind, options = form == "systemone", question.kind, question.options
    row: dict[str, Any] = {"type": kind} if is_systemone else {"type": kind, "name": question.name}
    if kind == "predicate":
        return {"type": NOUL, NOUL: probs[0]} if is_systemone else row | {"probability": probs[0]}
    best = max(range(len(probs)), key=probs.__getitem__)
    if kind == "choice":
        row |= {"confidence": _confidence(probs, best)}
        if is_systemone:
            named = {one.key: p for one, p in zip(options, probs, strict=True)}
            return row | {"choice": options[best].key, "probabilities": named}
        listed = [{"value": one.value, "probability": p} for one, p in zip(options, probs, strict=True)]
        return row | {"choice": options[best].value, "probabilities": listed}
    score = min(sum(i * p for i, p in enumerate(probs)), len(probs) - 1.0)
    row |= {"score": score, "confidence": _confidence_of_score(probs, best)}
    if is_systemone:
        row["legend"] = {str(i): one.value for i, one in enumerate(options)}
        return row | {"probabilities": {str(i): p for i, p in enumerate(probs)}}
    labelled = zip(options, probs, strict=True)
    return row | {
        "probabilities": [
            {"value": i, "label": canonical(one.value), "probability": p}
            for i, (one, p) in enumerate(labelled)
        ]
    }


def _confidence(probs: Sequence[float], best: int) -> float:
    """max(0, (p_max − 1/n)/(1 − 1/n))."""
    even = 1 / len(probs)
    return max(0.0, (probs[best] - even) / (1 - even))


def _confidence_of_score(probs: Sequence[float], mode: int) -> float:
    """max(0, 1 − Σ pᵢ·|i − mode| / ((1/n)·Σ |i − (n − 1)/2|))."""
    count = len(probs)
    spread = sum(p * abs(i - mode) for i, p in enumerate(probs))
    even = sum(abs(i - (count - 1) / 2) for i in range(count)) / count
    return max(0.0, 1 - spread / even)


# Types of errors in System One's format, by status; 422 is a list of details.
_TYPES: Mapping[int, str] = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def systemone_error(error: RequestError) -> bytes:
    """The body of an error in System One's format."""
    status = STATUSES[error.cause]
    if status == 422:
        loc = ["body", *(() if error.field is None else (error.field,))]
        return orjson.dumps({"detail": [{"loc": loc, "msg": error.message, "type": "value_error"}]})
    kind = _TYPES.get(status, TYPES[status])
    return orjson.dumps({"detail": {"error_type": kind, "message": error.message}})


def parse(call: Call) -> DecisionRequest:
    """The request in a call to /v1/decisions; raises RequestError if it is invalid."""
    return _parse(call, "decisions")


def parse_systemone(call: Call) -> DecisionRequest:
    """The request in a call to /v1/systemone; raises RequestError if it is invalid."""
    return _parse(call, "systemone")


DECISIONS = Protocol(parse, serialize, example=EXAMPLE)
SYSTEMONE = Protocol(parse_systemone, serialize, systemone_error, example=SYSTEMONE_EXAMPLE)
