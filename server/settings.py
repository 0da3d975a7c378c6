"""The settings of a server; those that its runtime reads are in runtime/settings.py.

Each is declared once, as a field: its flag, help and default in `de3 serve`, and its environment variable.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from functools import partial
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, SecretStr, model_validator
from typer import Option

from de3.runtime.settings import RuntimeSettings, audit_option, engine_option, limit_option, load_option

PREFIX = "DE3_"
FROM_FILES = ("upstreams",)  # fields that `de3 serve` reads from .toml files, without a flag or variable
# Variables with the same prefix that are read by clients, or by `de3 serve NAME` before it starts the server.
OTHER_VARIABLES = ("DE3_ADMIN_KEY", "DE3_API_KEY", "DE3_CACHE", "DE3_CACHE_GB", "DE3_URL")
SECRETS = ("api_keys", "admin_keys")  # settings without a flag, as other users can see the flags of a process

# The order of the options in the help, the most used ones first.
ORDER = (
    *("models", "store", "host", "port", "guarantee", "guarantee_missed", "observe", "flags"),
    "long_texts",
    *("learn", "tau", "max_disagreement", "max_missed", "api_keys_file"),
    *(
        "state_dir",
        "default_model",
        "aliases",
        "questions",
        "runtime",
        "threads",
        "processes",
        "target_speedup",
    ),
    *("latency_budget_ms", "ood_policy", "slo_p99_ms", "min_accuracy", "audit_share", "without_upstream"),
    *("allow_plain_http", "learn_bytes", "admin_keys_file", "rate_limit", "trusted_proxies", "cors_origins"),
    *("allowed_hosts", "max_queue", "max_texts", "max_body_bytes", "max_inflight_bytes", "keep_alive_s"),
    *("max_connections", "timeout_s", "drain_s", "log_format", "log_requests", "log_texts", "traces"),
)

access_option = partial(Option, rich_help_panel="Access")
log_option = partial(Option, rich_help_panel="Logs and traces")
GUARANTEE_SHARE = 0.05  # default of audit_share with --guarantee


def _network(text: str) -> str:
    """The text, if it is a network; otherwise raises ValueError."""
    try:
        ip_network(text)
    except ValueError as error:
        raise ValueError(f"{error}; give a network such as 10.0.0.0/8") from None
    return text


class Settings(RuntimeSettings):
    """The settings of one server."""

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
    learn: Annotated[
        bool,
        Option(
            "--learn",
            help="Fit exits to live traffic, without labels. Needs a guarantee and the fit extra.",
        ),
    ] = False
    api_keys_file: Annotated[
        Path | None,
        Option(
            help="File of API keys, which clients then need; each line: a name, and a key or sha256:digest. Or "
            "DE3_API_KEYS, separated by ;."
        ),
    ] = None
    api_keys: SecretStr | None = None
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
    questions: Annotated[
        Path | None,
        engine_option(
            help="A .toml file that binds questions to models, for POST /v1/decisions and /v1/systemone."
        ),
    ] = None
    slo_p99_ms: Annotated[
        float | None,
        Field(gt=0),
        load_option(
            help="Objective for the p99 latency, milliseconds: to meet it under load, the default τ is raised, then "
            "requests are shed."
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
    def _check_together(self) -> Self:
        for one, most in (("max_texts", "max_queue"), ("max_body_bytes", "max_inflight_bytes")):
            if getattr(self, one) > getattr(self, most):
                flags = [f"--{name.replace('_', '-')} ({getattr(self, name)})" for name in (one, most)]
                raise ValueError(f"{flags[0]} must not exceed {flags[1]}: set both")
        if self.has_guarantee and self.audit_share == 0:
            raise ValueError("guarantee: needs audits, and audit_share is 0")
        if self.learn and not self.has_guarantee:
            raise ValueError(
                "learn: needs guarantee or guarantee_missed, which decide how early its exits may answer"
            )
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
            return GUARANTEE_SHARE if self.has_guarantee else 0.0
        return self.audit_share

    @property
    def keeps_records(self) -> bool:
        """True if audited texts are recorded, as numbers: for learning, or for de3 calibrate and de3 import."""
        return self.learn or (bool(self.audit_share) and self.state_dir is not None)


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
