"""The panels of the dashboards, with their PromQL. Dashboards and tests are generated from them."""

from dataclasses import dataclass
from typing import Literal

M = '{model=~"$model"}'
R = "[$__rate_interval]"
ALL_MODELS = ".+:.+"  # matches name:version, but not `none`, the label of requests without a model
DRIFTED = 0.25  # population stability index: by convention, a higher value means that the texts have changed


@dataclass(frozen=True)
class Query:
    """A PromQL query and its legend, in which {{label}} is replaced by the label's value."""

    expr: str
    legend: str = ""


@dataclass(frozen=True)
class Panel:
    """A panel of a dashboard.

    Attributes:
        kind: stat (one number), lines, stack, or heatmap (of a histogram's buckets).
        unit: Grafana's identifier of the unit.
        width, height: size in Grafana's grid, which has 24 columns.
        least, most: range of the axis; None: from the data.
        limit: a threshold, drawn as a line; None: no line.
        row: title of the row that begins with this panel; None: the previous row continues.
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
    row: str | None = None


@dataclass(frozen=True)
class Dashboard:
    """A dashboard; panels flow from left to right, then down."""

    uid: str
    title: str
    panels: tuple[Panel, ...]


def _stat(title: str, unit: str, expr: str, description: str) -> Panel:
    return Panel(title, "stat", unit, description, (Query(expr),), width=6, height=4, least=None)


def _sum(metric: str, by: str = "", window: str = R, labels: str = M) -> str:
    """A counter's rate, summed over all labels except `by`."""
    return f"sum{f' by ({by}) ' if by else ''}(rate({metric}{labels}{window}))"


def _quantiles(metric: str, labels: str = M) -> tuple[Query, ...]:
    buckets = _sum(f"{metric}_bucket", "le", labels=labels)
    return tuple(Query(f"histogram_quantile({q / 100}, {buckets})", f"p{q}") for q in (50, 95, 99))


def _stage(name: str) -> str:
    return f'{{model=~"$model", stage=~"{name}"}}'


def _speedup(stages: str, window: str = R) -> str:
    """Time at full depth / time spent.

    If `stages` includes tokenizing, its time counts in numerator and denominator, because early exit does not save it.
    """
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
    correct = _sum("de3_expected_correct_texts_total", window=window)
    return f"{correct} / {_sum('de3_calibrated_texts_total', window=window)}"


def _share(metric: str, window: str = R) -> str:
    """A counter's rate, as a share of the answered texts."""
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
    "Expected accuracy",
    "lines",
    "percentunit",
    "Accuracy according to the calibration: of texts answered with a τ from its table, and at full depth.",
    (
        Query(_accuracy(), "as answered"),
        Query(f"avg by (model) (de3_full_depth_accuracy{M})", "full depth {{model}}"),
    ),
    least=None,
)

