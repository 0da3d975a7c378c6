"""Questions about a text, and the two forms in which decision servers are asked: OpenAI's and System One's."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import orjson

Kind = Literal["predicate", "choice", "score"]
Form = Literal["decisions", "systemone"]  # that of /v1/decisions and of /v1/systemone
NOUL = "noul"  # System One's name of a predicate
MAX_OPTIONS = 255  # of a choice
SUM_TOLERANCE = 1e-3  # largest error of the sum of probabilities in an answer of another server


def canonical(value: Any) -> str:
    """A JSON value as text: a string as it is; other values as JSON whose keys are sorted."""
    return value if isinstance(value, str) else orjson.dumps(value, option=orjson.OPT_SORT_KEYS).decode()


class Option(NamedTuple):
    """An option of a question.

    Attributes:
        value: of a predicate, true or false, if it is described; of a choice, the answer, a string or a boolean; of a
            score, the level, a string or, in System One's form, any JSON.
        description: any JSON; None: there is none.
    """

    value: Any
    description: Any = None

    @property
    def key(self) -> str:
        """Its key in System One's maps."""
        return str(self.value).lower() if isinstance(self.value, bool) else canonical(self.value)


class Question(NamedTuple):
    """One question.

    Attributes:
        instructions: any JSON; None: there are none.
        name: by which it may be bound to a model; None: it has none.
        where: its place in the request, for error messages, such as questions[0].
        id: its key in System One's maps.
    """

    kind: Kind
    instructions: Any = None
    options: Sequence[Option] = ()
    name: str | None = None
    where: str = ""
    id: str = ""

    @property
    def identity(self) -> str:
        """Canonical JSON of what is asked, without the name; only levels have an order.

        JSON counts as its text, as /v1/decisions has no other form of it.
        """
        options = [[type(one.value).__name__, one.key, _text(one.description)] for one in self.options]
        if self.kind == "score":
            options = [one[1:] for one in options]
        else:
            options.sort()
        return canonical([self.kind, _text(self.instructions), options])


def _text(value: Any) -> str:
    return "" if value is None else canonical(value)


def body_of(form: Form, state: Any, questions: Sequence[Question]) -> dict[str, Any]:
    """The fields with which a decision server is asked these questions about a state, which is any JSON."""
    if form == "systemone":
        return {"state": state, "questions": {str(i): _in_systemone(one) for i, one in enumerate(questions)}}
    return {"input": canonical(state), "questions": [_in_decisions(one) for one in questions]}


def _in_systemone(question: Question) -> dict[str, Any]:
    kind, options = question.kind, question.options
    asked: dict[str, Any] = {"type": NOUL if kind == "predicate" else kind}
    if question.instructions is not None:
        asked["instructions"] = question.instructions
    if kind == "score":
        asked["criteria"] = [
            one.value if one.description is None else f"{canonical(one.value)}: {canonical(one.description)}"
            for one in options
        ]
    elif options:
        asked["criteria"] = {one.key: one.description for one in options}
    return asked


def _in_decisions(question: Question) -> dict[str, Any]:
    kind, text = question.kind, canonical(question.instructions or "What is true of the input?")
    if kind == "predicate":  # which has no place for what true and false mean
        meanings = (f"Answer {one.key} if: {canonical(one.description)}" for one in question.options)
        return {"type": kind, "instructions": "\n\n".join([text, *meanings])}
    field, key = ("choices", "value") if kind == "choice" else ("levels", "label")
    options = []
    for one in question.options:
        row = {key: one.value if kind == "choice" else canonical(one.value)}
        options.append(row | ({} if one.description is None else {"description": canonical(one.description)}))
    return {"type": kind, "instructions": text, field: options}


def probabilities_in(form: Form, content: Any, questions: Sequence[Question]) -> list[list[float] | None]:
    """The probabilities in a decision server's response, of each predicate or option; None: it refuses a question.

    Raises ValueError, TypeError, KeyError or IndexError for a response that is not as it should be.
    """
    answers = content["answers"]
    if len(answers) != len(questions):
        raise ValueError("it has another number of answers")
    keys: Sequence[Any] = range(len(questions)) if form == "decisions" else [*map(str, range(len(questions)))]
    return [_read(form, answers[key], question) for key, question in zip(keys, questions, strict=True)]


def _read(form: Form, answer: Any, question: Question) -> list[float] | None:
    kind, is_systemone = question.kind, form == "systemone"
    if answer["type"] == "refusal":
        return None
    name = NOUL if is_systemone and kind == "predicate" else kind
    if answer["type"] != name:
        raise ValueError("it has an answer of another type")
    if kind == "predicate":
        return [_checked(answer[NOUL if is_systemone else "probability"])]
    keys: list[Any] = [one.value if kind == "choice" else i for i, one in enumerate(question.options)]
    found = answer["probabilities"]
    if is_systemone:
        probs = [found[one.key if kind == "choice" else str(i)] for i, one in enumerate(question.options)]
    else:
        by_value = {(type(one["value"]), one["value"]): one["probability"] for one in found}
        probs = [by_value[type(key), key] for key in keys]
    probs = [_checked(one) for one in probs]
    if abs(sum(probs) - 1) > SUM_TOLERANCE:
        raise ValueError("its probabilities do not add up to 1")
    return probs


def _checked(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError("it has a probability that is not from 0 to 1")
    return float(value)
