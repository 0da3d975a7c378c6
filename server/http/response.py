"""The schema of the response of /classify: mypy checks the serializer against it, and /openapi.json is made from it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # before Python 3.12 pydantic does not accept typing.TypedDict

from de3.exits.rule import ExitReason
from de3.server.http.fields import SignalName


class Signals(TypedDict):
    """The signals at one exit."""

    score: Annotated[
        float | None,
        Field(description="the signal's value, compared with tau; null if it has none at this exit"),
    ]
    entropy: Annotated[float | None, Field(description="null for a regression model")]
    distance_ratio: Annotated[float | None, Field(description="null at an exit without prototypes")]
    edr: Annotated[float | None, Field(description="null at an exit without prototypes")]


class Answer(TypedDict):
    """The answer at one exit."""

    label: str
    value: NotRequired[Annotated[float, Field(description="the answer of a regression model")]]
    probs: Annotated[
        list[float] | None,
        Field(
            description="probabilities (with raw, logits) in the order of the model's labels; null for a "
            "regression model",
        ),
    ]


_Lambda = TypedDict(
    "_Lambda", {"lambda": Annotated[float | None, Field(description="null unless the signal is edr")]}
)


class Exit(Signals, _Lambda):
    """The exit of a text; for a text in several windows, the exit of the last window that ran."""

    layer: Annotated[int, Field(description="0 is the embeddings")]
    num_layers: int
    reason: ExitReason
    tau: float
    signal: Annotated[SignalName, Field(description="compared with tau")]


class PassedExit(Signals, Answer):
    """An exit that a text passed; the last one is where it exited."""

    layer: int
    window: NotRequired[Annotated[int, Field(description="index of the window, if the text has several")]]


class Windows(TypedDict):
    """The windows of a text that is longer than the model's limit."""

    run: Annotated[int, Field(description="number of windows that ran until the answer was settled")]
    of: Annotated[int, Field(description="number of windows of the text")]
    layers: Annotated[list[int], Field(description="exit layer of each window that ran")]


class Flag(TypedDict):
    """The label to watch for, its probability, and the window where it is most probable."""

    label: str
    prob: Annotated[float, Field(description="probability of the label; with several windows, the highest")]
    flagged: Annotated[bool, Field(description="the probability reaches the threshold")]
    window: NotRequired[
        Annotated[int, Field(description="index of the window with that probability, if there are several")]
    ]
    start: NotRequired[
        Annotated[int, Field(description="index of that window's first character (pair: in the longer text)")]
    ]
    end: NotRequired[Annotated[int, Field(description="index of the character after that window")]]


class TopLabel(TypedDict):
    """One of the most probable labels."""

    label: str
    prob: float


class ClassifiedText(Answer):
    """The answer to one text."""

    index: int
    num_classes: int
    exit: Exit
    labels: NotRequired[
        Annotated[list[str], Field(description="for a multi-label model: labels above their thresholds")]
    ]
    top: NotRequired[
        Annotated[list[TopLabel], Field(description="with top_k: the most probable labels, in order")]
    ]
    truncated: NotRequired[Annotated[bool, Field(description="the text was truncated")]]
    windows: NotRequired[
        Annotated[Windows, Field(description="with long: windows, if the text has several windows")]
    ]
    flag: NotRequired[Annotated[Flag, Field(description="with flag")]]
    ood_score: NotRequired[
        Annotated[
            float | None,
            Field(
                description="with ood: near 1 for texts far from the calibration's distribution; null if no exit "
                "passed has prototypes",
            ),
        ]
    ]
    out_of_distribution: NotRequired[
        Annotated[
            bool, Field(description="the text was far from every prototype at an exit; needs --ood-policy")
        ]
    ]
    layers: NotRequired[Annotated[list[PassedExit], Field(description="with explain: every exit passed")]]


class Usage(TypedDict):
    """Number of tokens in all texts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ClassifyResponse(TypedDict):
    """The answer to a request: a row for each text, in order."""

    id: str
    object: Literal["list"]
    created: int
    model: Annotated[str, Field(description="name:version")]
    data: list[ClassifiedText]
    usage: Usage
    certificate: NotRequired[
        Annotated[
            Mapping[str, Any],
            Field(
                description="with max_disagreement: the certified bound on the disagreement; absent if a text has "
                "several windows",
            ),
        ]
    ]
    tau_choice: NotRequired[
        Annotated[
            dict[str, Any], Field(description="with explain: how tau was chosen, and the expected results")
        ]
    ]
