"""The settings of a server.

Each is declared once, as a field here, which defines its flag, environment variable, help and default in `de3 serve`.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from de3.server.options import EXCLUSIVE, MAX_BUDGET_MS, ExitOptions

PREFIX = "DE3_"
# Variables with the same prefix that are read by clients, or by `de3 serve NAME` before it starts the server.
OTHER_VARIABLES = ("DE3_ADMIN_KEY", "DE3_API_KEY", "DE3_CACHE", "DE3_CACHE_GB", "DE3_URL")


@dataclass(frozen=True)
class Option:
    """The command-line flag of a field of Settings.

    Attributes:
        panel: heading in --help.
        flag: the flag, if not the field's name; the flag of a list can be repeated.
    """

    panel: str = "Options"
    flag: str = ""


LIMITS = Option("Limits")
DEFAULTS = Option("Default exit options")
LOAD = Option("Under load")
ACCESS = Option("Access")
LOGS = Option("Logs and traces")
AUDITS = Option("Audits")
LEARN = Option("Learning from live traffic")
GUARANTEE_SHARE = 0.05  # default of audit_share with --guarantee


class Settings(BaseModel):
    """The settings of one server.

    A field's description is the help of its flag. Secrets have an environment variable but no flag, as other users of
    the machine can see the flags of a process.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)

    store: Annotated[Path, Option()] = Field(Path("models"), description="Folder of the model store.")
    models: Annotated[list[str], Option(flag="--model")] = Field(
        [],
        description="Model to serve, as name or name:version; repeat for more (in the variable: separated by spaces). "
        "The first answers requests that name no model; the first version of a name answers those that name no "
        "version. Default: the newest version of every model in the store.",
    )
    default_model: Annotated[str | None, Option()] = Field(
        None,
        description="Model that answers requests that name none. Default: the first of the named models, or the only "
        "one in the store.",
    )
    host: Annotated[str, Option()] = Field(
        "127.0.0.1", description="Address to listen on; 0.0.0.0: all IPv4 addresses."
    )
    port: Annotated[int, Option()] = Field(8000, ge=0, le=65535, description="Port to listen on.")
    threads: Annotated[int, Option()] = Field(
        0,
        ge=0,
        le=1024,
        description="Engine threads; each runs one text, or a group of short ones, at a time. 0: one per core.",
    )
    processes: Annotated[int, Option()] = Field(
        0,
        ge=0,
        le=256,
        description="Processes that serve models; each has a part of the engine threads, and of the limits on texts, "
        "body bytes and connections. 0: one for each engine thread, or for every four if a model is large, as far as "
        "memory allows; but only one if ONNX Runtime runs a model.",
    )
    runtime: Annotated[Literal["auto", "native", "onnxruntime"], Option()] = Field(
        "auto",
        description="onnxruntime, native (int8 kernels), or auto: native if possible.",
    )
    max_queue: Annotated[int, LIMITS] = Field(
        1024,
        ge=1,
        description="Limit on texts in flight. Beyond it, requests get 503, or 429 if the client holds more than its "
        "share.",
    )
    max_texts: Annotated[int, LIMITS] = Field(256, ge=1, description="Limit on texts in one request.")
    max_body_bytes: Annotated[int, LIMITS] = Field(
        2**20, ge=1024, description="Limit on the size of a request body, bytes."
    )
    body_timeout_s: Annotated[float, LIMITS] = Field(
        10.0, gt=0, description="Limit on the time to receive a body, seconds."
    )
    timeout_s: Annotated[float, LIMITS] = Field(
        30.0, gt=0, description="Limit on the time from a request's arrival to its response, seconds."
    )
    max_connections: Annotated[int, LIMITS] = Field(
        0, ge=0, description="Limit on open connections; 0: as many as the limit on open files allows."
    )
    max_inflight_bytes: Annotated[int, LIMITS] = Field(
        2**26, ge=1024, description="Limit on request bodies in memory, over all requests, bytes."
    )
    trusted_proxies: Annotated[list[str], Option("Limits", "--trusted-proxy")] = Field(
        [],
        description="Network of proxies whose X-Forwarded-For names the client, such as 10.0.0.0/8; repeat for more. "
        "Clients without a key are identified by address.",
    )
    ood_policy: Annotated[Literal["off", "flag", "deepen"], Option()] = Field(
        "off",
        description="Policy for out-of-distribution texts (far from every prototype): off, flag, or deepen (flag, and "
        "halve their τ).",
    )
    tau: Annotated[float | None, DEFAULTS] = Field(
        None,
        ge=0,
        le=1,
        description="τ for requests without exit options. Default: each model's calibrated τ.",
    )
    target_speedup: Annotated[float | None, DEFAULTS] = Field(
        None,
        ge=1,
        description="Mean speed-up for requests without exit options, by the calibration; instead of --tau.",
    )
    latency_budget_ms: Annotated[float | None, DEFAULTS] = Field(
        None,
        gt=0,
        le=MAX_BUDGET_MS,
        description="Latency budget for requests without exit options, milliseconds; instead of --tau.",
    )
    max_disagreement: Annotated[float | None, DEFAULTS] = Field(
        None,
        ge=0,
        le=1,
        description="Rate of answers that may differ from full depth, at 95% confidence, for requests without exit "
        "options; instead of --tau.",
    )
    slo_p99_ms: Annotated[float | None, LOAD] = Field(
        None,
        gt=0,
        description="Objective for the p99 latency, milliseconds: to keep it under load, the default τ is raised, then "
        "requests are shed.",
    )
    min_accuracy: Annotated[float | None, LOAD] = Field(
        None,
        ge=0,
        le=1,
        description="Lower limit on the calibrated accuracy when τ is raised under load. Default: 0.02 below full "
        "depth.",
    )
    max_load_disagreement: Annotated[float, LOAD] = Field(
        1.0,
        ge=0,
        le=1,
        description="Upper limit on the calibrated disagreement when τ is raised under load.",
    )
    audit_share: Annotated[float | None, AUDITS] = Field(
        None,
        ge=0,
        le=1,
        description="Share of texts that also run to full depth while nothing else is pending, to measure how often "
        "early answers differ from it. Default: 0; 0.05 with --guarantee.",
    )
    guarantee: Annotated[float | None, AUDITS] = Field(
        None,
        gt=0,
        lt=1,
        description="Rate of answers that may differ from full depth, at 95% confidence, for requests without exit "
        "options, of each key's name. Texts run to full depth at first, and exit earlier as audits of texts of the "
        "same name prove that the rate stays within this one. Instead of --tau, --target-speedup, --latency-budget-ms "
        "and --max-disagreement.",
    )
    state_dir: Annotated[Path | None, AUDITS] = Field(
        None,
        description="Folder in which audit results, with --learn or --audit-share records of audited texts, and with "
        "--learn learned versions are kept across restarts; each replica needs its own. Default: they are not kept.",
    )
    learn: Annotated[bool, LEARN] = Field(
        False,
        description="Fit exits to live traffic, without labels: texts that are audited are recorded (as numbers), a "
        "process at a low priority fits exits to 500, 750, 1125, … of them, and the server uses the new exits if "
        "they make it faster within the guarantee. Needs --guarantee and the fit extra.",
    )
    learn_bytes: Annotated[int, LEARN] = Field(
        2**27, ge=2**20, description="Memory for the records of each model, bytes."
    )
    learn_half_life: Annotated[float, LEARN] = Field(
        200_000.0,
        ge=1000,
        description="Number of texts after which a record has half the weight of a new one, when new ones replace old.",
    )
    learn_canary: Annotated[float, LEARN] = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the requests that a new version answers, as a canary, until an admin loads it as "
        "current. 0: it is current at once.",
    )
    api_keys_file: Annotated[Path | None, ACCESS] = Field(
        None,
        description="File of API keys, which clients need to classify and to read /v1/models: each line has a name and "
        "a key, or a name and sha256:digest; a name may have several keys. Or set DE3_API_KEYS, with lines separated "
        "by ;. Default: no key needed.",
    )
    api_keys: SecretStr | None = None
    admin_keys_file: Annotated[Path | None, ACCESS] = Field(
        None,
        description="File of admin keys, for loading and unloading models. Or set DE3_ADMIN_KEYS. Default: models "
        "cannot be changed.",
    )
    admin_keys: SecretStr | None = None
    rate_limit: Annotated[str | None, ACCESS] = Field(
        None, description="Rate limit for each name of an API key, in texts, such as 100/second."
    )
    cors_origins: Annotated[
        list[Annotated[str, Field(pattern=r"^(\*|https?://[^/\s]+)$")]], Option("Access", "--cors-origin")
    ] = Field([], description="Origin whose pages may send requests; repeat for more, * for all.")
    allowed_hosts: Annotated[
        list[Annotated[str, Field(pattern=r"^(\*|[^/\s:]+)$")]], Option("Access", "--allowed-host")
    ] = Field(
        [],
        description="Name allowed in the Host header, besides localhost and IP addresses; repeat for more, * for all. "
        "Checked, against DNS rebinding, by a server without keys that listens on this machine only.",
    )
    log_format: Annotated[Literal["text", "json"], LOGS] = Field(
        "text", description="text, or json (one object per line)."
    )
    log_requests: Annotated[bool, LOGS] = Field(False, description="Log a line for each request.")
    log_texts: Annotated[bool, LOGS] = Field(False, description="Also log the texts. They are user data.")
    traces: Annotated[bool, LOGS] = Field(
        False,
        description="Send OpenTelemetry traces to OTEL_EXPORTER_OTLP_ENDPOINT; needs the otel extra.",
    )

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        if self.max_texts > self.max_queue:
            raise ValueError("max_texts must not exceed max_queue: such a request could never be accepted")
        if self.max_body_bytes > self.max_inflight_bytes:
            raise ValueError(
                "max_body_bytes must not exceed max_inflight_bytes: such a body could never be accepted"
            )
        _ = self.options
        if self.guarantee is not None:
            other = next((name for name in EXCLUSIVE if getattr(self, name) is not None), None)
            if other is not None:
                raise ValueError(f"guarantee: cannot be combined with {other}; give one of them")
            if self.audit_share == 0:
                raise ValueError("guarantee: needs audits, and audit_share is 0")
        if self.learn and self.guarantee is None:
            raise ValueError("learn: needs guarantee, which decides how early its exits may answer")
        return self

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
        """Number of engine threads: as set, or one for each available core."""
        return self.threads or available_cores()


def option(name: str) -> Option | None:
    """The flag of a field of Settings; None for a secret, which has a variable only."""
    metadata: Iterable[Any] = Settings.model_fields[name].metadata
    return next((m for m in metadata if isinstance(m, Option)), None)


def variable(name: str) -> str:
    """The environment variable of a field of Settings."""
    return PREFIX + name.upper()


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Environment variables with the prefix that are not settings: misspelt, or from another version."""
    known = {variable(name) for name in Settings.model_fields} | {*OTHER_VARIABLES}
    return sorted(name for name in environment if name.startswith(PREFIX) and name not in known)


def available_cores() -> int:
    """Cores available to this process: its CPU affinity, limited by the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, cpu_quota() or cores))


def cpu_quota() -> int | None:
    """The container's CPU quota, in cores; a fraction of a core counts as one. None: it has none."""
    try:
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())  # "max": no quota
    except (OSError, ValueError):
        return None
    return -(-quota // period)
