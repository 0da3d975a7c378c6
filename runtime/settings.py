"""The settings of the runtime; as settings of a server, they are options of `de3 serve` (server/settings.py)."""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self, cast, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from typer import Option

from de3.runtime.cores import available_cores
from de3.runtime.flags import parsed
from de3.runtime.options import EXCLUSIVE, MAX_BUDGET_MS, ExitOptions, Long
from de3.runtime.upstream_settings import UpstreamOf

limit_option = partial(Option, rich_help_panel="Limits")
default_option = partial(Option, rich_help_panel="Default exit options")
load_option = partial(Option, rich_help_panel="Under load")
audit_option = partial(Option, rich_help_panel="Audits and learning")
engine_option = partial(Option, rich_help_panel="Models and engine")
GUARANTEES = ("guarantee", "guarantee_missed")


def _flag(text: str) -> str:
    """The text, if it is a flag; otherwise raises ValueError."""
    parsed(text)
    return text


def _long(setting: str) -> str:
    """The setting, if it says how long texts are read; otherwise raises ValueError."""
    name, given, how = setting.rpartition("=")
    if how not in get_args(Long) or (given and not name):
        raise ValueError(
            f"long: {setting[:100]!r}: give NAME=HOW, or HOW for all models: {', '.join(get_args(Long))}"
        )
    return setting