_AUDIT_SECONDS = _sum("de3_audit_seconds_total")
_GUARANTEE = (
    Panel(
        "Measured disagreement",
        "lines",
        "percentunit",
        "Rate of disagreement with full depth at the τ in force, measured by audits of live traffic, with its 95% "
        "bounds; and the guarantee, which is broken where the lower bound is above it. With several replicas, the "
        "highest value of each.",
        (
            Query(f"max by (model) (de3_audit_disagreement{M})", "measured {{model}}"),
            Query(f"max by (model) (de3_audit_disagreement_lower{M})", "lower bound {{model}}"),
            Query(f"max by (model) (de3_audit_disagreement_upper{M})", "upper bound {{model}}"),
            Query(f"max by (model) (de3_audit_guarantee{M})", "guaranteed {{model}}"),
        ),
        row="Guarantee",
    ),
    Panel(
        "Flagged texts missed",
        "lines",
        "percentunit",
        "With --flag: of the texts that full depth flags, the share that early exits answer as safe, at the τ in "
        "force, with its 95% bounds and the guarantee; and the share of all answers that are flagged.",
        (
            Query(f"max by (model) (de3_audit_missed{M})", "missed {{model}}"),
            Query(f"max by (model) (de3_audit_missed_lower{M})", "lower bound {{model}}"),
            Query(f"max by (model) (de3_audit_missed_upper{M})", "upper bound {{model}}"),
            Query(f"max by (model) (de3_audit_missed_guarantee{M})", "guaranteed {{model}}"),
            Query(_share("de3_flagged_texts_total"), "flagged"),
        ),
    ),
    Panel(
        "τ by reason",
        "lines",
        "none",
        "τ for requests without exit options. With a guarantee: the median over the tenants, and the lowest and "
        "highest; the reason is start, evidence (raised by audits), recent (lowered by recent audits), change (the "
        "rate rose) or reset (by an admin). Without one: the reason is the option that set τ.",
        (
            Query(f"max by (model, reason) (de3_audit_tau{M})", "{{reason}} {{model}}"),
            Query(f"min by (model) (de3_audit_tau_lowest{M})", "lowest {{model}}"),
            Query(f"max by (model) (de3_audit_tau_highest{M})", "highest {{model}}"),
        ),
    ),
    Panel(
        "Audits",
        "lines",
        "none",
        "Audited texts per second, and audits waiting for idle time.",
        (
            Query(_sum("de3_audit_texts_total"), "audits/s"),
            Query(f"sum(de3_audit_pending_texts{M})", "pending"),
        ),
        width=8,
    ),
    Panel(
        "Share and cost of audits",
        "lines",
        "percentunit",
        "Probability that the next text is audited; and the audits' share of all model time.",
        (
            Query(f"max by (model) (de3_audit_share{M})", "of texts {{model}}"),
            Query(
                f"{_AUDIT_SECONDS} / ({_AUDIT_SECONDS} + "
                f"{_sum('de3_stage_latency_seconds_sum', labels=_stage('model'))})",
                "of model time",
            ),
        ),
        width=8,
        most=1,
    ),
    Panel(
        "Resets",
        "lines",
        "none",
        "Resets of the audit evidence. change: the rate at the proved τ rose above the guarantee; "
        "reset: by an admin.",
        (Query(f"sum by (model, reason) (increase(de3_audit_resets_total{M}{R}))", "{{reason}} {{model}}"),),
        width=8,
    ),
)

_LEARN = (
    Panel(
        "Records of live traffic",
        "lines",
        "none",
        "With --learn: records in memory, to which exits are fitted, and records still needed before the next fit.",
        (
            Query("max by (model) (de3_learn_records)", "records {{model}}"),
            Query("min by (model) (de3_learn_missing_records)", "until the next fit {{model}}"),
        ),
        width=8,
        row="Learning",
    ),
    Panel(
        "Speed-up of the latest fit",
        "lines",
        "none",
        "Speed-up in layers of the latest fit's exits on held-out records: what they allow at the guaranteed rate, "
        "and what these records prove. Served exits become faster as audits of live traffic prove more.",
        (
            Query("max by (model) (de3_learn_speedup)", "at the guaranteed rate {{model}}"),
            Query("max by (model) (de3_learn_proved_speedup)", "proved {{model}}"),
        ),
        width=8,
    ),
    Panel(
        "Fits",
        "lines",
        "none",
        "Fits of exits by outcome: served, waits (for newer texts), not_faster (than what is served), "
        "outdated (the traffic or the models changed meanwhile) or failed; and running fits.",
        (
            Query(f"sum by (model, outcome) (increase(de3_learn_fits_total{R}))", "{{outcome}} {{model}}"),
            Query("sum by (model) (de3_learn_fitting)", "running {{model}}"),
        ),
        width=8,
    ),
)

