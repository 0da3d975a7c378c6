"""The settings of a server.

Each is declared once, as a field of Settings: its flag, help and default in `de3 serve`, and its environment variable.
"""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, model_validator
from typer import Option

from de3.runtime.options import EXCLUSIVE, MAX_BUDGET_MS, ExitOptions
from de3.runtime.upstream_settings import UpstreamModel

PREFIX = "DE3_"
FROM_FILES = ("upstreams",)  # fields that `de3 serve` reads from .toml files, without a flag or variable
# Variables with the same prefix that are read by clients, or by `de3 serve NAME` before it starts the server.
OTHER_VARIABLES = ("DE3_ADMIN_KEY", "DE3_API_KEY", "DE3_CACHE", "DE3_CACHE_GB", "DE3_URL")
SECRETS = ("api_keys", "admin_keys")  # settings without a flag, as other users can see the flags of a process

limit_option = partial(Option, rich_help_panel="Limits")
default_option = partial(Option, rich_help_panel="Default exit options")
load_option = partial(Option, rich_help_panel="Under load")
audit_option = partial(Option, rich_help_panel="Audits and learning")
access_option = partial(Option, rich_help_panel="Access")
log_option = partial(Option, rich_help_panel="Logs and traces")
engine_option = partial(Option, rich_help_panel="Models and engine")
GUARANTEE_SHARE = 0.05  # default of audit_share with --guarantee


def _network(text: str) -> str:
    """The text, if it is a network; otherwise raises ValueError."""
    try:
        ip_network(text)
    except ValueError as error:
        raise ValueError(f"{error}; give a network such as 10.0.0.0/8") from None
    return text