class RuntimeSettings(BaseModel):
    """The settings of loaded models and their engine."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    guarantee: Annotated[
        float | None,
        Field(gt=0, lt=1),
        Option(
            help="Maximum rate of answers that differ from full depth, proven by audits at 95% confidence. Replaces "
            "--tau and other default exit options."
        ),
    ] = None
    guarantee_missed: Annotated[
        float | None,
        Field(gt=0, lt=1),
        Option(
            help="Maximum share of the texts flagged at full depth (--flag) that early exits answer as safe, proven by "
            "audits; instead of --guarantee, or with it."
        ),
    ] = None
    observe: Annotated[
        bool,
        Option(
            "--observe",
            help="With a guarantee: answer every text at full depth, and only report what earlier exits would have "
            "saved and missed.",
        ),
    ] = False
    flags: Annotated[
        list[Annotated[str, AfterValidator(_flag)]],
        Option(
            "--flag",
            help="What a model is to find, as NAME=LABEL,LABEL@PROBABILITY (default: 0.5, or the labels' thresholds); "
            "NAME=>=NUMBER for a regression model; NAME=* for the spans of a token classifier. Without NAME=: for all "
            "models. Texts exit early only with an answer that is not flagged. Repeat for more models.",
        ),
    ] = []
    long_texts: Annotated[
        list[Annotated[str, AfterValidator(_long)]],
        Option(
            "--long",
            help="How texts beyond a model's limit are read, if a request does not say: NAME=truncate, NAME=windows or "
            "NAME=error; without NAME=, for all models. Default: windows for models with a flag and token classifiers, "
            "else as each protocol does. Repeat for more models.",
        ),
    ] = []
    tau: Annotated[
        float | None,
        Field(ge=0, le=1),
        Option(
            help="τ for requests without exit options; 0: full depth. Default: each model's calibrated τ."
        ),
    ] = None
    max_disagreement: Annotated[
        float | None,
        Field(ge=0, le=1),
        Option(
            help="Maximum rate of answers that differ from full depth, certified by the calibration with 95% "
            "confidence, for requests without exit options; instead of --tau."
        ),
    ] = None
    max_missed: Annotated[
        float | None,
        Field(gt=0, le=1),
        Option(
            help="Maximum share of the texts flagged at full depth that early exits answer as safe, certified by a "
            "calibration with a flag (de3 calibrate --flag), for requests without exit options; instead of --tau."
        ),
    ] = None
    state_dir: Annotated[
        Path | None,
        Option(
            help="Folder in which audit results and learned versions survive restarts; one for each replica."
        ),
    ] = None
    runtime: Annotated[
        Literal["auto", "native", "onnxruntime"],
        engine_option(help="onnxruntime, native (int8 kernels), or auto: native if possible."),
    ] = "auto"
    special_tokens: Annotated[
        bool,
        engine_option(
            "--special-tokens",
            help="Special tokens in texts, such as [SEP], reach the models as such, as in transformers. Without it, "
            "they are encoded as characters, except by models imported with this option.",
        ),
    ] = False
    threads: Annotated[
        int,
        Field(ge=0, le=1024),
        engine_option(
            help="Engine threads; each runs one text, or a group of short ones, at a time. 0: one per core."
        ),
    ] = 0
    processes: Annotated[
        int,
        Field(ge=0, le=256),
        engine_option(
            help="Processes that serve models; engine threads and the limits on texts, body bytes and connections are "
            "divided among them. 0: one for each engine thread, or for every four if a model is large, as far as "
            "memory allows; but only one if ONNX Runtime runs a model."
        ),
    ] = 0
    target_speedup: Annotated[
        float | None,
        Field(ge=1),
        default_option(
            help="Mean speed-up for requests without exit options, by the calibration; instead of --tau."
        ),
    ] = None
    latency_budget_ms: Annotated[
        float | None,
        Field(gt=0, le=MAX_BUDGET_MS),
        default_option(
            help="Latency budget for requests without exit options, milliseconds; instead of --tau."
        ),
    ] = None
    ood_policy: Annotated[
        Literal["off", "flag", "deepen"],
        default_option(
            help="Policy for out-of-distribution texts (far from every prototype): off, flag, or deepen (flag, and "
            "halve their τ)."
        ),
    ] = "off"
    min_accuracy: Annotated[
        float | None,
        Field(ge=0, le=1),
        load_option(
            help="Lower limit on the calibrated accuracy when τ is raised under load. Default: 0.02 below full depth."
        ),
    ] = None
    without_upstream: Annotated[
        Literal["refuse", "answer"],
        audit_option(
            help="Texts for an upstream that is unavailable, slow or over max_calls_per_hour: refuse them (502 or "
            "504), or answer them at the last layer."
        ),
    ] = "refuse"
    allow_plain_http: Annotated[
        bool,
        audit_option("--allow-plain-http", help="Allow upstreams without TLS on other machines."),
    ] = False
    upstreams: list[UpstreamOf] = []
    max_queue: Annotated[
        int,
        Field(ge=1),
        limit_option(
            help="Limit on texts in flight. Beyond it, requests get 503, or 429 if the client exceeds its "
            "share."
        ),
    ] = 1024
    timeout_s: Annotated[
        float,
        Field(gt=0),
        limit_option(help="Limit on the time from a request's arrival to its response, seconds."),
    ] = 30.0

    @model_validator(mode="after")
    def _check_options(self) -> Self:
        _ = self.options
        given = next((name for name in GUARANTEES if getattr(self, name) is not None), None)
        if given is not None:
            other = next((name for name in EXCLUSIVE if getattr(self, name) is not None), None)
            if other is not None:
                raise ValueError(f"{given}: cannot be combined with {other}; give one of them")
        names = [parsed(one)[0] for one in self.flags]
        if len({*names}) < len(names):
            raise ValueError("flag: a model has two flags; give one, with several labels if need be")
        if len({name for name, _ in self.long}) < len(self.long):
            raise ValueError("long: a model has two settings; give one")
        if self.observe and given is None:
            raise ValueError("observe: needs guarantee or guarantee_missed, whose exits are observed")
        if len({of.name for of in self.upstreams}) < len(self.upstreams):
            raise ValueError(
                "upstreams: two have the same name; rename one (a file of questions has questions)"
            )
        for of in self.upstreams:
            if not of.upstream.is_encrypted and not self.allow_plain_http:
                raise ValueError(
                    f"{of.name}: upstream.url: would send texts unencrypted to another machine; give an https URL, or "
                    "serve it with --allow-plain-http"
                )
        return self

    @property
    def long(self) -> list[tuple[str, Long]]:
        """Models by name, or the empty name for all, and how long texts are read."""
        return [(name, cast(Long, how)) for name, _, how in (one.rpartition("=") for one in self.long_texts)]

    @property
    def has_guarantee(self) -> bool:
        """True if audits choose τ."""
        return any(getattr(self, name) is not None for name in GUARANTEES)

    @property
    def options(self) -> ExitOptions:
        """The exit options of requests that set none."""
        return ExitOptions(**{name: getattr(self, name) for name in EXCLUSIVE})

    def engine_threads(self) -> int:
        """Number of engine threads: the number set, or one for each available core."""
        return self.threads or available_cores()