_UPSTREAM = (
    Panel(
        "Answered without a call",
        "lines",
        "percentunit",
        "Share of the texts of the last 5 minutes that the model answered itself, without its upstream.",
        (Query("max by (model) (de3_local_share)", "{{model}}"),),
        width=6,
        most=1,
        row="Upstream",
    ),
    Panel(
        "Calls of the upstream",
        "stack",
        "reqps",
        "By kind: learning (no τ is proved yet), uncertain (no exit was sure), audit (of an answer of the model), "
        "repeat (second call of an audit), retry (after a failure).",
        (Query(f"sum by (kind) (rate(de3_upstream_calls_total{R}))", "{{kind}}"),),
        width=6,
    ),
    Panel(
        "Failed calls",
        "stack",
        "reqps",
        "Failed calls of the upstream by reason.",
        (Query(f"sum by (reason) (rate(de3_upstream_failures_total{R}))", "{{reason}}"),),
        width=6,
    ),
    Panel(
        "Money",
        "lines",
        "none",
        "Price of the calls so far, and the estimated price of those that the model's answers saved, in the currency "
        "of the prices in the .toml file.",
        (
            Query("max by (model) (de3_upstream_cost_total)", "spent {{model}}"),
            Query("max by (model) (de3_upstream_saved)", "saved {{model}}"),
        ),
        width=6,
    ),
)