class Settings(BaseModel):
    """The settings of one server, the most used ones first."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    models: Annotated[
        list[str],
        Option(
            "--model",
            help="Model in the store, as name or name:version; repeat for more (in DE3_MODELS: separated by spaces). "
            "Default: all.",
        ),
    ] = []
    store: Annotated[Path, Option(help="Folder of the model store.")] = Path("models")
    host: Annotated[str, Option(help="Address to listen on (0.0.0.0: all).")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535), Option(help="Port to listen on.")] = 8000
    guarantee: Annotated[
        float | None,
        Field(gt=0, lt=1),
        Option(
            help="Maximum rate of answers that differ from full depth, proven by audits at 95% confidence. Replaces "
            "--tau and other default exit options."
        ),
    ] = None
    learn: Annotated[
        bool,
        Option(
            "--learn",
            help="Fit exits to live traffic, without labels. Needs --guarantee and the fit extra.",
        ),
    ] = False
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
    api_keys_file: Annotated[
        Path | None,
        Option(
            help="File of API keys, which clients then need; each line: a name, and a key or sha256:digest. Or "
            "DE3_API_KEYS, separated by ;."
        ),
    ] = None
    api_keys: SecretStr | None = None
    state_dir: Annotated[
        Path | None,
        Option(
            help="Folder in which audit results and learned versions survive restarts; one for each replica."
        ),
    ] = None
    default_model: Annotated[
        str | None,
        engine_option(
            help="Model for requests that do not name one. Default: the first of the named models, or the only one "
            "in the store."
        ),
    ] = None
    aliases: Annotated[
        list[Annotated[str, Field(pattern=r"^[^\s=:]+=[^\s=]+$")]],
        engine_option(
            "--alias",
            help="Another name of a served model, as ALIAS=NAME or ALIAS=NAME:VERSION; repeat for more (in the "
            "variable: separated by spaces).",
        ),
    ] = []
    runtime: Annotated[
        Literal["auto", "native", "onnxruntime"],
        engine_option(help="onnxruntime, native (int8 kernels), or auto: native if possible."),
    ] = "auto"
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
    slo_p99_ms: Annotated[
        float | None,
        Field(gt=0),
        load_option(
            help="Objective for the p99 latency, milliseconds: to meet it under load, the default τ is raised, then "
            "requests are shed."
        ),
    ] = None
    min_accuracy: Annotated[
        float | None,
        Field(ge=0, le=1),
        load_option(
            help="Lower limit on the calibrated accuracy when τ is raised under load. Default: 0.02 below full depth."
        ),
    ] = None
    audit_share: Annotated[
        float | None,
        Field(ge=0, le=1),
        audit_option(
            help="Share of texts that also run to full depth, while nothing else is pending, to measure how often "
            "early answers differ from it. Default: 0; 0.05 with --guarantee."
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
    upstreams: list[UpstreamModel] = []
    learn_bytes: Annotated[
        int, Field(ge=2**20), audit_option(help="Memory for the records of each model, bytes.")
    ] = 2**27
    admin_keys_file: Annotated[
        Path | None,
        access_option(
            help="File of admin keys, for loading and unloading models. Or set DE3_ADMIN_KEYS. Default: models cannot "
            "be changed."
        ),
    ] = None
    admin_keys: SecretStr | None = None
    rate_limit: Annotated[
        str | None,
        access_option(help="Rate limit for each API key name, in texts, such as 100/second."),
    ] = None
    trusted_proxies: Annotated[
        list[Annotated[str, AfterValidator(_network)]],
        access_option(
            "--trusted-proxy",
            help="Network of proxies whose X-Forwarded-For names the client, such as 10.0.0.0/8; repeat for more. "
            "Clients without a key are identified by address.",
        ),
    ] = []
    cors_origins: Annotated[
        list[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]],
        access_option(
            "--cors-origin", help="Origin whose pages may send requests; repeat for more, * for all."
        ),
    ] = []
    allowed_hosts: Annotated[
        list[Annotated[str, Field(pattern=r"^(\*|[^/\s:]+)$")]],
        access_option(
            "--allowed-host",
            help="Name allowed in the Host header, besides localhost and IP addresses; repeat for more, * for all. "
            "Checked, to prevent DNS rebinding, by a server without keys that listens on this machine only.",
        ),
    ] = []
    max_queue: Annotated[
        int,
        Field(ge=1),
        limit_option(
            help="Limit on texts in flight. Beyond it, requests get 503, or 429 if the client exceeds its "
            "share."
        ),
    ] = 1024
    max_texts: Annotated[int, Field(ge=1), limit_option(help="Limit on texts in one request.")] = 256
    max_body_bytes: Annotated[
        int, Field(ge=1024), limit_option(help="Limit on the size of a request body, bytes.")
    ] = 2**20
    max_inflight_bytes: Annotated[
        int,
        Field(ge=1024),
        limit_option(help="Limit on request bodies in memory, over all requests, bytes."),
    ] = 2**26
    keep_alive_s: Annotated[
        float,
        Field(gt=0),
        limit_option(help="Limit on the time that a connection is idle between two requests, seconds."),
    ] = 75.0
    max_connections: Annotated[
        int,
        Field(ge=0),
        limit_option(help="Limit on open connections; 0: as many as the limit on open files allows."),
    ] = 0
    timeout_s: Annotated[
        float,
        Field(gt=0),
        limit_option(help="Limit on the time from a request's arrival to its response, seconds."),
    ] = 30.0
    drain_s: Annotated[
        float,
        Field(ge=0),
        limit_option(
            help="Time for which requests are still accepted after SIGTERM, seconds; /ready is 503 meanwhile, so that "
            "load balancers notice. A second SIGTERM ends it."
        ),
    ] = 0.0
    log_format: Annotated[
        Literal["text", "json"], log_option(help="text, or json (one object per line).")
    ] = "text"
    log_requests: Annotated[bool, log_option("--log-requests", help="Log a line for each request.")] = False
    log_texts: Annotated[bool, log_option("--log-texts", help="Also log the texts. They are user data.")] = (
        False
    )
    traces: Annotated[
        bool,
        log_option(
            "--traces", help="Send OpenTelemetry traces to OTEL_EXPORTER_OTLP_ENDPOINT; needs the otel extra."
        ),
    ] = False

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        for one, most in (("max_texts", "max_queue"), ("max_body_bytes", "max_inflight_bytes")):
            if getattr(self, one) > getattr(self, most):
                flags = [f"--{name.replace('_', '-')} ({getattr(self, name)})" for name in (one, most)]
                raise ValueError(f"{flags[0]} must not exceed {flags[1]}: set both")
        _ = self.options
        if self.guarantee is not None:
            other = next((name for name in EXCLUSIVE if getattr(self, name) is not None), None)
            if other is not None:
                raise ValueError(f"guarantee: cannot be combined with {other}; give one of them")
            if self.audit_share == 0:
                raise ValueError("guarantee: needs audits, and audit_share is 0")
        for of in self.upstreams:
            if not of.upstream.is_encrypted and not self.allow_plain_http:
                raise ValueError(
                    f"{of.name}: upstream.url: would send texts unencrypted to another machine; give an https URL, or "
                    "serve it with --allow-plain-http"
                )
        if self.learn and self.guarantee is None:
            raise ValueError("learn: needs guarantee, which decides how early its exits may answer")
        return self

    @property
    def targets(self) -> dict[str, str]:
        """The models' names, by alias."""
        return dict(alias.split("=") for alias in self.aliases)

    @property
    def has_keys(self) -> bool:
        """True if users need keys. Their names are then the server's tenants; otherwise all clients are one tenant."""
        return self.api_keys is not None or self.api_keys_file is not None

    @property
    def share_of_audits(self) -> float:
        """Share of texts that are audited; 0: none."""
        if self.audit_share is None:
            return GUARANTEE_SHARE if self.guarantee is not None else 0.0
        return self.audit_share

    @property
    def keeps_records(self) -> bool:
        """True if audited texts are recorded, as numbers: for learning, or for de3 calibrate and de3 import."""
        return self.learn or (bool(self.audit_share) and self.state_dir is not None)

    @property
    def options(self) -> ExitOptions:
        """The exit options of requests that set none."""
        return ExitOptions(**{name: getattr(self, name) for name in EXCLUSIVE})

    def engine_threads(self) -> int:
        """Number of engine threads: the number set, or one for each available core."""
        return self.threads or available_cores()


def variable(name: str) -> str:
    """The environment variable of a field of Settings."""
    return PREFIX + name.upper()


def unknown_variables(environment: Mapping[str, str]) -> dict[str, str | None]:
    """Environment variables with the prefix that are not settings, by name: the one with a similar name, or None.

    Kubernetes sets such variables, too, for a service named de3-web; they are similar to none.
    """
    fields = Settings.model_fields.keys() - {*FROM_FILES}
    known = {variable(name) for name in fields} | {*OTHER_VARIABLES}
    return {
        name: next(iter(get_close_matches(name, known, 1, 0.8)), None) if "://" not in value else None
        for name, value in sorted(environment.items())
        if name.startswith(PREFIX) and name not in known
    }


def available_cores() -> int:
    """Cores available to this process: its CPU affinity, limited by the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, cpu_quota() or cores))


def cpu_quota() -> int | None:
    """The container's CPU quota, in cores; a fraction of a core counts as one. None: it has no quota."""
    try:
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())  # "max": no quota
    except (OSError, ValueError):
        return None
    return -(-quota // period)
