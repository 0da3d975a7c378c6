"""What the dashboards show: every panel with its PromQL. Dashboards, pictures and tests come of this."""

from dataclasses import dataclass
from typing import Literal

M = '{model=~"$model"}'
R = "[$__rate_interval]"
ALL_MODELS = ".+:.+"  # name:version; not `none`, where requests without a model are counted
DRIFTED = 0.25  # population stability index: above, by custom, the texts have changed


@dataclass(frozen=True)
class Query:
    """PromQL, and the name of what it gives; {{label}} stands for a label's value."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """A panel.

    Attributes:
        kind: stat (one number over the time shown), lines, stack, or heatmap (of a histogram's buckets).
        unit: as Grafana names it.
        width: of 24 columns.
        least, most: of the axis, if not by the data.
        limit: a line that means trouble above it.
    """

    title: str
    kind: Literal["stat", "lines", "stack", "heatmap"]
    unit: str
    description: str
    queries: tuple[Query, ...]
    width: int = 12
    height: int = 8
    least: float | None = 0
    most: float | None = None
    limit: float | None = None


@dataclass(frozen=True)
class Dashboard:
    """A dashboard; panels flow from left to right, then down."""

    uid: str
    title: str
    panels: tuple[Panel, ...]


def _stat(title: str, unit: str, expr: str, description: str) -> Panel:
    return Panel(title, "stat", unit, description, (Query(expr),), width=6, height=4, least=None)


def _sum(metric: str, by: str = "", window: str = R, labels: str = M) -> str:
    """A counter's rate, summed over replicas and models."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{labels}{window}))"


def _quantiles(metric: str, labels: str = M) -> tuple[Query, ...]:
    buckets = _sum(f"{metric}_bucket", "le", labels=labels)
    return tuple(Query(f"histogram_quantile({q / 100}, {buckets})", f"p{q}") for q in (50, 95, 99))


def _stage(name: str) -> str:
    return f'{{model=~"$model", stage=~"{name}"}}'


def _speedup(stages: str, window: str = R) -> str:
    """Time at full depth / time spent. What early exit cannot save, tokenizing, is on both sides."""
    spent = _sum("de3_stage_latency_seconds_sum", window=window, labels=_stage(stages))
    full = _sum("de3_full_depth_seconds_total", window=window)
    if stages == "model":
        return f"{full} / {spent}"
    both = _sum("de3_stage_latency_seconds_sum", window=window, labels=_stage("tokenize"))
    return f"({full} + {both}) / {spent}"


def _layers(window: str = R) -> str:
    run, saved = (_sum(f"de3_layers_{x}_total", window=window) for x in ("run", "saved"))
    return f"({run} + {saved}) / {run}"


def _accuracy(window: str = R) -> str:
    right = _sum("de3_expected_right_texts_total", window=window)
    return f"{right} / {_sum('de3_calibrated_texts_total', window=window)}"


def _share(metric: str, window: str = R) -> str:
    """Of the texts that left."""
    return f"{_sum(metric, window=window)} / {_sum('de3_exit_layer_count', window=window)}"


_SAVED = (
    f"{_sum('de3_full_depth_seconds_total')} - "
    f"{_sum('de3_stage_latency_seconds_sum', labels=_stage('model'))}"
)
_SAVED_RANGE = (
    f"sum(increase(de3_full_depth_seconds_total{M}[$__range])) - "
    f"sum(increase(de3_stage_latency_seconds_sum{_stage('model')}[$__range]))"
)
_ACCURACY = Panel(
    "Accuracy expected",
    "lines",
    "percentunit",
    "By the calibration, of the texts that left by a τ it knows; and of full depth.",
    (
        Query(_accuracy(), "as answered"),
        Query(f"avg by (model) (de3_full_depth_accuracy{M})", "full depth {{model}}"),
    ),
    least=None,
)

SPEED_UP = Dashboard(
    "de3-speed-up",
    "Speed-up",
    (
        _stat("Speed-up in layers", "suffix:×", _layers("[$__range]"), "All layers / layers run."),
        _stat(
            "Speed-up in model time",
            "suffix:×",
            _speedup("model", "[$__range]"),
            "Time that every layer would have taken, by estimate, / time in the model.",
        ),
        _stat("Model time saved", "s", _SAVED_RANGE, "Of one core: time at full depth less time spent."),
        _stat(
            "Accuracy expected",
            "percentunit",
            _accuracy("[$__range]"),
            "By the calibration, of the texts that left by a τ it knows.",
        ),
        Panel(
            "Speed-up over full depth",
            "lines",
            "suffix:×",
            "In layers, in model time, and in model time and tokenizing together, as a core feels it.",
            (
                Query(_layers(), "layers"),
                Query(_speedup("model"), "model time"),
                Query(_speedup("tokenize|model"), "with tokenizing"),
            ),
        ),
        Panel(
            "Mean exit layer",
            "lines",
            "none",
            "Layer 0 is the exit on the embeddings.",
            (
                Query(
                    f"{_sum('de3_exit_layer_sum', 'model')} / {_sum('de3_exit_layer_count', 'model')}",
                    "{{model}}",
                ),
            ),
        ),
        Panel(
            "Share leaving at each layer",
            "heatmap",
            "percentunit",
            "Of the texts, over time.",
            (
                Query(
                    f"{_sum('de3_exit_layer_bucket', 'le')} / scalar({_sum('de3_exit_layer_count')})",
                    "{{le}}",
                ),
            ),
        ),
        Panel(
            "Why texts leave",
            "stack",
            "percentunit",
            "threshold: sure enough; last_layer: full depth; max_layer and deadline: as the request asked.",
            (
                Query(
                    f"{_sum('de3_exit_layer_count', 'reason')} / scalar({_sum('de3_exit_layer_count')})",
                    "{{reason}}",
                ),
            ),
            most=1,
        ),
        Panel(
            "Layers run and saved",
            "stack",
            "ops",
            "Encoder layers a second.",
            (
                Query(_sum("de3_layers_run_total"), "run"),
                Query(_sum("de3_layers_saved_total"), "saved"),
            ),
        ),
        Panel(
            "Cores saved",
            "lines",
            "none",
            "Seconds of model time saved each second.",
            (Query(_SAVED, "cores"),),
        ),
    ),
)

LATENCY = Dashboard(
    "de3-latency",
    "Latency",
    (
        _stat(
            "Requests",
            "reqps",
            _sum("de3_requests_total", labels=""),
            "All of /classify, refused ones too; now.",
        ),
        _stat(
            "p99",
            "s",
            f"histogram_quantile(0.99, {_sum('de3_request_latency_seconds_bucket', 'le', '[$__range]')})",
            "From a request's head to its answer.",
        ),
        _stat(
            "Answered",
            "percentunit",
            _sum("de3_requests_total", window="[$__range]", labels='{status="200"}')
            + " / "
            + _sum("de3_requests_total", window="[$__range]", labels=""),
            "Share of requests with status 200.",
        ),
        _stat(
            "Engine busy",
            "percentunit",
            _sum("de3_stage_latency_seconds_sum", labels=_stage("tokenize|model"))
            + " / sum(de3_engine_threads)",
            "Share of the engine threads' time with a text in hand; now.",
        ),
        Panel(
            "Latency of requests",
            "lines",
            "s",
            "From a request's head to its answer; and the objective, if there is one (--slo-p99-ms).",
            (
                *_quantiles("de3_request_latency_seconds"),
                Query("max(de3_latency_objective_seconds)", "objective"),
            ),
        ),
        Panel(
            "Where a text's time goes",
            "stack",
            "s",
            "Mean time in each stage.",
            (
                Query(
                    f"{_sum('de3_stage_latency_seconds_sum', 'stage')} / "
                    f"{_sum('de3_stage_latency_seconds_count', 'stage')}",
                    "{{stage}}",
                ),
            ),
        ),
        *(
            Panel(title, "lines", "s", what, _quantiles("de3_stage_latency_seconds", _stage(stage)), width=8)
            for stage, title, what in (
                ("queue", "Waiting", "Of one text, for an engine thread."),
                ("tokenize", "Tokenizing", "Of one text."),
                ("model", "In the model", "Of one text, to the layer where it left."),
            )
        ),
        Panel(
            "Queue",
            "lines",
            "none",
            "Texts that wait, and requests in flight.",
            (
                Query("sum(de3_queue_texts)", "texts waiting"),
                Query("sum(de3_in_flight_requests)", "requests in flight"),
            ),
        ),
        Panel(
            "Answers by status",
            "stack",
            "reqps",
            "499: the client went away.",
            (Query(_sum("de3_requests_total", "status", labels=""), "{{status}}"),),
        ),
        Panel(
            "Not answered, by cause",
            "stack",
            "reqps",
            "docs/grafana.md says what each means.",
            (Query(_sum("de3_rejected_total", "cause", labels=""), "{{cause}}"),),
        ),
        Panel(
            "Processor and memory",
            "lines",
            "short",
            "Cores used by the server, and its memory in GB.",
            (
                Query('sum(rate(process_cpu_seconds_total{job="de3"}[$__rate_interval]))', "cores"),
                Query('sum(process_resident_memory_bytes{job="de3"}) / 1e9', "GB"),
            ),
        ),
    ),
)

QUALITY = Dashboard(
    "de3-quality",
    "Quality",
    (
        _stat("τ in force", "none", f"max(de3_tau{M})", "For requests that name none."),
        _stat(
            "Drift",
            "none",
            'max(de3_drift{model=~"$model", statistic="psi"})',
            f"Population stability index of the worst signal; above {DRIFTED} the texts have changed.",
        ),
        _stat(
            "Degraded",
            "percentunit",
            _share("de3_degraded_texts_total", "[$__range]"),
            "Texts answered with a τ that was raised under load.",
        ),
        _stat(
            "Far from home",
            "percentunit",
            _share("de3_far_texts_total", "[$__range]"),
            "Texts far from every prototype, with --ood-policy flag or deepen.",
        ),
        Panel(
            "Entropy where texts left",
            "lines",
            "none",
            "0: sure. Of the classifier of the exit.",
            _quantiles("de3_exit_entropy"),
            most=1,
        ),
        Panel(
            "Distance ratio where texts left",
            "lines",
            "none",
            "0: the nearest prototype is of the class that the classifier ranks first; above ½: it is not.",
            _quantiles("de3_exit_distance_ratio"),
            most=1,
        ),
        Panel(
            "Drift",
            "lines",
            "none",
            "Population stability index of the last 500 texts at the first exit against calibration.",
            (Query('max by (signal) (de3_drift{model=~"$model", statistic="psi"})', "{{signal}}"),),
            limit=DRIFTED,
        ),
        Panel(
            "Drift, by distribution",
            "lines",
            "none",
            "Kolmogorov–Smirnov statistic: the largest gap between both distributions.",
            (Query('max by (signal) (de3_drift{model=~"$model", statistic="ks"})', "{{signal}}"),),
            most=1,
        ),
        Panel(
            "τ in force",
            "lines",
            "none",
            "Raised under load, where the server has a latency objective.",
            (Query(f"max by (model) (de3_tau{M})", "{{model}}"),),
        ),
        Panel(
            "Degraded and far",
            "lines",
            "percentunit",
            "Shares of the texts: answered with a raised τ; far from every prototype.",
            (
                Query(_share("de3_degraded_texts_total"), "degraded"),
                Query(_share("de3_far_texts_total"), "far"),
            ),
        ),
        _ACCURACY,
        Panel(
            "Load level",
            "lines",
            "none",
            "Steps by which the default τ is raised.",
            (Query("max(de3_load_level)", "level"),),
        ),
    ),
)
# Accuracy belongs beside speed, too.
SPEED_UP = Dashboard(SPEED_UP.uid, SPEED_UP.title, (*SPEED_UP.panels, _ACCURACY))

DASHBOARDS = (SPEED_UP, LATENCY, QUALITY)