SPEED_UP = Dashboard(
    "de3-speed-up",
    "Speed-up",
    (
        _stat(
            "Speed-up in layers",
            "suffix:×",
            _layers("[$__range]"),
            "All layers / layers run, over the time range.",
        ),
        _stat(
            "Speed-up in model time",
            "suffix:×",
            _speedup("model", "[$__range]"),
            "Estimated time through every layer / time in the model.",
        ),
        _stat(
            "Model time saved",
            "s",
            _SAVED_RANGE,
            "Seconds of one core: estimated time at full depth minus time spent.",
        ),
        _stat(
            "Expected accuracy",
            "percentunit",
            _accuracy("[$__range]"),
            "According to the calibration, for texts answered with a τ from its table.",
        ),
        Panel(
            "Speed-up over full depth",
            "lines",
            "suffix:×",
            "In layers, in model time, and in model time plus tokenizing, which is all of the engine's work.",
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
            "Mean exit layer of the texts. Layer 0 is the exit on the embeddings.",
            (
                Query(
                    f"{_sum('de3_exit_layer_sum', 'model')} / {_sum('de3_exit_layer_count', 'model')}",
                    "{{model}}",
                ),
            ),
        ),
        Panel(
            "Exit layers",
            "heatmap",
            "percentunit",
            "Share of the texts that exited at each layer.",
            (
                Query(
                    f"{_sum('de3_exit_layer_bucket', 'le')} / scalar({_sum('de3_exit_layer_count')})",
                    "{{le}}",
                ),
            ),
        ),
        Panel(
            "Exit reasons",
            "stack",
            "percentunit",
            "threshold: score below τ; last_layer, upstream: full depth; max_layer, deadline: limits of the request; "
            "upstream_failed.",
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
            "Encoder layers per second.",
            (
                Query(_sum("de3_layers_run_total"), "run"),
                Query(_sum("de3_layers_saved_total"), "saved"),
            ),
        ),
        Panel(
            "Cores saved",
            "lines",
            "none",
            "Seconds of model time saved per second.",
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
            "Current rate of classification requests, rejected ones included.",
        ),
        _stat(
            "p99 latency",
            "s",
            f"histogram_quantile(0.99, {_sum('de3_request_latency_seconds_bucket', 'le', '[$__range]')})",
            "From a request's head to its response or timeout, over the time range.",
        ),
        _stat(
            "Success rate",
            "percentunit",
            _sum("de3_requests_total", window="[$__range]", labels='{status="200"}')
            + " / "
            + _sum("de3_requests_total", window="[$__range]", labels=""),
            "Share of requests with status 200, over the time range.",
        ),
        _stat(
            "Engine utilization",
            "percentunit",
            _sum("de3_stage_latency_seconds_sum", labels=_stage("tokenize|model"))
            + " / sum(de3_engine_threads)",
            "Current share of the engine threads' time that is spent on texts.",
        ),
        Panel(
            "Request latency",
            "lines",
            "s",
            "From a request's head to its response or timeout; and the objective, if set (--slo-p99-ms).",
            (
                *_quantiles("de3_request_latency_seconds"),
                Query("max(de3_latency_objective_seconds)", "objective"),
            ),
        ),
        Panel(
            "Time per stage",
            "stack",
            "s",
            "Mean time of a text in each stage.",
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
                ("queue", "Queue time", "Time that a text waits for an engine thread."),
                ("tokenize", "Tokenizing time", "Time to tokenize a text."),
                ("model", "Model time", "Time of a text in the model, up to its exit layer."),
            )
        ),
        Panel(
            "Queue",
            "lines",
            "none",
            "Texts pending in the queue, and requests in flight.",
            (
                Query("sum(de3_queue_texts)", "pending texts"),
                Query("sum(de3_in_flight_requests)", "requests in flight"),
            ),
        ),
        Panel(
            "Responses by status",
            "stack",
            "reqps",
            "499: the client disconnected.",
            (Query(_sum("de3_requests_total", "status", labels=""), "{{status}}"),),
        ),
        Panel(
            "Rejected requests by cause",
            "stack",
            "reqps",
            "Rejected requests. docs/grafana.md explains each cause.",
            (Query(_sum("de3_rejected_total", "cause", labels=""), "{{cause}}"),),
        ),
        Panel(
            "CPU and memory",
            "lines",
            "short",
            "Cores used by the server, and its resident memory in GB.",
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
        _stat("τ in force", "none", f"max(de3_tau{M})", "τ for requests without exit options."),
        _stat(
            "Drift",
            "none",
            'max(de3_drift{model=~"$model", statistic="psi"})',
            f"Population stability index of the worst signal; above {DRIFTED}, the texts have changed.",
        ),
        _stat(
            "Degraded",
            "percentunit",
            _share("de3_degraded_texts_total", "[$__range]"),
            "Share of the texts answered with a τ raised under load.",
        ),
        _stat(
            "Out of distribution",
            "percentunit",
            _share("de3_ood_texts_total", "[$__range]"),
            "Share of the texts far from every prototype at an exit; needs --ood-policy flag or deepen.",
        ),
        Panel(
            "Entropy at exit",
            "lines",
            "none",
            "Normalized entropy at the exit of each text. 0: certain; 1: uniform.",
            _quantiles("de3_exit_entropy"),
            most=1,
        ),
        Panel(
            "Distance ratio at exit",
            "lines",
            "none",
            "Below ½: nearer to the prototype of the predicted class than to the second class's; above ½: farther.",
            _quantiles("de3_exit_distance_ratio"),
            most=1,
        ),
        Panel(
            "Drift (PSI)",
            "lines",
            "none",
            "Population stability index: the last 500 texts at the first exit, compared with the calibration.",
            (Query('max by (signal) (de3_drift{model=~"$model", statistic="psi"})', "{{signal}}"),),
            limit=DRIFTED,
        ),
        Panel(
            "Drift (KS)",
            "lines",
            "none",
            "Kolmogorov–Smirnov statistic: the largest gap between the two distributions.",
            (Query('max by (signal) (de3_drift{model=~"$model", statistic="ks"})', "{{signal}}"),),
            most=1,
        ),
        Panel(
            "τ in force",
            "lines",
            "none",
            "τ for requests without exit options; raised under load if there is a latency objective.",
            (Query(f"max by (model) (de3_tau{M})", "{{model}}"),),
        ),
        Panel(
            "Degraded and out of distribution",
            "lines",
            "percentunit",
            "Shares of texts answered with a τ raised under load, and of texts far from every prototype at an exit.",
            (
                Query(_share("de3_degraded_texts_total"), "degraded"),
                Query(_share("de3_ood_texts_total"), "out of distribution"),
            ),
        ),
        _ACCURACY,
        Panel(
            "Load level",
            "lines",
            "none",
            "Number of steps by which the default τ is raised.",
            (Query("max(de3_load_level)", "level"),),
        ),
        *_GUARANTEE,
        *_LEARN,
        *_UPSTREAM,
        Panel(
            "Spans by label",
            "lines",
            "cps",
            "Spans per second in the answers of token classifiers, by label.",
            (Query(_sum("de3_spans_total", "label"), "{{label}}"),),
            row="Spans",
        ),
    ),
)
# The accuracy panel is on the speed-up dashboard, too.
SPEED_UP = Dashboard(SPEED_UP.uid, SPEED_UP.title, (*SPEED_UP.panels, _ACCURACY))

DASHBOARDS = (SPEED_UP, LATENCY, QUALITY)
